"""A one-shot task that is easy to learn, and models small enough to train in a moment."""

import numpy as np
import pandas as pd

from hallulib.data.imageset import ImageSet
from hallulib.diffusion import unet
from hallulib.oneshot import bdc
from hallulib.oneshot.episodes import Episodes
from hallulib.oneshot.hallucinate import Hallucinator, Recipe

GRADES = {"dark": 80, "bright": 175}  # mean grey of the class
TASK = dict(n_query=3, n_spare=2, seed=5)


def image_set(patients=12, noise=30.0, seed=0):
    """Two grades that differ in brightness, each of two subtypes that differ in nothing.

    Every split has ``patients`` patients of each grade with two images.
    """
    rows, pictures, rng = [], [], np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for grade, mean in GRADES.items():
            for i in range(patients):
                for _ in range(2):
                    rows.append((f"{split}-{grade}-{i}", split, grade, f"{grade}{i % 2}"))
                    pictures.append(rng.normal(mean, noise, (1, 8, 8)).clip(0, 255))
    table = pd.DataFrame(rows, columns=["patient", "split", "grade", "subtype"])
    subtypes = [f"{grade}{i}" for grade in GRADES for i in (0, 1)]
    labels = {"grade": {"values": list(GRADES)}, "subtype": {"values": subtypes}}
    card = {"name": "toy", "origin": "made in the tests", "labels": labels}
    return ImageSet(np.array(pictures, np.uint8), table, card)


IMAGES = image_set()


def tasks(split="train", scheme="grade", images=IMAGES, **options):
    return Episodes(images, scheme, split=split, **(TASK | options))


def score_model(labels=tuple(GRADES), seed=0):
    # not 8 wide: with one channel per group, normalisation takes time and class away
    return unet.build(size=8, labels=labels, width=16, seed=seed).eval()


def hallucinator(**options):
    """With few and cheap steps of the sampler."""
    return Hallucinator(score_model(), Recipe(**({"sampler_steps": 2} | options)))


def classifiers(counts=(0, 1), kind="mean"):
    """Fresh ones of the same initial weights, one for each number of extra supports."""
    return {n: bdc.build(kind, width=4, reduce_to=8) for n in counts}


def same(one, other):
    """Whether two mappings hold the same tensors, bit by bit."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].numpy().tobytes() == other[k].numpy().tobytes()
        for k in one
    )
