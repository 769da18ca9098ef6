"""Folders of images as people have them: splits, links, and files that are not read."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_folder import pixels, prepare, refused, save

from data_prep.plan import SPLIT_NAMES, split_name
from hallulib.data import imageset

SPELLINGS = [
    ("train", "val", "test"),
    ("train", "valid", "test"),
    ("Training", "Validation", "Testing"),
    ("TRAIN", "VALID", "TEST"),
    ("train_set", "val-set", "Test Set"),
]


@given(st.sampled_from([(s, n) for s, names in SPLIT_NAMES.items() for n in names]), st.data())
def test_every_spelling_of_a_split_is_known_in_any_case(pair, draw):
    split, name = pair
    case = draw.draw(st.sampled_from([str.lower, str.upper, str.title, str.capitalize]))
    mark = draw.draw(st.sampled_from(["", " ", "_", "-"]))
    assert split_name(case(name)) == split
    assert split_name(case(name.replace("set", mark + "set"))) == split


@pytest.mark.parametrize("name", ["", "trained", "tests", "invalid", "evaluation", "attest", "7"])
def test_other_names_are_no_splits(name):
    assert split_name(name) == ""


@pytest.mark.parametrize("names", SPELLINGS)
def test_folders_of_splits_are_known_however_they_are_spelt(tmp_path, names):
    for n, split in zip((5, 3, 4), names, strict=True):
        for i in range(n):
            save(tmp_path / "in" / split / "a" / f"{i}.png")
    assert prepare(tmp_path / "in") == 0
    found = imageset.open(tmp_path / "set").table["split"].value_counts()
    assert found.to_dict() == {"train": 5, "val": 3, "test": 4}


@pytest.mark.parametrize("name", ["unlabelled", "Unlabelled", "unlabeled"])
def test_images_without_label_are_known_however_that_is_spelt(tmp_path, name):
    for folder in ("Training/a", "Training/b", name):
        save(tmp_path / "in" / folder / "0.png")
    assert prepare(tmp_path / "in") == 0
    opened = imageset.open(tmp_path / "set")
    assert opened.classes("label") == ("a", "b")
    assert list(opened.table["split"]) == ["train", "train", "unlabelled"]


def test_a_class_may_have_the_name_of_a_split_if_other_classes_are_beside_it(tmp_path):
    for name in ("valid", "invalid"):
        for i in range(5):
            save(tmp_path / "in" / name / f"{i}.png")
    assert prepare(tmp_path / "in") == 0
    assert imageset.open(tmp_path / "set").classes("label") == ("invalid", "valid")


LAYOUTS = {
    "classes of one patient each": (
        ["8863/0", "8863/1", "8864/0"],
        "8863/0: a folder in a class folder; images must lie directly in class folders (in splits"
        " named train, val, test). For folders of patients, put the patient into the names of"
        " files (--patient-pattern finds it) or list file, label and patient in a table (--csv)",
    ),
    "one folder too deep": (["in/Training/a", "in/Testing/a"], "in/in is the folder to give"),
    "splits without classes": (["Training", "Testing"], "0.png: an image outside a class folder"),
    "a split twice": (["val/a", "valid/a"], "valid: split val for the second time, after val"),
    "a class beside": (["Training/a", "b"], "b: a class beside train, val or test (Training)"),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_a_layout_that_could_mean_several_things_is_refused_with_what_to_do(
    tmp_path, capsys, what
):
    folders, told = LAYOUTS[what]
    for folder in folders:
        save(tmp_path / "in" / folder / "0.png")
    assert told in refused(capsys, tmp_path / "in")


@pytest.fixture
def classes(tmp_path) -> Path:
    for name in ("sick", "well"):
        for i in range(5):
            save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def symbolic(new: Path, old: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(old)


def hard(new: Path, old: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(old, new)


@pytest.mark.parametrize("link", [symbolic, hard])
def test_a_file_with_two_classes_or_splits_is_refused(classes, capsys, link):
    link(classes / "well" / "9.PNG", classes / "sick" / "0.png")
    told = refused(capsys, classes)
    assert "in/well/9.PNG and " in told
    assert "in/sick/0.png are one file, but of different classes" in told
    (classes / "well" / "9.PNG").unlink()
    (classes / "train").mkdir()
    for name in ("sick", "well"):
        shutil.move(classes / name, classes / "train" / name)
    link(classes / "test" / "sick" / "0.png", classes / "train" / "sick" / "0.png")
    assert "train/sick/0.png and " in refused(capsys, classes)


def test_a_class_folder_that_is_a_link_to_another_is_refused(classes, capsys):
    (classes / "zero").symlink_to(classes / "sick", target_is_directory=True)
    assert "zero/0.png and " in refused(capsys, classes)


@pytest.mark.parametrize("link", [symbolic, hard])
@pytest.mark.parametrize("options", [(), ("--unlabelled",)])
def test_further_links_to_an_image_of_the_same_class_are_counted_once(classes, link, options):
    assert prepare(classes, *options, "--name=set", out="plain") == 0
    for name in ("7.png", "8.tiff"):
        link(classes / "well" / name, classes / "well" / "3.png")
    assert prepare(classes, *options) == 0
    plain, opened = (imageset.open(classes.parent / out) for out in ("plain", "set"))
    assert opened.card["report"]["further link to an image left out"] == 2
    assert opened.table.equals(plain.table)
    assert (opened.images == plain.images).all()


def test_a_link_with_two_patients_is_refused(tmp_path, capsys):
    for i, patient in enumerate("112334"):
        save(tmp_path / "in" / "ab"[i // 3] / f"p{patient}_{i}.png")
    symbolic(tmp_path / "in" / "a" / "p5_9.png", tmp_path / "in" / "a" / "p1_0.png")
    told = refused(capsys, tmp_path / "in", r"--patient-pattern=p\d")
    assert "a/p5_9.png and " in told
    assert "are one file, but of different classes, splits or patients" in told


UNREAD = {".webp": "WEBP", ".gif": "GIF", ".ppm": "PPM", ".dcm": "PNG", ".heic": "PNG"}


@pytest.mark.parametrize("suffix", [*UNREAD, ".WEBP", ".xyz", ""])
def test_a_class_that_loses_all_its_images_stops_the_command(classes, capsys, suffix):
    for i in range(6):
        save(classes / "rare" / f"{i}{suffix}", format=UNREAD.get(suffix.lower(), "PNG"))
    told = refused(capsys, classes)
    assert "in/rare: none of its 6 files is read (" in told
    assert f"({suffix.lower() or 'no suffix'}); turn them into one of .bmp, .jfif, .jpeg" in told
    (classes / "rare").rename(classes / "unlabelled")
    assert "in/unlabelled: none of its 6 files is read" in refused(capsys, classes)


@pytest.mark.parametrize("suffix", UNREAD)
def test_images_that_are_not_read_are_counted_by_class_and_suffix(classes, suffix):
    for place, n in (("sick", 3), ("well", 1), ("", 2)):
        for i in range(n):
            save(classes / place / f"x{i}{suffix}", format=UNREAD[suffix])
    save(classes / "well" / "scan of.doe", format="PNG")
    assert prepare(classes) == 0
    report = imageset.open(classes.parent / "set").card["report"]
    assert {told: n for told, n in report.items() if "left out" in told} == {
        f"{suffix} file of class 'sick' left out": 3,
        f"{suffix} file of class 'well' left out": 1,
        f"{suffix} file left out": 2,
        "file that is not an image of class 'well' left out": 1,
    }
    assert prepare(classes, "--unlabelled", out="pool") == 0
    report = imageset.open(classes.parent / "pool").card["report"]
    assert report[f"{suffix} file left out"] == 6


def test_a_jpeg_may_be_called_jfif(classes):
    for i in range(5):
        save(classes / "rare" / f"{i}.jfif", format="JPEG")
    assert prepare(classes) == 0
    assert imageset.open(classes.parent / "set").classes("label") == ("rare", "sick", "well")


def test_only_what_an_editor_or_macos_hides_is_no_class(classes):
    for name in ("__background__", "_other", "@lab"):
        save(classes / name / "0.png")
    for name in ("__MACOSX/sick", ".cache", "sick/.ipynb_checkpoints", "sick/__MACOSX"):
        save(classes / name / "0.png")
    assert prepare(classes) == 0
    opened = imageset.open(classes.parent / "set")
    assert opened.classes("label") == ("@lab", "__background__", "_other", "sick", "well")
    assert opened.card["report"]["image in a hidden folder left out"] == 2


def test_a_class_without_image_stops_the_command_unless_another_split_has_it(classes, capsys):
    (classes / "rare").mkdir()
    assert "in/rare: a class without image; add images" in refused(capsys, classes)
    shutil.rmtree(classes / "rare")
    (classes / "unlabelled").mkdir()
    assert prepare(classes) == 0
    assert imageset.open(classes.parent / "set").card["report"]["folder without image"] == 1


def test_a_split_need_not_hold_every_class_but_none_may_be_lost(tmp_path, capsys):
    for folder in ("train/a", "train/b", "test/a"):
        save(tmp_path / "in" / folder / "0.png")
    (tmp_path / "in" / "test" / "b").mkdir()
    assert prepare(tmp_path / "in", "--fractions=train=1") == 0
    assert imageset.open(tmp_path / "set").card["report"]["folder without image"] == 1
    (tmp_path / "in" / "test" / "c").mkdir()
    assert "test/c: a class without image" in refused(capsys, tmp_path / "in")
    Image.fromarray(pixels(16, 16)).save(tmp_path / "in" / "test" / "b" / "0.webp")
    (tmp_path / "in" / "test" / "c").rmdir()
    assert "test/b: none of its 1 files is read (.webp)" in refused(capsys, tmp_path / "in")


def test_a_link_that_leads_nowhere_is_not_overlooked(classes, capsys):
    (classes / "sick" / "9.png").symlink_to(classes / "nowhere.png")
    assert "in/sick/9.png: No such file" in refused(capsys, classes)
