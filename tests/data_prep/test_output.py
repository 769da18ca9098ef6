"""The place of an image set: for one run at a time, and what others put there stays."""

import os

import pytest
from test_writer import contents, start, wait_for
from toy_archive import CARD, SPLITS, Patient, make, read

from data_prep import output
from data_prep.writer import prepare
from hallulib import UserError
from hallulib.data import imageset

ITEMS = [Patient(n) for n in range(1, 6)]
# names like ours, and those that file managers and network disks leave
FOREIGN = ["thesis.txt", "mine.npz", "draft.tmp", ".DS_Store", "lock.txt", "a" * 32 + ".npy"]


def test_of_two_runs_for_one_set_the_second_is_told_and_the_first_is_not_disturbed(tmp_path):
    told = []

    def second(item):
        with pytest.raises(UserError) as error:
            make(tmp_path / "set", ITEMS, overwrite=True)
        told.append(str(error.value))
        return read(item)

    prepare(tmp_path / "set", ITEMS, second, CARD, splits=SPLITS, workers=1)
    sentence = f"{tmp_path / 'set'}: another run is making it; wait for its end or name another"
    assert told == [f"{sentence} output"] * len(ITEMS)
    make(tmp_path / "whole", ITEMS)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["set", "whole"]


def test_a_killed_run_does_not_block_the_next(tmp_path):
    out = tmp_path / "set"
    other = start(out, workers=1)
    wait_for(lambda: list(tmp_path.glob("set.partial/*.npz")))
    with pytest.raises(UserError, match="another run is making it"):
        make(out, ITEMS)
    other.kill()
    other.communicate()
    assert (tmp_path / "set.partial" / output.LOCK).exists()
    make(out, ITEMS)
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_a_file_of_others_is_not_worked_in(tmp_path, name):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / name).write_text("years of work")
    with pytest.raises(UserError, match="set.partial holds files of others"):
        make(tmp_path / "set", ITEMS)
    assert [path.name for path in tmp_path.rglob("*")] == ["set.partial", name]


@pytest.mark.parametrize("name", ["set", "replaced", "other"])
def test_a_folder_with_a_folder_of_others_is_not_worked_in(tmp_path, name):
    (tmp_path / "set.partial" / name).mkdir(parents=True)
    (tmp_path / "set.partial" / name / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="set.partial holds files of others"):
        make(tmp_path / "set", ITEMS)
    assert (tmp_path / "set.partial" / name / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("fault", [False, True])
def test_what_others_put_there_meanwhile_stays_and_is_told(tmp_path, name, fault):
    work = tmp_path / "set.partial"

    def meanwhile(item):
        (work / name).write_text("years of work")
        return read(item)

    items = [*ITEMS, Patient(9, fault="crash")] if fault else ITEMS
    told = ""
    try:
        told = str(prepare(tmp_path / "set", items, meanwhile, CARD, splits=SPLITS, workers=1))
    except UserError:
        assert fault
    assert (work / name).read_text() == "years of work"
    if not fault:
        assert os.listdir(work) == [name]
        assert f"warning  {work} stays: it holds files of others" in told
        assert "stays" not in str(imageset.open(tmp_path / "set").card)
