"""INbreast into an image set: patients by the code in file names, which is never kept."""

import plistlib
from pathlib import Path

import numpy as np
import pytest
from synthetic_mammogram import BORN, CODE, NAME, film, negative, planted, truncate, write

from data_prep import birads, contours, mammogram
from data_prep.__main__ import main
from data_prep.archives.inbreast import list_films
from hallulib import UserError
from hallulib.data import imageset

HEAD = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
CATEGORIES = ["1", "2", "3", "4a", "4b", "4c", "5", "6"]
PATIENTS = 12


def code(patient: int) -> str:
    return f"{patient * 0x1F3A5B7C9D:016x}"


def films():
    """(file number, patient, side, view, ACR, BI-RADS): both breasts of each patient."""
    for patient in range(1, PATIENTS + 1):
        for n, side in enumerate("LR"):
            yield 20586000 + 10 * patient + n, patient, side, "CC", n + 1, CATEGORIES[patient % 8]


def make(root: Path, change=lambda lines: lines) -> Path:
    lines = [HEAD]
    for number, patient, side, view, acr, category in films():
        name = f"{number}_{code(patient)}_MG_{side}_{view}_ANON.dcm"
        save = negative if patient % 2 else write
        save(root / "AllDICOMs" / name, film(number, right=side == "R", label="DOE"))
        density = "" if number == 20586010 else acr
        lines.append(f"removed;61;{side};{view};{BORN[:6]};{number};{density} ;{category}")
    (root / "INbreast.csv").write_text("\n".join(change(lines)) + "\n;;;;;;;\n")
    return root


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "INbreast Release 1.0")


def run(root, out, *more) -> int:
    return main(["inbreast", str(root), str(out), "--size", "16", "--workers", "1", *more])


def refused(capfd, root, *more) -> str:
    assert run(root, root.parent / "set", *more) == 2
    left = {path.name for path in root.parent.iterdir()}
    assert left <= {root.name, "set.partial"}  # what was read of the others
    told = [line for line in capfd.readouterr().err.splitlines() if line and "item" not in line]
    assert len(told) == 1
    return told[0]


def test_films_have_their_labels_and_patients_one_split(root, tmp_path):
    assert run(root, tmp_path / "set") == 0
    found = imageset.open(tmp_path / "set")
    table = found.table
    assert len(table) == 2 * PATIENTS
    assert table["patient"].nunique() == PATIENTS
    assert (table.groupby("patient").size() == 2).all()
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    assert set(table["split"]) == {"train", "val", "test"}
    for (number, _, side, _, acr, category), row in zip(
        films(), table.to_dict("records"), strict=True
    ):
        assert row["birads"] == category[0]
        assert row["diagnosis"] == ("benign" if category in "123" else "malignant")
        assert row["density"] == ("" if number == 20586010 else " AB"[acr])
        assert row["side"] == {"L": "left", "R": "right"}[side]
        (file,) = (root / "AllDICOMs").glob(f"{number}_*")
        place = int(row["item"]) - 1
        assert np.array_equal(found.images[place, 0], mammogram.read(file, 16)[0])
    assert found.card["unit"] == "patient"
    report = found.card["report"]
    assert report["film without density"] == 1
    assert report["chest wall at right: flipped"] == PATIENTS


def test_nothing_identifying_is_written_or_said(root, tmp_path, capfd):
    assert run(root, tmp_path / "set") == 0
    words = [NAME, "DOE", CODE, BORN, BORN[:6], "removed", "20586", "ANON", str(tmp_path)]
    words += [code(patient) for patient in range(1, PATIENTS + 1)]
    assert planted(tmp_path / "set", words) == []
    said = "".join(capfd.readouterr()).replace(str(tmp_path), "")
    assert [word for word in words if word in said] == []


@pytest.mark.parametrize("three", ["benign", "malignant", "drop"])
def test_category_three_is_what_the_option_says(root, tmp_path, three):
    assert run(root, tmp_path / "set", "--birads3", three) == 0
    found = imageset.open(tmp_path / "set")
    of_three = found.table.loc[found.table["birads"] == "3", "diagnosis"]
    assert set(of_three) == (set() if three == "drop" else {three})
    dropped = found.card["report"].get("film without diagnosis: left out", 0)
    assert dropped == (sum(f[-1] == "3" for f in films()) if three == "drop" else 0)
    meaning = found.card["labels"]["diagnosis"]["meaning"]
    assert ("3" in meaning["benign"]) == (three == "benign")


def test_seeds_divide_otherwise_and_one_seed_alike(root, tmp_path):
    splits = []
    for seed in (0, 0, 1):
        assert run(root, tmp_path / "set", "--overwrite", "--seed", str(seed)) == 0
        splits.append(list(imageset.open(tmp_path / "set").table["split"]))
    assert splits[0] == splits[1] != splits[2]


def test_missing_unknown_and_repeated_films_are_counted(tmp_path):
    root = make(tmp_path / "in", lambda lines: [*lines[:-1], lines[1]])
    next((root / "AllDICOMs").glob("20586020_*")).unlink()
    (root / "AllDICOMs" / "readme.txt").write_text("")
    assert run(root, tmp_path / "set") == 0
    report = imageset.open(tmp_path / "set").card["report"]
    assert (
        report.items()
        >= {
            "film of the table that is not on disk: left out": 1,
            "DICOM file without a row in the table: left out": 1,
            "file that is not named like one of INbreast: left out": 1,
            "row that repeats another: left out": 1,
        }.items()
    )


def twice(lines):
    return [*lines, lines[1][:-1] + "6"]


BAD = {
    "two categories for a film": (twice, "rows 1 and 25 are of one file name"),
    "an unknown category": (lambda x: [x[0], x[1][:-1] + "7"], "row 1 has BI-RADS '7'"),
    "an unknown side": (lambda x: [x[0], x[1].replace(";L;", ";X;")], "laterality 'X'"),
    "a path for a name": (lambda x: [x[0], x[1].replace("20586010", "../x")], "'../x'"),
    "commas": (lambda x: [line.replace(";", ",") for line in x], "not a readable CSV"),
    "longer rows": (lambda x: [x[0], *(line + ";" for line in x[1:])], "not a readable CSV"),
    "a column twice": (lambda x: [x[0].replace("ACR", "View"), *x[1:]], "2 columns"),
    "a column twice by another name": (
        lambda x: [x[0].replace("ACR", "File_Name"), *x[1:]],
        "2 columns",
    ),
    "no row": (lambda x: x[:1], "has no row"),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD.keys())
def test_a_bad_table_is_refused(tmp_path, capfd, change, told):
    assert told in refused(capfd, make(tmp_path / "in", change))


def test_spaces_and_blank_rows_of_the_table_do_not_matter(tmp_path):
    plain, _ = list_films(make(tmp_path / "a") / "INbreast.csv", "benign")
    wide = lambda lines: [lines[0], *(line.replace(";", " ; ") for line in lines[1:])]
    other, _ = list_films(make(tmp_path / "b", wide) / "INbreast.csv", "benign")
    assert plain.equals(other)
    assert len(plain) == 2 * PATIENTS


def test_folders_that_are_not_the_archive_are_refused(root, capfd):
    for file in (root / "AllDICOMs").iterdir():
        file.unlink()
    assert "none of the 24 films" in refused(capfd, root)
    (root / "AllDICOMs").rmdir()
    assert "no such folder" in refused(capfd, root)


def test_a_truncated_film_stops_or_is_left_out(root, tmp_path, capfd):
    truncate(next((root / "AllDICOMs").iterdir()))
    assert "cannot be read as DICOM" in refused(capfd, root)
    assert run(root, tmp_path / "set", "--on-fault", "skip") == 0
    assert imageset.open(tmp_path / "set").card["report"]["left out: unreadable DICOM file"] == 1


def test_one_code_for_two_files_of_a_number_is_refused(root, capfd):
    file = next((root / "AllDICOMs").glob("20586010_*"))
    write(file.with_name(file.name.replace(code(1), code(2))), film())
    assert "two files begin 20586010_" in refused(capfd, root)


def test_categories_and_densities_of_all_archives_have_one_name():
    told = [birads.category(text, "here") for text in ("BI-RADS 4", "4b", "4", " 5 ", "0")]
    assert told == ["4", "4", "4", "5", ""]
    told = [birads.density(text, "here") for text in ("DENSITY C", "c", "3", "ACR 1", "", "0")]
    assert told == ["C", "C", "C", "A", "", ""]


def test_what_is_no_category_or_density_is_refused():
    for text in ("", "7", "IV", "44"):
        with pytest.raises(UserError, match="here has BI-RADS"):
            birads.category(text, "here")
    for text in ("5", "E", "AB"):
        with pytest.raises(UserError, match="here has density"):
            birads.density(text, "here")


def draw(root, number, *names):
    """Contours of a film, as the archive keeps them."""
    (root / "AllXML").mkdir(exist_ok=True)
    rois = [{"Name": n, "NumberOfPoints": 1, "Point_px": ["(10.0, 12.5)"]} for n in names]
    held = {"Images": [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]}
    (root / "AllXML" / f"{number}.xml").write_bytes(plistlib.dumps(held))


def test_a_finding_is_what_was_drawn(root, tmp_path):
    draw(root, 20586010, "Calcification", " Mass")
    draw(root, 20586011, "Cluster", "Point 1")
    draw(root, 20586020, "Assymetry")
    draw(root, 20586021)
    assert run(root, tmp_path / "set") == 0
    found = imageset.open(tmp_path / "set", 16)
    assert found.classes("finding") == ("none", "mass", "calcification", "other")
    counts = found.table["finding"].value_counts().to_dict()
    assert counts == {"none": 2 * PATIENTS - 3, "mass": 1, "calcification": 1, "other": 1}


def test_without_contours_there_is_no_such_label(root, tmp_path, capfd):
    assert run(root, tmp_path / "set") == 0
    assert "finding" not in imageset.open(tmp_path / "set", 16).schemes
    assert "no folder AllXML" in capfd.readouterr().out


BOMB = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>
<plist version="1.0"><dict><key>Images</key><string>&b;</string></dict></plist>"""


@pytest.mark.parametrize(
    "content", [b"", b"<plist>", BOMB, plistlib.dumps([1]), plistlib.dumps({"Images": [{}]})]
)
def test_contours_that_are_none_are_refused(root, capfd, content):
    draw(root, 20586010, "Mass")
    (root / "AllXML" / "20586010.xml").write_bytes(content)
    assert "20586010.xml: not the contours of a film" in refused(capfd, root)


def test_contours_that_are_too_large_are_not_read(tmp_path):
    file = tmp_path / "1.xml"
    with file.open("wb") as sparse:
        sparse.truncate(contours.MOST_BYTES + 1)
    with pytest.raises(UserError, match="not the contours of a film .ValueError"):
        contours.finding(file)
