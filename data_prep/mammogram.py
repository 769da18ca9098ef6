r"""One mammogram to one square: the breast alone, its chest wall to the left.

    pixels as displayed --coarse copy--> breast --box, flip, contrast--> uint8 (size, size)

The breast is the largest bright piece of the image; burnt-in labels, film edges and the scanner's
background become black. It is looked for in a copy of at most `COARSE` pixels, and windows are
applied to bands of rows: 10 million pixels take 0.2 GB, the 36 million of a large film 0.65 GB.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from data_prep import grey, pictures
from data_prep.crop import HIGH, LOW, to_bytes
from data_prep.dicom import read_tags, silent
from data_prep.volumes import Fault
from hallulib import UserError
from hallulib.data.checks import area_average

COARSE = 512  # longer side, at most, of the copy in which the breast is looked for
DARK = 0.25  # of the way from background to Otsu's threshold: skin and fat belong to the breast
THIN = 1 / 64  # of the longer side: what is thinner than twice this, or hangs on it, is no breast
FULL, EMPTY = 0.95, 0.5  # of a line at the edge: saturated as a strip, and as the film beside it
SMALLEST = 0.01  # of the image: a smaller piece is no breast
STEPS = (
    "as displayed: rescale, first window (VOI LUT), MONOCHROME1 or INVERSE inverted; pixel padding"
    " as background",
    "thin saturated strips along the edges cut off",
    f"breast: largest piece above background + {DARK:g} (Otsu's threshold - background), opened,"
    f" holes filled, in a copy of at most {COARSE} pixels; all else black",
    f"percentiles {LOW:g} to {HIGH:g} of the breast to 0 to 255",
    "box of the breast, chest wall to the left, padded to a square at right, above and below",
)


def read(file: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """The breast of one file.

    Args:
        file: DICOM, one grey image; or a positive copy of it as a picture.
        size: side of the square, in pixels.

    Returns:
        uint8 (size, size), and notes of what was odd.

    Raises:
        Fault: it is not a whole file of one grey image with a breast larger than ``size``, or
            cannot be displayed as it asks.
    """
    pixels, notes = displayed(file)
    square, odd = to_square(pixels, size, str(file))
    return square, notes + odd


def displayed(file: Path) -> tuple[np.ma.MaskedArray, list[str]]:
    """The pixels as a viewer shows them; of the tags, only `grey.SHOWN_TAGS` are read.

    Returns:
        float32 (rows, columns), pixel padding masked, and notes.

    Raises:
        Fault: see `read`.
    """
    if file.suffix.lower() in pictures.SUFFIXES:
        return _picture(file)
    try:
        with silent():
            found = read_tags(file, grey.SHOWN_TAGS)
            pixels, notes = grey.displayed(found, str(file))
            if not np.isfinite(pixels).all():
                raise ValueError("not finite")
    except Fault:
        raise
    except Exception as error:  # its text may hold what a tag says
        raise Fault(
            f"{file}: cannot be read as DICOM ({type(error).__name__}); a whole file with one grey"
            " image is needed",
            "unreadable DICOM file",
        ) from None
    return pixels, notes


def to_square(pixels: np.ndarray, size: int, told: str) -> tuple[np.ndarray, list[str]]:
    """Cuts out the breast, sets its contrast, turns it, pads it and makes it smaller.

    Args:
        pixels: float32 (rows, columns), dense tissue bright; what is no image may be masked.
        size: side of the square, in pixels.
        told: how messages call the image.

    Returns:
        uint8 (size, size), and notes.

    Raises:
        Fault: no breast, no contrast, or a breast smaller than ``size``.
    """
    inner = _within_strips(np.ma.getdata(pixels))
    notes = ["saturated strip along an edge: cut off"] * (pixels[inner].shape != pixels.shape)
    mask, place, odd = breast(pixels[inner], told)
    notes += odd
    pixels = np.ma.getdata(pixels[inner][place])
    if max(pixels.shape) < size:
        raise Fault(
            f"{told}: the breast is {max(pixels.shape)} pixels long and --size is {size};"
            " enlarging invents detail, so a smaller --size is needed",
            "breast smaller than --size",
        )
    # a blank breast shall not get its contrast from the air at its outline
    black, white = (float(end) for end in np.percentile(pixels[mask], [LOW, HIGH]))
    if not white > black:
        raise Fault(f"{told}: the breast has no contrast; it must show tissue", "no contrast")
    shown = to_bytes(pixels, black, white)
    shown[~mask] = 0
    # the breast is widest at the chest wall, so its columns gather there
    columns = mask.sum(axis=0)
    if columns @ np.arange(len(columns)) > columns.sum() * (len(columns) - 1) / 2:
        shown = shown[:, ::-1]
        notes.append("chest wall at right: flipped")
    return area_average(_padded(shown)[None], size)[0], notes


def breast(pixels: np.ndarray, told: str) -> tuple[np.ndarray, tuple[slice, slice], list[str]]:
    """Finds the breast.

    Args:
        pixels: see `to_square`.
        told: how messages call the image.

    Returns:
        Its mask within its box, bool; the box, as slices of rows and columns; and notes.

    Raises:
        Fault: there is none.
    """
    step = -(-max(pixels.shape) // COARSE)
    coarse = _block_means(np.ma.getdata(pixels), step)
    background = np.percentile(coarse, 5)
    bright = coarse > background + DARK * (otsu(coarse) - background)
    thin = max(1, round(max(coarse.shape) * THIN))
    core, n = _largest(ndimage.binary_opening(bright, iterations=thin))
    if core.sum() < SMALLEST * coarse.size:
        raise Fault(
            f"{told}: no breast: nothing large is brighter than the background; an image of one"
            " is needed",
            "no breast found",
        )
    # nipple and corners come back; what hangs on a thin bridge does not
    mask, _ = _largest(bright & ndimage.binary_dilation(core, iterations=thin))
    mask = ndimage.binary_fill_holes(mask)
    if np.ma.is_masked(pixels):
        mask &= _block_means(pixels.mask, step) < 1
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    notes = ["bright pieces beside the breast: set to black"] * (n > 1)
    if columns.start > 0 and columns.stop < mask.shape[1]:
        notes.append("breast that reaches neither side of the image")
    fine = mask[rows, columns].repeat(step, axis=0).repeat(step, axis=1)
    return fine, tuple(slice(s.start * step, s.stop * step) for s in (rows, columns)), notes


def otsu(x: np.ndarray) -> float:
    r"""The threshold that divides values into two classes of largest variance between them.

    .. math:: \max_t\; w_0(t)\, w_1(t)\, (\mu_0(t) - \mu_1(t))^2

    Args:
        x: finite values, of any shape; a histogram of 256 bins stands for them.

    Source:
        Otsu, IEEE Transactions on Systems, Man and Cybernetics 9 (1979).
    """
    counts, edges = np.histogram(x, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * middles)[:-1]
    share, mean = below / x.size, counts @ middles / x.size
    between = (mean * share - total / x.size) ** 2 / (share * (1 - share) + 1e-12)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[1 + best].mean())  # the middle, where a gap leaves several equally good


def _picture(file: Path) -> tuple[np.ma.MaskedArray, list[str]]:
    try:
        pixels = pictures.read(file, grey=True)
    except UserError as error:
        raise Fault(str(error), "unreadable picture") from error
    notes = ["film read from a picture: grey values as they are"]
    return np.ma.masked_array(pixels, dtype=np.float32), notes


def _within_strips(pixels: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns without the thin bands along the edges that are saturated end to end."""
    saturated, thin = pixels == pixels.max(), max(1, round(max(pixels.shape) * THIN))
    shares = [saturated.mean(axis=1), saturated.mean(axis=0)]
    return tuple(slice(_strip(x, thin), len(x) - _strip(x[::-1], thin)) for x in shares)


def _strip(shares: np.ndarray, thin: int) -> int:
    """How many lines at the start are a strip, by the share of each that is saturated."""
    lines = int((shares < FULL).argmax())
    # tissue that is saturated at the chest wall has no such edge
    return lines if lines <= thin and shares[lines] < EMPTY else 0


def _largest(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The largest piece of a mask, and how many there are."""
    pieces, n = ndimage.label(mask)
    areas = np.bincount(pieces.ravel(), minlength=2)[1:]
    return pieces == areas.argmax() + 1, n


def _block_means(pixels: np.ndarray, step: int) -> np.ndarray:
    """Means of blocks of step x step pixels; what is left over at right and below is cut off."""
    rows, columns = (n // step for n in pixels.shape)
    blocks = pixels[: rows * step, : columns * step].reshape(rows, step, columns, step)
    return blocks.mean(axis=(1, 3))


def _padded(grey: np.ndarray) -> np.ndarray:
    """Black at right, so that the chest wall stays at the left side; above and below alike."""
    height, width = grey.shape
    side = max(height, width)
    square, top = np.zeros((side, side), np.uint8), (side - height) // 2
    square[top : top + height, :width] = grey
    return square
