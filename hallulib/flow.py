r"""The probability flow of images under a class, in the coordinates where it is nearly straight.

In :math:`y = x / \alpha` and the noise level :math:`s = \sigma / \alpha` the flow of every
diffusion is :math:`dy/ds = \epsilon_\theta`. Much of that is predictable for images of pixel
spread :math:`\tau`, so steps are taken in what is left: with the angle
:math:`\tan\psi = s / \tau` and :math:`u = y / \sqrt{s^2 + \tau^2}`, of unit variance all the way,

.. math:: \frac{du}{d\psi} = f = \frac{\epsilon_\theta \sqrt{s^2 + \tau^2} - s u}{\tau}.

For Gaussian images of that spread :math:`f` is zero; for :math:`\tau = 1` it is the network's
velocity. The path is at most :math:`\pi/2` long, and a third-order multistep rule with one
evaluation a step follows it where Runge-Kutta in :math:`t` takes hundreds. On the way the
divergence of :math:`f` is integrated by Hutchinson's estimate,
:math:`\nabla \!\cdot f = \mathrm E[z^\top (\partial f / \partial u) z]`.

Source:
    Song et al. 2021, section 4.3; Chen et al., *Neural Ordinary Differential Equations*, 2018;
    Grathwohl et al., *FFJORD*, 2019, section 3.1 (the estimate, one probe for a whole solve). The
    angle generalises Salimans & Ho 2022, appendix D.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint

from hallulib import UserError
from hallulib.classmodel import ClassModel, check_images
from hallulib.sde import SDE
from hallulib.shapes import Images, Labels

SPREAD = 0.5  # standard deviation of the pixels of images in [-1, 1], roughly
FIXED = ("adams", "euler", "midpoint", "heun2", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
Divergence = Float[Tensor, "probes batch"]


class FlowState(NamedTuple):
    """Where the flow is: time, the image ``x_t``, and the divergence integrated so far."""

    t: float
    x_t: Images
    divergence: Divergence


class Solved(NamedTuple):
    """Where a whole solve ended: ``u``, the divergence integrated, and what it took."""

    u: Images
    divergence: Divergence
    evaluations: int


def solve(
    model: ClassModel,
    x: Images,
    y: Labels,
    nodes: np.ndarray,
    z: Float[Tensor, "probes channels height width"],
    solver: str = "adams",
    tolerance: float = 1e-5,
) -> Solved:
    """Follow images from the first node to the last, each under a class of its own.

    Args:
        model: the class-conditional score model.
        x: images.
        y: the class of each.
        nodes: rising angles, see `angles`.
        z: probes, see `directions`.
        solver: ``"adams"`` or the name of a ``torchdiffeq`` method.
        tolerance: relative and absolute, of an adaptive method.
    """
    field, u = _Field(model, y, z), x / _scale(nodes[0])
    if solver == "adams":
        *_, (_, u, divergence) = _adams(field, u, nodes)
    else:
        u, divergence = _by_torchdiffeq(field, u, nodes, solver, tolerance)
    return Solved(u, divergence, field.evaluations)


def walk(
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
        UserError: no step, or not one class of the model for each image.
    """
    nodes = angles(model.sde, steps)
    last = getattr(model, "null", len(model.labels) - 1)
    if len(y) != len(x) or not ((y >= 0) & (y <= last)).all():
        raise UserError(
            f"{len(x)} images with classes {y.tolist()} found; one class from 0 to {last} for "
            "each image is needed"
        )
    start = check_images(model, x) / _scale(nodes[0])
    for psi, u, divergence in _adams(_Field(model, y, directions(x, 1, seed=seed)), start, nodes):
        s = torch.tensor(_level(psi), dtype=torch.float64)
        t = model.sde.time_of(s)
        scale = float(model.sde.alpha_sigma(t)[0]) * _scale(psi)
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

    def __call__(self, u: Images, psi: float) -> tuple[Images, Divergence]:
        self.evaluations += 1
        s = _level(psi)
        t = self.model.sde.time_of(torch.tensor(s, dtype=torch.float64))
        alpha, scale = float(self.model.sde.alpha_sigma(t)[0]), _scale(psi)
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


def _scale(psi: float) -> float:
    return math.hypot(_level(psi), SPREAD)


def _adams(field: Callable, u: Images, nodes: np.ndarray) -> Iterator[tuple]:
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


def _integrate(slopes: list[tuple], a: float, b: float) -> tuple[Tensor, Tensor]:
    """Integrals over [a, b] of the polynomial through the slopes: its weights are exact."""
    z = (np.array([node for node, *_ in slopes]) - a) / (b - a)
    powers = np.arange(len(z))
    weights = np.linalg.solve(z[None] ** powers[:, None], 1 / (powers + 1))
    shares = [float(w) * (b - a) for w in weights]
    return tuple(
        sum(w * slope[part] for w, slope in zip(shares, slopes, strict=True)) for part in (1, 2)
    )


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


def log_stretch(sde: SDE, nodes: np.ndarray) -> tuple[float, float]:
    """What turns ``u`` at the end into ``x_1``, and the log of how much that stretches a pixel."""
    alpha = float(sde.alpha_sigma(torch.ones((), dtype=torch.float64))[0])
    return alpha * _scale(nodes[-1]), math.log(alpha * _scale(nodes[-1]) / _scale(nodes[0]))
