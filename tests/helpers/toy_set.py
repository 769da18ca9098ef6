"""A small image set made without the writer, so that reading is tested on its own."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

ROWS = [  # patient, split, grade, item
    ("p1", "train", "low", "0"),
    ("p1", "train", "high", "1"),
    ("p2", "val", "low", "2"),
    ("p3", "test", "high", "3"),
    ("p4", "unlabelled", "", "4"),
]


def write(folder: Path, images=None, rows=ROWS, **changes) -> Path:
    """A small image set made without the writer, so that reading is tested on its own."""
    folder.mkdir(parents=True)
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (len(rows), 1, 12, 12)).astype(np.uint8)
    np.save(folder / "images.npy", images)
    table = pd.DataFrame(rows, columns=["patient", "split", "grade", "item"])
    table.to_csv(folder / "table.csv", index=False, lineterminator="\n")
    seal(folder, len(rows), len({row[0] for row in rows}), **changes)
    return folder


def seal(folder: Path, images: int, patients: int, **changes) -> None:
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("images.npy", "table.csv")
    }
    card = {
        "name": "toy",
        "origin": "made up",
        "licence": "none",
        "spacing_mm": [0.5, 0.25],
        "processing": {"steps": [], "versions": {}},
        "labels": {"grade": {"values": ["low", "high"], "meaning": {}}},
        "counts": {"images": images, "patients": patients},
        "sha256": sums,
    }
    (folder / "card.json").write_text(json.dumps(card | changes))
