"""An archive of random numbers for the tests of the writer; light, since workers import it."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import writer
from data_prep.writer import Study, prepare
from hallulib.__main__ import run

CARD = {
    "name": "toy",
    "origin": "made up",
    "licence": "none",
    "spacing_mm": None,
    "processing": {"steps": ["random numbers"], "versions": {}},
    "labels": {"grade": {"values": ["low", "high"], "meaning": {}}},
    "coordinates": ["slice"],
}


@dataclass(frozen=True)
class Patient:
    number: int
    size: int = 8
    channels: int = 1
    fault: str = ""
    sleep: float = 0

    @property
    def key(self) -> str:
        return f"study {self.number}"


def read(item: Patient) -> Study:
    """`number % 4` images of one patient; grade by parity."""
    if item.fault == "crash":
        raise ValueError("odd header\nwith two lines")
    if item.fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(item.sleep)
    rng = np.random.default_rng(item.number)
    shape = (item.number % 4, item.channels, item.size, item.size)
    images = rng.integers(0, 256, shape).astype(np.uint8)
    row = {
        "patient": f"p{item.number:03d}",
        "split": "",
        "grade": ["low", "high"][item.number % 2],
    }
    rows = [row | {"slice": i} for i in range(len(images))]
    if item.fault == "identifier":
        rows[0]["patient_name"] = "Jane Doe"
    if item.fault == "label":
        rows[0]["grade"] = "worse"
    if item.fault == "float":
        images = images / 255
    return Study(list(images), rows, [] if len(images) else ["study without image"])


SPLITS = writer.by_fraction("grade", {"train": 0.5, "val": 0.25, "test": 0.25}, seed=0)


def make(out: Path, items=None, card=CARD, splits=SPLITS, **settings) -> writer.Report:
    items = [Patient(n) for n in range(24)] if items is None else items
    return prepare(out, items, read, card, splits=splits, **{"workers": 1} | settings)


SLOW = [Patient(n, sleep=0.04) for n in range(40)]


def slowly(out: str, workers: str) -> int:
    make(Path(out), SLOW, workers=int(workers))
    return 0


if __name__ == "__main__":
    sys.exit(run(partial(slowly, *sys.argv[1:])))
