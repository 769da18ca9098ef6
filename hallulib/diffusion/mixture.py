r"""Gaussian mixtures: data whose diffused density, score and class posterior are known exactly.

If :math:`x_0` follows :math:`\sum_k w_k \mathcal N(\mu_k, \Sigma_k)`, then :math:`x_t` follows
:math:`\sum_k w_k \mathcal N(\alpha_t\mu_k,\, \alpha_t^2\Sigma_k + \sigma_t^2 I)`. What a network
has to learn for images is a formula here, for teaching and for tests alike.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.sde import SDE, per_image
from hallulib.shapes import Images, Labels, PerImage, Times


class GaussianMixture:
    """A mixture of Gaussians over small images; ``covariances`` are those of flattened images.

    ``weights`` of the components are normalised here, and equal unless given.
    """

    def __init__(
        self,
        means: Float[Tensor, "k channels height width"],
        covariances: Float[Tensor, "k pixels pixels"],
        weights: Float[Tensor, " k"] | None = None,
    ):
        self.shape = means.shape[1:]
        self.means = means.flatten(1)
        self.variances, self.axes = torch.linalg.eigh(covariances)
        weights = means.new_ones(len(means)) if weights is None else weights
        self.weights = weights / weights.sum()

    def sample(self, n: int, rng: torch.Generator) -> tuple[Images, Labels]:
        """Clean images and the component each came from."""
        y = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        z = torch.randn((n, self.means.shape[1]), generator=rng, dtype=self.means.dtype)
        x = torch.einsum("nij,nj->ni", self.axes[y], self.variances[y].clamp(min=0).sqrt() * z)
        return (self.means[y] + x).view(n, *self.shape), y

    def _terms(
        self, sde: SDE, x: Images, t: Times
    ) -> tuple[Float[Tensor, "batch k"], Float[Tensor, "batch k pixels"]]:
        """Log of each weighted component density, and each component's score."""
        alpha, sigma = sde.alpha_sigma(t.to(x.dtype))
        offset = x.flatten(1)[:, None] - alpha[:, None, None] * self.means
        along = torch.einsum("kij,nki->nkj", self.axes, offset)
        variance = alpha[:, None, None] ** 2 * self.variances + sigma[:, None, None] ** 2
        log_density = -0.5 * (along**2 / variance + variance.log() + math.log(2 * math.pi))
        score = -torch.einsum("kij,nkj->nki", self.axes, along / variance)
        return log_density.sum(2) + self.weights.log(), score

    def log_prob(self, sde: SDE, x: Images, t: Times) -> PerImage:
        """Exact log-density of ``x_t``, in nats per image."""
        return self._terms(sde, x, t)[0].logsumexp(1)

    def posterior(self, sde: SDE, x: Images, t: Times) -> Float[Tensor, "batch k"]:
        """Exact probability of each component given ``x_t``."""
        return self._terms(sde, x, t)[0].softmax(1)

    def eps(self, sde: SDE, x: Images, t: Times) -> Images:
        """The noise a perfect network would predict: ``-sigma`` times the exact score."""
        log_terms, scores = self._terms(sde, x, t)
        score = (log_terms.softmax(1)[:, :, None] * scores).sum(1).view_as(x)
        return -per_image(sde.alpha_sigma(t)[1], x) * score


class ClassMixture:
    """Classes that are mixtures themselves: a score model without network, in closed form."""

    def __init__(self, sde: SDE, classes: Mapping[str, GaussianMixture]):
        self.sde, self.labels, self.parts = sde, tuple(classes), tuple(classes.values())

    index = ScoreModel.index  # of label strings

    def __call__(self, x_t: Images, t: Times, y: Labels) -> Images:
        """The noise in ``x_t`` if it is of class ``y``."""
        eps = torch.stack([part.eps(self.sde, x_t, t) for part in self.parts])
        return eps[y, torch.arange(len(y), device=y.device)]

    def log_prob(self, x: Images, t: float = 0.0) -> Float[Tensor, "batch classes"]:
        """Exact log-density of ``x_t`` under each class, in nats; at time 0 of clean images."""
        times = x.new_full((len(x),), t)
        return torch.stack([part.log_prob(self.sde, x, times) for part in self.parts], 1)

    def posterior(self, x: Images, t: float = 0.0) -> Float[Tensor, "batch classes"]:
        """Exact probability of each class given ``x_t``, if all are equally frequent."""
        return self.log_prob(x, t).softmax(1)
