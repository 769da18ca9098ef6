"""A folder of images: one folder per class, or a CSV with a label for each file."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import pictures
from data_prep.plan import add_origin, add_output, add_splits, check_known, is_below, order, settle
from data_prep.writer import Report, Study, prepare, versions
from hallulib import UserError
from hallulib.area import area_average

HELP = """
Without --csv, the folders in IN are the classes; a folder "unlabelled" holds images without label.
If IN holds train, val or test, these are the splits and the classes are inside them.
With --csv, the table has the columns file (below IN) and label, and if it can patient and split;
an empty label means unlabelled. Only pixels, label and split are taken along: patients get new
names, and the column item (line of the CSV, or place in the sorted list of files) leads back.

  python -m data_prep folder scans/ sets/scans --origin "our hospital" --licence "internal"
  python -m data_prep folder scans/ sets/scans --csv table.csv --label grade --classes low,high
"""
BLOCK = 64  # files read by one worker at a time


@dataclass(frozen=True)
class Block:
    """Files read together. ``files``: (path, bytes, time of change) of each; ``rows``: its row."""

    key: str
    files: tuple[tuple[str, int, int], ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    parser.add_argument("source", type=Path, metavar="IN", help="the folder with the images")
    add_output(parser)
    parser.add_argument("--csv", type=Path, help="table with file, label, [patient], [split]")
    parser.add_argument(
        "--label", default="label", help="name of the label, and of its column (default label)"
    )
    parser.add_argument("--classes", help="label values in order, a,b,c (default: sorted)")
    parser.add_argument(
        "--fit", choices=["pad", "crop"], default="pad", help="how to make squares (default pad)"
    )
    parser.add_argument("--grey", action="store_true", help="turn colour into grey")
    add_splits(parser)
    add_origin(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    if not args.source.is_dir():
        raise UserError(f"{args.source}: no such folder; a folder with images is needed")
    if args.size < 1:
        raise UserError(f"--size is {args.size}; at least 1 pixel is needed")
    plan, notes = _from_csv(args) if args.csv else _from_folders(args.source)
    where = str(args.csv or args.source)
    values = args.classes.split(",") if args.classes else order(plan["label"])
    check_known(plan["label"], values, where)
    plan, odd = settle(plan, args.fractions, args.seed, where)
    grey = args.grey or pictures.read(args.source / plan["file"].iloc[0]).ndim == 2
    read = partial(
        read_block, size=args.size, fit=args.fit, channels=1 if grey else 3, to_grey=args.grey
    )
    items = list(_blocks(plan, args.source, args.label))
    card = _card(args, values, grey)
    return prepare(
        args.out,
        items,
        read,
        card,
        notes=[*notes, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
    )


def read_block(block: Block, size: int, fit: str, channels: int, to_grey: bool) -> Study:
    """Reads the files of a block.

    Args:
        block: what to read.
        size: side of the images, in pixels.
        fit: ``"pad"`` or ``"crop"``.
        channels: 1 or 3, as the first file of all.
        to_grey: turn colour into grey.

    Raises:
        UserError: a file cannot be read, has another number of channels or is too small.
    """
    images, notes = [], []
    for name, *_ in block.files:
        pixels = pictures.read(Path(name), to_grey)
        if (pixels.ndim == 3) != (channels == 3):
            kinds = ("grey", "colour") if channels == 3 else ("colour", "grey")
            raise UserError(f"{name}: {kinds[0]} among {kinds[1]} images; --grey makes all grey")
        pixels, deep = pictures.to_bytes(pixels)
        pixels, odd = pictures.to_square(pixels, fit)
        if len(pixels) < size:
            raise UserError(
                f"{name}: {len(pixels)} pixels wide and --size is {size}; enlarging invents"
                " detail, so a smaller --size is needed"
            )
        planes = pixels[None] if channels == 1 else np.moveaxis(pixels, 2, 0)
        images.append(area_average(planes[None], size)[0])
        notes += deep + odd
    return Study(images, [dict(row) for row in block.rows], notes)


def _from_folders(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The plan of class folders: columns file, patient, label, split; index = place."""
    rows, notes = [], []
    for split, folder in _class_folders(root):
        if _folders(folder):
            raise UserError(
                f"{_folders(folder)[0]}: a folder in a class folder; images must lie directly in"
                " class folders (splits are named train, val, test)"
            )
        files, left = _images(folder)
        label = "" if folder.name == "unlabelled" else folder.name
        rows += [(str(file.relative_to(root)), "", label, split) for file in files]
        notes += ["file that is not an image left out"] * left
    return _plan(rows, root), notes


def _class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) of each class; the split is "" where the folders do not tell."""
    tops = _folders(root)
    splits = [folder for folder in tops if folder.name in ("train", "val", "test")]
    for folder in (root, *splits):
        loose, _ = _images(folder)
        if loose:
            raise UserError(
                f"{loose[0]}: an image outside a class folder; put it in a folder named by its"
                " class (or unlabelled), or give --csv"
            )
    others = [folder for folder in tops if folder not in splits]
    strange = [folder for folder in others if splits and folder.name != "unlabelled"]
    if strange:
        raise UserError(f"{strange[0]}: a class beside train, val or test; classes go inside them")
    inside = [(split.name, folder) for split in splits for folder in _folders(split)]
    return inside + [("", folder) for folder in others]


def _from_csv(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The plan of a table; index = line of the file."""
    table = _table(args.csv, args.label)
    for line, name in table["file"].items():
        _check_path(name, line, args)
    twice = table.index[table["file"].duplicated()]
    if len(twice):
        name = table["file"][twice[0]]
        raise UserError(f"{args.csv}: line {twice[0]} lists {name} again; once is needed")
    wanted = ["file", "patient", args.label, "split"]
    notes = ["column of the CSV left out"] * len(set(table.columns) - set(wanted))
    listed = {args.source / name for name in table["file"]}
    for folder, _, _ in os.walk(args.source):
        found = _images(Path(folder))[0]
        notes += ["image not in the CSV left out"] * sum(file not in listed for file in found)
    plan = table.reindex(columns=wanted, fill_value="")
    return _plan(plan.set_axis(["file", "patient", "label", "split"], axis=1), args.csv), notes


def _table(file: Path, label: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable CSV ({error}); give another --csv") from error
    missing = [name for name in ("file", label) if name not in table]
    if missing:
        raise UserError(
            f"{file}: no column {missing[0]!r} among {list(table.columns)}; file and {label} are"
            " needed (--label names the label column)"
        )
    table = table.apply(lambda column: column.str.strip())
    table.index += 2  # lines, below the line of names
    return table


def _check_path(name: str, line: int, args: argparse.Namespace) -> None:
    where = f"{args.csv}: line {line}"
    if not is_below(name):
        raise UserError(
            f"{where} has file {name!r}; a path below {args.source}, without .., is needed"
        )
    if Path(name).suffix.lower() not in pictures.SUFFIXES:
        known = ", ".join(sorted(pictures.SUFFIXES))
        raise UserError(f"{where} has file {name!r}; one of {known} is needed")
    if not (args.source / name).is_file():
        raise UserError(f"{where} has file {name!r}, which is not in {args.source}; it is needed")


def _plan(rows, where: Path) -> pd.DataFrame:
    plan = pd.DataFrame(rows, columns=["file", "patient", "label", "split"], dtype=str)
    if not len(plan):
        known = ", ".join(sorted(pictures.SUFFIXES))
        raise UserError(f"{where}: no image found; files of {known} in class folders are needed")
    if isinstance(rows, list):
        plan.index += 1
    return plan


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _images(folder: Path) -> tuple[list[Path], int]:
    """The image files right in a folder, sorted, and how many other files."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    images = [f for f in files if f.suffix.lower() in pictures.SUFFIXES]
    return images, len(files) - len(images)


def _blocks(plan: pd.DataFrame, root: Path, scheme: str) -> Iterator[Block]:
    for number, start in enumerate(range(0, len(plan), BLOCK)):
        part = plan.iloc[start : start + BLOCK]
        files, rows = [], []
        for item, row in zip(part.index, part.to_dict("records"), strict=True):
            stat = (root / row["file"]).stat()
            files.append((str(root / row["file"]), stat.st_size, stat.st_mtime_ns))
            told = {"patient": row["patient"], "split": row["split"], "item": str(item)}
            told |= {scheme: row["label"]} if row["label"] else {}
            rows.append(tuple(told.items()))
        yield Block(f"block {number}", tuple(files), tuple(rows))


def _card(args: argparse.Namespace, values: list[str], grey: bool) -> dict:
    steps = [
        "images deeper than 8 bits: 0.5th to 99.5th percentile of each image to 0..255",
        "pad: median of the border" if args.fit == "pad" else "crop: centre",
        *(["colour to luminance (ITU-R 601)"] if args.grey else []),
        f"area-averaged to {args.size} pixels",
        f"{'grey' if grey else 'colour'}; splits by seed {args.seed}, {args.fractions}",
    ]
    meaning = {value: value for value in values}
    return {
        "name": args.name or args.out.name,
        "origin": args.origin,
        "licence": args.licence,
        "spacing_mm": args.spacing,
        "processing": {"steps": steps, "versions": versions("pillow")},
        "labels": {args.label: {"values": values, "meaning": meaning}} if values else {},
        "coordinates": ["item"],
        "warnings": args.warning,
    }
