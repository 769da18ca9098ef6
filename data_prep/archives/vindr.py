r"""VinDr-Mammo: digital mammograms of 5,000 exams with a BI-RADS category per breast, as a set.

Diagnosis and density are those of the breast, so both views of it have the same. Train and test
are the official ones; val is taken from train by exam, which stands for the patient. BI-RADS is
the opinion of readers, not a pathology.

Source:
    Nguyen et al., VinDr-Mammo, Scientific Data 10, 277 (2023).
"""

import argparse
import ast
import re
from pathlib import Path

import pandas as pd

from data_prep import birads, films, pictures
from data_prep.tables import read_table
from data_prep.volumes import Fault
from data_prep.writer import Report
from hallulib import UserError

HELP = """
ROOT holds images/STUDY/IMAGE.dicom, breast-level_annotations.csv and finding_annotations.csv.

  python -m data_prep vindr vindr-mammo/1.0.0 sets/vindr --size 128
"""
COLUMNS = ["study id", "image id", "laterality", "view position", "breast birads"]
COLUMNS += ["breast density", "split"]
IDENTIFIER = re.compile(r"[0-9A-Za-z]+")
SPLITS = {"training": "train", "test": "test"}
FINDINGS = {"Mass": "mass", "Suspicious Calcification": "calcification"}
NONE = "No Finding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep vindr``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the archive")
    films.add_arguments(parser, official=True)
    films.add_three(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a table or every image is missing, a row is impossible, or a film cannot be
            read with ``--on-fault stop``.
    """
    table, notes = list_films(args.root, args.birads3)
    table, odd = films.locate(
        table, lambda row: find(args.root, row), args.on_fault, args.root / "images"
    )
    return films.make(args, table, archive(args.birads3), [*notes, *odd], args.root)


def archive(three: str) -> films.Archive:
    """The archive, with ``three``, the diagnosis of BI-RADS 3."""
    findings = {
        "none": "no finding",
        "mass": "masses, no calcification",
        "calcification": "suspicious calcifications, no mass",
    }
    return films.Archive(
        origin="VinDr-Mammo 1.0.0 (Nguyen et al. 2023), PhysioNet, doi 10.13026/br2v-7517",
        licence="PhysioNet Restricted Health Data License 1.5.0",
        labels=birads.schemes("12345", *birads.rule(three, "5"))
        | {"finding": birads.scheme(findings)},
        steps=(
            "birads and density of the breast; finding: empty for other findings, and for both",
            "official train and test; an exam stands for a patient",
        ),
        warnings=("diagnosis is a BI-RADS category of the breast, not a pathology",),
        official=True,
        unit="exam",
    )


def list_films(root: Path, three: str) -> tuple[pd.DataFrame, list[str]]:
    """The films of the tables.

    Args:
        root: folder of the archive.
        three: diagnosis of BI-RADS 3.

    Returns:
        One row per film: ``patient`` (exam), ``image``, ``split``, labels and coordinates; and
        what was odd.

    Raises:
        UserError: a table cannot be read, or a row is impossible.
    """
    file = root / "breast-level_annotations.csv"
    table, notes = films.once(read_table(file, COLUMNS), "image id", file)
    found = read_findings(root / "finding_annotations.csv")
    rows = [_film(row, f"{file}: row {row.name}", three, found) for _, row in table.iterrows()]
    unknown = len(set(found) - set(table["image id"]))
    notes += ["image with findings only, no breast level: left out"] * unknown
    notes += ["film without row of findings"] * len(set(table["image id"]) - set(found))
    return pd.DataFrame(rows), notes


def find(root: Path, film: pd.Series) -> Path | None:
    """The file of a film, or None.

    Raises:
        Fault: there is a copy as a picture instead.
    """
    file = root / "images" / film["patient"] / f"{film['image']}.dicom"
    if file.is_file():
        return file
    for suffix in pictures.SUFFIXES:
        if (copy := file.with_suffix(suffix)).is_file():
            raise Fault(
                f"{copy}: copies differ in window and polarity and do not tell which; the .dicom"
                " file is needed, or data_prep folder --csv, which takes pictures as they are",
                "picture in the place of a DICOM file",
            )
    return None


def read_findings(file: Path) -> dict[str, set[str]]:
    """The categories of findings in each image.

    Raises:
        UserError: it cannot be read, or a row has no list of texts.
    """
    found: dict[str, set[str]] = {}
    table = read_table(file, ["image id", "finding categories"])
    for number, (image, text) in zip(table.index, table.to_numpy(), strict=True):
        try:
            listed = ast.literal_eval(text)
            good = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            good = False
        if not good:
            raise UserError(
                f"{file}: row {number} has finding categories {text[:80]!r}; a list like"
                " ['Mass'] is needed"
            )
        found.setdefault(image, set()).update(listed)
    return found


def _film(row: pd.Series, where: str, three: str, found: dict[str, set[str]]) -> dict:
    for name in ("study id", "image id"):
        if not IDENTIFIER.fullmatch(row[name]):
            raise UserError(f"{where} has {name} {row[name]!r}; letters and digits are needed")
    if row["split"] not in SPLITS or row["laterality"] not in films.SIDES:
        raise UserError(
            f"{where} has split {row['split']!r} and laterality {row['laterality']!r}; training"
            " or test, and L or R are needed"
        )
    category = birads.category(row["breast birads"], where)
    kinds = found.get(row["image id"], set())
    seen = [name for kind, name in FINDINGS.items() if kind in kinds]
    return {
        "patient": row["study id"],
        "image": row["image id"],
        "split": SPLITS[row["split"]],
        "diagnosis": birads.diagnosis(category, three),
        "birads": category,
        "density": birads.density(row["breast density"], where),
        "finding": "none" if kinds == {NONE} else seen[0] if len(seen) == 1 else "",
        "side": films.SIDES[row["laterality"]],
        "view": row["view position"],
        "item": str(row.name),
    }
