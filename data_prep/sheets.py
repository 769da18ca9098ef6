"""Images that a table lists, as a plan: its columns are file, label, patient and split."""

import os
from pathlib import Path

import pandas as pd

from data_prep import files, grouping, layouts, pictures, tables
from data_prep.plan import is_below
from hallulib import UserError

UNLISTED = "image not in the CSV left out"


def listed(
    file: Path, root: Path, label: str, patient: str | None, split: str | None
) -> tuple[pd.DataFrame, list[str]]:
    r"""The images of a table.

    Args:
        file: the CSV; see `data_prep.tables.read_sheet`.
        root: the folder that its paths begin at, parted by ``/`` or by ``\``.
        label: name of the column of labels.
        patient: name of the column of patients, `grouping.NOBODY` where images are independent;
            None: ``patient`` if there is one, else `grouping.ask` asks.
        split: name of the column of splits; None: ``split`` if there is one.

    Returns:
        Columns file, label, patient and split, index = line of the file; and notes.

    Raises:
        UserError: a column or file is missing, a path leads out of the folder, or a file is listed
            twice, however its path is spelt and whatever links lead to it.
    """
    table, notes = _columns(file, label, patient, split)
    table = layouts.plan_of(table, file)
    table["file"] = [_path(name, root, f"{file}: line {n}") for n, name in table["file"].items()]
    lines: dict[tuple[int, int], int] = {}
    for line, name in table["file"].items():
        first = lines.setdefault(files.identity(root / name), line)
        if first != line:
            raise UserError(
                f"{file}: line {line} lists {name} again, as line {first} does; once is needed"
            )
    for folder, _, _ in os.walk(root):
        found = files.images(Path(folder))[0]
        there = [files.identity(image) for image in found if image.exists()]
        notes += [UNLISTED] * (len(found) - sum(image in lines for image in there))
    return table, notes


def _columns(
    file: Path, label: str, patient: str | None, split: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Columns file, label, patient and split, index = line; what is left out of the table."""
    table = tables.read_sheet(file, "file")
    table = table[(table != "").any(axis=1)]
    if tables.key(label) not in map(tables.key, table):
        raise UserError(
            f"{file}: no column {label!r} among {list(table)}; --label names the label column"
        )
    asked = [split] if split else []
    asked += [patient] if patient not in (None, grouping.NOBODY) else []
    chosen = tables.choose(table, file, ["file", label, *asked], ["patient", "split"])
    owner = "" if patient == grouping.NOBODY else chosen[patient or "patient"]
    known = {tables.key(name) for name in ("file", label, split or "split", patient or "patient")}
    unused = [n for n, name in enumerate(table) if tables.key(name) not in known]
    if patient is None and (owner == "").all():
        grouping.ask(table, unused, f"{file}: column")
    found = {"file": chosen["file"], "label": chosen[label], "split": chosen[split or "split"]}
    notes = [f"column {table.columns[n]!r} of the CSV left out" for n in unused]
    return pd.DataFrame(found | {"patient": owner}, table.index, dtype=str), notes


def _path(name: str, root: Path, where: str) -> str:
    """A path of the table, below the folder."""
    if not is_below(name):
        raise UserError(f"{where} has file {name!r}; a path below {root}, without .., is needed")
    if Path(name).suffix.lower() not in pictures.SUFFIXES:
        known = ", ".join(sorted(pictures.SUFFIXES))
        raise UserError(f"{where} has file {name!r}; one of {known} is needed")
    for spelt in (name, name.replace("\\", "/")):  # Windows wrote it; here \ may be in a name
        if (root / spelt).is_file():
            return spelt
    raise UserError(f"{where} has file {name!r}, which is not in {root}; it is needed")
