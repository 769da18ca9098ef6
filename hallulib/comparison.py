"""What the methods of a one-shot experiment are worth against its baseline, and its oracle."""

import numpy as np
import pandas as pd

from hallulib import UserError, metrics
from hallulib.trial import Result


def table(result: Result, ceiling: float | None = None) -> pd.DataFrame:
    """Each method's AUROC in the paper's form and with honest intervals.

    Args:
        result: of a run.
        ceiling: best possible AUROC of the task, above 0.5, if it is known.

    Returns:
        One row per method: mean and standard deviation of the first ten episodes, as the paper
        reports; mean over all with its 95 % interval; mean paired difference to the baseline
        with its interval; episodes that would show this difference in four of five studies;
        share of the way from chance (0.5) to the ceiling.
    """
    rows = {}
    baseline = result.auroc["baseline"]
    for name, values in result.auroc.items():
        ten, mean = values[:10], metrics.mean_interval(values)
        row = {"ten": ten.mean(), "ten_sd": ten.std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high, "episodes": mean.n}
        if name != "baseline":
            gain, spread = metrics.paired_difference(values, baseline), (values - baseline).std()
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            if gain.value and spread > 0:
                row["needed"] = metrics.episodes_needed(gain.value, float(spread))
        if ceiling is not None:
            row["share"] = (mean.value - 0.5) / (ceiling - 0.5)
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def share_of_oracle(result: Result, n: int, seed: int = 0) -> metrics.Interval:
    """Gain of n hallucinated supports as a share of the gain of n real ones, bootstrapped.

    The real ones are given to the classifier of the baseline, at test only. Where they gain
    little, the share can be anything, and its interval says so.

    Args:
        result: of a run with an oracle.
        n: extra supports per class.
        seed: of the resamples of episodes.

    Returns:
        1 if the hallucinated supports are worth as much as real ones, 0 if nothing.

    Raises:
        UserError: the run has no such column, or real supports gain nothing.
    """
    needed = ["baseline", f"+{n}", f"oracle +{n}"]
    missing = [name for name in needed if name not in result.auroc]
    if missing:
        raise UserError(f"the run in {result.folder} has no method {missing[0]!r}")

    def share(base: np.ndarray, made: np.ndarray, real: np.ndarray) -> float:
        if real.mean() == base.mean():
            raise UserError("the oracle gains nothing over the baseline: a gain is needed")
        return float((made - base).mean() / (real - base).mean())

    return metrics.bootstrap(share, *(result.auroc[name].to_numpy() for name in needed), seed=seed)
