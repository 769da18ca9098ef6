"""What readers and writers of image sets share, free of torch: words, checks, smaller images.

Each check may raise a `UserError` whose one sentence names the file, the fault and what is needed.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import psutil
from annotated_types import Gt, Len
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from hallulib import UserError

SPLITS = ("unlabelled", "train", "val", "test")
UNITS = {  # what the column patient of a table names -> one of them, several
    **{one: (one, f"{one}s") for one in ("patient", "exam", "eye", "lesion")},
    **{one: (one, f"{one}s") for one in ("specimen", "slide", "field", "group")},
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
    """How many there are, in words; of unknown patients nobody knows."""
    one, several = UNITS[unit]
    return several if unit == "unknown" else f"{n} {one if n == 1 else several}"


def area_average(images: np.ndarray, size: int) -> np.ndarray:
    r"""Makes square images smaller; a new pixel is the mean of the area that it covers.

    .. math:: y = \frac{1}{N^2} W x W^\top,
        \quad W_{ij} = \left|[i N, (i + 1) N] \cap [j n, (j + 1) n]\right|

    from N to n pixels a side, n at most N, for uint8 (batch, ..., N, N); halves are rounded to
    even. The weights are whole numbers, so sums are exact and results the same on every machine.
    """
    old = images.shape[-1]
    edges = np.arange(size + 1)[:, None] * old
    weights = np.diff(np.clip(edges - np.arange(old) * size, 0, size), axis=0).astype(float)
    reduced = np.empty((*images.shape[:-2], size, size), np.uint8)
    step = max(1, 2**22 // max(1, images[:1].size))  # bounds the copy in float64 to 32 MB
    for start in range(0, len(images), step):
        part = images[start : start + step].astype(float)
        reduced[start : start + step] = np.rint(weights @ part @ weights.T / old**2)
    return reduced


def free_memory() -> int:
    """Bytes that this machine can give away without putting anything on its disk."""
    return psutil.virtual_memory().available


def check_memory(n: int, channels: int, size: int, where: str, *, each: int = 1) -> None:
    """Refuses n images that do not fit into the memory, at so many bytes for ``each`` value.

    ``where`` says whose they are, and begins the sentence.
    """
    needed = n * channels * size**2 * each
    if needed <= (free := free_memory()):
        return
    fits = math.isqrt(free // (n * channels * each))
    raise UserError(
        f"{where}: {n:,} images of {size} x {size} pixels need {needed / 1e9:.3g} GB of memory and"
        f" {free / 1e9:.3g} GB are free; a size of at most {fits}, fewer images or more memory"
        " is needed"
    )


def map_array(file: Path | str) -> np.ndarray:
    """An .npy file as a memory map: what it declares must fit its size, and nothing is read.

    What is no whole .npy file of plain values is a `ValueError`.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes NumPy throw nearly anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _differ(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise ValueError("each value once is needed")
    return values


class _Processing(BaseModel):
    steps: list = []


class _Scheme(BaseModel):
    values: Annotated[list[Annotated[str, Len(1)]], Len(1), AfterValidator(_differ)]


class Card(BaseModel):
    """What a card must hold; writers add more."""

    model_config = ConfigDict(strict=True)
    name: str
    origin: str
    licence: str
    spacing_mm: list[Annotated[FiniteFloat, Gt(0)]] | None
    processing: _Processing
    labels: dict[str, _Scheme]
    counts: dict
    sha256: dict
    unit: Annotated[str, Field(pattern=f"^({'|'.join(UNITS)})$")] = "patient"


def read_card(file: Path) -> dict:
    """Reads a card and checks what it holds."""
    try:
        card = json.loads(file.read_text("utf-8"))
        Card.model_validate(card)
    except ValidationError as faults:
        fault = faults.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "all of it"
        told = f"{place} is missing or wrong ({fault['msg']})"
        raise UserError(f"{file}: {told}; prepare the set again") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not readable JSON ({error}); prepare the set again") from error
    return card


def check_images(images: np.ndarray, file: str) -> None:
    """Checks type and shape; uint8 has no missing or infinite value, so nothing is read."""
    square = images.ndim == 4 and 0 < images.shape[2] == images.shape[3]
    if images.dtype != np.uint8 or not square or not len(images) or images.shape[1] not in (1, 3):
        raise UserError(
            f"{file}: {images.dtype} of shape {images.shape}; square images of 1 or 3 channels,"
            " uint8 (images, channels, height, width), are needed"
        )


def check_table(table: pd.DataFrame, card: Mapping, where: str) -> None:
    """Checks columns, labels, splits and patients of a table (of strings) by its card."""
    file, schemes = f"{where}/table.csv", list(card["labels"])
    needed = ["patient", "split", *schemes]
    if list(table.columns[: len(needed)]) != needed:
        raise UserError(f"{file}: columns are {list(table.columns)}; must begin with {needed}")
    known = {"split": SPLITS} | {s: ("", *about["values"]) for s, about in card["labels"].items()}
    for name, values in known.items():
        strange = ~table[name].isin(values)
        if strange.any():
            row, told = strange.argmax(), ", ".join(map(repr, values))
            raise UserError(
                f"{file}: row {row} has {name} {table[name].iloc[row]!r}; known: {told}"
            )
    unlabelled = table["split"] == "unlabelled"
    labelled = (table[schemes] != "").any(axis=1) if schemes else ~unlabelled
    for wrong, told in (
        (table["patient"] == "", "without a patient; every image needs one"),
        (unlabelled & labelled, "in split unlabelled but has a label; it must have none"),
        (~unlabelled & ~labelled, "without a label in a labelled split; it belongs in unlabelled"),
    ):
        if wrong.any():
            raise UserError(f"{file}: row {wrong.argmax()} is {told}")
    check_disjoint(table, card.get("unit", "patient"), file)


def check_disjoint(table: pd.DataFrame, unit: str, where: str) -> None:
    """Checks that nobody is in two splits; ``unit`` is what is called patient there."""
    pairs = table[["patient", "split"]].drop_duplicates()
    twice = pairs["patient"].duplicated()
    if twice.any():
        patient, noun = pairs["patient"].iloc[twice.argmax()], UNITS[unit][0]
        splits = " and ".join(pairs.loc[pairs["patient"] == patient, "split"])
        article = "an" if noun[0] in "aeu" else "a"
        raise UserError(
            f"{where}: {noun} {patient} is in {splits}; {article} {noun} may be in one split only"
        )


def check_sums(folder: Path, sha256: Mapping[str, str]) -> None:
    """Compares the files with their SHA-256, in bounded memory."""
    for name in ("table.csv", "images.npy"):
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.get(name):
            raise UserError(
                f"{folder}/{name}: SHA-256 differs from card.json, so it was changed or damaged"
                " after it was prepared; prepare the set again"
            )
