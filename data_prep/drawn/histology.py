r"""A generated histology data set: four sites without labels, and one with few.

Tiles of tissue stained with haematoxylin and eosin are drawn from seven parameters: how many of
the places for glands are taken, the radius of the lumen relative to the gland's, the disorder of
glands (of their outline, size, place and rows of nuclei), the diameter of nuclei, the spread of
their size and darkness, how much dye they take up, and the share of places between glands that
lymphocytes take. Given the class the parameters are independent and normal, once transformed,

.. math:: u_j = \ln \theta_j \ \text{or, for shares,}\ \operatorname{logit} \theta_j,
          \qquad u_j \mid c \sim \mathcal N(m_j + s_j\,\delta_j(c),\ s_j^2),

with the median (of the parameter itself), the spread s and the shift delta of each class in

===========  ===========  =====  ========  ==========  ============  =========  ==========
class        gland_share  lumen  disorder  nucleus_um  pleomorphism  chromatin  infiltrate
===========  ===========  =====  ========  ==========  ============  =========  ==========
median       0.05         0.42   0.13      6.8         0.13          0.90       0.08
spread       1.0          0.45   0.50      0.13        0.35          0.15       0.80
stroma       0            0      0         0           0             0          0
lymphocytes  0            0      0         -0.2        0             0.6        4.2
normal       5.2          0      0         0.2         0             0          0.3
tumour       5.2          -1.7   2.6       1.9         1.9           1.0        0.5
===========  ===========  =====  ========  ==========  ============  =========  ==========

All classes are equally frequent. Of the twelve tiles of a patient, who has one slide, nine show
one class and the others the other three; the tiles share 60 % of the variance of u, and how thick
the slide is cut, how strongly it is stained, the size of glands, the focus and the lamp. So
patients must not be divided between splits. Sites differ in all of these as well; site E has the
labels, and is not among the sites A to D of the split ``unlabelled``.

The density of a single tile's parameters is exactly the one above, and a tile depends on its
class only through them. The posterior given the true parameters is therefore exact, and no
method that sees one tile of a new patient can expect to guess better. That ceiling is generous:
which places glands take, stain, blur and pixels hide part of the parameters; the posterior given
the pixels is not known. A method that sees all tiles of a patient may do better.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from data_prep.drawn import law
from data_prep.drawn.glands import FIELD_OF_VIEW
from data_prep.drawn.stain import SMALLEST, render
from hallulib import UserError
from hallulib.data.checks import check_memory

TISSUE = ("stroma", "lymphocytes", "normal", "tumour")
FREQUENCY = np.full(len(TISSUE), 1 / len(TISSUE))
SCHEMES = {  # scheme: its class of each tissue, and what each class means, in order
    "tissue": (
        TISSUE,
        {
            "stroma": "connective tissue",
            "lymphocytes": "infiltrate of lymphocytes",
            "normal": "normal glands",
            "tumour": "adenocarcinoma",
        },
    ),
    "diagnosis": (
        ("benign", "benign", "benign", "malignant"),
        {"benign": "no tumour", "malignant": "adenocarcinoma"},
    ),
}
PARAMETERS = {  # decimals in the table
    "gland_share": 3,
    "lumen": 3,
    "disorder": 3,
    "nucleus_um": 2,
    "pleomorphism": 3,
    "chromatin": 3,
    "infiltrate": 3,
}
SHARE = np.array([True, True, True, False, False, False, True])  # between 0 and 1
MEDIAN = np.array([0.05, 0.42, 0.13, 6.8, 0.13, 0.90, 0.08])
SPREAD = np.array([1.0, 0.45, 0.50, 0.13, 0.35, 0.15, 0.80])
SHIFT = np.array(  # (class, parameter)
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, -0.2, 0.0, 0.6, 4.2],
        [5.2, 0.0, 0.0, 0.2, 0.0, 0.0, 0.3],
        [5.2, -1.7, 2.6, 1.9, 1.9, 1.0, 0.5],
    ]
)
PATIENT_SHARE = 0.6  # part of the variance of u that the tiles of a patient have in common
OTHERS = np.array([0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 0])  # how far a tile is from the main class
LOOK = ("haematoxylin", "eosin", "gland_um", "blur_um", "red", "green", "blue")
VARIATION = np.array([0.30, 0.30, 0.15, 0.35, 0.02, 0.02, 0.02])  # between patients, of the log
THICKNESS = 0.08  # the same, of both dyes together
SITES = {  # the medians of LOOK, and how much larger nuclei are
    "A": ((1.00, 1.00, 26, 0.6, 0.97, 0.96, 0.97), 1.00),
    "B": ((0.72, 0.85, 24, 1.2, 0.98, 0.97, 0.94), 0.93),
    "C": ((1.30, 0.95, 29, 0.9, 0.93, 0.93, 0.97), 1.05),
    "D": ((0.85, 1.40, 22, 1.6, 0.96, 0.92, 0.93), 1.10),
    "E": ((1.00, 1.20, 25, 1.0, 0.97, 0.94, 0.92), 1.00),
}
SPLITS = {"unlabelled": "ABCD", "train": "E", "val": "E", "test": "E"}  # and their sites


def best_accuracy(scheme: str, *, seed: int = 0) -> law.Estimate:
    """The accuracy of the exact posterior, which no classifier of single tiles can expect to beat.

    Drawn from the densities of the module's table, classes as frequent as in the data set.

    Args:
        scheme: ``"tissue"`` (4 classes) or ``"diagnosis"`` (2).
        seed: of the 20 simulations of 10,000 tiles.

    Returns:
        A float with the attribute ``standard_error``.

    Raises:
        UserError: if the scheme is unknown.

    Example:
        >>> round(best_accuracy("tissue"), 2), round(best_accuracy("diagnosis"), 2)
        (0.98, 0.99)
    """
    member = law.membership(SCHEMES, scheme, "histology set")
    return law.simulated(law.accuracy, SHIFT, FREQUENCY, member, seed)


def posterior(table: pd.DataFrame, scheme: str) -> np.ndarray:
    """Exact class probabilities of tiles, given the true parameters of their tissue.

    The accuracy of these on the rows of a split is what was attainable on that very split.

    Args:
        table: labelled rows from ``histology`` (or an image set made of it).
        scheme: ``"tissue"`` or ``"diagnosis"``.

    Returns:
        Probabilities ``(rows, classes)``, classes in the order of the card.

    Raises:
        UserError: if the scheme is unknown or a row has no parameters.
    """
    member = law.membership(SCHEMES, scheme, "histology set")
    theta = law.true_parameters(table, list(PARAMETERS), "labelled rows of the histology set")
    z = (_unbounded(theta) - _unbounded(MEDIAN)) / SPREAD
    return law.posterior(z, SHIFT, FREQUENCY, member)


def histology(
    size: int = 64,
    seed: int = 0,
    n_unlabelled: int = 2_400,
    n_train: int = 1_008,
    n_val: int = 240,
    n_test: int = 624,
) -> tuple[np.ndarray, pd.DataFrame, dict]:
    """Draw the data set: images, their table and their card.

    The pixels of a tile depend on the seed, the split and the tile's place in the split, not on
    how many others are drawn, nor on threads. Every size shows the same tissue.

    Args:
        size: pixels per side, at least 16; 64 is 1.75 um per pixel.
        seed: another seed is another data set of the same kind.
        n_unlabelled: tiles of the sites A to D, 12 per patient; sites take turns.
        n_train: labelled tiles of site E, 12 per patient; for equal classes a multiple of 48.
        n_val: the same for validation.
        n_test: the same for the test.

    Returns:
        Images (N, 3, size, size) uint8, channels red, green and blue; a table of strings (patient,
        split, ``tissue``, ``diagnosis``, site, tile, true parameters; labels and parameters are
        empty where unlabelled); the card.

    Raises:
        UserError: if the size is below 16, the seed or a count is negative, or the images do not
            fit into the memory.

    Example:
        >>> images, table, card = histology(32, n_unlabelled=24, n_train=6, n_val=0, n_test=0)
        >>> images.shape, table["site"].value_counts().to_dict()
        ((30, 3, 32, 32), {'A': 12, 'B': 12, 'E': 6})
    """
    counts = dict(zip(SPLITS, (n_unlabelled, n_train, n_val, n_test), strict=True))
    if size < 16 or min(seed, *counts.values()) < 0:
        raise UserError(
            f"The histology set was asked for size {size}, seed {seed} and counts {counts}; it "
            "needs a size of at least 16 and nothing negative."
        )
    check_memory(sum(counts.values()), 3, size, "histology")
    slides = [s for split, n in counts.items() for s in _slides(seed, split, n)]
    ends = np.cumsum([0] + [len(s["seeds"]) for s in slides])
    images = np.empty((ends[-1], 3, size, size), np.uint8)

    def draw(i):
        images[ends[i] : ends[i + 1]] = render(slides[i]["tiles"], slides[i]["seeds"], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(len(slides))))
    return images, _table(slides), _card(size, seed, counts)


def _slides(seed, split, n_tiles) -> Iterator[dict]:
    """Slides of a split; the last one is cut so that the split has exactly its tiles."""
    for number, first in enumerate(range(0, n_tiles, len(OTHERS))):
        yield _slide(seed, split, number, min(len(OTHERS), n_tiles - first))


def _slide(seed, split, number, n_tiles):
    """Class, parameters and look of the tiles of one slide, and the seed of each."""
    sites, place = SPLITS[split], (seed, list(SPLITS).index(split), number)
    site = sites[number % len(sites)]
    rng = np.random.default_rng(place)
    tissue = (number // len(sites) + OTHERS) % len(TISSUE)
    own, each = rng.standard_normal(len(SPREAD)), rng.standard_normal((len(OTHERS), len(SPREAD)))
    z = SHIFT[tissue] + np.sqrt(PATIENT_SHARE) * own + np.sqrt(1 - PATIENT_SHARE) * each
    u = _unbounded(MEDIAN) + SPREAD * z
    theta = np.where(SHARE, expit(u), np.exp(np.where(SHARE, 0, u)))[:n_tiles]
    rounded = [t.round(d) for t, d in zip(theta.T, PARAMETERS.values(), strict=True)]

    median, larger = SITES[site]
    look = median * np.exp(VARIATION * rng.standard_normal(len(LOOK)))
    look[:2] *= np.exp(THICKNESS * rng.standard_normal())
    drawn = dict(zip(PARAMETERS, rounded, strict=True))
    drawn["nucleus_um"] = larger * drawn["nucleus_um"]
    drawn |= {name: np.full(n_tiles, value) for name, value in zip(LOOK, look, strict=True)}
    return {
        "split": split,
        "site": site,
        "tissue": tissue[:n_tiles],
        "theta": np.stack(rounded, 1),
        "tiles": {name: value.astype(np.float32) for name, value in drawn.items()},
        # from 1: a seed that ends in 0 is the same as one without the 0
        "seeds": [(*place, tile + 1) for tile in range(n_tiles)],
    }


def _unbounded(theta):
    """Logarithm of the parameters, logit of those that are shares."""
    return np.where(SHARE, logit(np.where(SHARE, theta, 0.5)), np.log(theta))


def _table(slides):
    """One row of strings per tile; label and parameter columns are empty where unlabelled."""
    rows = []
    for number, slide in enumerate(slides, 1):
        for tile, (tissue, theta) in enumerate(zip(slide["tissue"], slide["theta"], strict=True)):
            labels = [classes[tissue] for classes, _ in SCHEMES.values()]
            truth = [str(float(v)) for v in theta]
            if slide["split"] == "unlabelled":
                labels, truth = [""] * len(labels), [""] * len(truth)
            where = [f"P{number:05d}", slide["split"]]
            rows.append([*where, *labels, slide["site"], str(tile), *truth])
    columns = ["patient", "split", *SCHEMES, "site", "tile", *PARAMETERS]
    return pd.DataFrame(rows, columns=columns, dtype=str)


def _card(size, seed, counts):
    """What the card of any image set says."""
    steps = ["drawn; grey level = 255 x light that the dyes let pass"]
    if size < SMALLEST:
        steps.append(f"area-averaged to {size} pixels")
    return {
        "name": "histology",
        "origin": f"drawn by data_prep.drawn.histology, seed {seed}",
        # the name by which runs know these images, older ones too
        "identity": f"generated by hallulib.tissue, seed {seed}",
        "licence": "MIT",
        "spacing_mm": [FIELD_OF_VIEW / 1000 / size] * 2,
        "processing": {"steps": steps, "versions": {}},
        "labels": {
            scheme: {"values": list(meaning), "meaning": dict(meaning)}
            for scheme, (_, meaning) in SCHEMES.items()
        },
        "counts": counts,
    }
