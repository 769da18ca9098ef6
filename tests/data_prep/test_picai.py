"""PI-CAI into an image set: grades, masks, faults, restart, and no identifier."""

import csv
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.datadict import DicomDictionary, keyword_dict
from synthetic_mri import DIRECTION, ORIGIN, truncate, write, write_dicom

from data_prep.__main__ import main
from data_prep.archives import picai
from data_prep.archives.picai import list_cases, too_few
from data_prep.archives.picai.labels import (
    GLANDS,
    GLEASON,
    LABELS,
    LESIONS,
    MARKSHEET,
    Entry,
    gleason,
    read_marksheet,
    rule_counts,
    slice_grades,
)
from data_prep.archives.picai.study import Settings, read_case
from data_prep.dicom import read_series
from data_prep.drawn import prostate
from data_prep.volumes import Volume
from hallulib import UserError
from hallulib.data import imageset

REAL = Path(__file__).parents[3] / "shared" / "data" / "prostate_mri"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"real data not found: {REAL}")

SHAPE = (8, 40, 40)  # slices of 40 x 40 mm
SMALL = ["--size", "16", "--spacing", "1", "--workers", "1"]
GLAND = (slice(1, 7), slice(12, 28), slice(10, 30))
LESION = (slice(20, 23), slice(14, 17))
STUDIES = {  # study: lesion_GS, lesion_ISUP, case_ISUP, mask source, {slice: value of its mask}
    "10000_1000000": ("", "", 0, "expert", {}),
    "10001_1000001": ("N/A,3+3", "1", 1, "expert", {}),
    "10002_1000002": ("N/A,3+4,0+0", "2,0", 2, "expert", {2: 2, 3: 2}),
    "10003_1000003": ("4+3", "3", 3, "expert", {4: 3}),
    "10004_1000004": ("3+5,3+4", "4,2", 4, "expert", {2: 4, 3: 2}),
    "10005_1000005": ("4+5,5+4", "5,5", 5, "Pooch25", {5: 1}),
    "10005_1000006": ("0+0", "0", 0, "expert", {}),  # the patient has csPCa in another study
    "10006_1000007": ("3+4", "2", 2, "Bosma22a", {5: 1}),  # no human mask
    "10007_1000008": ("3+4", "2", 2, "expert", {}),  # empty mask
}
MARKED = 60_000  # grey value of a lesion, at the very voxels of its mask


def image_of(key):
    pixels = np.random.default_rng(int(key[-1])).integers(100, 900, SHAPE).astype(np.uint16)
    *_, slices = STUDIES[key]
    for k in slices:
        pixels[k][LESION] = MARKED
    return pixels


def make_labels(folder: Path, studies=STUDIES) -> Path:
    names = ["patient_id", "study_id", "mri_date", "patient_age"]
    names += ["lesion_GS", "lesion_ISUP", "case_ISUP", "case_csPCa", "center"]
    (folder / MARKSHEET).parent.mkdir(parents=True)
    with (folder / MARKSHEET).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        for key, (scores, grades, isup, source, slices) in studies.items():
            row = [*key.split("_"), "2019-07-02", 73, scores, grades, isup]
            table.writerow([*row, "YES" if isup >= 2 else "NO", "RUMC"])
            mask = np.zeros(SHAPE, np.uint8)
            for k, value in slices.items():
                mask[k][LESION] = value
            write(folder / LESIONS[source] / f"{key}.nii.gz", mask)
            gland = np.zeros(SHAPE, np.uint8)
            gland[GLAND] = 1
            for name in GLANDS.values():
                write(folder / name / f"{key}.nii.gz", gland)
    return folder


def make_images(folder: Path, keys=STUDIES) -> Path:
    """Half in a fold zip, half in folders, beside images of other sequences."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "picai_public_images_fold0.zip", "w") as archive:
        for n, key in enumerate(keys):
            patient = key.split("_")[0]
            file = write(folder / patient / f"{key}_t2w.mha", image_of(key))
            shutil.copy(file, file.with_name(f"{key}_adc.mha"))
            if n % 2:
                archive.write(file, f"{patient}/{file.name}")
                file.unlink()
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picai")
    return make_images(folder / "images"), make_labels(folder / "labels")


@pytest.fixture(scope="module")
def prepared(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    assert main(["picai", *map(str, archive), str(out), *SMALL]) == 0
    return imageset.open(out)


def run(images, labels, out, *more):
    return main(["picai", str(images), str(labels), str(out), *SMALL, *more])


def report(prepared):
    return prepared.card["report"]


# ------------------------------------------------------------------------------------ the set


def test_labels_are_those_of_the_phantom():
    _, _, card = prostate.prostate(size=16, n_unlabelled=1, n_train=1, n_val=1, n_test=1)
    assert {name: list(told) for name, told in LABELS.items()} == {
        name: list(about["values"]) for name, about in card["labels"].items()
    }
    assert tuple(GLEASON) == prostate.GS
    assert [str(isup) for isup in GLEASON.values()] == list(prostate.SCHEMES["isup"][0])


def test_lesion_slices_have_the_grade_of_their_mask(prepared):
    rows = prepared.table[prepared.table["isup"] != ""]
    found = [tuple(row) for row in rows[["study", "slice", "isup", "gs", "grade2", "mask"]].values]
    assert found == [
        ("1000002", "2", "2", "3+4", "low", "expert"),
        ("1000002", "3", "2", "3+4", "low", "expert"),
        ("1000003", "4", "3", "4+3", "high", "expert"),
        ("1000004", "2", "4", "3+5", "high", "expert"),
        ("1000004", "3", "2", "3+4", "low", "expert"),
        ("1000005", "5", "5", "5+4", "high", "Pooch25"),
    ]


def test_unlabelled_slices_are_the_glands_of_patients_without_significant_cancer(prepared):
    rows = prepared.table[prepared.table["split"] == "unlabelled"]
    assert set(rows["study"]) == {"1000000", "1000001"}
    assert rows["slice"].tolist() == [str(k) for k in range(1, 7)] * 2
    note = "study without csPCa of a patient with csPCa in another: left out"
    assert report(prepared)[note] == 1


def test_the_lesion_stays_in_the_crop_at_its_slice_and_place(prepared):
    centre = np.array([19.5, 19.5])  # of the gland, on the grid of the image
    rows, columns = (range(s.start, s.stop) for s in LESION)
    for image, row in zip(prepared.images[:, 0], prepared.table.to_dict("records"), strict=True):
        bright = np.argwhere(image == 255) - 7.5 + centre
        if row["isup"]:
            assert {tuple(place) for place in bright} >= {(r, c) for r in rows for c in columns}
        else:
            assert len(bright) < 9


def test_everything_odd_is_counted(prepared):
    found = report(prepared)
    assert found["study with csPCa without expert or Pooch25 mask: left out"] == 1
    assert found["study with csPCa with empty expert mask: left out"] == 1
    assert (
        found["lesion slice with several Gleason scores of its grade: the more severe taken"] == 1
    )
    assert found["MetaImage that is not axial T2W: left out"] == len(STUDIES)
    assert any(note.startswith("isup 3 has too few patients") for note in found)


def test_the_counts_of_every_rule_stand_beside_the_papers(prepared):
    told = "lesion slices (paper: 2,049) by rule: "
    found = {note.removeprefix(told): n for note, n in report(prepared).items() if told in note}
    assert found == {
        "expert": 5,
        "expert, else Pooch25 [--masks human]": 6,
        "expert, else Bosma22a [--masks paper]": 6,
        "expert, else Bosma22a, studies with one significant lesion": 4,
        "expert, else Bosma22a, studies with one significant grade": 4,
        "Bosma22a": 1,
        "Bosma22a, studies with one significant lesion": 1,
    }
    told = "benign slices (paper: 11,202) by rule: "
    assert report(prepared)[told + "gland of Guerbet23, studies without csPCa"] == 18
    assert report(prepared)[told + "all, studies of ISUP 0"] == 16


def test_masks_paper_takes_the_other_masks(archive, tmp_path):
    assert run(*archive, tmp_path / "set", "--masks", "paper") == 0
    table = imageset.open(tmp_path / "set").table
    assert set(table["study"][table["mask"] == "Bosma22a"]) == {"1000007"}
    assert "1000005" not in set(table["study"])


def test_the_bytes_without_windows_are_those_of_before_there_were_any(prepared):
    sums = {name: prepared.card["sha256"][name][:16] for name in ("images.npy", "table.csv")}
    assert sums == {"images.npy": "a5268f1debd053d2", "table.csv": "1177ea27c4d9f10c"}
    steps = prepared.card["processing"]["steps"]
    assert steps[5:7] == [
        "crop 16 mm around the gland, linear to 1 mm, edge repeated",
        "percentiles 0.5 to 99.5 of the gland's voxels (else of the crop) to 0 to 255",
    ]


def test_only_fields_on_the_list_reach_the_set(prepared):
    columns = ["patient", "split", "isup", "gs", "grade2", "study", "slice", "mask"]
    assert list(prepared.table.columns) == columns
    assert prepared.card["unit"] == "patient"
    card = json.dumps(prepared.card)
    assert not any(told in card for told in ("2019-07-02", "RUMC", "10000_", str(Path.home())))


@pytest.mark.parametrize("change", ["zip only", "folders only", "DICOM"])
def test_the_way_the_images_come_does_not_change_them(archive, prepared, tmp_path, change):
    images, key = tmp_path / "images", "10003_1000003"
    if change == "DICOM":
        numbers = list(range(SHAPE[0]))[::-1]
        names = [f"{n}.dcm" for n in np.random.default_rng(0).permutation(SHAPE[0])]
        write_dicom(images / key / "any", image_of(key), names, numbers)
    else:
        file = write(images / "10003" / f"{key}_t2w.mha", image_of(key))
        if change == "zip only":
            with zipfile.ZipFile(images / "any.zip", "w") as zipped:
                zipped.write(file, f"../../{key}_t2w.mha")  # a name that must not be followed
            file.unlink()
    case = list_cases(images, archive[1])[0]
    study = read_case(case[0], Settings(size=16, spacing=1.0))
    expected = prepared.images[prepared.table["study"] == "1000003"]
    assert np.array_equal(np.stack(study.images), expected)


# ------------------------------------------------------------------------------ rules by hand


@pytest.mark.parametrize(
    ("lesions", "isup", "score", "odd"),
    [
        (((2, "3+4"),), 2, "3+4", 0),
        (((0, "0+0"), (3, "4+3")), 3, "4+3", 0),
        (((5, "4+5"), (5, "5+4")), 5, "5+4", 1),
        (((4, "3+5"), (4, "4+4")), 4, "3+5", 1),
        (((2, "3+4"), (2, "3+4")), 2, "3+4", 0),
        (((2, "3+4"),), 4, "", 1),
        ((), 2, "", 1),
    ],
)
def test_the_gleason_score_is_the_one_paired_with_the_grade(lesions, isup, score, odd):
    found, notes = gleason(isup, Entry("1", "2", 5, lesions, True))
    assert (found, len(notes)) == (score, odd)


def test_the_grade_of_a_slice_is_its_highest_voxel_or_the_case():
    entry = Entry("1", "2", 4, ((2, "3+4"), (4, "4+4")), True)
    mask = np.zeros((4, 3, 3), np.uint8)
    mask[1, 0] = [2, 4, 0]
    mask[3, 2] = [0, 2, 2]
    assert slice_grades(mask, "expert", entry) == (
        {1: 4, 3: 2},
        ["lesion slice of two grades: the higher taken"],
    )
    grades, notes = slice_grades((mask > 0).astype(int), "Pooch25", entry)
    assert (grades, len(notes)) == ({1: 4, 3: 4}, 2)
    with pytest.raises(UserError, match=r"expert mask has value 1; known values"):
        slice_grades((mask > 0).astype(int), "expert", entry)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("3+4,N/A,3+3", "same length"),
        ("4+4", "contradict"),
    ],
)
def test_a_marksheet_that_contradicts_itself_is_refused(tmp_path, row, told):
    make_labels(tmp_path / "l", {"10000_1000000": (row, "2", 2, "expert", {})})
    with pytest.raises(UserError, match=f"line 2 has .*{told}"):
        read_marksheet(tmp_path / "l")


def test_a_grade_with_too_few_patients_is_named():
    rows = [
        (f"{g}{s}{n}", s, g) for g in "245" for s in ("train", "val", "test") for n in range(2)
    ]
    table = pd.DataFrame([*rows, ("a", "train", "3")], columns=["patient", "split", "isup"])
    (told,) = too_few(table)
    assert told.startswith("isup 3 has too few patients (1 in train, 0 in val, 0 in test)")


def test_of_two_dicom_series_the_rule_takes_one_and_counts_the_other(archive, tmp_path):
    key = "10003_1000003"
    for number in ("6", "10"):
        write_dicom(tmp_path / key / number, image_of(key), series=number)
    short = write_dicom(tmp_path / key / "9", image_of(key)[:5], series="9")
    assert short
    (case,), notes = list_cases(tmp_path, archive[1])
    assert Path(case.image.files[0].path).parent.name == "10"
    assert notes.count("second T2W image of a study: left out") == 2


def test_dicom_that_is_not_axial_t2w_is_left_out(archive, tmp_path):
    def change(k, found):
        found.SeriesDescription = "ep2d_diff_tra_DYNDIST"

    write_dicom(tmp_path / "10003_1000003" / "1", image_of("10003_1000003"))
    write_dicom(tmp_path / "10003_1000003" / "2", image_of("10003_1000003"), change=change)
    _, notes = list_cases(tmp_path, archive[1])
    assert notes.count("DICOM series that is not axial T2W: left out") == 1


# -------------------------------------------------------------------------------- bad input


def several_frames(images, labels):
    def change(k, found):  # as enhanced MR: place and direction are those of each frame
        found.NumberOfFrames = len(array)
        found.PixelData = array.astype("<u2").tobytes()
        del found.ImagePositionPatient, found.ImageOrientationPatient, found.PixelSpacing

    array = image_of("10003_1000003")
    shutil.rmtree(images / "10003")
    write_dicom(images / "10003_1000003" / "1", array[:1], change=change)


def nan(images, labels):
    pixels = image_of("10003_1000003").astype(np.float32)
    pixels[3, 3, 3] = np.nan
    write(images / "10003" / "10003_1000003_t2w.mha", pixels)


def truncated_image(images, labels):
    truncate(images / "10003" / "10003_1000003_t2w.mha", 0.7)


def truncated_mask(images, labels):
    truncate(labels / LESIONS["expert"] / "10003_1000003.nii.gz", 0.7)


def mask_of_other_geometry(images, labels):
    mask = np.zeros(SHAPE, np.uint8)
    mask[4][LESION] = 3
    path = labels / LESIONS["expert"] / "10003_1000003.nii.gz"
    write(path, mask, origin=(-20.0, -10.0, 10.0))


def mask_of_other_slices(images, labels):
    mask = np.zeros((SHAPE[0] + 1, *SHAPE[1:]), np.uint8)
    mask[4][LESION] = 3
    write(labels / LESIONS["expert"] / "10003_1000003.nii.gz", mask)


def unknown_value(images, labels):
    write(labels / LESIONS["expert"] / "10003_1000003.nii.gz", np.full(SHAPE, 7, np.uint8))


def flat(images, labels):
    write(images / "10003" / "10003_1000003_t2w.mha", np.full(SHAPE, 5, np.uint16))


def unknown_study(images, labels):
    write(images / "10003" / "99999_1000003_t2w.mha", image_of("10003_1000003"))


def truncated_zip(images, labels):
    with zipfile.ZipFile(images / "fold.zip", "w") as archive:
        archive.writestr("x.txt", "x" * 1000)
    truncate(images / "fold.zip", 0.5)


def truncated_dicom(images, labels):
    shutil.rmtree(images / "10003")
    files = write_dicom(images / "10003_1000003" / "1", image_of("10003_1000003"))
    truncate(files[2], 0.7)


def dicom_of_nobody(images, labels):
    write_dicom(images / "someone", image_of("10003_1000003"))


def damaged_member(images, labels):
    file = images / "10003" / "10003_1000003_t2w.mha"
    with zipfile.ZipFile(images / "fold.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, file.name)
    file.unlink()
    whole = bytearray((images / "fold.zip").read_bytes())
    whole[2000:2100] = bytes(100)
    (images / "fold.zip").write_bytes(whole)


def flipped_image(images, labels):
    file = images / "10003" / "10003_1000003_t2w.mha"
    whole = bytearray(file.read_bytes())
    whole[-500] ^= 1
    with zipfile.ZipFile(images / "fold.zip", "w") as archive:
        archive.writestr(file.name, whole)  # the zip is whole, the image in it is not
    file.unlink()


def gland_of_other_values(images, labels):
    for name in GLANDS.values():
        write(labels / name / "10003_1000003.nii.gz", np.full(SHAPE, -1, np.int8))


def thousands_of_slices(images, labels):
    pixels = np.zeros((600_000, 1, 1), np.uint8)  # each would be cut to 16 x 16 numbers
    write(images / "10003" / "10003_1000003_t2w.mha", pixels)


def words_for_numbers(images, labels):
    change = lambda k, found: found.add_new("PixelSpacing", "LO", "JANSEN")
    shutil.rmtree(images / "10003")
    write_dicom(images / "10003_1000003" / "1", image_of("10003_1000003"), change=change)


FAULTS = {
    damaged_member: "unreadable zip",
    flipped_image: "truncated or damaged file",
    gland_of_other_values: "mask with unknown values",
    thousands_of_slices: "too many slices",
    words_for_numbers: "unreadable DICOM file",
    several_frames: "DICOM file of several frames",
    nan: "pixels not finite",
    truncated_image: "truncated or damaged file",
    truncated_mask: "truncated or damaged file",
    mask_of_other_geometry: "mask of other geometry",
    mask_of_other_slices: "mask of other geometry",
    unknown_value: "mask with unknown values",
    flat: "no contrast",
    unknown_study: "image without a row in the marksheet",
    truncated_zip: "unreadable zip",
    truncated_dicom: "unreadable DICOM file",
    dicom_of_nobody: "DICOM series of unknown study",
}


@pytest.fixture
def two(tmp_path):
    """An archive of two studies, one with a lesion."""
    keys = ["10000_1000000", "10003_1000003"]
    labels = make_labels(tmp_path / "labels", {key: STUDIES[key] for key in keys})
    for key in keys:
        write(tmp_path / "images" / key[:5] / f"{key}_t2w.mha", image_of(key))
    return tmp_path / "images", labels


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_fault_stops_with_one_sentence_or_is_left_out_by_name(two, tmp_path, capfd, spoil):
    spoil(*two)
    assert run(*two, tmp_path / "set") == 2
    told = capfd.readouterr()
    sentence = [line for line in told.err.splitlines() if line and "item" not in line]
    assert len(sentence) == 1
    assert told.out == ""
    assert "JANSEN" not in told.err
    left = {path.name for path in tmp_path.iterdir()} - {"images", "labels"}
    assert left <= {"set.partial"}  # what was read of the others

    assert run(*two, tmp_path / "set", "--on-fault", "skip") == 0
    counts = imageset.open(tmp_path / "set").card["report"]
    assert counts[f"left out: {FAULTS[spoil]}"] == 1


@pytest.mark.parametrize("what", ["gland", "lesion"])
def test_a_mask_that_falls_between_the_voxels_of_the_image_counts_as_empty(two, tmp_path, what):
    key, mask = "10003_1000003", np.zeros((SHAPE[0], 120, 120), np.uint8)
    mask[4, 60, 60] = 1 if what == "gland" else 3  # between two voxels of the coarser image
    folders = GLANDS.values() if what == "gland" else [LESIONS["expert"]]
    corner = tuple(np.array(ORIGIN) - DIRECTION @ np.array([1 / 3, 1 / 3, 0]))
    for folder in folders:
        write(two[1] / folder / f"{key}.nii.gz", mask, spacing=(1 / 3, 1 / 3, 3), origin=corner)
    assert run(*two, tmp_path / "set") == 0
    counts = report(imageset.open(tmp_path / "set"))
    empty = "study with empty {} gland mask"
    lost = "lesion smaller than the voxels of the image: left out"
    notes = [lost] if what == "lesion" else [empty.format(name) for name in GLANDS]
    assert [counts.get(note) for note in notes] == [1] * len(notes)


def test_what_is_no_metaimage_in_a_zip_is_counted(archive, tmp_path):
    with zipfile.ZipFile(tmp_path / "fold.zip", "w") as outer:
        outer.write(write(tmp_path / "10003_1000003_t2w.mha", image_of("10003_1000003")))
        outer.writestr("inner.zip", (archive[0] / "picai_public_images_fold0.zip").read_bytes())
        outer.writestr("10003/", "")
    _, notes = list_cases(tmp_path, archive[1])
    assert notes.count("file in a zip that is no MetaImage: left out") == 1


def test_a_line_of_the_marksheet_is_told_as_an_editor_counts_it(tmp_path):
    rows = {
        "10000_1000000": ("", "", 0, "expert", {}),
        "10001_1000001": ("4+4", "2", 2, "expert", {}),
    }
    file = make_labels(tmp_path / "l", rows) / MARKSHEET
    names, *lines = file.read_text().splitlines()
    file.write_text("\n".join([names, "", lines[0].replace("RUMC", '"two\nlines"'), "", lines[1]]))
    with pytest.raises(UserError, match="line 6 has lesion"):
        read_marksheet(tmp_path / "l")


def test_an_empty_folder_is_refused(tmp_path, archive, capfd):
    (tmp_path / "images").mkdir()
    assert run(tmp_path / "images", archive[1], tmp_path / "set") == 2
    assert "no T2W image of PI-CAI" in capfd.readouterr().err
    assert run(archive[0], tmp_path / "images", tmp_path / "set") == 2
    assert "a clone of" in capfd.readouterr().err


def test_an_output_that_cannot_be_written_is_refused(archive, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert run(*archive, tmp_path / "file" / "set") == 2
    assert "cannot write" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_patient_is_in_two_splits_even_with_studies_of_both_kinds(prepared):
    splits = prepared.table.groupby("patient")["split"].nunique()
    assert "10005" in splits.index
    assert (splits == 1).all()


def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    archive, prepared, tmp_path, monkeypatch
):
    read, broken = [], 4

    def reading(case, settings):
        if len(read) == broken:
            raise KeyboardInterrupt
        read.append(case.key)
        return read_case(case, settings)

    monkeypatch.setattr(picai, "read_case", reading)
    assert run(*archive, tmp_path / "set") == 130
    assert not (tmp_path / "set").exists()
    broken = None
    assert run(*archive, tmp_path / "set") == 0
    assert sorted(read) == sorted(STUDIES)  # none was read twice
    for name in imageset.FILES:
        assert (tmp_path / "set" / name).read_bytes() == (prepared.path / name).read_bytes()


# ------------------------------------------------------------------------------- identifiers


def plant(k, found):
    """Puts a name into every text tag of the standard, a private tag, and a sequence."""
    texts = {"LO", "SH", "PN", "LT", "ST", "UT", "UC", "AE"}
    kept = {"SeriesDescription"}
    for keyword, tag in keyword_dict.items():
        vr = DicomDictionary[tag][0]
        if (
            keyword
            and tag > 0x00080000
            and vr in texts
            and keyword not in kept
            and found.get(tag) is None
        ):
            found.add_new(tag, vr, "JANSEN")
    found.SeriesDescription = "t2_tse_tra JANSEN"
    found.PatientBirthDate, found.PatientAge = "19301231", "099Y"
    block = found.private_block(0x0013, "JANSEN", create=True)
    block.add_new(0x10, "LO", "JANSEN")
    inner = pydicom.Dataset()
    inner.PatientName = "JANSEN^PIET"
    found.ReferencedStudySequence = [inner]


def test_no_identifier_leaves_the_dicom_files(two, tmp_path, capfd):
    shutil.rmtree(two[0] / "10003")
    write_dicom(two[0] / "10003_1000003" / "1", image_of("10003_1000003"), change=plant)
    assert b"JANSEN" in next((two[0] / "10003_1000003").rglob("*.dcm")).read_bytes()
    assert run(*two, tmp_path / "set") == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "set").iterdir())
    said = "".join(capfd.readouterr())
    for secret in ("JANSEN", "PIET", "19301231", "099Y"):
        assert secret.encode() not in written
        assert secret not in said
    assert imageset.open(tmp_path / "set").table["gs"].tolist()[-1] == "4+3"


# -------------------------------------------------------------------------------- real data


@real
def test_the_real_lesion_is_on_slices_8_and_9():
    cases, notes = list_cases(REAL / "dicom", REAL / "picai_labels")
    by_key = {case.key: case for case in cases}
    assert sorted(by_key) == ["10795_1000811", "11373_1001396"]
    assert notes.count("second T2W image of a study: left out") == 1
    study = read_case(by_key["11373_1001396"], Settings())
    assert [(row["slice"], row["isup"], row["gs"]) for row in study.rows] == [
        (8, 3, "4+3"),
        (9, 3, "4+3"),
    ]
    assert all(image.shape == (1, 128, 128) for image in study.images)


@real
def test_the_real_repeat_of_a_series_is_the_one_its_masks_were_drawn_on():
    # the gland's outline lies on edges of series 10, but 3.5 mm beside those of series 6
    cases, _ = list_cases(REAL / "dicom", REAL / "picai_labels")
    case = next(case for case in cases if case.key == "10795_1000811")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(dict(case.masks)["Guerbet23"].path)) > 0
    border = mask & ~np.roll(mask, 1, axis=1)  # its front
    strength = {}
    for folder in sorted(Path(case.image.files[0].path).parents[1].iterdir()):
        pixels = read_series(sorted(folder.glob("*.dcm")), "series").pixels
        steps = np.abs(np.roll(pixels, -2, axis=1) - np.roll(pixels, 2, axis=1)) / pixels.mean()
        strength[folder.name.partition(".")[0]] = steps[border].mean()
    chosen = Path(case.image.files[0].path).parent.name.partition(".")[0]
    assert max(strength, key=strength.get) == chosen == "10"


@real
def test_the_real_expert_masks_have_the_lesion_slices_of_the_list():
    entries = read_marksheet(REAL / "picai_labels")
    with (REAL / "subset_40.csv").open() as file:
        rows = list(csv.DictReader(file))[::4]  # ten of them, every grade
    for row in rows:
        path = REAL / "picai_labels" / LESIONS["expert"] / f"{row['case']}.nii.gz"
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        grades, _ = slice_grades(mask, "expert", entries[row["case"]])
        expected = (row["first_slice"], row["last_slice"], row["lesion_slices"])
        assert expected == (str(min(grades)), str(max(grades)), str(len(grades)))
        assert str(max(grades.values())) == row["mask_label"]
        volume = Volume(mask, np.zeros(3), np.eye(3))
        notes = list(rule_counts(entries[row["case"]], len(mask), {"expert": volume}))
        assert notes.count("lesion slices (paper: 2,049) by rule: expert") == len(grades)


@real
def test_the_real_marksheet_has_the_published_counts():
    entries = read_marksheet(REAL / "picai_labels").values()
    grades = [entry.isup for entry in entries]
    assert [grades.count(isup) for isup in range(6)] == [847, 228, 234, 99, 40, 52]
    assert len({entry.patient for entry in entries}) == 1476
    both = {entry.patient for entry in entries if not entry.alone and entry.isup < 2}
    assert len(both) == 6
