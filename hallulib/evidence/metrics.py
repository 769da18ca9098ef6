r"""What a result is worth: AUROC, intervals, paired differences, number of episodes.

A one-shot AUROC of one episode says next to nothing: for two classes of ``m`` queries and scores
without information its standard deviation is :math:`\sqrt{(2m+1)/(12m^2)}`, 0.19 at m = 5. So
methods are compared on the *same* episodes (`paired_difference`), over as many of them as the
difference in question needs (`episodes_needed`), and slices of one patient count as one
observation (`bootstrap` with ``groups``). Scores and labels may be NumPy arrays, tensors or lists.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from hallulib import UserError

LEVEL = 0.95  # of all intervals
POWER = 0.8  # chance that a study sees the difference that there is


class Interval(NamedTuple):
    """An estimate with the limits of its 95 % interval, from ``n`` independent observations."""

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
        UserError: a label that no score stands for, or only one class is present.

    Source:
        Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747. Equal to scikit-learn's
        ``roc_auc_score`` (``multi_class="ovr"``), which takes one episode at a time.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    y, scores = _array(y), _array(scores)
    n_classes = 2 if scores.ndim == y.ndim else scores.shape[-1]
    if y.min() < 0 or y.max() >= n_classes:
        raise UserError(
            f"labels from {y.min()} to {y.max()} found: scores of {n_classes} classes need labels "
            f"0 to {n_classes - 1}"
        )
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


def mean_interval(values: ArrayLike) -> Interval:
    r"""Mean of independent values with Student's interval, in the unit of the values.

    .. math:: \bar v \pm t_{0.975,\, n-1}\; s / \sqrt n

    Source:
        Student 1908, doi 10.1093/biomet/6.1.1.

    Example:
        >>> print(mean_interval([0.4, 0.5, 0.6]))
        0.500 [0.252, 0.748], n = 3
    """
    values = _array(values).astype(float)  # 8-bit or boolean ones would wrap
    n, mean = len(values), float(values.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Interval:
    """Mean of ``a - b`` over the same episodes, with Student's interval for pairs.

    What makes an episode easy is common to both methods and cancels, so the interval is narrower
    than that of two independent means by the square root of one minus their correlation.

    Example:
        >>> print(paired_difference([0.6, 0.8, 0.7], [0.5, 0.6, 0.6]))
        0.133 [-0.010, 0.277], n = 3
    """
    return mean_interval(_array(a).astype(float) - _array(b).astype(float))


def bootstrap(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile bootstrap interval, resampling whole groups.

    Args:
        statistic: ``statistic(*arrays) -> float``, e.g. `auroc`.
        arrays: rows that belong together, e.g. labels and scores.
        groups: one name per row, e.g. the patient. Images of one patient are no independent
            observations; rows count as independent only if this is None.
        n_resamples: resamples; the limits settle to a few percent of the width at 2000.
        seed: of the resamples.

    Returns:
        The statistic of all rows, its limits and the number of groups. Resamples for which the
        statistic raises `UserError` (`auroc`: a single class was drawn) are left out. The
        interval covers the truth a little less often than it says where groups are few.

    Raises:
        UserError: lengths differ, fewer than two groups, or more than half of the resamples fail.

    Source:
        Efron and Tibshirani 1993, chapter 13; whole clusters: Field and Welsh 2007,
        doi 10.1111/j.1467-9868.2007.00593.x.
    """
    arrays = [_array(a) for a in arrays]
    groups = np.arange(len(arrays[0])) if groups is None else _array(groups)
    _, member, size = np.unique(groups, return_inverse=True, return_counts=True)
    lengths = [len(a) for a in (*arrays, groups)]
    if len(set(lengths)) > 1 or len(size) < 2:
        raise UserError(
            f"arrays and groups of lengths {lengths} with {len(size)} group(s) found: an interval "
            "needs equal lengths and at least two groups"
        )
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(size)[:-1])
    rng, values = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])
        with contextlib.suppress(UserError):
            values.append(statistic(*(a[drawn] for a in arrays)))
    if len(values) < n_resamples / 2:
        raise UserError(
            f"only {len(values)} of {n_resamples} resamples of {len(rows)} groups have a defined "
            "statistic: more groups are needed"
        )
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(*arrays)), float(low), float(high), len(rows))


def episodes_needed(difference: float | int, sd: float | int) -> int:
    r"""Episodes after which a true paired difference is seen in four of five studies.

    The smallest n for which a two-sided paired t-test at 5 % rejects "no difference" with
    probability 0.8; roughly :math:`(2.8\,\mathrm{sd} / \mathrm{difference})^2`.

    Args:
        difference: of the means, other than zero, e.g. 0.02 AUROC.
        sd: standard deviation over episodes of the *paired differences*, above zero.

    Source:
        Cohen 1988, chapter 2.

    Example:
        >>> episodes_needed(0.05, 0.1)
        34
    """
    effect, tail = abs(difference) / sd, (1 + LEVEL) / 2
    n = max(2, math.floor(((stats.norm.ppf(tail) + stats.norm.ppf(POWER)) / effect) ** 2))
    while stats.nct.sf(stats.t.ppf(tail, n - 1), n - 1, effect * math.sqrt(n)) < POWER:
        n += 1
    return n
