r"""Square in-plane crops at a set spacing, and their grey values as bytes."""

import numpy as np


def centre_of(mask: np.ndarray) -> np.ndarray:
    """Middle of the box around a mask, in rows and columns, over all slices.

    The outermost 1 % of its voxels on each side do not count: a stray voxel moves nothing.

    Args:
        mask: (slices, rows, columns); not empty.
    """
    _, *place = np.nonzero(mask)
    return np.percentile(place, [1, 99], axis=1).mean(axis=0)


def cut(
    pixels: np.ndarray, centre: np.ndarray, spacing: np.ndarray, target: float, size: int
) -> np.ndarray:
    r"""Crop of every slice around one place, by linear interpolation.

    .. math:: y_i = \frac{\sum_j w_{ij} x_j}{\sum_j w_{ij}},
        \quad w_{ij} = \max(0, 1 - |c_i - j| / \max(1, r))

    along rows and columns, with :math:`c_i` the place of pixel i in the slice and r the target
    over the given spacing: plain linear where pixels get smaller, a wider tent against aliasing
    where they get larger. Beyond the border the outermost pixel is repeated. The sums have a fixed
    order, so the result does not depend on the machine.

    Args:
        pixels: (slices, rows, columns).
        centre: (2,) row and column in the middle of the crop.
        spacing: (2,) mm between rows and between columns.
        target: mm between pixels of the crop.
        size: pixels per side of the crop.

    Returns:
        float64 (slices, size, size).
    """
    x = pixels.astype(float)
    for axis, (middle, step) in enumerate(zip(centre, spacing, strict=True), 1):
        x = _resampled(x, axis, middle, target / step, size)
    return x


def inside(
    place: np.ndarray, centre: np.ndarray, spacing: np.ndarray, target: float, size: int
) -> np.ndarray:
    """Whether rows and columns ``place`` (2, n) are inside the crop of `cut`; bool (n,)."""
    off = np.abs(place - np.reshape(centre, (2, 1))) * np.reshape(spacing, (2, 1))
    return (off <= target * size / 2).all(axis=0)


def to_bytes(x: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """Grey values between two percentiles of all of them as 0 to 255; None without contrast."""
    black, white = np.percentile(x, [low, high])
    if not white > black:
        return None
    return np.rint(np.clip((x - black) / (white - black), 0, 1) * 255).astype(np.uint8)


def _resampled(x: np.ndarray, axis: int, middle: float, ratio: float, size: int) -> np.ndarray:
    places = middle + (np.arange(size) - (size - 1) / 2) * ratio
    reach = max(1.0, ratio)
    first = np.floor(places - reach).astype(int) + 1
    taps = first[:, None] + np.arange(int(np.ceil(2 * reach)))
    weights = np.maximum(0, 1 - np.abs(taps - places[:, None]) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    taps = np.clip(taps, 0, x.shape[axis] - 1)
    along = [1, 1, 1]
    along[axis] = size
    total = 0.0
    for tap, weight in zip(taps.T, weights.T, strict=True):
        total = total + np.take(x, tap, axis) * weight.reshape(along)
    return total
