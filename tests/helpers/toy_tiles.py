"""Small tiles of made-up tissue, and the command line as tests call it."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.__main__ import main
from hallulib.data import imageset


def tissue(seed: int, height: int = 224, width: int = 224) -> np.ndarray:
    """A pink tile, uint8 (height, width, 3), other for every seed; neither white nor grey."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers((150, 40, 120), (230, 110, 200), (height // 4 + 1, width // 4 + 1, 3))
    return np.repeat(np.repeat(coarse, 4, 0), 4, 1)[:height, :width].astype(np.uint8)


def glass(seed: int, height: int = 224, width: int = 224) -> np.ndarray:
    """A white tile with one odd pixel in the middle."""
    tile = np.full((height, width, 3), 245, np.uint8)
    tile[height // 2, width // 2] = seed % 256
    return tile


def save(file: Path, tile: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile).save(file)
    return file


def truncate(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])


def prepared(out: Path, *command) -> imageset.ImageSet:
    """The set that a command makes in this process; ``out`` takes the place of None."""
    told = [str(out) if word is None else str(word) for word in command]
    assert main([*told, "--workers=1"]) == 0
    return imageset.open(out)


def refused(capsys, out: Path, *command) -> str:
    """The one sentence of a command that leaves nothing behind but what it read whole."""
    before = set(os.listdir(out.parent))
    told = [str(out) if word is None else str(word) for word in command]
    assert main([*told, "--workers=1"]) == 2
    assert set(os.listdir(out.parent)) - before <= {f"{out.name}.partial"}
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "item" not in line]
    assert len(lines) == 1  # besides the progress
    return lines[0]


def written(image_set: imageset.ImageSet) -> str:
    """Table and card, as text."""
    return "".join((image_set.path / name).read_text() for name in ("table.csv", "card.json"))
