"""What painted images are made of: random textures, and shapes whose edges pixels can show.

Lengths are in the unit of the axis, whatever that is: millimetres in ``data_prep.drawn.anatomy``,
micrometres in ``data_prep.drawn.stain``.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Shaped

Bands = Mapping[str, tuple[float, float, int]]


def axis(field: float, size: int) -> Float32[np.ndarray, " size"]:
    """Pixel centres along the side of an image of this width, 0 in the middle.

    Example:
        >>> axis(4.0, 2)
        array([-1.,  1.], dtype=float32)
    """
    return ((np.arange(size) + 0.5) * (field / size) - field / 2).astype(np.float32)


def n_waves(bands: Bands) -> int:
    """Waves that all textures of an image need together."""
    return sum(count for _, _, count in bands.values())


def textures(
    waves: Shaped[np.ndarray, "images waves 4"],
    bands: Bands,
    x: Float32[np.ndarray, "#images size"],
    y: Float32[np.ndarray, "#images size"],
    pixel: float,
    z: Shaped[np.ndarray, " images"] | float = 0.0,
) -> dict[str, Float32[np.ndarray, "images size size"]]:
    """Smooth random fields of unit variance: sums of waves, each averaged over the pixels.

    ``cos(a + b) = cos a cos b - sin a sin b`` makes a sum of plane waves one matrix product.

    Args:
        waves: of each wave its length within the band, direction, phase, and how it drifts with
            ``z``; each from 0 to 1.
        bands: of each texture its shortest and longest wave and the number of waves.
        x: pixel centres of each image, or of all.
        y: likewise.
        pixel: side of a pixel.
        z: depth of each image; textures of one place change slowly with it.

    Returns:
        One field for each band.
    """
    fields, first = {}, 0
    for name, (shortest, longest, count) in bands.items():
        u = waves[:, first : first + count]
        first += count
        k = 2 * np.pi / (shortest + (longest - shortest) * u[..., 0])
        kx, ky = k * np.cos(2 * np.pi * u[..., 1]), k * np.sin(2 * np.pi * u[..., 1])
        phase = 2 * np.pi * u[..., 2] + 0.12 * (2 * u[..., 3] - 1) * np.reshape(z, (-1, 1))
        blur = np.sinc(kx * pixel / (2 * np.pi)) * np.sinc(ky * pixel / (2 * np.pi))
        height = (np.sqrt(2 / count) * blur)[..., None].astype(np.float32)
        a = (kx[..., None] * x[:, None]).astype(np.float32)
        b = (ky[..., None] * y[:, None] + phase[..., None]).astype(np.float32)
        rows = np.concatenate([height * np.cos(b), -height * np.sin(b)], 1)
        fields[name] = rows.transpose(0, 2, 1) @ np.concatenate([np.cos(a), np.sin(a)], 1)
    return fields


class Brush:
    """Edges and lines of a given width that pixels can show without aliasing.

    Args:
        pixel: side of a pixel.
    """

    def __init__(self, pixel: float):
        self.pixel = pixel

    def inside(self, distance, width):
        """From 0 outside to 1 inside of a signed distance."""
        return 0.5 + 0.5 * np.tanh(distance * (1.4 / (width**2 + (0.35 * self.pixel) ** 2) ** 0.5))

    def line(self, distance, width):
        """A ridge where the distance is 0; what the pixels widen they make fainter."""
        wide = (width**2 + (0.4 * self.pixel) ** 2) ** 0.5
        return (width / wide) * np.exp(-((distance / wide) ** 2))


def length(u, v):
    """Length of the vector (u, v)."""
    return np.sqrt(u * u + v * v)  # several times faster than np.hypot


def over(canvas, value, mask):
    """Paints a value over the canvas, in place, where the mask is 1, and mixes where less."""
    canvas += mask * (value - canvas)
