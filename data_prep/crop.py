r"""Square in-plane crops at a set spacing, and their grey values as bytes."""

from dataclasses import dataclass, replace

import numpy as np

LOW, HIGH = 0.5, 99.5  # percentiles that become black and white


def centre_of(mask: np.ndarray) -> np.ndarray:
    """Middle of the box around a mask, in rows and columns, over all slices.

    The outermost 1 % of its voxels on each side do not count: a stray voxel moves nothing.

    Args:
        mask: (slices, rows, columns); not empty.
    """
    _, *place = np.nonzero(mask)
    return np.percentile(place, [1, 99], axis=1).mean(axis=0)


@dataclass(frozen=True)
class Window:
    """Where a square crop lies in the slices of a volume.

    Args:
        centre: (2,) row and column in its middle.
        spacing: (2,) mm between rows and between columns of the volume.
        target: mm between pixels of the crop.
        size: pixels per side of the crop.
    """

    centre: np.ndarray
    spacing: np.ndarray
    target: float
    size: int

    @property
    def reach(self) -> np.ndarray:
        """Rows and columns from the centre to the border (2,)."""
        return self.target * self.size / 2 / self.spacing

    def shows(self, place: np.ndarray) -> np.ndarray:
        """Whether rows and columns ``place`` (2, n) lie in the crop; bool (n,)."""
        return (np.abs(place.T - self.centre) <= self.reach).all(axis=1)

    def reaches_beyond(self, shape: tuple[int, ...]) -> bool:
        """Whether a part of the crop lies outside slices of this shape."""
        first, last = self.centre - self.reach, self.centre + self.reach
        return bool((first < -0.5).any() or (last > np.array(shape) - 0.5).any())

    def moved(self, centre: np.ndarray, shape: tuple[int, ...]) -> "Window":
        """The same crop around another place, or as near to it as slices of this shape allow.

        Args:
            centre: (2,) row and column.
            shape: (2,) rows and columns of the slices, at least as wide as the crop.
        """
        last = np.array(shape) - 0.5 - self.reach
        return replace(self, centre=np.clip(centre, self.reach - 0.5, last))

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        r"""Crop of every slice, by linear interpolation.

        .. math:: y_i = \frac{\sum_j w_{ij} x_j}{\sum_j w_{ij}},
            \quad w_{ij} = \max(0, 1 - |c_i - j| / \max(1, r))

        along rows and columns, with :math:`c_i` the place of pixel i in the slice and r the target
        over the given spacing: plain linear where pixels get smaller, a wider tent against
        aliasing where they get larger. Beyond the border the outermost pixel is repeated. The sums
        have a fixed order, so the result does not depend on the machine.

        Args:
            pixels: (slices, rows, columns).

        Returns:
            float64 (slices, size, size).
        """
        x = pixels.astype(float)
        for axis, middle, step in zip((1, 2), self.centre, self.spacing, strict=True):
            x = _resampled(x, axis, middle, self.target / step, self.size)
        return x


def ends(x: np.ndarray) -> tuple[float, float]:
    """The grey values that become black and white.

    They are the percentiles `LOW` and `HIGH`. Where these coincide, as in a dark image with a few
    bright pixels, least and greatest value stand for them, so that only a constant image has no
    contrast.

    Args:
        x: finite values of what is shown, of any shape.

    Returns:
        black and white; white is greater unless all values are equal.
    """
    black, white = (float(end) for end in np.percentile(x, [LOW, HIGH]))
    return (black, white) if white > black else (float(x.min()), float(x.max()))


def to_bytes(x: np.ndarray, black: float, white: float) -> np.ndarray:
    """Grey values from black to white as 0 to 255, uint8; what is beyond is clipped."""
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
