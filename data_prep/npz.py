"""Arrays of one NumPy .npz file: images, labels, and if there are any patients and a split."""

import argparse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.plan import add_origin, add_output, add_splits, check_known, order, settle
from data_prep.writer import Report, Study, prepare
from hallulib import UserError
from hallulib.area import area_average

HELP = """
Arrays are named by the options; all have one entry per image, except --names. The column item of
the table is the position in the arrays.

  python -m data_prep npz brain_mri_64.npz sets/brain --label label --names class_names \\
      --keep keep --test is_test_clean --patient group_near --fractions train=.85,val=.15
  python -m data_prep npz mias_images_128.npz sets/mias --label density --names density_names \\
      --patient patient --size 64 --spacing 3.2
"""
BLOCK = 256  # images of one array staged together


@dataclass(frozen=True)
class Block:
    """Neighbouring images of one array; ``rows``: place and table row of those to keep."""

    key: str
    file: str
    sum: str
    array: str
    rows: tuple[tuple[int, tuple[tuple[str, str], ...]], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    parser.add_argument("source", type=Path, metavar="FILE", help="the .npz file")
    add_output(parser)
    parser.add_argument(
        "--images", default="images", help="uint8 (N, H, H) or (N, H, H, 3) (default images)"
    )
    parser.add_argument("--label", default="label", help="label of each image (default label)")
    parser.add_argument("--names", help="name of each label, if labels are 0, 1, ...")
    parser.add_argument("--patient", help="patient, or group, of each image")
    parser.add_argument("--keep", help="true for the images to use")
    parser.add_argument("--test", help="true for the test images; the rest becomes train and val")
    add_splits(parser)
    add_origin(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    where, labels = str(args.source), _column(args.source, args.label)
    check_count(args.source, args.images, len(labels))
    if args.names:
        labels = _named(labels, _array(args.source, args.names).astype(str), args)
    plan = pd.DataFrame({"label": labels, "patient": "", "split": ""}, dtype=str)
    values = order(labels) if not args.names else list(_array(args.source, args.names).astype(str))
    check_known(plan["label"], values, where)
    if args.patient:
        plan["patient"] = _column(args.source, args.patient, len(plan))
    notes = []
    if args.test:
        plan.loc[_mask(args.source, args.test, len(plan)), "split"] = "test"
        plan.loc[plan["split"] == "", "split"] = "train"
    if args.keep:
        keep = _mask(args.source, args.keep, len(plan))
        notes, plan = [f"image left out by {args.keep}"] * int((~keep).sum()), plan[keep]
    plan, odd = settle(plan, args.fractions, args.seed, where)
    card = card_of(args, {args.label: {"values": values, "meaning": {v: v for v in values}}})
    card["processing"]["steps"] += [
        f"arrays: {args.images}, {args.label}, patient {args.patient}, keep {args.keep},"
        f" test {args.test}",
        f"splits by seed {args.seed}, {args.fractions}",
    ]
    items = list(blocks(plan.assign(array=args.images), args.source, args.label))
    return write(args, items, card, [*notes, *odd])


def write(args: argparse.Namespace, items: Sequence[Block], card: dict, notes) -> Report:
    """Writes blocks, in this process: an .npz is one stream, read once from front to back."""
    _streams.cache_clear()
    read = partial(read_block, size=args.size)
    return prepare(args.out, items, read, card, notes=notes, workers=1, overwrite=args.overwrite)


def card_of(args: argparse.Namespace, labels: dict) -> dict:
    """The card of an .npz, from the command line."""
    return {
        "name": args.name or args.out.name,
        "origin": args.origin,
        "licence": args.licence,
        "spacing_mm": args.spacing,
        "processing": {"steps": [f"area-averaged to {args.size} pixels"]},
        "labels": labels,
        "coordinates": ["item"],
        "warnings": args.warning,
    }


def check_count(file: Path, array: str, n: int) -> None:
    """Refuses an array of images whose number is not that of the labels.

    Raises:
        UserError: they differ, or the array holds no images.
    """
    found = Stream(str(file), array).shape[0]
    if found != n:
        raise UserError(
            f"{file}: array {array} has {found} images for {n} labels; one each needed"
        )


def blocks(plan: pd.DataFrame, file: Path, scheme: str, sum: str = "") -> Iterator[Block]:
    """The plan in blocks of neighbours.

    Args:
        plan: ``array``, ``patient``, ``label``, ``split``; index = position in the array.
        file: the .npz.
        scheme: label column.
        sum: checksum of the file, if known.
    """
    sum = sum or f"{file.stat().st_size} {file.stat().st_mtime_ns}"
    for (array, number), part in plan.groupby(["array", plan.index // BLOCK], sort=False):
        rows = []
        for position, row in zip(part.index, part.to_dict("records"), strict=True):
            told = {"patient": row["patient"], "split": row["split"], "item": str(position)}
            told |= {scheme: row["label"]} if row["label"] else {}
            rows.append((int(position), tuple(told.items())))
        yield Block(f"{array} {number}", str(file), sum, array, tuple(rows))


def read_block(block: Block, size: int) -> Study:
    """Reads one block and makes its images smaller.

    Raises:
        UserError: the array is not uint8 images, damaged, or smaller than ``size``.
    """
    where = f"{block.file}: array {block.array}"
    rows = [position for position, _ in block.rows]
    stream = _streams(block.file, block.array)
    images = stream.read(rows[0], rows[-1] + 1)[np.array(rows) - rows[0]]
    if images.shape[1] != images.shape[2]:
        raise UserError(f"{where} has shape {stream.shape}; square images are needed")
    if images.shape[1] < size:
        raise UserError(
            f"{where} has images {images.shape[1]} pixels wide and --size is {size}; enlarging"
            " invents detail, so a smaller --size is needed"
        )
    planes = images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)
    planes = planes if images.shape[1] == size else area_average(planes, size)
    return Study(list(np.ascontiguousarray(planes)), [dict(row) for _, row in block.rows])


class Stream:
    """Reads an array of an .npz from front to back, so that it need not fit in memory."""

    def __init__(self, file: str, array: str):
        self.where = f"{file}: array {array}"
        self.open = lambda: zipfile.ZipFile(file).open(f"{array}.npy")
        try:
            self._start()
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.where} cannot be read ({error}); check its name") from error
        good = len(self.shape) == 3 or (len(self.shape) == 4 and self.shape[3] == 3)
        if self.dtype != np.uint8 or not good or self.fortran or not self.shape[0]:
            raise UserError(
                f"{self.where} is {self.dtype} {self.shape}; uint8 (images, height, width[, 3])"
                " in C order is needed"
            )

    def _start(self) -> None:
        self.position, self.file = 0, self.open()
        version = np.lib.format.read_magic(self.file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        self.shape, self.fortran, self.dtype = header(self.file)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop; going back costs a new pass."""
        if start < self.position:
            self._start()
        each = int(np.prod(self.shape[1:]))
        while self.position < start:
            step = min(BLOCK, start - self.position)
            self._bytes(step * each)
            self.position += step
        self.position = stop
        taken = np.frombuffer(self._bytes((stop - start) * each), np.uint8)
        return taken.reshape(stop - start, *self.shape[1:])

    def _bytes(self, n: int) -> bytes:
        try:
            taken = self.file.read(n)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.where} is damaged ({error}); fetch the file again") from error
        if len(taken) < n:
            raise UserError(f"{self.where} ends too early; fetch the file again")
        return taken


@lru_cache(maxsize=1)
def _streams(file: str, array: str) -> Stream:
    return Stream(file, array)


def _array(file: Path, name: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if name not in arrays:
                raise UserError(f"{file}: no array {name!r}; it holds {', '.join(arrays)}")
            return arrays[name]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: not a readable .npz ({error}); give another file") from error


def _column(file: Path, name: str, n: int | None = None) -> np.ndarray:
    """One text per image."""
    values = _array(file, name)
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1 or (n is not None and len(values) != n):
        raise UserError(
            f"{file}: array {name} has shape {values.shape}; one entry per image needed"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{file}: array {name} has NaN; every image needs a finite value")
    return values.astype(str)


def _mask(file: Path, name: str, n: int) -> np.ndarray:
    values = _column(file, name, n)
    if not set(values) <= {"True", "False"}:
        raise UserError(f"{file}: array {name} is not true or false; a boolean array is needed")
    return values == "True"


def _named(labels: np.ndarray, names: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    known = {str(index): name for index, name in enumerate(names)}
    strange = [str(label) for label in labels if label not in known]
    if strange:
        raise UserError(
            f"{args.source}: {args.label} has {strange[0]!r}; known are 0 to {len(names) - 1},"
            f" the places in {args.names}"
        )
    return np.array([known[label] for label in labels])
