"""Patients are dealt to splits, so that nobody is on two sides."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from hallulib import UserError
from hallulib.data.checks import SPLITS


def split_patients(
    patients: Sequence[str], strata: Sequence[str], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Divides patients between splits, stratified, with shares counted in images.

    A patient's stratum is the rarest label among its images. Within a stratum, patients come in
    random order and each goes to the split that lacks most images; a stratum with as many patients
    as splits leaves no split empty. ``patients`` and ``strata`` are those of each image, in any
    order; ``fractions`` are shares of the images, at least 0, that sum to 1, of known splits, or
    it is a `UserError`.

    Example:
        >>> split_patients(["a", "b", "b"], ["x", "x", "y"], {"train": 0.5, "test": 0.5}, seed=0)
        {'a': 'train', 'b': 'train'}
    """
    possible = set(fractions) <= set(SPLITS) and all(s >= 0 for s in fractions.values())
    if not possible or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        told = f"shares >= 0 of {', '.join(SPLITS)} that sum to 1"
        raise UserError(f"fractions are {dict(fractions)}; {told} are needed")
    shares = {split: share for split, share in fractions.items() if share > 0}
    weight, rng = Counter(patients), np.random.default_rng(seed)
    pairs = set(zip(patients, strata, strict=True))
    n_with = Counter(label for _, label in pairs)
    # of the labels of a patient the rarest comes last and stays
    stratum = dict(sorted(pairs, key=lambda pair: (n_with[pair[1]], pair[1]), reverse=True))
    decided: dict[str, str] = {}
    for label in sorted(set(stratum.values())):
        members = sorted(patient for patient in stratum if stratum[patient] == label)
        order = [members[i] for i in rng.permutation(len(members))]
        decided |= _deal(order, weight, shares)
    return decided


def _deal(
    order: Sequence[str], weight: Mapping[str, int], shares: Mapping[str, float]
) -> dict[str, str]:
    """The split of each patient of a stratum, in this order: the one that lacks most images."""
    total = sum(weight[patient] for patient in order)
    lacking = {split: share * total for split, share in shares.items()}
    empty = set(shares) if len(order) >= len(shares) else set()
    decided = {}
    for index, patient in enumerate(order):
        # the last patients are kept for splits that have none yet
        open_to = [s for s in lacking if s in empty or len(order) - index > len(empty)]
        decided[patient] = split = max(open_to, key=lacking.__getitem__)
        lacking[split] -= weight[patient]
        empty.discard(split)
    return decided
