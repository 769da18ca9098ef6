r"""One-shot tasks: a few images to learn from, others to be classified, no patient on both sides.

Slices of one lesion are near copies, so an episode deals *patients*, not images. Each patient of
the split plays at most one part in an episode: its images are support, spare or query. A class of
P patients with one support each therefore has at most P - 1 patients to ask about, and a class of
a single patient cannot be drawn at all. Episode i comes from the numbers (seed, i) alone:
resuming a run needs no state and every method sees the same episodes.

Thousands of episodes from a few patients say no more than the patients do. So those of a test are
dealt within disjoint groups of patients, episode i within group i modulo the number of groups:
the groups are independent, and `hallulib.evidence.metrics.over_patients` counts them.
"""

import copy
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
        groups: disjoint groups of patients, alike in classes, within which episodes are dealt;
            fewer if some class that can serve in the whole split cannot in each of so many.
        share_patients: deal images as if each had its own patient, a leak that flatters results.

    Attributes:
        groups: as many as there are.
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
        groups: int = 1,
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
        self._names, self._labels = known, np.where(images.table["split"] == split, labels, -1)
        self._group = np.zeros(len(self._patient), int)  # of a patient
        (found,) = self._dealt(self._labels, 1)
        faults = self._faults(found, "unknown" if share_patients else images.unit)
        if len(found) - len(faults) < self.n_way:
            raise TooFew(
                f"{images.name}: {len(found) - len(faults)} of the {len(found)} classes of scheme"
                f" {scheme} can serve in split {split} and n_way is {self.n_way}:"
                f" {next(iter(faults.values()))}"
            )
        self.classes = tuple(c.name for c in found if c.name not in faults)
        self.left_out = tuple(faults)
        for self.groups in range(groups, 0, -1):
            self._group = self._in_groups(found, self.groups)
            self._deals = self._dealt(self._labels, self.groups)
            if self._all_serve():
                break

    def __getitem__(self, index: int) -> Episode:
        rng = np.random.default_rng([self.seed, index])
        # in the order of the card, so that a position means the same class in every full episode
        drawn = np.sort(rng.choice(len(self.classes), self.n_way, replace=False))
        serving = [c for c in self._deals[index % self.groups] if c.name in self.classes]
        classes = [serving[i] for i in drawn]
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

    def permuted(self, draw: int, tries: int = 20) -> "Episodes":
        """Tasks like these, the labels of the patients of each group dealt anew among them: what a
        classifier gets that knows patients and nothing of classes. A `TooFew` error if none of so
        many ``tries`` leaves the classes images enough.
        """
        other, rng = copy.copy(self), np.random.default_rng([self.seed, draw])
        rows = np.flatnonzero(self._labels >= 0)
        who, first = np.unique(self._patient[rows], return_inverse=True)
        own = [rows[first == i] for i in range(len(who))]
        for _ in range(tries):
            labels = self._labels.copy()
            for group in range(self.groups):
                members = np.flatnonzero(self._group[who] == group)
                for to, of in zip(members, rng.permutation(members), strict=True):
                    labels[own[to]] = np.resize(self._labels[own[of]], len(own[to]))
            other._deals = self._dealt(labels, self.groups)
            if other._all_serve():
                return other
        raise TooFew(f"permuted among patients, the labels left too few images {tries} times")

    def _in_groups(self, found: list[_Class], groups: int) -> Int[np.ndarray, " patients"]:
        """The group of each patient: dealt round class by class, the rarest first."""
        rng, group = np.random.default_rng(self.seed), np.full(len(self._patient), -1)
        members = sorted((rng.permutation(np.unique(c.patients)) for c in found), key=len)
        order = np.fromiter(dict.fromkeys(np.concatenate(members).tolist()), int)
        group[order] = np.arange(len(order)) % groups
        return group

    def _dealt(self, labels: Int[np.ndarray, " n"], groups: int) -> list[list[_Class]]:
        """The classes of each group, by the labels given."""
        where, dealt = self._group[self._patient], []
        for group in range(groups):
            own = np.where(where == group, labels, -1)
            rows = {name: np.flatnonzero(own == i) for i, name in enumerate(self._names)}
            dealt.append([_Class(name, r, self._patient[r]) for name, r in rows.items()])
        return dealt

    def _all_serve(self) -> bool:
        """Whether the classes that serve in the whole split do so in each group."""
        faults = [self._faults(found, "unknown") for found in self._deals]
        return not set(self.classes) & set().union(*faults)

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
