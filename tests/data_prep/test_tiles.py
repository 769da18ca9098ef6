"""Blank tiles: the rule, and that all generic archives obey it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tiles import glass, prepared, save, tissue

from data_prep import tiles

GLAS = Path(__file__).parents[3] / "shared" / "data" / "histology" / "glas_tiles_64.npz"


@given(st.integers(0, 100), st.floats(0, 0.99), st.sampled_from([(250, 240, 217), (9, 9, 9)]))
@settings(deadline=None)
def test_a_tile_is_blank_if_more_than_the_share_of_its_pixels_are(n, share, colour):
    tile = tissue(0, 10, 10).reshape(100, 3)
    tile[:n] = colour
    expected = {250: "white", 9: "grey"}[colour[0]] if n / 100 > share else ""
    assert tiles.kind(tile.reshape(10, 10, 3), share) == expected


@given(st.integers(0, 5), st.floats(0, 0.99), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_only_the_pixels_count_and_not_their_places(seed, share, random):
    tile = np.concatenate([tissue(seed, 6, 8), glass(seed, 6, 8)[:seed]])
    order = random.sample(range(len(tile) * 8), len(tile) * 8)
    mixed = tile.reshape(-1, 3)[order].reshape(tile.shape)
    assert tiles.kind(tile, share) == tiles.kind(mixed, share)


def test_a_grey_picture_is_blank_only_if_it_is_white():
    assert tiles.kind(np.full((4, 4), 128, np.uint8), 0.8) == ""
    assert tiles.kind(np.full((4, 4), 240, np.uint8), 0.8) == "white"


def test_blank_tiles_do_not_depend_on_the_size_of_the_images(tmp_path):
    for i in range(12):
        tile = tissue(i, 32, 32)
        tile[: 24 + i % 6] = 255
        save(tmp_path / "in" / f"{i:02d}.png", tile)
    command = ("folder", tmp_path / "in", None, "--unlabelled", "--blank=drop")
    sets = [prepared(tmp_path / f"{n}", *command, f"--size={n}") for n in (32, 5)]
    items = [list(found.table["item"]) for found in sets]
    assert items[0] == items[1] == ["1", "2", "7", "8"]  # 24 and 25 of 32 rows are not above .8
    assert sets[0].card["report"]["blank tile, white: left out"] == 8


def test_a_set_of_blank_tiles_only_is_refused(tmp_path, capsys):
    save(tmp_path / "in" / "0.png", glass(0, 32, 32))
    command = ("folder", tmp_path / "in", None, "--unlabelled", "--blank=drop", "--size=8")
    with pytest.raises(AssertionError):
        prepared(tmp_path / "set", *command)
    assert "no image in it or in any other" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["1", "-0.1", "x"])
def test_impossible_shares_exit_with_2(tmp_path, share):
    with pytest.raises(SystemExit, match="2"):
        prepared(tmp_path / "set", "folder", tmp_path, None, f"--blank-share={share}")


@pytest.mark.skipif(not GLAS.exists(), reason="needs the GlaS tiles beside the repository")
def test_blank_tiles_of_glas_are_those_whose_published_share_of_white_is_above_the_limit():
    with np.load(GLAS, allow_pickle=False) as glas:
        images, white = glas["images"], glas["white_fraction"]
    blank = [bool(tiles.kind(image, 0.8)) for image in images]
    assert np.array_equal(blank, white > 0.8)
    assert sum(blank) == 98
