r"""What a result is worth: AUROC, intervals, paired differences, and tables of methods with them.

An AUROC of one episode says next to nothing: for two classes of ``m`` queries and scores without
information its standard deviation is :math:`\sqrt{(2m+1)/(12m^2)}`, 0.19 at m = 5. More episodes
mend that, but from the same patients and one training they repeat the luck of both. So methods
are compared on the *same* episodes, and what is resampled are groups of test patients, trainings
and draws of labels (`over_patients`); slices of one patient are one observation (`bootstrap`).
`of_episodes` and `of_contest` set the methods of an experiment side by side. Scores
and labels may be NumPy arrays, tensors or lists.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import optimize, stats

from hallulib import UserError

LEVEL = 0.95  # of all intervals


class Interval(NamedTuple):
    """An estimate with the limits of its 95 % interval, from ``n`` independent observations.

    Where two things were resampled, ``n`` are the groups of patients and ``trainings`` the others.
    Limits are nan where nothing independent is left to tell how far off the estimate may be.
    """

    value: float
    low: float
    high: float
    n: int
    trainings: int = 1

    def __str__(self) -> str:
        several = f" in {self.trainings} trainings" * (self.trainings > 1)
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}{several}"

    def of_share(self) -> "Interval":
        """The same where the estimate is a share or an AUROC: limits end at 0 and 1."""
        return self._replace(low=np.clip(self.low, 0, 1), high=np.clip(self.high, 0, 1))


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


def over_patients(values: ArrayLike, groups: int) -> Interval:
    r"""Mean over test episodes, with an interval over groups of test patients and trainings.

    Episode e is of the patients of group :math:`e \bmod G`
    (:class:`hallulib.oneshot.episodes.Episodes`), and S trainings see the same episodes. With the
    means of each training in each group as a table of S x G numbers, and the mean squares of its
    two margins,

    .. math:: \hat{\mathrm{var}} = \frac{\mathrm{MS}_S + \mathrm{MS}_G}{S\,G}, \qquad
              \nu = \frac{(\mathrm{MS}_S + \mathrm{MS}_G)^2}
              {\mathrm{MS}_S^2 / (S - 1) + \mathrm{MS}_G^2 / (G - 1)},

    and Student's t of :math:`\nu` degrees of freedom. The error of single cells is counted twice:
    where it prevails the interval is conservative. With one training it speaks of that training
    only, and with one group there is none.

    Args:
        values: (episodes,) or (trainings, episodes), the AUROC of each, or a paired difference.
        groups: of patients.

    Source: Satterthwaite 1946, doi 10.2307/3002019; two crossed factors: Owen 2007,
    doi 10.1214/07-AOAS122.

    Example:
        >>> print(over_patients([[0.5, 0.6, 0.7, 0.6], [0.5, 0.7, 0.8, 0.6]], groups=2))
        0.625 [0.307, 0.943], n = 2 in 2 trainings
    """
    values = np.atleast_2d(_array(values).astype(float))
    table = np.stack([values[:, g::groups].mean(1) for g in range(groups)], 1)
    (trainings, groups), mean = table.shape, table.mean()
    squares = [  # mean squares of trainings and of groups, with their degrees of freedom
        (table.size / n * ((table.mean(1 - axis) - mean) ** 2).sum() / (n - 1), n - 1)
        for axis, n in enumerate(table.shape)
        if n > 1
    ]
    if groups < 2:
        return Interval(float(mean), math.nan, math.nan, groups, trainings)
    total = sum(square for square, _ in squares)
    freedom = total**2 / sum(square**2 / df for square, df in squares) if total else 1.0
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(total / table.size))
    return Interval(float(mean), float(mean) - half, float(mean) + half, groups, trainings)


def of_episodes(
    auroc: Sequence[pd.DataFrame], groups: int, ceiling: float | None = None
) -> pd.DataFrame:
    """Each method's AUROC in the paper's form and with honest intervals.

    Args:
        auroc: of each training one row per test episode, the same ones for all, and one column
            per method, ``"baseline"`` among them.
        groups: of test patients, see `over_patients`.
        ceiling: best possible AUROC of the task, above 0.5, if it is known.

    Returns:
        One row per method: mean and standard deviation of the first ten episodes of the first
        training, as the paper reports; mean over all and mean paired difference to the baseline,
        with 95 % intervals; share of the way from chance (0.5) to the ceiling.
    """
    rows = {}
    for name in auroc[0]:
        values, ten = np.stack([of[name] for of in auroc]), auroc[0][name][:10]
        mean = over_patients(values, groups).of_share()
        row = {"ten": ten.mean(), "ten_sd": ten.std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high}
        if name != "baseline":
            row |= _gain(*over_patients(values - [of["baseline"] for of in auroc], groups)[:3])
        if ceiling is not None:
            row["share"] = (mean.value - 0.5) / (ceiling - 0.5)
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def share_of_oracle(auroc: Sequence[pd.DataFrame], n: int, groups: int) -> Interval:
    r"""Gain of n hallucinated supports as a share of the gain of n real ones, by Fieller.

    The interval holds every share r for which the mean of (gain of hallucinated - r x gain of
    real) may be zero, by `over_patients`. The real ones were given to the baseline's classifier,
    at test only, in a run with an oracle.

    Args:
        auroc: as for `of_episodes`.
        n: extra supports per class.
        groups: as for `of_episodes`.

    Raises:
        UserError: no such column, or an interval of the oracle's gain that is not above zero.

    Source: Fieller 1954, doi 10.1111/j.2517-6161.1954.tb00159.x.
    """
    methods = ["baseline", f"+{n}", f"oracle +{n}"]
    if not set(methods) <= set(auroc[0]):
        raise UserError(f"the methods are {', '.join(auroc[0])}; {', '.join(methods)} are needed")
    base, made, real = np.stack([of[methods].to_numpy() for of in auroc]).transpose(2, 0, 1)
    gain = over_patients(real - base, groups)
    if not gain.low > 0:
        raise UserError(f"the oracle's gain is {gain}: one that is surely above 0 is needed")
    share = float((made - base).mean() / (real - base).mean())

    def limit(sign: int) -> float:
        """The share at which zero leaves the interval, upwards or downwards."""

        def outside(step: float) -> float:
            found = over_patients(made - base - (share + sign * step) * (real - base), groups)
            return -found.low if sign < 0 else found.high

        far = 1.0
        while outside(far) > 0 and far < 1e6:
            far *= 2
        return share + sign * float(optimize.brentq(outside, 0.0, far))

    return gain._replace(value=share, low=limit(-1), high=limit(1))


def of_contest(
    scores: pd.DataFrame, methods: Sequence[str], *, own: Sequence[str] = ("likelihood",)
) -> pd.DataFrame:
    r"""Accuracy and AUROC of every method with 95 % intervals, and against some of them.

    A measure :math:`\theta_d` is the mean over draws of labels, and so are gains, which are
    positive where ``own`` is better. Its interval is over D draws and P whole patients: the
    jackknife values

    .. math:: \theta_d - (P - 1)(\theta_{d, -p} - \textstyle\frac1P\sum_q \theta_{d, -q}),

    of each draw without each patient, are the table of which `over_patients` takes the margins.
    Draws that share a ``seed`` of pretraining are one row of it, their mean: they share its luck.
    It is conservative where draws differ most on single images. (By simulation a percentile
    bootstrap of both covers 88 % where ten draws differ much as a whole; this 93 %.)

    Args:
        scores: for each draw of labels a row per test image, the same images in all: ``draw``,
            ``patient``, ``label`` (index of the class) and for each method and class a column
            ``<method> <class>``, as `book/grids/contest.ipynb` measures them; and ``seed``, if
            draws share one.
        methods: the names of the methods.
        own: the methods that gains are of.

    Returns:
        One row per ``own``, method and measure: value, low, high, ``n`` (patients), ``trainings``
        (draws, or seeds); gain, gain_low, gain_high (of a method over itself 0).

    Raises:
        UserError: test images differ between draws, or without one patient a single class is left.

    Source: Efron and Stein 1981, doi 10.1214/aos/1176345462; two crossed factors: see
    `over_patients`.
    """
    draws = [draw.reset_index(drop=True) for _, draw in scores.groupby("draw")]
    asked = draws[0][["patient", "label"]]
    if not all(asked.equals(draw[["patient", "label"]]) for draw in draws):
        raise UserError("the draws of labels have different test images; they need the same ones")
    y, (who, patients) = np.stack([asked["label"]] * len(draws)), pd.factorize(asked["patient"])
    seeds = np.array([draw.get("seed", draw["draw"])[0] for draw in draws])
    accuracy = lambda y, p: (p.argmax(-1) == y).mean(-1)
    n, found = len(patients), {}
    for method in methods:
        p = np.stack([columns(draw, method) for draw in draws])
        for name, measure in (("accuracy", accuracy), ("AUROC", auroc)):
            without = np.stack([measure(y[:, who != i], p[:, who != i]) for i in range(n)], 1)
            off = (n - 1) * (without - without.mean(1, keepdims=True))
            values = np.asarray(measure(y, p))[:, None] - off
            found[method, name] = np.stack([values[seeds == s].mean(0) for s in np.unique(seeds)])
    rows = []
    for (method, name), values in found.items():
        row = {"method": method, "measure": name, **over_patients(values, n)._asdict()}
        for mine in own:
            gain = over_patients(found[mine, name] - values, n)
            rows.append({"own": mine} | row | _gain(*gain[:3]))
    return pd.DataFrame(rows)


def _gain(value: float, low: float, high: float) -> dict[str, float]:
    return {"gain": value, "gain_low": low, "gain_high": high}


def read_scores(file: Path) -> pd.DataFrame:
    """A table of scores; a patient may be called anything, ``NA`` as well."""
    return pd.read_csv(file, dtype={"patient": str}, keep_default_na=False)


def columns(scores: pd.DataFrame, method: str) -> np.ndarray:
    """Scores of one method, (images, classes)."""
    return scores[[c for c in scores if c.startswith(f"{method} ")]].to_numpy()
