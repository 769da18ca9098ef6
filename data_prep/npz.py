"""Arrays of one NumPy .npz file: images, labels, and if there are any patients and a split."""

import argparse
import math
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import arrays, tiles
from data_prep.plan import (
    add_label,
    add_origin,
    add_output,
    add_splits,
    check_known,
    order,
    settle,
)
from data_prep.writer import Report
from hallulib import UserError

LARGEST = 2**28  # bytes of an array with one value per image
HELP = """
Arrays are named by the options; all have one entry per image, except --names. The column item of
the table is the position in the arrays.

  python -m data_prep npz brain_mri_64.npz sets/brain --label label --names class_names \\
      --keep keep --test is_test_clean --patient group_near --fractions train=.85,val=.15
  python -m data_prep npz mias_images_128.npz sets/mias --label density --names density_names \\
      --patient patient --size 64 --spacing 3.2
  python -m data_prep npz glas_tiles_64.npz sets/glas --names class_names --patient patient \\
      --keep "white_fraction<=.8" --fractions train=.5,val=.2,test=.3 --spacing .00124
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    parser.add_argument("source", type=Path, metavar="FILE", help="the .npz file")
    add_output(parser)
    parser.add_argument(
        "--images", default="images", help="uint8 (N, H, H) or (N, H, H, 3) (default images)"
    )
    add_label(parser, "label of each image")
    parser.add_argument("--names", help="name of each label, if labels are 0, 1, ...")
    parser.add_argument("--patient", help="patient, or group, of each image")
    told = "true for the images to use, or NAME<=LIMIT: those of which NAME is at most LIMIT"
    parser.add_argument("--keep", help=told)
    parser.add_argument("--test", help="true for the test images; the rest becomes train and val")
    tiles.add_arguments(parser, "ignore")
    add_splits(parser)
    add_origin(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    where, labels = str(args.source), _column(args.source, args.label)
    arrays.check(args.source, args.images, len(labels))
    if args.names:
        labels = _named(labels, _names(args), args)
    plan = pd.DataFrame({"label": labels, "patient": "", "split": ""}, dtype=str)
    values = list(_names(args)) if args.names else order(labels)
    check_known(plan["label"], values, where)
    if args.patient:
        plan["patient"] = _column(args.source, args.patient, len(plan))
    notes = []
    if args.test:
        plan.loc[_mask(args.source, args.test, len(plan)), "split"] = "test"
        plan.loc[plan["split"] == "", "split"] = "train"
    if args.keep:
        keep = _kept(args.source, args.keep, len(plan))
        notes, plan = [f"image left out by {args.keep}"] * int((~keep).sum()), plan[keep]
    plan, odd = settle(plan, args.fractions, args.seed, where)
    card = card_of(args, {args.label: {"values": values, "meaning": {v: v for v in values}}})
    card["processing"]["steps"] += [
        f"arrays: {args.images}, {args.label}, patient {args.patient}, keep {args.keep},"
        f" test {args.test}",
        f"splits by seed {args.seed}, {args.fractions}",
    ]
    plan = plan.assign(part=args.images, file=where, array=args.images)
    return write(args, plan, args.label, card, [*notes, *odd])


def write(args: argparse.Namespace, plan: pd.DataFrame, scheme: str, card: dict, notes) -> Report:
    """Writes a plan, in this process: an .npz is one stream, read once from front to back.

    Args:
        args: of the command line.
        plan: see `data_prep.arrays.blocks`.
        scheme: name of the labels.
        card: see `data_prep.writer.prepare`.
        notes: what was odd so far.
    """
    items = list(arrays.blocks(plan, {scheme: "label"}))
    return arrays.write(args, items, card, notes, workers=1)


def card_of(args: argparse.Namespace, labels: dict) -> dict:
    """The card of an .npz, from the command line."""
    blank = tiles.blanks(args).steps
    return {
        "name": args.name or args.out.name,
        "origin": args.origin,
        "licence": args.licence,
        "spacing_mm": args.spacing,
        "processing": {"steps": [*blank, f"area-averaged to {args.size} pixels"]},
        "labels": labels,
        "coordinates": ["item"],
        "warnings": args.warning,
    }


def _array(file: Path, name: str) -> np.ndarray:
    """A small array of an .npz; how much it declares is looked at before any of it is read.

    Raises:
        UserError: it cannot be read, or has more than `LARGEST` bytes.
    """
    try:
        with zipfile.ZipFile(file) as held:
            names = [member.removesuffix(".npy") for member in held.namelist()]
            if name not in names:
                raise UserError(f"{file}: no array {name!r}; it holds {', '.join(names)}")
            with held.open(f"{name}.npy") as member:
                shape, _, dtype = arrays.header(member)
                if math.prod(shape) * dtype.itemsize > LARGEST:
                    raise ValueError(f"array {name} declares {dtype} {shape}")
            with held.open(f"{name}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except arrays.FAULTS as error:
        raise UserError(f"{file}: not a readable .npz ({error}); give another file") from error


def _names(args: argparse.Namespace) -> np.ndarray:
    """One text per label, each once."""
    names = _column(args.source, args.names)
    if len(set(names) - {""}) < len(names):
        raise UserError(f"{args.source}: array {args.names} repeats a name or has an empty one")
    return names


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
    try:
        return values.astype(str)
    except (TypeError, ValueError) as error:
        told = "numbers or texts are needed"
        raise UserError(f"{file}: array {name} has {values.dtype} ({error}); {told}") from error


def _mask(file: Path, name: str, n: int) -> np.ndarray:
    values = _column(file, name, n)
    if not set(values) <= {"True", "False"}:
        raise UserError(f"{file}: array {name} is not true or false; a boolean array is needed")
    return values == "True"


def _kept(file: Path, told: str, n: int) -> np.ndarray:
    """The images to use, by an array of true and false or by a limit."""
    name, _, limit = (part.strip() for part in told.partition("<="))
    if not limit:
        return _mask(file, told, n)
    try:
        return _column(file, name, n).astype(float) <= float(limit)
    except ValueError as error:
        raise UserError(f"{file}: --keep {told!r} does not compare numbers ({error})") from error


def _named(labels: np.ndarray, names: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    known = {str(index): name for index, name in enumerate(names)}
    strange = [str(label) for label in labels if label not in known]
    if strange:
        raise UserError(
            f"{args.source}: {args.label} has {strange[0]!r}; known are 0 to {len(names) - 1},"
            f" the places in {args.names}"
        )
    return np.array([known[label] for label in labels])
