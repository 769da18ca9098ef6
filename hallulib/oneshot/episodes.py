r"""One-shot tasks: a few images to learn from, others to be classified, no patient on both sides.

Slices of one lesion are near copies, so an episode deals *patients*, not images. Each patient of
the split plays at most one part in an episode: its images are support, spare or query. A class of
P patients with one support each therefore has at most P - 1 patients to ask about, and a class of
a single patient cannot be drawn at all. Episode i comes from the numbers (seed, i) alone:
resuming a run needs no state and every method sees the same episodes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hallulib import UserError
from hallulib.data.checks import count_units
from hallulib.data.imageset import ImageSet

Draw = np.random.Generator


class TooFew(UserError):
    """A split that has too few patients or images for the episodes asked of it."""


class Episode(NamedTuple):
    """Positions in the image set that make one task.

    Row c of ``support``, the images to learn from, shows ``classes[c]``; classes are in the order
    of the card. Those of ``query`` are to be classified, each once, class by class, and
    ``answers`` are the positions of their classes in ``classes``. ``spare`` are other real images
    of each class, for an oracle.
    """

    classes: tuple[str, ...]
    support: Int[np.ndarray, "n_way k_shot"]
    query: Int[np.ndarray, " n_queries"]
    answers: Int[np.ndarray, " n_queries"]
    spare: Int[np.ndarray, "n_way n_spare"]


def unasked(classes: tuple[str, ...]) -> Episode:
    """A task of these classes that names no images."""
    nothing = np.empty((len(classes), 0), np.int64)
    return Episode(classes, nothing, nothing[0], nothing[0], nothing)


def images_at(
    images: ImageSet, rows: Int[np.ndarray, "*axes"]
) -> Float[Tensor, "*axes channels height width"]:
    """Images at positions that have several axes, as those of a support."""
    return images.tensor(rows.ravel()).unflatten(0, rows.shape)


class _Class(NamedTuple):
    """The images of one class: row i of the image set belongs to patient ``patients[i]``."""

    name: str
    rows: np.ndarray
    patients: np.ndarray

    def images_of(self, patient: int, rng: Draw) -> np.ndarray:
        return rng.permutation(self.rows[self.patients == patient])


class Episodes:
    """An endless sequence of tasks from one split of an image set; ``episodes[i]`` is the i-th.

    For the support a patient is drawn first and then one of its images, so that a patient with
    many slices is not favoured; the supports of one class come from different patients. Spare
    images come from as many patients as there are spare images, but at most from half of those
    that the support leaves and from no more than the queries can do without; one such patient may
    then give several images, and an image comes twice only when all of them are used. Queries are
    drawn from all images of the remaining patients, each image at most once.

    Args:
        scheme: the label column that names the classes.
        split: whose images are used; positions nevertheless refer to all of ``images``.
        n_way: classes per episode, at least 2; all of the scheme unless given. Fewer are drawn
            anew for each episode, from those with enough patients.
        k_shot, n_query, n_spare: support, query and spare images per class.
        share_patients: deal images as if each had its own patient, a leak that flatters results.

    Attributes:
        classes: the classes that episodes draw from, in the order of the card.
        left_out: the classes that have too few patients or images.

    Raises:
        UserError: an unknown scheme, or more ways than it has classes.
        TooFew: fewer classes with enough patients than ``n_way``: whichever are support or spare
            (for other classes too, where patients have several), the others hold all queries.

    Example:
        >>> from hallulib.data.imageset import ImageSet
        >>> import pandas as pd
        >>> table = pd.DataFrame({"patient": list("aabbccdd"), "split": "test"})
        >>> table["g"] = list("xyxyxyxy")
        >>> card = {"name": "toy", "labels": {"g": {"values": ["x", "y"]}}}
        >>> toy = ImageSet(np.zeros((8, 1, 4, 4), np.uint8), table, card)
        >>> task = Episodes(toy, "g", split="test", n_query=1)[0]
        >>> task.classes, task.support.shape, task.answers.tolist()
        (('x', 'y'), (2, 1), [0, 1])
        >>> set(table.patient[task.support.flat]) & set(table.patient[task.query])
        set()
    """

    def __init__(
        self,
        images: ImageSet,
        scheme: str,
        *,
        split: str,
        n_way: int | None = None,
        k_shot: int = 1,
        n_query: int = 5,
        n_spare: int = 0,
        seed: int = 0,
        share_patients: bool = False,
    ):
        known, labels = images.classes(scheme), images.labels(scheme).numpy()
        self.n_way = len(known) if n_way is None else n_way
        if self.n_way > len(known):
            raise UserError(
                f"{images.name}: n_way is {self.n_way}; scheme {scheme} has {len(known)} classes"
            )
        self.k_shot, self.n_query, self.n_spare, self.seed = k_shot, n_query, n_spare, seed
        patient = np.arange(len(images)) if share_patients else images.table["patient"]
        self._patient = np.unique(patient, return_inverse=True)[1]
        labels = np.where(images.table["split"] == split, labels, -1)
        rows = [np.flatnonzero(labels == index) for index in range(len(known))]
        found = [_Class(name, r, self._patient[r]) for name, r in zip(known, rows, strict=True)]
        faults = self._faults(found, "unknown" if share_patients else images.unit)
        if len(found) - len(faults) < self.n_way:
            raise TooFew(
                f"{images.name}: {len(found) - len(faults)} of the {len(found)} classes of scheme"
                f" {scheme} can serve in split {split} and n_way is {self.n_way}:"
                f" {next(iter(faults.values()))}"
            )
        self._found = [c for c in found if c.name not in faults]
        self.classes = tuple(c.name for c in self._found)
        self.left_out = tuple(faults)

    def __getitem__(self, index: int) -> Episode:
        rng = np.random.default_rng([self.seed, index])
        # in the order of the card, so that a position means the same class in every full episode
        drawn = np.sort(rng.choice(len(self._found), self.n_way, replace=False))
        classes = [self._found[i] for i in drawn]
        taken = np.zeros(len(self._patient), bool)
        support = np.stack([self._support(c, rng) for c in classes])
        taken[self._patient[support]] = True
        spare = self._spare(classes, taken, rng)
        left = [c.rows[~taken[c.patients]] for c in classes]
        query = [rng.choice(rows, self.n_query, replace=False) for rows in left]
        answers = np.repeat(np.arange(self.n_way), self.n_query)
        names = tuple(c.name for c in classes)
        return Episode(names, support, np.concatenate(query), answers, spare)

    def take(self, n: int) -> Iterator[Episode]:
        """The first n episodes."""
        return (self[index] for index in range(n))

    def _support(self, c: _Class, rng: Draw) -> np.ndarray:
        patients = rng.choice(np.unique(c.patients), self.k_shot, replace=False)
        return np.array([c.images_of(patient, rng)[0] for patient in patients.tolist()])

    def _spare(
        self, classes: list[_Class], taken: Bool[np.ndarray, " n"], rng: Draw
    ) -> Int[np.ndarray, "n_way n_spare"]:
        """Spare images; their patients are marked in ``taken``."""
        if not self.n_spare:
            return np.empty((self.n_way, 0), np.int64)
        unused = [np.unique(c.patients[~taken[c.patients]]) for c in classes]
        free = [rng.permutation(patients).tolist() for patients in unused]
        kept = [patients[:1] for patients in free]
        taken[np.concatenate(kept)] = True
        # one patient each is always there; further ones only while all queries are
        for turn in range(1, self.n_spare):
            for patients, mine in zip(free, kept, strict=True):
                if turn < len(patients) // 2:
                    more = taken.copy()
                    more[patients[turn]] = True
                    if min(np.count_nonzero(~more[c.patients]) for c in classes) >= self.n_query:
                        mine.append(patients[turn])
                        taken[:] = more
        spare = [_in_turns(c, mine, rng) for c, mine in zip(classes, kept, strict=True)]
        return np.stack([np.resize(rows, self.n_spare) for rows in spare])

    def _faults(self, found: list[_Class], unit: str) -> dict[str, str]:
        """What is wrong with each class that cannot serve in every draw; unit: of the set."""
        once = np.concatenate([np.unique(c.patients) for c in found])
        several = np.bincount(once, minlength=len(self._patient)) > 1
        spare, faults = int(self.n_spare > 0), {}
        for c in found:
            patients, images = np.unique(c.patients, return_counts=True)
            left = _left_at_worst(images, several[patients], self.k_shot + spare, self.n_way - 1)
            if left < self.n_query:
                whose = "" if unit == "unknown" else f" of {count_units(unit, len(patients))}"
                faults[c.name] = (
                    f"class {c.name!r} has {images.sum()} images{whose}; with {self.k_shot} set"
                    f" aside for the support and {spare} for spare images, {left} images are sure"
                    f" to remain for {self.n_query} queries"
                )
        return faults


def _in_turns(c: _Class, patients: list[int], rng: Draw) -> np.ndarray:
    """All images of the patients: the first of each, then the second of each, and so on."""
    images = [c.images_of(patient, rng) for patient in patients]
    turn = np.concatenate([np.arange(len(rows)) for rows in images])
    return np.concatenate(images)[np.argsort(turn, kind="stable")]


def _left_at_worst(images: np.ndarray, several: np.ndarray, own: int, others: int) -> int:
    """Images left when the largest go: ``own`` and, of patients of ``several`` classes, more."""
    shared = np.sort(images[several])[::-1]
    rest = np.concatenate([shared[own * others :], images[~several]])
    return int(np.sort(rest)[::-1][own:].sum())
