"""The four long works on toys, each in a folder where it goes on from what it finds.

They change what is slow about the library, so they want a process of their own.
"""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

import nbformat
import torch
import toy_archive
from nbformat.v4 import new_code_cell, new_notebook, new_output
from toy_greys import GREY, moved
from toy_task import IMAGES

from hallulib.diffusion import train
from hallulib.notebook import grid
from hallulib.notebook.ledger import MEASURED
from hallulib.oneshot import experiment, joint
from hallulib.oneshot.experiment import Trial
from hallulib.oneshot.hallucinate import Recipe

pretrain = train.pretrain


def pretraining(folder: Path) -> None:
    """With a checkpoint after each step."""
    os.environ["HALLULIB_RUNS"] = str(folder)
    train.pretrain = partial(pretrain, every=1)
    train.pretrained(IMAGES, scheme="grade", steps=8, batch_size=4, width=8, device="cpu")


def joint_training(folder: Path) -> None:
    """With a checkpoint after each episode, and a table of results after every second."""
    os.environ["HALLULIB_RUNS"] = str(folder)
    joint.EPISODES_AT_ONCE = 2
    trial = Trial(
        "grade",
        "grade",
        n_way=2,
        n_query=2,
        counts=(0, 1),
        pretraining=1,
        pretraining_width=8,
        kind="mean",
        width=4,
        supervised=2,
        steps=3,
        per_epoch=1,
        n_validation=1,
        n_episodes=4,
        recipe=Recipe(sampler_steps=1),
    )
    experiment.run(IMAGES, trial)


def cells(folder: Path) -> None:
    """Three cells one after the other, without the seconds that each kernel takes."""
    grid.execute = execute
    for steps in range(3):
        file = folder / f"{steps}.json"
        if not file.exists() or json.loads(file.read_text())["error"]:
            grid.run_cell(Path("01_toy.ipynb"), {"STEPS": steps, "SEED": 0}, file)


def execute(chapter: Path, out: Path, values: dict, before: str) -> nbformat.NotebookNode:
    """Writes the notebook after each of its code cells, as papermill does."""
    row = {"product": {"value": values["STEPS"] * 0.1, "low": None, "high": None, "n": 1}}
    output = new_output("display_data", {MEASURED: {"measured": row, "series": {}}})
    sources = [new_code_cell("1", id="a"), new_code_cell("2", id="b", outputs=[output])]
    for n in (1, 2):
        notebook = new_notebook(cells=sources[:n])
        nbformat.write(notebook, out)
    return notebook


def archive(folder: Path) -> None:
    """A set that takes the place of another."""
    toy_archive.make(folder / "set", overwrite=True)


def estimator(folder: Path) -> None:
    """A classifier that takes the place of another."""
    moved(GREY, random_state=1).save(folder)


def warm() -> None:
    """What a first call does once for all later ones."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for work in (pretraining, joint_training, cells, archive, estimator):
            work(Path(folder) / work.__name__)
