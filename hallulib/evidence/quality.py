r"""How good samples are: do they look real, do they cover the data, are they copies?

`features` describes an image by about a hundred numbers from a fixed filter bank: no weights, no
download, no random numbers. On features of real and generated images `frechet_distance` and
`kernel_distance` compare the two distributions; `coverage` asks how much of the data has a sample
near by, and `nearest`, in pixels, how far a sample is from a copy, where held-out real images tell
what is far. Values compare only at equal image size and numbers of images: the Frechet distance of
finite samples is biased upwards, so quote it beside that of two real halves, split by patient,
since slices of one patient are alike.
"""

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hallulib.shapes import AnyImages, Images, PerImage

FLOOR = 0.02  # contrast below which texture no longer counts; two to three grey levels of 255
Features = Float[Tensor, "batch features"]
AnyFeatures = Float[Tensor, "_ features"]  # two sets that are compared differ in length


@dataclass(frozen=True)
class Nearest:
    """Position of the nearest training image of each sample, and its distance."""

    index: Int[Tensor, " batch"]
    distance: PerImage


def features(images: Images) -> Features:
    r"""A fixed description of images in [-1, 1]: layout, texture, edges and spots.

    90 numbers for grey images, 106 for colour, of 16 pixels a side or more. In order: means on a
    4 x 4 grid; then log-contrasts :math:`\log((m + 0.02) / 0.1)`, where m is

    - the mean detail of one pixel, and of the finest checkerboard (2 numbers);
    - for each of three octaves (full, half and quarter resolution), the mean amplitude of Gabor
      filters of wavelength 4 px: on a 4 x 4 grid over all directions (16), over the image for
      each of 4 directions (4), and of bright and of dark spots, mean and strongest (4);
    - in colour, where the above describes the mean of the channels, also mean and log-contrast
      of two opponent colours on a 2 x 2 grid (16).

    Source: Simoncelli and Portilla's pyramid statistics (2000, doi 10.1023/A:1026553619983),
    reduced; that such unlearned features serve where ImageNet's do not: Naeem et al. 2020.
    """
    with torch.no_grad():
        return torch.cat([_described(chunk.float()) for chunk in images.split(256)])


def _described(images: Images) -> Features:
    """The numbers that `features` lists."""
    grey = images.mean(1, keepdim=True)
    parts = [F.adaptive_avg_pool2d(grey, 4), _log(_finest(grey))]
    for octave in range(3):
        grey = _smooth(grey, (1, 4, 6, 4, 1), stride=2) if octave else grey
        parts += _octave(grey)
    if images.shape[1] == 3:
        red, green, blue = images.split(1, dim=1)
        opponent = torch.cat([(red - green) / 2**0.5, (red + green - 2 * blue) / 6**0.5], 1)
        mean = F.adaptive_avg_pool2d(opponent, 2)
        variance = F.adaptive_avg_pool2d(opponent.square(), 2) - mean.square()
        parts += [mean, _log(variance.clamp(min=0).sqrt())]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _finest(grey):
    """Mean absolute detail of one pixel, and of the checkerboard no Gabor filter here sees."""
    checkers = F.conv2d(grey, grey.new_tensor([[[[0.25, -0.25], [-0.25, 0.25]]]]))
    detail = grey - _smooth(grey, (1, 2, 1), stride=1)
    return torch.stack([detail.abs().mean((1, 2, 3)), checkers.abs().mean((1, 2, 3))], 1)


def _octave(grey):
    waves = F.conv2d(F.pad(grey, (3,) * 4, mode="reflect"), _gabor().to(grey))
    even, odd = waves[:, 0::2], waves[:, 1::2]
    amplitude = torch.hypot(even, odd)
    spots = even.sum(1)  # all directions together: a centre against its surround
    bright, dark = spots.clamp(min=0), (-spots).clamp(min=0)
    strength = [s for spot in (bright, dark) for s in (spot.mean((1, 2)), spot.amax((1, 2)))]
    return [
        _log(F.adaptive_avg_pool2d(amplitude.mean(1, keepdim=True), 4)),
        _log(amplitude.mean((2, 3))),
        _log(torch.stack(strength, 1)),
    ]


def _log(contrast):
    return ((contrast + FLOOR) / 0.1).log()


def _smooth(x, weights, stride):
    w = x.new_tensor(weights) / sum(weights)
    x = F.pad(x, (len(w) // 2,) * 4, mode="reflect")
    return F.conv2d(x, torch.outer(w, w)[None, None], stride=stride)


@cache
def _gabor():
    """Even and odd waves of 4 px under a Gaussian of 1.5 px in 4 directions, (8, 1, 7, 7)."""
    v, u = torch.meshgrid(*[torch.arange(-3.0, 4.0, dtype=torch.double)] * 2, indexing="ij")
    window = torch.exp(-(u**2 + v**2) / (2 * 1.5**2))
    window /= window.sum()
    bank = []
    for angle in (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4):
        phase = math.pi / 2 * (u * math.cos(angle) + v * math.sin(angle))
        even = window * phase.cos()
        bank += [even - window * even.sum(), window * phase.sin()]  # blind to brightness
    return torch.stack(bank)[:, None]


def frechet_distance(real: AnyFeatures, generated: AnyFeatures) -> float:
    r"""Squared Frechet distance of two Gaussians fitted to the features.

    .. math:: |\mu_r - \mu_g|^2 + \operatorname{tr}(\Sigma_r + \Sigma_g
              - 2(\Sigma_r \Sigma_g)^{1/2})

    With :math:`\Sigma = R^\top R` by QR of the centred features, the last trace is the sum of
    singular values of :math:`R_r R_g^\top`, defined also for fewer images than features. Two
    samples of n images of one distribution differ by O(features / n).

    Source: Dowson and Landau 1982, doi 10.1016/0047-259X(82)90077-X; on features of images Heusel
    et al. 2017, https://arxiv.org/abs/1706.08500.

    Example:
        >>> frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]]))
        9.0
    """
    (mean_r, root_r), (mean_g, root_g) = map(_moments, _pair(real, generated))
    spread = root_r.square().sum() + root_g.square().sum()
    overlap = torch.linalg.svdvals(root_r @ root_g.T).sum()
    return max(float((mean_r - mean_g).square().sum() + spread - 2 * overlap), 0.0)


def _pair(real, generated):
    """Both in double precision on one device."""
    return real.double(), generated.to(real.device, torch.double)


def _moments(x):
    """Mean, and a root R of the covariance, R^T R."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def kernel_distance(real: AnyFeatures, generated: AnyFeatures) -> float:
    r"""Unbiased squared maximum mean discrepancy under the kernel (x.y / features + 1)^3.

    .. math:: \frac{\sum_{i \ne j} k(r_i, r_j)}{n(n-1)} + \frac{\sum_{i \ne j} k(g_i, g_j)}{m(m-1)}
              - \frac{2 \sum_{ij} k(r_i, g_j)}{nm}

    Zero on average for two samples of one distribution, however few (so it may be negative).

    Source: Gretton et al. 2012, eq. 3, https://jmlr.org/papers/v13/gretton12a.html; the kernel:
    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.
    """
    r, g = _pair(real, generated)
    within_r, within_g, between = (
        (x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((r, r), (g, g), (r, g))
    )
    distance = -2 * between.mean()
    for kernel in (within_r, within_g):
        distance += (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))
    return float(distance)


def coverage(real: AnyFeatures, generated: AnyFeatures, *, k: int = 5) -> float:
    r"""The share of real images with a sample nearer than their k-th nearest other real image.

    For as many samples of the same distribution as real images it is :math:`1 - 2^{-k}` on
    average.

    Source: Naeem et al. 2020, eq. 5. https://arxiv.org/abs/2002.09797
    """
    real, generated = _pair(real, generated)
    # the product form |a|^2 + |b|^2 - 2ab would not give 0 for equal rows
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    # the nearest real image of each is the image itself
    radii = distances(real, real).kthvalue(k + 1, dim=1).values
    return float((distances(real, generated).amin(1) <= radii).double().mean())


def nearest(train: AnyImages, samples: AnyImages) -> Nearest:
    r"""The nearest training image of every sample, pixel by pixel.

    The distance is the root mean square over pixels, :math:`\min_i |x_i - s| / \sqrt{CHW}`, in the
    unit of the images, so that 0.02 is 1 % of [-1, 1]. Flips and shifts are not undone.
    """
    train, samples = train.flatten(1), samples.flatten(1).to(train.device)
    centre = train.mean(0)  # the squares below then lose fewer digits
    centred = train - centre
    squares, index, distance = centred.square().sum(1), [], []
    for chunk in samples.split(256):
        index.append((squares - 2 * (chunk - centre) @ centred.T).argmin(1))
        distance.append((chunk - train[index[-1]]).square().mean(1).sqrt())
    return Nearest(torch.cat(index), torch.cat(distance))
