"""A fault of one item costs no other item: all are told at once, the rest is read once."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_writer import contents
from toy_archive import CARD, SPLITS, Patient, make, read

from data_prep import files, staging
from data_prep.__main__ import main
from data_prep.writer import prepare
from hallulib import UserError
from hallulib.data import imageset

ITEMS = [Patient(n) for n in range(1, 13)]


class Reader:
    """Reads items of the toy archive, and notes which."""

    def __init__(self):
        self.read = []

    def __call__(self, item: Patient):
        self.read.append(item.number)
        return read(item)


def damage(items, places):
    return [replace(x, fault="crash") if x.number in places else x for x in items]


def run(out: Path, items, on_fault="stop"):
    """Numbers of the items that are read, and the sentence or the report."""
    reader = Reader()
    try:
        told = prepare(out, items, reader, CARD, splits=SPLITS, workers=1, on_fault=on_fault)
    except UserError as error:
        told = error
    return reader.read, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The set of items that never had a fault."""
    out = tmp_path_factory.mktemp("whole") / "set"
    make(out, ITEMS)
    return contents(out)


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(1, 12), min_size=1))
def test_every_fault_is_told_at_once_and_what_is_mended_alone_is_read_again(whole, places):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        damaged = damage(ITEMS, places)
        assert run(out, damaged)[0] == [item.number for item in ITEMS]
        again, told = run(out, damaged)
        assert again == sorted(places)
        names = str(told).split(": cannot be read")[0].split(", ")
        assert names == [f"study {n}" for n in again]
        assert run(out, ITEMS)[0] == again
        assert contents(out) == whole


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(1, 12), min_size=1))
def test_what_has_a_fault_is_left_out_if_asked_for_and_all_else_is_there(places):
    with tempfile.TemporaryDirectory() as folder:
        out, sound = Path(folder) / "set", [n for n in range(1, 13) if n not in places]
        damaged = damage(ITEMS, places)
        run(out, damaged)
        again, report = run(out, damaged, "skip")
        assert again == sorted(places)  # what was staged before counts for both
        expected = [image for n in sound for image in read(Patient(n)).images]
        if not expected:  # which is an error that names them
            assert all(f"study {n}" in str(report) for n in places)
            return
        assert np.array_equal(imageset.open(out).images, expected)
        assert report.counts["left out: unreadable file"] == len(places)
        assert [told.split(":")[0] for told in report.left_out] == [f"study {n}" for n in again]
        told = str(report).splitlines()[-1].split(": cannot be read")[0]
        assert told.removeprefix(" left out  ").split(", ") == [f"study {n}" for n in again]


def test_of_a_hundred_faults_some_are_told_and_not_all_are_read(tmp_path):
    items = [Patient(n, fault="crash") for n in range(100, 200)] + ITEMS
    numbers, stopped = run(tmp_path / "a", items)
    assert len(numbers) == staging.LISTED + 1
    _, report = run(tmp_path / "b", items, "skip")
    for told in (str(stopped), str(report)):
        *_, names, more = told.splitlines()
        assert names.count("study") == staging.LISTED
        assert more.endswith("and others")


def test_faults_in_workers_are_told_at_once_too(tmp_path):
    with pytest.raises(UserError, match="^study 2, study 5, study 11: cannot be read"):
        make(tmp_path / "set", damage(ITEMS, {2, 5, 11}), workers=2)


def test_a_fault_that_is_gone_without_a_trace_is_read_again(tmp_path, whole):
    """As of a disk that did not answer: the file is the same as before."""
    answers = False

    def network(item):
        if item.number == 3 and not answers:
            raise OSError("stale file handle")
        return read(item)

    with pytest.raises(UserError, match="study 3: cannot be read"):
        prepare(tmp_path / "set", ITEMS, network, CARD, splits=SPLITS, workers=1)
    answers = True
    prepare(tmp_path / "set", ITEMS, network, CARD, splits=SPLITS, workers=1)
    assert contents(tmp_path / "set") == whole


def test_what_a_run_that_was_interrupted_left_out_is_not_left_out_without_being_asked(tmp_path):
    def interrupted(item):
        if item.number == 12:
            raise KeyboardInterrupt
        return read(item)

    damaged, out = damage(ITEMS, {3}), tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        prepare(out, damaged, interrupted, CARD, splits=SPLITS, workers=1, on_fault="skip")
    with pytest.raises(UserError, match="study 3: cannot be read"):
        make(out, damaged)


def test_what_is_wrong_with_more_than_an_item_stops_at_once(tmp_path):
    def of_all(item):
        raise UserError(f"all.npz: is damaged, seen at {item.key}")

    for how in ("stop", "skip"):
        with pytest.raises(UserError, match="seen at study 1$"):
            prepare(tmp_path / how, ITEMS, of_all, CARD, workers=1, on_fault=how)


NAMES = [f"{label}/Jane_Doe_{n:03}.png" for label in ("high", "low") for n in range(70)]
DAMAGE = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:60]),
    "no picture": lambda file: file.write_text("notes"),
    "empty": lambda file: file.write_bytes(b""),
    "colour": lambda file: Image.new("RGB", (8, 8)).save(file),
    "too small": lambda file: Image.new("L", (4, 4)).save(file),
}


@pytest.fixture
def pictures(tmp_path):
    """Three blocks of pictures, of which each kind of damage befell two, the very first too."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    return tmp_path / "in"


def spoil(root: Path) -> list[str]:
    spoilt = NAMES[:2] + NAMES[60:64] + NAMES[128:132]
    for i, name in enumerate(spoilt):
        list(DAMAGE.values())[i % len(DAMAGE)](root / name)
    return spoilt


def folder(root: Path, *options: str) -> int:
    words = ["folder", str(root), str(root.with_name("set")), "--size=8", "--workers=1"]
    return main([*words, *options])


def test_all_damaged_pictures_of_a_run_are_named_at_once(pictures, capsys):
    spoilt = spoil(pictures)
    assert folder(pictures) == 2
    told = capsys.readouterr().err
    assert "10 faults (--on-fault skip leaves it out" in told
    assert set(re.findall(r"/in/(\S+?)[,:] ", told)) == set(spoilt)


def test_damaged_pictures_are_left_out_and_named_to_the_reader_but_not_on_the_card(
    pictures, capsys
):
    spoilt = spoil(pictures)
    assert folder(pictures, "--on-fault=skip") == 0
    told = capsys.readouterr().out
    assert set(re.findall(r"/in/(\S+?)[,:] ", told)) == set(spoilt)
    made = imageset.open(pictures.with_name("set"))
    places = {int(item) - 1 for item in made.table["item"]}
    assert {NAMES[i] for i in places} == set(NAMES) - set(spoilt)
    expected = [np.asarray(Image.open(pictures / NAMES[i])) for i in sorted(places)]
    assert np.array_equal(made.images[:, 0], expected)
    report = made.card["report"]
    assert {name: n for name, n in report.items() if "left out" in name} == {
        "left out: unreadable file": 6,
        "left out: colour among grey images": 2,
        "left out: image smaller than --size": 2,
    }
    assert "Jane" not in "".join(f.read_text() for f in made.path.glob("*.[cj]s*"))


def test_a_sound_folder_gives_the_same_whatever_becomes_of_faults(pictures):
    cards = []
    for how in ("stop", "skip"):
        assert folder(pictures, f"--on-fault={how}", "--overwrite") == 0
        cards.append(contents(pictures.with_name("set")))
    assert cards[0] == cards[1]


def test_only_the_blocks_of_replaced_pictures_are_read_again(pictures, monkeypatch):
    whole = {name: (pictures / name).read_bytes() for name in NAMES}
    (pictures / NAMES[70]).write_bytes(b"")
    assert folder(pictures) == 2
    (pictures / NAMES[70]).write_bytes(whole[NAMES[70]])
    read_block, blocks = files.read_block, []
    monkeypatch.setattr(
        files, "read_block", lambda block, how: blocks.append(block.key) or read_block(block, how)
    )
    assert folder(pictures) == 0
    assert blocks == ["block 1"]
