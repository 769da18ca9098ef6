"""Distances obey their laws; the features see what a reader of images sees."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.drawn import prostate as drawn
from hallulib.evidence.quality import (
    coverage,
    features,
    frechet_distance,
    kernel_distance,
    nearest,
)

BRAIN = Path(__file__).parents[3] / "shared" / "data" / "brain_mri" / "brain_mri_64.npz"


def normal(n, d, seed, dtype=torch.double):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed)).Q


@pytest.fixture(scope="module")
def prostate():
    """Two halves of real images; images of one patient are neighbours, so halves interleave."""
    x, _, _ = drawn.prostate(32, 0, 800, 8, 8, 8)
    x = torch.from_numpy(np.ascontiguousarray(x[:800])).float() / 127.5 - 1
    x = x[torch.randperm(800, generator=torch.Generator().manual_seed(0))]
    return x[:400], x[400:]


# features


@pytest.mark.parametrize(
    ("shape", "n"), [((1, 16, 16), 90), ((3, 33, 33), 106), ((1, 64, 64), 90)]
)
def test_features_are_finite_repeatable_and_do_not_depend_on_the_batch(shape, n):
    x = normal(300, math.prod(shape), 0, torch.float32).clamp(-1, 1).view(300, *shape)
    f = features(x)
    assert f.shape == (300, n)
    assert f.isfinite().all()
    assert torch.equal(f, features(x))
    torch.testing.assert_close(features(x[7:8]), f[7:8], atol=1e-5, rtol=1e-5)


def test_constant_images_have_no_texture_and_grey_as_colour_keeps_its_description():
    flat = torch.full((1, 1, 32, 32), 0.3)
    f = features(flat)
    torch.testing.assert_close(f[0, :16], torch.full((16,), 0.3))
    torch.testing.assert_close(f[0, 16:], torch.full((74,), math.log(0.2)), atol=1e-4, rtol=0)
    grey = normal(4, 1024, 1, torch.float32).clamp(-1, 1).view(4, 1, 32, 32)
    torch.testing.assert_close(features(grey.expand(-1, 3, -1, -1))[:, :90], features(grey))


def test_turning_an_image_by_a_quarter_exchanges_directions_and_keeps_their_sum():
    x = normal(3, 1024, 2, torch.float32).view(3, 1, 32, 32) / 3
    straight, turned = features(x), features(x.rot90(1, (2, 3)))
    directions = slice(34, 38)  # of the first octave: 0, 45, 90, 135 degrees
    torch.testing.assert_close(
        straight[:, directions], turned[:, [36, 37, 34, 35]], atol=1e-4, rtol=1e-4
    )


def test_colour_shifts_that_keep_the_mean_of_the_channels_are_seen():
    x = normal(64, 3 * 256, 3, torch.float32).view(64, 3, 16, 16) / 4
    tinted = x + torch.tensor([0.2, -0.2, 0.0]).view(3, 1, 1)
    f, g = features(x), features(tinted)
    torch.testing.assert_close(f[:, :90], g[:, :90], atol=1e-4, rtol=1e-4)
    assert frechet_distance(f, g) > 0.1


def blurred(x, sd):
    u = torch.arange(-6.0, 7.0)
    k = torch.exp(-(u**2) / (2 * sd**2))
    k /= k.sum()
    padded = F.pad(x, (6,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))


def noisy(x, sd):
    return (x + sd * normal(x.numel(), 1, 9, torch.float32).view(x.shape)).clamp(-1, 1)


def checkered(x, amplitude):
    u = torch.arange(x.shape[-1])
    return x + amplitude * ((u + u[:, None]) % 2 - 0.5)


def lesioned(x, share):
    """A bright spot of 1.3 px, anywhere in the middle of the given share of images."""
    at = 0.3 + 0.4 * torch.rand(len(x), 2, generator=torch.Generator().manual_seed(5))
    u = torch.arange(x.shape[-1]) / x.shape[-1]
    rows, columns = (torch.exp(-((u - a) ** 2) / 0.0032) for a in at.T[..., None])
    spot = 0.5 * rows[:, None, :, None] * columns[:, None, None, :]
    return (x + spot * (torch.arange(len(x)) < share * len(x)).view(-1, 1, 1, 1)).clamp(-1, 1)


FAULTS = {
    "blur": (blurred, (0.5, 0.8, 1.2)),
    "noise": (noisy, (0.06, 0.1, 0.16)),
    "contrast": (lambda x, s: (x + 1) * s - 1, (0.95, 0.9, 0.7)),
    "shift": (lambda x, s: x.roll(s, 3), (1, 2, 4)),
    "checkerboard": (checkered, (0.05, 0.1, 0.2)),
    "lesions": (lesioned, (0.5, 0.75, 1.0)),
    "collapse": (lambda x, s: x[torch.arange(len(x)) % s], (200, 50, 10)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_distances_grow_with_the_strength_of_a_fault(prostate, fault):
    real, other = prostate
    apply, strengths = FAULTS[fault]
    f = features(real)
    described = [features(other)] + [features(apply(other, s)) for s in strengths]
    frechet = [frechet_distance(f, g) for g in described]
    kernel = [kernel_distance(f, g) for g in described]
    assert frechet == sorted(frechet)
    assert frechet[-1] > 1.15 * frechet[0]
    assert kernel[-1] > kernel[0]


@pytest.mark.skipif(not BRAIN.exists(), reason="shared/data/brain_mri is not here")
def test_two_halves_of_real_brains_are_closer_than_brains_without_one_class():
    with np.load(BRAIN, allow_pickle=False) as z:
        x, y = z["images"][z["keep"]], z["label"][z["keep"]]
    order = np.random.default_rng(0).permutation(len(x))[:1600]
    x, y = torch.from_numpy(x[order])[:, None].float() / 127.5 - 1, torch.from_numpy(y[order])
    f, g, y = features(x[:800]), features(x[800:]), y[800:]
    floor = frechet_distance(f, g)
    assert all(frechet_distance(f, g[y != c]) > 1.3 * floor for c in range(4))


# distances


def test_the_frechet_distance_of_gaussians_has_its_closed_form():
    n, d = 40_000, 4
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.double)
    turn, mean = rotation(d), torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.double)
    a, b = normal(n, d, 0) * scale @ turn, normal(n, d, 1) @ turn + mean
    expected = mean.square().sum() + (scale - 1).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=0.02)


def test_the_frechet_distance_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = normal(60, 5, 0) @ normal(5, 5, 2), normal(70, 5, 1) @ normal(5, 5, 3) + 1
    root = sqrtm((torch.cov(a.T) @ torch.cov(b.T)).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum()
    expected += torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-9)


def test_distances_are_symmetric_unchanged_by_rotation_and_zero_for_equal_sets():
    a, b, turn = normal(50, 8, 0), 1.3 * normal(60, 8, 1) + 0.2, rotation(8)
    for distance in (frechet_distance, kernel_distance):
        assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)
        assert distance(a @ turn, b @ turn) == pytest.approx(distance(a, b), rel=1e-9)
    assert frechet_distance(a, b + 5 - 5) == pytest.approx(frechet_distance(a + 5, b + 5))
    assert frechet_distance(a, a.flip(0)) < 1e-12
    assert frechet_distance(a[:4], a[:4]) < 1e-12  # fewer images than features


def test_the_kernel_distance_equals_its_definition():
    a, b = normal(23, 4, 0), normal(31, 4, 1) + 0.5
    k = lambda x, y: (x @ y.T / 4 + 1) ** 3
    within = [(k(x, x).sum() - k(x, x).trace()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    expected = sum(within) - 2 * k(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(float(expected))


def test_the_kernel_distance_is_unbiased():
    null = [kernel_distance(normal(30, 4, s), normal(30, 4, s + 500)) for s in range(150)]
    assert abs(np.mean(null)) < 3 * np.std(null) / math.sqrt(150)


# manifolds


def test_equal_sets_have_full_coverage():
    a = normal(100, 16, 0)
    assert coverage(a, a.clone()) == 1


def test_a_collapsed_generator_covers_little():
    real = normal(300, 4, 0)
    collapsed = real[:5].repeat(60, 1) + 0.01 * normal(300, 4, 1)
    assert coverage(real, collapsed) < 0.2


def test_images_far_away_cover_nothing_not_even_an_outlier():
    real, far = normal(200, 4, 0), normal(200, 4, 1) + 100
    assert coverage(real, far) == 0
    far[0] = torch.tensor([-1000.0, 0, 0, 0])
    assert coverage(real, far) == 0


def test_the_coverage_of_one_distribution_has_its_expected_value():
    found = [coverage(normal(400, 6, s), normal(400, 6, s + 50), k=3) for s in range(5)]
    assert np.mean(found) == pytest.approx(1 - 2**-3, abs=0.03)


# copies


def test_the_nearest_image_is_the_nearest_by_brute_force_in_any_chunk():
    train = normal(2500, 48, 0, torch.float32).view(-1, 3, 4, 4)
    samples = normal(300, 48, 1, torch.float32).view(-1, 3, 4, 4)
    every = (train.flatten(1)[:, None] - samples.flatten(1)[None]).square().mean(2).sqrt()
    found = nearest(train, samples)
    assert torch.equal(found.index, every.argmin(0))
    torch.testing.assert_close(found.distance, every.amin(0))


def test_a_copy_is_at_distance_zero_and_one_grey_level_away_at_one_grey_level(prostate):
    train, _ = prostate
    found = nearest(train, train[11:12])
    assert (found.index.tolist(), found.distance.tolist()) == ([11], [0])
    found = nearest(train, train[11:12] + 2 / 255)
    assert found.distance.item() == pytest.approx(2 / 255, rel=1e-4)


def test_a_generator_that_copies_is_told_from_one_that_does_not():
    draw = lambda n, seed: normal(n, 256, seed, torch.float32).view(n, 1, 16, 16)
    train, held_out = draw(400, 0), draw(400, 1)
    near = torch.quantile(nearest(train, held_out).distance, 0.05)
    share = lambda found: float((found.distance < near).double().mean())
    assert share(nearest(train, draw(400, 2))) == pytest.approx(0.05, abs=0.04)
    copies = train[:100] + 0.02 * draw(100, 3)
    found = nearest(train, torch.cat([copies, draw(100, 4)]))
    assert share(found) == pytest.approx(0.525, abs=0.03)
    assert torch.equal(found.index[:100], torch.arange(100))
