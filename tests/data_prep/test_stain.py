"""Tiles obey the law of absorption, keep their company's bytes and show what they are told to."""

import numpy as np
import pytest

from data_prep.drawn import stain
from data_prep.drawn.glands import FIELD_OF_VIEW, distance_maps, glands, nuclei
from hallulib.data.checks import area_average

TYPICAL = {
    "gland_share": 0.9,
    "lumen": 0.4,
    "disorder": 0.12,
    "nucleus_um": 7.0,
    "pleomorphism": 0.1,
    "chromatin": 0.9,
    "infiltrate": 0.1,
    "haematoxylin": 1.0,
    "eosin": 1.0,
    "gland_um": 25.0,
    "blur_um": 0.8,
    "red": 0.96,
    "green": 0.95,
    "blue": 0.95,
}
SEEDS = [(7, i) for i in range(12)]


def tiles(n, **changes):
    return {k: np.full(n, v, np.float32) for k, v in (TYPICAL | changes).items()}


def drawn(size=64, **changes):
    return stain.render(tiles(len(SEEDS), **changes), SEEDS, size)


def laid_out(**changes):
    layout, _, _ = stain._random(SEEDS, 64)
    told = tiles(len(SEEDS), **changes)
    shapes = glands(told, layout)
    return shapes, nuclei(told, shapes, layout)


def test_twice_the_dye_absorbs_twice_in_every_channel():
    h, e = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    lamp = np.full((3, 3), 0.9, np.float32)
    density = lambda *dyes: -np.log10(stain.transmitted(*dyes, lamp) / 0.9)
    assert np.allclose(density(2 * h, 2 * e), 2 * density(h, e), atol=1e-5)
    only = density(h, 0 * e)
    assert np.allclose(only, h[:, None] * stain.DYES[0][:, None, None], atol=1e-5)
    assert np.allclose(np.linalg.norm(only, axis=1), h, atol=1e-5)


def test_twice_the_dyes_are_twice_the_density_of_the_tile_within_rounding(monkeypatch):
    monkeypatch.setattr(stain, "NOISE", 0)
    # without blur, which acts on light and not on its logarithm; pale, so that levels are many
    plain = {"blur_um": 0.01, "red": 1.0, "green": 1.0, "blue": 1.0}
    once, twice = (drawn(haematoxylin=k, eosin=k, **plain).astype(float) for k in (0.4, 0.8))
    density = lambda level: -np.log10(level / 255)
    rounding = 2 * 0.5 / np.log(10) / once + 0.5 / np.log(10) / twice  # of half a level, in both
    assert (np.abs(density(twice) - 2 * density(once)) <= 1.1 * rounding).all()


def test_without_dye_there_is_the_lamp_alone():
    blank = drawn(haematoxylin=0, eosin=0, red=0.9, green=0.8, blue=0.7)
    assert np.allclose(blank.mean((0, 2, 3)), 255 * np.array([0.9, 0.8, 0.7]), atol=0.5)
    assert blank.std((2, 3)).max() < 1.5 * 255 * stain.NOISE


def test_colours_are_those_of_the_stain():
    x = drawn(size=128, disorder=0.05).astype(float)
    red, green, blue = x.transpose(1, 0, 2, 3)
    lumen = x.min(1) > 225
    assert 0.02 < lumen.mean() < 0.4  # white
    nucleus = red < 100
    assert 0.05 < nucleus.mean() < 0.4
    assert (blue > red)[nucleus].mean() > 0.95  # blue to violet
    assert (green < blue)[nucleus].mean() > 0.95
    rest = ~lumen & ~nucleus
    assert (red > green + 10)[rest].mean() > 0.8  # pink
    assert x.min() > 5


def test_a_tile_is_the_same_in_any_company():
    together = drawn()
    for part in ([3], [0, 11, 5]):
        alone = stain.render(tiles(len(part)), [SEEDS[i] for i in part], 64)
        assert np.array_equal(alone, together[part])


def test_every_size_shows_the_same_tissue():
    large, middle, small = (drawn(size) for size in (128, 64, 32))
    for fine, coarse, least in ((large, middle, 0.95), (middle, small, 1.0), (large, small, 0.97)):
        mean = area_average(fine, coarse.shape[-1]).astype(float)
        alike = [
            np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(mean, coarse, strict=True)
        ]
        assert min(alike) >= least - 1e-9
        assert abs(mean.mean() - coarse.mean()) < 1.5


def test_blur_keeps_the_light_and_loses_detail():
    sharp, soft = drawn(blur_um=0.3).astype(float), drawn(blur_um=2.5).astype(float)
    assert abs(sharp.mean() - soft.mean()) < 1
    detail = lambda x: np.abs(np.diff(x)).mean()
    assert detail(soft) < 0.6 * detail(sharp)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("gland_share", 0.05, 0.95), ("infiltrate", 0.05, 0.6), ("nucleus_um", 6.0, 9.0)],
)
def test_more_of_a_parameter_is_more_of_it_in_the_tile(name, low, high):
    (few, small), (many, large) = (laid_out(**{name: v}) for v in (low, high))
    if name == "gland_share":
        assert (many[..., 2] > 0).sum() > 5 * max(1, (few[..., 2] > 0).sum())
    elif name == "infiltrate":
        round_ = [(n.long == n.short).sum() for n in (small, large)]
        assert round_[1] > 4 * round_[0]
    else:
        assert np.median(large.long * large.short) > 1.3 * np.median(small.long * small.short)


def test_disorder_bends_glands_and_stacks_their_nuclei():
    def roughness(shapes):
        return np.abs(shapes[shapes[..., 2] > 0][:, 4:]).mean()

    (tidy, few), (wild, many) = (laid_out(disorder=d, infiltrate=0.01) for d in (0.05, 0.5))
    assert roughness(wild) > 2 * roughness(tidy)
    assert len(many.tile) > 1.2 * len(few.tile)


def test_no_nucleus_swims_in_a_lumen():
    shapes, found = laid_out(disorder=0.3)
    um = np.arange(-56, 56, 0.5, dtype=np.float32)
    border, lumen = distance_maps(shapes, um)
    inside = np.maximum(abs(found.x), abs(found.y)) < FIELD_OF_VIEW / 2 - 1
    row, column = (np.rint((v[inside] + 56) / 0.5).astype(int) for v in (found.y, found.x))
    assert lumen[found.tile[inside], row, column].max() < 0
    assert (border >= lumen).mean() > 0.99


def test_glands_left_out_lie_in_corners():
    shapes, _ = laid_out(gland_share=0.999, gland_um=16.0)
    away = np.hypot(shapes[..., 0], shapes[..., 1])
    assert (np.diff(away) >= 0).all()  # from the middle outwards
    assert away[:, -1].min() > FIELD_OF_VIEW / 2
