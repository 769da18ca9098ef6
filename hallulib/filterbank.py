"""A fixed filter bank: an image as about a hundred numbers of layout, texture, edges and spots.

Nothing here is learned or random, so the numbers are the same on every machine up to rounding.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hallulib.shapes import Images

FLOOR = 0.02  # contrast below which texture no longer counts; two to three grey levels of 255


def describe(images: Images) -> Float[Tensor, "batch features"]:
    """The numbers that :func:`hallulib.quality.features` lists, of images that it has checked."""
    grey = images.mean(1, keepdim=True)
    parts = [F.adaptive_avg_pool2d(grey, 4), _log(_finest(grey))]
    for octave in range(3):
        grey = grey if octave == 0 else _halve(grey)
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


def _halve(x):
    return _smooth(x, (1, 4, 6, 4, 1), stride=2)


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
