r"""Noise levels at which classes are compared: where to look, and what to make of what is seen.

At each level every class denoises the same noisy image; `Errors` measures how badly. Which levels
tell classes apart differs between data sets and with the number of labels: `informative_levels`
needs no labels and spends evaluations where classes differ most; `leads` and `weighed_levels` ask
images that were held out which of these differences are right.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hallulib import UserError
from hallulib.classmodel import ClassModel, PerClass, check_images, classes_of, parts
from hallulib.flow import noise_range
from hallulib.sde import SDE
from hallulib.shapes import Images, Labels

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Levels:
    """Where noise levels are drawn: a density of ``log s``, constant within bands of equal width.

    Attributes:
        first, last: ends of ``log s``.
        shares: chance of each band; they sum to 1.
        weights: what errors within each band count; ``None`` leaves it to a ``power``.
    """

    first: float
    last: float
    shares: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] | None = None

    @classmethod
    def even(cls, sde: SDE, start_time: float | None = None) -> "Levels":
        """All noise levels of a diffusion from ``start_time`` on, evenly in ``log s``."""
        return cls(*map(math.log, noise_range(sde, start_time)))

    def peak(self) -> "Levels":
        """The band with the largest share alone: where a single pair says most."""
        best = self.shares.index(max(self.shares))
        width = (self.last - self.first) / len(self.shares)
        return Levels(self.first + best * width, self.first + (best + 1) * width)

    def draw(
        self, n: int, rng: torch.Generator, power: float | int = 0
    ) -> tuple[Float[Tensor, " {n}"], Float[Tensor, " {n}"]]:
        """Noise levels, and what each counts: the width of ``log s`` it stands for, weighted.

        They fill the range evenly from the first few on: their quantiles are steps of the golden
        ratio, shifted by a random number, which makes each of them random and their mean exact.
        """
        shift = torch.rand((), generator=rng, dtype=torch.float64)
        quantile = (shift + GOLDEN * torch.arange(n, dtype=torch.float64)) % 1
        shares = torch.tensor(self.shares, dtype=torch.float64)
        ends = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
        band = torch.bucketize(quantile, ends[1:-1], right=True)
        width = (self.last - self.first) / len(shares)
        s = (self.first + width * (band + (quantile - ends[band]) / shares[band])).exp()
        weight = s**power if self.weights is None else torch.tensor(self.weights)[band].double()
        return s, weight * width / shares[band]


class Errors:
    r"""Weighted squared errors of the noise at pair ``r``, the same pairs for all classes.

    With ``antithetic`` each is the mean over :math:`\epsilon` and :math:`-\epsilon`: whatever part
    of the difference between classes is linear in the noise cancels, which is most of its
    variance.

    Args:
        model: the class-conditional score model.
        x: images.
        y: class indices to compare.
        levels: where noise levels are drawn.
        pairs: of noise and level.
        seed: of both.
        batch: most pairs of image and class in the network at once.
        power: weight ``s ** power`` where the levels have no weights of their own.
        antithetic: use each noise with both signs, two evaluations a pair.

    Source: antithetic variates, Hammersley & Morton 1956.
    """

    def __init__(
        self,
        model: ClassModel,
        x: Images,
        y: Int[Tensor, " _classes"],
        levels: Levels,
        pairs: int,
        seed: int,
        batch: int,
        power: float | int = 0,
        antithetic: bool = False,
    ):
        if pairs < 1:
            raise UserError(f"pairs is {pairs}; at least 1 is needed")
        self.model, self.x, self.y, self.batch = model, x, y.to(x.device), batch
        self.rng = torch.Generator().manual_seed(seed)
        self.s, weight = levels.draw(pairs, self.rng, power)
        self.weight, self.signs = weight.tolist(), (1, -1) if antithetic else (1,)

    def __call__(self, r: int, wanted: Bool[Tensor, "batch classes"]) -> PerClass:
        """One number per image and class, not a number where it was not wanted."""
        noise = torch.randn(self.x.shape[1:], generator=self.rng, dtype=torch.float64).to(self.x)
        found = sum(self._squared(r, sign * noise, wanted) for sign in self.signs)
        return self.weight[r] * found / len(self.signs)

    @torch.no_grad()
    def _squared(self, r: int, noise: Tensor, wanted: Bool[Tensor, "batch classes"]) -> PerClass:
        t = self.model.sde.time_of(self.s[r])
        alpha = float(self.model.sde.alpha_sigma(t)[0])
        image, column = wanted.nonzero(as_tuple=True)
        found = torch.full(wanted.shape, math.nan, dtype=torch.float64, device=self.x.device)
        for part in parts(len(image), self.batch, self.x.device):
            x_t = alpha * (self.x[image[part]] + float(self.s[r]) * noise)
            times = x_t.new_full((len(part),), float(t))
            off = self.model(x_t, times, self.y[column[part]]) - noise
            found[image[part], column[part]] = off.double().square().flatten(1).sum(1)
        return found


def informative_levels(
    model: ClassModel,
    x: Images,
    *,
    bands: int = 12,
    per_band: int = 2,
    power: float | int = 0.5,
    seed: int = 0,
    batch: int = 128,
) -> Levels:
    r"""Noise levels in proportion to how much classes differ there, from a few images.

    A mean over levels drawn with density :math:`q` has the least variance where :math:`q` follows
    the root mean square of what is averaged: the weighted difference between two classes. A tenth
    of the draws stays even, so that no level is ever left out.

    Args:
        model: the class-conditional score model.
        x: images it was trained on will do; their labels are not used.
        bands: of equal width in ``log s``.
        per_band: pairs measured in each, of two evaluations.
        power: as in `decide`.
        seed: of the noise.
        batch: as in `decide`.

    Raises:
        UserError: as `decide`, no image, no band, or a model of a single class.
    """
    even = Levels.even(model.sde)
    square, counts = torch.zeros((2, max(bands, 1)), dtype=torch.float64)
    for band, error in _by_band(model, x, bands, bands * per_band, seed, batch, power):
        # what all images have in common tells nothing about any of them
        square[band] += (error - error.mean(0)).var(1).mean().cpu()
        counts[band] += 1
    shares = (square / counts.clamp(min=1)).sqrt()
    shares = 0.9 * shares / shares.sum().clamp(min=1e-300) + 0.1 / bands  # all 0: same classes
    return Levels(even.first, even.last, tuple((shares / shares.sum()).tolist()))


def _by_band(
    model: ClassModel, x: Images, bands: int, n: int, seed: int, batch: int, power: float | int = 0
) -> Iterator[tuple[int, PerClass]]:
    """Errors of every class at n pairs that fall evenly into bands; each with its band."""
    y, x = classes_of(model, None), check_images(model, x)
    if len(y) < 2 or len(x) < 1 or bands < 1:
        raise UserError(
            f"{len(y)} classes, {len(x)} images, {bands} bands found; at least 2 classes, an "
            "image and a band are needed"
        )
    even = Levels.even(model.sde)
    errors = Errors(model, x, y, even, n, seed, batch, power, antithetic=True)
    everything = torch.ones((len(x), len(y)), dtype=torch.bool, device=x.device)
    bands_of = ((errors.s.log() - even.first) / (even.last - even.first) * bands).long()
    for r, band in enumerate(bands_of.clamp(0, bands - 1).tolist()):
        yield band, errors(r, everything)


def leads(
    model: ClassModel,
    x: Images,
    y: Labels,
    *,
    bands: int = 12,
    per_band: int = 2,
    seed: int = 0,
    batch: int = 128,
) -> Float[Tensor, "batch bands"]:
    r"""How much better the true class denoises each image than the others, band by band.

    .. math:: \ell_{ib} = \frac1{k-1} \sum_{c \ne y_i} (e_{icb} - \bar e_{cb})
              - (e_{i y_i b} - \bar e_{y_i b})

    with the mean squared errors :math:`e` of the noise in a band and their means over the images,
    so that a class that is denoised better on the whole is not taken for the right one.

    Args:
        model: the class-conditional score model.
        x: images it was not trained on.
        y: their classes, as indices of ``model.labels``; about equally frequent.
        bands: of equal width in ``log s``.
        per_band: pairs measured in each, of two evaluations.
        seed: of the noise.
        batch: as in `decide`.

    Raises:
        UserError: as `decide`.
    """
    shape = (len(x), len(model.labels), bands)
    total, counts = torch.zeros(shape, dtype=torch.float64, device=x.device), [0] * bands
    for band, error in _by_band(model, x, bands, bands * per_band, seed, batch):
        total[..., band] += error
        counts[band] += 1
    total = total / total.new_tensor(counts).clamp(min=1)
    total = total - total.mean(0)
    own = total.gather(1, y.to(x.device)[:, None, None].expand(-1, 1, bands))[:, 0]
    return (total.sum(1) - own) / (len(model.labels) - 1) - own


def weighed_levels(sde: SDE, lead: Float[Tensor, "images bands"]) -> Levels:
    r"""Noise levels that count by what they have shown to tell about the class.

    .. math:: w_b \propto \frac{\max(0,\, \bar\ell_b - 2\,\mathrm{sd}\,\ell_b / \sqrt n)}
              {\mathrm{var}\,\ell_b} ,

    the weights of a linear discriminant whose bands are independent, for as much of each mean
    lead over the n images held out as exceeds twice its standard error: a band whose leads may
    be chance counts nothing. With few labels that is most of them, and which ones are left depends
    on the data: layout shows at coarse levels, texture at fine.
    Draws go where weighted errors vary most, a tenth of them everywhere.

    Args:
        sde: of the model.
        lead: of `leads`, of two images at least.

    Raises:
        UserError: fewer than two images.

    Source: Fisher 1936, doi 10.1111/j.1469-1809.1936.tb02137.x, without covariances.
    """
    if len(lead) < 2:
        raise UserError(f"{len(lead)} held-out images found; at least 2 are needed")
    even, bands = Levels.even(sde), lead.shape[1]
    mean, sd = lead.mean(0), lead.std(0).clamp(min=1e-12)
    # where no lead is sure any lead counts; where there is none, all bands alike
    choices = (mean - 2 * sd / len(lead) ** 0.5, mean, sd)
    counted = next(c for c in choices if (c > 0).any()).clamp(min=0)
    weights, use = counted / sd.square(), counted / sd
    shares = 0.9 * use / use.sum() + 0.1 / bands
    weights = weights / weights.max()
    return Levels(even.first, even.last, tuple(shares.tolist()), tuple(weights.tolist()))
