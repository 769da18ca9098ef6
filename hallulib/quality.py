r"""How good samples are: do they look real, do they cover the data, are they copies?

`features` describes an image by about a hundred numbers from a fixed filter bank: no weights, no
download, no random numbers. On features of real and generated images

- `frechet_distance` and `kernel_distance` compare the two distributions;
- `precision_recall` and `density_coverage` tell realistic from complete;

and `memorisation` compares pixels: the `nearest` training image of every sample, against the
same distance for held-out real images. Values compare only at equal image size and numbers of
images: the Frechet distance of finite samples is biased upwards, so quote it beside that of two
real halves, split by patient: slices of one patient are alike, and a split between them looks
several times too close.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hallulib import UserError
from hallulib.filterbank import describe
from hallulib.shapes import Images, PerImage

Features = Float[Tensor, "batch features"]
# two sets that are compared differ in length; equal widths are checked, in a sentence, by _pair
AnyFeatures = Float[Tensor, "_ _"]
AnyImages = Float[Tensor, "_ _ _ _"]


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


class PrecisionRecall(NamedTuple):
    """Share of samples that look real, and share of real images that samples come close to."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Mean number of real neighbourhoods around a sample, and share of those that hold one."""

    density: float
    coverage: float


class Nearest(NamedTuple):
    """Position of the nearest training image of each sample, and its distance."""

    index: Int[Tensor, " batch"]
    distance: PerImage


class Memorisation(NamedTuple):
    """Share of samples nearer to training than ``threshold``; expected if new: ``expected``."""

    share: float
    expected: float
    threshold: float
    nearest: Nearest


def features(images: Images) -> Features:
    r"""A fixed description of images in [-1, 1]: layout, texture, edges and spots.

    90 numbers for grey images, 106 for colour; the same on every machine up to rounding. In
    order: means on a 4 x 4 grid; then log-contrasts :math:`\log((m + 0.02) / 0.1)`, where m is

    - the mean detail of one pixel, and of the finest checkerboard (2 numbers);
    - for each of three octaves (full, half and quarter resolution), the mean amplitude of Gabor
      filters of wavelength 4 px: on a 4 x 4 grid over all directions (16), over the image for
      each of 4 directions (4), and of bright and of dark spots, mean and strongest (4);
    - in colour, where the above describes the mean of the channels, also mean and log-contrast
      of two opponent colours on a 2 x 2 grid (16).

    The logarithm makes faint blur and noise count as they do to the eye. About a hundred numbers
    keep the finite-sample floor of the Frechet distance low at the few hundred images there are.

    Raises:
        UserError: neither 1 nor 3 channels, a side under 16 pixels, or a value that is not finite.

    Source:
        Simoncelli and Portilla's pyramid statistics (2000, doi 10.1023/A:1026553619983), reduced;
        that such unlearned features serve where ImageNet's do not: Naeem et al. 2020.
    """
    if images.shape[1] not in (1, 3) or min(images.shape[2:]) < 16:
        raise UserError(
            f"images of {images.shape[1]} channels and {images.shape[2]} x {images.shape[3]} "
            "pixels found: features need 1 or 3 channels and at least 16 x 16 pixels"
        )
    if not torch.isfinite(images).all():
        raise UserError("the images hold values that are not finite")
    with torch.no_grad():
        return torch.cat([describe(chunk.float()) for chunk in images.split(256)])


def frechet_distance(real: AnyFeatures, generated: AnyFeatures) -> float:
    r"""Squared Frechet distance of two Gaussians fitted to the features.

    .. math:: |\mu_r - \mu_g|^2 + \operatorname{tr}(\Sigma_r + \Sigma_g
              - 2(\Sigma_r \Sigma_g)^{1/2})

    With :math:`\Sigma = R^\top R` from a QR decomposition of the centred features, the last trace
    is the sum of singular values of :math:`R_r R_g^\top`: real, stable, and defined also for fewer
    images than features. Two samples of n images of one distribution differ by O(features / n).

    Raises:
        UserError: fewer than two rows, other numbers of features, or a value that is not finite.

    Source:
        Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; on features of images Heusel et
        al. 2017, https://arxiv.org/abs/1706.08500.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    real, generated = _pair(real, generated, at_least=2)
    (mean_r, root_r), (mean_g, root_g) = map(_moments, (real, generated))
    spread = root_r.square().sum() + root_g.square().sum()
    overlap = torch.linalg.svdvals(root_r @ root_g.T).sum()
    return max(float((mean_r - mean_g).square().sum() + spread - 2 * overlap), 0.0)


def _moments(x):
    """Mean, and a root R of the covariance, R^T R."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def kernel_distance(real: AnyFeatures, generated: AnyFeatures, *, blocks: int = 10) -> Estimate:
    r"""Unbiased squared maximum mean discrepancy under the kernel (x.y / features + 1)^3.

    .. math:: \frac{\sum_{i \ne j} k(r_i, r_j)}{n(n-1)} + \frac{\sum_{i \ne j} k(g_i, g_j)}{m(m-1)}
              - \frac{2 \sum_{ij} k(r_i, g_j)}{nm}

    Zero on average for two samples of one distribution, however few (so it may be negative).

    Args:
        real: features of real images.
        generated: features of samples; the two may be exchanged.
        blocks: the standard error is the jackknife that leaves out one block of both sets at a
            time. Blocks follow the order of the rows: rows sorted by patient keep slices of one
            patient together and the error honest. Memory: one block by one block.

    Raises:
        UserError: fewer than two rows per block, other numbers of features, or not finite.

    Source:
        Gretton et al. 2012, eq. 3, https://jmlr.org/papers/v13/gretton12a.html; the kernel:
        Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.
    """
    real, generated = _pair(real, generated, at_least=2 * blocks)
    r, g = real.tensor_split(blocks), generated.tensor_split(blocks)
    within_r, within_g, between = _kernel_sums(r, r), _kernel_sums(g, g), _kernel_sums(r, g)
    n, m = (torch.tensor([len(b) for b in x], dtype=torch.double) for x in (r, g))

    def distance(kept):
        n_kept, m_kept = kept @ n, kept @ m
        return (
            kept @ within_r @ kept / (n_kept * (n_kept - 1))
            + kept @ within_g @ kept / (m_kept * (m_kept - 1))
            - 2 * (kept @ between @ kept) / (n_kept * m_kept)
        )

    left_out = torch.stack([distance(kept) for kept in 1 - torch.eye(blocks, dtype=torch.double)])
    error = math.sqrt((blocks - 1) * left_out.var(correction=0))
    return Estimate(float(distance(torch.ones_like(n))), error)


def _kernel_sums(a, b):
    """Sum of the kernel over each pair of blocks, images with themselves left out."""
    sums = torch.zeros(len(a), len(b), dtype=torch.double)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            kernel = (x @ y.T / x.shape[1] + 1) ** 3
            sums[i, j] = kernel.sum() - (kernel.trace() if x is y else 0)
    return sums


def precision_recall(real: AnyFeatures, generated: AnyFeatures, *, k: int = 3) -> PrecisionRecall:
    """Share of samples within the real manifold, and of real images within the generated one.

    The manifold of a set is the union of balls around its members, each as large as the distance
    to the ``k``-th nearest other member. Precision falls for unrealistic, recall for missing,
    images; one outlier makes a large ball, which `density_coverage` withstands better.

    Raises:
        UserError: not more than ``k`` rows, other numbers of features, or not finite.

    Source:
        Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991.
    """
    real, generated = _pair(real, generated, at_least=k + 1)
    inside = [
        torch.cat([(d <= radii).any(1) for d in _distances(b, a)])
        for a, b in ((real, generated), (generated, real))
        for radii in [_radii(a, k)]
    ]
    return PrecisionRecall(*(float(share.double().mean()) for share in inside))


def density_coverage(real: AnyFeatures, generated: AnyFeatures, *, k: int = 5) -> DensityCoverage:
    r"""How densely samples lie among real images, and the share of real images they cover.

    With the ball of each real image :math:`r_i` reaching its k-th nearest other real image,

    .. math:: \mathrm{density} = \frac{1}{k\,m} \sum_{j=1}^{m} \#\{i : g_j \in B_k(r_i)\},
              \qquad \mathrm{coverage} = \frac1n \#\{i : \exists j,\ g_j \in B_k(r_i)\}.

    Density is 1 on average for samples of the same distribution and may exceed it; coverage then
    is :math:`1 - 2^{-k}` for as many samples as real images.

    Raises:
        UserError: not more than ``k`` rows, other numbers of features, or not finite.

    Source:
        Naeem et al. 2020, https://arxiv.org/abs/2002.09797.
    """
    real, generated = _pair(real, generated, at_least=k + 1)
    radii = _radii(real, k)
    covered, hits = torch.zeros(len(real), dtype=torch.bool, device=real.device), 0
    for distances in _distances(generated, real):
        inside = distances <= radii
        covered |= inside.any(0)
        hits += int(inside.sum())
    return DensityCoverage(hits / (k * len(generated)), float(covered.double().mean()))


def _radii(x, k):
    """Distance of each row to its k-th nearest other row; the row itself is the first."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(x, x)])


def _distances(a, b) -> Iterator[Tensor]:
    """Exact distances of rows, in chunks of ``a`` that fit 2^24 of them."""
    for chunk in a.split(max(1, 2**24 // len(b))):
        # the product form |a|^2 + |b|^2 - 2ab would not give 0 for equal rows
        yield torch.cdist(chunk, b, compute_mode="donot_use_mm_for_euclid_dist")


def nearest(train: AnyImages, samples: AnyImages) -> Nearest:
    r"""The nearest training image of every sample, pixel by pixel.

    The distance is the root mean square over pixels,
    :math:`\min_i |x_i - s| / \sqrt{CHW}`, in the unit of the images, so that 0.02 is 1 % of the
    range [-1, 1] at any image size. Flips and shifts are not undone.

    Raises:
        UserError: shapes differ, or a value is not finite.
    """
    if not len(train) or train.shape[1:] != samples.shape[1:]:
        raise UserError(
            f"{len(train)} training images of shape {tuple(train.shape[1:])} and samples of shape "
            f"{tuple(samples.shape[1:])} found: both need the same channels and size"
        )
    train, samples = _pair(train.flatten(1), samples.flatten(1), at_least=1, dtype=torch.float32)
    centre = train.mean(0)  # the squares below then lose fewer digits
    square = torch.cat([(t - centre).square().sum(1) for t in train.split(1024)])
    index, distance = [], []
    for chunk in samples.split(256):
        best = torch.full((len(chunk),), math.inf, device=chunk.device)
        at = torch.zeros(len(chunk), dtype=torch.int64, device=chunk.device)
        for start in range(0, len(train), 1024):
            block = slice(start, start + 1024)
            gap = square[block] - 2 * (chunk - centre) @ (train[block] - centre).T
            value, position = gap.min(1)
            at = torch.where(value < best, position + start, at)
            best = torch.minimum(best, value)
        index.append(at)
        distance.append((chunk - train[at]).square().mean(1).sqrt())
    return Nearest(torch.cat(index), torch.cat(distance))


def memorisation(
    train: AnyImages, samples: AnyImages, held_out: AnyImages, *, quantile: float = 0.05
) -> Memorisation:
    """Share of samples closer to the training images than real images of other patients are.

    The threshold is the ``quantile`` of the distances from held-out real images to their nearest
    training image. Samples as new as a new patient fall below it with that same chance; a model
    that copies has a share near 1.

    Args:
        train: the images the model was trained on, all of them.
        samples: images it generated.
        held_out: real images of patients that are not in ``train``, else the test is blind.
        quantile: the expected share; needs at least ``1 / quantile`` held-out images.

    Raises:
        UserError: shapes differ, a value is not finite, or too few held-out images.
    """
    if len(held_out) * quantile < 1:
        raise UserError(
            f"{len(held_out)} held-out images found: their {quantile} quantile needs at least "
            f"{math.ceil(1 / quantile)}"
        )
    found = nearest(train, samples)
    threshold = torch.quantile(nearest(train, held_out).distance, quantile)
    share = (found.distance < threshold).double().mean()
    return Memorisation(float(share), quantile, float(threshold), found)


def _pair(a, b, *, at_least, dtype=torch.float64):
    """Both sets in one type on one device, checked."""
    for name, x in (("real", a), ("generated", b)):
        if len(x) < at_least:
            raise UserError(f"{len(x)} {name} images found: at least {at_least} are needed")
        if not torch.isfinite(x).all():
            raise UserError(f"the {name} images hold values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"{a.shape[1]} and {b.shape[1]} features found: both sets need the same features"
        )
    return a.to(dtype), b.to(a.device, dtype)
