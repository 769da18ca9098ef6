r"""Samplers: ways to walk from noise to an image, each a generator over the states it passes.

All but one step in :math:`y = x / \alpha` along falling noise levels :math:`s = \sigma / \alpha`,
where every diffusion of :mod:`hallulib.diffusion.sde` looks the same and, with
:math:`D = y - s\,\epsilon(y, s)` the denoised image:

=====================  ==================================================  ==================
sampler                one step from ``s`` to ``r``                        calls a step, order
=====================  ==================================================  ==================
``ancestral``          ``D + (r/s)^2 (y - D) + r sqrt(1 - (r/s)^2) z``     1, DDPM
``euler_maruyama``     reverse SDE in time                                 1, weak order 1
``predictor_corrector``  a Langevin step, then ``ancestral``               2
``heun``               trapezoidal rule on ``dy/ds = eps``                 2, order 2
``dpm_solver``         exponential two-step rule on ``D`` in ``log s``     1, order 2
=====================  ==================================================  ==================

The last level may be 0: the image is then the denoised image, as all five agree.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib.diffusion.score import Condition, EpsFn, ScoreModel, clipped, guided, score_of_eps
from hallulib.diffusion.sde import SDE, per_image
from hallulib.shapes import Images, Labels

Levels = Float[Tensor, " levels"]
Rng = torch.Generator


class State(NamedTuple):
    """Noisy images at time t in [0, 1], and the clean images that the last call expects."""

    x: Images
    x_0: Images
    t: float


States = Iterator[State]


def noise_levels(
    sde: SDE, steps: int, rho: float | None = 7.0, start_time: float | int = 1.0
) -> Levels:
    """So many falling noise levels from ``start_time`` to ``sde.t_min``, then 0.

    They are even in ``s ** (1 / rho)`` (Karras et al. 2022, eq. 5), or without ``rho`` in time.
    """
    ends = torch.tensor([start_time, sde.t_min], dtype=torch.float64)
    part = torch.linspace(0, 1, steps, dtype=torch.float64)
    if rho is None:
        levels = sde.noise_level(ends[0] + part * (ends[1] - ends[0]))
    else:
        first, last = sde.noise_level(ends) ** (1 / rho)
        levels = (first + part * (last - first)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


class _Walk:
    """The shared part of the samplers: ``eps`` as a function of ``y`` and ``s``."""

    def __init__(self, sde: SDE, eps: EpsFn):
        self.sde, self.network = sde, eps
        self.at = functools.cache(self._at)  # a level ends one step and begins the next

    def _at(self, s: Tensor) -> tuple[float, float]:
        """Time and signal scale of a noise level."""
        t = self.sde.time_of(s) if s > 0 else torch.zeros_like(s)
        return float(t), float(self.sde.alpha_sigma(t)[0])

    def eps(self, y: Images, s: Tensor) -> Images:
        t, alpha = self.at(s)
        return self.network(alpha * y, y.new_full((len(y),), t))

    def denoised(self, y: Images, s: Tensor) -> Images:
        return y - float(s) * self.eps(y, s)

    def state(self, y: Images, x_0: Images, s: Tensor) -> State:
        t, alpha = self.at(s)
        return State(alpha * y if s > 0 else x_0, x_0, t)


def _noise(like: Images, rng: Rng) -> Images:
    return torch.randn(like.shape, generator=rng, device=like.device, dtype=like.dtype)


@torch.no_grad()
def ancestral(
    sde: SDE, eps: EpsFn, x: Images, levels: Levels, rng: Rng, corrected: bool = False
) -> States:
    r"""DDPM's ancestral sampling: draw each level from its law given the next and the image.

    Exact for all three diffusions, were the image known; ``corrected`` by `predictor_corrector`.

    Source: Ho et al. 2020, eqs. (6)-(7), written for :math:`y = x / \alpha`.
    """
    walk = _Walk(sde, eps)
    y = x / walk.at(levels[0])[1]
    for s, r in pairwise(levels):
        if corrected:
            step = 2 * (0.16 * float(s)) ** 2
            y = y - step * (walk.eps(y, s) / float(s)) + (2 * step) ** 0.5 * _noise(y, rng)
        x_0, share = walk.denoised(y, s), float((r / s) ** 2)
        y = x_0 + share * (y - x_0) + float(r) * (1 - share) ** 0.5 * _noise(y, rng)
        yield walk.state(y, x_0, r)


@torch.no_grad()
def euler_maruyama(sde: SDE, eps: EpsFn, x: Images, levels: Levels, rng: Rng) -> States:
    r"""The reverse SDE by the Euler-Maruyama rule, as in Pachetti & Colantonio 2024.

    .. math:: dx = (f - g^2 \nabla\log p_t)\,dt + g\,dw, \qquad dt < 0

    Source: Anderson 1982; Song et al. 2021, eq. (6), and appendix G: the last step removes the
    noise at once.
    """
    walk = _Walk(sde, eps)
    for s, r in pairwise(levels):
        (t, alpha), (t_next, _) = walk.at(s), walk.at(r)
        times = x.new_full((len(x),), t)
        noise = walk.eps(x / alpha, s)
        x_0 = x / alpha - float(s) * noise
        drift, g = sde.drift_diffusion(x, times)
        drift = drift - per_image(g**2, x) * score_of_eps(sde, noise, times)
        dt = t_next - t
        if r > 0:
            x = x + drift * dt + per_image(g, x) * (-dt) ** 0.5 * _noise(x, rng)
        else:
            x = x_0
        yield State(x, x_0, t_next)


def predictor_corrector(sde: SDE, eps: EpsFn, x: Images, levels: Levels, rng: Rng) -> States:
    r"""At each level, a Langevin step that mends the sample, then an ancestral step.

    Its size is :math:`2\,(0.16\,\sigma)^2`; the paper divides batch means of norms whose ratio
    is :math:`\sigma`, so that images depend on their neighbours.

    Source: Song et al. 2021, algorithms 2-5.
    """
    return ancestral(sde, eps, x, levels, rng, corrected=True)


@torch.no_grad()
def heun(sde: SDE, eps: EpsFn, x: Images, levels: Levels, rng: Rng | None = None) -> States:
    """The probability flow by Heun's rule; no randomness after the start.

    Source: Karras et al. 2022, algorithm 1.
    """
    walk = _Walk(sde, eps)
    y = x / walk.at(levels[0])[1]
    for s, r in pairwise(levels):
        slope = walk.eps(y, s)
        x_0 = y - float(s) * slope
        ahead = y + float(r - s) * slope
        y = ahead if r == 0 else y + float(r - s) * (slope + walk.eps(ahead, r)) / 2
        yield walk.state(y, x_0, r)


@torch.no_grad()
def dpm_solver(sde: SDE, eps: EpsFn, x: Images, levels: Levels, rng: Rng | None = None) -> States:
    """DPM-Solver++(2M): the flow solved exactly but for the denoised image, extrapolated.

    Its first step, and the step to level 0, are DDIM's.

    Source: Lu et al., *DPM-Solver++*, 2022, algorithm 2. https://arxiv.org/abs/2211.01095
    """
    walk = _Walk(sde, eps)
    y, before, h_before = x / walk.at(levels[0])[1], None, 0.0
    for s, r in pairwise(levels):
        x_0 = ahead = walk.denoised(y, s)
        h = float(torch.log(s / r)) if r > 0 else 0.0
        if before is not None and r > 0:
            ahead = x_0 + (x_0 - before) * h / (2 * h_before)
        y = float(r / s) * y + (1 - float(r / s)) * ahead
        before, h_before = x_0, h
        yield walk.state(y, x_0, r)


SAMPLERS: dict[str, Callable[..., States]] = {
    sampler.__name__: sampler
    for sampler in (ancestral, euler_maruyama, predictor_corrector, heun, dpm_solver)
}


def draw(
    model: ScoreModel,
    y: Condition,
    *,
    sampler: str = "dpm_solver",
    steps: int = 20,
    guidance_scale: float | int = 1.0,
    steer: Callable[[EpsFn, Labels], EpsFn] | None = None,
    clip: bool = True,
    images: Images | None = None,
    start_time: float | int = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Images:
    """Images of the given classes from a trained model, on its device.

    Each ``y`` is a class index, ``model.null`` for none, or an embedding. The noise is `guided`;
    ``steer`` changes it for the images at the positions it is given, as
    :func:`hallulib.augment.steering.steered` does; with ``clip`` it is `clipped`, which latents
    must not be. The walk starts from pure noise or, if they are given, from ``images`` noised to
    ``start_time``, above ``sde.t_min`` to 1: the later, the less of them is left.
    """
    device = next(model.parameters()).device
    y, rng = y.to(device), torch.Generator(device).manual_seed(seed)
    rho = 7.0 if sampler in ("heun", "dpm_solver") else None
    begin = 1.0 if images is None else float(start_time)
    levels, drawn = noise_levels(model.sde, steps, rho, begin), []
    for rows in torch.arange(len(y), device=device).split(batch_size):
        shape = (len(rows), *model.network.shape)
        if images is None:
            x = model.sde.prior(shape, rng)
        else:
            noise = torch.randn(shape, generator=rng, device=device)
            t = torch.full((len(rows),), begin, device=device)
            x = model.sde.diffuse(images.to(device)[rows], t, noise)
        eps = guided(model, y[rows], guidance_scale)
        if steer is not None:
            eps = steer(eps, rows)
        if clip:
            eps = clipped(model.sde, eps)
        for state in SAMPLERS[sampler](model.sde, eps, x, levels, rng):
            x = state.x
        drawn.append(x)
    return torch.cat(drawn)
