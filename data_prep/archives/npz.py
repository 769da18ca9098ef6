"""Arrays of one NumPy .npz file: images, and if there are any labels, patients and a split."""

import argparse
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import arrays, grouping, tiles
from data_prep.plan import (
    add_label,
    add_origin,
    add_output,
    add_splits,
    add_unit,
    is_missing,
    label_name,
    read_labels,
    settle,
    unit_of,
)
from data_prep.writer import Report
from hallulib import UserError

LARGEST = 2**28  # bytes of an array with one value per image
TRUTH = {"True": True, "False": False, "1": True, "0": False}
HELP = """
Arrays are named by the options; all have one entry per image, except --names. The column item of
the table is the position in the arrays. --patient none says that images are independent; field//3
joins the fields 0 to 2, 3 to 5 and so on, where neighbours look alike.

  python -m data_prep npz brain_mri_64.npz sets/brain --label label --names class_names \\
      --keep keep --test is_test_clean --patient group_near --unit near-copies \\
      --fractions train=.85,val=.15
  python -m data_prep npz chest_xray_64.npz sets/chest --names class_names --patient patient \\
      --test split=test --fractions train=.85,val=.15
  python -m data_prep npz crc_tiles_64.npz sets/crc --unlabelled --patient field//3 --unit group
  python -m data_prep npz prostatex_lesions_32.npz sets/lesions --size 32 --patient patient \\
      --keep keep --names class_names --also zone=zone_names
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
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--names", help="name of each label, if labels are 0, 1, ...")
    names.add_argument("--unlabelled", action="store_true", help="no image has a label")
    told = (
        f"patient, or group, of each image, or {grouping.NOBODY}; or NAME//N: N numbers in a row"
    )
    parser.add_argument("--patient", help=told)
    add_unit(parser)
    told = "a further label of each image, and the array of its names if it is 0, 1, ..."
    parser.add_argument(
        "--also", type=_further, action="append", default=[], metavar="LABEL[=NAMES]", help=told
    )
    told = "true for the images to use, or NAME<=LIMIT: those of which NAME is at most LIMIT, or"
    told += " NAME!=VALUE: those of which NAME is anything else"
    parser.add_argument("--keep", help=told)
    splits = parser.add_mutually_exclusive_group()
    told = "true for the test images, or NAME=VALUE: those of which NAME is VALUE; the rest"
    told += " becomes train and val"
    splits.add_argument("--test", help=told)
    told = "published split of each image: train, val or test, or training, validation ..."
    splits.add_argument("--split", help=told)
    tiles.add_arguments(parser, "ignore")
    add_splits(parser)
    add_origin(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    where = str(args.source)
    plan, values, notes = _plan(args)
    further = _also(args, plan)
    whose = grouping.check(plan, f"--patient {args.patient}", args.source, args.unit)
    unit = unit_of(plan["patient"], args.unit, where)
    plan, odd = settle(plan, args.fractions, args.seed, where, unit)
    labels = {
        name: {"values": known, "meaning": {value: value for value in known}}
        for name, known in {args.label: values, **further}.items()
        if known
    }
    card = card_of(args, labels, unit)
    card["processing"]["steps"] += [
        f"arrays: {args.images}, {', '.join(labels) or 'no label'}, patient {args.patient},"
        f" keep {args.keep}, test {args.test}, split {args.split}",
        f"splits by seed {args.seed}, {args.fractions}",
    ]
    card["warnings"] = [*args.warning, *whose]
    plan = plan.assign(part=args.images, file=where, array=args.images)
    columns = {args.label: "label"} | {name: f"also {name}" for name in further}
    return write(args, plan, columns, card, [*notes, *odd])


def write(
    args: argparse.Namespace, plan: pd.DataFrame, labels: Mapping[str, str], card: dict, notes
) -> Report:
    """Writes a plan, in this process: an .npz is one stream, read once from front to back.

    Args:
        args: of the command line.
        plan: see `data_prep.arrays.blocks`.
        labels: name of each label -> its column of the plan.
        card: see `data_prep.writer.prepare`.
        notes: what was odd so far.
    """
    items = list(arrays.blocks(plan, labels))
    return arrays.write(args, items, card, notes, workers=1)


def card_of(args: argparse.Namespace, labels: dict, unit: str) -> dict:
    """The card of an .npz, from the command line."""
    blank = tiles.blanks(args).steps
    return {
        "name": args.name or args.out.name,
        "origin": args.origin,
        "licence": args.licence,
        "spacing_mm": args.spacing,
        "processing": {"steps": [*blank, f"area-averaged to {args.size} pixels"]},
        "labels": labels,
        "unit": unit,
        "coordinates": ["item"],
        "warnings": args.warning,
    }


def _plan(args: argparse.Namespace) -> tuple[pd.DataFrame, list[str], list[str]]:
    """Patient, label and split of the images to use, values of the label, and notes."""
    names, notes = _names(args) if args.names else [], []
    plan = pd.DataFrame({"label": _labels(args, names), "patient": "", "split": ""}, dtype=str)
    n = len(plan)
    if args.patient not in (None, grouping.NOBODY):
        plan["patient"] = _patients(args.source, args.patient, n)
    if args.split:
        plan["split"] = _column(args.source, args.split, n)
    if args.test:
        name, _, value = args.test.partition("=")
        found = _column(args.source, name, n) if value else _mask(args.source, name, n)
        test = found == value if value else found
        if value and not test.any():
            raise UserError(f"{args.source}: {name} is nowhere {value!r}; --test names no image")
        plan["split"] = np.where(test, "test", "train")
    if args.keep:
        keep = _kept(args.source, args.keep, n)
        notes = [f"image left out by {args.keep}"] * int((~keep).sum())
        plan = plan[keep].copy()
    if args.patient is None:
        groups = _groups(args, n).loc[plan.index]
        grouping.ask(groups, range(groups.shape[1]), f"{args.source}: array")
    where, known = str(args.source), args.classes or names
    plan["label"], values, odd = read_labels(plan["label"], known, where, args.missing)
    if not (args.unlabelled or plan["label"].any()):
        raise UserError(f"{where}: no image has a label in {args.label}; or is it --unlabelled?")
    return plan, values, [*notes, *odd]


def _further(told: str) -> tuple[str, str]:
    """A further label, and the array of its names or ""."""
    name, _, names = told.partition("=")
    return label_name(name), names


def _also(args: argparse.Namespace, plan: pd.DataFrame) -> dict[str, list[str]]:
    """Writes further labels into the plan, and gives the values of each in order."""
    further = {}
    for name, of in args.also:
        if name == args.label or name in further:
            raise UserError(f"--also {name}: this label is taken already; each is needed once")
        own = argparse.Namespace(source=args.source, label=name, names=of, missing=args.missing)
        names = _names(own) if of else []
        texts = pd.Series(_column(args.source, name, missing=True))
        if len(texts) <= plan.index.max():
            raise UserError(
                f"{args.source}: array {name} is too short; one entry per image needed"
            )
        texts = texts.iloc[plan.index]
        texts = _named(texts, names, own) if of else texts
        found, values, _ = read_labels(list(texts), names, str(args.source), args.missing)
        plan[f"also {name}"], further[name] = found.to_numpy(), values
    return further


def _labels(args: argparse.Namespace, names: list[str]) -> Sequence[str]:
    """The label of each image, as it stands there or by its name."""
    if args.unlabelled:
        return [""] * arrays.opened(str(args.source), args.images).shape[0]
    labels = _column(args.source, args.label, missing=True)
    arrays.check(args.source, args.images, len(labels))
    return _named(labels, names, args) if names else labels


def _groups(args: argparse.Namespace, n: int) -> pd.DataFrame:
    """The arrays of one entry for each of n images that speak of patients and have no use."""
    used = {args.images, args.label, args.names, args.test, args.split, _limit(args.keep or "")[0]}
    with zipfile.ZipFile(args.source) as held:
        names = {m.removesuffix(".npy") for m in held.namelist() if m.endswith(".npy")} - used
    names = sorted(filter(grouping.speaks_of, names))
    found = {name: _array(args.source, name, [(n,), (n, 1)]) for name in names}
    texts = {name: a.ravel().astype(str) for name, a in found.items() if a is not None}
    return pd.DataFrame(texts, range(n), dtype=str)


def _array(file: Path, name: str, shapes: Sequence[tuple[int, ...]] = ()) -> np.ndarray | None:
    """A small array of an .npz; how much it declares is looked at before any of it is read.

    Args:
        file: the .npz.
        name: of the array.
        shapes: those of which it may be; None is returned for another.

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
                if shapes and shape not in shapes:
                    return None
                if math.prod(shape) * dtype.itemsize > LARGEST:
                    raise ValueError(f"array {name} declares {dtype} {shape}")
            with held.open(f"{name}.npy") as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except arrays.FAULTS as error:
        raise UserError(f"{file}: not a readable .npz ({error}); give another file") from error


def _names(args: argparse.Namespace) -> list[str]:
    """One text per label, each once."""
    names = [name.strip() for name in _column(args.source, args.names)]
    if len(set(names) - {""}) < len(names):
        raise UserError(f"{args.source}: array {args.names} repeats a name or has an empty one")
    return names


def _column(file: Path, name: str, n: int | None = None, missing: bool = False) -> np.ndarray:
    """One text per image; ``missing``: NaN may stand where there is none."""
    values = _array(file, name)
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.ndim != 1 or (n is not None and len(values) != n):
        raise UserError(
            f"{file}: array {name} has shape {values.shape}; one entry per image needed"
        )
    odd = np.isinf if missing else lambda found: ~np.isfinite(found)
    if values.dtype.kind == "f" and odd(values).any():
        raise UserError(f"{file}: array {name} has NaN or infinity; numbers are needed")
    try:
        return values.astype(str)
    except (TypeError, ValueError) as error:
        told = "numbers or texts are needed"
        raise UserError(f"{file}: array {name} has {values.dtype} ({error}); {told}") from error


def _mask(file: Path, name: str, n: int) -> np.ndarray:
    values = _column(file, name, n)
    if not set(values) <= set(TRUTH):
        raise UserError(
            f"{file}: array {name} is not true or false; a boolean array is needed (names of"
            " splits go with --split)"
        )
    return np.array([TRUTH[value] for value in values])


def _kept(file: Path, told: str, n: int) -> np.ndarray:
    """The images to use, by an array of true and false, by a limit or by what they are not."""
    name, limit, value = _limit(told)
    if value:
        kept = _column(file, name, n) != value
        if kept.all():
            raise UserError(f"{file}: {name} is nowhere {value!r}; --keep leaves nothing out")
        return kept
    if not limit:
        return _mask(file, told, n)
    try:
        return _column(file, name, n).astype(float) <= float(limit)
    except ValueError as error:
        raise UserError(f"{file}: --keep {told!r} does not compare numbers ({error})") from error


def _patients(file: Path, told: str, n: int) -> np.ndarray:
    """The patient of each image: an array, or of an array of numbers so many in a row."""
    name, _, together = told.partition("//")
    found = _column(file, name, n)
    if not together:
        return found
    try:
        return (found.astype(int) // int(together)).astype(str)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: --patient {told!r} does not divide whole numbers ({error})"
        ) from error


def _limit(told: str) -> tuple[str, str, str]:
    """The array that --keep names, its limit, and what it must not be; "" where there is none."""
    unequal = "!=" in told
    name, _, value = (part.strip() for part in told.partition("!=" if unequal else "<="))
    return name, "" if unequal else value, value if unequal else ""


def _named(labels: np.ndarray, names: list[str], args: argparse.Namespace) -> list[str]:
    """The name of each label; what means that there is none stays as it is."""
    codes = [label.strip().removesuffix(".0") for label in labels]
    known = {str(index): name for index, name in enumerate(names)}
    strange = [c for c in codes if c and c not in known and not is_missing(c, args.missing)]
    if strange:
        raise UserError(
            f"{args.source}: {args.label} has {strange[0]!r}; known are 0 to {len(names) - 1},"
            f" the places in {args.names}, and --missing says what means that there is no label"
        )
    return [known.get(code, code) for code in codes]
