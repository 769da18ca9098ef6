r"""One mammogram in a DICOM file to one square: the breast alone, its chest wall to the left.

    pixels as displayed --coarse copy--> breast --box, flip, contrast--> uint8 (size, size)

The breast is the largest bright piece of the image; burnt-in labels, film edges and the scanner's
background become black. It is looked for in a copy of at most `COARSE` pixels, and windows are
applied to bands of rows: 10 million pixels take 0.2 GB, the 36 million of a large film 0.65 GB.
"""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from scipy import ndimage

from data_prep.crop import HIGH, LOW, ends, to_bytes
from data_prep.dicom import LARGEST, PIXEL_TAGS, read_tags, silent
from data_prep.volumes import Fault
from hallulib.area import area_average

TAGS = (  # all that is read of a file; none of it is written
    *PIXEL_TAGS,
    "ModalityLUTSequence",
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
    "PresentationLUTShape",
)
BAND = 256  # rows that are windowed together, in float64
COARSE = 512  # longer side, at most, of the copy in which the breast is looked for
DARK = 0.25  # of the way from background to Otsu's threshold: skin and fat belong to the breast
THIN = 1 / 64  # of the longer side: what is thinner than twice this, or hangs on it, is no breast
SMALLEST = 0.01  # of the image: a smaller piece is no breast
STEPS = (
    "as displayed: rescale, first window (VOI LUT), MONOCHROME1 or INVERSE inverted",
    f"breast: largest piece above background + {DARK:g} (Otsu's threshold - background), opened,"
    f" holes filled, in a copy of at most {COARSE} pixels; all else black",
    f"percentiles {LOW:g} to {HIGH:g} of the breast to 0 to 255",
    "box of the breast, chest wall to the left, padded to a square at right, above and below",
)


def read(file: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """The breast of one file.

    Args:
        file: DICOM, one grey image.
        size: side of the square, in pixels.

    Returns:
        uint8 (size, size), and notes of what was odd.

    Raises:
        Fault: it is not a whole DICOM file of one grey image with a breast larger than ``size``,
            or its compression cannot be decoded.
    """
    pixels, notes = displayed(file)
    square, odd = to_square(pixels, size, str(file))
    return square, notes + odd


def displayed(file: Path) -> tuple[np.ndarray, list[str]]:
    """The pixels as a viewer shows them, dense tissue bright; of the tags, only `TAGS` are read.

    Returns:
        float32 (rows, columns), and notes.

    Raises:
        Fault: see `read`.
    """
    try:
        with silent():
            found = read_tags(file, TAGS)
            for element in list(found):
                if element.is_empty:  # as if it were not there, for pydicom
                    del found[element.tag]
            _check(found, file)
            pixels = _windowed(found.pixel_array, found)
            if not np.isfinite(pixels).all():
                raise ValueError("not finite")
            inverse = found.get("PresentationLUTShape", "").strip().upper() == "INVERSE"
            windows = _windows(found)
    except Fault:
        raise
    except Exception as error:  # its text may hold what a tag says
        raise Fault(
            f"{file}: cannot be read as DICOM ({type(error).__name__}); a whole file with one grey"
            " image is needed",
            "unreadable DICOM file",
        ) from None
    notes = ["image with several windows: the first taken"] * (windows > 1)
    if inverse or found.PhotometricInterpretation == "MONOCHROME1":  # two names for one thing
        np.subtract(pixels.max(), pixels, out=pixels)
        notes.append("image stored as negative: inverted")
    return pixels, notes


def to_square(pixels: np.ndarray, size: int, told: str) -> tuple[np.ndarray, list[str]]:
    """Cuts out the breast, sets its contrast, turns it, pads it and makes it smaller.

    Args:
        pixels: float32 (rows, columns), dense tissue bright.
        size: side of the square, in pixels.
        told: how messages call the image.

    Returns:
        uint8 (size, size), and notes.

    Raises:
        Fault: no breast, no contrast, or a breast smaller than ``size``.
    """
    mask, place, notes = breast(pixels, told)
    pixels = pixels[place]
    if max(pixels.shape) < size:
        raise Fault(
            f"{told}: the breast is {max(pixels.shape)} pixels long and --size is {size};"
            " enlarging invents detail, so a smaller --size is needed",
            "breast smaller than --size",
        )
    black, white = ends(pixels[mask])
    if not white > black:
        raise Fault(f"{told}: the breast has no contrast; it must show tissue", "no contrast")
    grey = to_bytes(pixels, black, white)
    grey[~mask] = 0
    # the breast is widest at the chest wall, so its columns gather there
    columns = mask.sum(axis=0)
    if columns @ np.arange(len(columns)) > columns.sum() * (len(columns) - 1) / 2:
        grey = grey[:, ::-1]
        notes.append("chest wall at right: flipped")
    return area_average(_padded(grey)[None], size)[0], notes


def breast(pixels: np.ndarray, told: str) -> tuple[np.ndarray, tuple[slice, slice], list[str]]:
    """Finds the breast.

    Returns:
        Its mask within its box, bool; the box, as slices of rows and columns; and notes.

    Raises:
        Fault: there is none.
    """
    step = -(-max(pixels.shape) // COARSE)
    coarse = _block_means(pixels, step)
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


def _check(found: pydicom.Dataset, file: Path) -> None:
    syntax = found.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise Fault(
            f"{file}: compressed as {syntax.name}, which cannot be decoded here; uncompressed,"
            " JPEG 2000 or RLE pixels are needed (gdcmconv --raw makes them)",
            "compression that cannot be decoded",
        )
    shape, kind = (found.Rows, found.Columns), found.PhotometricInterpretation
    single = found.get("SamplesPerPixel", 1) == 1 and int(found.get("NumberOfFrames", 1)) == 1
    if not single or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Fault(f"{file}: not one grey image; one is needed", "not one grey image")
    if not 0 < shape[0] * shape[1] <= LARGEST:
        found = f"{shape[0]} x {shape[1]} pixels"
        raise Fault(f"{file}: {found}; 1 to {LARGEST} are needed", "image of impossible size")


def _windowed(raw: np.ndarray, found: pydicom.Dataset) -> np.ndarray:
    shown = np.empty(raw.shape, np.float32)
    for top in range(0, len(raw), BAND):
        band = apply_modality_lut(raw[top : top + BAND], found)
        shown[top : top + BAND] = apply_voi_lut(band, found)
    return shown


def _windows(found: pydicom.Dataset) -> int:
    """How many views the file offers."""
    if "VOILUTSequence" in found:
        return len(found.VOILUTSequence)
    return found["WindowCenter"].VM if "WindowCenter" in found else 0


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
