r"""Forward diffusions, the reverse processes that undo them, and the coordinate samplers step in.

A diffusion turns an image :math:`x_0` into noise over :math:`t \in [0, 1]`,

.. math:: dx = f(x, t)\,dt + g(t)\,dw, \qquad x_t = \alpha_t x_0 + \sigma_t\,\epsilon,
          \quad \epsilon \sim \mathcal N(0, I).

Because every drift here is linear in :math:`x`, dividing by :math:`\alpha_t` removes it: in
:math:`y = x / \alpha` and the **noise level** :math:`s = \sigma / \alpha` all three diffusions are
the same one, :math:`y_s = x_0 + s\,\epsilon`, and their probability flow is
:math:`dy/ds = \epsilon_\theta(\alpha y, t(s))`. Samplers and likelihoods step in :math:`s`.

Source: Song et al., *Score-Based Generative Modeling through SDEs*, ICLR 2021.
https://arxiv.org/abs/2011.13456. The noise level: Karras et al., *Elucidating the Design Space of
Diffusion-Based Generative Models*, NeurIPS 2022, eqs. (3)-(4). https://arxiv.org/abs/2206.00364
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib.shapes import Images, PerImage, Times

ScoreFn = Callable[[Images, Times], Images]
Scalars = Float[Tensor, "*any"]


def per_image(a: Times, x: Images) -> Float[Tensor, "batch 1 1 1"]:
    """One number per image, ready to multiply the images."""
    return a.to(x.dtype).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class SDE(ABC):
    """A diffusion; a subclass gives its scales, drift and diffusion."""

    t_min: ClassVar[float] = 1e-3  # where sampling ends and the last noise is removed at once
    t_train: ClassVar[float] = 1e-5  # where training times begin

    @abstractmethod
    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Signal and noise scales of ``p(x_t | x_0)``."""

    @abstractmethod
    def drift_diffusion(self, x: Images, t: Times) -> tuple[Images, Times]:
        """Drift ``f(x, t)`` and diffusion ``g(t)`` of the forward process."""

    @abstractmethod
    def time_of(self, noise_level: Scalars) -> Scalars:
        """Inverse of ``noise_level``."""

    def noise_level(self, t: Scalars) -> Scalars:
        """``sigma / alpha``, increasing in ``t``."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def angle(self, t: Scalars) -> tuple[Scalars, Scalars, Scalars]:
        """Cosine, sine and c such that ``c x_t = cos x_0 + sin eps``; for VP, c is 1."""
        alpha, sigma = self.alpha_sigma(t)
        scale = (alpha**2 + sigma**2).rsqrt()
        return alpha * scale, sigma * scale, scale

    def diffuse(self, x_0: Images, t: Times, eps: Images) -> Images:
        """The noisy image ``alpha x_0 + sigma eps``."""
        alpha, sigma = self.alpha_sigma(t)
        return per_image(alpha, x_0) * x_0 + per_image(sigma, x_0) * eps

    def probability_flow(self, score: ScoreFn, x: Images, t: Times) -> Images:
        r"""Velocity :math:`f - \tfrac12 g^2 \nabla\log p_t` of the ODE with the same marginals.

        Source: Song et al. 2021, eq. (13).
        """
        drift, g = self.drift_diffusion(x, t)
        return drift - 0.5 * per_image(g**2, x) * score(x, t)

    def prior(self, shape: tuple[int, ...], rng: torch.Generator) -> Images:
        """Pure noise: draws of ``x_1`` on the generator's device."""
        sigma = float(self.alpha_sigma(torch.ones((), dtype=torch.float64))[1])
        return sigma * torch.randn(shape, generator=rng, device=rng.device)

    def prior_log_prob(self, x_1: Images) -> PerImage:
        """Log-density of pure noise, in nats per image."""
        sigma = float(self.alpha_sigma(torch.ones((), dtype=torch.float64))[1])
        normal = torch.distributions.Normal(0.0, sigma, validate_args=False)  # NaN gives NaN
        return normal.log_prob(x_1).flatten(1).sum(1)


@dataclass(frozen=True)
class _Decaying(SDE):
    r"""A drift :math:`-\tfrac12\beta_t x`, whose rate grows linearly with time."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Scalars) -> Scalars:
        """Rate at which the signal decays and noise enters, per unit of time."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Scalars) -> Scalars:
        r""":math:`\int_0^t \beta`, which is :math:`-2 \log \alpha_t`."""
        return self.beta_min * t + 0.5 * t**2 * (self.beta_max - self.beta_min)

    def _time_of_integral(self, integral: Scalars) -> Scalars:
        slope = self.beta_max - self.beta_min
        # this form of the quadratic's root does not cancel near t = 0
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


class VPSDE(_Decaying):
    r"""Variance-preserving SDE; its default rates are ``diffusers``' DDPM schedule at ``999 t``.

    .. math:: f = -\tfrac12 \beta_t x, \quad g = \sqrt{\beta_t}, \quad
              \alpha_t = e^{-\frac12\int_0^t\beta}, \quad \alpha_t^2 + \sigma_t^2 = 1

    Source: Song et al. 2021, eqs. (11) and (33).
    """

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Scales whose squares sum to 1."""
        integral = self.integral(t)
        # expm1 keeps sigma accurate near t = 0, where 1 - exp loses 1 % in float32
        return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))

    def drift_diffusion(self, x: Images, t: Times) -> tuple[Images, Times]:
        """Drift ``-beta x / 2`` and diffusion ``sqrt(beta)``."""
        beta = self.beta(t)
        return -0.5 * per_image(beta, x) * x, beta.sqrt()

    def time_of(self, noise_level: Scalars) -> Scalars:
        """Inverse of ``noise_level``: its square is ``exp(integral) - 1``."""
        return self._time_of_integral(torch.log1p(noise_level**2))


class SubVPSDE(_Decaying):
    r"""Sub-VP SDE: the drift of VP, never more variance, better likelihoods.

    .. math:: g^2 = \beta_t \bigl(1 - e^{-2\int_0^t\beta}\bigr), \quad
              \sigma_t = 1 - e^{-\int_0^t\beta} = 1 - \alpha_t^2

    Source: Song et al. 2021, eqs. (12) and (33).
    """

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """The signal scale of VP, and the square of its noise scale."""
        integral = self.integral(t)
        return torch.exp(-0.5 * integral), -torch.expm1(-integral)

    def drift_diffusion(self, x: Images, t: Times) -> tuple[Images, Times]:
        """Drift ``-beta x / 2`` and the smaller diffusion."""
        beta = self.beta(t)
        g2 = -beta * torch.expm1(-2 * self.integral(t))
        return -0.5 * per_image(beta, x) * x, g2.sqrt()

    def time_of(self, noise_level: Scalars) -> Scalars:
        """Inverse of ``noise_level``, which is ``2 sinh(integral / 2)``."""
        return self._time_of_integral(2 * torch.asinh(noise_level / 2))


@dataclass(frozen=True)
class VESDE(SDE):
    r"""Variance-exploding SDE: the image stays, noise grows geometrically.

    .. math:: f = 0, \quad \sigma_t = \sigma_{\min} (\sigma_{\max} / \sigma_{\min})^t, \quad
              g = \sigma_t \sqrt{2 \ln (\sigma_{\max} / \sigma_{\min})}

    Source: Song et al. 2021, eqs. (9) and (30).
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: ClassVar[float] = 1e-5

    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Signal scale 1 and the growing noise scale."""
        return torch.ones_like(t), self.sigma_min * torch.exp(t * self._log_ratio())

    def drift_diffusion(self, x: Images, t: Times) -> tuple[Images, Times]:
        """No drift; diffusion proportional to the noise scale."""
        return torch.zeros_like(x), self.alpha_sigma(t)[1] * math.sqrt(2 * self._log_ratio())

    def time_of(self, noise_level: Scalars) -> Scalars:
        """Inverse of ``noise_level``, a logarithm."""
        return torch.log(noise_level / self.sigma_min) / self._log_ratio()


SDES: dict[str, type[SDE]] = {"vp": VPSDE, "sub-vp": SubVPSDE, "ve": VESDE}
