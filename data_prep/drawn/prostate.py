r"""Generated prostate data sets whose best possible AUROC is known: slices, and their lesions.

Axial T2-weighted slices are drawn from geometry: a gland with its bright peripheral and its
darker nodular transition zone, urethra, muscles, rectum, bladder at the base; then a bias field
and Rician noise. Every patient has one anatomy, so neighbouring slices look alike. A cancer
patient has one dark lesion. Its four parameters are normal when transformed, and independent
given the Gleason score,

.. math:: u = (\ln \text{size}, \operatorname{logit} \text{contrast}, \ln \text{edge},
          \ln \text{texture}), \qquad
          u_j \mid \mathrm{GS} \sim \mathcal N(m_j + s_j\,\delta_j(\mathrm{GS}),\ s_j^2),

with the median (of the parameter itself), the spread s and the shift delta of each score in

======  ======  ==========  =========  =========  =========  =========
score   ISUP    frequency   size_mm    contrast   edge_mm    texture
======  ======  ==========  =========  =========  =========  =========
median                      9.5        0.42       0.9        0.055
spread                      0.28       0.45       0.40       0.45
3+4     2       0.50        0          0          0          0
4+3     3       0.25        1.0        0.6        0          -0.1
4+4     4       0.08        0.3        1.5        0.5        -1.2
3+5     4       0.02        0.2        1.2        0.8        -0.9
5+3     4       0.01        0.4        1.6        0.9        -1.3
4+5     5       0.09        1.5        1.2        1.5        -0.8
5+4     5       0.04        1.7        1.4        1.6        -1.0
5+5     5       0.01        2.1        1.6        1.9        -1.2
======  ======  ==========  =========  =========  =========  =========

*size_mm* is the diameter, *contrast* the share of signal lost relative to the zone the lesion
lies in, *edge_mm* the width of its blurred border, *texture* the standard deviation of the signal
inside, before pixels average it. Within a patient u moves slightly and smoothly from slice to
slice, in a way that leaves the density of each single slice exactly the one above; the position
is drawn alike for all scores. A class thus has a closed-form posterior given a slice's true
parameters, and no method that sees one slice of a new patient can expect to rank better than this
posterior does (Neyman-Pearson). That ceiling is generous: noise and pixels hide part of the
parameters.

Two sets show this. ``phantom`` is the whole slice, 64 mm wide, as the scanner gives it: at 2 mm
per pixel nobody can see what the lesion is. ``lesions`` are windows of 16 mm around the lesion, or
around random points of the gland where there is none, and their classes lie 1.3 times as far
apart; a size beyond what such a window can show is to the posterior just a large one.
"""

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from data_prep.drawn import law
from data_prep.drawn.anatomy import FIELD_OF_VIEW, SLICE_SPACING, WAVES, WINDOW, half_axes, render
from data_prep.drawn.brush import n_waves
from hallulib import UserError
from hallulib.data.checks import check_memory

GS = ("3+4", "4+3", "4+4", "3+5", "5+3", "4+5", "5+4", "5+5")
FREQUENCY = np.array([0.50, 0.25, 0.08, 0.02, 0.01, 0.09, 0.04, 0.01])
ISUP = ("2", "3", "4", "4", "4", "5", "5", "5")  # of each Gleason score
SCHEMES = {  # scheme: the class of each Gleason score, and what each class means, in order
    "isup": (ISUP, {g: f"ISUP grade group {g}" for g in "2345"}),
    "gs": (GS, {g: f"Gleason score {g}" for g in GS}),
    "grade2": (("low", *("high",) * 7), {"low": "ISUP 2", "high": "ISUP 3 or higher"}),
}
PARAMETERS = ("size_mm", "contrast", "edge_mm", "texture")
DECIMALS = (2, 3, 2, 4, 1, 1)  # of the parameters and of the centre (x_mm, y_mm)
CENTRE = np.array([np.log(9.5), np.log(0.42 / 0.58), np.log(0.9), np.log(0.055)])
SPREAD = np.array([0.28, 0.45, 0.40, 0.45])
SHIFT = np.array(  # (score, parameter)
    [
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 0.6, 0.0, -0.1],
        [0.3, 1.5, 0.5, -1.2],
        [0.2, 1.2, 0.8, -0.9],
        [0.4, 1.6, 0.9, -1.3],
        [1.5, 1.2, 1.5, -0.8],
        [1.7, 1.4, 1.6, -1.0],
        [2.1, 1.6, 1.9, -1.2],
    ]
)
SLICE_SHARE = 0.1  # part of the variance of u that differs between the slices of a patient
COUNTS = {"unlabelled": 11_202, "train": 1_611, "val": 200, "test": 238}  # the paper's
MANY = 2_400  # test slices of the windows
SPLITS = tuple(COUNTS)
# of each embedded set, what its law and its pixels depend on besides the size
VIEWS: dict[str, dict[str, float]] = {
    "phantom": {"window_mm": FIELD_OF_VIEW, "separation": 1.0},
    "lesions": {"window_mm": 16.0, "separation": 1.3},
}


def best_auroc(
    scheme: str, window_mm: float = FIELD_OF_VIEW, separation: float = 1.0, *, seed: int = 0
) -> law.Estimate:
    r"""The macro one-vs-rest AUROC of the exact posterior, which no classifier can expect to beat.

    Drawn from the densities of the module's table, classes as frequent as in the data set.

    Args:
        scheme: ``"isup"`` (4 classes), ``"grade2"`` (2) or ``"gs"`` (8).
        window_mm: side of what is seen, as for `posterior`.
        separation: likewise.
        seed: of the 20 simulations of 10,000 slices.

    Returns:
        A float with the attribute ``standard_error``.

    Raises:
        UserError: if the scheme is unknown.

    Example:
        >>> round(best_auroc("isup"), 2), round(best_auroc("grade2"), 2)
        (0.85, 0.85)
        >>> round(best_auroc("isup", **VIEWS["lesions"]), 2)
        0.91
    """
    member = law.membership(SCHEMES, scheme, "phantom")
    shift, seen = separation * SHIFT, _seen(window_mm)
    return law.simulated(law.macro_auroc, shift, FREQUENCY, member, seed, seen)


def _seen(window_mm):
    """The largest standardised parameters that a window can show.

    A lesion is an ellipse 1.15 times as wide as high; beyond this size it fills the window.
    """
    largest = window_mm * np.hypot(1, 1.15)
    return np.array([(np.log(largest) - CENTRE[0]) / SPREAD[0], *[np.inf] * 3])


def posterior(
    table: pd.DataFrame,
    scheme: str,
    window_mm: float = FIELD_OF_VIEW,
    separation: float = 1.0,
) -> np.ndarray:
    """Exact class probabilities of slices, given their true lesion parameters as far as seen.

    The AUROC of these on the rows of a split is what was attainable on that very split.

    Args:
        table: rows with a lesion, from ``prostate`` (or an image set made of it).
        scheme: ``"isup"``, ``"grade2"`` or ``"gs"``.
        window_mm: side of what is seen, the lesion in its middle.
        separation: factor on the shifts of the classes; larger is easier.

    Returns:
        Probabilities ``(rows, classes)``, classes in the order of the card.

    Raises:
        UserError: if the scheme is unknown or a row has no lesion parameters.
    """
    member = law.membership(SCHEMES, scheme, "phantom")
    theta = law.true_parameters(table, PARAMETERS, "rows of the phantom that have a lesion")
    u = np.log(theta)
    u[:, 1] -= np.log1p(-theta[:, 1])  # logit
    z = (u - CENTRE) / SPREAD
    return law.posterior(z, separation * SHIFT, FREQUENCY, member, _seen(window_mm))


def prostate(
    size: int = 64,
    seed: int = 0,
    n_unlabelled: int = 11_202,
    n_train: int = 1_611,
    n_val: int = 200,
    n_test: int = 238,
) -> tuple[np.ndarray, pd.DataFrame, dict]:
    """Draw the data set: images, their table and their card.

    The pixels of a patient depend on the seed, the split and the patient's place in the split, not
    on how many others are drawn, nor on threads. Every size shows the same anatomy.

    Args:
        size: pixels per side, at least 16; 64 is 1 mm per pixel.
        seed: another seed is another data set of the same kind.
        n_unlabelled: benign slices, about 13 per patient.
        n_train: slices with cancer for meta-training, about 4.5 per patient.
        n_val: the same for validation.
        n_test: the same for the test.

    Returns:
        Images (N, 1, size, size) uint8; a table of strings (patient, split, ``isup``, ``gs``,
        ``grade2``, slice, true lesion parameters, lesion centre; empty where benign); the card.

    Raises:
        UserError: if the size is below 16, the seed or a count is negative, or the images do not
            fit into the memory.

    Example:
        >>> images, table, card = prostate(32, n_unlabelled=20, n_train=6, n_val=0, n_test=4)
        >>> images.shape, table["split"].value_counts().to_dict()
        ((30, 1, 32, 32), {'unlabelled': 20, 'train': 6, 'test': 4})
    """
    counts = dict(zip(SPLITS, (n_unlabelled, n_train, n_val, n_test), strict=True))
    return _draw("phantom", size, seed, counts, VIEWS["phantom"])


def lesions(
    size: int = 32,
    seed: int = 0,
    n_unlabelled: int = 11_202,
    n_train: int = 1_611,
    n_val: int = 200,
    n_test: int = MANY,
    window_mm: float = VIEWS["lesions"]["window_mm"],
    separation: float = VIEWS["lesions"]["separation"],
) -> tuple[np.ndarray, pd.DataFrame, dict]:
    """Draw windows around lesions, and windows at random points of glands without one.

    The test split is larger than the paper's, for intervals over its patients; its first 238
    slices are the test split of ``lesions_238``.

    Args:
        size: pixels per side, at least 16; 32 is 0.5 mm per pixel.
        seed: as for `prostate`.
        n_unlabelled: windows of benign slices.
        n_train: windows around lesions.
        n_val: likewise.
        n_test: likewise.
        window_mm: side of a window.
        separation: how far the classes lie apart; see `best_auroc` for what that makes possible.

    Returns:
        As `prostate`.

    Raises:
        UserError: as `prostate`, or if the window or the separation is not above 0.

    Example:
        >>> images, table, card = lesions(n_unlabelled=20, n_train=6, n_val=0, n_test=4)
        >>> images.shape, card["spacing_mm"]
        ((30, 1, 32, 32), [0.5, 0.5])
    """
    counts = dict(zip(SPLITS, (n_unlabelled, n_train, n_val, n_test), strict=True))
    view = {"window_mm": window_mm, "separation": separation}
    return _draw("lesions", size, seed, counts, view)


lesions_238 = functools.partial(lesions, n_test=238)  # the counts of the paper


def _draw(name, size, seed, counts, view):
    """Images, table and card of a set."""
    asked = f"size {size}, seed {seed}, counts {counts} and {view}"
    if size < 16 or min(seed, *counts.values()) < 0 or not min(view.values()) > 0:
        raise UserError(
            f"{name} was asked for with {asked}; a size of at least 16, nothing negative, and a "
            "window and a separation above 0 are needed"
        )
    check_memory(sum(counts.values()), 1, size, name)
    patients = [p for split in SPLITS for p in _patients(seed, split, counts[split], view)]
    ends = np.cumsum([0] + [len(p["z"]) for p in patients])
    images = np.empty((ends[-1], 1, size, size), np.uint8)
    step = max(1, round((64 / size) ** 2))  # patients at once: arrays that fit the cache

    def draw(first):
        group = patients[first : first + step]
        images[ends[first] : ends[first + len(group)], 0] = render(group, size, view["window_mm"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(0, len(patients), step)))
    return images, _table(patients), _card(name, size, seed, counts, view)


def _patients(seed, split, n_slices, view):
    """Patients of a split; the last one is cut so that the split has exactly its slices."""
    patients, scores = [], _scores()
    while n_slices > 0:
        rng = np.random.default_rng([seed, SPLITS.index(split), len(patients)])
        score = None if split == "unlabelled" else next(scores)
        patient = _patient(rng, score, **view) | {"split": split}
        for key in ("z", "level", "slice", "lesion", "centre"):
            patient[key] = patient[key][:n_slices]
        n_slices -= len(patient["z"])
        patients.append(patient)
    return patients


def _scores() -> Iterator[int]:
    """Gleason scores, each turn to the ISUP furthest behind its share, then to its GS likewise.

    So even a small split has every ISUP, and no count strays from its share.
    """
    group = law.membership(SCHEMES, "isup", "phantom")
    # no matrix product: its last bit, which decides ties, depends on the processor
    share, given = (FREQUENCY[:, None] * group).sum(0), np.zeros(len(GS))
    while True:
        isup = (share * (given.sum() + 1) - given @ group).argmax()
        within = FREQUENCY * group[:, isup] / share[isup]
        lag = within * ((given * group[:, isup]).sum() + 1) - given
        score = int(np.where(group[:, isup] > 0, lag, -np.inf).argmax())
        given[score] += 1
        yield score


def _patient(rng, score, window_mm, separation):
    """The random numbers of one patient: anatomy, waves, lesion and what is seen of each slice."""
    n = int(rng.integers(10, 17))
    index = np.arange(n)
    z = (index - (n - 1) / 2) * SLICE_SPACING
    half_length = n * SLICE_SPACING / 2
    anatomy, waves = rng.standard_normal(24), rng.random((n_waves(WAVES), 4))
    lesion = np.zeros((n, len(DECIMALS)))
    if score is not None:
        seen = int(rng.integers(3, 7))
        first = int(rng.integers(n // 4, n - n // 4 - seen + 1))
        index, z = index[first : first + seen], z[first : first + seen]
        lesion = _lesion(rng, separation * SHIFT[score], z, z / half_length, anatomy)
    centre = np.zeros((len(z), 2))
    if window_mm != FIELD_OF_VIEW:
        centre = _within(rng, z / half_length, anatomy) if score is None else lesion[:, 4:]
    return {
        "rng": rng,
        "score": score,
        "anatomy": anatomy,
        "waves": waves,
        "slice": index,
        "z": z,
        "level": z / half_length,
        "lesion": lesion,
        "centre": centre,
    }


def _within(rng, level, anatomy):
    """A random point of the gland in each slice, x and y in mm."""
    angle, reach = 2 * np.pi * rng.random(len(level)), 0.85 * np.sqrt(rng.random(len(level)))
    a, b = half_axes(level, anatomy)
    return np.stack([a * reach * np.sin(angle), b * reach * np.cos(angle) - 2], 1)


def _lesion(rng, shift, z, level, anatomy):
    """Lesion parameters and centre of each slice ``(slices, 6)``, rounded as in the table."""
    phase = 2 * np.pi * z[:, None] / 40.0
    own, even, odd = rng.standard_normal((3, len(PARAMETERS)))
    moving = even * np.cos(phase) + odd * np.sin(phase)  # standard normal at every z
    noise = np.sqrt(1 - SLICE_SHARE) * own + np.sqrt(SLICE_SHARE) * moving
    theta = np.exp(CENTRE + SPREAD * (shift + noise))
    theta[:, 1] /= 1 + theta[:, 1]  # the inverse of the logit
    side, peripheral = rng.choice([-1, 1]), rng.random() < 0.7
    angle = np.radians(rng.uniform(25, 68) if peripheral else rng.uniform(115, 160))  # from behind
    reach = rng.uniform(0.70, 0.80) if peripheral else rng.uniform(0.40, 0.55)
    a, b = half_axes(level, anatomy)
    columns = (*theta.T, side * a * reach * np.sin(angle), b * reach * np.cos(angle) - 2)
    return np.stack([c.round(d) for c, d in zip(columns, DECIMALS, strict=True)], 1)


def _table(patients):
    """One row of strings per slice; label and lesion columns are empty where benign."""
    rows = []
    for number, p in enumerate(patients, 1):
        benign = p["score"] is None
        labels = [""] * 3 if benign else [classes[p["score"]] for classes, _ in SCHEMES.values()]
        for index, lesion in zip(p["slice"], p["lesion"], strict=True):
            truth = [""] * len(DECIMALS) if benign else [str(float(v)) for v in lesion]
            rows.append([f"P{number:05d}", p["split"], *labels, str(index), *truth])
    columns = ["patient", "split", *SCHEMES, "slice", *PARAMETERS, "x_mm", "y_mm"]
    return pd.DataFrame(rows, columns=columns, dtype=str)


def _card(name, size, seed, counts, view):
    """What the card of any image set says."""
    usual = COUNTS | VIEWS[name] | ({"test": MANY} if name == "lesions" else {})
    asked = {k: v for k, v in (counts | view).items() if v != usual[k]}
    others = "".join(f", {key} {value}" for key, value in asked.items())
    return {
        "name": name,
        "origin": f"drawn by data_prep.drawn.prostate, seed {seed}{others}",
        # the name by which runs know these images, older ones too
        "identity": f"generated by hallulib.{name}, seed {seed}{others}",
        "licence": "MIT",
        "spacing_mm": [view["window_mm"] / size] * 2,
        "processing": {"steps": [f"drawn; grey level = {WINDOW:.0f} x signal"], "versions": {}},
        "labels": {
            scheme: {"values": list(meaning), "meaning": dict(meaning)}
            for scheme, (_, meaning) in SCHEMES.items()
        },
        "counts": counts,
    }
