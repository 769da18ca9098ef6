r"""From log-densities to probabilities that can be trusted, and to knowing when not to answer.

Log-densities of images differ by hundreds of nats between classes, so Bayes' rule answers 0 or 1
and is too sure of it. One number mends that, a temperature found on images that were not trained
on; `calibration_error` tells how well, and `risk_coverage` what is gained by answering only where
the top probability is high. Where classes share it, what is returned is the mean over taking one
of them by chance, so the order of the classes never matters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from sklearn.base import ClassifierMixin
from torch import Tensor

from hallulib import UserError
from hallulib.shapes import Labels, PerImage
from hallulib.storage.estimator import ImageEstimator

# of temperatures, in mean distances of a log-density from the mean of its row
COLDEST, HOTTEST = 1e-2, 1e4

LogDensities = Float[Tensor, "batch k"]
Probabilities = Float[Tensor, "batch k"]


@dataclass(frozen=True)
class Reliability:
    """Expected calibration error, and the bins behind it: means over ``count`` rows, or NaN."""

    error: float
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]


class RiskCoverage(NamedTuple):
    """Shares of rows answered, from few to all, and of wrong answers among them.

    ``threshold`` is the least top probability answered; ``area`` the mean risk over coverages.
    """

    coverage: Float[Tensor, " levels"]
    risk: Float[Tensor, " levels"]
    threshold: Float[Tensor, " levels"]
    area: float


def posterior(log_density: LogDensities, *, temperature: float | int = 1.0) -> Probabilities:
    r"""Probability of each class, by Bayes' rule with equal priors and softened densities.

    .. math:: p(c \mid x) = \frac{p(x \mid c)^{1/T}}{\sum_b p(x \mid b)^{1/T}}

    Densities are in nats, or ratios to any one class: what is added to a row does not matter. T is
    above 0; 1 takes the densities at their word, more is less sure.

    Example:
        >>> posterior(torch.tensor([[0.0, 0.0]]))
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    return (finite(log_density).double() / temperature).softmax(1)


def fit_temperature(log_density: LogDensities, y: Labels) -> float:
    r"""The temperature that makes the true classes most likely.

    .. math:: \min_T \; -\frac1n \sum_i \log p_T(y_i \mid x_i)

    is convex in :math:`1/T`, so there is one minimum, at which its slope is zero. Temperatures
    reach from 0.01 to 10000 times the mean distance of a log-density from the mean of its row. The
    lowest is returned where all classes are told apart without error, the highest where the true
    class is the least likely on average, and 1 where log-densities are equal. They are nats or
    log-ratios of images that were *not* trained on.

    Source: Guo et al., *On Calibration of Modern Neural Networks*, 2017, section 4.2.
    https://arxiv.org/abs/1706.04599
    """
    log_density = finite(log_density).double()
    centred = log_density - log_density.mean(1, keepdim=True)
    scale = float(centred.abs().mean())
    if scale == 0:
        return 1.0
    true = centred.gather(1, y[:, None]).mean()

    def slope(log_t: float) -> float:
        p = (centred / (scale * math.exp(log_t))).softmax(1)
        return float(true - (p * centred).sum(1).mean())

    return scale * math.exp(_root(slope, math.log(COLDEST), math.log(HOTTEST)))


def calibration_error(probabilities: Probabilities, y: Labels, bins: int = 15) -> Reliability:
    r"""How far the top probability is from the share of right answers.

    .. math:: \mathrm{ECE} = \sum_m \frac{n_m}{n}\,\lvert \mathrm{acc}_m - \mathrm{conf}_m \rvert

    over equal bins ``((m - 1) / bins, m / bins]`` of the top probability. It is never negative,
    so noise alone makes it positive where images are few. Source: Guo et al. 2017, section 2.

    Example:
        >>> calibration_error(torch.tensor([[0.25, 0.75]]), torch.tensor([1])).error
        0.25
    """
    top, right = _answers(probabilities, y)
    edges = torch.linspace(0, 1, bins + 1, dtype=top.dtype, device=top.device)
    member = torch.bucketize(top, edges[1:-1])
    count = member.bincount(minlength=bins)
    confidence, accuracy = (member.bincount(values, bins) / count for values in (top, right))
    error = (count * (accuracy - confidence).abs()).nansum() / len(top)
    return Reliability(float(error), confidence, accuracy, count)


def risk_coverage(probabilities: Probabilities, y: Labels) -> RiskCoverage:
    """Share of wrong answers against the share answered, as the threshold falls.

    Rows of equal top probability enter together, as no threshold can part them.

    Source: Geifman & El-Yaniv, *Selective Classification for Deep Neural Networks*, 2017,
    https://arxiv.org/abs/1705.08500; the area: Geifman et al. 2019, arXiv 1805.08206.

    Example:
        >>> risk_coverage(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])).risk
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    top, right = _answers(probabilities, y)
    levels, member, count = (-top).unique(return_inverse=True, return_counts=True)
    risk = member.bincount(1 - right).cumsum(0) / count.cumsum(0)
    area = float((risk * count).sum() / len(top))
    return RiskCoverage(count.cumsum(0) / len(top), risk, -levels, area)


def threshold(probabilities: Probabilities, y: Labels, risk: float | int) -> float:
    """The lowest top probability from which on at most this share of answers is wrong.

    As it was chosen on these images, others see a little more risk. A risk that no threshold keeps
    is a `UserError`.
    """
    curve = risk_coverage(probabilities, y)
    low_enough = curve.risk <= risk + 1e-12
    if not low_enough.any():
        raise UserError(
            f"no threshold keeps the risk at {risk}: the least is {curve.risk.min():.3g}"
        )
    return float(curve.threshold[low_enough][-1])


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is zero, or the end at which it is nearest to that."""
    if rising(low) >= 0:
        return low
    return high if rising(high) <= 0 else brentq(rising, low, high, xtol=1e-13)


def finite(log_density: LogDensities) -> LogDensities:
    """What it is given; a log-density that is not finite is a `UserError`."""
    if not torch.isfinite(log_density).all():
        raise UserError("a log-density is not finite; all must be finite numbers")
    return log_density


def _answers(p: Probabilities, y: Labels) -> tuple[PerImage, PerImage]:
    """The top probability of each row, and how right it is: a share where classes share it."""
    p = p.double()
    top = p.max(1).values
    best = p == top[:, None]
    return top.clamp(max=1), best.gather(1, y[:, None])[:, 0] / best.sum(1).double()


def log_odds(log_posterior: LogDensities) -> LogDensities:
    r"""Log-odds of each class against all others, which order images where probabilities cannot.

    .. math:: \log\frac{p(c \mid x)}{1 - p(c \mid x)}
              = \ell_c - \log \sum_{b \ne c} e^{\ell_b}

    Probabilities of confident models round to 0 and 1, and such ties spoil an AUROC.
    Log-probabilities may be off by a constant per row; one that is not finite, or a single class,
    is a `UserError`.

    Example:
        >>> log_odds(torch.tensor([[0.0, 2000.0]], dtype=torch.float64))
        tensor([[-2000.,  2000.]], dtype=torch.float64)
    """
    k = finite(log_posterior).shape[1]
    if k < 2:
        raise UserError(f"{k} class found; log-odds need at least 2")
    own = torch.eye(k, dtype=torch.bool, device=log_posterior.device)
    others = log_posterior.double()[:, None].masked_fill(own, -math.inf).logsumexp(2)
    return log_posterior.double() - others


class ImageClassifier(ClassifierMixin, ImageEstimator):
    """A scikit-learn classifier of images, by a log-probability of each class."""

    def _log_posterior(self, X) -> LogDensities:
        """Log-probability of each class, up to a constant per image."""
        raise NotImplementedError

    def predict_proba(self, X) -> np.ndarray:
        """Probability of each class, in the order of ``classes_``."""
        return self._log_posterior(X).softmax(1).numpy()

    def decision_function(self, X) -> np.ndarray:
        """Log-odds of each class against all others; of the second class alone if there are two.

        Unlike probabilities they stay distinct where one class is all but certain.
        """
        odds = log_odds(self._log_posterior(X)).numpy()
        return odds[:, 1] if len(self.classes_) == 2 else odds

    def predict(self, X) -> np.ndarray:
        """The class of highest probability."""
        best = self._log_posterior(X).argmax(1).numpy()
        return self.classes_[best]
