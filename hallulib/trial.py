"""All settings of the one-shot experiment, and its result."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pandas as pd

from hallulib import UserError
from hallulib.hallucinate import Recipe, check_pool
from hallulib.learner import Fit
from hallulib.prototypes import PrototypeClassifier
from hallulib.settings import Count, Positive, Seed, Several, Width, check, one_of
from hallulib.supports import CHANGES, Source

GENERATORS = ("score_model", "oracle", "memory", *CHANGES)


@dataclass(frozen=True)
class Trial:
    """All settings of the experiment but the images, so that two runs with equal ones are equal.

    Attributes:
        train_scheme: label column of the training episodes.
        test_scheme: of the validation and test episodes; the same is the paper's *coarse* task,
            a coarser one (train on Gleason scores, test on ISUP grades) its *fine* task.
        n_way, k_shot, n_query: of every episode; fewer ways than classes draws classes.
        n_spare: real images kept aside for the oracle.
        counts: numbers of extra supports; each has a classifier trained with as many, and 0
            is the baseline.
        generator: where extra supports come from: ``"score_model"``, or one of the controls.
        pretraining: steps of the score model's pretraining.
        pretraining_width: of its network.
        forget: forget the class vectors of the pretraining, as if it had seen no labels.
        pool: images per class that are made once and drawn from, where the recipe allows; 0
            makes the supports of every episode anew.
        kind, metric, width, reduce_to: of the classifiers, see :func:`hallulib.prototypes.build`.
        steps: training episodes.
        decays: parts of them after which the learning rate is divided by 10.
        per_epoch: episodes between two validations.
        n_validation: validation episodes.
        n_episodes: test episodes.
        seed: of everything but the pretraining, which many trials share.
        recipe: how supports are hallucinated.
        fit: how classifiers learn.

    Raises:
        UserError: an unknown name or an impossible number.
    """

    train_scheme: str
    test_scheme: str
    n_way: Several = 4
    k_shot: Positive = 1
    n_query: Positive = 5
    n_spare: Count = 2
    counts: tuple[int, ...] = (0, 1, 2)
    generator: one_of(GENERATORS) = "score_model"
    pretraining: Count = 4000
    pretraining_width: Width = 24
    forget: bool = False
    pool: Count = 0
    kind: str = "bdc"
    metric: str = "cosine"
    width: Positive = 12
    reduce_to: Positive = 64
    steps: Count = 300
    decays: tuple[float, ...] = (0.6, 0.85)
    per_epoch: Positive = 50
    n_validation: Count = 20
    n_episodes: Several = 1000
    seed: Seed = 0
    recipe: Recipe = field(default_factory=Recipe)
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self):
        check(self)
        if 0 not in self.counts or max(self.counts) < 1 or min(self.counts) < 0:
            raise UserError(f"counts are {self.counts}; 0 and some number above it are needed")
        if not all(0 <= part <= 1 for part in self.decays):
            raise UserError(f"decays are {self.decays}; parts of the training, 0 to 1, are needed")
        if self.pool and self.generator == "score_model":
            check_pool(self.recipe)

    def settings(self) -> dict:
        """All of it as what JSON can hold."""
        return asdict(self) | {"counts": list(self.counts), "decays": list(self.decays)}

    @classmethod
    def of(cls, settings: dict) -> "Trial":
        """The trial that has these settings, among others that are none of its own.

        Raises:
            KeyError, TypeError: a setting is missing or unknown.
            UserError: a value is impossible.
        """
        own = {field.name: settings[field.name] for field in fields(cls)}
        own |= {"counts": tuple(own["counts"]), "decays": tuple(own["decays"])}
        own |= {"recipe": Recipe(**own["recipe"]), "fit": Fit(**own["fit"])}
        return cls(**own)


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        trial: its settings.
        folder: with ``run.json``, ``losses.csv``, ``auroc.csv`` and the weights in half precision.
        auroc: one row per test episode, one column per method; ``"baseline"`` is one.
        source: the generator as it was measured.
        classifiers: number of extra supports -> classifier.
    """

    trial: Trial
    folder: Path
    auroc: pd.DataFrame
    source: Source
    classifiers: dict[int, PrototypeClassifier]
