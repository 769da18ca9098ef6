"""Image files, read in blocks: what archives that are folders of pictures share."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep import pictures
from data_prep.staging import Fault, File, Study
from data_prep.tiles import Blanks
from hallulib import UserError

BLOCK = 64  # files read by one worker at a time
HIDDEN = "image in a hidden folder left out"
UNREAD = set(
    ".webp .gif .heic .heif .avif .jp2 .j2k .jxl .ppm .pgm .pbm .tga .psd .svg .pdf .dcm .dicom"
    " .nii .gz .mha .mhd .nrrd .svs .ndpi .mrxs .npz .mat .h5 .mp4 .avi .zip .tar .rar .7z".split()
)  # images, or files of images, in formats that are not read


@dataclass(frozen=True)
class Block:
    """Files read together, and the row of each."""

    key: str
    files: tuple[File, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class Reading:
    """How pictures become images.

    Args:
        size: side of the images, in pixels.
        fit: how to make squares, ``"pad"`` or ``"crop"``.
        channels: 1 or 3, as the first file of all.
        to_grey: turn colour into grey.
        shape: (height, width) that every file must have, if they are to be alike.
        blanks: what becomes of blank tiles.
    """

    size: int
    fit: str = "pad"
    channels: int = 3
    to_grey: bool = False
    shape: tuple[int, int] | None = None
    blanks: Blanks = Blanks()


def folders(root: Path) -> list[Path]:
    """The folders right in a folder, sorted; hidden ones and that of macOS do not count."""
    found = (f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    return sorted(f for f in found if f.name != "__MACOSX")


def images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files right in a folder, sorted, and the other files; hidden ones do not count.

    A link that leads nowhere counts as the file that it was, so that nobody overlooks the loss.
    """
    seen = [f for f in sorted(folder.iterdir()) if not f.name.startswith(".")]
    seen = [f for f in seen if f.is_file() or (f.is_symlink() and not f.is_dir())]
    parts: tuple[list[Path], list[Path]] = [], []
    for file in seen:
        parts[file.suffix.lower() not in pictures.SUFFIXES].append(file)
    return parts


def hidden(folder: Path) -> list[str]:
    """A note for each image right in a hidden folder, where editors keep their copies."""
    dark = [f for f in folder.iterdir() if f.name.startswith(".") and f.is_dir()]
    return [HIDDEN for inner in dark for _ in images(inner)[0]]


def left_out(file: Path, place: str = "") -> str:
    """The note on a file that is not read; only known suffixes, since others may name a patient.

    Args:
        file: its path.
        place: where it is, if that may be told.
    """
    suffix = file.suffix.lower()
    kind = f"{suffix} file" if suffix in UNREAD else "file that is not an image"
    return f"{kind}{place} left out"


def identity(file: Path) -> tuple[int, int]:
    """What tells files apart, however their paths are spelt and whatever links lead to them.

    Raises:
        UserError: there is none, as where a link leads nowhere.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; a file that can be read is needed") from error
    return found.st_dev, found.st_ino


def blocks(plan: pd.DataFrame, columns: Mapping[str, str]) -> Iterator[Block]:
    """The plan in blocks of neighbours.

    Args:
        plan: strings, one row per image: ``file``, ``patient``, ``split`` and more; the index
            becomes the column ``item``.
        columns: further columns to write -> columns of the plan.
    """
    columns = {"patient": "patient", "split": "split"} | columns
    for number, start in enumerate(range(0, len(plan), BLOCK)):
        part = plan.iloc[start : start + BLOCK]
        rows = []
        for item, row in zip(part.index, part.to_dict("records"), strict=True):
            told = {name: row[column] for name, column in columns.items() if row[column]}
            rows.append(tuple((told | {"item": str(item)}).items()))
        found = tuple(File.of(Path(file)) for file in part["file"])
        yield Block(f"block {number}", found, tuple(rows))


def are_grey(files: Iterable[str]) -> bool:
    """Whether the first file that can be read is grey."""
    for file in files:
        with contextlib.suppress(UserError):  # which is told when it is read with the others
            return pictures.read(Path(file)).ndim == 2
    return False


def read_block(block: Block, how: Reading) -> Study:
    """Reads the files of a block.

    Returns:
        What could be read; and a fault for each file that cannot, is not of the shape that is
        asked for, has another number of channels or is too small.
    """
    kept, rows, notes, faults = [], [], [], []
    for file, row in zip(block.files, block.rows, strict=True):
        try:
            square, odd = _square(file.path, how)
        except Exception as error:
            faults.append(Fault.of(file.path, error))
            continue
        stays, blank = how.blanks.check(square.pixels, square.around, square.colour)
        notes += odd + blank
        if stays:
            kept.append(square.average(how.size))
            rows.append(dict(row))
    return Study(kept, rows, notes, faults)


def _square(path: str, how: Reading) -> tuple[pictures.Square, list[str]]:
    """One file, its side at least the size asked for; and notes."""
    notes = []
    pixels = pictures.read(Path(path), how.to_grey, notes)
    if (pixels.ndim == 3) != (how.channels == 3):
        kinds = ("grey", "colour") if how.channels == 3 else ("colour", "grey")
        raise Fault(
            f"{path}: {kinds[0]} among {kinds[1]} images; all must be alike, and --grey of the"
            " archive folder makes them grey",
            f"{kinds[0]} among {kinds[1]} images",
        )
    if how.shape and pixels.shape[:2] != how.shape:
        found, needed = (f"{h} x {w}" for h, w in (pixels.shape[:2], how.shape))
        raise Fault(
            f"{path}: {found} pixels; {needed} are needed, as in the whole archive",
            "image of another size than the archive's",
        )
    pixels, deep = pictures.to_bytes(pixels)
    square, odd = pictures.to_square(pixels, how.fit)
    if square.side < how.size:
        raise Fault(
            f"{path}: {square.side} pixels wide and --size is {how.size}; enlarging invents"
            " detail, so a smaller --size is needed",
            "image smaller than --size",
        )
    return square, notes + deep + odd
