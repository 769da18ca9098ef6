"""Methods side by side: levels, and paired gains over one of them, with intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hallulib import UserError
from hallulib.evidence import metrics

METHODS = ("likelihood", "gaussian", "resnet18", "linear", "filter_bank")


def of_episodes(auroc: pd.DataFrame, ceiling: float | None = None) -> pd.DataFrame:
    """Each method's AUROC in the paper's form and with honest intervals.

    Args:
        auroc: one row per test episode, one column per method, ``"baseline"`` among them.
        ceiling: best possible AUROC of the task, above 0.5, if it is known.

    Returns:
        One row per method: mean and standard deviation of the first ten episodes, as the paper
        reports; mean over all with its 95 % interval; mean paired difference to the baseline
        with its interval; episodes that would show this difference in four of five studies;
        share of the way from chance (0.5) to the ceiling.
    """
    rows = {}
    baseline = auroc["baseline"]
    for name, values in auroc.items():
        mean = metrics.mean_interval(values)
        row = {"ten": values[:10].mean(), "ten_sd": values[:10].std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high, "episodes": mean.n}
        if name != "baseline":
            gain, spread = metrics.paired_difference(values, baseline), (values - baseline).std()
            row |= _row("gain gain_low gain_high", gain[:3])
            # means that tie but for rounding differ by nothing that episodes could show
            if spread > 0 and abs(gain.value) > 1e-7 * spread:
                row["needed"] = metrics.episodes_needed(gain.value, float(spread))
        if ceiling is not None:
            row["share"] = (mean.value - 0.5) / (ceiling - 0.5)
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def share_of_oracle(
    auroc: pd.DataFrame, n: int, *, n_resamples: int = 2000, seed: int = 0
) -> metrics.Interval:
    """Gain of n hallucinated supports as a share of the gain of n real ones, bootstrapped.

    The real ones are given to the classifier of the baseline, at test only.

    Args:
        auroc: of a run with an oracle.
        n: extra supports per class.
        n_resamples: of the episodes.
        seed: of the resamples.

    Returns:
        1 if the hallucinated supports are worth as much as real ones, 0 if nothing.

    Raises:
        UserError: there is no such column, or no gain to take a share of: the interval of the
            gain of real supports does not lie above zero.
    """
    methods = ["baseline", f"+{n}", f"oracle +{n}"]
    if not set(methods) <= set(auroc):
        raise UserError(f"the methods are {', '.join(auroc)}; {', '.join(methods)} are needed")
    base, made, real = auroc[methods].to_numpy().T
    gain = metrics.paired_difference(real, base)
    if not gain.low > 0:
        raise UserError(f"the oracle's gain is {gain}: one that is surely above 0 is needed")
    share = lambda made, real: float(made.mean() / real.mean())
    return metrics.bootstrap(share, made - base, real - base, n_resamples=n_resamples, seed=seed)


def of_contest(scores: pd.DataFrame, seed: int = 0, own: str = "likelihood") -> pd.DataFrame:
    """Accuracy and AUROC of every method with 95 % intervals, and against one of them.

    Args:
        scores: what :func:`hallulib.likelihood.experiment.run` gave.
        seed: of the bootstrap, which draws whole patients.
        own: the method that the others are compared with.

    Returns:
        One row per method and measure: ``value, low, high, n`` and the paired difference from
        ``own``, ``gain, gain_low, gain_high`` (positive where that is better).
    """
    y, of_own, rows = scores["label"].to_numpy(), columns(scores, own), []
    by_patient = dict(groups=scores["patient"].to_numpy(), n_resamples=1000, seed=seed)
    for method in METHODS:
        p = columns(scores, method)
        for name, measure in (("accuracy", _accuracy), ("AUROC", metrics.auroc)):
            level = metrics.bootstrap(measure, y, p, **by_patient)
            row = {"method": method, "measure": name, **level._asdict()}
            if method != own:
                # a statistic of both, so that resamples are paired
                gap = lambda y, a, b, measure=measure: measure(y, a) - measure(y, b)
                gain = metrics.bootstrap(gap, y, of_own, p, **by_patient)
                row |= _row("gain gain_low gain_high", gain[:3])
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
    neither alone would tell how much another experiment might differ.

    Args:
        scores: one row per fold and test image, as :func:`hallulib.augment.run` gives.
        arms: whose scores are compared.
        against: the arm that gains are over.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row per arm: ``accuracy, low, high``, macro ``AUROC`` (mean over folds), and ``gain,
        gain_low, gain_high`` over ``against`` on the same folds and patients.
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
        row = {"arm": arm} | _row("accuracy low high", interval(right[arm]))
        areas = [metrics.auroc(p["label"], columns(p, arm)) for _, p in scores.groupby("fold")]
        row["AUROC"] = np.mean(areas)
        if arm != against:
            row |= _row("gain gain_low gain_high", interval(right[arm] - right[against]))
        rows.append(row)
    return pd.DataFrame(rows)


def _row(names: str, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(names.split(), values, strict=True))


def read_scores(file: Path) -> pd.DataFrame:
    """A table of scores; a patient may be called anything, ``NA`` as well."""
    return pd.read_csv(file, dtype={"patient": str}, keep_default_na=False)


def columns(scores: pd.DataFrame, method: str) -> np.ndarray:
    """Scores of one method, (images, classes)."""
    return scores[[c for c in scores if c.startswith(f"{method} ")]].to_numpy()


def _accuracy(y: np.ndarray, scores: np.ndarray) -> float:
    return float((scores.argmax(1) == y).mean())
