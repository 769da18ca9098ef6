"""A folder of images: one folder per class, a CSV with a label for each file, or no label."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import files, pictures, tables, tiles
from data_prep.plan import (
    add_fault,
    add_label,
    add_origin,
    add_output,
    add_splits,
    add_unit,
    is_below,
    read_labels,
    settle,
    unit_of,
)
from data_prep.writer import Report, prepare, versions
from hallulib import UserError

HELP = """
Without --csv, the folders in IN are the classes; a folder "unlabelled" holds images without label.
If IN holds train, val or test, these are the splits and the classes are inside them.
With --csv, the table has the columns file (below IN) and label, and if it can patient and split,
in small letters or capitals; an empty label means unlabelled.
With --unlabelled, all images in IN, at any depth, are without label: sets to learn tissue from.

--patient-pattern finds the patient in the path of each file below IN, with its first group, or
else as a whole; in barcodes of TCGA these are the first 12 characters. Only pixels, label and
split are taken along: patients get new names, and the column item (line of the CSV, or place in
the sorted list of files) leads back.

  python -m data_prep folder scans/ sets/scans --origin "our hospital" --licence "internal"
  python -m data_prep folder scans/ sets/scans --csv table.csv --label grade --classes low,high
  python -m data_prep folder TCGA-BRCA/ sets/tcga --unlabelled --blank drop \\
      --patient-pattern "TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}" --origin "TCGA-BRCA"
  python -m data_prep folder VGH/ sets/vgh --unlabelled --blank drop --origin "VGH"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    parser.add_argument("source", type=Path, metavar="IN", help="the folder with the images")
    add_output(parser)
    told = "table with file, label, [patient], [split]"
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--csv", type=Path, help=told)
    labels.add_argument("--unlabelled", action="store_true", help="all images, at any depth")
    told = "regular expression that finds the patient in a path"
    parser.add_argument("--patient-pattern", type=_pattern, metavar="REGEX", help=told)
    add_unit(parser)
    add_label(parser, "name of the label, and of its column")
    parser.add_argument(
        "--fit", choices=["pad", "crop"], default="pad", help="how to make squares (default pad)"
    )
    parser.add_argument("--grey", action="store_true", help="turn colour into grey")
    tiles.add_arguments(parser, "ignore")
    add_fault(parser, "file")
    add_splits(parser)
    add_origin(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    if not args.source.is_dir():
        raise UserError(f"{args.source}: no such folder; a folder with images is needed")
    plan, notes = _listed(args)
    where = str(args.csv or args.source)
    plan["label"], values, found = read_labels(plan["label"], args.classes, where, args.missing)
    unit = unit_of(plan["patient"], args.unit, where)
    plan, odd = settle(plan, args.fractions, args.seed, where, unit)
    plan["file"] = [str(args.source / name) for name in plan["file"]]
    grey = args.grey or files.are_grey(plan["file"])
    blanks = tiles.blanks(args)
    how = files.Reading(args.size, args.fit, 1 if grey else 3, args.grey, blanks=blanks)
    return prepare(
        args.out,
        list(files.blocks(plan, {args.label: "label"})),
        partial(files.read_block, how=how),
        _card(args, values, grey, blanks) | {"unit": unit},
        notes=[*notes, *found, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def _listed(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The plan: columns file (below the folder), patient, label, split; index = item."""
    if args.csv:
        plan, notes = _from_csv(args)
    elif args.unlabelled:
        plan, notes = _from_tree(args.source)
    else:
        plan, notes = _from_folders(args.source)
    if args.patient_pattern:
        nobody = plan["patient"] == ""
        found = _patients(plan.loc[nobody, "file"], args.patient_pattern, args.source)
        plan.loc[nobody, "patient"] = found
    return plan, notes


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _patients(names: Sequence[str], pattern: re.Pattern[str], root: Path) -> list[str]:
    """What the pattern finds in each path; all or none, since a patient overlooked is a leak."""
    matches = [pattern.search(Path(name).as_posix()) for name in names]
    found = [(match[1 if pattern.groups else 0] or "") if match else "" for match in matches]
    missed = [name for name, patient in zip(names, found, strict=True) if not patient]
    if missed:
        raise UserError(
            f"{root / missed[0]}: {pattern.pattern!r} finds no patient in the path of this and of"
            f" {len(missed) - 1} other images; one that fits every image is needed"
        )
    return found


def _from_tree(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The plan of images without label, at any depth."""
    found, left = [], 0
    for folder in _tree(root):
        images, others = files.images(folder)
        found += [str(file.relative_to(root)) for file in images]
        left += others
    rows = [(name, "", "", "") for name in sorted(found)]
    return _plan(rows, root), [files.NO_IMAGE] * left


def _tree(root: Path) -> Iterator[Path]:
    """The folder and those below it, each once, wherever links lead."""
    todo, seen = [root], set()
    while todo:
        folder = todo.pop()
        if folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield folder
            todo += files.folders(folder)


def _from_folders(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The plan of class folders: columns file, patient, label, split; index = place."""
    rows, notes = [], []
    for split, folder in _class_folders(root):
        deeper = files.folders(folder)
        if deeper:
            raise UserError(
                f"{deeper[0]}: a folder in a class folder; images must lie directly in class"
                " folders (splits are named train, val, test)"
            )
        images, left = files.images(folder)
        label = "" if folder.name == "unlabelled" else folder.name
        rows += [(str(file.relative_to(root)), "", label, split) for file in images]
        notes += [files.NO_IMAGE] * left
    return _plan(rows, root), notes


def _class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) of each class; the split is "" where the folders do not tell."""
    tops = files.folders(root)
    splits = [folder for folder in tops if folder.name in ("train", "val", "test")]
    for folder in (root, *splits):
        loose, _ = files.images(folder)
        if loose:
            raise UserError(
                f"{loose[0]}: an image outside a class folder; put it in a folder named by its"
                " class (or unlabelled), or give --csv"
            )
    others = [folder for folder in tops if folder not in splits]
    strange = [folder for folder in others if splits and folder.name != "unlabelled"]
    if strange:
        raise UserError(f"{strange[0]}: a class beside train, val or test; classes go inside them")
    inside = [(split.name, folder) for split in splits for folder in files.folders(split)]
    return inside + [("", folder) for folder in others]


def _from_csv(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str]]:
    """The plan of a table; index = line of the file."""
    table, notes = _table(args.csv, args.label)
    for line, name in table["file"].items():
        _check_path(name, line, args)
    twice = table.index[table["file"].duplicated()]
    if len(twice):
        name = table["file"][twice[0]]
        raise UserError(f"{args.csv}: line {twice[0]} lists {name} again; once is needed")
    listed = {args.source / name for name in table["file"]}
    for folder, _, _ in os.walk(args.source):
        found = files.images(Path(folder))[0]
        notes += ["image not in the CSV left out"] * sum(file not in listed for file in found)
    return _plan(table, args.csv), notes


def _table(file: Path, label: str) -> tuple[pd.DataFrame, list[str]]:
    """Columns file, label, patient and split of a CSV, index = line; what is left out of it."""
    table = tables.read(file)
    known = {tables.key(name) for name in ("file", label, "patient", "split")}
    notes = [f"column {n!r} of the CSV left out" for n in table if tables.key(n) not in known]
    table = table[(table != "").any(axis=1)]
    if tables.key(label) not in map(tables.key, table):
        raise UserError(
            f"{file}: no column {label!r} among {list(table)}; --label names the label column"
        )
    table = tables.choose(table, file, ["file", label], ["patient", "split"])
    return table.rename(columns={label: "label"}), notes


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


def _card(args: argparse.Namespace, values: list[str], grey: bool, blanks: tiles.Blanks) -> dict:
    steps = [
        "images deeper than 8 bits or signed: 0.5th to 99.5th percentile of each to 0..255",
        "transparent pixels on black",
        "pad: median of the border" if args.fit == "pad" else "crop: centre",
        *(["colour to luminance (ITU-R 601)"] if args.grey else []),
        *blanks.steps,
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
