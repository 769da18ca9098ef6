import json
import re
import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_set import ROWS, write

from hallulib import UserError
from hallulib.data import checks, imageset
from hallulib.data.checks import SPLITS

GRADES = [*enumerate(("low", "high"))]


@pytest.fixture
def toy(tmp_path):
    return imageset.open(write(tmp_path / "toy"))


def test_images_stay_on_disk_and_leave_as_floats_between_minus_one_and_one(toy):
    assert isinstance(toy.images, np.memmap)
    x = toy.tensor()
    assert x.dtype == torch.float32
    assert torch.equal(
        (x + 1).mul(127.5).round().to(torch.uint8), torch.from_numpy(np.array(toy.images))
    )
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(toy.tensor([3, 1]), x[[3, 1]])


def test_writing_to_the_tensor_leaves_the_file_alone(toy):
    before = toy.images[:].copy()
    toy.tensor().fill_(0)
    assert np.array_equal(imageset.open(toy.path).images, before)


def test_labels_follow_the_order_of_the_card(toy):
    assert toy.schemes == ("grade",)
    assert toy.classes("grade") == ("low", "high")
    assert toy.labels("grade").tolist() == [0, 1, 0, 1, -1]
    assert (toy.name, toy.channels, toy.size, len(toy)) == ("toy", 1, 12, 5)


def test_selected_rows_keep_images_and_table_together(toy):
    for chosen in (
        toy.select("train"),
        toy.select(["val", "unlabelled"]),
        toy.select(labelled="grade"),
        toy.select(patients=["p1", "p3"]),
        toy.select(rows=[4, 0]),
    ):
        for image, item in zip(chosen.images, chosen.table["item"], strict=True):
            assert np.array_equal(image, toy.images[int(item)])
    assert isinstance(toy.select("train").images, np.memmap)
    assert list(toy.select(labelled="grade").table["item"]) == ["0", "1", "2", "3"]


def test_a_part_of_a_set_is_other_images_than_the_whole(toy):
    assert toy.select().identity == toy.identity  # nothing is left out
    parts = [toy.select(rows=rows).identity for rows in ([0, 1], [0, 2], [0, 1, 2])]
    assert len({str(i) for i in [toy.identity, *parts]}) == 4
    by_way_of = toy.select(rows=[0, 1, 2]).select(rows=[0, 1])
    assert by_way_of.identity == parts[0]  # whatever way it was selected


def test_classes_held_out_are_in_the_test_alone_and_no_others_are(tmp_path):
    rows = [(f"{part}{i}", part, label, "0") for part in SPLITS[1:] for i, label in GRADES]
    rows += [("u", "unlabelled", "", "0")]
    toy = imageset.open(write(tmp_path / "toy", rows=rows))
    left = toy.hold_out("grade", ["high"]).table
    found = left.groupby("split")["grade"].unique().map(list).to_dict()
    assert found == {"train": ["low"], "val": ["low"], "test": ["high"], "unlabelled": [""]}
    assert len(left) == 4
    assert toy.hold_out("grade", ["high"]).identity != toy.identity


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda s: s.labels("isup"), "known schemes: grade"),
        (lambda s: s.select("dev"), "known splits: unlabelled, train, val, test"),
        (lambda s: s.select(patients=["nobody"]), "no image"),
        (lambda s: s.hold_out("grade", ["5"]), "no class '5' of .* known classes: low, high"),
    ],
)
def test_an_impossible_question_is_answered_with_what_there_is(toy, ask, told):
    with pytest.raises(UserError, match=told):
        ask(toy)


FAULTS = {
    "float images": (dict(images=np.full((5, 1, 4, 4), np.nan)), "images.npy: float64"),
    "no channel axis": (dict(images=np.zeros((5, 4, 4), np.uint8)), "images.npy: uint8 of shape"),
    "not square": (dict(images=np.zeros((5, 1, 4, 5), np.uint8)), "images.npy: uint8 of shape"),
    "two channels": (dict(images=np.zeros((5, 2, 4, 4), np.uint8)), "1 or 3 channels"),
    "no image": (dict(images=np.zeros((0, 1, 4, 4), np.uint8), rows=[]), "of shape (0, 1, 4, 4)"),
    "too few rows": (dict(images=np.zeros((6, 1, 4, 4), np.uint8)), "table.csv: 5 rows for 6"),
    "spacing": (
        dict(spacing_mm=[0.5, float("nan")]),
        "card.json: spacing_mm.1 is missing or wrong",
    ),
    "equal labels": (
        dict(labels={"grade": {"values": ["a", "a"]}}),
        "card.json: labels.grade.values is",
    ),
    "other columns": (dict(labels={"isup": {"values": ["low"]}}), "table.csv: columns are"),
    "unknown split": (dict(rows=[("p", "dev", "low", "0")]), "has split 'dev'; known"),
    "unknown label": (dict(rows=[("p", "train", "worse", "0")]), "has grade 'worse'; known"),
    "no patient": (dict(rows=[("", "train", "low", "0")]), "is without a patient"),
    "labelled": (dict(rows=[("p", "unlabelled", "low", "0")]), "row 0 is in split unlabelled"),
    "unlabelled": (dict(rows=[("p", "train", "", "0")]), "without a label"),
    "another unit": (dict(unit="person"), "card.json: unit is missing or wrong (String should"),
    "units in a list": (dict(unit=["patient"]), "card.json: unit is missing or wrong"),
    "leak": (
        dict(rows=[("p7", "train", "low", "0"), ("p7", "test", "low", "1")]),
        "patient p7 is in train and test",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence_that_names_the_file(tmp_path, fault):
    changes, told = FAULTS[fault]
    with pytest.raises(UserError, match="toy.*" + re.escape(told)) as error:
        imageset.open(write(tmp_path / "toy", **changes))
    assert "\n" not in str(error.value)


def test_one_changed_pixel_is_found(tmp_path):
    folder = write(tmp_path / "toy")
    content = bytearray((folder / "images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "images.npy").write_bytes(content)
    with pytest.raises(UserError, match="images.npy: SHA-256 differs"):
        imageset.open(folder)


@pytest.mark.parametrize("name", imageset.FILES)
def test_a_file_cut_short_or_missing_is_named(tmp_path, name):
    folder = write(tmp_path / "toy")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        imageset.open(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} not found"):
        imageset.open(folder)


def test_a_pickled_array_is_refused(tmp_path):
    folder = write(tmp_path / "toy")
    np.save(folder / "images.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="images.npy: cannot be read"):
        imageset.open(folder)


def test_an_unknown_name_lists_the_embedded_sets():
    known = "histology, lesions, lesions_238, phantom"
    with pytest.raises(UserError, match=f"images.npy.* not found; {known} or a folder that"):
        imageset.open("no such set")


def test_paths_may_have_spaces_and_accents(tmp_path):
    assert len(imageset.open(str(write(tmp_path / "große Menge" / "été 1")))) == 5


def test_the_word_nan_and_leading_zeros_stay_text(tmp_path):
    rows = [("007", "train", "low", "NA"), ("nan", "test", "high", "null")]
    table = imageset.open(write(tmp_path / "toy", rows=rows)).table
    assert list(table["patient"]) == ["007", "nan"]
    assert list(table["item"]) == ["NA", "null"]


@pytest.mark.parametrize(
    ("unit", "units", "leak"),
    [
        ("patient", "4 patients", "patient p7 is in train and test; a patient may"),
        ("exam", "4 exams", "exam p7 is in train and test; an exam may"),
        ("near-copies", "4 groups of near copies", "group of near copies p7 is in train and"),
        ("unknown", "unknown patients", "unknown patient p7 is in train and test; an unknown"),
    ],
)
def test_sentences_name_what_the_card_says_that_images_are_grouped_by(tmp_path, unit, units, leak):
    opened = imageset.open(write(tmp_path / "toy", unit=unit))
    assert (opened.unit, opened.units) == (unit, units)
    with pytest.raises(UserError, match=leak):
        imageset.open(write(tmp_path / "leak", unit=unit, **FAULTS["leak"][0]))


def test_a_card_that_names_no_unit_means_patients(toy):
    assert "unit" not in json.loads((toy.path / "card.json").read_text())
    assert (toy.unit, toy.units) == ("patient", "4 patients")
    assert toy.select(patients=["p1"]).units == "1 patient"


def test_a_smaller_size_is_the_block_mean_and_scales_the_spacing(tmp_path):
    folder = write(tmp_path / "toy")
    small, full = imageset.open(folder, size=4), imageset.open(folder)
    means = full.images.reshape(5, 1, 4, 3, 4, 3).astype(int).sum((3, 5)) / 9
    assert np.array_equal(small.images, np.rint(means))
    assert small.card["spacing_mm"] == [1.5, 0.75]
    assert small.card["processing"]["steps"] == ["area-averaged from 12 to 4 pixels"]
    assert full.card["spacing_mm"] == [0.5, 0.25]
    imageset.check(small)


@pytest.mark.parametrize("size", [13, 0, -1])
def test_a_size_that_cannot_be_reached_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"size is {size}"):
        imageset.open(write(tmp_path / "toy"), size=size)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_area_averaging_keeps_constants_and_the_mean(old, new, level, seed):
    new = min(old, new)
    flat = np.full((1, 1, old, old), level, np.uint8)
    assert (checks.area_average(flat, new) == level).all()
    noise = np.random.default_rng(seed).integers(0, 256, (2, 3, old, old)).astype(np.uint8)
    reduced = checks.area_average(noise, new)
    assert abs(reduced.mean() - noise.mean()) <= 0.5
    if new == old:
        assert np.array_equal(reduced, noise)


def test_area_averaging_does_not_alias():
    stripes = np.tile(np.array([0, 255], np.uint8), (1, 1, 48, 24))
    assert np.ptp(checks.area_average(stripes, 20)) < 60  # taking every other pixel would give 255


def test_a_package_may_add_a_set_that_is_drawn_at_the_size_asked_for_and_checked(monkeypatch):
    rows = list(ROWS)

    def draw(size=24):
        table = pd.DataFrame(rows, columns=["patient", "split", "grade", "item"])
        card = {"name": "drawn", "labels": {"grade": {"values": ["low", "high"]}}}
        return np.zeros((len(rows), 1, size, size), np.uint8), table, card

    found = EntryPoints([EntryPoint("mine", "toy_drawn:draw", imageset.DRAWN)])
    monkeypatch.setattr(imageset, "entry_points", lambda group: found.select(group=group))
    monkeypatch.setitem(sys.modules, "toy_drawn", SimpleNamespace(draw=draw))
    assert (imageset.open("mine", size=16).size, imageset.open("mine").size) == (16, 24)
    rows[0] = ("p1", "val", "low", "0")
    with pytest.raises(UserError, match="drawn/table.csv: patient p1 is in val and train"):
        imageset.open("mine")


def test_a_copied_folder_is_the_same_set(tmp_path, toy):
    shutil.copytree(toy.path, tmp_path / "copy")
    copy = imageset.open(tmp_path / "copy")
    assert np.array_equal(copy.images, toy.images)
    assert copy.table.equals(toy.table)


@pytest.mark.parametrize("unit", checks.UNITS)
def test_a_chapter_says_what_its_patients_are_wherever_they_are_none(unit):
    told = checks.read_patients_as(unit)
    assert (told == "") == (unit == "patient")
    assert unit in ("patient", "unknown") or told.endswith(f"read {checks.UNITS[unit][1]}")
