"""Smaller images by averaging areas; without torch, so that worker processes start fast."""

import numpy as np


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    r"""Makes square images smaller; a new pixel is the mean of the area that it covers.

    .. math:: y = \frac{1}{N^2} W x W^\top,
        \quad W_{ij} = \left|[i N, (i + 1) N] \cap [j n, (j + 1) n]\right|

    from N to n pixels a side: block means when n divides N, anti-aliased otherwise. The weights
    are whole numbers, so the sums are exact and the result is the same on every machine.

    Args:
        images: uint8 (batch, ..., N, N).
        size: n, at most N.

    Returns:
        uint8 (batch, ..., n, n), rounded to the nearest, halves to even.

    Example:
        >>> area_average(np.array([[[0, 4], [2, 6]]], np.uint8), 1)
        array([[[3]]], dtype=uint8)
    """
    old = images.shape[-1]
    edges = np.arange(size + 1)[:, None] * old
    weights = np.diff(np.clip(edges - np.arange(old) * size, 0, size), axis=0).astype(float)
    reduced = np.empty((*images.shape[:-2], size, size), np.uint8)
    step = max(1, 2**22 // max(1, images[:1].size))  # bounds the copy in float64 to 32 MB
    for start in range(0, len(images), step):
        part = images[start : start + step].astype(float)
        reduced[start : start + step] = np.rint(weights @ part @ weights.T / old**2)
    return reduced
