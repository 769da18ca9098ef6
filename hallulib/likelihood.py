r"""Exact log-densities of images, class by class, by the probability flow in few evaluations.

In :math:`y = x / \alpha` and the noise level :math:`s = \sigma / \alpha` the flow of every
diffusion is :math:`dy/ds = \epsilon_\theta`. Much of that is predictable for images of pixel
spread :math:`\tau`, so `log_density` steps in what is left: with the angle
:math:`\tan\psi = s / \tau` and :math:`u = y / \sqrt{s^2 + \tau^2}`, of unit variance all the way,

.. math:: \frac{du}{d\psi} = f = \frac{\epsilon_\theta \sqrt{s^2 + \tau^2} - s u}{\tau}, \qquad
          \log p(x) = \log p_1(u_1) - d \log \sqrt{s_0^2 + \tau^2}
          + \int_{\psi_0}^{\psi_1} \nabla_u \!\cdot f \, d\psi .

For Gaussian images of that spread :math:`f` is zero; for :math:`\tau = 1` it is the network's
velocity. The path is at most :math:`\pi/2` long, and a third-order multistep rule with one
evaluation a step follows it where Runge-Kutta in :math:`t` takes hundreds.

The divergence is Hutchinson's estimate: :math:`\mathrm E[z^\top (\partial f / \partial u) z]`.

Source:
    Chen et al., *Neural Ordinary Differential Equations*, 2018 (the integral); Grathwohl et al.,
    *FFJORD*, 2019, section 3.1 (the estimate, one probe for a whole solve); Song et al. 2021,
    section 4.3. The angle generalises Salimans & Ho 2022, appendix D.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchdiffeq import odeint

from hallulib import UserError
from hallulib.score import ScoreModel
from hallulib.sde import SDE
from hallulib.shapes import Images, Labels, Times

SPREAD = 0.5  # standard deviation of the pixels of images in [-1, 1], roughly
GREY_STEP = 1 / 127.5  # distance of neighbouring grey levels in [-1, 1]
FIXED = ("adams", "euler", "midpoint", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
PerClass = Float[Tensor, "batch classes"]


@runtime_checkable
class ClassModel(Protocol):
    """What scores classes: a `ScoreModel`, or a `mixture.ClassMixture`, which is exact."""

    sde: SDE
    labels: tuple[str, ...]

    def __call__(self, x_t: Images, t: Times, y: Labels) -> Images:
        """The noise in ``x_t`` if it is of class ``y``."""


@dataclass(frozen=True)
class LogDensity:
    """Log-densities by one solve for every image and class.

    Attributes:
        samples: nats per image, one row per probe; the probes are the same for all images and
            classes, so differences between classes are paired.
        evaluations: network evaluations for each pair of image and class, each with one backward
            pass per probe; the most of any batch where an adaptive solver chose them.
        full: the trace was taken in full, so `samples` has one row and no error.
    """

    samples: Float[Tensor, "probes batch classes"]
    evaluations: int
    full: bool = False

    @property
    def value(self) -> PerClass:
        """Mean over the probes, in nats per image."""
        return self.samples.mean(0)

    @property
    def error(self) -> PerClass:
        """Standard error of `value`; 0 for a full trace, not a number for a single probe."""
        n = len(self.samples)
        alone = torch.full_like(self.value, 0.0 if self.full else math.nan)
        return self.samples.std(0) / n**0.5 if n > 1 else alone


class FlowState(NamedTuple):
    """Where the flow is: time, the image ``x_t``, and the divergence integrated so far."""

    t: float
    x_t: Images
    divergence: Float[Tensor, "probes batch"]


def dequantise(x: Images, seed: int = 0) -> Images:
    """Spread every grey level evenly over its step, which turns 8-bit images into a density.

    Without it a density can put all its mass on the 256 levels and grow without bound.

    Args:
        x: images in [-1, 1] on the grid of ``2 / 255``.
        seed: of the noise, which is the same for every image.

    Returns:
        Images in ``[-1 - 1/255, 1 + 1/255]``.

    Source: Theis et al. 2016, section 3.1. https://arxiv.org/abs/1511.01844
    """
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape[1:], generator=rng).to(x.device) - 0.5
    return x + GREY_STEP * noise


def bits_per_dim(log_density: Tensor, n_dims: int) -> Tensor:
    r"""Bits per pixel and channel of dequantised 8-bit images, from nats per image.

    .. math:: -\frac{\log p(x)}{d \ln 2} + \log_2 127.5

    The offset, 6.994 bits, is that of levels ``2 / 255`` apart; a uniform density over all levels
    costs exactly 8 bits. (Levels ``2 / 256`` apart, as in Song et al. 2021, have an offset of 7.)
    """
    return -log_density / (n_dims * math.log(2)) - math.log2(GREY_STEP)


def log_density(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    steps: int = 32,
    probes: int | str = 1,
    gaussian: bool = False,
    solver: str = "adams",
    tolerance: float = 1e-5,
    start_time: float | None = None,
    seed: int = 0,
    batch: int = 128,
) -> LogDensity:
    r"""Log-density of every image under every class, by the probability flow.

    Args:
        model: the class-conditional score model; never guided.
        x: images in [-1, 1]; 8-bit ones should go through `dequantise` first.
        classes: labels to score, in this order; all that the model knows by default.
        steps: of the solver, uniform in the cube root of the angle; the default costs 33
            evaluations. Errors fall with the third power.
        probes: random directions of the trace estimate, or ``"full"``: every direction, exact,
            for images of a few hundred pixels at most.
        gaussian: Gaussian probes; by default every entry is 1 or -1, whose variance is smaller.
        solver: ``"adams"``, or the name of a ``torchdiffeq`` method, such as ``"rk4"`` on the
            same grid or the adaptive ``"dopri5"``, the reference, which chooses its steps for a
            whole batch.
        tolerance: relative and absolute, of an adaptive method.
        start_time: where the flow starts; the answer is the density of images blurred with the
            noise of that time, ``sde.t_train`` unless given.
        seed: of the probes.
        batch: most pairs of image and class in the network at once, which bounds the memory.

    Raises:
        UserError: images the model does not suit, an unknown class or solver, no class at all, or
            a number out of range.

    Source:
        The module; probes: Hutchinson 1990; FFJORD, section 3.1.
    """
    y = classes_of(model, classes)
    x = check_images(model, x)
    if solver not in FIXED + ADAPTIVE:
        raise UserError(f"no solver {solver!r}; there are {', '.join(FIXED + ADAPTIVE)}")
    nodes = angles(model.sde, steps, start_time)
    z = directions(x, probes, gaussian, seed)
    images = torch.arange(len(x), device=x.device).repeat_interleave(len(y))
    labels, found, evaluations = y.to(x.device).repeat(len(x)), [], 0
    for rows in parts(len(images), batch, x.device):
        field = _Field(model, labels[rows], z)
        u = x[images[rows]] / math.hypot(_level(nodes[0]), SPREAD)
        if solver == "adams":
            *_, (_, u, divergence) = _adams(field, u, nodes)
        else:
            u, divergence = _by_torchdiffeq(field, u, nodes, solver, tolerance)
        found.append(_at_the_end(model.sde, u, divergence, nodes, exact=probes == "full"))
        evaluations = max(evaluations, field.evaluations)
    samples = torch.cat(found, 1).unflatten(1, (len(x), len(y)))
    return LogDensity(samples, evaluations, full=probes == "full")


def flow(
    model: ClassModel, x: Images, y: Labels, *, steps: int = 32, seed: int = 0
) -> Iterator[FlowState]:
    """The way of images into noise, each under a class of its own, state by state.

    Args:
        model: the class-conditional score model.
        x: images in [-1, 1].
        y: the class of each.
        steps: of the solver.
        seed: of the one probe.

    Raises:
        UserError: as `log_density`, or not one class of the model for each image.
    """
    nodes = angles(model.sde, steps)
    last = getattr(model, "null", len(model.labels) - 1)
    if len(y) != len(x) or not ((y >= 0) & (y <= last)).all():
        raise UserError(
            f"{len(x)} images with classes {y.tolist()} found; one class from 0 to {last} for "
            "each image is needed"
        )
    start = check_images(model, x) / math.hypot(_level(nodes[0]), SPREAD)
    for psi, u, divergence in _adams(_Field(model, y, directions(x, 1, seed=seed)), start, nodes):
        s = torch.tensor(_level(psi), dtype=torch.float64)
        t = model.sde.time_of(s)
        scale = float(model.sde.alpha_sigma(t)[0]) * math.hypot(_level(psi), SPREAD)
        yield FlowState(float(t), scale * u, divergence)


def angles(sde: SDE, steps: int, start_time: float | None = None) -> np.ndarray:
    r"""Rising angles :math:`\psi = \arctan(s / \tau)`, uniform in their cube root.

    Raises:
        UserError: no step, or a start time outside of (0, 1).
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; at least 1 is needed")
    first, last = np.arctan(noise_range(sde, start_time) / SPREAD) ** (1 / 3)
    return np.linspace(first, last, steps + 1) ** 3


def noise_range(sde: SDE, start_time: float | None = None) -> np.ndarray:
    """The noise levels at the start time, ``sde.t_train`` unless given, and at time 1.

    Raises:
        UserError: a start time outside of (0, 1).
    """
    start = sde.t_train if start_time is None else start_time
    if not 0 < start < 1:
        raise UserError(f"start_time is {start}; a time between 0 and 1 is needed")
    return sde.noise_level(torch.tensor([start, 1.0], dtype=torch.float64)).numpy()


def parts(n: int, batch: int, device: torch.device) -> tuple[Int[Tensor, " _part"], ...]:
    """The positions 0 to n - 1, at most ``batch`` at once.

    Raises:
        UserError: a batch of no row.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; at least 1 is needed")
    return torch.arange(n, device=device).split(batch)


def classes_of(model: ClassModel, classes: Sequence[str] | None) -> Labels:
    """Class indices to score.

    Raises:
        UserError: a model without classes, no class, or a label it was not trained with.
    """
    if not model.labels:
        raise UserError(
            "the score model was trained without labels; a likelihood per class needs a model "
            "with labels"
        )
    wanted = model.labels if classes is None else tuple(classes)
    unknown = [c for c in wanted if c not in model.labels]
    if unknown or not wanted:
        fault = f"does not know the label {unknown[0]!r}" if unknown else "was asked for no class"
        raise UserError(f"the score model {fault}; it knows {', '.join(model.labels)}")
    return torch.tensor([model.labels.index(c) for c in wanted])


def check_images(model: ClassModel, x: Images) -> Images:
    """The images, if the model can score them.

    Raises:
        UserError: a value that is not a number, and for a `ScoreModel` images outside of [-1, 1]
            (one grey step more is allowed, for `dequantise`) or of another shape than its own.
    """
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise UserError(f"image {bad} holds a value that is no finite number; all must be finite")
    if isinstance(model, ScoreModel):
        shape = getattr(model.network, "shape", x.shape[1:])
        if tuple(x.shape[1:]) != tuple(shape):
            raise UserError(
                f"images have (channels, height, width) {tuple(x.shape[1:])}; the score model "
                f"was trained on {tuple(shape)}"
            )
        if len(x) and x.abs().max() > 1 + GREY_STEP:
            raise UserError(
                f"images reach from {x.min():.4g} to {x.max():.4g}; values in [-1, 1] are needed"
            )
    return x


def directions(
    x: Images, probes: int | str, gaussian: bool = False, seed: int = 0
) -> Float[Tensor, "probes channels height width"]:
    """Directions in which the trace is probed, for images like these.

    Raises:
        UserError: not a number from 1 on, nor ``"full"``, which gives every unit direction.
    """
    shape = x.shape[1:]
    if probes == "full":
        return torch.eye(math.prod(shape), dtype=x.dtype, device=x.device).view(-1, *shape)
    if not isinstance(probes, int) or probes < 1:
        raise UserError(f"probes is {probes!r}; a number from 1 on, or 'full', is needed")
    rng = torch.Generator().manual_seed(seed)
    # one by one: more probes keep the first ones as they are
    draws = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(probes)]
    z = torch.stack(draws)
    return (z if gaussian else z.sign()).to(x)


class _Field:
    """The right-hand side: ``f`` and its divergence along each probe, counted."""

    def __init__(self, model: ClassModel, y: Labels, z: Float[Tensor, "probes channels h w"]):
        self.model, self.y, self.z, self.evaluations = model, y, z, 0

    def __call__(self, u: Images, psi: float) -> tuple[Images, Float[Tensor, "probes batch"]]:
        self.evaluations += 1
        s = _level(psi)
        t = self.model.sde.time_of(torch.tensor(s, dtype=torch.float64))
        alpha, scale = float(self.model.sde.alpha_sigma(t)[0]), math.hypot(s, SPREAD)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            eps = self.model(alpha * scale * u, u.new_full((len(u),), float(t)), self.y)
            f = (scale * eps - s * u) / SPREAD
            last = len(self.z) - 1
            along = [
                (z * torch.autograd.grad(f, u, z.expand_as(f), retain_graph=i < last)[0])
                for i, z in enumerate(self.z)
            ]
        return f.detach(), torch.stack([g.flatten(1).sum(1) for g in along])


def _level(psi: float) -> float:
    return SPREAD * math.tan(psi)


def _adams(field: Callable, u: Images, nodes: np.ndarray) -> Iterator[tuple]:
    """Predict by the last three slopes, evaluate, correct by the new one and the last two.

    Adams, Bashforth and Moulton's rules on uneven nodes; both are of third order but for the
    first steps, which have fewer slopes. Source: Hairer, Norsett & Wanner 1993, section III.5.
    """
    slopes = [(nodes[0], *field(u, nodes[0]))]
    integral = torch.zeros_like(slopes[0][2], dtype=torch.float64)
    yield nodes[0], u, integral
    for a, b in pairwise(nodes):
        predicted = u + _integrate(slopes, 1, a, b)
        slopes = [*slopes[-2:], (b, *field(predicted, b))]
        u = u + _integrate(slopes, 1, a, b)
        integral = integral + _integrate(slopes, 2, a, b).double()
        yield b, u, integral


def _integrate(slopes: list[tuple], part: int, a: float, b: float) -> Tensor:
    """Integral over [a, b] of the polynomial through the slopes: its weights are exact."""
    z = (np.array([node for node, *_ in slopes]) - a) / (b - a)
    powers = np.arange(len(z))
    weights = np.linalg.solve(z[None] ** powers[:, None], 1 / (powers + 1))
    return sum(float(w) * (b - a) * slope[part] for w, slope in zip(weights, slopes, strict=True))


def _by_torchdiffeq(field: _Field, u: Images, nodes: np.ndarray, solver: str, tolerance: float):
    """The same integral by a library; adaptive methods only use the first and last node."""

    def slope(psi, state):
        f, divergence = field(state[0].to(u), float(psi))
        return f.to(state[0]), divergence.to(state[1])

    start = (u, u.new_zeros(len(field.z), len(u)))
    grid = torch.tensor(nodes, dtype=torch.float64)
    if solver in ADAPTIVE:
        grid = grid[[0, -1]]
    with torch.no_grad():
        path = odeint(slope, start, grid, method=solver, rtol=tolerance, atol=tolerance)
    return path[0][-1], path[1][-1].double()


def _at_the_end(sde: SDE, u: Images, divergence: Tensor, nodes: np.ndarray, exact: bool):
    """Nats of the start from where the flow ended; ``exact`` adds the trace's directions up."""
    divergence = divergence.sum(0, keepdim=True) if exact else divergence
    alpha = float(sde.alpha_sigma(torch.ones((), dtype=torch.float64))[0])
    first, last = (math.hypot(_level(psi), SPREAD) for psi in (nodes[0], nodes[-1]))
    stretch = math.prod(u.shape[1:]) * math.log(alpha * last / first)
    return sde.prior_log_prob((alpha * last * u).double()) + stretch + divergence
