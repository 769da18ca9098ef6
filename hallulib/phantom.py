r"""A generated prostate data set whose best possible AUROC is known.

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
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from hallulib import UserError

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
FIELD_OF_VIEW = 64.0  # mm, the side of every image
SLICE_SPACING = 3.0  # mm
WINDOW = 215.0  # grey levels per unit of signal, about that of urine
SPLITS = ("unlabelled", "train", "val", "test")
WAVES = {  # random texture: shortest and longest wave in mm, number of waves
    "bias": (60.0, 140.0, 4),
    "bend_x": (18.0, 45.0, 8),
    "bend_y": (18.0, 45.0, 8),
    "nodules": (8.0, 16.0, 20),
    "fine": (4.0, 12.0, 24),
    "lesion": (4.0, 9.0, 24),
}


class Estimate(float):
    """A number computed by simulation, which carries its error.

    Attributes:
        standard_error: of the simulation; the number itself depends on no data.
    """

    standard_error: float


def best_auroc(scheme: str, *, seed: int = 0) -> Estimate:
    r"""The macro one-vs-rest AUROC of the exact posterior, which no classifier can expect to beat.

    Drawn from the densities of the module's table, classes as frequent as in the data set.

    Args:
        scheme: ``"isup"`` (4 classes), ``"grade2"`` (2) or ``"gs"`` (8).
        seed: of the 20 simulations of 10,000 slices.

    Returns:
        A float with the attribute ``standard_error``.

    Raises:
        UserError: if the scheme is unknown.

    Example:
        >>> round(best_auroc("isup"), 2), round(best_auroc("grade2"), 2)
        (0.85, 0.85)
    """
    member = _membership(scheme)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(20):
        score = rng.choice(len(GS), 10_000, p=FREQUENCY)
        z = SHIFT[score] + rng.standard_normal((len(score), len(PARAMETERS)))
        ranks = rankdata(_class_posterior(z, member), axis=0)
        hit = member[score]
        m = hit.sum(0)
        auroc = ((ranks * hit).sum(0) - m * (m + 1) / 2) / (m * (len(score) - m))
        values.append(auroc.mean())
    best = Estimate(np.mean(values))
    best.standard_error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return best


def posterior(table: pd.DataFrame, scheme: str) -> np.ndarray:
    """Exact class probabilities of slices, given their true lesion parameters.

    The AUROC of these on the rows of a split is what was attainable on that very split.

    Args:
        table: rows with a lesion, from ``prostate`` (or an image set made of it).
        scheme: ``"isup"``, ``"grade2"`` or ``"gs"``.

    Returns:
        Probabilities ``(rows, classes)``, classes in the order of the card.

    Raises:
        UserError: if the scheme is unknown or a row has no lesion parameters.
    """
    member = _membership(scheme)
    missing = [name for name in PARAMETERS if name not in table]
    if missing or (table[list(PARAMETERS)] == "").any(axis=None):
        raise UserError(
            f"The table lacks {', '.join(missing) or 'lesion parameters in some rows'}; the exact "
            "posterior needs rows of the phantom that have a lesion (select(labelled=...))."
        )
    theta = table[list(PARAMETERS)].to_numpy().astype(float)
    u = np.log(theta)
    u[:, 1] -= np.log1p(-theta[:, 1])  # logit
    return _class_posterior((u - CENTRE) / SPREAD, member)


def _membership(scheme):
    """Which class each Gleason score belongs to ``(score, class)``, 0 or 1."""
    if scheme not in SCHEMES:
        raise UserError(
            f"The phantom has no label scheme {scheme!r}; known: {', '.join(SCHEMES)}."
        )
    classes, meaning = SCHEMES[scheme]
    return np.array([[float(c == known) for known in meaning] for c in classes])


def _class_posterior(z, member):
    """Bayes' rule for standardised parameters ``z (slices, 4)``."""
    log_joint = np.log(FREQUENCY) - 0.5 * ((z[:, None] - SHIFT) ** 2).sum(-1)
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return joint @ member / joint.sum(1, keepdims=True)


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
        UserError: if the size is below 16, or the seed or a count is negative.

    Example:
        >>> images, table, card = prostate(32, n_unlabelled=20, n_train=6, n_val=0, n_test=4)
        >>> images.shape, table["split"].value_counts().to_dict()
        ((30, 1, 32, 32), {'unlabelled': 20, 'train': 6, 'test': 4})
    """
    counts = dict(zip(SPLITS, (n_unlabelled, n_train, n_val, n_test), strict=True))
    if size < 16 or min(seed, *counts.values()) < 0:
        raise UserError(
            f"The phantom was asked for size {size}, seed {seed} and counts {counts}; it needs a "
            "size of at least 16 and nothing negative."
        )
    patients = [p for split in SPLITS for p in _patients(seed, split, counts[split])]
    ends = np.cumsum([0] + [len(p["z"]) for p in patients])
    images = np.empty((ends[-1], 1, size, size), np.uint8)
    step = max(1, round((64 / size) ** 2))  # patients at once: arrays that fit the cache

    def draw(first):
        group = patients[first : first + step]
        images[ends[first] : ends[first + len(group)], 0] = _render(group, size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(0, len(patients), step)))
    return images, _table(patients), _card(size, seed, counts)


def _patients(seed, split, n_slices):
    """Patients of a split; the last one is cut so that the split has exactly its slices."""
    patients, scores = [], _scores()
    while n_slices > 0:
        rng = np.random.default_rng([seed, SPLITS.index(split), len(patients)])
        patient = _patient(rng, None if split == "unlabelled" else next(scores)) | {"split": split}
        for key in ("z", "level", "slice", "lesion"):
            patient[key] = patient[key][:n_slices]
        n_slices -= len(patient["z"])
        patients.append(patient)
    return patients


def _scores() -> Iterator[int]:
    """Gleason scores, each turn to the ISUP furthest behind its share, then to its GS likewise.

    So even a small split has every ISUP, and no count strays from its share.
    """
    group = _membership("isup")
    share, given = FREQUENCY @ group, np.zeros(len(GS))
    while True:
        isup = (share * (given.sum() + 1) - given @ group).argmax()
        within = FREQUENCY * group[:, isup] / share[isup]
        lag = within * ((given * group[:, isup]).sum() + 1) - given
        score = int(np.where(group[:, isup] > 0, lag, -np.inf).argmax())
        given[score] += 1
        yield score


def _patient(rng, score):
    """The random numbers of one patient: anatomy, waves, slice positions (mm) and lesion."""
    n = int(rng.integers(10, 17))
    index = np.arange(n)
    z = (index - (n - 1) / 2) * SLICE_SPACING
    half_length = n * SLICE_SPACING / 2
    anatomy, waves = rng.standard_normal(24), rng.random((sum(w[2] for w in WAVES.values()), 4))
    lesion = np.zeros((n, len(DECIMALS)))
    if score is not None:
        seen = int(rng.integers(3, 7))
        first = int(rng.integers(n // 4, n - n // 4 - seen + 1))
        index, z = index[first : first + seen], z[first : first + seen]
        lesion = _lesion(rng, score, z, z / half_length, anatomy)
    return {
        "rng": rng,
        "score": score,
        "anatomy": anatomy,
        "waves": waves,
        "slice": index,
        "z": z,
        "level": z / half_length,
        "lesion": lesion,
    }


def _lesion(rng, score, z, level, anatomy):
    """Lesion parameters and centre of each slice ``(slices, 6)``, rounded as in the table."""
    phase = 2 * np.pi * z[:, None] / 40.0
    own, even, odd = rng.standard_normal((3, len(PARAMETERS)))
    moving = even * np.cos(phase) + odd * np.sin(phase)  # standard normal at every z
    noise = np.sqrt(1 - SLICE_SHARE) * own + np.sqrt(SLICE_SHARE) * moving
    theta = np.exp(CENTRE + SPREAD * (SHIFT[score] + noise))
    theta[:, 1] /= 1 + theta[:, 1]  # the inverse of the logit
    side, peripheral = rng.choice([-1, 1]), rng.random() < 0.7
    angle = np.radians(rng.uniform(25, 68) if peripheral else rng.uniform(115, 160))  # from behind
    reach = rng.uniform(0.70, 0.80) if peripheral else rng.uniform(0.40, 0.55)
    a, b = _half_axes(level, anatomy)
    columns = (*theta.T, side * a * reach * np.sin(angle), b * reach * np.cos(angle) - 2)
    return np.stack([c.round(d) for c, d in zip(columns, DECIMALS, strict=True)], 1)


def _half_axes(level, anatomy):
    """Half width and half depth of the gland in mm; ``level`` runs from -1, apex, to 1, base."""
    narrow = np.sqrt(1 - 0.42 * (level - 0.15) ** 2)
    return (23 + 1.8 * anatomy[0]) * narrow, (16.5 + 1.5 * anatomy[1]) * narrow


def _render(patients, size):
    """The slices of some patients ``(slices, size, size)`` uint8."""
    pixel = FIELD_OF_VIEW / size
    axis = ((np.arange(size) + 0.5) * pixel - FIELD_OF_VIEW / 2).astype(np.float32)
    n_slices = [len(p["z"]) for p in patients]

    def per_slice(rows):  # (slices, numbers) -> numbers that multiply the slices
        return np.asarray(rows, np.float32).T[..., None, None]

    def joined(key):
        return np.concatenate([p[key] for p in patients])

    anatomy = per_slice(np.repeat([p["anatomy"] for p in patients], n_slices, 0))
    waves = np.repeat([p["waves"] for p in patients], n_slices, 0)
    texture = _textures(waves, joined("z"), axis, pixel)
    level, lesion = per_slice(joined("level")), per_slice(joined("lesion"))
    signal = _signal(axis, pixel, level, anatomy, texture, lesion)
    noise = np.concatenate(
        [p["rng"].standard_normal((len(p["z"]), 2, size, size), np.float32) for p in patients]
    )
    # pixels above 1 mm average noise away; smaller ones keep that of 1 mm, as a longer scan would
    noise *= (0.030 + 0.005 * np.tanh(anatomy[-1]))[:, None] * min(1.0, 1 / pixel)
    magnitude = np.sqrt((signal + noise[:, 0]) ** 2 + noise[:, 1] ** 2)  # Rician
    return np.clip(magnitude * WINDOW, 0, 255).astype(np.uint8)


def _textures(waves, z, axis, pixel):
    """Smooth random fields of unit variance: sums of waves, each averaged over the pixels.

    ``cos(a + b) = cos a cos b - sin a sin b`` makes a sum of plane waves one matrix product.
    """
    fields, first = {}, 0
    for name, (shortest, longest, count) in WAVES.items():
        u = waves[:, first : first + count]
        first += count
        k = 2 * np.pi / (shortest + (longest - shortest) * u[..., 0])
        kx, ky = k * np.cos(2 * np.pi * u[..., 1]), k * np.sin(2 * np.pi * u[..., 1])
        phase = 2 * np.pi * u[..., 2] + 0.12 * (2 * u[..., 3] - 1) * z[:, None]
        blur = np.sinc(kx * pixel / (2 * np.pi)) * np.sinc(ky * pixel / (2 * np.pi))
        height = (np.sqrt(2 / count) * blur)[..., None].astype(np.float32)
        a = (kx[..., None] * axis).astype(np.float32)
        b = (ky[..., None] * axis + phase[..., None]).astype(np.float32)
        rows = np.concatenate([height * np.cos(b), -height * np.sin(b)], 1)
        fields[name] = rows.transpose(0, 2, 1) @ np.concatenate([np.cos(a), np.sin(a)], 1)
    return fields


class _Brush:
    """Edges and lines of a given width in mm that pixels can show without aliasing."""

    def __init__(self, pixel):
        self.pixel = pixel

    def inside(self, distance, width):
        """From 0 outside to 1 inside of a signed distance."""
        return 0.5 + 0.5 * np.tanh(distance * (1.4 / (width**2 + (0.35 * self.pixel) ** 2) ** 0.5))

    def line(self, distance, width):
        """A ridge where the distance is 0; what the pixels widen they make fainter."""
        wide = (width**2 + (0.4 * self.pixel) ** 2) ** 0.5
        return (width / wide) * np.exp(-((distance / wide) ** 2))


def _length(u, v):
    return np.sqrt(u * u + v * v)  # several times faster than np.hypot


def _over(canvas, value, mask):
    canvas += mask * (value - canvas)


def _signal(axis, pixel, level, anatomy, texture, lesion):
    """The noiseless slices, painted from the back to the front; x to the right, y to the rear."""
    brush, draw = _Brush(pixel), iter(anatomy[2:])
    x0, y0 = axis[None, None, :], axis[None, :, None]
    x, y = x0 + 1.1 * texture["bend_x"], y0 + 1.1 * texture["bend_y"]
    canvas = _pelvis(brush, draw, x, y, level, texture)

    a, b = _half_axes(level, anatomy)
    across = (x / a) ** 2
    depth = y + 2.0 + (2.2 + 0.7 * next(draw)) * (0.5 - across)  # hollow in the rear midline
    gland = (1 - np.sqrt(across + (depth / b) ** 2)) * b  # mm to the capsule, positive inside
    tissue, zone = _gland(brush, draw, x, depth, (a, b), level, texture)

    diameter, contrast, edge, grain, xl, yl = lesion
    bent = x0 - xl + 0.7 * texture["bend_y"], 1.15 * (y0 - yl) + 0.6 * texture["nodules"]
    mask = brush.inside(diameter / 2 - _length(*bent), edge) * (diameter > 0)
    _over(tissue, zone * (1 - contrast) + grain * texture["lesion"], mask)
    _over(canvas, tissue, brush.inside(gland, 0.5))
    canvas -= 0.30 * brush.line(gland, 0.7) * brush.inside(depth + 0.7 * b, 3.0)  # capsule
    coil = 0.10 * texture["bias"] + 0.004 * next(draw) * x0 + 0.005 * next(draw) * y0
    return np.maximum(canvas, 0.02) * (1 + coil)


def _pelvis(brush, draw, x, y, level, texture):
    """All that surrounds the gland."""
    nodule, fine, side = texture["nodules"], texture["fine"], np.abs(x)
    canvas = (0.55 + 0.04 * next(draw)) + 0.07 * fine + 0.06 * nodule  # fat and its vessels
    bone = -26.5 + 1.0 * next(draw) + 0.28 * side
    _over(canvas, 0.30 + 0.02 * nodule, brush.inside(bone - y, 1.2))
    wall = 28.0 + 1.0 * next(draw) + 0.006 * (y + 4) ** 2 - 0.06 * y
    _over(canvas, 0.20 + 0.02 * fine, brush.inside(side - wall, 0.8))  # obturator muscle
    sling = (1 - _length(x / (24.5 + 0.8 * next(draw)), (y - 6) / 29)) * 24.5
    _over(canvas, 0.20, brush.line(sling, 1.2) * brush.inside(y + 13, 3.0))  # levator ani

    bladder = 46 * (level - 0.62 + 0.05 * next(draw)) - _length(x, y + 19)
    _over(canvas, 0.24, brush.inside(bladder + 2.5, 0.8))
    _over(canvas, 0.98, brush.inside(bladder, 0.8))
    rx, ry = 11.0 + 1.5 * next(draw), 8.5 + 1.0 * next(draw)
    xr, yr = x - 1.5 * next(draw), y - 24.0 - 0.7 * next(draw)
    rectum = (1 - _length(xr / rx, yr / ry)) * ry
    _over(canvas, 0.26, brush.inside(rectum + 1.5, 0.7))
    _over(canvas, 0.52 + 0.06 * fine, brush.inside(rectum - 0.8, 0.6))  # mucosa
    content = np.where(next(draw) > -0.2, np.float32(0.05), 0.36 + 0.08 * nodule)  # gas or stool
    _over(canvas, content, brush.inside(rectum - 2.0 + 0.5 * nodule, 0.7))
    vesicle = np.exp(-(((side - 11) / 8) ** 2) - ((y - 13) / 3.5) ** 2)
    _over(canvas, 0.62 + 0.25 * np.tanh(2 * fine), vesicle * brush.inside(level - 0.70, 0.12))
    return canvas


def _gland(brush, draw, x, depth, half_axes, level, texture):
    """Healthy tissue, and the mean signal of the zone each pixel lies in."""
    nodule, fine, (a, b) = texture["nodules"], texture["fine"], half_axes
    bright, dull = 0.78 + 0.045 * next(draw), 0.41 + 0.03 * next(draw)
    at = 0.66 * a * (0.60 + 0.05 * next(draw)) * (1 + 0.16 * level)
    bt = b * (0.66 + 0.04 * next(draw)) * (1 + 0.12 * level)
    lobe = np.sqrt(x * x + 4.0) - 0.55 * at  # left and right
    inner = (1 - _length(lobe / at, (depth + 0.22 * b) / bt)) * bt
    core = brush.inside(inner, 0.6)
    tissue = bright + 0.055 * fine - 0.05 * np.maximum(nodule - 0.4, 0)
    swirl = 0.11 * np.tanh(1.6 * nodule) + 0.03 * fine - 0.09 * brush.line(nodule, 0.22)
    _over(tissue, dull + swirl, core)
    tissue -= 0.20 * brush.line(inner, 0.8)  # surgical capsule
    front = np.exp(-((x / (0.42 * a)) ** 2) - ((depth + 0.95 * b) / (0.36 * b)) ** 2)
    _over(tissue, 0.20, front)  # anterior fibromuscular stroma
    tube = _length(x, depth + 0.5 - 3.5 * level)
    _over(tissue, 0.27, 0.8 * brush.line(tube - 3.0, 1.2))
    _over(tissue, 0.80, brush.line(tube, 1.9))  # urethra
    return tissue, bright + core * (dull - bright)


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


def _card(size, seed, counts):
    """What the card of any image set says."""
    return {
        "name": "phantom",
        "origin": f"generated by hallulib.phantom, seed {seed}",
        "licence": "MIT",
        "spacing_mm": FIELD_OF_VIEW / size,
        "processing": {"steps": [f"drawn; grey level = {WINDOW:.0f} x signal"], "versions": {}},
        "labels": {
            scheme: {"values": list(meaning), "meaning": dict(meaning)}
            for scheme, (_, meaning) in SCHEMES.items()
        },
        "counts": counts,
    }
