r"""Tiles of tissue as a microscope shows them, stained with haematoxylin and eosin (H&E).

What ``data_prep.drawn.glands`` lays out becomes pixels: fibres, glands with their lumen, nuclei
one by one; then the two dyes absorb light,

.. math:: I_c = I_{0,c}\, 10^{-(h\, H_c + e\, E_c)} \qquad \text{(Beer-Lambert)},

in the channels c red, green and blue, with the amount h of haematoxylin, which binds to nuclei,
and e of eosin, which binds to all else, the colour of each dye (unit vectors H and E) and the
light of the lamp. Last come the blur of the optics and the noise of the camera. Lengths are in
micrometres.

Source:
    The law and H: Ruifrok and Johnston 2001, Anal Quant Cytol Histol 23, 291-299. Their E, from
    a stain with three dyes, is purple; this one is the default of QuPath, Bankhead et al. 2017,
    https://doi.org/10.1038/s41598-017-17204-5.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from data_prep.drawn.brush import Brush, axis, length, n_waves, over, textures
from data_prep.drawn.glands import (
    FIELD_OF_VIEW,
    LONGEST,
    Layout,
    Nuclei,
    Tiles,
    distance_maps,
    draw,
    fibre_angle,
    glands,
    nuclei,
)
from hallulib.data.checks import area_average

DYES = np.array([[0.65, 0.70, 0.29], [0.2159, 0.8012, 0.5581]])  # H and E: red, green, blue
DYES = (DYES / np.linalg.norm(DYES, axis=1, keepdims=True)).astype(np.float32)
SMALLEST = 64  # pixels a side; smaller tiles are averages of tiles drawn at least this wide
NOISE = 0.012  # of the camera, of full light
WAVES = {  # random texture: shortest and longest wave in um, number of waves
    "fibre": (7.0, 26.0, 18),
    "cleft": (14.0, 40.0, 10),
    "mucin": (6.5, 9.5, 14),
    "grain": (3.5, 8.0, 16),
}


def render(
    tiles: Tiles, seeds: Sequence[Sequence[int]], size: int
) -> UInt8[np.ndarray, "tiles 3 size size"]:
    """Tiles in the colours of the camera.

    Args:
        tiles: the parameters of the tissue, see ``data_prep.drawn.histology``, and of the slide:
            ``haematoxylin`` and ``eosin`` (relative amounts), ``gland_um`` (radius), ``blur_um``
            (standard deviation), ``red``, ``green``, ``blue`` (light of the lamp, 1 is white).
        seeds: of each tile; same seed, parameters and size are the same bytes.
        size: pixels a side.
    """
    width = size * -(-SMALLEST // size)
    um, brush = axis(FIELD_OF_VIEW, width), Brush(FIELD_OF_VIEW / width)
    layout, waves, noise = _random(seeds, width)
    texture = textures(_along_fibres(waves, layout), WAVES, um[None], um[None], brush.pixel)
    shapes = glands(tiles, layout)
    stamped = _stamp(nuclei(tiles, shapes, layout), len(seeds), width, brush)
    h, e = _amounts(tiles, texture, *distance_maps(shapes, um), stamped, brush)
    light = np.stack([tiles[c] for c in ("red", "green", "blue")], -1)
    image = _blurred(transmitted(h, e, light), tiles["blur_um"], um) + NOISE * noise
    levels = np.clip(np.rint(255 * image), 0, 255).astype(np.uint8)
    return levels if width == size else area_average(levels, size)


def transmitted(
    h: Float32[np.ndarray, "tiles height width"],
    e: Float32[np.ndarray, "tiles height width"],
    light: Float32[np.ndarray, "tiles 3"],
) -> Float32[np.ndarray, "tiles 3 height width"]:
    """The light that passes these amounts of the dyes; 1 in all channels is white.

    Args:
        h: haematoxylin, the length of its optical density in red, green and blue.
        e: eosin, likewise.
        light: of the lamp in red, green and blue.
    """
    (hr, hg, hb), (er, eg, eb) = DYES * np.float32(np.log(10))
    exponent = [h * a + e * b for a, b in ((hr, er), (hg, eg), (hb, eb))]
    return light[:, :, None, None] * np.exp(-np.stack(exponent, 1))


def _random(seeds, width):
    """Layout, waves and noise of each tile; the noise last, as its shape depends on the size."""
    drawn = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        noise = lambda rng=rng: rng.standard_normal((3, width, width), np.float32)
        drawn.append((draw(rng), rng.random((n_waves(WAVES), 4)), noise()))
    layouts, waves, noise = zip(*drawn, strict=True)
    layout = Layout(*(np.stack(part) for part in zip(*layouts, strict=True)))
    return layout, np.stack(waves), np.stack(noise)


def _along_fibres(waves, layout):
    """Turns the waves of the fibres across their direction, give or take 15 degrees."""
    fibres = waves[:, : WAVES["fibre"][2], 1]
    fibres *= 1 / 6
    fibres += (fibre_angle(layout) / (2 * np.pi) + 1 / 4 - 1 / 12)[:, None]
    return waves


def _stamp(found: Nuclei, n_tiles, width, brush):
    """Haematoxylin of the nuclei ``(tiles, width, width)``; of two that overlap, the darker."""
    reach = int(np.ceil(LONGEST / brush.pixel + 0.5))
    patch = np.arange(-reach, reach + 1)
    row, column = (
        np.floor((v + FIELD_OF_VIEW / 2) / brush.pixel).astype(int) for v in (found.y, found.x)
    )
    seen = (np.minimum(row, column) >= -reach) & (np.maximum(row, column) < width + reach)
    found, row, column = Nuclei(*(v[seen] for v in found)), row[seen, None], column[seen, None]

    per_nucleus = lambda v: v.astype(np.float32)[:, None, None]
    um = lambda pixels: (pixels + 0.5) * brush.pixel - FIELD_OF_VIEW / 2
    dx = (um(column + patch) - found.x[:, None]).astype(np.float32)[:, None]
    dy = (um(row + patch) - found.y[:, None]).astype(np.float32)[:, :, None]
    c, s, dark = map(per_nucleus, (np.cos(found.angle), np.sin(found.angle), found.dark))
    a, b = (per_nucleus(np.minimum(v, LONGEST)) for v in (found.long, found.short))
    q = length((c * dx + s * dy) / a, (c * dy - s * dx) / b)
    value = brush.inside((1 - q) * np.sqrt(a * b), 0.5) * dark
    value *= 0.72 + 0.28 * np.minimum(q, 1)  # chromatin gathers at the membrane

    side = width + 4 * reach  # a frame takes what lies outside
    canvas = np.zeros((n_tiles, side, side), np.float32)
    first = (found.tile[:, None] * side + row + 2 * reach) * side + column + 2 * reach
    at = first[..., None] + patch[:, None] * side + patch
    np.maximum.at(canvas.reshape(-1), at.ravel(), value.ravel())
    return canvas[:, 2 * reach : 2 * reach + width, 2 * reach : 2 * reach + width]


def _amounts(tiles, texture, border, lumen, stamped, brush):
    """Haematoxylin and eosin of every pixel, from the back to the front."""
    fibre, grain, cleft, mucin = (texture[k] for k in ("fibre", "grain", "cleft", "mucin"))
    disorder, infiltrate = (tiles[k][:, None, None] for k in ("disorder", "infiltrate"))
    e = (0.34 + 0.13 * np.tanh(1.5 * fibre) + 0.03 * grain) * (1 - 0.5 * infiltrate)
    h = 0.04 + 0.015 * fibre
    over(e, 0.03, 0.9 * brush.inside(cleft + 0.8 * fibre - 2.1, 0.4))

    border = border + (0.2 + 2.0 * disorder) * grain
    epithelium = brush.inside(border, 0.5)
    over(e, 0.30 + 0.03 * grain, epithelium)
    over(h, 0.11 + 0.08 * disorder, epithelium)
    # orderly glands hold pale mucin between their nuclei and the lumen
    apical = epithelium * brush.inside(border - 9.0, 1.5) * np.maximum(1 - 1.8 * disorder, 0)
    goblet = 0.85 * apical * brush.inside(3.0 * mucin + 0.3, 1.0)
    over(e, 0.06, goblet)
    over(h, 0.06, goblet)
    e += 0.10 * brush.line(border, 0.8)  # basement membrane
    opening = brush.inside(lumen + (0.3 + 1.5 * disorder) * grain, 0.6)
    over(e, 0.02, opening)
    over(h, 0.01, opening)

    over(e, 0.16, np.minimum(1.6 * stamped, 1))
    h = np.maximum(h, stamped * (0.78 + 0.10 * grain))
    amount = lambda name: tiles[name][:, None, None]
    return np.maximum(h, 0) * amount("haematoxylin"), np.maximum(e, 0) * amount("eosin")


def _blurred(image, blur, um):
    """Gaussian blur of this standard deviation, as two matrix products; edges are renormalised."""
    kernel = np.exp(-0.5 * ((um[:, None] - um) / blur[:, None, None]) ** 2)
    kernel = (kernel / kernel.sum(2, keepdims=True))[:, None]
    return kernel @ image @ kernel.transpose(0, 1, 3, 2)
