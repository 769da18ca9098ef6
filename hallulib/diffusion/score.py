r"""What a score model is: noise, score and denoised image, guidance, and the training loss.

A score model predicts the noise :math:`\epsilon` in :math:`x_t = \alpha_t x_0 + \sigma_t\epsilon`.
That one prediction is three things:

.. math:: \nabla\log p_t(x_t) = -\epsilon / \sigma_t, \qquad
          \mathrm E[x_0 \mid x_t] = (x_t - \sigma_t \epsilon) / \alpha_t.

Source: Vincent, *A Connection between Score Matching and Denoising Autoencoders*, 2011; Ho et al.,
*Denoising Diffusion Probabilistic Models*, 2020. https://arxiv.org/abs/2006.11239
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError
from hallulib.diffusion.sde import SDE, per_image
from hallulib.shapes import Images, Labels, PerImage, Times

EpsFn = Callable[[Images, Times], Images]
LogProb = Callable[[Images, Times], PerImage]
Condition = Labels | Float[Tensor, "batch embedding"]


def score_of_eps(sde: SDE, eps: Images, t: Times) -> Images:
    """The score ``-eps / sigma`` of the noisy density."""
    return -eps / per_image(sde.alpha_sigma(t)[1], eps)


def denoised_of_eps(sde: SDE, x_t: Images, eps: Images, t: Times) -> Images:
    """The expected clean image ``(x_t - sigma eps) / alpha`` (Tweedie's formula)."""
    alpha, sigma = sde.alpha_sigma(t)
    return (x_t - per_image(sigma, x_t) * eps) / per_image(alpha, x_t)


def eps_of_denoised(sde: SDE, x_t: Images, x_0: Images, t: Times) -> Images:
    """The noise ``(x_t - alpha x_0) / sigma`` that a denoised image implies."""
    alpha, sigma = sde.alpha_sigma(t)
    return (x_t - per_image(alpha, x_t) * x_0) / per_image(sigma, x_t)


class ScoreModel(nn.Module):
    r"""A network with the diffusion and the labels it was trained for; it predicts the noise.

    Inside, the network answers the *velocity* :math:`v = \cos\phi\,\epsilon - \sin\phi\,x_0`
    at the angle :math:`\tan\phi = \sigma / \alpha`, from which

    .. math:: \epsilon = \sin\phi\;c\,x_t + \cos\phi\;v, \qquad
              x_0 = \cos\phi\;c\,x_t - \sin\phi\;v, \qquad c = (\alpha^2 + \sigma^2)^{-1/2}.

    The error of an :math:`\epsilon` that the network answered itself would be divided by
    :math:`\alpha_1 = 0.0066` in :math:`x_0`; the error of the velocity is never enlarged. It is
    ``network(x, timesteps, y)``, with timesteps to 999 as in DDPM.

    A class may also be the density of another one, *moved* by an image :math:`d_y`, one of
    ``shifts``, of which the last is of the null class: its denoiser is that of the network on
    :math:`x_t - \alpha_t d_y`, plus :math:`d_y`. See
    :func:`hallulib.diffusion.unet.moved_to_means`.

    Source: Salimans & Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022,
    section 4 and appendix D. https://arxiv.org/abs/2202.00512
    """

    network: Any  # a `ClassUNet`, or another module with its signature
    shifts: Images | None

    def __init__(
        self,
        sde: SDE,
        network: nn.Module,
        labels: Sequence[str] = (),
        shifts: Images | None = None,
    ):
        super().__init__()
        self.sde, self.network, self.labels = sde, network, tuple(labels)
        self.register_buffer("shifts", shifts)

    @property
    def null(self) -> int:
        """The index that stands for "no class"."""
        return len(self.labels)

    def velocity(self, x_t: Images, t: Times, y: Condition | None = None) -> Images:
        """The network's own answer, moved with the class; only here is it called."""
        if len(x_t) == 0:  # which attention has no shape for
            return torch.zeros_like(x_t)
        if y is None:
            y = torch.full((len(x_t),), self.null, device=x_t.device)
        cos, sin, scale = (per_image(a, x_t) for a in self.sde.angle(t))
        if self.shifts is None or y.is_floating_point():
            return self.network(scale * x_t, 999 * t, y)
        d = self.shifts[y]
        return self.network(scale * x_t - cos * d, 999 * t, y) - sin * d

    def forward(self, x_t: Images, t: Times, y: Condition | None = None) -> Images:
        """The noise in ``x_t``; ``y`` holds class indices, or embeddings, which move nothing."""
        cos, sin, scale = (per_image(a, x_t) for a in self.sde.angle(t))
        return sin * scale * x_t + cos * self.velocity(x_t, t, y)

    def index(self, labels: Sequence[str]) -> Labels:
        """Class indices of label strings, which the model must know."""
        unknown = sorted(set(labels) - set(self.labels))
        if unknown:
            known = ", ".join(self.labels) or "none: it was trained without labels"
            raise UserError(
                f"the score model does not know the label {unknown[0]!r}; it knows {known}"
            )
        return torch.tensor([self.labels.index(label) for label in labels], dtype=torch.int64)


def guided(model: ScoreModel, y: Condition, guidance_scale: float | int = 1.0) -> EpsFn:
    r"""Classifier-free guidance: the noise of a class, or more of what sets the class apart.

    .. math:: \epsilon = \epsilon_\varnothing + w\,(\epsilon_y - \epsilon_\varnothing)

    At scale w = 0 it is unconditional, at 1 conditional, above 1 exaggerated. It costs one network
    call, on a doubled batch unless w is 0 or 1.

    Source: Ho & Salimans, *Classifier-Free Diffusion Guidance*, 2022, eq. (6), whose own weight is
    w - 1. https://arxiv.org/abs/2207.12598
    """
    # the vector of the null class is zero
    null = torch.zeros_like(y) if y.is_floating_point() else torch.full_like(y, model.null)
    if guidance_scale in (0, 1):
        return lambda x, t: model(x, t, y if guidance_scale else null)

    def eps(x: Images, t: Times) -> Images:
        both = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([null, y]))
        eps_null, eps_class = both.chunk(2)
        return eps_null + guidance_scale * (eps_class - eps_null)

    return eps


def classifier_guided(
    sde: SDE, eps: EpsFn, log_prob: LogProb, gradient_scale: float | int = 1.0
) -> EpsFn:
    r"""Classifier guidance: steer a model by the gradient of a classifier of noisy images.

    .. math:: \epsilon - \gamma\,\sigma_t\,\nabla_{x_t}\log p(y \mid x_t)

    ``log_prob`` is that of the wanted class, in nats; :math:`\gamma = 1` is Bayes' rule.

    Source: Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021, algorithm 2.
    https://arxiv.org/abs/2105.05233
    """

    def steered(x: Images, t: Times) -> Images:
        with torch.enable_grad():
            x_t = x.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(x_t, t).sum(), x_t)[0]
        return eps(x, t) - gradient_scale * per_image(sde.alpha_sigma(t)[1], x) * gradient

    return steered


def clipped(sde: SDE, eps: EpsFn) -> EpsFn:
    r"""The noise whose denoised image stays in [-1, 1], where images live.

    Without it a briefly trained model throws some samples far outside near :math:`t = 1`, where
    :math:`\alpha` is small, and they never come back.

    Source: Ho et al. 2020 (their released sampler clips; the paper does not say so).
    """

    def within(x: Images, t: Times) -> Images:
        x_0 = denoised_of_eps(sde, x, eps(x, t), t).clamp(-1, 1)
        return eps_of_denoised(sde, x, x_0, t)

    return within


def stratified_times(n: int, t_min: float, rng: torch.Generator) -> Times:
    """Times in ``[t_min, 1]``, each uniform, one in each of n equal strata: a less noisy loss.

    Source: Kingma et al., *Variational Diffusion Models*, 2021, appendix I.
    https://arxiv.org/abs/2107.00630
    """
    shift = torch.rand((), generator=rng, device=rng.device)
    strata = (shift + torch.arange(n, device=rng.device) / n) % 1
    return t_min + (1 - t_min) * strata


def denoising_loss(
    model: ScoreModel, x_0: Images, t: Times, eps: Images, y: Condition | None = None
) -> PerImage:
    r"""Denoising score matching: mean squared error of the velocity, per image.

    .. math:: \tfrac1d\,\lVert v_\theta(x_t, t, y) - v \rVert^2
              = \tfrac1d\,(1 + s^2)\,\lVert \epsilon_\theta(x_t, t, y) - \epsilon \rVert^2,
              \qquad s = \sigma_t / \alpha_t

    The factor :math:`1 + s^2` gives the noisiest images the weight they need to be denoised well.

    Source: Song et al. 2021, eq. (7) with :math:`\lambda = \sigma^2 (1 + s^2)`; Salimans & Ho
    2022, section 4 ("SNR + 1 weighting").
    """
    cos, sin, _ = (per_image(a, x_0) for a in model.sde.angle(t))
    error = model.velocity(model.sde.diffuse(x_0, t, eps), t, y) - (cos * eps - sin * x_0)
    return error.square().flatten(1).mean(1)
