r"""INbreast: digital mammograms with a BI-RADS category each, as a set.

The table says nothing of patients, but a DICOM file is named by a code of its patient,
``FILE_CODE_MG_SIDE_VIEW_ANON.dcm``; the code divides patients and then gives way to a running
number. There is no official split. BI-RADS is a reader's opinion, not a pathology.

Source:
    Moreira et al., INbreast: toward a full-field digital mammographic database, Academic Radiology
    19 (2012).
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from data_prep import birads, contours, films
from data_prep.tables import read_table
from data_prep.writer import Report
from hallulib import UserError

HELP = """
ROOT is the folder "INbreast Release 1.0" with INbreast.csv and AllDICOMs; the label
"finding" needs AllXML, its contours, as well.

  python -m data_prep inbreast "INbreast Release 1.0" sets/inbreast --birads3 drop
"""
NAME = re.compile(r"(\d+)_([0-9a-f]+)_MG_([LR])_(\w+)_ANON\.dcm", re.IGNORECASE)
COLUMNS = ["laterality", "view", "file name", "acr", "bi-rads"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep inbreast``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the release")
    films.add_arguments(parser, official=False)
    films.add_three(parser)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: the table or every image is missing, a row is impossible, or a film cannot be
            read with ``--on-fault stop``.
    """
    files, notes = find(args.root / "AllDICOMs")
    table, odd = list_films(args.root / "INbreast.csv", args.birads3)
    drawn = args.root / "AllXML"
    if drawn.is_dir():
        table["finding"] = [contours.finding(drawn / f"{name}.xml") for name in table["name"]]
    else:
        notes.append("no folder AllXML: no label finding")
    unknown = len(set(files) - set(table["name"]))
    notes += [*odd, *["DICOM file without a row in the table: left out"] * unknown]
    found = {name: file for name, (file, _) in files.items()}
    table, lost = films.locate(
        table, lambda row: found.get(row["name"]), args.on_fault, args.root / "AllDICOMs"
    )
    table = table.assign(patient=[files[name][1] for name in table["name"]])
    return films.make(
        args, table, archive(args.birads3, drawn.is_dir()), [*notes, *lost], args.root
    )


def archive(three: str, drawn: bool) -> films.Archive:
    """The archive.

    Args:
        three: the diagnosis of BI-RADS 3.
        drawn: whether there are contours.
    """
    more = {"finding": contours.SCHEME} if drawn else {}
    return films.Archive(
        origin="INbreast release 1.0 (Moreira et al. 2012), Breast Centre of CHSJ, Porto",
        licence="by agreement with the authors",
        labels=birads.schemes("123456", *birads.rule(three, "6")) | more,
        steps=("birads: 4a, 4b and 4c are 4; density: ACR 1 to 4 as A to D",),
        warnings=("diagnosis is a BI-RADS category, except 6 without pathology",),
    )


def find(folder: Path) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """The DICOM files: name in the table -> path and code of the patient; and what was odd.

    Raises:
        UserError: there is no folder, or a name occurs twice.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the one with INbreast's .dcm files is needed")
    found, notes = {}, []
    for file in sorted(folder.iterdir()):
        match = NAME.fullmatch(file.name)
        if not match:
            notes.append("file that is not named like one of INbreast: left out")
        elif match[1] in found:
            raise UserError(f"{folder}: two files begin {match[1]}_; one is needed")
        else:
            found[match[1]] = file, match[2].lower()
    return found, notes


def list_films(file: Path, three: str) -> tuple[pd.DataFrame, list[str]]:
    """The films of the table.

    Args:
        file: INbreast.csv.
        three: diagnosis of BI-RADS 3.

    Returns:
        One row per film: ``name`` of its file, ``split``, labels and coordinates; and what was
        odd.

    Raises:
        UserError: it cannot be read, or a row is impossible.
    """
    table, notes = films.once(read_table(file, COLUMNS, ";"), "file name", file)
    rows = []
    for number, row in table.iterrows():
        where = f"{file}: row {number}"
        if row["laterality"] not in films.SIDES or not row["file name"].isdecimal():
            raise UserError(
                f"{where} has laterality {row['laterality']!r} and file name"
                f" {row['file name']!r}; L or R, and a number are needed"
            )
        category = birads.category(row["bi-rads"], where)
        rows.append(
            {
                "name": row["file name"],
                "split": "",
                "diagnosis": birads.diagnosis(category, three),
                "birads": category,
                "density": birads.density(row["acr"], where),
                "side": films.SIDES[row["laterality"]],
                "view": row["view"],
                "item": str(number),
            }
        )
    bare = sum(row["density"] == "" for row in rows)
    return pd.DataFrame(rows), notes + ["film without density"] * bare
