r"""CBIS-DDSM: scanned film mammograms with biopsy-proven masses and calcifications, as a set.

The four tables have a row per abnormality. Rows of one patient, side and view are one film, also
where masses and calcifications each list it; the film is malignant if any of its rows is.

Train and test are those of the tables. They were drawn for masses and calcifications apart, so 31
patients are in both (29 films even are); all films of these go to train. So test stays within the
official test, and none of its patients was ever in an official train.

Source:
    Lee et al., A curated mammography data set, Scientific Data 4, 170177 (2017).
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_prep import birads, films
from data_prep.plan import is_below
from data_prep.tables import read_table
from data_prep.volumes import Fault
from data_prep.writer import Report
from hallulib import UserError

HELP = """
IMAGES holds the folders of the download, Mass-Training_P_00001_LEFT_CC and so on; CSVS holds
mass_case_description_train_set.csv, ..._test_set.csv and the same for calc. The identifiers below
a folder often differ from those of the tables, so the image is the one .dcm file at any depth
below the folder of its name; where there are several, the one at the path that the table gives.
Folders that end in _1, _2, ... hold crops and masks and are not read.
The copy in JPEG that Kaggle has is read as well: IMAGES is the folder that holds "jpeg", and the
image is the one .jpg file in the folder of the series that the table gives.

  python -m data_prep cbis_ddsm manifest/CBIS-DDSM tables sets/cbis --size 128
"""
TABLES = {  # name in column item -> kind and part, as in the names of folders
    f"{kind.lower()}_{part}": (kind, told)
    for kind in ("Mass", "Calc")
    for part, told in (("train", "Training"), ("test", "Test"))
}
COLUMNS = ["patient id", "breast density", "left or right breast", "image view"]
COLUMNS += ["abnormality id", "assessment", "pathology", "image file path"]
PATHOLOGY = {
    "BENIGN": "benign",
    "BENIGN_WITHOUT_CALLBACK": "benign",
    "MALIGNANT": "malignant",
}
FOLDER = re.compile(r"(Mass|Calc)-(Training|Test)_(P_\d{5})_(LEFT|RIGHT)_(CC|MLO)")
FINDINGS = {"Mass": "mass", "Calc": "calcification"}
ARCHIVE = films.Archive(
    origin="CBIS-DDSM (Lee et al. 2017), The Cancer Imaging Archive,"
    " doi 10.7937/k9/tcia.2016.7o02s9cy",
    licence="CC BY 3.0",
    labels=birads.schemes(
        "12345", "all abnormalities benign, with or without callback", "any malignant by biopsy"
    )
    | {"finding": birads.scheme({"mass": "masses only", "calcification": "calcifications only"})},
    steps=(
        "rows of one patient, side and view are one film; any malignant makes it malignant",
        "birads: the highest assessment; density: empty where rows differ; finding: empty where"
        " a film has both",
        "train and test of the tables; patients in both go to train, with all their films",
    ),
    warnings=(
        "scanned films; of the 645 images of the official test, 50 films are in train here and 4"
        " are listed twice",
    ),
    official=True,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep cbis_ddsm``."""
    parser.epilog = HELP
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    parser.add_argument("tables", type=Path, metavar="CSVS", help="folder of the four CSVs")
    films.add_arguments(parser, official=True)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a table or every image is missing, a row is impossible, or a film cannot be
            read with ``--on-fault stop``.
    """
    table, notes = list_films(args.tables)
    table, odd = films.locate(
        table, lambda row: find(args.images, row["paths"]), args.on_fault, args.images
    )
    return films.make(args, table, ARCHIVE, [*notes, *odd], args.tables)


def list_films(tables: Path) -> tuple[pd.DataFrame, list[str]]:
    """The films of the four tables.

    Args:
        tables: folder of the CSVs.

    Returns:
        One row per film: ``patient``, ``split``, labels, coordinates and ``paths``, a list of the
        places that the tables give it; and what was odd.

    Raises:
        UserError: a table is missing or a row is impossible.
    """
    rows, notes = [], []
    for name in TABLES:
        found, odd = _read(tables, name)
        rows += found
        notes += odd
    every = pd.DataFrame(rows)
    parts = every.groupby("patient")["part"].agg(set)
    both = set(parts.index[parts.map(len) > 1])
    notes += ["patient in train and test of the tables: to train"] * len(both)
    made = [_film(group, both, notes) for _, group in every.groupby(["patient", "side", "view"])]
    return pd.DataFrame(made), notes


def find(root: Path, paths: Sequence[str]) -> Path | None:
    """The image of a film; None if there is no folder of its name, or of its series, with one.

    Args:
        root: folder of the images.
        paths: places that the tables give; the first that is there is taken.

    Raises:
        Fault: several files below the folder, and none where the table says.
    """
    for path in paths:
        folder, copy = root / path.split("/")[0], root / "jpeg" / Path(path).parent.name
        files = [file for file in folder.rglob("*.dcm") if not file.name.startswith(".")]
        if root / path in files:
            return root / path
        found = _only(folder, files, "DICOM") or _only(copy, list(copy.glob("*.jpg")), "JPEG")
        if found:
            return found
    return None


def _only(folder: Path, files: list[Path], kind: str) -> Path | None:
    if len(files) > 1:
        raise Fault(
            f"{folder}: holds {len(files)} {kind} files, none at the path of the table; only the"
            " full mammogram is needed there",
            f"several {kind} files in a folder",
        )
    return files[0] if files else None


def _read(tables: Path, name: str) -> tuple[list[dict], list[str]]:
    """The rows of one table, one per abnormality, checked."""
    kind, part = TABLES[name]
    file = tables / f"{name.replace('_', '_case_description_')}_set.csv"
    table = read_table(file, COLUMNS)
    again = table.duplicated()
    rows = []
    for number, row in table[~again].iterrows():
        where = f"{file}: row {number}"
        folder = _folder(row, kind, part, where)
        if row["pathology"] not in PATHOLOGY:
            known = ", ".join(PATHOLOGY)
            raise UserError(f"{where} has pathology {row['pathology']!r}; known: {known}")
        rows.append(
            dict(zip(("kind", "part", "patient", "side", "view"), folder, strict=True))
            | {
                "diagnosis": PATHOLOGY[row["pathology"]],
                "birads": birads.category(row["assessment"], where),
                "density": birads.density(row["breast density"], where),
                "path": row["image file path"],
                "item": f"{name} {number}",
            }
        )
    return rows, ["row that repeats another: left out"] * int(again.sum())


def _folder(row: pd.Series, kind: str, part: str, where: str) -> tuple[str, ...]:
    """Kind, part, patient, side and view that the folder of the image names, as the row does."""
    path = row["image file path"]
    match = FOLDER.fullmatch(path.split("/")[0])
    if not match or not is_below(path):
        raise UserError(
            f"{where} has image file path {path!r}; a path like"
            " Mass-Training_P_00001_LEFT_CC/.../000000.dcm, without .., is needed"
        )
    told = (kind, part, row["patient id"], row["left or right breast"], row["image view"])
    if match.groups() != told:
        raise UserError(
            f"{where} is of {'_'.join(told)}, but its image file path begins"
            f" {path.split('/')[0]!r}; both must agree"
        )
    return told


def _film(rows: pd.DataFrame, both: set[str], notes: list[str]) -> dict:
    """One film of all its rows; adds to ``notes``."""
    one = rows.iloc[0]
    moved = one["patient"] in both
    values = {name: sorted(set(rows[name]) - {""}) for name in ("birads", "density", "kind")}
    for odd, told in (
        (len(rows) > 1, "film with several abnormalities: taken once"),
        (len(values["kind"]) > 1, "film listed among masses and calcifications: no finding"),
        (rows["diagnosis"].nunique() > 1, "film with benign and malignant: malignant"),
        (not values["birads"], "film with assessment 0 only: no birads"),
        (len(values["density"]) != 1, "film with no or several densities: no density"),
        (moved and "Test" in set(rows["part"]), "film of the official test: moved to train"),
        (rows["part"].nunique() > 1, "film in train and test of the tables: to train"),
    ):
        notes += [told] * bool(odd)
    return {
        "patient": one["patient"],
        "split": "train" if moved or one["part"] == "Training" else "test",
        "diagnosis": max(rows["diagnosis"]),  # malignant comes after benign
        "birads": max(values["birads"], default=""),
        "density": values["density"][0] if len(values["density"]) == 1 else "",
        "finding": FINDINGS[one["kind"]] if len(values["kind"]) == 1 else "",
        "side": one["side"].lower(),
        "view": one["view"],
        "item": one["item"],
        "paths": list(dict.fromkeys(rows["path"])),
    }
