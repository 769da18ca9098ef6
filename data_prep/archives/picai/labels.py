"""The PI-CAI labels repository: marksheet, masks, and the grade of every lesion slice.

Expert masks (``resampled``) hold the ISUP grade of each voxel, 2 to 5. Pooch25 and Bosma22a are
binary: their grade is the study's highest, ``case_ISUP``, which is also its only one wherever
``lesion_ISUP`` is unique. The Gleason score is the one that the marksheet pairs with that grade;
``N/A`` entries of ``lesion_GS`` have no partner in ``lesion_ISUP`` and are dropped before pairing.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.volumes import Fault, Volume
from hallulib import UserError

GLEASON = {  # every score of a significant lesion, mildest first, with its ISUP grade group
    "3+4": 2,
    "4+3": 3,
    "4+4": 4,
    "3+5": 4,
    "5+3": 4,
    "4+5": 5,
    "5+4": 5,
    "5+5": 5,
}
LABELS = {
    "isup": {str(g): f"ISUP grade group {g}" for g in (2, 3, 4, 5)},
    "gs": {score: f"Gleason score {score}" for score in GLEASON},
    "grade2": {"low": "ISUP 2", "high": "ISUP 3 or higher"},
}
MARKSHEET = Path("clinical_information/marksheet.csv")
MAPPING = Path("additional_resources/ProstateX-mapping.json")
LESIONS = {
    "expert": "csPCa_lesion_delineations/human_expert/resampled",
    "Pooch25": "csPCa_lesion_delineations/human_expert/Pooch25",
    "Bosma22a": "csPCa_lesion_delineations/AI/Bosma22a",
}
GLANDS = {  # the first that is there and not empty is used
    "Guerbet23": "anatomical_delineations/whole_gland/AI/Guerbet23",
    "Bosma22b": "anatomical_delineations/whole_gland/AI/Bosma22b",
}
MASKS = {"human": ("expert", "Pooch25"), "paper": ("expert", "Bosma22a")}
PAPER_LESION, PAPER_BENIGN = "paper: 2,049", "paper: 11,202"


@dataclass(frozen=True)
class Entry:
    """What is kept of one row of the marksheet; dates, ages and values of blood tests are not.

    Args:
        patient: public pseudonym.
        study: public pseudonym.
        isup: highest grade of the study, 0 to 5.
        lesions: (ISUP, Gleason score) of each lesion with a known score.
        alone: no study of this patient has clinically significant cancer.
    """

    patient: str
    study: str
    isup: int
    lesions: tuple[tuple[int, str], ...]
    alone: bool

    @property
    def key(self) -> str:
        """Name of the study's files."""
        return f"{self.patient}_{self.study}"

    @property
    def significant(self) -> tuple[int, ...]:
        """Grades of its clinically significant lesions."""
        return tuple(isup for isup, _ in self.lesions if isup >= 2)


def read_marksheet(labels: Path) -> dict[str, Entry]:
    """Study key -> entry, in the order of the marksheet.

    Raises:
        UserError: it is missing, a column is, or a row contradicts itself.
    """
    file = labels / MARKSHEET
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            table = csv.DictReader(text, restval="")
            lines = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file}: cannot be read ({type(error).__name__}); a clone of"
            " github.com/DIAGNijmegen/picai_labels is needed"
        ) from error
    needed = ["patient_id", "study_id", "lesion_GS", "lesion_ISUP", "case_ISUP", "case_csPCa"]
    missing = [name for name in needed if not lines or name not in lines[0][1]]
    if missing:
        raise UserError(
            f"{file}: no column or no row of {missing[0]}; {', '.join(needed)} are needed"
        )
    positive = {row["patient_id"] for _, row in lines if row["case_csPCa"] == "YES"}
    entries = {}
    for number, row in lines:
        entry = _entry(row, row["patient_id"] not in positive, f"{file}: line {number}")
        if entry.key in entries:
            raise UserError(f"{file}: line {number} repeats study {entry.key}; one row is needed")
        entries[entry.key] = entry
    return entries


def read_mapping(labels: Path) -> dict[str, str]:
    """``ProstateX-NNNN_mm-dd-yyyy`` -> study key; empty if the repository lacks the file.

    Raises:
        UserError: the file is damaged.
    """
    file = labels / MAPPING
    if not file.exists():
        return {}
    try:
        return {str(name): str(key) for name, key in json.loads(file.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not readable JSON; get the labels again") from error


def gleason(isup: int, entry: Entry) -> tuple[str, list[str]]:
    """Gleason score of a grade in this study, "" if unknown; and what was odd."""
    scores = {score for grade, score in entry.lesions if grade == isup}
    if not scores:
        return "", [
            "lesion slice of a grade without Gleason score in the marksheet: gs left empty"
        ]
    odd = "lesion slice with several Gleason scores of its grade: the more severe taken"
    return max(scores, key=list(GLEASON).index), [odd] if len(scores) > 1 else []


def slice_grades(mask: np.ndarray, source: str, entry: Entry) -> tuple[dict[int, int], list[str]]:
    """Slice -> ISUP grade of the slices with a lesion; and what was odd.

    Args:
        mask: (slices, rows, columns) of a study with significant cancer.
        source: ``expert`` (voxels are grades) or a binary mask.
        entry: the study.

    Raises:
        Fault: values that such a mask cannot have.
    """
    flat = mask.reshape(len(mask), -1)
    check_values(flat, source, entry.key)
    grades = {int(k): int(flat[k].max()) for k in np.flatnonzero(flat.any(axis=1))}
    if source == "expert":
        both = sum(len(np.unique(flat[k][flat[k] > 0])) > 1 for k in grades)
        return grades, ["lesion slice of two grades: the higher taken"] * both
    odd = f"lesion slice of {source} in a study with several grades: the highest taken"
    several = len(set(entry.significant)) > 1
    return dict.fromkeys(grades, entry.isup), [odd] * (len(grades) * several)


def check_values(mask: np.ndarray, source: str, key: str) -> None:
    """Refuses a mask with values that it cannot have.

    Raises:
        Fault: names the value.
    """
    known = (0, 2, 3, 4, 5) if source == "expert" else (0, 1)
    strange = mask[~np.isin(mask, known)]
    if len(strange):
        raise Fault(
            f"{key}: the {source} mask has value {strange[0]}; known values are {known}",
            "mask with unknown values",
        )


def rule_counts(entry: Entry, n_slices: int, masks: Mapping[str, Volume]) -> Iterator[str]:
    """One note for each slice that each rule would take, so that they are counted.

    Args:
        entry: the study.
        n_slices: of its image.
        masks: those it has, by source.
    """
    n = {name: int(mask.pixels.any(axis=(1, 2)).sum()) for name, mask in masks.items()}
    if entry.isup >= 2:
        ai, expert = n.get("Bosma22a", 0), n.get("expert")
        paper = ai if expert is None else expert
        one, same = len(entry.significant) == 1, len(set(entry.significant)) == 1
        told, rules = (
            f"lesion slices ({PAPER_LESION})",
            {
                "expert": expert or 0,
                "expert, else Pooch25 [--masks human]": n.get("Pooch25", 0)
                if expert is None
                else expert,
                "expert, else Bosma22a [--masks paper]": paper,
                "expert, else Bosma22a, studies with one significant lesion": paper * one,
                "expert, else Bosma22a, studies with one significant grade": paper * same,
                "Bosma22a": ai,
                "Bosma22a, studies with one significant lesion": ai * one,
            },
        )
    else:
        told, rules = f"benign slices ({PAPER_BENIGN})", {}
        for studies, counts in (("without csPCa", True), ("of ISUP 0", entry.isup == 0)):
            for name in GLANDS:
                rules[f"gland of {name}, studies {studies}"] = n.get(name, 0) * counts
            rules[f"all, studies {studies}"] = n_slices * counts
    for rule, count in rules.items():
        yield from [f"{told} by rule: {rule}"] * count


def _entry(row: Mapping[str, str], alone: bool, where: str) -> Entry:
    if not (row["patient_id"].isdecimal() and row["study_id"].isdecimal()):  # both name files
        raise UserError(f"{where} has no patient_id or study_id; both must be whole numbers")
    scores, grades = (
        [text for text in row[name].split(",") if text not in ("", "N/A")]
        for name in ("lesion_GS", "lesion_ISUP")
    )
    try:
        isup, grades = int(row["case_ISUP"]), [int(grade) for grade in grades]
        lesions = tuple(zip(grades, scores, strict=True))
    except ValueError as error:
        raise UserError(
            f"{where} has lesion_GS {row['lesion_GS']!r}, lesion_ISUP {row['lesion_ISUP']!r},"
            f" case_ISUP {row['case_ISUP']!r}; lists of the same length without N/A are needed"
        ) from error
    wrong = next((s for g, s in lesions if g >= 2 and GLEASON.get(s) != g), None)
    significant = "YES" if isup >= 2 else "NO"
    if (
        wrong
        or isup not in range(6)
        or isup != max(grades, default=isup)
        or row["case_csPCa"] != significant
    ):
        raise UserError(
            f"{where} has lesions {lesions}, case_ISUP {isup} and csPCa {row['case_csPCa']!r},"
            " that contradict each other; the published marksheet is needed"
        )
    return Entry(row["patient_id"], row["study_id"], isup, lesions, alone)
