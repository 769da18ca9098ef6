"""Whatever a file holds, its reader ends soon, with what it says or with one clear sentence."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import damaged_sets
import damaged_tables
import damaged_volumes
import pytest
from faults import ABSENT, ANY, CASE, CUT, EITHER, FORMATS, REFUSED, bounded

from hallulib import UserError

SECONDS = 30  # for one small file, on a busy machine
DAMAGE = damaged_volumes.DAMAGE | damaged_tables.DAMAGE | damaged_sets.DAMAGE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole file of a format, made once: its folder, and where it is in there."""
    made = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / CASE
            folder.mkdir()
            made[name] = folder, FORMATS[name].make(folder).relative_to(folder)
        return made[name]

    return make


def outcome(path: Path, read) -> str:
    """The sentence of a reader, "" if it can read the file; anything else raises."""
    start = time.monotonic()
    try:
        with bounded():
            read(path)
    except UserError as error:
        told = str(error)
        assert told.strip()
    else:
        told = ""
    assert time.monotonic() - start < SECONDS
    assert "\n" not in told
    assert "MemoryError" not in told  # refused before it was tried
    return told


def befall(whole, tmp_path, name, spoil, expected) -> None:
    """Spoils a copy of a whole file and checks what its reader makes of it."""
    folder, inside = whole(name)
    shutil.copytree(folder, tmp_path / CASE)
    path = tmp_path / CASE / inside
    spoil(path)
    told = outcome(path, FORMATS[name].read)
    if expected != EITHER:
        assert bool(told) == (expected == REFUSED), told
    assert not told or str(tmp_path / CASE) in told or path.stem in told


@pytest.mark.parametrize("what", ANY)
@pytest.mark.parametrize("name", FORMATS)
def test_what_may_befall_any_file(whole, tmp_path, name, what):
    spoil, expected = ANY[what]
    if expected in (CUT, ABSENT):
        sure = FORMATS[name].cut if expected == CUT else FORMATS[name].alone
        expected = REFUSED if sure else EITHER
    befall(whole, tmp_path, name, spoil, expected)


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name, found in DAMAGE.items() for what in found]
)
def test_what_may_be_wrong_in_one_format(whole, tmp_path, monkeypatch, name, what):
    monkeypatch.chdir(tmp_path)
    befall(whole, tmp_path, name, *DAMAGE[name][what])
    assert os.listdir(tmp_path) == [CASE]  # nothing was run or unpacked


def test_there_are_two_hundred_faults_and_more():
    assert len(FORMATS) * len(ANY) + sum(map(len, DAMAGE.values())) >= 500


COMMANDS = {
    "npz": ("labels that unpack to gigabytes", ["npz", "x.npz", "set"]),
    "picture": ("PostScript", ["folder", "in", "set"]),
    "csv": ("a path above", ["folder", "in", "set", "--csv", "table.csv"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_a_sentence_and_leaves_nothing(whole, tmp_path, name):
    folder, inside = whole(name)
    shutil.copytree(folder, tmp_path / CASE)
    what, words = COMMANDS[name]
    DAMAGE[name][what][0](tmp_path / CASE / inside)
    before = sorted(os.listdir(tmp_path / CASE))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *words, "--size=8", "--workers=1"],
        cwd=tmp_path / CASE,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len([x for x in done.stderr.splitlines() if x and "item" not in x]) == 1
    assert sorted(os.listdir(tmp_path / CASE)) == before
