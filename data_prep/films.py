"""What the archives of mammograms share: tables, options, and from a list of films to a set."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import mammogram, plan
from data_prep.staging import Fault, File, Study, listed
from data_prep.writer import Report, prepare, versions
from hallulib import UserError

MISSING = "film of the table that is not on disk: left out"
COORDINATES = ("side", "view", "item")
SIDES = {"L": "left", "R": "right"}


@dataclass(frozen=True)
class Film:
    """One image: its file and its row of the table."""

    file: File
    row: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """The place in the archive's tables."""
        return f"film {dict(self.row)['item']}"


@dataclass(frozen=True)
class Archive:
    """What the card says of an archive, and how its films are divided.

    Args:
        origin: where the images come from.
        licence: their terms of use.
        labels: label scheme -> values and meaning; ``diagnosis`` first.
        steps: how labels and splits were made.
        warnings: what readers of the card must know.
        official: the archive says what is test.
        unit: what it tells of each film, see `hallulib.data.checks.UNITS`.
    """

    origin: str
    licence: str
    labels: dict[str, dict]
    steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    official: bool = False
    unit: str = "patient"


def add_arguments(parser: argparse.ArgumentParser, official: bool) -> None:
    """Options of every archive of mammograms, after the folders.

    Args:
        parser: of the archive.
        official: the archive says what is test; only val is divided off.
    """
    plan.add_output(parser)
    plan.add_splits(parser)
    parser.set_defaults(size=128)
    if official:
        parser.set_defaults(fractions="train=.9,val=.1")
    plan.add_fault(parser, "film")


def add_three(parser: argparse.ArgumentParser) -> None:
    """The option of archives whose diagnosis is a BI-RADS category."""
    told = "diagnosis of BI-RADS 3, probably benign (default benign)"
    choices = ["benign", "malignant", "drop"]
    parser.add_argument("--birads3", choices=choices, default="benign", help=told)


def once(table: pd.DataFrame, column: str, where: Path) -> tuple[pd.DataFrame, list[str]]:
    """Drops rows that repeat another in full.

    Returns:
        The table, every value of ``column`` once; and notes.

    Raises:
        UserError: two rows with one value of ``column`` contradict each other.
    """
    again = table.duplicated()
    table = table[~again]
    twice = table.index[table[column].duplicated()]
    if len(twice):
        first = table.index[table[column] == table.loc[twice[0], column]][0]
        raise UserError(
            f"{where}: rows {first} and {twice[0]} are of one {column} and differ; one is needed"
        )
    return table, ["row that repeats another: left out"] * int(again.sum())


def locate(
    table: pd.DataFrame, find: Callable[[pd.Series], Path | None], on_fault: str, root: Path
) -> tuple[pd.DataFrame, list[str]]:
    """The rows whose image is on disk, with its path as column ``file``.

    Args:
        table: one row per film.
        find: row -> its file, or None; may raise a `Fault`.
        on_fault: ``stop`` or ``skip``.
        root: where the images should be, for the message.

    Raises:
        UserError: there is no image at all; or, with ``stop``, a fault of ``find``.
    """
    files, faults = [], []
    for _, row in table.iterrows():
        try:
            files.append(str(find(row) or ""))
        except Fault as fault:
            files.append("")
            faults.append(fault)
    if faults and on_fault == "stop":
        raise UserError(listed(faults))
    notes = [f"left out: {fault.kind}" for fault in faults]
    table = table.assign(file=files)
    found = table[table["file"] != ""]
    if found.empty:
        raise UserError(
            f"{root}: none of the {len(table)} films of the tables is in it; the folder that the"
            " archive unpacks to is needed (--help shows it)"
        )
    return found, notes + [MISSING] * (len(table) - len(found) - len(notes))


def make(
    args: argparse.Namespace,
    films: pd.DataFrame,
    archive: Archive,
    notes: Sequence[str],
    where: Path,
) -> Report:
    """Divides the patients, reads the films and writes the set.

    Args:
        args: of the command line.
        films: strings, one row per film: ``file``, ``patient``, ``split`` ("" = to be divided),
            the label columns of the archive and `COORDINATES`. Films without diagnosis are left
            out.
        archive: see there.
        notes: what was odd so far.
        where: the table, for messages.

    Raises:
        UserError: see `data_prep.writer.prepare`.
    """
    if not 8 <= args.size <= 1024:
        raise UserError(f"--size is {args.size}; 8 to 1024 pixels are needed")
    bare = films["diagnosis"] == ""
    notes = [*notes, *["film without diagnosis: left out"] * int(bare.sum())]
    films = films[~bare].assign(label=films["diagnosis"])
    shares = {s: n for s, n in args.fractions.items() if not (archive.official and s == "test")}
    films, odd = plan.settle(films, shares, args.seed, str(where), archive.unit)
    names = ["patient", "split", *archive.labels, *COORDINATES]
    rows = films[names].to_dict("records")
    items = [
        Film(File.of(Path(file)), tuple(row.items()))
        for file, row in zip(films["file"], rows, strict=True)
    ]
    read = partial(read_film, size=args.size)
    return prepare(
        args.out,
        items,
        read,
        _card(args, archive, shares),
        notes=[*notes, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def read_film(film: Film, size: int) -> Study:
    """Reads one film.

    Raises:
        Fault: it cannot be read.
    """
    image, notes = mammogram.read(Path(film.file.path), size)
    return Study([image[None]], [dict(film.row)], notes)


def _card(args: argparse.Namespace, archive: Archive, shares: dict[str, float]) -> dict:
    steps = [
        *archive.steps,
        *mammogram.STEPS,
        f"area-averaged to {args.size} pixels",
        f"splits that the archive does not give: by patient, stratified by diagnosis, {shares},"
        f" seed {args.seed}",
    ]
    return {
        "name": args.name or args.out.name,
        "origin": archive.origin,
        "licence": archive.licence,
        "spacing_mm": None,  # every breast fills its square
        "processing": {"steps": steps, "versions": versions("pydicom", "scipy")},
        "labels": archive.labels,
        "unit": archive.unit,
        "coordinates": list(COORDINATES),
        "warnings": [*archive.warnings, "a burnt-in label that touches the breast stays"],
    }
