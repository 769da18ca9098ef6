"""Images that a table lists: what spreadsheets write, and one file under several paths."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_folder import prepare, refused, save

from data_prep import tables
from hallulib import UserError
from hallulib.data import imageset

ROWS = [[f"a/{i:02}.png", ["größer, 0;5", "kleiner"][i % 2], f"p{i // 2}"] for i in range(12)]
CELL = st.text("aß,;\t\"'| 1.", min_size=1)
NAMES = ["File", "Befund", "Patient"]


@pytest.fixture
def pictures(tmp_path) -> Path:
    for i in range(12):
        save(tmp_path / "in" / "a" / f"{i:02}.png")
    return tmp_path / "in"


def written(file: Path, rows, separator=",", encoding="utf-8", end="\n", quotes=csv.QUOTE_MINIMAL):
    """A table as spreadsheets write it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quotes).writerows(rows)
    file.write_bytes(text.getvalue().encode(encoding))
    return f"--csv={file}"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_every_spreadsheet_gives_the_same_table(pictures, separator, encoding, end, slash):
    plain = written(pictures.parent / "plain.csv", [NAMES, *ROWS])
    rows = [NAMES, *([name.replace("/", slash), *rest] for name, *rest in ROWS)]
    quotes = csv.QUOTE_ALL if end == "\r\n" else csv.QUOTE_MINIMAL
    other = written(pictures.parent / "other.csv", rows, separator, encoding, end, quotes)
    for out, option in (("plain", plain), ("other", other)):
        assert prepare(pictures, option, "--label=Befund", "--name=set", out=out) == 0
    for name in imageset.FILES:
        one, two = ((pictures.parent / out / name).read_bytes() for out in ("plain", "other"))
        assert one == two
    assert imageset.open(pictures.parent / "other").classes("Befund") == ("größer, 0;5", "kleiner")


@given(
    st.permutations(["file", "label", "größe"]),
    st.sampled_from(",;\t"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.lists(st.tuples(CELL, CELL, CELL), max_size=4),
)
def test_what_a_spreadsheet_wrote_is_read(tmp_path_factory, names, separator, encoding, rows):
    file = tmp_path_factory.mktemp("x") / "x.csv"
    written(file, [names, *rows], separator, encoding)
    read = tables.read_sheet(file, "file")
    assert list(read) == names
    assert read.to_numpy().tolist() == [[cell.strip() for cell in row] for row in rows]


def test_commas_stay_commas_though_a_name_holds_other_marks(pictures):
    rows = [["file", "label", "a;b;c;d"], *(row[:2] for row in ROWS)]
    assert prepare(pictures, written(pictures.parent / "x.csv", rows)) == 0
    report = imageset.open(pictures.parent / "set").card["report"]
    assert report["column 'a;b;c;d' of the CSV left out"] == 1


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "mac_roman", "cp850", "cp1250"])
def test_a_code_page_is_named_not_guessed(pictures, capsys, encoding):
    option = written(pictures.parent / "table.csv", [NAMES, *ROWS], ";", encoding)
    told = refused(capsys, pictures, option, "--label=Befund")
    assert "table.csv: not a readable CSV (line 2 is not UTF-8); Unicode is needed" in told
    assert "save as CSV UTF-8" in told


def test_tables_of_archives_have_the_separator_that_is_known(tmp_path):
    written(tmp_path / "x.csv", [["wsi", "coord"], ["a", "1"]], ";")
    assert tables.read_table(tmp_path / "x.csv", ["wsi"], ";")["wsi"].tolist() == ["a"]
    with pytest.raises(UserError, match="no column 'wsi' among"):
        tables.read_table(tmp_path / "x.csv", ["wsi"])


def test_a_file_may_have_a_backslash_in_its_name(tmp_path):
    for name in ("a\\b.png", "c.png"):
        save(tmp_path / "in" / name)
    rows = [["file", "label"], ["a\\b.png", "x"], ["c.png", "y"]]
    assert prepare(tmp_path / "in", written(tmp_path / "table.csv", rows)) == 0


def linked(make):
    def link(root: Path) -> str:
        make(root / "a" / "00.png", root / "a" / "00.PNG")
        return "a/00.PNG"

    return link


def linked_folder(root: Path) -> str:
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    return "b/00.png"


AGAIN = {
    "the same path": lambda root: "a/00.png",
    "a dot": lambda root: "./a/00.png",
    "a dot inside": lambda root: "a/./00.png",
    "two slashes": lambda root: "a//00.png",
    "a backslash": lambda root: "a\\00.png",
    "spaces": lambda root: " a/00.png ",
    "a symbolic link": linked(lambda old, new: new.symlink_to(old)),
    "one file under two names, as disks have it that fold case": linked(os.link),
    "a link to the folder": linked_folder,
}


@pytest.mark.parametrize("what", AGAIN)
def test_one_file_listed_twice_is_refused_however_it_is_spelt(pictures, capsys, what):
    name = AGAIN[what](pictures)
    rows = [["file", "label", "patient"], ["a/00.png", "0", "p"], ["a/01.png", "0", "q"]]
    option = written(pictures.parent / "table.csv", [*rows, [name, "1", "r"]])
    told = refused(capsys, pictures, option)
    assert "table.csv: line 4 lists " in told
    assert " again, as line 2 does; once is needed" in told


def test_a_file_that_is_listed_under_another_path_is_not_told_as_left_out(pictures):
    os.link(pictures / "a" / "00.png", pictures / "also.png")
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    rows = [["file", "label"], *(["./" + name, label] for name, label, _ in ROWS[:8])]
    assert prepare(pictures, written(pictures.parent / "table.csv", rows)) == 0
    assert (
        imageset.open(pictures.parent / "set").card["report"]["image not in the CSV left out"] == 5
    )
