"""Glands and nuclei of a tile of tissue: where they lie and what shape they have.

A tile is described by the parameters that ``data_prep.drawn.histology`` draws (`Tiles`, one number
of each name for each tile) and by the random numbers of `draw`, whose shapes depend on nothing, so
that a tile is the same in any company and at any size. Lengths are in micrometres, from the middle
of the tile.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from scipy.special import expit, logit, ndtri

Tiles = Mapping[str, Float32[np.ndarray, " tiles"]]

FIELD_OF_VIEW = 112.0  # the side of a tile: that of the 224 pixels of NCT-CRC-HE-100K
SIDE = 5  # places for glands along each side of a lattice that is wider than a tile
SHOWN = 16  # glands of a tile at most; of more, those in the corners are left out
SLOTS = (34, 28, 22, 14)  # nuclei at most in each row of a gland, from its border inwards
ROW, ROOM = np.repeat(np.float32([range(len(SLOTS)), SLOTS]), SLOTS, 1)
SLOT = np.concatenate([np.arange(n, dtype=np.float32) for n in SLOTS])
NODES, SPACING = 17, 7.2  # places for nuclei between the glands, along each side; um between them
LYMPHOCYTE = 6.4  # um, the diameter of its nucleus
LONGEST = 8.0  # um, half length of a nucleus at most
OUTSIDE = -99.0  # um, a distance for where there is no gland


class Layout(NamedTuple):
    """The random numbers of some tiles; uniform from 0 to 1, or standard normal."""

    place: Float32[np.ndarray, "tiles 8"]  # uniform: of the lattices and the fibres
    glands: Float32[np.ndarray, "tiles places 11"]
    rows: Float32[np.ndarray, "tiles shown slots 6"]  # of the nuclei of glands
    loose: Float32[np.ndarray, "tiles nodes 6"]  # of the nuclei between them


class Nuclei(NamedTuple):
    """Nuclei of all tiles, in any order; ellipses."""

    tile: Int[np.ndarray, " nuclei"]
    x: Float32[np.ndarray, " nuclei"]
    y: Float32[np.ndarray, " nuclei"]
    long: Float32[np.ndarray, " nuclei"]  # half axes
    short: Float32[np.ndarray, " nuclei"]
    angle: Float32[np.ndarray, " nuclei"]  # of the long axis, radians
    dark: Float32[np.ndarray, " nuclei"]  # haematoxylin, relative


# x, y, mean radius (negative: no gland), radius of the lumen relative to it, and the outline's
# waves around the border, two, three and four times, as cosine and sine
Glands = Float32[np.ndarray, "tiles shown 10"]


def draw(rng: np.random.Generator) -> Layout:
    """The random numbers of one tile, without the axis ``tiles``."""
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    return Layout(
        place=rng.random(8, np.float32),
        glands=normal(SIDE**2, 11),
        rows=normal(SHOWN, len(SLOT), 6),
        loose=normal(NODES**2, 6),
    )


def fibre_angle(layout: Layout) -> Float32[np.ndarray, " tiles"]:
    """Direction in which the fibres of each tile run, radians."""
    return np.pi * layout.place[:, 3]


def glands(tiles: Tiles, layout: Layout) -> Glands:
    """The glands of each tile that reach into view, from the middle outwards.

    Without disorder they are round, of one size, on a lattice; with it they differ, come close,
    bulge and fuse, and some lose their lumen.
    """
    place, n = layout.place[..., None], layout.glands
    share, lumen, disorder, radius = (
        tiles[name][:, None] for name in ("gland_share", "lumen", "disorder", "gland_um")
    )
    i, j = np.divmod(np.arange(SIDE**2, dtype=np.float32), SIDE)
    wander = (0.05 + 0.20 * disorder) * radius
    u = 2.3 * radius * (i + 0.5 * (j % 2) + place[:, 0] - 2.75) + wander * n[..., 0]
    v = 2.0 * radius * (j + place[:, 1] - 2.5) + wander * n[..., 1]
    c, s = np.cos(2 * np.pi * place[:, 2]), np.sin(2 * np.pi * place[:, 2])
    x, y = c * u - s * v, s * u + c * v
    mean = radius * np.exp((0.08 + 0.22 * disorder) * n[..., 2])
    waves = (0.05 + 0.22 * disorder)[..., None] * n[..., 3:9] * np.repeat([1, 0.7, 0.5], 2)
    waves[..., :2] += 0.05 * n[..., 3:5]  # not cut at right angles
    opening = expit(logit(lumen) + (0.2 + 0.6 * disorder) * n[..., 9])
    reach = FIELD_OF_VIEW / 2 + 1.4 * mean
    seen = (n[..., 10] < ndtri(share)) & (np.maximum(abs(x), abs(y)) < reach)
    numbers = np.stack([x, y, np.where(seen, mean, -1), opening], -1)
    first = np.argsort(np.where(seen, x * x + y * y, np.inf), 1)[:, :SHOWN, None]
    found = np.take_along_axis(np.concatenate([numbers, waves], -1), first, 1)
    return found.astype(np.float32)


def distances(x, y, gland):
    """How far points lie inside of a gland and of its lumen, towards its centre; below 0 outside.

    Args:
        x: positions.
        y: likewise.
        gland: the ten numbers of `Glands` along the first axis.
    """
    x0, y0, mean, opening, a2, b2, a3, b3, a4, b4 = gland
    dx, dy = x - x0, y - y0
    rho = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
    c, s = dx / rho, dy / rho
    c2, s2 = c * c - s * s, 2 * c * s
    wave = a2 * c2 + b2 * s2
    wave += a3 * (c2 * c - s2 * s) + b3 * (s2 * c + c2 * s)
    wave += a4 * (c2 * c2 - s2 * s2) + b4 * (2 * c2 * s2)
    border = mean * (1 + np.maximum(wave, -0.5))
    lumen = mean * opening * (1 + np.maximum(1.6 * wave, -0.6))
    return border - rho, lumen - rho


def distance_maps(shapes: Glands, axis: Float32[np.ndarray, " size"]):
    """The distances of all pixels to the nearest gland and lumen ``(tiles, size, size)``."""
    border = np.full((len(shapes), len(axis), len(axis)), OUTSIDE, np.float32)
    lumen = border.copy()
    for k in range(SHOWN):
        some = np.flatnonzero(shapes[:, k, 2] > 0)
        if len(some):
            gland = shapes[some, k].T[..., None, None]
            into_gland, into_lumen = distances(axis, axis[:, None], gland)
            border[some] = np.maximum(border[some], into_gland)
            lumen[some] = np.maximum(lumen[some], into_lumen)
    return border, lumen


def nuclei(tiles: Tiles, shapes: Glands, layout: Layout) -> Nuclei:
    """All nuclei that reach into view."""
    parts = _of_glands(tiles, shapes, layout.rows), _between(tiles, shapes, layout)
    return Nuclei(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _of_glands(tiles, shapes, n):
    """A row of nuclei along the border of each gland; with disorder more rows, and less order."""
    tile, k = np.nonzero(shapes[..., 2] > 0)
    gland, n = shapes[tile, k].T[..., None], n[tile, k]
    disorder, size = (tiles[name][tile, None] for name in ("disorder", "nucleus_um"))
    depth = size * (0.75 + ROW + (0.08 + 0.35 * disorder) * n[..., 0])
    fit = np.minimum(ROOM, 2 * np.pi * (gland[2] - depth) / (0.92 * size))
    fit = np.floor(np.maximum(fit, 0))
    turn = 2 * np.pi * (SLOT + (0.12 + 0.5 * disorder) * n[..., 1]) / np.maximum(fit, 1)
    c, s = np.cos(turn), np.sin(turn)
    from_border, _ = distances(gland[0] + c, gland[1] + s, gland)  # at 1 um from the centre
    rho = from_border + 1 - depth
    x, y = gland[0] + rho * c, gland[1] + rho * s
    stacked = np.where(ROW == 0, 0.97, np.clip(2.2 * disorder - 0.25, 0.02, 0.92))
    kept = (fit > SLOT) & (n[..., 2] < ndtri(stacked)) & (rho > 0.3 * size) & _in_view(x, y)

    tile = np.broadcast_to(tile[:, None], kept.shape)[kept]
    x, y, turn, n = x[kept], y[kept], turn[kept], n[kept]
    _, into_lumen = _nearest(tile, x, y, shapes)
    kept = into_lumen < -0.3 * tiles["nucleus_um"][tile]
    tile, x, y, turn, n = tile[kept], x[kept], y[kept], turn[kept], n[kept]
    disorder, pleomorphism = tiles["disorder"][tile], tiles["pleomorphism"][tile]
    half = 0.5 * tiles["nucleus_um"][tile] * np.exp(pleomorphism * n[:, 3])
    aspect = np.exp(0.17 - 0.15 * disorder + 0.3 * pleomorphism * n[:, 4])
    dark = tiles["chromatin"][tile] * np.exp((0.08 + 0.5 * pleomorphism) * n[:, 5])
    return tile, x, y, half * aspect, half / aspect, turn + 1.5 * disorder * n[:, 0], dark


def _between(tiles, shapes, layout):
    """Nuclei between the glands: spindles along the fibres, and lymphocytes in flocks."""
    n, place = layout.loose, layout.place[..., None]
    i, j = np.divmod(np.arange(NODES**2, dtype=np.float32), NODES)
    x = SPACING * (i - NODES // 2 + 0.22 * n[..., 0])
    y = SPACING * (j - NODES // 2 + 0.5 * (i % 2) - 0.25 + 0.22 * n[..., 1])
    way, phase = 2 * np.pi * place[:, 4:6], 2 * np.pi * place[:, 6:8]  # of two waves
    along = np.cos(way) * x[:, None] + np.sin(way) * y[:, None]
    flocks = np.cos(along / 14 + phase).sum(1)
    chance = expit(logit(tiles["infiltrate"])[:, None] + 0.9 * flocks)
    lymphocyte = n[..., 2] < ndtri(chance)
    spindle = ~lymphocyte & (n[..., 3] < ndtri(0.11))
    kept = (lymphocyte | spindle) & _in_view(x, y)

    tile, _ = np.nonzero(kept)
    x, y, n, lymphocyte = x[kept], y[kept], n[kept], lymphocyte[kept]
    size = tiles["nucleus_um"][tile]
    vary = np.exp(0.10 * n[:, 4])
    long = np.where(lymphocyte, 0.5 * LYMPHOCYTE * vary, 0.85 * size * vary)
    short = np.where(lymphocyte, long, 0.24 * size)
    angle = fibre_angle(layout)[tile] + 0.35 * n[:, 5]
    dark = tiles["chromatin"][tile] * np.exp(0.1 * n[:, 5])
    dark *= np.where(lymphocyte, 1.10, 0.85)
    into_gland, _ = _nearest(tile, x, y, shapes)
    apart = into_gland < -0.7 * short - 0.5
    return [column[apart] for column in (tile, x, y, long, short, angle, dark)]


def _in_view(x, y):
    return np.maximum(abs(x), abs(y)) < FIELD_OF_VIEW / 2 + LONGEST


def _nearest(tile, x, y, shapes):
    """`distances` of points to the nearest gland and lumen of their tile."""
    border, lumen = np.full((2, len(tile)), OUTSIDE, np.float32)
    for k in range(SHOWN):
        some = np.flatnonzero(shapes[tile, k, 2] > 0)
        into_gland, into_lumen = distances(x[some], y[some], shapes[tile[some], k].T)
        border[some] = np.maximum(border[some], into_gland)
        lumen[some] = np.maximum(lumen[some], into_lumen)
    return border, lumen
