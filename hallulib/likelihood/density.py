r"""Log-densities of images, class by class, of a score model by its flow.

In :math:`y = x / \alpha` and the noise level :math:`s = \sigma / \alpha` the flow of every
diffusion is :math:`dy/ds = \epsilon_\theta`. Much of that is predictable for images of pixel
spread :math:`\tau`, so steps are taken in what is left: with the angle
:math:`\tan\psi = s / \tau` and :math:`u = y / \sqrt{s^2 + \tau^2}`, of unit variance all the way,

.. math:: \frac{du}{d\psi} = f = \frac{\epsilon_\theta \sqrt{s^2 + \tau^2} - s u}{\tau}.

For Gaussian images of that spread :math:`f` is zero; for :math:`\tau = 1` it is the network's
velocity. A third-order multistep rule with one evaluation a step (`adams`) follows the path where
Runge-Kutta in :math:`t` takes hundreds. Along it a density changes by the divergence of :math:`f`
alone,

.. math:: \log p(x) = \log p_1(u_1) - d \log \sqrt{s_0^2 + \tau^2}
          + \int_{\psi_0}^{\psi_1} \nabla_u \!\cdot f \, d\psi ,

from the density :math:`p_1` of pure noise to that of images, blurred by the least noise
:math:`s_0`; its estimate is Hutchinson's, :math:`\mathrm E[z^\top (\partial f / \partial u) z]`.

Source: Chen et al., *Neural Ordinary Differential Equations*, 2018, theorem 1; Song et al. 2021,
section 4.3; Grathwohl et al., *FFJORD*, 2019, section 3.1 (one probe for a whole solve). The angle
generalises Salimans & Ho 2022, appendix D.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.sde import SDE
from hallulib.shapes import Images, Labels, Times

GREY_STEP = 1 / 127.5  # distance of neighbouring grey levels in [-1, 1]
SPREAD = 0.5  # standard deviation of the pixels of images in [-1, 1], roughly
PerClass = Float[Tensor, "batch classes"]
Probes = Float[Tensor, "probes channels height width"]
Divergence = Float[Tensor, "probes batch"]
Slope = tuple[Images, Divergence]
State = tuple[float, Images, Divergence]  # at an angle


@runtime_checkable
class ClassModel(Protocol):
    """What scores classes: a `ScoreModel`, or a `mixture.ClassMixture`, which is exact."""

    sde: SDE
    labels: tuple[str, ...]

    def index(self, labels: Sequence[str]) -> Labels:
        """Class indices of label strings; an unknown one is an error."""

    def __call__(self, x_t: Images, t: Times, y: Labels) -> Images:
        """The noise in ``x_t`` if it is of class ``y``."""


@dataclass(frozen=True)
class LogDensity:
    """Log-densities of images under classes, or bounds of them, with all that they are means of.

    ``samples``, nats per image, are one for each probe of the flow (a full trace is one), or for
    each pair of noise and level of a bound; the same ones for all images and classes.
    ``evaluations`` of the network are for each pair of image and class, the most of any batch;
    each of the flow has one backward pass per probe.
    """

    samples: Float[Tensor, "batch classes samples"]
    evaluations: int

    @property
    def value(self) -> PerClass:
        """Mean over the samples, in nats per image."""
        return self.samples.mean(2)

    @property
    def error(self) -> PerClass:
        """Standard error of `value`, as of independent samples; not a number for a single one."""
        n = self.samples.shape[2]
        return self.samples.std(2) / n**0.5 if n > 1 else torch.full_like(self.value, math.nan)


class FlowState(NamedTuple):
    """Where the flow is, and the divergence integrated so far."""

    t: float
    x_t: Images
    divergence: Divergence


def log_density(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    steps: int = 32,
    probes: int | Literal["full"] = 1,
    solver: Callable[..., Iterator[State]] | None = None,
    seed: int = 0,
    batch: int = 128,
) -> LogDensity:
    r"""Log-density of every image under every class, by the probability flow.

    It is the density of images blurred with the noise of time ``sde.t_train``. A label that the
    model was not trained with is a `UserError`.

    Args:
        model: never guided.
        x: images in [-1, 1]; 8-bit ones should go through `dequantise` first.
        classes: labels to score, in this order; all that the model knows by default.
        steps: of the solver; n cost n + 1 evaluations, and errors fall with the third power.
        probes: random directions of the trace estimate, or ``"full"``: every direction, exact,
            for images of a few hundred pixels at most.
        solver: another one than `adams`, with its arguments; its last state counts.
        seed: of the probes.
        batch: most pairs of image and class in the network at once, which bounds the memory.
    """
    y = model.index(model.labels if classes is None else classes).to(x.device)
    x = in_type_of(model, x)
    nodes, z = angles(model.sde, steps), directions(x, probes, seed)
    alpha_1 = float(model.sde.alpha_sigma(torch.ones((), dtype=torch.float64))[0])
    to_end = alpha_1 * _scale(nodes[-1])  # turns u at the end into x_1
    stretch = math.prod(x.shape[1:]) * math.log(to_end / _scale(nodes[0]))
    samples, evaluations = [], 0
    for rows in torch.arange(len(x) * len(y), device=x.device).split(batch):
        field = _Field(model, y[rows % len(y)], z)
        start = x[rows // len(y)] / _scale(nodes[0])
        *_, (_, u, divergence) = (solver or adams)(field, start, nodes)
        if probes == "full":  # one direction each: their sum is the trace
            divergence = divergence.sum(0, keepdim=True)
        samples.append(model.sde.prior_log_prob((to_end * u).double()) + stretch + divergence)
        evaluations = max(evaluations, field.evaluations)
    return LogDensity(torch.cat(samples, 1).T.unflatten(0, (len(x), len(y))), evaluations)


def walk(
    model: ClassModel, x: Images, y: Labels, *, steps: int = 32, seed: int = 0
) -> Iterator[FlowState]:
    """The way of images into noise, each under a class of its own, state by state."""
    nodes, x = angles(model.sde, steps), in_type_of(model, x)
    field = _Field(model, y, directions(x, 1, seed))
    for psi, u, divergence in adams(field, x / _scale(nodes[0]), nodes):
        t, alpha = _time(model.sde, psi)
        yield FlowState(t, alpha * _scale(psi) * u, divergence)


def in_type_of(model: ClassModel, x: Images) -> Images:
    """The images in the type of the model's weights, if it has any."""
    return x.to(next(model.parameters()).dtype) if isinstance(model, ScoreModel) else x


def noise_range(sde: SDE) -> np.ndarray:
    """The least and the largest noise level of images in training."""
    return sde.noise_level(torch.tensor([sde.t_train, 1.0], dtype=torch.float64)).numpy()


def angles(sde: SDE, steps: int) -> np.ndarray:
    r"""Rising angles :math:`\psi = \arctan(s / \tau)`, uniform in their cube root."""
    first, last = np.arctan(noise_range(sde) / SPREAD) ** (1 / 3)
    return np.linspace(first, last, steps + 1) ** 3


def directions(x: Images, probes: int | Literal["full"], seed: int = 0) -> Probes:
    """Random signs along which the trace is probed, or with ``"full"`` every unit direction."""
    shape = x.shape[1:]
    if probes == "full":
        return torch.eye(math.prod(shape), dtype=x.dtype, device=x.device).view(-1, *shape)
    rng = torch.Generator().manual_seed(seed)
    # one by one: more probes keep the first ones as they are
    draws = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(probes)]
    return torch.stack(draws).sign().to(x)


class _Field:
    """The right-hand side: ``f`` and its divergence along each probe, counted."""

    def __init__(self, model: ClassModel, y: Labels, z: Probes):
        self.model, self.y, self.z, self.evaluations = model, y, z, 0

    def __call__(self, u: Images, psi: float) -> Slope:
        self.evaluations += 1
        t, alpha = _time(self.model.sde, psi)
        scale = _scale(psi)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            eps = self.model(alpha * scale * u, u.new_full((len(u),), t), self.y)
            f = (scale * eps - _level(psi) * u) / SPREAD
            last = len(self.z) - 1
            along = [
                (z * torch.autograd.grad(f, u, z.expand_as(f), retain_graph=i < last)[0])
                for i, z in enumerate(self.z)
            ]
        return f.detach(), torch.stack([g.flatten(1).sum(1) for g in along])


def _level(psi: float) -> float:
    return SPREAD * math.tan(psi)


def _scale(psi: float) -> float:
    return math.hypot(_level(psi), SPREAD)


def _time(sde: SDE, psi: float) -> tuple[float, float]:
    """Time and signal scale at an angle."""
    t = sde.time_of(torch.tensor(_level(psi), dtype=torch.float64))
    return float(t), float(sde.alpha_sigma(t)[0])


def adams(field: _Field, u: Images, nodes: np.ndarray) -> Iterator[State]:
    """Predict by the last three slopes, evaluate, correct by the new one and the last two.

    Adams, Bashforth and Moulton's rules on uneven nodes; both are of third order but for the
    first steps, which have fewer slopes. Source: Hairer, Norsett & Wanner 1993, section III.5.
    """
    slopes = [(nodes[0], *field(u, nodes[0]))]
    integral = torch.zeros_like(slopes[0][2], dtype=torch.float64)
    yield nodes[0], u, integral
    for a, b in pairwise(nodes):
        predicted = u + _integrate(slopes, a, b)[0]
        slopes = [*slopes[-2:], (b, *field(predicted, b))]
        moved, gained = _integrate(slopes, a, b)
        u, integral = u + moved, integral + gained.double()
        yield b, u, integral


def _integrate(slopes: list[State], a: float, b: float) -> Slope:
    """Integrals over [a, b] of the polynomial through the slopes: its weights are exact."""
    psi, f, divergence = zip(*slopes, strict=True)
    powers = np.arange(len(psi))
    z = (np.array(psi) - a) / (b - a)
    weights = np.linalg.solve(z[None] ** powers[:, None], 1 / (powers + 1)).tolist()
    total = lambda values: sum(w * (b - a) * v for w, v in zip(weights, values, strict=True))
    return total(f), total(divergence)


def dequantise(x: Images, seed: int = 0) -> Images:
    """Spread every grey level evenly over its step, by the same noise for every image.

    Else a density can put all its mass on the 256 levels of [-1, 1] and grow without bound.

    Source: Theis et al. 2016, section 3.1. https://arxiv.org/abs/1511.01844
    """
    rng = torch.Generator().manual_seed(seed)
    return x + GREY_STEP * (torch.rand(x.shape[1:], generator=rng).to(x.device) - 0.5)


def bits_per_dim(log_density: Tensor, n_dims: int) -> Tensor:
    r"""Bits per pixel and channel of dequantised 8-bit images, from nats per image.

    .. math:: -\frac{\log p(x)}{d \ln 2} + \log_2 127.5

    The offset is that of levels ``2 / 255`` apart, of which a uniform density costs 8 bits. In
    Song et al. 2021 they are ``2 / 256`` apart, and it is 7.
    """
    return -log_density / (n_dims * math.log(2)) - math.log2(GREY_STEP)
