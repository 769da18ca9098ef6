"""Whose image it is: the column or the pattern that tells the patient, and whether it can.

A split is only as good as its groups. A column of patients that is dropped, or a pattern that
finds the class or the number of the file, lets the images of one patient into several splits, and
no later step can see it. So a column whose name speaks of patients is asked about, and what a
pattern or a column finds is looked at before anything is read.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_prep.plan import split_name
from hallulib import UserError
from hallulib.data.checks import UNITS

NOBODY = "none"  # the column that is asked for where images are independent
# in the order in which they are proposed: whose it is, when it was seen, what was seen
GROUPS = (
    "patient paciente subject subj person participant individual donor proband volunteer mrn pid"
    " ptid case study exam examination accession encounter visit admission session series scan"
    " volume video lesion specimen biopsy slide wsi"
).split()
ATTRIBUTES = set(
    "age sex gender race ethnicity birth birthday birthdate born dob weight height bmi date year"
    " time type class grade stage status size area diameter width length depth ward worker"
    " position orientation side laterality view count description diagnosis history comment"
    " comments note notes".split()
)
WORD = re.compile(
    rf"(?:id|no|nr|num)?({'|'.join(GROUPS)})(?:s|en)?(?:id|ids|uid|no|nr|num|number|name|code|key)?"
)
COUNTER = re.compile(r"(\D*)(\d+)(\D*)")
EVERY = "every image has a {} of its own: if {} counts files, {} may cross splits"


def speaks_of(name: str) -> str:
    """The group of `GROUPS` that the name of a column speaks of, or "".

    Whole words count, however they are joined: ``PatientID``, ``lesion_id``, ``caseid``, but
    neither ``inpatient`` nor ``caseworker``. What describes a group, such as ``Patient Age``, does
    not tell the groups apart.
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    words = [part.lower() for part in parts]
    found = [match[1] for match in map(WORD.fullmatch, [*words, "".join(words)]) if match]
    return found[0] if found and not ATTRIBUTES & set(words) else ""


def ask(table: pd.DataFrame, unused: Sequence[int], where: str) -> None:
    """Refuses to drop a column that groups images and speaks of patients.

    Args:
        table: of all images.
        unused: places of the columns that would be left out.
        where: their file and what they are in it, for the message.

    Raises:
        UserError: asks which column is the patient.
    """
    groups = [n for n in unused if speaks_of(table.columns[n]) and _repeats(table.iloc[:, n])]
    if groups:
        name = table.columns[min(groups, key=lambda n: GROUPS.index(speaks_of(table.columns[n])))]
        raise UserError(
            f"{where} {name!r} is not used, and images that share it may fall into several"
            f" splits; --patient {name!r} keeps them together, --patient {NOBODY} says that the"
            " images are independent"
        )


def find(names: Sequence[str], pattern: re.Pattern[str], root: Path) -> list[str]:
    """What the pattern finds in each path; all or none, since a patient overlooked is a leak.

    Args:
        names: paths below the root.
        pattern: the patient is its first group, or all of it.
        root: the folder, for the message.

    Raises:
        UserError: it finds nothing in a path.
    """
    matches = [pattern.search(Path(name).as_posix()) for name in names]
    found = [(match[1 if pattern.groups else 0] or "") if match else "" for match in matches]
    missed = [name for name, patient in zip(names, found, strict=True) if not patient]
    if missed:
        raise UserError(
            f"{root / missed[0]}: {pattern.pattern!r} finds no patient in the path of this and of"
            f" {len(missed) - 1} other images; one that fits every image is needed"
        )
    return found


def check(plan: pd.DataFrame, told: str, where: Path, unit: str | None = None) -> list[str]:
    """Whether what was found can be patients.

    Args:
        plan: ``patient`` and ``label`` of each image, "" where there is none.
        told: the option that found the patients.
        where: the folder or table, for messages.
        unit: what is called patient, if anything else is.

    Returns:
        A warning if every image has a patient, and not only near copies, of its own.

    Raises:
        UserError: it is one patient in all, one per class or one per split.
    """
    known, (one, several) = plan[plan["patient"] != ""], UNITS[unit or "patient"]
    if known["patient"].is_unique:
        # of near copies one each may have been kept
        alone = len(known) > 1 and unit != "near-copies"
        return [EVERY.format(one, told, several)] if alone else []
    patients = known["patient"].unique()
    rows = known.loc[known["label"] != "", ["patient", "label"]]
    pairs = rows.drop_duplicates()
    per_class = pairs["patient"].is_unique and pairs["label"].is_unique
    if len(patients) == 1:
        fault = f"in all {len(known)} images"
    elif all(map(split_name, patients)):
        fault = f"per split, such as {patients[0]!r}"
    elif per_class and 1 < len(pairs) < len(rows):
        patient, label = pairs.iloc[0]
        fault = f"per class, such as {patient!r} for {label!r}"
    else:
        return []
    raise UserError(
        f"{where}: {told} finds one {one} {fault}; what differs between {several} is needed"
    )


def check_counter(plan: pd.DataFrame, told: str, where: Path) -> None:
    """Whether what was found in paths is the number of the file, counted anew in each class.

    Then folders are classes, no folder has a number twice, several have the same ones, and few are
    left out.

    Args:
        plan: ``file``, and see `check`.
        told: see `check`.
        where: see `check`.

    Raises:
        UserError: it is.
    """
    labelled = plan[plan["label"] != ""]
    parts = [COUNTER.fullmatch(patient) for patient in labelled["patient"]]
    if not all(parts) or len({(part[1], part[3]) for part in parts}) != 1:
        return
    again = labelled["patient"].duplicated()
    folders = labelled.groupby(labelled["file"].map(lambda name: str(Path(name).parent)))
    once = (folders["patient"].nunique() == folders.size()).all()
    classes = (folders["label"].nunique() == 1).all()
    dense = max(int(part[2]) for part in parts) < 2 * folders.size().max()
    if again.any() and once and classes and dense:
        raise UserError(
            f"{where}: {told} finds numbers that begin anew in each class, such as"
            f" {labelled['patient'][again].iloc[0]!r}: they count files, not patients; a pattern"
            " that finds patients is needed, or --csv with a column patient"
        )


def _repeats(column: pd.Series) -> bool:
    return bool(column[column != ""].duplicated().any())
