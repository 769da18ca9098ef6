r"""Classes compared by how well each one denoises: a bound of the likelihood, and fast decisions.

The log-density is at least what the denoising errors over all noise levels leave of it,

.. math:: \log p(x \mid c) \ge -\tfrac d2 \log(2\pi e\, s_0^2) - \frac{\|x\|^2}{2 s_1^2}
          - \int_{s_0}^{s_1} \mathrm E\,\lVert \epsilon - \epsilon_\theta(x + s\epsilon, s, c)
          \rVert^2 \, d\log s ,

and only the integral depends on the class. `bound` estimates all of it. `decide` compares classes
alone: every class sees the same noise at the same levels, so that what is hard about an image
cancels in the differences, and sees it with both signs, so that what the noise adds to them mostly
cancels too; a class that is surely behind is dropped, and an image with one class left is done. No
pass backwards through the network is needed.

Source:
    Kingma et al., *Variational Diffusion Models*, 2021, eqs. (14)-(17); shared noise and dropping
    classes: Li et al., *Your Diffusion Model is Secretly a Zero-Shot Classifier*, 2023,
    https://arxiv.org/abs/2303.16203.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from hallulib import UserError
from hallulib.classmodel import ClassModel, PerClass, check_images, classes_of
from hallulib.levels import Errors, Levels
from hallulib.shapes import Images, Labels

Pairs = Float[Tensor, "batch classes pairs"]
Offsets = Float[Tensor, "_classes _pairs"]


@dataclass(frozen=True)
class Bound:
    """Lower bounds of log-densities, with all that they are the mean of.

    Attributes:
        samples: nats per image, one for each pair of noise and level; the pairs are the same for
            all images and classes.
    """

    samples: Pairs

    @property
    def value(self) -> PerClass:
        """Mean over the pairs, in nats per image."""
        return self.samples.mean(2)

    @property
    def error(self) -> PerClass:
        """Standard error of `value`, as of independent draws; the even levels make it less."""
        return self.samples.std(2) / self.samples.shape[2] ** 0.5


@dataclass(frozen=True)
class Decision:
    """What `decide` found.

    Attributes:
        log_ratio: log-likelihood of each class against the winner's, in nats (of the weighted
            integral where ``power`` is not 0); 0 for the winner; for a class that was dropped,
            against the class in front at that time, as it stood then.
        error: standard error of ``log_ratio``.
        evaluations: network evaluations that each image took, over all classes.
        sure: images with one class left; the others used up their pairs.
    """

    log_ratio: PerClass
    error: PerClass
    evaluations: Int[Tensor, " batch"]
    sure: Bool[Tensor, " batch"]

    @property
    def winner(self) -> Labels:
        """Position of the winning class."""
        return self.log_ratio.argmax(1)


def bound(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    pairs: int = 128,
    start_time: float | None = None,
    seed: int = 0,
    batch: int = 128,
) -> Bound:
    r"""Lower bound of the log-density of every image under every class, in nats.

    Args:
        model: the class-conditional score model; never guided.
        x: images in [-1, 1]; 8-bit ones should go through `dequantise` first.
        classes: labels to score, in this order; all that the model knows by default.
        pairs: network evaluations for each image and class.
        start_time: the least noise, ``sde.t_train`` unless given; below it an image is taken for
            a normal one.
        seed: of the noise and the levels.
        batch: most pairs of image and class in the network at once, which bounds the memory.

    Raises:
        UserError: as :func:`hallulib.likelihood.log_density`, or fewer than two pairs.
    """
    y, x = classes_of(model, classes), check_images(model, x)
    if pairs < 2:
        raise UserError(f"pairs is {pairs}; at least 2 are needed")
    levels = Levels.even(model.sde, start_time)
    everything = torch.ones((len(x), len(y)), dtype=torch.bool, device=x.device)
    integrand = Errors(model, x, y, levels, pairs, seed, batch)
    cost = torch.stack([integrand(r, everything) for r in range(pairs)], 2)
    d, s_1 = math.prod(x.shape[1:]), math.exp(levels.last)
    blurred = 0.5 * d * (math.log(2 * math.pi * math.e) + 2 * levels.first)
    prior = x.double().square().flatten(1).sum(1) / (2 * s_1**2)
    return Bound(-cost - blurred - prior[:, None, None])


def decide(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    pairs: int = 24,
    first: int = 4,
    confidence: float | int = 0.99,
    antithetic: bool = True,
    levels: Levels | None = None,
    power: float | int = 0.5,
    offsets: Offsets | None = None,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Decision:
    r"""The class that denoises each image best, with as few evaluations as its decision takes.

    Pair by pair, each class that is still in the race denoises the same noisy image. A class
    leaves when its weighted error exceeds that of the class in front by more than the one-sided
    Student limit of their paired difference.

    Args:
        model: the class-conditional score model; never guided.
        x: images in [-1, 1].
        classes: labels to compare, in this order; all that the model knows by default.
        pairs: most pairs of noise and level, an image with a doubtful decision uses all.
        first: pairs before the first class may be dropped; a single pair drops none, since its
            error is not known.
        confidence: of each comparison that drops a class, 0.5 to 1; with 1 none is dropped.
        antithetic: every pair uses its noise with both signs and takes two evaluations for each
            class, which pays where the noise, not the level, is what differences vary with.
        levels: where to look; `informative_levels` finds the best, all evenly unless given.
        power: errors are weighted by ``s ** power``; 0 is the likelihood, which counts the
            finest grain as much as the whole, larger numbers look more at the coarse. Levels
            with weights of their own do without.
        offsets: subtracted from the errors, see `common_errors`.
        seed: of the noise and the levels.
        batch: most pairs of image and class in the network at once, which bounds the memory.
        progress: called with the number of pairs done.

    Raises:
        UserError: as :func:`hallulib.likelihood.log_density`, or numbers out of range.
    """
    y, x = classes_of(model, classes), check_images(model, x)
    if not (1 <= first <= pairs and 0.5 <= confidence <= 1):
        raise UserError(
            f"first {first}, pairs {pairs}, confidence {confidence} found; 1 <= first <= pairs "
            "and a confidence from 0.5 to 1 are needed"
        )
    if offsets is not None and offsets.shape != (len(y), pairs):
        raise UserError(
            f"offsets are {tuple(offsets.shape)}; one for each class and pair, {(len(y), pairs)}, "
            "is needed, measured with the same pairs"
        )
    levels = levels or Levels.even(model.sde)
    errors = Errors(model, x, y, levels, pairs, seed, batch, power, antithetic)
    cost = torch.full((len(x), len(y), pairs), math.nan, dtype=torch.float64, device=x.device)
    racing = torch.ones((len(x), len(y)), dtype=torch.bool, device=x.device)
    mean, error = cost.new_zeros((2, len(x), len(y)))
    for r in range(pairs):
        cost[..., r] = errors(r, racing)
        if offsets is not None:
            cost[..., r] -= offsets[:, r].to(cost)
        if r + 1 >= first:
            # a class that was dropped keeps what it was dropped for
            now, spread = _behind(cost[..., : r + 1])
            mean, error = torch.where(racing, now, mean), torch.where(racing, spread, error)
            racing &= ~(mean > float(stats.t.ppf(confidence, max(r, 1))) * error)
        if progress:
            progress(r + 1)
        racing &= racing.sum(1, keepdim=True) > 1
        if not racing.any():
            break
    evaluations = len(errors.signs) * cost.isfinite().sum((1, 2))
    return Decision(-mean, error, evaluations, ~racing.any(1))


def common_errors(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    pairs: int = 24,
    antithetic: bool = True,
    levels: Levels | None = None,
    power: float | int = 0.5,
    seed: int = 0,
    batch: int = 128,
) -> Offsets:
    """By how much each class is worse than the others on all images together, pair by pair.

    `decide` draws the same noises for all images, so what a noise does to a class as such, and
    what a class is ahead by whatever the image, can be measured on other images and subtracted.

    Args:
        model: as for `decide`, and so for all that follow.
        x: images of all classes, about equally frequent; no label is asked for.
        classes: labels to compare.
        pairs: of noise and level.
        antithetic: use each noise with both signs.
        levels: where to look.
        power: of the noise level that weights errors.
        seed: of the noise and the levels.
        batch: most pairs of image and class in the network at once.

    Returns:
        The mean of their errors, less its mean over the classes; for ``offsets`` of `decide`.

    Raises:
        UserError: as `decide`, or no image.
    """
    y, x = classes_of(model, classes), check_images(model, x)
    if len(x) < 1:
        raise UserError("0 images found; at least 1 is needed to see what all have in common")
    levels = levels or Levels.even(model.sde)
    errors = Errors(model, x, y, levels, pairs, seed, batch, power, antithetic)
    everything = torch.ones((len(x), len(y)), dtype=torch.bool, device=x.device)
    found = torch.stack([errors(r, everything).mean(0) for r in range(pairs)], 1)
    return found - found.mean(0)


def _behind(cost: Pairs) -> tuple[PerClass, PerClass]:
    """How far each class is behind the one in front, and the standard error of that.

    In front is the class with the least cost among those that saw every pair. The error of a
    single pair is not known and counts as infinite.
    """
    n = cost.shape[2]
    front = cost.mean(2).nan_to_num(math.inf).argmin(1)
    gap = cost - cost.gather(1, front[:, None, None].expand(-1, 1, n))
    spread = gap.std(2) if n > 1 else torch.full_like(gap[..., 0], math.inf)
    return gap.mean(2), spread / n**0.5
