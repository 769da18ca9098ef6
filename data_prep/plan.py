"""What every generic archive shares: its options, and the plan of patients, labels and splits."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from hallulib import UserError
from hallulib.integrity import SPLITS

OWN_PATIENT = (
    "image without patient: counted as its own, so leaks between splits cannot be excluded"
)
RESERVED = ("file", "patient", "split", "item")
SPLIT_NAMES = {
    "unlabelled": ("unlabelled", "unlabeled"),
    "train": ("train", "training", "trainset", "trainingset"),
    "val": ("val", "valid", "validation", "valset", "validset", "validationset"),
    "test": ("test", "testing", "testset", "testingset"),
}


def split_name(text: str) -> str:
    """The split that a folder or a cell means, in any case, or "": ``Testing`` is ``test``."""
    word = re.sub(r"[\s_-]", "", text).lower()
    return next((split for split, names in SPLIT_NAMES.items() if word in names), "")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options of every archive."""
    parser.add_argument(
        "out", type=output, metavar="OUT", help="the image set, a folder to create"
    )
    size = "side in pixels (default %(default)s)"  # an archive may set another default
    parser.add_argument("--size", type=pixels, default=64, help=size)
    parser.add_argument("--name", help="name of the set (default: name of OUT)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def add_origin(parser: argparse.ArgumentParser) -> None:
    """Options of archives that say nothing about themselves."""
    parser.add_argument("--origin", default="not stated", help="where the images come from")
    parser.add_argument("--licence", default="not stated", help="terms of use of the images")
    parser.add_argument("--spacing", type=spacing, help="mm per pixel of OUT: 0.5, or 0.5,0.4")
    parser.add_argument(
        "--warning", action="append", default=[], help="what readers of the card must know"
    )


def add_label(parser: argparse.ArgumentParser, told: str) -> None:
    """The option that names the label; ``told``: what it is in this archive."""
    told += " (default %(default)s)"
    parser.add_argument("--label", type=label_name, default="label", help=told)


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Options of archives without a complete split."""
    parser.add_argument(
        "--fractions",
        type=fractions,
        default="train=.7,val=.1,test=.2",
        help="share of the images in each split (default %(default)s); splits that the data come"
        " with are kept, and val is taken from train where it is missing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")


def output(text: str) -> Path:
    """The folder to create, its ``~`` expanded.

    Raises:
        argparse.ArgumentTypeError: no folder can be created under this name.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~ of a user that there is not
        raise argparse.ArgumentTypeError(f"{text!r}: {error}".rstrip(".")) from error
    if path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} names no new folder; sets/mine does")
    return path


def pixels(text: str) -> int:
    """A side in pixels.

    Raises:
        argparse.ArgumentTypeError: not a whole number above 0.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels above 0")
    return int(text)


def label_name(text: str) -> str:
    """The name of a label, which becomes a column of the table.

    Raises:
        argparse.ArgumentTypeError: another column has it, or there is none.
    """
    if text.strip().lower() in ("", *RESERVED):
        told = f"{text!r} cannot name a label: {', '.join(RESERVED)} are columns of their own"
        raise argparse.ArgumentTypeError(told)
    return text.strip()


def fractions(text: str) -> dict[str, float]:
    """``train=.7,val=.1,test=.2`` as a dict.

    Raises:
        argparse.ArgumentTypeError: not shares of splits that sum to 1.
    """
    try:
        shares = {name: float(share) for name, share in (p.split("=") for p in text.split(","))}
        good = set(shares) <= set(SPLITS[1:]) and min(shares.values()) >= 0
        good &= math.isclose(sum(shares.values()), 1, abs_tol=1e-6)
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is not like train=.7,val=.1,test=.2, sum 1")
    return shares


def spacing(text: str) -> list[float]:
    """``0.5`` or ``0.5,0.4`` as [row, column] in mm.

    Raises:
        argparse.ArgumentTypeError: not one or two lengths above 0.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(math.isfinite(v) and v > 0 for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or two lengths in mm above 0")
    return [values[0], values[-1]]


def settle(
    plan: pd.DataFrame, shares: Mapping[str, float], seed: int, where: str
) -> tuple[pd.DataFrame, list[str]]:
    """Gives every image a split and every patient a pseudonym.

    Splits that came with the data are kept; if val is missing there, it is taken from train, and
    only val is.
    Images without label become ``unlabelled``; they are left out if their patient has labels.

    Args:
        plan: strings, one row per image: ``patient``, ``label``, ``split``, "" where unknown; the
            patient "" stands for the image itself.
        shares: split -> share of the images.
        seed: of the division.
        where: the file that says so, for messages.

    Returns:
        The plan, without rows left out, its index kept; and notes of what was odd.

    Raises:
        UserError: an unknown split, a split without a label, or a patient in two splits.
    """
    plan, notes = plan.copy(), []
    nobody = plan["patient"] == ""
    plan.loc[nobody, "patient"] = [f"\0image {i:09d}" for i in np.flatnonzero(nobody)]
    notes += [OWN_PATIENT] * int(nobody.sum())
    _check(plan, where)
    bare = plan["label"] == ""
    plan.loc[bare, "split"] = "unlabelled"
    twice = bare & plan["patient"].isin(plan.loc[~bare, "patient"])
    notes += ["unlabelled image of a labelled patient left out"] * int(twice.sum())
    plan = plan[~twice].copy()
    _keep_together(plan, where)
    notes += _divide(plan, shares, seed)
    names = {patient: f"p{i:05d}" for i, patient in enumerate(sorted(set(plan["patient"])), 1)}
    plan["patient"] = plan["patient"].map(names)
    return plan, notes


def order(values: Sequence[str]) -> list[str]:
    """Label values in order: by number if all are numbers, else by name."""
    names = sorted(set(values) - {""})
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return names
    if any(map(math.isnan, numbers)):  # it has no place among numbers
        return names
    return sorted(names, key=float)  # 2 and 2.0 stay in the order of their names


def check_known(labels: pd.Series, known: Sequence[str], where: str) -> None:
    """Refuses labels that were not announced.

    Raises:
        UserError: names the first, and what is known.
    """
    strange = labels[~labels.isin(["", *known])]
    if len(strange):
        told = ", ".join(known)
        raise UserError(
            f"{where}: row {strange.index[0]} has label {strange.iloc[0]!r}; known: {told}"
        )


def is_below(name: str) -> bool:
    """Whether a path that a table names stays below the folder that it is joined to."""
    path = PurePosixPath(name.replace("\\", "/"))
    outside = path.is_absolute() or Path(name).is_absolute()
    return bool(name) and not outside and ".." not in path.parts


def _check(plan: pd.DataFrame, where: str) -> None:
    strange = plan[~plan["split"].isin(["", *SPLITS])]
    if len(strange):
        told = f"row {strange.index[0]} has split {strange['split'].iloc[0]!r}"
        raise UserError(f"{where}: {told}; known: {', '.join(SPLITS)}, or empty")
    wrong = plan[(plan["label"] == "") & ~plan["split"].isin(["", "unlabelled"])]
    wrong = pd.concat([wrong, plan[(plan["label"] != "") & (plan["split"] == "unlabelled")]])
    if len(wrong):
        told = f"row {wrong.index[0]} has split {wrong['split'].iloc[0]!r}"
        told += f" and label {wrong['label'].iloc[0]!r}"
        raise UserError(f"{where}: {told}; unlabelled must go with an empty label, and only it")


def _keep_together(plan: pd.DataFrame, where: str) -> None:
    """Spreads a known split to the other images of the patient."""
    known = plan.loc[plan["split"] != "", ["patient", "split"]].drop_duplicates()
    twice = known["patient"].duplicated()
    if twice.any():
        patient = known.loc[twice, "patient"].iloc[0]
        splits = " and ".join(known.loc[known["patient"] == patient, "split"])
        raise UserError(
            f"{where}: patient {patient} is in {splits}; a patient may be in one split only"
        )
    split_of = dict(zip(known["patient"], known["split"], strict=True))
    plan["split"] = [split_of.get(patient, "") for patient in plan["patient"]]


def _divide(plan: pd.DataFrame, shares: Mapping[str, float], seed: int) -> list[str]:
    """Deals what has no split, and train where val has to come from it."""
    given = set(plan["split"]) - {"", "unlabelled"}
    loose, notes = plan["split"] == "", []
    if "train" in given and "val" not in given and shares.get("val", 0) > 0:
        train = plan["split"] == "train"
        _deal(plan, train, {s: share for s, share in shares.items() if s != "test"}, seed)
        notes = ["val split was missing: taken from train"]
        given -= {"train"}
    _deal(plan, loose, {s: share for s, share in shares.items() if s not in given}, seed)
    return notes


def _deal(plan: pd.DataFrame, rows: pd.Series, shares: Mapping[str, float], seed: int) -> None:
    """Gives splits to some rows; the shares need not sum to 1, all is train if they sum to 0."""
    if not rows.any():
        return
    from hallulib.data import split_patients  # late: imports torch, which not all need

    shares = shares if sum(shares.values()) > 0 else {"train": 1.0}
    shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    patients, labels = list(plan.loc[rows, "patient"]), list(plan.loc[rows, "label"])
    plan.loc[rows, "split"] = plan.loc[rows, "patient"].map(
        split_patients(patients, labels, shares, seed)
    )
