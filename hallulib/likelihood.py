r"""Exact log-densities of images, class by class, in few evaluations.

Along the flow of :mod:`hallulib.flow` a density changes by the divergence alone,

.. math:: \log p(x) = \log p_1(u_1) - d \log \sqrt{s_0^2 + \tau^2}
          + \int_{\psi_0}^{\psi_1} \nabla_u \!\cdot f \, d\psi ,

from the density :math:`p_1` of pure noise to that of images, blurred by the least noise
:math:`s_0`.

Source:
    Chen et al., *Neural Ordinary Differential Equations*, 2018, theorem 1; Song et al. 2021,
    section 4.3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib import UserError
from hallulib.classmodel import GREY_STEP, ClassModel, PerClass, check_images, classes_of, parts
from hallulib.flow import ADAPTIVE, FIXED, angles, directions, log_stretch, solve
from hallulib.shapes import Images


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
    labels = y.to(x.device).repeat(len(x))
    to_end, stretch = log_stretch(model.sde, nodes)
    found, evaluations = [], 0
    for rows in parts(len(images), batch, x.device):
        u, divergence, n = solve(model, x[images[rows]], labels[rows], nodes, z, solver, tolerance)
        if probes == "full":  # one direction each: their sum is the trace
            divergence = divergence.sum(0, keepdim=True)
        prior = model.sde.prior_log_prob((to_end * u).double())
        found.append(prior + math.prod(x.shape[1:]) * stretch + divergence)
        evaluations = max(evaluations, n)
    samples = torch.cat(found, 1).unflatten(1, (len(x), len(y)))
    return LogDensity(samples, evaluations, full=probes == "full")
