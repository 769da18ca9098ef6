r"""What a result is worth: AUROC, intervals, paired differences, number of episodes.

A one-shot AUROC of one episode says next to nothing: for two classes of ``m`` queries and scores
without information its standard deviation is :math:`\sqrt{(2m+1)/(12m^2)}`, 0.19 at m = 5. So
methods are compared on the *same* episodes (`paired_difference`), over as many of them as the
difference in question needs (`episodes_needed`), and slices of one patient count as one
observation (`bootstrap` with ``groups``). Scores and labels may be NumPy arrays, tensors or lists.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from hallulib import UserError

MANY = 10**16  # episodes that nobody will run; much beyond, the noncentral t is not to be had


class Interval(NamedTuple):
    """An estimate with its confidence limits, from ``n`` independent observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def auroc(y: ArrayLike, scores: ArrayLike) -> float | np.ndarray:
    r"""Area under the ROC curve; for several classes the macro mean of one against the rest.

    The chance that a positive scores above a negative, ties counting half, from the ranks
    :math:`R_i` of the scores:

    .. math:: \mathrm{AUROC} = \frac{\sum_{i: y_i = 1} R_i - m(m+1)/2}{m\,(n - m)},

    with m positives among n. Classes absent from ``y`` are left out of the macro mean.

    Args:
        y: 0 or 1 for binary scores, else the column of the true class; (n,) or (episodes, n).
        scores: higher is likelier. The shape of ``y`` (score of class 1), or one more axis of
            classes. Any increasing function of them gives the same answer.

    Returns:
        A float for one set of labels; for (episodes, n) the AUROC of each episode.

    Raises:
        UserError: shapes or labels do not fit, a score is not finite, only one class is present.

    Source:
        Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747. Equal to scikit-learn's
        ``roc_auc_score`` (``multi_class="ovr"``), which takes one episode at a time.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    y, scores = _array(y), _array(scores)
    n_classes = _check_scores(y, scores)
    if scores.ndim == y.ndim:
        ranks, positive = stats.rankdata(scores, axis=-1)[..., None], (y == 1)[..., None]
    else:
        ranks = stats.rankdata(scores, axis=-2)
        positive = y[..., None] == np.arange(n_classes)
    m, n = positive.sum(-2), y.shape[-1]
    above = np.where(positive, ranks, 0).sum(-2) - m * (m + 1) / 2
    present = (m > 0) & (m < n)
    if not present.any(-1).all():
        raise UserError("the labels hold a single class: an AUROC needs at least two of them")
    values = (above / np.where(present, m * (n - m), 1)).sum(-1, where=present) / present.sum(-1)
    return float(values) if y.ndim == 1 else values


def _array(values):
    if not torch.is_tensor(values):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _check_share(**shares: float | int) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"{name} is {share}; a number between 0 and 1 is needed, as 0.95")


def _check_scores(y, scores) -> int:
    """The number of classes the labels may name."""
    binary = scores.ndim == y.ndim
    fitting = scores.shape if binary else scores.shape[:-1]
    if y.ndim not in (1, 2) or y.size == 0 or fitting != y.shape:
        raise UserError(
            f"labels of shape {y.shape} do not fit scores of shape {scores.shape}: scores need "
            "the shape of the labels, or that shape and one more axis of classes"
        )
    for what, values in (("labels", y), ("scores", scores)):
        if values.dtype.kind not in "biuf":
            raise UserError(f"{what} are of type {values.dtype}; numbers are needed")
    if not np.isfinite(scores).all():
        raise UserError(f"{np.count_nonzero(~np.isfinite(scores))} scores are not finite")
    n_classes = 2 if binary else scores.shape[-1]
    known = (y >= 0) & (y < n_classes) & (y == np.trunc(y) if y.dtype.kind == "f" else True)
    if not known.all():
        raise UserError(
            f"label {y[~known][0]} found: scores of {n_classes} classes need labels "
            f"0 to {n_classes - 1}"
        )
    return n_classes


def mean_interval(values: ArrayLike, *, level: float | int = 0.95) -> Interval:
    r"""Mean of independent values with Student's interval, in the unit of the values.

    .. math:: \bar v \pm t_{(1 + \mathrm{level})/2,\, n-1}\; s / \sqrt n

    Raises:
        UserError: fewer than two values, a value that is not finite, or a level outside (0, 1).

    Source:
        Student 1908, doi 10.1093/biomet/6.1.1.

    Example:
        >>> print(mean_interval([0.4, 0.5, 0.6]))
        0.500 [0.252, 0.748], n = 3
    """
    _check_share(level=level)
    values = _array(values).astype(float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise UserError(
            f"{np.count_nonzero(np.isfinite(values))} finite values of shape {values.shape} "
            "found: an interval needs at least two in one row, all finite"
        )
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float | int = 0.95) -> Interval:
    """Mean of ``a - b`` over the same episodes, with Student's interval for pairs.

    What makes an episode easy is common to both methods and cancels, so the interval is narrower
    than that of two independent means by the square root of one minus their correlation.

    Raises:
        UserError: the two do not pair, or fewer than two pairs.

    Example:
        >>> print(paired_difference([0.6, 0.8, 0.7], [0.5, 0.6, 0.6]))
        0.133 [-0.010, 0.277], n = 3
    """
    a, b = (_array(v).astype(float) for v in (a, b))  # 8-bit or boolean ones would wrap
    if a.shape != b.shape:
        raise UserError(
            f"values of shape {a.shape} and {b.shape} do not pair: both methods need "
            "one value for each of the same episodes"
        )
    return mean_interval(a - b, level=level)


def bootstrap(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    n_resamples: int = 2000,
    level: float | int = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile bootstrap interval, resampling whole groups.

    Args:
        statistic: ``statistic(*arrays) -> float``, e.g. `auroc`.
        arrays: rows that belong together, e.g. labels and scores.
        groups: one name per row, e.g. the patient. Images of one patient are no independent
            observations; rows count as independent only if this is None.
        n_resamples: resamples; the limits settle to a few percent of the width at 2000.
        level: chance that the interval covers the truth; a little less for few groups.
        seed: of the resamples.

    Returns:
        The statistic of all rows, its limits and the number of groups. Resamples for which the
        statistic raises `UserError` (`auroc`: a single class was drawn) are left out.

    Raises:
        UserError: lengths differ, a group without name, fewer than two groups, a level outside
            (0, 1), or more than half of the resamples fail.

    Source:
        Efron and Tibshirani 1993, chapter 13; whole clusters: Field and Welsh 2007,
        doi 10.1111/j.1467-9868.2007.00593.x.
    """
    _check_share(level=level)
    arrays = [_array(a) for a in arrays]
    rows = _rows_of_groups(arrays, groups)
    rng, values = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])
        try:
            values.append(statistic(*(a[drawn] for a in arrays)))
        except UserError:
            continue
    if len(values) < n_resamples / 2:
        raise UserError(
            f"only {len(values)} of {n_resamples} resamples of {len(rows)} groups have a defined "
            "statistic: more groups are needed"
        )
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high), len(rows))


def _rows_of_groups(arrays, groups):
    """Positions of the rows of each group."""
    groups = np.arange(len(arrays[0])) if groups is None else _array(groups)
    lengths = [len(a) for a in (*arrays, groups)]
    if len(set(lengths)) > 1:
        raise UserError(f"rows do not match: arrays and groups have lengths {lengths}")
    nameless = [i for i, group in enumerate(groups.tolist()) if group is None or group != group]
    if nameless:
        raise UserError(f"row {nameless[0]} is of no group; each row needs the name of one")
    _, member, size = np.unique(groups, return_inverse=True, return_counts=True)
    if len(size) < 2:
        raise UserError(f"{len(size)} group found: an interval needs at least two")
    return np.split(np.argsort(member, kind="stable"), np.cumsum(size)[:-1])


def episodes_needed(
    difference: float | int,
    sd: float | int,
    *,
    power: float | int = 0.8,
    level: float | int = 0.95,
) -> int:
    r"""Episodes after which a true paired difference is seen with the given power.

    The smallest n for which a two-sided paired t-test at ``1 - level`` rejects "no difference"
    with probability ``power``; roughly :math:`((z_{(1+\mathrm{level})/2} + z_{\mathrm{power}})
    \,\mathrm{sd} / \mathrm{difference})^2`.

    Args:
        difference: of the means, e.g. 0.02 AUROC.
        sd: standard deviation over episodes of the *paired differences*.
        power: chance to see the difference.
        level: one minus the chance to see one that is not there.

    Raises:
        UserError: a difference of zero (or one that 10**16 episodes would not show), a standard
            deviation that is not positive, or a power or level outside (0, 1).

    Source:
        Cohen 1988, chapter 2.

    Example:
        >>> episodes_needed(0.05, 0.1)
        34
    """
    _check_share(power=power, level=level)
    if difference == 0 or not sd > 0:
        raise UserError(
            f"difference {difference} and sd {sd} found: a difference other than zero "
            "and a positive sd are needed"
        )
    effect, tail = abs(difference) / sd, (1 + level) / 2
    n = max(2, math.floor(((stats.norm.ppf(tail) + stats.norm.ppf(power)) / effect) ** 2))
    if n > MANY:
        raise UserError(
            f"difference {difference} and sd {sd} found: more than {MANY} episodes would be needed"
        )
    while stats.nct.sf(stats.t.ppf(tail, n - 1), n - 1, effect * math.sqrt(n)) < power:
        n += 1
    return n
