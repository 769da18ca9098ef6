"""CBIS-DDSM into an image set: films of abnormalities, one split per patient."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic_mammogram import BORN, CODE, NAME, film, negative, planted, truncate, write

from data_prep import mammogram
from data_prep.__main__ import main
from data_prep.archives.cbis_ddsm import TABLES, list_films
from hallulib import UserError
from hallulib.data import imageset

REAL = Path(__file__).parents[3] / "shared" / "data" / "mammography" / "cbis_ddsm_csv"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"real data not found: {REAL}")

UID = "1.3.6.1.4.1.9590.100.1.2."
SHAPES = {"Mass": "mass shape,mass margins", "Calc": "calc type,calc distribution"}


def row(table, patient, side="LEFT", view="CC", n=1, pathology="BENIGN", **changed) -> str:
    """A record as TCIA writes it: the last two columns may end in a newline."""
    kind, part = TABLES[table]
    folder = changed.get("folder", f"{kind}-{part}_{patient}_{side}_{view}")
    file = changed.get("file", "000000.dcm")
    path = changed.get("path", f"{folder}/{UID}1/{UID}2/{file}")
    name = "mass" if kind == "Mass" else "calcification"
    told = [patient, changed.get("density", "3"), side, view, n, name, "N/A", "N/A"]
    told += [changed.get("assessment", "4"), pathology, 3, path]
    crop = f'"{folder}_{n}/{UID}3/{UID}4/000001.dcm\n"'
    return ",".join(map(str, [*told, crop, f"{folder}_{n}/{UID}3/{UID}4/000000.dcm"]))


def make_tables(folder: Path, rows: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (kind, _) in TABLES.items():
        density = "breast_density" if kind == "Mass" else "breast density"
        head = f"patient_id,{density},left or right breast,image view,abnormality id,"
        head += f"abnormality type,{SHAPES[kind]},assessment,pathology,subtlety,"
        head += "image file path,cropped image file path,ROI mask file path"
        lines = [head, *rows.get(name, [])]
        file = folder / f"{name.replace('_', '_case_description_')}_set.csv"
        file.write_text("\n".join(lines) + "\n")
    return folder


ROWS = {
    "mass_train": [
        row("mass_train", "P_00001", pathology="MALIGNANT", assessment="5"),
        row("mass_train", "P_00001", n=2, assessment="2"),  # of the same film
        row("mass_train", "P_00001", view="MLO", pathology="MALIGNANT", density="2"),
        row("mass_train", "P_00002", side="RIGHT", pathology="BENIGN_WITHOUT_CALLBACK"),
        row("mass_train", "P_00003", assessment="0"),  # the patient is in calc_test
        *[row("mass_train", f"P_0001{i}", pathology="MALIGNANT") for i in range(6)],
        *[row("mass_train", f"P_0002{i}") for i in range(6)],
        row("mass_train", "P_00004"),  # not on disk
        row("mass_train", "P_00002", side="RIGHT", pathology="BENIGN_WITHOUT_CALLBACK"),
    ],
    "mass_test": [
        row("mass_test", "P_00005", pathology="MALIGNANT"),
        row("mass_test", "P_00006", density="0"),
    ],
    "calc_train": [row("calc_train", "P_00007", view="MLO")],
    "calc_test": [
        row("calc_test", "P_00003", pathology="MALIGNANT"),  # the very film of mass_train
        row("calc_test", "P_00003", view="MLO"),
        row("calc_test", "P_00008", side="RIGHT"),
    ],
}
ABSENT = "Mass-Training_P_00004_LEFT_CC"


def make_images(folder: Path, rows=ROWS) -> Path:
    """A folder per film, below it other identifiers than in the tables; crops beside it."""
    names = {line.split(",")[11].split("/")[0] for lines in rows.values() for line in lines}
    for n, name in enumerate(sorted(names - {ABSENT})):
        inside = folder / name / f"{BORN}-DDSM-{n}" / "1.000000-full-mammogram"
        save = negative if n % 2 else write
        save(inside / "1-1.dcm", film(n, right="RIGHT" in name, label="DOE" if n % 3 else ""))
        write(folder / f"{name}_1" / "x" / "y" / "1-1.dcm", film(n)[:40, :40])
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cbis")
    return make_images(folder / "images"), make_tables(folder / "tables", ROWS)


def run(images, tables, out, *more) -> int:
    options = ["--size", "16", "--workers", "1", "--fractions", "train=.7,val=.3"]
    return main(["cbis_ddsm", str(images), str(tables), str(out), *options, *more])


@pytest.fixture(scope="module")
def prepared(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    assert run(*archive, out) == 0
    return imageset.open(out)


@pytest.fixture
def four(tmp_path):
    """A film in each table."""
    rows = {name: [row(name, f"P_0000{i}")] for i, name in enumerate(TABLES, 1)}
    return make_images(tmp_path / "images", rows), make_tables(tmp_path / "tables", rows)


def refused(capfd, *command) -> str:
    """The one sentence of a run that leaves nothing behind but what it read of sound films."""
    before = sorted(command[2].parent.iterdir())
    assert run(*command) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line and "item" not in line]
    assert len(told) == 1
    left = set(command[2].parent.iterdir()) - set(before)
    assert left <= {command[2].with_name(command[2].name + ".partial")}
    return told[0]


# ------------------------------------------------------------------------------------ the set


def film_of(prepared, item):
    return prepared.table[prepared.table["item"] == item].iloc[0]


def test_films_have_the_labels_of_all_their_rows(prepared):
    names = ["diagnosis", "birads", "density", "finding", "side", "view"]
    of = lambda item: list(film_of(prepared, item)[names])
    assert of("mass_train 1") == ["malignant", "5", "C", "mass", "left", "CC"]
    assert of("mass_train 3") == ["malignant", "4", "B", "mass", "left", "MLO"]
    assert of("mass_train 4") == ["benign", "4", "C", "mass", "right", "CC"]
    assert of("mass_train 5") == ["malignant", "4", "C", "", "left", "CC"]
    assert of("mass_test 2") == ["benign", "4", "", "mass", "left", "CC"]
    assert of("calc_train 1") == ["benign", "4", "C", "calcification", "left", "MLO"]
    assert len(prepared.table) == 3 + 2 + 12 + 2 + 1 + 1
    assert prepared.classes("diagnosis") == ("benign", "malignant")
    assert next(iter(prepared.schemes)) == "diagnosis"


def test_the_official_split_is_kept_but_for_patients_in_both(prepared):
    split = dict(prepared.table[["item", "split"]].values)
    assert {item for item, s in split.items() if s == "test"} == {
        "mass_test 1",
        "mass_test 2",
        "calc_test 3",
    }
    assert {split["mass_train 5"], split["calc_test 2"]} <= {"train", "val"}
    assert set(split.values()) == {"train", "val", "test"}
    assert (prepared.table.groupby("patient")["split"].nunique() == 1).all()


def test_what_was_odd_is_counted(prepared):
    report = prepared.card["report"]
    assert prepared.card["unit"] == "patient"
    assert (
        report.items()
        >= {
            "patient in train and test of the tables: to train": 1,
            "film in train and test of the tables: to train": 1,
            "film of the official test: moved to train": 2,
            "film listed among masses and calcifications: no finding": 1,
            "film with benign and malignant: malignant": 2,
            "film with several abnormalities: taken once": 2,
            "film with no or several densities: no density": 1,
            "film of the table that is not on disk: left out": 1,
            "row that repeats another: left out": 1,
        }.items()
    )


def test_pixels_are_those_of_the_film_of_the_name(prepared, archive):
    for place, item in enumerate(prepared.table["item"]):
        table, number = item.split()
        name = ROWS[table][int(number) - 1].split(",")[11].split("/")[0]
        if item == "mass_train 5":
            name = "Mass-Training_P_00003_LEFT_CC"
        (file,) = (archive[0] / name).rglob("*.dcm")
        assert np.array_equal(prepared.images[place, 0], mammogram.read(file, 16)[0])


def test_nothing_identifying_is_written_or_said(archive, tmp_path, capfd):
    assert run(*archive, tmp_path / "set") == 0
    words = [NAME, "DOE", CODE, BORN, "P_0000", UID, "000000", "1-1.dcm", "Training-"]
    assert planted(tmp_path / "set", words) == []
    said = "".join(capfd.readouterr())
    assert [word for word in words if word in said] == []


@real
def test_the_real_tables_have_the_published_counts():
    table, notes = list_films(REAL)
    assert len(table) == 3032  # of 3,103 listed images: 71 are listed twice
    assert table["patient"].nunique() == 1566
    found = Counter(notes)
    assert found["patient in train and test of the tables: to train"] == 31  # 13 + 18
    assert found["film of the official test: moved to train"] == 50
    assert found["film in train and test of the tables: to train"] == 29
    assert found["film listed among masses and calcifications: no finding"] == 71
    assert found["film with benign and malignant: malignant"] == 33
    assert found["film with assessment 0 only: no birads"] == 236
    counts = table.value_counts(["split", "diagnosis"]).to_dict()
    assert counts == {
        ("train", "benign"): 1338,
        ("train", "malignant"): 1103,
        ("test", "benign"): 347,
        ("test", "malignant"): 244,
    }
    assert (table.groupby("patient")["split"].nunique() == 1).all()


# ---------------------------------------------------------------------------- laws of the tables


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(TABLES)),
            st.integers(1, 4),
            st.sampled_from(["CC", "MLO"]),
            st.integers(1, 3),
            st.sampled_from(["BENIGN", "MALIGNANT"]),
        ),
        min_size=1,
    )
)
@settings(max_examples=40, deadline=None)
def test_whatever_the_tables_say_patients_have_one_split_and_malignant_wins(
    tmp_path_factory, listed
):
    rows, true = {}, {}
    for table, patient, view, n, pathology in listed:
        name = f"P_0000{patient}"
        rows.setdefault(table, []).append(row(table, name, view=view, n=n, pathology=pathology))
        key = (name, view)
        true[key] = true.get(key, False) or pathology == "MALIGNANT"
    rows = {name: rows.get(name, []) for name in TABLES}
    spare = {name: [row(name, f"P_9000{i}")] for i, name in enumerate(TABLES)}
    rows = {name: rows[name] + spare[name] for name in TABLES}
    table, _ = list_films(make_tables(tmp_path_factory.mktemp("tables"), rows))
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    found = table[~table["patient"].str.startswith("P_9")]
    malignant = {
        (r.patient, r.view): r.diagnosis == "malignant" for r in found.itertuples(index=False)
    }
    assert malignant == true


# -------------------------------------------------------------------------------- bad input


BAD = {
    "a path out of the folder": {"path": "../../etc/x/y.dcm"},
    "a path out of a folder of the right name": {
        "path": "Mass-Training_P_00009_LEFT_CC/../../secret/x.dcm"
    },
    "an absolute path": {"path": "/etc/passwd"},
    "the folder of another film": {"folder": "Mass-Training_P_00001_LEFT_CC"},
    "a folder of a crop": {"folder": "Mass-Training_P_00009_LEFT_CC_1"},
    "an unknown pathology": {"pathology": "UNSURE"},
    "an unknown density": {"density": "7"},
    "an unknown assessment": {"assessment": "9"},
}


@pytest.mark.parametrize("changed", BAD.values(), ids=BAD.keys())
def test_an_impossible_row_is_refused_by_table_and_number(four, tmp_path, capfd, changed):
    images, _ = four
    rows = {"mass_train": [row("mass_train", "P_00001"), row("mass_train", "P_00009", **changed)]}
    rows |= {name: [row(name, "P_00002")] for name in TABLES if name != "mass_train"}
    tables = make_tables(tmp_path / "tables", rows)
    told = refused(capfd, images, tables, tmp_path / "set")
    assert "mass_case_description_train_set.csv: row 2" in told


def test_tables_that_are_missing_or_no_tables_are_refused(archive, tmp_path, capfd):
    assert "no such file" in refused(capfd, archive[0], tmp_path, tmp_path / "set")
    tables = make_tables(tmp_path / "tables", ROWS)
    file = tables / "calc_case_description_test_set.csv"
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a readable CSV" in refused(capfd, archive[0], tables, tmp_path / "set")
    file.write_text(file.with_name("mass_case_description_test_set.csv").read_text()[:40])
    assert "no column" in refused(capfd, archive[0], tables, tmp_path / "set")


def test_a_folder_without_any_film_is_refused(archive, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    told = refused(capfd, tmp_path / "empty", archive[1], tmp_path / "set")
    assert "none of the" in told


def test_of_several_files_the_one_of_the_table_is_taken_or_none(four, tmp_path, capfd):
    images, tables = four
    folder = images / "Mass-Training_P_00001_LEFT_CC"
    (other,) = folder.rglob("*.dcm")
    write(folder / "again" / "1-2.dcm", film(5))
    assert "holds 2 DICOM files" in refused(capfd, images, tables, tmp_path / "set")
    assert run(images, tables, tmp_path / "set", "--on-fault", "skip") == 0
    report = imageset.open(tmp_path / "set").card["report"]
    assert report["left out: several DICOM files in a folder"] == 1
    file = write(folder / f"{UID}1" / f"{UID}2" / "000000.dcm", film(7))
    assert run(images, tables, tmp_path / "set", "--overwrite") == 0
    found = imageset.open(tmp_path / "set")
    place = list(found.table["item"]).index("mass_train 1")
    assert np.array_equal(found.images[place, 0], mammogram.read(file, 16)[0])


def test_the_copy_in_jpeg_is_read_by_its_series(tmp_path, capfd):
    rows, seen = {}, []
    for n, (name, (kind, part)) in enumerate(TABLES.items()):
        path = f"{kind}-{part}_P_0000{n}_LEFT_CC/{UID}1/{UID}7{n}/000000.dcm"
        rows[name] = [row(name, f"P_0000{n}", path=path)]
        file = tmp_path / "copy" / "jpeg" / f"{UID}7{n}" / f"1-{30 + n}.jpg"
        file.parent.mkdir(parents=True)
        Image.fromarray((film(n) >> 8).astype(np.uint8)).save(file, quality=100)
        seen.append(mammogram.read(write(tmp_path / "film.dcm", film(n)), 16)[0].astype(int))
    tables = make_tables(tmp_path / "tables", rows)
    assert run(tmp_path / "copy", tables, tmp_path / "set") == 0
    found = imageset.open(tmp_path / "set")
    order = [list(TABLES).index(item.split()[0]) for item in found.table["item"]]
    assert np.abs(found.images[:, 0] - np.array(seen)[order]).max() <= 3
    assert found.card["report"]["film read from a picture: grey values as they are"] == 4
    file.with_name("1-99.jpg").write_bytes(file.read_bytes())
    assert "holds 2 JPEG files" in refused(capfd, tmp_path / "copy", tables, tmp_path / "other")
    file.write_bytes(b"no JPEG")
    file.with_name("1-99.jpg").unlink()
    assert "not a whole image" in refused(capfd, tmp_path / "copy", tables, tmp_path / "other")
    assert run(tmp_path / "copy", tables, tmp_path / "other", "--on-fault", "skip") == 0
    assert imageset.open(tmp_path / "other").card["report"]["left out: unreadable picture"] == 1


def test_a_truncated_film_stops_or_is_left_out(four, tmp_path, capfd):
    images, tables = four
    (file,) = (images / "Mass-Training_P_00001_LEFT_CC").rglob("*.dcm")
    truncate(file)
    told = refused(capfd, images, tables, tmp_path / "set")
    assert "cannot be read as DICOM" in told
    assert NAME not in told
    assert run(images, tables, tmp_path / "set", "--on-fault", "skip") == 0
    report = imageset.open(tmp_path / "set").card["report"]
    assert report["left out: unreadable DICOM file"] == 1


def test_an_impossible_size_is_refused(four, tmp_path, capfd):
    assert "--size is 4" in refused(capfd, *four, tmp_path / "set", "--size", "4")
    assert "smaller --size" in refused(capfd, *four, tmp_path / "set", "--size", "512")


def test_a_missing_table_reads_as_a_sentence(tmp_path):
    with pytest.raises(UserError, match="the archive's table is needed there"):
        list_films(tmp_path)
