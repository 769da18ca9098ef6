"""What several arms of an experiment gain over one, where folds share their test images."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hallulib import UserError, metrics
from hallulib.few_labels import columns


def table(
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
        scores: one row per fold and test image, as :func:`hallulib.augment.run` gives them.
        arms: whose scores are compared.
        against: the arm that gains are over.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row per arm: ``accuracy, low, high``, macro ``AUROC`` (mean over folds), and ``gain,
        gain_low, gain_high`` over ``against`` on the same folds and patients.

    Raises:
        UserError: a row without patient or fold.
    """
    y, (patients, who) = scores["label"].to_numpy(), _codes(scores["patient"])
    folds, fold = _codes(scores["fold"])
    n = np.zeros((folds, patients))
    np.add.at(n, (fold, who), 1)
    right = {}
    for arm in arms:
        right[arm] = np.zeros((folds, patients))
        np.add.at(right[arm], (fold, who), columns(scores, arm).argmax(1) == y)
    rng = np.random.default_rng(seed)
    drawn = [
        (rng.integers(folds, size=folds), rng.integers(patients, size=patients))
        for _ in range(resamples)
    ]

    def told(values: np.ndarray) -> list[float]:
        means = [values[np.ix_(f, p)].sum() / n[np.ix_(f, p)].sum() for f, p in drawn]
        return [values.sum() / n.sum(), *np.quantile(means, (0.025, 0.975))]

    rows = []
    for arm in arms:
        row = {"arm": arm} | dict(zip(("accuracy", "low", "high"), told(right[arm]), strict=True))
        row["AUROC"] = np.mean(
            [
                metrics.auroc(part["label"], columns(part, arm))
                for _, part in scores.groupby("fold")
            ]
        )
        if arm != against:
            gain = told(right[arm] - right[against])
            row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _codes(column: pd.Series) -> tuple[int, np.ndarray]:
    """Number of different values, and each row's position among them."""
    codes, values = pd.factorize(column)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        raise UserError(f"row {row} of the scores has no {column.name}; each row needs one")
    return len(values), codes
