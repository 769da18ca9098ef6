r"""The grey values of one DICOM file: which bits count, what is no image, and what is bright.

    words --HighBit, BitsStored, sign--> stored --rescale--> rescaled --window--> displayed

Mammograms and MR series are read by the same functions, so none of this is decided twice. What
cannot be displayed as its file asks is refused.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import apply_windowing, get_decoder

from data_prep.volumes import Fault

OVERLAY_BIT = 0x6000_0102  # the tag of its position, for the first of 16 overlays
TAGS: tuple[str | int, ...] = (  # all that is read of a file to get its grey values
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PresentationLUTShape",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "PixelData",
    *(OVERLAY_BIT + (group << 17) for group in range(16)),
)
SHOWN_TAGS = (  # and to display them
    *TAGS,
    "VOILUTSequence",
    "VOILUTFunction",
    "WindowCenter",
    "WindowWidth",
)
LARGEST = 2**26  # pixels; the largest scanned films have about 35 million
NARROWEST = {"LINEAR": 1, "LINEAR_EXACT": 0, "SIGMOID": 0}  # window; PS3.3 C.11.2.1
BAND = 256  # rows that are windowed together, in float64


def displayed(found: pydicom.Dataset, told: str) -> tuple[np.ma.MaskedArray, list[str]]:
    """The image as a viewer shows it: greater is brighter.

    Args:
        found: the `SHOWN_TAGS` of a file.
        told: how messages call the file.

    Returns:
        float32 (rows, columns), with padding masked and dark; and notes.

    Raises:
        Fault: it is not one grey image, or cannot be displayed as the file asks.
        Exception: whatever else pydicom throws at a damaged file.
    """
    values, blank, notes = stored(found, told)
    show, views = _view(found, told)
    pixels = np.empty(values.shape, np.float32)
    for top in range(0, len(values), BAND):
        pixels[top : top + BAND] = show(
            rescaled(values[top : top + BAND], found, np.float64, told)
        )
    notes += ["image with several windows: the first taken"] * (views > 1)
    if is_negative(found):
        np.subtract(pixels.max(), pixels, out=pixels)
        notes.append("image stored as negative: inverted")
    darken(pixels, blank, told)
    return np.ma.masked_array(pixels, blank), notes


def stored(found: pydicom.Dataset, told: str) -> tuple[np.ndarray, Any, list[str]]:
    """The values that a file stores, before they are rescaled.

    Args:
        found: the `TAGS` of a file; empty ones are removed.
        told: how messages call the file.

    Returns:
        Integers (rows, columns); where they are padding, bool of this shape or `numpy.ma.nomask`;
        and notes.

    Raises:
        Fault: it is not one grey image, or bits are set that belong neither to the values nor to
            an overlay.
        Exception: whatever else pydicom throws at a damaged file.
    """
    for element in list(found):
        if element.is_empty:  # as if it were not there, for pydicom
            del found[element.tag]
    _check(found, told)
    words = _words(found)
    if words.ndim != 2:
        raise _not_one(told)
    size, bits = 8 * words.itemsize, found.BitsStored
    said = found.HighBit + 1 - bits
    for lowest in dict.fromkeys((said, 0)):
        if not 0 <= lowest <= size - bits < size:
            continue
        # to the left until the highest bit is the sign, and back
        values = words << (size - bits - lowest) >> (size - bits)
        blank = _padding(found, words, values, lowest)
        if not _lost(found, words, values, lowest)[~blank].any():
            notes = ["image with pixel padding: background"] * bool(blank.any())
            notes += ["HighBit that does not fit the pixels"] * (lowest != said)
            return values, blank if blank.any() else np.ma.nomask, notes
    raise Fault(
        f"{told}: pixels have bits beyond the {bits} of BitsStored up to HighBit {found.HighBit},"
        " which would wrap or be noise; numbers that fit, or the tag of an overlay, are needed",
        "pixels beyond BitsStored",
    )


def rescaled(values: np.ndarray, found: pydicom.Dataset, kind: type, told: str) -> np.ndarray:
    """Values by the file's modality lookup table, or by its slope and intercept.

    Args:
        values: as stored.
        found: the `TAGS` of the file.
        kind: float32 or float64, in which to reckon.
        told: how messages call the file.

    Raises:
        Fault: the table or the slope is impossible.
    """
    if "ModalityLUTSequence" in found:
        return _looked_up(values, *_table(found.ModalityLUTSequence[0], found, told)).astype(kind)
    slope, shift = float(found.get("RescaleSlope", 1)), float(found.get("RescaleIntercept", 0))
    # so that neighbours stay apart, also for the nan that comes of infinity
    if not np.finfo(np.float32).tiny <= abs(slope) >= np.spacing(np.float32(abs(shift))):
        raise Fault(
            f"{told}: rescaling by slope {slope:g} and intercept {shift:g} loses grey values; a"
            " slope that float32 tells from 0 beside the intercept is needed",
            "impossible rescaling",
        )
    return values.astype(kind) * kind(slope) + kind(shift)


def is_negative(found: pydicom.Dataset) -> bool:
    """Whether greater is darker, by either of the two names that DICOM has for it."""
    shape = found.get("PresentationLUTShape", "").strip().upper()
    return found.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def darken(pixels: np.ndarray, blank: Any, told: str) -> None:
    """Makes padding a background, in place, where it is none.

    It is none where it is brighter than the darkest pixel of the image, or darker by more than the
    image's range, which would hide the air. Then it becomes as dark as the darkest pixel.

    Args:
        pixels: greater is brighter.
        blank: where they are padding, see `stored`.
        told: how messages call the file.

    Raises:
        Fault: there is nothing but padding.
    """
    if blank is np.ma.nomask:
        return
    image = pixels[~blank]
    if not image.size:
        raise Fault(f"{told}: all pixels are padding; an image is needed", "no image but padding")
    least, most = image.min(), image.max()
    none = (pixels > least) | (pixels < 2 * least - most)
    np.copyto(pixels, least, where=blank & none)


def _check(found: pydicom.Dataset, told: str) -> None:
    syntax, shape = found.file_meta.TransferSyntaxUID, (found.Rows, found.Columns)
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise Fault(
            f"{told}: compressed as {syntax.name}, which cannot be decoded here; uncompressed,"
            " JPEG 2000 or RLE pixels are needed (gdcmconv --raw makes them)",
            "compression that cannot be decoded",
        )
    single = found.get("SamplesPerPixel", 1) == 1 and int(found.get("NumberOfFrames") or 1) == 1
    if not single or found.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise _not_one(told)
    if not 0 < shape[0] * shape[1] <= LARGEST:
        size = f"{shape[0]} x {shape[1]} pixels"
        raise Fault(f"{told}: {size}; 1 to {LARGEST} are needed", "image of impossible size")
    spare = len(found.PixelData) - shape[0] * shape[1] * found.BitsAllocated // 8
    if not syntax.is_encapsulated and spare >= min(shape) * found.BitsAllocated // 8:
        raise Fault(
            f"{told}: has {spare} bytes more than {shape[0]} x {shape[1]} pixels; Rows and Columns"
            " that fit are needed",
            "pixels of another size",
        )


def _not_one(told: str) -> Fault:
    return Fault(
        f"{told}: not one grey image; one is needed (emf2sf of dcm4che divides files of several"
        " frames)",
        "not one grey image",
    )


def _words(found: pydicom.Dataset) -> np.ndarray:
    """The pixels with all their bits, in the byte order of this machine."""
    with warnings.catch_warnings():
        # a run that is too long moves all that follows
        warnings.filterwarnings("error", "The decoded RLE segment contains non-conformant padding")
        decoder = get_decoder(found.file_meta.TransferSyntaxUID)
        words, _ = decoder.as_array(found, correct_unused_bits=False)
    return words.astype(words.dtype.newbyteorder("="), copy=False)


def _padding(
    found: pydicom.Dataset, words: np.ndarray, values: np.ndarray, lowest: int
) -> np.ndarray:
    """Where pixels have the padding value, or lie between it and its limit."""
    if "PixelPaddingValue" not in found:
        return np.zeros(words.shape, bool)
    ends = [found.PixelPaddingValue, found.get("PixelPaddingRangeLimit", found.PixelPaddingValue)]
    low, high = np.sort(np.array(ends).astype(words.dtype))  # -2000 and 63536 are one word
    blank = (values >= low) & (values <= high)
    if lowest == 0:  # padding may lie beyond BitsStored
        blank |= (words >= low) & (words <= high)
    return blank


def _lost(
    found: pydicom.Dataset, words: np.ndarray, values: np.ndarray, lowest: int
) -> np.ndarray:
    """Where bits are set that are neither of the value, nor its sign, nor of an overlay."""
    unsigned = words.view(f"u{words.itemsize}")
    used = (2**found.BitsStored - 1) << lowest
    for element in found:
        if element.tag & 0xFF00_FFFF == OVERLAY_BIT and element.value > 0:
            used |= 1 << element.value
    others = unsigned.dtype.type(~used & (2 ** (8 * words.itemsize) - 1))
    signs = unsigned ^ (values << lowest).view(unsigned.dtype)
    return (unsigned & others != 0) & (signs & others != 0)


def _view(found: pydicom.Dataset, told: str) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """What the first lookup table or window makes of rescaled values; how many the file has."""
    tables = found.get("VOILUTSequence", [])
    if tables and "LUTDescriptor" in tables[0] and "LUTData" in tables[0]:
        first, table = _table(tables[0], found, told)
        return lambda x: _looked_up(x, first, table), len(tables)
    if "WindowCenter" not in found and "WindowWidth" not in found:
        return lambda x: x, 0
    _check_window(found, told)
    view = pydicom.Dataset()
    view.update(found)
    if "RescaleSlope" in found:
        # pydicom spreads the window over the rescaled range, which must not run downwards
        view.add_new("RescaleSlope", "DS", abs(found.RescaleSlope))
    return lambda x: apply_windowing(x, view), found["WindowCenter"].VM


def _check_window(found: pydicom.Dataset, told: str) -> None:
    function = found.get("VOILUTFunction", "LINEAR").upper()
    ends = [np.atleast_1d(found.get(name, np.nan))[0] for name in ("WindowCenter", "WindowWidth")]
    centre, width = np.array(ends, float)
    narrowest = NARROWEST.get(function, np.inf)
    if not np.isfinite([centre, width]).all() or width <= 0 or width < narrowest:
        raise Fault(
            f"{told}: a window of centre {centre:g} and width {width:g} cannot be displayed;"
            " finite numbers, a function of the standard and a width above 0 (LINEAR: at least 1)"
            " are needed",
            "unreadable DICOM file",
        )


def _table(item: pydicom.Dataset, found: pydicom.Dataset, told: str) -> tuple[int, np.ndarray]:
    """The first value that a lookup table maps, and what it maps it and its followers to."""
    entries, first, _ = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        order = "<" if found.file_meta.TransferSyntaxUID.is_little_endian else ">"
        table = np.frombuffer(table, f"{order}u2")
    table, entries = np.atleast_1d(table), entries % 2**16 or 2**16  # 0 or, signed, below 0
    if len(table) != entries:
        raise Fault(
            f"{told}: a lookup table says {entries} entries and has {len(table)}; as many as it"
            " says are needed",
            "impossible lookup table",
        )
    return first, table


def _looked_up(values: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    """Values before and after a table are its first and last."""
    return table[np.clip(values.astype(float) - first, 0, len(table) - 1).astype(np.intp)]
