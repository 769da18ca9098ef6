"""Images of arrays in .npz, .npy and HDF5 files, read in blocks and never whole."""

import argparse
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from data_prep import tiles
from data_prep.staging import File, Study
from data_prep.writer import Report, prepare
from hallulib import UserError
from hallulib.data.checks import area_average, map_array

BLOCK = 256  # images of one array read and staged together, at most
LARGEST = 2**25  # bytes of an array read at once, unless its chunks are larger
LARGEST_CHUNK = 2**27  # and of one image
FAULTS = (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
FAULTS += (NotImplementedError, RuntimeError, struct.error)  # of zips packed in another way


@dataclass(frozen=True)
class Block:
    """Neighbouring images of one array; ``rows``: place and table row of those to keep."""

    key: str
    file: File
    array: str
    rows: tuple[tuple[int, tuple[tuple[str, str], ...]], ...]


def blocks(plan: pd.DataFrame, columns: Mapping[str, str]) -> Iterator[Block]:
    """The plan in blocks of neighbours.

    Args:
        plan: one row per image: ``part`` (a unique name of its array), ``file``, ``array``,
            ``patient``, ``split`` and more; index = position in the array, which becomes the
            column ``item`` unless ``columns`` has one.
        columns: further columns to write -> columns of the plan.
    """
    columns = {"patient": "patient", "split": "split"} | columns
    for (part, path, array), group in plan.groupby(["part", "file", "array"], sort=False):
        file, together = File.of(Path(path)), opened(path, array).together
        for number, block in group.groupby(group.index // together, sort=False):
            rows = []
            for position, row in zip(block.index, block.to_dict("records"), strict=True):
                told = {"item": str(position)}
                told |= {name: row[column] for name, column in columns.items() if row[column]}
                rows.append((int(position), tuple(told.items())))
            yield Block(f"{part} {number}", file, array, tuple(rows))


def check(path: Path, array: str, n: int, shape: tuple[int, ...] | None = None) -> None:
    """Refuses an array of images that does not fit its labels, or the archive.

    Args:
        path: its file.
        array: its name, "" in an .npy file.
        n: how many labels there are.
        shape: of each image, if the archive has one.

    Raises:
        UserError: other numbers, another shape, damage, or no array of images.
    """
    found = opened(str(path), array)
    if isinstance(found, Stream):  # HDF5 compares checksums chunk by chunk, .npy has none
        found.check()
    if found.shape[0] != n:
        raise UserError(
            f"{found.where} has {found.shape[0]} images for {n} labels; one each needed"
        )
    if shape and found.shape[1:] != shape:
        raise UserError(f"{found.where} has shape {found.shape}; {(n, *shape)} is needed")


def write(
    args: argparse.Namespace,
    items: Sequence[Block],
    card: dict,
    notes: Sequence[str],
    workers: int | None,
) -> Report:
    """Writes blocks.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    read = partial(read_block, size=args.size, blanks=tiles.blanks(args))
    return prepare(
        args.out, items, read, card, notes=notes, workers=workers, overwrite=args.overwrite
    )


def read_block(block: Block, size: int, blanks: tiles.Blanks) -> Study:
    """Reads one block and makes its images smaller.

    Raises:
        UserError: the array holds no square images, is damaged, or is smaller than ``size``.
    """
    source = opened(block.file.path, block.array)
    places = [position for position, _ in block.rows]
    images = source.read(places[0], places[-1] + 1)[np.array(places) - places[0]]
    if images.shape[1] != images.shape[2]:
        raise UserError(f"{source.where} has shape {source.shape}; square images are needed")
    if images.shape[1] < size:
        raise UserError(
            f"{source.where} has images {images.shape[1]} pixels wide and --size is {size};"
            " enlarging invents detail, so a smaller --size is needed"
        )
    checked = [blanks.check(image) for image in images]
    stays = np.array([good for good, _ in checked])
    planes = images[stays][:, None] if images.ndim == 3 else np.moveaxis(images[stays], 3, 1)
    planes = planes if images.shape[1] == size else area_average(planes, size)
    rows = [dict(row) for (_, row), good in zip(block.rows, stays, strict=True) if good]
    return Study(list(np.ascontiguousarray(planes)), rows, [n for _, odd in checked for n in odd])


def header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an .npy.

    Raises:
        ValueError: it declares nothing of the kind.
    """
    try:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, fortran, dtype = read(file)
    except FAULTS:
        raise
    except Exception as error:  # a damaged header makes NumPy throw nearly anything
        raise ValueError(f"no header of an array: {type(error).__name__}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    return shape, fortran, dtype


class Stream:
    """Reads an array of an .npz from front to back, so that it need not fit in memory."""

    def __init__(self, file: str, array: str):
        self.where = f"{file}: array {array}"
        self.open = lambda: zipfile.ZipFile(file).open(f"{array}.npy")
        try:
            self._start()
        except FAULTS as error:
            raise UserError(f"{self.where} cannot be read ({error}); check its name") from error
        if self.dtype != np.uint8 or not _are_images(self.shape) or self.fortran:
            raise UserError(
                f"{self.where} is {self.dtype} {self.shape}; uint8 (images, height, width[, 3])"
                " in C order is needed"
            )
        self.together = max(1, min(BLOCK, LARGEST // math.prod(self.shape[1:])))

    def _start(self) -> None:
        self.position, self.file = 0, self.open()
        self.shape, self.fortran, self.dtype = header(self.file)

    def check(self) -> None:
        """Reads to the end, where the zip's checksum is; the images to keep may end before it."""
        self._start()
        left = math.prod(self.shape)
        while left:
            left -= len(self._bytes(min(LARGEST, left)))
        if self._upto(1):
            raise UserError(f"{self.where} goes on after its images; fetch the file again")
        self._start()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop; going back costs a new pass."""
        if start < self.position:
            self._start()
        each = math.prod(self.shape[1:])
        while self.position < start:
            step = min(BLOCK, start - self.position)
            self._bytes(step * each)
            self.position += step
        self.position = stop
        taken = np.frombuffer(self._bytes((stop - start) * each), np.uint8)
        return taken.reshape(stop - start, *self.shape[1:])

    def _bytes(self, n: int) -> bytes:
        taken = self._upto(n)
        if len(taken) < n:
            raise UserError(f"{self.where} ends too early; fetch the file again")
        return taken

    def _upto(self, n: int) -> bytes:
        try:
            return self.file.read(n)
        except FAULTS as error:
            raise UserError(f"{self.where} is damaged ({error}); fetch the file again") from error


class Sliced:
    """Reads an array from any place: an .npy file by memory map, or a dataset of HDF5."""

    def __init__(self, file: str, array: str):
        self.where = f"{file}: array {array}" if array else file
        self.array = dataset(file, array) if array else _Mapped(file)
        self.shape = self.array.shape
        if self.array.dtype.kind not in "uif" or not _are_images(self.shape):
            raise UserError(
                f"{self.where} is {self.array.dtype} {self.shape}; numbers (images, height,"
                " width[, 3]) are needed"
            )

    @property
    def together(self) -> int:
        """Images to read at once: few enough for memory, in whole chunks where it has chunks."""
        each = math.prod(self.shape[1:]) * self.array.dtype.itemsize
        rows = max(1, min(BLOCK, LARGEST // each))
        chunk = (getattr(self.array, "chunks", None) or (1,))[0]
        return max(1, min(-(-rows // chunk) * chunk, LARGEST_CHUNK // each))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop as uint8.

        Raises:
            UserError: damaged, or values that are not 0 to 255.
        """
        try:
            part = entries(self.array, start, stop)
        except FAULTS as error:
            raise UserError(f"{self.where} is damaged ({error}); fetch the file again") from error
        if part.dtype == np.uint8:
            return part
        low, high = part.min(), part.max()
        scaled = high <= 1 and (part != np.rint(part)).any()
        if not (low >= 0 and high <= 255) or scaled:  # NaN is not >= 0 either
            raise UserError(
                f"{self.where} has values from {low:g} to {high:g} in images {start} to"
                f" {stop - 1}; 0 to 255 are needed"
            )
        return np.rint(part).astype(np.uint8)


def opened(path: str, array: str) -> Stream | Sliced:
    """The array of images of a file, by the name of the file; the last one is kept open."""
    return _opened(File.of(Path(path)), array)


def dataset(path: str, name: str):
    """A dataset of an HDF5 file, of which nothing is read yet.

    Raises:
        UserError: it is no HDF5 file, truncated, or has no such dataset.
    """
    import h5py  # late: one archive needs it

    try:
        file = h5py.File(path, "r")
        found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(found, h5py.Dataset):
            held = ", ".join(map(str, file)) or "nothing"
            raise UserError(f"{path}: no array {name!r}; it holds {held}")
        if found.external or found.is_virtual:  # a dataset may name any file of the machine
            told = f"array {name} lies in another file"
            raise UserError(f"{path}: {told}; it is needed in this one")
        plain = found.chunks and found.id.get_create_plist().get_nfilters() == 0
        if plain and found.id.get_storage_size() % (
            math.prod(found.chunks) * found.dtype.itemsize
        ):
            raise ValueError("packed chunks without a word how")
    except FAULTS as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a whole HDF5 file ({told}); fetch or unpack it again"
        ) from error
    return found


def entries(found, start: int, stop: int) -> np.ndarray:
    """Entries of an array or dataset; a chunk that HDF5 does not find would be read as zeros.

    Raises:
        OSError: a chunk is not found or its filters would be skipped.
    """
    if chunks := getattr(found, "chunks", None):
        first = [start // chunks[0] * chunks[0]] + [0] * (len(chunks) - 1)
        for place in product(*map(range, first, (stop, *found.shape[1:]), chunks)):
            skipped, _ = found.id.read_direct_chunk(place)
            if skipped:
                raise OSError(f"the chunk at {place} is not unpacked")
    return np.asarray(found[start:stop])


@lru_cache(maxsize=1)
def _opened(file: File, array: str) -> Stream | Sliced:  # a file that changed is opened anew
    kind = Sliced if file.path.endswith((".npy", ".h5", ".hdf5")) else Stream
    return kind(file.path, array)


class _Mapped:
    """An .npy file, mapped anew for each read: pages of a map that stays open count as memory."""

    def __init__(self, path: str):
        self.path = path
        array = self._map()
        self.shape, self.dtype = array.shape, array.dtype
        if array.offset + array.nbytes != Path(path).stat().st_size:
            raise UserError(f"{path}: goes on after its array {self.shape}; fetch it again")

    def _map(self) -> np.ndarray:
        try:
            return map_array(self.path)
        except FAULTS as error:
            told = f"{self.path}: not a whole .npy file ({error}); fetch it again"
            raise UserError(told) from error

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.array(self._map()[part])


def _are_images(shape: tuple[int, ...]) -> bool:
    """(images, height, width) or (images, height, width, 3), at least one of each, none vast."""
    good = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    return good and min(shape) > 0 and math.prod(shape[1:]) <= LARGEST_CHUNK
