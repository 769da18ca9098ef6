"""T2W series of DICOM files as volumes; nothing but the tags listed here is ever read."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from data_prep import grey
from data_prep.volumes import Fault, Volume, turned

HEADER_TAGS = (  # all that is read of a DICOM file to choose a series; none of it is written
    "Modality",
    "SeriesInstanceUID",
    "SeriesDescription",
    "SeriesNumber",
    "NumberOfFrames",
    "ImageOrientationPatient",
    "PixelSpacing",
)
IMAGE_TAGS = (  # all that is read of a slice
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    *grey.TAGS,
)
SAME_TAGS = (  # what stored values mean; if one slice says otherwise, it or its file is another
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
)
SAME_FRAME = 1e-4  # directions and spacings of the slices of a series may differ by this
ON_LINE_MM = 0.1  # slices may be this far from equal steps along a line


def read_series(files: Sequence[Path], told: str) -> Volume:
    """Reads the slices of one DICOM series and puts them in order by position.

    Only `IMAGE_TAGS` are read; the pixels are rescaled, and padding is dark.

    Args:
        files: one per slice, in any order.
        told: how messages call the series.

    Raises:
        Fault: a file is truncated, damaged or of another kind; slices differ in shape, spacing,
            direction or in what their values mean, share a position, or one is missing.
    """
    slices = [_read_slice(Path(file)) for file in files]
    if len(slices) < 2:
        raise Fault(f"{told}: one slice; a volume of at least two is needed", "one slice only")
    _, frame, first, meaning = slices[0]
    for _, other, pixels, means in slices[1:]:
        if pixels.shape != first.shape or np.abs(other - frame).max() > SAME_FRAME:
            raise Fault(
                f"{told}: slices differ in shape, spacing or direction; one series is needed",
                "slices of different geometry",
            )
        if means != meaning:
            raise Fault(
                f"{told}: slices differ in sign, padding or rescaling of their pixels; one meaning"
                " of grey values is needed",
                "slices of different grey values",
            )
    right, down, (between_rows, between_columns) = np.split(frame, [3, 6])
    slices.sort(key=lambda one: one[0] @ np.cross(right, down))
    positions = np.array([position for position, *_ in slices])
    voxels = np.stack([pixels for _, _, pixels, _ in slices])
    steps = np.stack([_line(positions, told), down * between_rows, right * between_columns])
    return turned(Volume(voxels, positions[0], steps), told)


def read_header(file: Path) -> pydicom.Dataset:
    """The `HEADER_TAGS` of a DICOM file.

    Raises:
        Fault: it cannot be read.
    """
    try:
        with silent():
            header = read_tags(file, HEADER_TAGS, stop_before_pixels=True)
            for element in header:  # converts now, so that a bad value is found here
                element.value  # noqa: B018
            return header
    except Exception as error:  # its text may hold what a tag says
        raise _unreadable(file, error) from None


def read_tags(file: Path, tags: Sequence[str], **options) -> pydicom.Dataset:
    """These tags of a DICOM file and no other.

    Raises:
        ValueError: it is deflated as a whole: pydicom would unpack all of it, terabytes perhaps;
            or the type of a tag is damaged.
        Exception: whatever else pydicom throws at a damaged file.
    """
    meta = pydicom.filereader.read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise ValueError("deflated")
    found = pydicom.dcmread(file, force=False, specific_tags=tags, **options)
    implicit, _ = found.original_encoding
    if not implicit and any(found.get_item(tag).VR is None for tag in found.keys()):  # noqa: SIM118
        raise ValueError("a tag without a type, whose value pydicom would begin elsewhere")
    return found


def _line(positions: np.ndarray, told: str) -> np.ndarray:
    """The step between slices, if all are on one line at equal distances."""
    steps = np.diff(positions, axis=0)
    if (np.linalg.norm(steps, axis=1) < ON_LINE_MM).any():
        raise Fault(
            f"{told}: two slices at the same position; one is needed", "two slices at one place"
        )
    along = (positions[-1] - positions[0]) / (len(positions) - 1)
    off = positions - positions[0] - np.arange(len(positions))[:, None] * along
    if np.abs(off).max() > ON_LINE_MM:
        lengths = np.linalg.norm(steps, axis=1)
        raise Fault(
            f"{told}: slices are {lengths.min():.2f} to {lengths.max():.2f} mm apart or off a"
            " line, as if one were missing; equal steps are needed",
            "slice missing or unequal steps",
        )
    return along


def _read_slice(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """Position, frame (directions of a row and of a column, spacing; together 8), pixels and the
    `SAME_TAGS`.
    """
    try:
        with silent():
            found = read_tags(file, IMAGE_TAGS)
            values, blank, _ = grey.stored(found, str(file))
            pixels = grey.rescaled(values, found, np.float32, str(file))
            grey.darken(pixels, blank, str(file))
            if grey.is_negative(found):
                told = f"{file}: is stored as a negative; single MONOCHROME2 slices are needed"
                raise Fault(told, "not a grey slice")
            position = np.array(found.ImagePositionPatient, float)
            frame = np.array([*found.ImageOrientationPatient, *found.PixelSpacing], float)
    except Fault:
        raise
    except Exception as error:  # its text may hold what a tag says
        raise _unreadable(file, error) from None
    finite = all(np.isfinite(part).all() for part in (position, frame, pixels))
    if position.shape != (3,) or frame.shape != (8,) or not finite:
        raise _unreadable(file, ValueError())
    return position, frame, pixels, [found.get(name) for name in SAME_TAGS]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without pydicom's remarks, which quote the values of tags."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _unreadable(file: Path, error: Exception) -> Fault:
    return Fault(
        f"{file}: cannot be read as DICOM ({type(error).__name__}); a whole file with position,"
        " orientation, spacing and uncompressed pixels is needed",
        "unreadable DICOM file",
    )
