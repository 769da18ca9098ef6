r"""What a result is worth: AUROC, intervals, paired differences, and tables of methods with them.

An AUROC of one episode says next to nothing: for two classes of ``m`` queries and scores without
information its standard deviation is :math:`\sqrt{(2m+1)/(12m^2)}`, 0.19 at m = 5. So methods are
compared on the *same* episodes (`paired_difference`), over as many as the difference in question
needs (`episodes_needed`), and slices of one patient count as one observation (`bootstrap`).
`of_episodes`, `of_contest` and `of_folds` set the methods of an experiment side by side. Scores
and labels may be NumPy arrays, tensors or lists.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats

from hallulib import UserError

LEVEL = 0.95  # of all intervals
POWER = 0.8  # chance that a study sees the difference that there is
METHODS = ("likelihood", "gaussian", "resnet18", "linear", "filter_bank")  # of a contest


class Interval(NamedTuple):
    """An estimate with the limits of its 95 % interval, from ``n`` independent observations."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def auroc(y: ArrayLike, scores: ArrayLike) -> float | np.ndarray:
    r"""Area under the ROC curve; for several classes the macro mean of one against the rest.

    The chance that a positive scores above a negative, ties counting half, from the ranks
    :math:`R_i` of the scores:

    .. math:: \mathrm{AUROC} = \frac{\sum_{i: y_i = 1} R_i - m(m+1)/2}{m\,(n - m)},

    with m positives among n; for labels (episodes, n) the AUROC of each episode. Classes absent
    from ``y`` are left out of the macro mean.

    Args:
        y: 0 or 1 for binary scores, else the column of the true class; (n,) or (episodes, n).
        scores: higher is likelier; shaped as ``y`` (score of class 1), or with an axis of classes.

    Raises:
        UserError: a label that no score stands for, or only one class is present.

    Source: Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747; as scikit-learn's
    ``roc_auc_score(multi_class="ovr")``, which takes one episode at a time.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    y, scores = _array(y), _array(scores)
    binary = scores.ndim == y.ndim
    k = 2 if binary else scores.shape[-1]
    if y.min() < 0 or y.max() >= k:
        raise UserError(
            f"labels from {y.min()} to {y.max()} found: scores of {k} classes need labels "
            f"0 to {k - 1}"
        )
    positive = y[..., None] == np.arange(k)[binary:]
    ranks = stats.rankdata(scores[..., None] if binary else scores, axis=-2)
    m, n = positive.sum(-2), y.shape[-1]
    above = np.where(positive, ranks, 0).sum(-2) - m * (m + 1) / 2
    present = (m > 0) & (m < n)
    if not present.any(-1).all():
        raise UserError("the labels hold a single class: an AUROC needs at least two of them")
    values = (above / np.where(present, m * (n - m), 1)).sum(-1, where=present) / present.sum(-1)
    return float(values) if y.ndim == 1 else values


def _array(values: ArrayLike) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)


def mean_interval(values: ArrayLike) -> Interval:
    r"""Mean of independent values with Student's interval, in the unit of the values.

    .. math:: \bar v \pm t_{0.975,\, n-1}\; s / \sqrt n

    Source: Student 1908, doi 10.1093/biomet/6.1.1.

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

    What makes an episode easy is common to both methods and cancels.

    Example:
        >>> print(paired_difference([0.6, 0.8, 0.7], [0.5, 0.6, 0.6]))
        0.133 [-0.010, 0.277], n = 3
    """
    return mean_interval(_array(a).astype(float) - _array(b).astype(float))


def bootstrap(
    statistic: Callable[..., SupportsFloat],
    *arrays: ArrayLike,
    groups: ArrayLike | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile bootstrap interval, resampling whole groups.

    The statistic is a number from arrays of rows that belong together, e.g. `auroc` of labels and
    scores. ``groups`` has one name per row, e.g. the patient; rows count as independent only if it
    is None. Resamples for which the statistic raises `UserError` (`auroc`: a single class was
    drawn) are left out; the limits settle to a few percent of the width at 2000 of them. Where
    groups are few the interval covers the truth a little less often than it says.

    Raises:
        UserError: lengths differ, fewer than two groups, or more than half of the resamples fail.

    Source: Efron and Tibshirani 1993, chapter 13; whole clusters: Field and Welsh 2007,
    doi 10.1111/j.1467-9868.2007.00593.x.
    """
    data = [_array(a) for a in arrays]
    groups = np.arange(len(data[0])) if groups is None else _array(groups)
    _, member, size = np.unique(groups, return_inverse=True, return_counts=True)
    lengths = [len(a) for a in (*data, groups)]
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
            values.append(float(statistic(*(a[drawn] for a in data))))
    if len(values) < n_resamples / 2:
        raise UserError(
            f"only {len(values)} of {n_resamples} resamples of {len(rows)} groups have a defined "
            "statistic: more groups are needed"
        )
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(*data)), float(low), float(high), len(rows))


def episodes_needed(difference: float | int, sd: float | int) -> int:
    r"""Episodes after which a true paired difference is seen in four of five studies.

    By two-sided paired t-tests at 5 %; ``sd`` is that of the *paired differences* over episodes.
    Roughly :math:`(2.8\,\mathrm{sd} / \mathrm{difference})^2`. Source: Cohen 1988, chapter 2.

    Example:
        >>> episodes_needed(0.05, 0.1)
        34
    """
    effect, tail = abs(difference) / sd, (1 + LEVEL) / 2
    n = max(2, math.floor(((stats.norm.ppf(tail) + stats.norm.ppf(POWER)) / effect) ** 2))
    while stats.nct.sf(stats.t.ppf(tail, n - 1), n - 1, effect * math.sqrt(n)) < POWER:
        n += 1
    return n


def of_episodes(auroc: pd.DataFrame, ceiling: float | None = None) -> pd.DataFrame:
    """Each method's AUROC in the paper's form and with honest intervals.

    Args:
        auroc: one row per test episode, one column per method, ``"baseline"`` among them.
        ceiling: best possible AUROC of the task, above 0.5, if it is known.

    Returns:
        One row per method: mean and standard deviation of the first ten episodes, as the paper
        reports; mean over all and mean paired difference to the baseline, with 95 % intervals;
        `episodes_needed` to show it; share of the way from chance (0.5) to the ceiling.
    """
    rows = {}
    baseline = auroc["baseline"]
    for name, values in auroc.items():
        mean = mean_interval(values)
        row = {"ten": values[:10].mean(), "ten_sd": values[:10].std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high, "episodes": mean.n}
        if name != "baseline":
            gain, spread = paired_difference(values, baseline), (values - baseline).std()
            row |= _gain(*gain[:3])
            # means that tie but for rounding differ by nothing that episodes could show
            if spread > 0 and abs(gain.value) > 1e-7 * spread:
                row["needed"] = episodes_needed(gain.value, float(spread))
        if ceiling is not None:
            row["share"] = (mean.value - 0.5) / (ceiling - 0.5)
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def share_of_oracle(
    auroc: pd.DataFrame, n: int, *, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Gain of n hallucinated supports as a share of the gain of n real ones, bootstrapped.

    The real ones were given to the baseline's classifier, at test only, in a run with an oracle.
    No such column, or an interval of their gain that does not lie above zero, is a `UserError`.
    """
    methods = ["baseline", f"+{n}", f"oracle +{n}"]
    if not set(methods) <= set(auroc):
        raise UserError(f"the methods are {', '.join(auroc)}; {', '.join(methods)} are needed")
    base, made, real = auroc[methods].to_numpy().T
    gain = paired_difference(real, base)
    if not gain.low > 0:
        raise UserError(f"the oracle's gain is {gain}: one that is surely above 0 is needed")
    share = lambda made, real: made.mean() / real.mean()
    return bootstrap(share, made - base, real - base, n_resamples=n_resamples, seed=seed)


def of_contest(scores: pd.DataFrame, seed: int = 0, own: str = "likelihood") -> pd.DataFrame:
    """Accuracy and AUROC of every method with 95 % intervals, and against one of them.

    ``scores`` are those of :func:`hallulib.likelihood.estimator.run`; the bootstrap draws whole
    patients. One row per method and measure; gains are positive where ``own`` is better.
    """
    y, of_own, rows = scores["label"].to_numpy(), columns(scores, own), []
    by_patient = partial(bootstrap, groups=scores["patient"], n_resamples=1000, seed=seed)
    accuracy = lambda y, p: (p.argmax(1) == y).mean()
    for method in METHODS:
        p = columns(scores, method)
        for name, measure in (("accuracy", accuracy), ("AUROC", auroc)):
            row = {"method": method, "measure": name, **by_patient(measure, y, p)._asdict()}
            if method != own:
                # a statistic of both, so that resamples are paired
                gap = lambda y, a, b, measure=measure: measure(y, a) - measure(y, b)
                row |= _gain(*by_patient(gap, y, of_own, p)[:3])
            rows.append(row)
    return pd.DataFrame(rows)


def of_folds(
    scores: pd.DataFrame,
    arms: Sequence[str],
    *,
    against: str = "classical",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of every arm with 95 % intervals, and its paired gain over one of them.

    Folds and, within them, test patients are drawn with replacement: folds share test images, so
    neither alone would tell how much another experiment might differ. ``scores`` have one row per
    fold and test image, as :func:`hallulib.augment.run` gives. One row per arm; gains are over the
    arm ``against``, on the same folds and patients, and the AUROC is the mean over folds of the
    macro mean over classes.
    """
    fold, folds = pd.factorize(scores["fold"])
    who, patients = pd.factorize(scores["patient"])
    rng = np.random.default_rng(seed)
    sizes = len(folds), len(patients)
    drawn = [np.ix_(*(rng.integers(size, size=size) for size in sizes)) for _ in range(resamples)]

    def cells(values: np.ndarray | int) -> np.ndarray:
        sums = np.zeros(sizes)
        np.add.at(sums, (fold, who), values)
        return sums

    def interval(sums: np.ndarray) -> list[float]:
        means = [sums[cell].sum() / n[cell].sum() for cell in drawn]
        return [sums.sum() / n.sum(), *np.quantile(means, (0.025, 0.975))]

    y, n = scores["label"].to_numpy(), cells(1)
    right = {arm: cells(columns(scores, arm).argmax(1) == y) for arm in arms}
    rows = []
    for arm in arms:
        accuracy, low, high = interval(right[arm])
        areas = [float(auroc(p["label"], columns(p, arm))) for _, p in scores.groupby("fold")]
        row = {"arm": arm, "accuracy": accuracy, "low": low, "high": high, "AUROC": np.mean(areas)}
        if arm != against:
            row |= _gain(*interval(right[arm] - right[against]))
        rows.append(row)
    return pd.DataFrame(rows)


def _gain(value: float, low: float, high: float) -> dict[str, float]:
    return {"gain": value, "gain_low": low, "gain_high": high}


def read_scores(file: Path) -> pd.DataFrame:
    """A table of scores; a patient may be called anything, ``NA`` as well."""
    return pd.read_csv(file, dtype={"patient": str}, keep_default_na=False)


def columns(scores: pd.DataFrame, method: str) -> np.ndarray:
    """Scores of one method, (images, classes)."""
    return scores[[c for c in scores if c.startswith(f"{method} ")]].to_numpy()
