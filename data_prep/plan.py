"""What every generic archive shares: its options, and the plan of patients, labels and splits."""

import argparse
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from data_prep.splitting import split_patients
from hallulib import UserError
from hallulib.data.checks import SPLITS, UNITS, check_disjoint

OWN_PATIENT = (
    "image without patient: counted as its own, so leaks between splits cannot be excluded"
)
RESERVED = ("file", "patient", "split", "item")
SPLIT_NAMES = {
    "unlabelled": ("unlabelled", "unlabeled"),
    "train": ("train", "training", "trainset", "trainingset"),
    "val": ("val", "valid", "validation", "dev", "valset", "validset", "validationset"),
    "test": ("test", "testing", "testset", "testingset"),
}
MISSING = ("nan", "na", "n/a", "<na>", "#n/a", "nat", "null", "?")  # nothing else is meant by them
UNCLEAR = ("none", "unknown", "-", "--")  # no finding, not known, or HER2 negative
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?", re.IGNORECASE)


def split_name(text: str) -> str:
    """The split that a folder or a cell means, in any case, or "": ``Testing`` is ``test``."""
    word = re.sub(r"[\s_-]", "", text).lower()
    return next((split for split, names in SPLIT_NAMES.items() if word in names), "")


def add_output(parser: argparse.ArgumentParser, size: str = "%(default)s") -> None:
    """Options of every archive; ``size``: how the help tells the default of ``--size``."""
    parser.add_argument(
        "out", type=output, metavar="OUT", help="the image set, a folder to create"
    )
    told = f"side in pixels (default {size})"  # an archive may set another default
    parser.add_argument("--size", type=pixels, default=64, help=told)
    parser.add_argument("--name", help="name of the set (default: name of OUT)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def add_fault(parser: argparse.ArgumentParser, what: str) -> None:
    """The option of archives of many files; ``what``: of which some may be damaged."""
    told = f"what to do with a {what} that cannot be read: stop and name all, or leave them out"
    choices = ["stop", "skip"]
    parser.add_argument(
        "--on-fault", choices=choices, default="stop", help=told + " (default %(default)s)"
    )


def add_origin(parser: argparse.ArgumentParser) -> None:
    """Options of archives that say nothing about themselves."""
    parser.add_argument("--origin", default="not stated", help="where the images come from")
    parser.add_argument("--licence", default="not stated", help="terms of use of the images")
    parser.add_argument("--spacing", type=spacing, help="mm per pixel of OUT: 0.5, or 0.5,0.4")
    parser.add_argument(
        "--warning", action="append", default=[], help="what readers of the card must know"
    )


def add_label(parser: argparse.ArgumentParser, told: str) -> None:
    """The options of the label; ``told``: what it is in this archive."""
    told += " (default %(default)s)"
    parser.add_argument("--label", type=label_name, default="label", help=told)
    told = "label values in order, a,b,c (default: sorted)"
    parser.add_argument("--classes", type=values, default=[], help=told)
    told = f"labels that mean that there is none, a,b (besides {' '.join(MISSING)})"
    parser.add_argument("--missing", type=values, default=[], help=told.replace("%", "%%"))


def add_unit(parser: argparse.ArgumentParser) -> None:
    """The option that says what images are grouped by, for the card."""
    told = "what is called patient here: it is in one split only (default patient)"
    parser.add_argument("--unit", choices=list(UNITS), help=told)


def add_splits(parser: argparse.ArgumentParser) -> None:
    """Options of archives without a complete split."""
    parser.add_argument(
        "--fractions",
        type=fractions,
        default="train=.7,val=.1,test=.2",
        help="share of the images in each split (default %(default)s); splits that the data come"
        " with are kept, and val is taken from train where it is missing",
    )
    add_seed(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """The option that numbers the divisions of patients."""
    parser.add_argument("--seed", type=seed, default=0, help="of the split (default 0)")


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


def seed(text: str) -> int:
    """A number from which splits are drawn.

    Raises:
        argparse.ArgumentTypeError: not a whole number from 0 to 2**32 - 1.
    """
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**32 - 1")
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


def values(text: str) -> list[str]:
    """``a,b,c`` as a list.

    Raises:
        argparse.ArgumentTypeError: a value is empty or there twice.
    """
    found = [_plain(value) for value in text.split(",")]
    if len(set(found) - {""}) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not like a,b,c, each value once")
    return found


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


def unit_of(patients: pd.Series, told: str | None, where: str) -> str:
    """What the images are grouped by: what was told, "patient", or "unknown" without any.

    Raises:
        UserError: a unit was told, and no image has one.
    """
    if (patients != "").any():
        return told or "patient"
    if told not in (None, "unknown"):
        raise UserError(
            f"{where}: --unit is {told}, but nothing tells the {told} of an image; an option or"
            " column of patients is needed (--help lists them)"
        )
    return "unknown"


def read_labels(
    labels: Sequence[str], classes: Sequence[str], where: str, missing: Sequence[str] = ()
) -> tuple[pd.Series, list[str], list[str]]:
    """Labels as texts, each class under one name; what means that there is no label is empty.

    Whatever stands in ``classes`` is a class and under no suspicion.

    Args:
        labels: one per image, as found.
        classes: the values in order, if they are known.
        where: the file that says so, for messages.
        missing: further texts that mean that there is no label.

    Returns:
        The labels, "" where there is none; their values in order; and notes of what was odd.

    Raises:
        UserError: a label that may mean that there is none, two that differ in spelling only, or
            one that is not in ``classes``.
    """
    texts = pd.Series(labels, dtype=str).map(_plain)
    counts = Counter(texts)
    none = [t for t in counts if is_missing(t, missing) and t not in classes]
    notes = [f"label {text!r} taken as unlabelled" for text in none for _ in range(counts[text])]
    found = set(counts) - set(none) - {""}
    _check_spelling(found - set(classes), _unclear(found) - set(classes), where)
    texts = texts.where(~texts.isin(none), "")
    known = list(classes) or order(found)
    check_known(texts, known, where)
    return texts, known, notes


def _check_spelling(found: set[str], unclear: set[str], where: str) -> None:
    """Refuses labels of which a class would be made that nobody meant."""
    for text in sorted(unclear)[:1]:
        raise UserError(
            f"{where}: label {text!r} may mean that there is none; --missing={text} takes its"
            " images as unlabelled, --classes names it as a class"
        )
    for one, other in _twice(found, lambda t: _spelling(t) if _number(t) is None else _number(t)):
        raise UserError(
            f"{where}: labels {one!r} and {other!r} differ in spelling only; one spelling is"
            " needed, or --classes that names both"
        )


def is_missing(text: str, told: Sequence[str] = ()) -> bool:
    """Whether a text means that nothing is known; ``told``: what else means it."""
    return text in told or text.casefold() in MISSING


def settle(
    plan: pd.DataFrame,
    shares: Mapping[str, float],
    seed: int,
    where: str,
    unit: str = "patient",
) -> tuple[pd.DataFrame, list[str]]:
    """Gives every image a split and every patient a pseudonym.

    Splits that came with the data are kept; if val is missing there, it is taken from train, and
    only val is.
    Images without label become ``unlabelled``; they are left out if their patient has labels.
    A patient in two spellings is one patient: to be wrong about that costs nothing.

    Args:
        plan: strings, one row per image: ``patient``, ``label``, ``split`` (a published name of
            it will do), "" where unknown; the patient "" stands for the image itself.
        shares: split -> share of the images.
        seed: of the division.
        where: the file that says so, for messages.
        unit: what is called patient here, for messages.

    Returns:
        The plan, without rows left out, its index kept; and notes of what was odd.

    Raises:
        UserError: an unknown split, a split without a label, a patient in two splits, or one
            whose name may mean that it is not known.
    """
    plan = plan.assign(split=[split_name(split) or split for split in plan["split"]])
    plan["patient"], notes = _read_patients(plan["patient"], where, unit)
    nobody = plan["patient"] == ""
    plan.loc[nobody, "patient"] = [f"\0image {i:09d}" for i in np.flatnonzero(nobody)]
    notes += [OWN_PATIENT] * int(nobody.sum())
    _check(plan, where)
    bare = plan["label"] == ""
    plan.loc[bare, "split"] = "unlabelled"
    twice = bare & plan["patient"].isin(plan.loc[~bare, "patient"])
    notes += ["unlabelled image of a labelled patient left out"] * int(twice.sum())
    plan = plan[~twice].copy()
    _keep_together(plan, where, unit)
    notes += _divide(plan, shares, seed)
    names = {patient: f"p{i:05d}" for i, patient in enumerate(sorted(set(plan["patient"])), 1)}
    plan["patient"] = plan["patient"].map(names)
    return plan, notes


def order(values: Sequence[str]) -> list[str]:
    """Label values in order: by number if all are numbers, else by name."""
    names = sorted(set(values) - {""})
    if all(_number(name) is not None for name in names):
        return sorted(names, key=_number)  # 1 and 01 stay in the order of their names
    return names


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


def _read_patients(patients: pd.Series, where: str, unit: str) -> tuple[pd.Series, list[str]]:
    """Patients under one name each; what may mean "not known" would tie strangers together."""
    texts = patients.map(_plain)
    found = set(texts) - {""}
    strange, noun = sorted(_unclear(found) | set(filter(is_missing, found))), UNITS[unit][0]
    if strange:
        raise UserError(
            f"{where}: {noun} {strange[0]!r} may mean that it is not known; nothing is needed in"
            " its place if so, and another name if not"
        )
    twice = {other: one for one, other in _twice(found, _spelling)}
    return texts.map(lambda text: twice.get(text, text)), [
        f"{noun} in two spellings: taken as one"
    ] * len(twice)


def _plain(text: str) -> str:
    """The text without spaces around it, accents as one character with their letter."""
    return unicodedata.normalize("NFC", text).strip()


def _number(text: str) -> Decimal | None:
    """The number that a text is; exact, since long ones may be names."""
    return Decimal(text) if NUMBER.fullmatch(text) else None


def _spelling(text: str) -> str:
    """What two spellings of a name have in common; leading zeros belong to a name."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)


def _twice(found: Iterable[str], key) -> list[tuple[str, str]]:
    """Pairs of texts of one key: the first of them in order, and another."""
    first: dict = {}
    pairs = [(first.setdefault(key(text), text), text) for text in sorted(found)]
    return [(one, other) for one, other in pairs if one != other]


def _unclear(found: set[str]) -> set[str]:
    """Texts that may stand for nothing: words, and negative numbers among other texts."""
    numbers = {text: _number(text) for text in found}
    below = {text for text, number in numbers.items() if number is not None and number < 0}
    words = {text for text in found if text.casefold() in UNCLEAR}
    return words | (below if below < found - words else set())


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


def _keep_together(plan: pd.DataFrame, where: str, unit: str) -> None:
    """Spreads a known split to the other images of the patient."""
    known = plan.loc[plan["split"] != "", ["patient", "split"]]
    check_disjoint(known, unit, where)
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
    shares = shares if sum(shares.values()) > 0 else {"train": 1.0}
    shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    patients, labels = list(plan.loc[rows, "patient"]), list(plan.loc[rows, "label"])
    plan.loc[rows, "split"] = plan.loc[rows, "patient"].map(
        split_patients(patients, labels, shares, seed)
    )
