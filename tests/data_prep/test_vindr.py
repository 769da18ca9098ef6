"""VinDr-Mammo into an image set: the labels of the breast, the official test, val by exam."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_mammogram import BORN, CODE, NAME, film, negative, planted, truncate, write

from data_prep import mammogram
from data_prep.__main__ import main
from data_prep.archives import vindr
from data_prep.films import read_film
from hallulib.data import imageset

HEAD = "study_id,series_id,laterality,view_position,image_id,height,width,breast_birads,"
HEAD += "breast_density,split"
FINDINGS = "study_id,image_id,finding_categories,finding_birads,xmin,ymin,xmax,ymax"
KINDS = [  # finding categories of an image, and its label
    (["['No Finding']"], "none"),
    (["['Mass']"], "mass"),
    (
        ["['Suspicious Calcification']", "['Skin Retraction', 'Suspicious Calcification']"],
        "calcification",
    ),
    (["['Suspicious Calcification', 'Mass']"], ""),
    (["['Mass']", "['Suspicious Calcification']"], ""),
    (["['Focal Asymmetry']"], ""),
]
EXAMS = 15


def identifier(kind: str, n: int) -> str:
    return f"{n:02x}{kind.encode().hex():0>8}{n * 7919:022x}"


def films():
    """(exam, image, side, view, BI-RADS, density, split, findings): four views of each exam."""
    for exam in range(EXAMS):
        for n, (side, view) in enumerate([("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")]):
            category = 1 + (exam + n // 2) % 5
            split = "test" if exam % 5 == 4 else "training"
            kinds = KINDS[(exam + n) % len(KINDS)]
            yield exam, 4 * exam + n, side, view, category, "ABCD"[exam % 4], split, kinds


def make(root: Path, change=lambda lines: lines, findings=lambda lines: lines) -> Path:
    lines, found = [HEAD], [FINDINGS]
    for exam, image, side, view, category, density, split, (kinds, _) in films():
        study, name = identifier("s", exam), identifier("i", image)
        save = negative if image % 2 else write
        tags = {"WindowCenter": [32_768, 1], "WindowWidth": [65_536, 2]} if exam % 2 else {}
        file = root / "images" / study / f"{name}.dicom"
        save(file, film(image, right=side == "R", label="DOE"), **tags)
        told = f"{study},{'e' * 32},{side},{view},{name},3518,2800,BI-RADS {category}"
        lines.append(f"{told},DENSITY {density},{split}")
        found += [f'{study},{name},"{kind}",BI-RADS 4,1,2,3,4' for kind in kinds]
    (root / "breast-level_annotations.csv").write_text("\n".join(change(lines)) + "\n")
    (root / "finding_annotations.csv").write_text("\n".join(findings(found)) + "\n")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("vindr") / "in")


def run(root, out, *more) -> int:
    options = ["--size", "16", "--workers", "1", "--fractions", "train=.7,val=.3"]
    return main(["vindr", str(root), str(out), *options, *more])


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    assert run(root, out) == 0
    return imageset.open(out)


def refused(capfd, root, *more) -> str:
    before = sorted(root.parent.iterdir())
    assert run(root, root.parent / "set", *more) == 2
    left = set(root.parent.iterdir()) - set(before)
    assert left <= {root.with_name("set.partial")}  # what was read of the others
    told = [line for line in capfd.readouterr().err.splitlines() if line and "item" not in line]
    assert len(told) == 1
    return told[0]


def test_films_have_the_labels_of_the_tables(root, prepared):
    rows = prepared.table.to_dict("records")
    assert len(rows) == 4 * EXAMS
    for place, (told, row) in enumerate(zip(films(), rows, strict=True)):
        exam, image, side, view, category, density, split, (_, finding) = told
        assert row["diagnosis"] == ("malignant" if category > 3 else "benign")
        assert (row["birads"], row["density"], row["finding"]) == (str(category), density, finding)
        assert (row["side"][0].upper(), row["view"]) == (side, view)
        assert (row["split"] == "test") == (split == "test")
        file = root / "images" / identifier("s", exam) / f"{identifier('i', image)}.dicom"
        assert np.array_equal(prepared.images[place, 0], mammogram.read(file, 16)[0])


def test_val_is_taken_from_train_by_exam(prepared):
    splits = prepared.table.groupby("patient")["split"]
    assert (splits.size() == 4).all()
    assert (splits.nunique() == 1).all()
    counts = splits.first().value_counts()
    assert counts["test"] == EXAMS // 5
    assert 0 < counts["val"] < counts["train"]


def test_nothing_identifying_is_written_or_said(root, tmp_path, capfd):
    assert run(root, tmp_path / "set") == 0
    words = [NAME, "DOE", CODE, BORN, ".dicom", "eeeeeeee", str(tmp_path), str(root)]
    words += [identifier("s", exam) for exam in range(EXAMS)]
    words += [identifier("i", image) for image in range(4 * EXAMS)]
    assert planted(tmp_path / "set", words) == []
    said = "".join(capfd.readouterr()).replace(str(tmp_path), "")
    assert [word for word in words if word in said] == []


def test_workers_and_an_interrupted_run_give_the_same_bytes(root, prepared, tmp_path, monkeypatch):
    read = []

    def reading(film, size):
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(film)
        return read_film(film, size)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.films.read_film", reading)
        assert run(root, tmp_path / "set") == 130
    assert run(root, tmp_path / "set", "--workers", "2") == 0
    for name in imageset.FILES:
        assert (tmp_path / "set" / name).read_bytes() == (prepared.path / name).read_bytes()


def test_missing_and_repeated_films_and_findings_are_counted(tmp_path):
    root = make(
        tmp_path / "in",
        lambda lines: [*lines, lines[1]],
        lambda lines: [*lines[:1], *lines[2:], f"{identifier('s', 0)},abc,['Mass'],,,,,"],
    )
    next((root / "images" / identifier("s", 1)).iterdir()).unlink()
    assert run(root, tmp_path / "set") == 0
    assert imageset.open(tmp_path / "set").unit == "exam"
    assert (
        imageset.open(tmp_path / "set").card["report"].items()
        >= {
            "film of the table that is not on disk: left out": 1,
            "row that repeats another: left out": 1,
            "film without row of findings": 1,
            "image with findings only, no breast level: left out": 1,
        }.items()
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_copy_as_a_picture_is_refused_with_the_way_out(tmp_path, capfd, suffix):
    root = make(tmp_path / "in")
    file = next((root / "images" / identifier("s", 1)).iterdir())
    file.rename(file.with_suffix(suffix))
    told = refused(capfd, root)
    assert told.startswith(str(file.with_suffix(suffix)))
    assert "the .dicom file is needed, or data_prep folder --csv" in told
    assert run(root, tmp_path / "set", "--on-fault", "skip") == 0
    report = imageset.open(tmp_path / "set").card["report"]
    assert report["left out: picture in the place of a DICOM file"] == 1


def put(old: str, new: str):
    """A change of the first row."""
    return lambda lines: [lines[0], lines[1].replace(old, new, 1), *lines[2:]]


same = lambda lines: lines
BAD = {
    "a path for an exam": (put(identifier("s", 0), "../x"), same, "study id '../x'"),
    "a path for an image": (put(identifier("i", 0), "/etc/x"), same, "image id '/etc/x'"),
    "an unknown split": (put("training", "holdout"), same, "split 'holdout'"),
    "an unknown category": (put("BI-RADS 1", "BI-RADS 9"), same, "row 1 has BI-RADS 'BI-RADS 9'"),
    "an unknown density": (put("DENSITY A", "thick"), same, "row 1 has density 'thick'"),
    "two rows of an image": (lambda x: [*x, x[1] + "x"], same, "are of one image id"),
    "an exam in two splits": (put("training", "test"), same, "may be in one split only"),
    "findings that are code": (same, put("['No Finding']", "print(1)"), "a list like"),
    "findings without their column": (
        same,
        lambda lines: [lines[0].replace("finding_cat", "cat"), *lines[1:]],
        "no column 'finding categories'",
    ),
    "findings without quotes": (
        same,
        lambda lines: [line.replace('"', "") for line in lines],
        "not a readable CSV",
    ),
}


@pytest.mark.parametrize(("change", "findings", "told"), BAD.values(), ids=BAD.keys())
def test_bad_tables_are_refused(tmp_path, capfd, change, findings, told):
    assert told in refused(capfd, make(tmp_path / "in", change, findings))


def test_an_archive_without_images_is_refused(tmp_path, capfd):
    root = make(tmp_path / "in")
    (root / "images").rename(root / "pictures")
    assert f"none of the {4 * EXAMS} films" in refused(capfd, root)


def test_truncated_films_stop_or_are_left_out_and_no_other_is_read_twice(
    tmp_path, capfd, monkeypatch
):
    root, read = make(tmp_path / "in"), []

    def reading(film, size):
        read.append(film)
        return read_film(film, size)

    monkeypatch.setattr("data_prep.films.read_film", reading)
    truncate(next((root / "images" / identifier("s", 0)).iterdir()))
    assert "cannot be read as DICOM" in refused(capfd, root)
    assert run(root, tmp_path / "set", "--on-fault", "skip") == 0
    assert len(read) == len(set(read)) + 1
    assert imageset.open(tmp_path / "set").card["report"]["left out: unreadable DICOM file"] == 1


def test_a_dropped_category_three_leaves_no_film_without_diagnosis(root, tmp_path):
    assert run(root, tmp_path / "set", "--birads3", "drop") == 0
    table = imageset.open(tmp_path / "set").table
    assert "3" not in set(table["birads"])
    assert (table["diagnosis"] != "").all()
    assert vindr.archive("drop").labels["diagnosis"]["meaning"]["benign"] == "BI-RADS 1 to 2"
