import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_archive
from killing import in_session
from toy_archive import CARD, SLOW, SPLITS, Patient, make, read

from data_prep import plan, staging, writer
from data_prep.__main__ import main, parser
from data_prep.writer import prepare
from hallulib import UserError
from hallulib.data import imageset


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_written_is_an_image_set_in_the_order_of_the_items(tmp_path):
    report = make(tmp_path / "set")
    opened = imageset.open(tmp_path / "set")
    expected = [image for n in range(24) for image in read(Patient(n)).images]
    assert np.array_equal(opened.images, expected)
    assert (report.images, report.patients) == (36, 18)
    assert report.counts == opened.card["report"] == {"study without image": 6}
    assert sum(sum(classes.values()) for classes in report.splits.values()) == 36
    assert list(opened.table.columns) == ["patient", "split", "grade", "slice"]
    assert os.listdir(tmp_path) == ["set"]
    assert "6  study without image" in str(report)


def test_one_process_or_two_write_the_same_bytes(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_splits_can_be_given_by_patient(tmp_path):
    by_patient = {f"p{n:03d}": "train" if n < 12 else "test" for n in range(24)}
    make(tmp_path / "set", splits=by_patient)
    table = imageset.open(tmp_path / "set").table
    assert (table["patient"].map(by_patient) == table["split"]).all()
    with pytest.raises(UserError, match="patient p001 has no split"):
        make(tmp_path / "other", splits={})


def test_exact_copies_are_counted_across_splits(tmp_path):
    prints = ["a", "b", "a", "c", "b", "b"]
    odd = writer._copies(prints, ["train", "train", "test", "val", "train", "val"])
    assert odd["image that is an exact copy of another"] == 3
    assert odd["image with an exact copy in another split"] == 2


def test_copies_under_another_label_are_counted_and_on_the_card(tmp_path):
    def read_copies(item):
        study = read(item)
        for row in study.rows:
            row["grade"] = "high" if (item.number, row["slice"]) == (2, 1) else "low"
        study.images[:] = [np.full((1, 8, 8), item.number, np.uint8)] * len(study.images)
        return study

    items = [Patient(n) for n in (1, 2, 3, 5)]
    report = prepare(tmp_path / "set", items, read_copies, CARD, splits=SPLITS, workers=1)
    card = imageset.open(tmp_path / "set").card
    assert card["report"]["image with an exact copy under another label"] == 2
    assert "2 images have an exact copy with another label" in card["warnings"]
    assert "warning  2 images have an exact copy" in str(report)


@pytest.mark.parametrize("missing", [set(), {"val"}, {"test"}, {"val", "test"}])
def test_a_set_without_val_or_test_says_so(tmp_path, missing):
    kept = [s for s in ("train", "val", "test") if s not in missing]
    by_patient = {f"p{n:03d}": kept[n % len(kept)] for n in range(24)}
    report = make(tmp_path / "set", splits=by_patient)
    told = [warning for warning in report.warnings if "no image is in" in warning]
    assert told == imageset.open(tmp_path / "set").card["warnings"]
    assert {split for split in ("train", "val", "test") if split in str(told)} == missing


def start(out: Path, workers: int) -> subprocess.Popen:
    """As a shell starts it in the background: it ignores Ctrl-C."""
    command = [sys.executable, toy_archive.__file__, str(out), str(workers)]
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    deaf = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    return subprocess.Popen(deaf, stderr=subprocess.PIPE, start_new_session=True, env=environment)


def wait_for(condition, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the process did not get there"
        time.sleep(0.005)


def test_workers_die_with_a_killed_run_and_another_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    make(tmp_path / "whole", SLOW)
    out, rng = tmp_path / "a" / "set", np.random.default_rng(0)
    staged = out.with_name("set.partial")
    count = rng.integers(1, 36)
    run = start(out, workers=2)
    wait_for(lambda: len(list(staged.glob("*.npz"))) >= count)
    run.kill()
    run.communicate()
    wait_for(lambda: not in_session(run.pid), 20)
    assert staged.is_dir()
    assert not out.exists()
    before = {f.name: f.stat().st_mtime_ns for f in staged.glob("*.npz")}
    next(staged.glob("*.npz")).write_bytes(b"half")  # as after a power failure
    make(out, SLOW)
    assert len(before) > 1
    assert contents(out) == contents(tmp_path / "whole")
    assert os.listdir(tmp_path / "a") == ["set"]


@pytest.mark.parametrize("reach", [os.kill, os.killpg])  # it alone, or its workers too
def test_what_runs_in_the_background_ends_in_order_when_it_is_told_to(tmp_path, reach):
    (tmp_path / "a").mkdir()
    make(tmp_path / "whole", SLOW)
    out = tmp_path / "a" / "set"
    staged = out.with_name("set.partial")
    run = start(out, workers=2)
    wait_for(lambda: len(list(staged.glob("*.npz"))) >= 3)
    run.send_signal(signal.SIGINT)
    reach(run.pid, signal.SIGTERM)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 143
    assert told.decode().splitlines()[-1] == "interrupted; run the same command again to go on"
    wait_for(lambda: not in_session(run.pid), 20)
    assert {file.suffix for file in staged.iterdir()} == {".npz"}
    assert not out.exists()
    make(out, SLOW)
    assert contents(out) == contents(tmp_path / "whole")
    assert os.listdir(tmp_path / "a") == ["set"]


def test_an_interrupted_run_keeps_what_it_read(tmp_path, monkeypatch):
    items = [Patient(n) for n in range(8)]

    def interrupted(item):
        if item.number == 5:
            raise KeyboardInterrupt
        return read(item)

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "set", items, interrupted, CARD, splits=SPLITS, workers=1)
    assert len(list((tmp_path / "set.partial").glob("*.npz"))) == 5

    def fresh(item):
        assert item.number >= 5, "was staged already"
        return read(item)

    prepare(tmp_path / "set", items, fresh, CARD, splits=SPLITS, workers=1)
    make(tmp_path / "whole", items)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_other_settings_do_not_take_over_staged_studies(tmp_path):
    other = CARD | {"processing": {"steps": ["others"], "versions": {}}}
    names = []
    for card in (CARD, other):
        (tmp_path / "staged").mkdir(exist_ok=True)
        complete = writer._complete(card)
        names += staging.stage([Patient(1), Patient(2, 9)], read, complete, tmp_path / "staged", 1)
    names += staging.stage([Patient(1, 9)], read, complete, tmp_path / "staged", 1)
    assert len(set(names)) == 5


FAULTS = {
    "crash": (Patient(1, fault="crash"), r"study 1: cannot be read \(ValueError: odd header with"),
    "identifier": (Patient(1, fault="identifier"), "study 1: field 'patient_name' is not on the"),
    "label": (Patient(1, fault="label"), "study 1: grade is 'worse'; known labels are low, high"),
    "float": (Patient(1, fault="float"), "study 1: image is float64"),
    "size": (Patient(1, size=9), r"study 1 has .* \(1, 9, 9\) but study 2 of \(1, 8, 8\)"),
    "channels": (Patient(1, channels=3), r"study 1 has .* \(3, 8, 8\) but study 2 of \(1, 8, 8\)"),
    "twice": (Patient(2), "study 2 is listed twice"),
}


@pytest.mark.parametrize(
    ("fault", "workers"), [*((fault, 1) for fault in FAULTS), ("crash", 2), ("label", 2)]
)
def test_a_bad_study_is_one_sentence_and_leaves_only_what_was_read_whole(tmp_path, fault, workers):
    item, told = FAULTS[fault]
    with pytest.raises(UserError, match=told) as error:
        make(tmp_path / "new" / "set", [item, Patient(2), Patient(3)], workers=workers)
    assert "\n" not in str(error.value)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parent.name == "set.partial" and path.suffix == ".npz" for path in kept)
    assert bool(kept) == bool(os.listdir(tmp_path))  # no folder without a file


def test_a_patient_in_two_splits_is_refused(tmp_path):
    def leaking(item):
        study = read(item)
        for row, split in zip(study.rows, ("train", "test", "val"), strict=False):
            row["split"] = split
        return study

    with pytest.raises(UserError, match="set/table.csv: patient p002 is in train and test"):
        prepare(tmp_path / "set", [Patient(2)], leaking, CARD, workers=1)
    assert not (tmp_path / "set").exists()


def test_a_killed_worker_is_told_and_the_rest_is_kept(tmp_path):
    items = [Patient(n) for n in range(1, 4)] + [Patient(9, fault="die")]
    with pytest.raises(UserError, match="a worker was killed, most likely for lack of memory"):
        make(tmp_path / "set", items, workers=2)
    assert (tmp_path / "set.partial").is_dir()


@pytest.mark.parametrize(
    ("items", "told"),
    [([], "nothing to prepare"), ([Patient(0), Patient(4)], "study 0: no image")],
)
def test_an_empty_archive_is_told(tmp_path, items, told):
    with pytest.raises(UserError, match=told):
        make(tmp_path / "set", items)
    assert not (tmp_path / "set").exists()


def test_a_set_that_is_being_replaced_is_not_lost_when_the_run_is_killed(tmp_path):
    """As it lies between the two renames: the next run cannot read its archive, or can."""
    make(tmp_path / "set")
    before = contents(tmp_path / "set")
    staging = tmp_path / "set.partial"
    staging.mkdir()
    (tmp_path / "set").rename(staging / "replaced")
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path / "set", [Patient(1, fault="crash")], overwrite=True)
    assert contents(tmp_path / "set") == before
    staging.mkdir()
    (tmp_path / "set").rename(staging / "replaced")
    make(tmp_path / "set", [Patient(1)], overwrite=True)
    assert len(imageset.open(tmp_path / "set")) == 1
    assert os.listdir(tmp_path) == ["set"]


def test_a_set_can_be_replaced_after_a_run_that_was_killed_as_it_ended(tmp_path):
    make(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "set.partial" / "replaced")
    make(tmp_path / "set", [Patient(1)], overwrite=True)
    assert len(imageset.open(tmp_path / "set")) == 1
    assert os.listdir(tmp_path) == ["set"]


def test_a_set_comes_back_when_another_cannot_take_its_place(tmp_path, monkeypatch):
    make(tmp_path / "set")
    before, replace = contents(tmp_path / "set"), os.replace

    def refuse(source, target):
        if Path(source).name == "set" and Path(target).name == "set":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "set", [Patient(1)], overwrite=True)
    assert contents(tmp_path / "set") == before
    assert os.listdir(tmp_path) == ["set"]


def test_an_existing_set_is_kept_unless_told_otherwise(tmp_path):
    make(tmp_path / "set")
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="set exists already; name another output or pass --over"):
        make(tmp_path / "set", [Patient(1)])
    with pytest.raises(UserError, match="cannot be read"):
        make(tmp_path / "set", [Patient(1, fault="crash")], overwrite=True)
    assert contents(tmp_path / "set") == before
    make(tmp_path / "set", [Patient(1)], overwrite=True)
    assert len(imageset.open(tmp_path / "set")) == 1
    assert os.listdir(tmp_path) == ["set"]


def test_folders_of_others_are_never_removed(tmp_path):
    for folder in ("set", "new.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="set is not an image set, so it is not replaced"):
        make(tmp_path / "set", overwrite=True)
    with pytest.raises(UserError, match="new.partial holds files of others"):
        make(tmp_path / "new")
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["mkdir", "replace", "fsync"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, code, where):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir")}.get(where, (os, where)), refuse)
    with pytest.raises(UserError, match=rf"cannot write \({os.strerror(code)}\); a writable"):
        make(tmp_path / "set", [Patient(1)])
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/set: cannot write"):
        make(tmp_path / "file" / "set")


def test_workers_below_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="workers is 0; at least 1"):
        make(tmp_path / "set", workers=0)
    assert os.listdir(tmp_path) == []


def test_the_card_tells_versions_counts_and_sums(tmp_path):
    make(tmp_path / "set", [Patient(1), Patient(2)])
    card = json.loads((tmp_path / "set" / "card.json").read_text())
    assert set(card) >= {*CARD, "counts", "report", "sha256"}
    assert set(card["processing"]["versions"]) >= {"python", "numpy", "hallulib"}


ARCHIVES = "folder npz medmnist medimeta nct_crc pannuke patch_camelyon breakhis join".split()


@pytest.mark.parametrize("archive", ARCHIVES)
def test_help_tells_what_an_archive_needs(archive, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([archive, "--help"])
    told = capsys.readouterr().out
    assert "python -m data_prep" in told
    assert "OUT" in told


@pytest.mark.parametrize("archive", ARCHIVES)
def test_the_examples_of_the_help_are_commands_that_it_takes(archive, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([archive, "--help"])
    told = capsys.readouterr().out.replace("\\\n", " ")
    examples = [line for line in told.splitlines() if line.startswith("  python -m data_prep")]
    assert examples
    for line in examples:
        assert parser(archive).parse_args(shlex.split(line)[3:]).archive == archive


@pytest.mark.parametrize("archive", ARCHIVES)
@pytest.mark.parametrize("size", ["0", "-1", "1.5"])
def test_an_impossible_size_is_told_before_anything_is_read(archive, size, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([archive, str(tmp_path / "none"), str(tmp_path / "set"), f"--size={size}"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"--size: '{size}' is not a whole number of pixels above 0" in told


@pytest.mark.parametrize("out", ["", ".", "./", "/", "..", "sets/..", "~nobody_at_all/set"])
def test_an_output_that_is_no_new_folder_is_told(out, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["npz", str(tmp_path / "none.npz"), out])
    assert f"argument OUT: {out!r}" in capsys.readouterr().err.splitlines()[-1]


def test_an_output_in_the_home_folder_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan.output("~/sets/mine") == tmp_path / "sets" / "mine"


def test_help_lists_the_archives_and_a_wrong_name_exits_with_2(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "medmnist" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])


def test_an_interrupt_is_one_sentence_and_130(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.archives.folder.run", interrupt)
    assert main(["folder", "in", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
