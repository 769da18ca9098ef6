"""A folder of images: one folder per class, a CSV with a label for each file, or no label."""

import argparse
import re
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import files, grouping, layouts, sheets, tiles
from data_prep.plan import (
    add_fault,
    add_label,
    add_origin,
    add_output,
    add_splits,
    add_unit,
    read_labels,
    settle,
    unit_of,
)
from data_prep.writer import Report, prepare, versions
from hallulib import UserError

HELP = """
Without --csv, the folders in IN are the classes; a folder "unlabelled" holds images without label.
If IN holds train, val or test (or Training, valid ...), these are the splits and the classes are
inside them.
With --csv, the table has the columns file (below IN) and label, and if it can patient and split,
in small letters or capitals, or under names that options tell; an empty label means unlabelled.
Spreadsheets write such tables, with commas, semicolons or tabs, in UTF-8 or UTF-16.
With --unlabelled, all images in IN, at any depth, are without label: sets to learn tissue from.

--patient names the column that tells patients apart, or "none" if images are independent.
--patient-pattern finds the patient in the path of each file below IN, with its first group, or
else as a whole; in barcodes of TCGA these are the first 12 characters. Only pixels, label and
split are taken along: patients get new names, and the column item (line of the CSV, or place in
the sorted list of files) leads back.

  python -m data_prep folder scans/ sets/scans --origin "our hospital" --licence "internal"
  python -m data_prep folder scans/ sets/scans --csv table.csv --label grade --classes low,high \\
      --patient lesion_id
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
    told = "column of the CSV that tells patients apart, or none (default patient)"
    patients = parser.add_mutually_exclusive_group()
    patients.add_argument("--patient", metavar="COLUMN", help=told)
    told = "regular expression that finds the patient in a path"
    patients.add_argument("--patient-pattern", type=_pattern, metavar="REGEX", help=told)
    add_unit(parser)
    told = "column of the CSV with published splits: train, val, test ... (default split)"
    parser.add_argument("--split", metavar="COLUMN", help=told)
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
    plan, notes, warnings = _listed(args)
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
        _card(args, values, grey, blanks, warnings) | {"unit": unit},
        notes=[*notes, *found, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def _listed(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The plan: columns file (below the folder), patient, label, split; notes and warnings."""
    warnings = []
    if args.csv:
        plan, notes = sheets.listed(args.csv, args.source, args.label, args.patient, args.split)
        if args.patient not in (None, grouping.NOBODY):
            warnings = grouping.check(plan, f"--patient {args.patient}", args.csv, args.unit)
    elif args.patient or args.split:
        told = f"--patient {args.patient}" if args.patient else f"--split {args.split}"
        raise UserError(f"{told}: names a column of --csv, which is needed too")
    else:
        plan, notes = (layouts.tree if args.unlabelled else layouts.classes)(args.source)
    if args.patient_pattern:
        nobody = plan["patient"] == ""
        found = grouping.find(plan.loc[nobody, "file"], args.patient_pattern, args.source)
        plan.loc[nobody, "patient"] = found
        told = "--patient-pattern"
        warnings = grouping.check(plan[nobody], told, args.source, args.unit)
        grouping.check_counter(plan[nobody], told, args.source)
    if not args.csv:
        plan, links = layouts.once(plan, args.source)
        notes += links
    return plan, notes, warnings


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _card(
    args: argparse.Namespace,
    values: list[str],
    grey: bool,
    blanks: tiles.Blanks,
    warnings: list[str],
) -> dict:
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
        "warnings": [*args.warning, *warnings],
    }
