"""What makes an image set whole: the checks behind `hallulib.data.imageset.open` and the writers.

Each check raises a `UserError` whose one sentence names the file, the fault and what is needed.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hallulib import UserError

SPLITS = ("unlabelled", "train", "val", "test")
CARD = ("name", "origin", "licence", "spacing_mm", "processing", "labels", "counts", "sha256")
TEXTS, TABLES = ("name", "origin", "licence"), ("processing", "labels", "counts", "sha256")
UNITS = {  # what the column patient of a table names -> one of them, several
    "patient": ("patient", "patients"),
    "exam": ("exam", "exams"),
    "eye": ("eye", "eyes"),
    "lesion": ("lesion", "lesions"),
    "specimen": ("specimen", "specimens"),
    "slide": ("slide", "slides"),
    "field": ("field", "fields"),
    "near-copies": ("group of near copies", "groups of near copies"),
    "unknown": ("unknown patient", "unknown patients"),  # every image is its own
}


def read_patients_as(unit: str) -> str:
    """What a text that says "patients" means for an image set whose groups are something else.

    Example:
        >>> read_patients_as("slide")
        '; where this chapter says patients, read slides'
        >>> read_patients_as("patient")
        ''
    """
    if unit == "patient":
        return ""
    if unit == "unknown":
        return "; patients are unknown, and each image is taken for one of its own"
    return f"; where this chapter says patients, read {UNITS[unit][1]}"


def count_units(unit: str, n: int) -> str:
    """How many there are, in words; of unknown patients nobody knows.

    Example:
        >>> count_units("field", 60), count_units("patient", 1), count_units("unknown", 60)
        ('60 fields', '1 patient', 'unknown patients')
    """
    one, several = UNITS[unit]
    return several if unit == "unknown" else f"{n} {one if n == 1 else several}"


def map_array(file: Path | str) -> np.ndarray:
    """An .npy file as a memory map: what it declares must fit its size, and nothing is read.

    Raises:
        ValueError: it is no whole .npy file of plain values.
        OSError: there is no such file.
    """
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header makes NumPy throw nearly anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError("several arrays in one file")
    return found


def read_card(file: Path) -> dict:
    """Reads a card and checks its keys, label values and spacing.

    Raises:
        UserError: it is not JSON or something is missing or impossible.
    """
    try:
        card = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not readable JSON ({error}); prepare the set again") from error
    missing = [key for key in CARD if key not in card] if isinstance(card, dict) else CARD
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} missing; a card needs {', '.join(CARD)}")
    for kind, told, keys in ((str, "a text", TEXTS), (dict, "a table", TABLES)):
        strange = [key for key in keys if not isinstance(card[key], kind)]
        if strange:
            found = type(card[strange[0]]).__name__
            raise UserError(f"{file}: {strange[0]} is of type {found}; {told} is needed")
    if not isinstance(card["processing"].get("steps", []), list):
        raise UserError(f"{file}: the steps of processing are no list; [texts] are needed")
    _check_unit(card, file)
    spacing = card["spacing_mm"]
    try:
        good = all(_are_values(about["values"]) for about in card["labels"].values())
        good &= spacing is None or all(math.isfinite(s) and s > 0 for s in spacing)
    except (AttributeError, KeyError, TypeError, OverflowError):
        good = False
    if not good:
        raise UserError(
            f"{file}: labels or spacing_mm cannot be read; {{scheme: {{values: [texts]}}}}, each"
            " value once, and null or lengths above 0 are needed"
        )
    return card


def check_images(images: np.ndarray, file: str) -> None:
    """Checks type and shape; uint8 has no missing or infinite value, so nothing is read.

    Raises:
        UserError: not uint8 (N, C, H, H) with N, H > 0 and C 1 or 3.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        found = f"{images.dtype} of shape {images.shape}"
        raise UserError(f"{file}: {found}; uint8 (images, channels, height, width) is needed")
    n, channels, height, width = images.shape
    if not n or channels not in (1, 3) or height != width or not height:
        raise UserError(
            f"{file}: shape {images.shape}; square images of 1 or 3 channels are needed"
        )


def check_table(table: pd.DataFrame, card: Mapping, where: str) -> None:
    """Checks columns, labels, splits, patients and counts of a table against its card.

    Args:
        table: strings, one row per image.
        card: with ``labels`` and, if known, ``counts``.
        where: the set, for the message.

    Raises:
        UserError: the first fault found.
    """
    file, schemes = f"{where}/table.csv", list(card["labels"])
    needed = ["patient", "split", *schemes]
    if list(table.columns[: len(needed)]) != needed:
        raise UserError(f"{file}: columns are {list(table.columns)}; must begin with {needed}")
    nobody = table["patient"] == ""
    if nobody.any():
        raise UserError(f"{file}: row {_first(nobody)} has no patient; every image needs one")
    _check_values(table["split"], SPLITS, file)
    for scheme, about in card["labels"].items():
        _check_values(table[scheme], ("", *about["values"]), file)
    _check_labelled(table, schemes, file)
    check_disjoint(table, card.get("unit", "patient"), file)
    found = {"images": len(table), "patients": table["patient"].nunique()}
    for name, n in found.items():
        told = card.get("counts", {}).get(name, n)
        if told != n:
            raise UserError(
                f"{where}/card.json: counts {told} {name} but table.csv has {n}; they must agree"
            )


def check_disjoint(table: pd.DataFrame, unit: str, where: str) -> None:
    """Checks that nobody is in two splits.

    Args:
        table: with ``patient`` and ``split``.
        unit: what is called patient there.
        where: the file, for the message.

    Raises:
        UserError: names the first who is, and the splits.
    """
    pairs = table[["patient", "split"]].drop_duplicates()
    twice = pairs["patient"].duplicated()
    if twice.any():
        patient, noun = pairs["patient"].iloc[_first(twice)], UNITS[unit][0]
        splits = " and ".join(pairs.loc[pairs["patient"] == patient, "split"])
        article = "an" if noun[0] in "aeu" else "a"
        raise UserError(
            f"{where}: {noun} {patient} is in {splits}; {article} {noun} may be in one split only"
        )


def check_sums(folder: Path, sha256: Mapping[str, str]) -> None:
    """Compares the files with their SHA-256, in bounded memory.

    Raises:
        UserError: a file is not the one that was prepared.
    """
    for name in ("table.csv", "images.npy"):
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.get(name):
            raise UserError(
                f"{folder}/{name}: SHA-256 differs from card.json, so it was changed or damaged"
                " after it was prepared; prepare the set again"
            )


def _check_unit(card: Mapping, file: Path) -> None:
    if card.get("unit", "patient") not in list(UNITS):  # a list: what JSON holds may not hash
        told = ", ".join(UNITS)
        raise UserError(f"{file}: unit is {card['unit']!r}; one of {told} is needed")


def _are_values(values: Sequence[str]) -> bool:
    texts = isinstance(values, list) and all(isinstance(v, str) and v for v in values)
    return texts and len(set(values)) == len(values) > 0


def _check_values(column: pd.Series, known: Sequence[str], file: str) -> None:
    strange = ~column.isin(known)
    if strange.any():
        row = _first(strange)
        told = ", ".join(repr(value) for value in known)
        raise UserError(f"{file}: row {row} has {column.name} {column.iloc[row]!r}; known: {told}")


def _check_labelled(table: pd.DataFrame, schemes: list[str], file: str) -> None:
    labelled = (table[schemes] != "").any(axis=1) if schemes else table["split"] != "unlabelled"
    unlabelled = table["split"] == "unlabelled"
    for wrong, told in (
        (
            unlabelled & labelled,
            "in split unlabelled but has a label; it must have none",
        ),
        (
            ~unlabelled & ~labelled,
            "in a labelled split without a label; it belongs in unlabelled",
        ),
    ):
        if wrong.any():
            raise UserError(f"{file}: row {_first(wrong)} is {told}")


def _first(mask: pd.Series) -> int:
    return int(np.flatnonzero(mask)[0])
