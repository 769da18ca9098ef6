r"""Classes compared by how well each one denoises: a bound of the likelihood, and fast decisions.

The log-density is at least what the denoising errors over all noise levels leave of it,

.. math:: \log p(x \mid c) \ge -\tfrac d2 \log(2\pi e\, s_0^2) - \frac{\|x\|^2}{2 s_1^2}
          - \int_{s_0}^{s_1} \mathrm E\,\lVert \epsilon - \epsilon_\theta(x + s\epsilon, s, c)
          \rVert^2 \, d\log s ,

and only the integral depends on the class. `bound` estimates all of it. `decide` compares classes
alone: all see the same noises at the same levels and with both signs, so what is hard about an
image and most of what the noise adds cancel in the differences; no backward pass is needed. Which
levels tell classes apart differs between data sets and with the number of labels:
`informative_levels` spends evaluations where classes differ most, and needs no labels; `leads` and
`best_band` ask images that were held out which of these differences are right.

Source: Kingma et al., *Variational Diffusion Models*, 2021, eqs. (14)-(17); shared noise and
dropping classes: Li et al., *Your Diffusion Model is Secretly a Zero-Shot Classifier*, 2023,
https://arxiv.org/abs/2303.16203.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from hallulib.diffusion.sde import SDE
from hallulib.likelihood.density import ClassModel, LogDensity, PerClass, in_type_of, noise_range
from hallulib.shapes import Images, Labels

GOLDEN = (math.sqrt(5) - 1) / 2
BANDS = 12  # of equal width in log s, in which classes are compared
Pairs = Float[Tensor, "batch classes pairs"]
Offsets = Float[Tensor, "_classes _pairs"]


@dataclass(frozen=True)
class Levels:
    """Where noise levels are drawn: a density of ``log s``, constant within bands of equal width.

    The bands divide ``log s`` from ``first`` to ``last``; ``shares``, their chances, sum to 1.
    """

    first: float
    last: float
    shares: tuple[float, ...] = (1.0,)

    @classmethod
    def even(cls, sde: SDE) -> "Levels":
        """All noise levels of a diffusion, evenly in ``log s``."""
        first, last = map(math.log, noise_range(sde))
        return cls(first, last)

    def draw(
        self, n: int, rng: torch.Generator, power: float | int = 0
    ) -> tuple[Float[Tensor, " {n}"], Float[Tensor, " {n}"]]:
        """Noise levels, and what each counts: the width of ``log s`` it stands for, weighted.

        Their quantiles are steps of the golden ratio, which fill the range evenly from the first
        few on; a random shift makes each of them random and their mean exact.
        """
        shift = torch.rand((), generator=rng, dtype=torch.float64)
        quantile = (shift + GOLDEN * torch.arange(n, dtype=torch.float64)) % 1
        shares = torch.tensor(self.shares, dtype=torch.float64)
        ends = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
        band = torch.bucketize(quantile, ends[1:-1], right=True)
        width = (self.last - self.first) / len(shares)
        s = (self.first + width * (band + (quantile - ends[band]) / shares[band])).exp()
        return s, s**power * width / shares[band]


@dataclass(frozen=True)
class Noises:
    r"""The noises that all images show to all classes.

    Attributes:
        pairs: of noise and level, at most.
        levels: where to look; `informative_levels` finds the best, all evenly unless given.
        power: errors are weighted by ``s ** power``; 0 is the likelihood, more favours the coarse.
        antithetic: every pair uses its noise with both signs, for two evaluations of each class;
            what is linear in it cancels in the mean (Hammersley & Morton 1956).
        seed: of the noises and the levels.
    """

    pairs: int = 24
    levels: Levels | None = None
    power: float | int = 0.5
    antithetic: bool = True
    seed: int = 0


class Errors:
    """Weighted squared errors of the noise, pair by pair, the same pairs for all classes."""

    def __init__(
        self,
        model: ClassModel,
        x: Images,
        noises: Noises,
        batch: int,
        classes: Sequence[str] | None = None,
    ):
        self.model, self.x, self.batch = model, in_type_of(model, x), batch
        self.y = model.index(model.labels if classes is None else classes).to(x.device)
        self.levels = noises.levels or Levels.even(model.sde)
        self.rng = torch.Generator().manual_seed(noises.seed)
        self.s, weight = self.levels.draw(noises.pairs, self.rng, noises.power)
        self.weight, self.signs = weight.tolist(), (1, -1) if noises.antithetic else (1,)

    @torch.no_grad()
    def __call__(self, r: int, wanted: Bool[Tensor, "batch classes"] | None = None) -> PerClass:
        """One number per image and class, not a number where it was not wanted; call in order."""
        if wanted is None:
            wanted = torch.ones((len(self.x), len(self.y)), dtype=torch.bool, device=self.x.device)
        noise = torch.randn(self.x.shape[1:], generator=self.rng, dtype=torch.float64).to(self.x)
        t = self.model.sde.time_of(self.s[r])
        alpha = float(self.model.sde.alpha_sigma(t)[0])
        total = torch.where(wanted, 0.0, math.nan).double()
        for part in wanted.nonzero().split(self.batch):
            image, column = part.unbind(1)
            times = self.x.new_full((len(part),), float(t))
            for eps in (sign * noise for sign in self.signs):
                x_t = alpha * (self.x[image] + float(self.s[r]) * eps)
                off = self.model(x_t, times, self.y[column]) - eps
                total[image, column] += off.double().square().flatten(1).sum(1)
        return self.weight[r] * total / len(self.signs)


def bound(
    model: ClassModel,
    x: Images,
    classes: Sequence[str] | None = None,
    *,
    pairs: int = 128,
    seed: int = 0,
    batch: int = 128,
) -> LogDensity:
    r"""Lower bound of the log-density of every image under every class, in nats.

    Each pair of noise and level is one sample; its level is not independent, so the error is less
    than stated. Other arguments are those of :func:`hallulib.likelihood.density.log_density`.
    """
    noises = Noises(pairs, power=0, antithetic=False, seed=seed)
    errors = Errors(model, x, noises, batch, classes)
    cost = torch.stack([errors(r) for r in range(pairs)], 2)
    d, s_1 = math.prod(x.shape[1:]), math.exp(errors.levels.last)
    blurred = 0.5 * d * (math.log(2 * math.pi * math.e) + 2 * errors.levels.first)
    prior = errors.x.double().square().flatten(1).sum(1) / (2 * s_1**2)
    return LogDensity(-cost - blurred - prior[:, None, None], evaluations=pairs)


@dataclass(frozen=True)
class Decision:
    """What `decide` found.

    ``log_ratio`` is the log-likelihood of each class against the winner's, in nats where ``power``
    is 0; of a class that was dropped, as it stood then. The network ``evaluations`` of an image
    are over all classes. It is ``sure`` if one class is left; if not, it used up its pairs.
    """

    log_ratio: PerClass
    evaluations: Int[Tensor, " batch"]
    sure: Bool[Tensor, " batch"]


def decide(
    model: ClassModel,
    x: Images,
    noises: Noises,
    *,
    first: int = 4,
    confidence: float | int = 0.99,
    offsets: Offsets | None = None,
    batch: int = 128,
) -> Decision:
    r"""The class that denoises each image best, with as few evaluations as its decision takes.

    Pair by pair, each class still in the race denoises the same noisy image. It leaves when its
    weighted error exceeds that of the class in front by more than the one-sided Student limit of
    their paired difference.

    Args:
        model: never guided.
        x: images in [-1, 1].
        noises: all of which a doubtful decision uses.
        first: pairs before the first class may be dropped; a single pair drops none.
        confidence: of each comparison that drops a class, 0.5 to 1; with 1 none is dropped.
        offsets: subtracted from the errors, see `common_errors`.
        batch: most pairs of image and class in the network at once, which bounds the memory.
    """
    errors, k, pairs = Errors(model, x, noises, batch), len(model.labels), noises.pairs
    cost = torch.full((len(x), k, pairs), math.nan, dtype=torch.float64, device=x.device)
    racing = torch.ones((len(x), k), dtype=torch.bool, device=x.device)
    behind = cost.new_zeros((len(x), k))
    for r in range(pairs):
        cost[..., r] = errors(r, racing)
        if offsets is not None:
            cost[..., r] -= offsets[:, r].to(cost)
        if r + 1 >= min(first, pairs):
            # a class that was dropped keeps what it was dropped for
            now, error = _behind(cost[..., : r + 1])
            behind = torch.where(racing, now, behind)
            racing &= ~(now > float(stats.t.ppf(confidence, max(r, 1))) * error)
        racing &= racing.sum(1, keepdim=True) > 1
        if not racing.any():
            break
    evaluations = len(errors.signs) * cost.isfinite().sum((1, 2))
    return Decision(-behind, evaluations, ~racing.any(1))


def _behind(cost: Pairs) -> tuple[PerClass, PerClass]:
    """How far each class is behind the best of those that saw every pair, and its error."""
    n = cost.shape[2]
    front = cost.mean(2).nan_to_num(math.inf).argmin(1)
    gap = cost - cost.gather(1, front[:, None, None].expand(-1, 1, n))
    # the error of a single pair is not known
    spread = gap.std(2) if n > 1 else torch.full_like(gap[..., 0], math.inf)
    return gap.mean(2), spread / n**0.5


def common_errors(model: ClassModel, x: Images, noises: Noises, batch: int = 128) -> Offsets:
    """By how much each class is worse than the others on all images together, pair by pair.

    They are for ``offsets`` of a `decide` with the same noises: what a noise does to a class,
    whatever the image, is measured here on other images. Classes should be about equally frequent;
    no label is needed.
    """
    errors = Errors(model, x, noises, batch)
    mean = torch.stack([errors(r).mean(0) for r in range(noises.pairs)], 1)
    return mean - mean.mean(0)


def informative_levels(
    model: ClassModel,
    x: Images,
    *,
    per_band: int = 2,
    power: float | int = 0.5,
    seed: int = 0,
    batch: int = 128,
) -> Levels:
    r"""Noise levels in proportion to how much classes differ there, from a few images.

    A mean over levels drawn with density :math:`q` has the least variance where :math:`q` follows
    the root mean square of what is averaged, the weighted difference between two classes. A tenth
    of the draws stays even. Images that the model was trained on will do. Each of the `BANDS`
    costs ``per_band`` pairs, of two evaluations per class.
    """
    errors = Errors(model, x, Noises(BANDS * per_band, power=power, seed=seed), batch)
    # what all images have in common tells nothing about any of them
    shares = _by_band(errors, lambda error: (error - error.mean(0)).var(1).mean()).sqrt()
    shares = 0.9 * shares / shares.sum().clamp(min=1e-300) + 0.1 / BANDS  # all 0: same classes
    return replace(errors.levels, shares=tuple((shares / shares.sum()).tolist()))


def _by_band(errors: Errors, statistic: Callable[[PerClass], Tensor]) -> Float[Tensor, "*_ bands"]:
    """Mean of a statistic over the pairs in each band."""
    first, last = errors.levels.first, errors.levels.last
    bands = ((errors.s.log() - first) / (last - first) * BANDS).long().clamp(0, BANDS - 1)
    values = torch.stack([statistic(errors(r)) for r in range(len(bands))], -1).cpu()
    total = values.new_zeros((*values.shape[:-1], BANDS)).index_add(-1, bands, values)
    return total / bands.bincount(minlength=BANDS).clamp(min=1)


def leads(
    model: ClassModel, x: Images, y: Labels, *, seed: int = 0, batch: int = 128
) -> Float[Tensor, "batch bands"]:
    r"""How much better the true class denoises each image than the others, band by band.

    .. math:: \ell_{ib} = \frac1{k-1} \sum_{c \ne y_i} (e_{icb} - \bar e_{cb})
              - (e_{i y_i b} - \bar e_{y_i b})

    with the mean squared errors :math:`e` of the noise in a band and their means over the images.
    The model, of two classes or more, must not have been trained on the images; their classes
    should be about equally frequent.
    """
    errors = Errors(model, x, Noises(2 * BANDS, power=0, seed=seed), batch)
    error = _by_band(errors, lambda error: error)
    error = error - error.mean(0)
    own = error.gather(1, y.cpu()[:, None, None].expand(-1, 1, BANDS))[:, 0]
    return (error.sum(1) - own) / (len(model.labels) - 1) - own


def best_band(sde: SDE, lead: Float[Tensor, "images bands"]) -> Levels:
    r"""The band of noise levels in which held-out images tell the true class most surely.

    .. math:: \arg\max_b \; \mathrm{mean}_i\, \ell_{ib} / \mathrm{sd}_i\, \ell_{ib}

    What a network learnt from few labels in other bands it has learnt by heart. At least two
    images are needed; where the true class leads in no band, the finest is taken.
    """
    surety = lead.mean(0).clamp(min=0) / lead.std(0).clamp(min=1e-12)
    even, best = Levels.even(sde), int(surety.argmax())
    width = (even.last - even.first) / lead.shape[1]
    return Levels(even.first + best * width, even.first + (best + 1) * width)
