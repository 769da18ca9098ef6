"""What the methods of a one-shot experiment are worth against its baseline, and its oracle."""

import pandas as pd

from hallulib import UserError, metrics


def table(auroc: pd.DataFrame, ceiling: float | None = None) -> pd.DataFrame:
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
        ten, mean = values[:10], metrics.mean_interval(values)
        row = {"ten": ten.mean(), "ten_sd": ten.std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high, "episodes": mean.n}
        if name != "baseline":
            gain, spread = metrics.paired_difference(values, baseline), (values - baseline).std()
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
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
    needed = ["baseline", f"+{n}", f"oracle +{n}"]
    missing = [name for name in needed if name not in auroc]
    if missing:
        raise UserError(f"there is no method {missing[0]!r} to compare with; {needed} are needed")
    base, made, real = (auroc[name].to_numpy() for name in needed)
    gain = metrics.paired_difference(real, base)
    if not gain.low > 0:
        raise UserError(f"the oracle's gain is {gain}: one that is surely above 0 is needed")
    share = lambda made, real: float(made.mean() / real.mean())
    return metrics.bootstrap(share, made - base, real - base, n_resamples=n_resamples, seed=seed)
