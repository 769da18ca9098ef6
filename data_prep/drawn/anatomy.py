"""Axial T2-weighted prostate slices, painted from geometry.

A patient is a dictionary of random numbers that ``data_prep.drawn.prostate`` draws; here they
become pixels: pelvis, gland, zones and lesion as smooth shapes with random texture, then the
coil's bias field and Rician noise. Lengths are in mm, x to the right of the image and y to the
rear.
"""

import numpy as np

from data_prep.drawn.brush import Brush, axis, length, over, textures

FIELD_OF_VIEW = 64.0  # mm, the side of every image
SLICE_SPACING = 3.0  # mm
WINDOW = 215.0  # grey levels per unit of signal, about that of urine
WAVES = {  # random texture: shortest and longest wave in mm, number of waves
    "bias": (60.0, 140.0, 4),
    "bend_x": (18.0, 45.0, 8),
    "bend_y": (18.0, 45.0, 8),
    "nodules": (8.0, 16.0, 20),
    "fine": (4.0, 12.0, 24),
    "lesion": (4.0, 9.0, 24),
}


def half_axes(level, anatomy):
    """Half width and half depth of the gland in mm; ``level`` runs from -1, apex, to 1, base."""
    narrow = np.sqrt(1 - 0.42 * (level - 0.15) ** 2)
    return (23 + 1.8 * anatomy[0]) * narrow, (16.5 + 1.5 * anatomy[1]) * narrow


def render(patients, size, field=FIELD_OF_VIEW):
    """The slices of some patients, or windows of them, ``(slices, size, size)`` uint8.

    A slice has its middle at ``centre``, x and y in mm.
    """
    pixel, n_slices = field / size, [len(p["z"]) for p in patients]

    def per_slice(rows):  # (slices, numbers) -> numbers that multiply the slices
        return np.asarray(rows, np.float32).T[..., None, None]

    def joined(key):
        return np.concatenate([p[key] for p in patients])

    anatomy = per_slice(np.repeat([p["anatomy"] for p in patients], n_slices, 0))
    waves = np.repeat([p["waves"] for p in patients], n_slices, 0)
    x, y = (joined("centre")[..., None] + axis(field, size)).astype(np.float32).swapaxes(0, 1)
    texture = textures(waves, WAVES, x, y, pixel, joined("z"))
    level, lesion = per_slice(joined("level")), per_slice(joined("lesion"))
    signal = _signal(x[:, None, :], y[:, :, None], pixel, level, anatomy, texture, lesion)
    noise = np.concatenate(
        [p["rng"].standard_normal((len(p["z"]), 2, size, size), np.float32) for p in patients]
    )
    # pixels above 1 mm average noise away; smaller ones keep that of 1 mm, as a longer scan would
    noise *= (0.030 + 0.005 * np.tanh(anatomy[-1]))[:, None] * min(1.0, 1 / pixel)
    magnitude = np.sqrt((signal + noise[:, 0]) ** 2 + noise[:, 1] ** 2)  # Rician
    return np.clip(magnitude * WINDOW, 0, 255).astype(np.uint8)


def _signal(x0, y0, pixel, level, anatomy, texture, lesion):
    """The noiseless slices, painted from the back to the front; x to the right, y to the rear."""
    brush, draw = Brush(pixel), iter(anatomy[2:])
    x, y = x0 + 1.1 * texture["bend_x"], y0 + 1.1 * texture["bend_y"]
    canvas = _pelvis(brush, draw, x, y, level, texture)

    a, b = half_axes(level, anatomy)
    across = (x / a) ** 2
    depth = y + 2.0 + (2.2 + 0.7 * next(draw)) * (0.5 - across)  # hollow in the rear midline
    gland = (1 - np.sqrt(across + (depth / b) ** 2)) * b  # mm to the capsule, positive inside
    tissue, zone = _gland(brush, draw, x, depth, (a, b), level, texture)

    diameter, contrast, edge, grain, xl, yl = lesion
    bent = x0 - xl + 0.7 * texture["bend_y"], 1.15 * (y0 - yl) + 0.6 * texture["nodules"]
    mask = brush.inside(diameter / 2 - length(*bent), edge) * (diameter > 0)
    over(tissue, zone * (1 - contrast) + grain * texture["lesion"], mask)
    over(canvas, tissue, brush.inside(gland, 0.5))
    canvas -= 0.30 * brush.line(gland, 0.7) * brush.inside(depth + 0.7 * b, 3.0)  # capsule
    coil = 0.10 * texture["bias"] + 0.004 * next(draw) * x0 + 0.005 * next(draw) * y0
    return np.maximum(canvas, 0.02) * (1 + coil)


def _pelvis(brush, draw, x, y, level, texture):
    """All that surrounds the gland."""
    nodule, fine, side = texture["nodules"], texture["fine"], np.abs(x)
    canvas = (0.55 + 0.04 * next(draw)) + 0.07 * fine + 0.06 * nodule  # fat and its vessels
    bone = -26.5 + 1.0 * next(draw) + 0.28 * side
    over(canvas, 0.30 + 0.02 * nodule, brush.inside(bone - y, 1.2))
    wall = 28.0 + 1.0 * next(draw) + 0.006 * (y + 4) ** 2 - 0.06 * y
    over(canvas, 0.20 + 0.02 * fine, brush.inside(side - wall, 0.8))  # obturator muscle
    sling = (1 - length(x / (24.5 + 0.8 * next(draw)), (y - 6) / 29)) * 24.5
    over(canvas, 0.20, brush.line(sling, 1.2) * brush.inside(y + 13, 3.0))  # levator ani

    bladder = 46 * (level - 0.62 + 0.05 * next(draw)) - length(x, y + 19)
    over(canvas, 0.24, brush.inside(bladder + 2.5, 0.8))
    over(canvas, 0.98, brush.inside(bladder, 0.8))
    rx, ry = 11.0 + 1.5 * next(draw), 8.5 + 1.0 * next(draw)
    xr, yr = x - 1.5 * next(draw), y - 24.0 - 0.7 * next(draw)
    rectum = (1 - length(xr / rx, yr / ry)) * ry
    over(canvas, 0.26, brush.inside(rectum + 1.5, 0.7))
    over(canvas, 0.52 + 0.06 * fine, brush.inside(rectum - 0.8, 0.6))  # mucosa
    content = np.where(next(draw) > -0.2, np.float32(0.05), 0.36 + 0.08 * nodule)  # gas or stool
    over(canvas, content, brush.inside(rectum - 2.0 + 0.5 * nodule, 0.7))
    vesicle = np.exp(-(((side - 11) / 8) ** 2) - ((y - 13) / 3.5) ** 2)
    over(canvas, 0.62 + 0.25 * np.tanh(2 * fine), vesicle * brush.inside(level - 0.70, 0.12))
    return canvas


def _gland(brush, draw, x, depth, half_axes, level, texture):
    """Healthy tissue, and the mean signal of the zone each pixel lies in."""
    nodule, fine, (a, b) = texture["nodules"], texture["fine"], half_axes
    bright, dull = 0.78 + 0.045 * next(draw), 0.41 + 0.03 * next(draw)
    at = 0.66 * a * (0.60 + 0.05 * next(draw)) * (1 + 0.16 * level)
    bt = b * (0.66 + 0.04 * next(draw)) * (1 + 0.12 * level)
    lobe = np.sqrt(x * x + 4.0) - 0.55 * at  # left and right
    inner = (1 - length(lobe / at, (depth + 0.22 * b) / bt)) * bt
    core = brush.inside(inner, 0.6)
    tissue = bright + 0.055 * fine - 0.05 * np.maximum(nodule - 0.4, 0)
    swirl = 0.11 * np.tanh(1.6 * nodule) + 0.03 * fine - 0.09 * brush.line(nodule, 0.22)
    over(tissue, dull + swirl, core)
    tissue -= 0.20 * brush.line(inner, 0.8)  # surgical capsule
    front = np.exp(-((x / (0.42 * a)) ** 2) - ((depth + 0.95 * b) / (0.36 * b)) ** 2)
    over(tissue, 0.20, front)  # anterior fibromuscular stroma
    tube = length(x, depth + 0.5 - 3.5 * level)
    over(tissue, 0.27, 0.8 * brush.line(tube - 3.0, 1.2))
    over(tissue, 0.80, brush.line(tube, 1.9))  # urethra
    return tissue, bright + core * (dull - bright)
