"""Runs are found by their settings and trusted by their checksum."""

import errno
import json
import os
import time
from multiprocessing.pool import ThreadPool

import pytest

from hallulib import UserError, artifacts


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(artifacts, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "runs"


class Training:
    calls = 0

    def __call__(self, folder, **settings):
        self.calls += 1
        (folder / "checkpoint.safetensors").write_text("state")
        (folder / "unet").mkdir(exist_ok=True)
        (folder / "unet" / "weights").write_text(str(settings))


def test_equal_settings_train_once_and_other_settings_again():
    train = Training()
    first = artifacts.load_or_train("net", train, steps=3, lr=0.1)
    assert artifacts.load_or_train("net", train, lr=0.1, steps=3) == first
    assert train.calls == 1
    assert artifacts.load_or_train("net", train, steps=4, lr=0.1) != first
    assert train.calls == 2


def test_a_finished_run_has_a_card_and_no_checkpoint():
    folder = artifacts.load_or_train("net", Training(), steps=3)
    card = json.loads((folder / "run.json").read_text())
    assert card["settings"] == {"steps": 3}
    assert list(card["sha256"]) == ["unet/weights"]
    assert not (folder / "checkpoint.safetensors").exists()


def test_an_interrupted_run_is_resumed_in_its_folder():
    def interrupted(folder, **settings):
        (folder / "checkpoint.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.load_or_train("net", interrupted, steps=3)
    seen = []
    artifacts.load_or_train(
        "net",
        lambda folder, **s: seen.append((folder / "checkpoint.safetensors").read_text()),
        steps=3,
    )
    assert seen == ["half"]


def test_what_a_run_killed_as_it_wrote_left_is_no_part_of_its_result():
    train = Training()

    def left(folder, **settings):
        train(folder, **settings)
        (folder / "run.json.partial").write_text("{")
        (folder / ".partial").mkdir()
        (folder / ".partial" / ".tmp4j7vaG").write_text("half")

    folder = artifacts.load_or_train("net", left, steps=3)
    assert artifacts.load_or_train("net", left, steps=3) == folder
    assert train.calls == 1
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", "unet"]


def test_a_run_killed_between_its_card_and_its_end_leaves_no_checkpoint():
    seen = []

    def train(folder, **settings):
        seen.append((folder / "checkpoint.safetensors").exists())

    for from_scratch in (False, False, True):
        folder = artifacts.load_or_train("net", train, from_scratch=from_scratch, steps=3)
        assert not (folder / "checkpoint.safetensors").exists()
        (folder / "checkpoint.safetensors").write_text("the last step")
    assert seen == [False, False]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_number_that_cannot_be_written_is_one_sentence(runs, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    ledger = artifacts.Ledger("05_test", seed=1)
    ledger.keep("auc", 0.8, n=40)
    before = (runs / "results" / "05_test" / "auc.json").read_bytes()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"auc\.json: cannot write \({os.strerror(code)}\)"):
        ledger.keep("auc", 0.9, n=40)
    (kept,) = (runs / "results" / "05_test").iterdir()
    assert kept.read_bytes() == before


def test_two_processes_that_need_one_model_train_it_once():
    train = Training()

    def slow(folder, **settings):
        time.sleep(0.3)
        train(folder, **settings)

    with ThreadPool(2) as pool:  # a lock of the file system holds threads apart as processes
        found = pool.map(lambda _: artifacts.load_or_train("net", slow, steps=3), range(2))
    assert found[0] == found[1]
    assert train.calls == 1


def test_from_scratch_trains_again():
    train = Training()
    artifacts.load_or_train("net", train, steps=3)
    artifacts.load_or_train("net", train, from_scratch=True, steps=3)
    assert train.calls == 2


def test_shipped_weights_are_used_where_their_settings_match(runs):
    train = Training()
    shipped = artifacts.ship(artifacts.load_or_train("net", train, steps=3), "net")
    for file in sorted(runs.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert artifacts.load_or_train("net", train, steps=3) == shipped
    assert artifacts.load_or_train("net", train, steps=2) != shipped
    assert train.calls == 2


def test_a_name_cannot_leave_the_folder_of_the_runs(runs):
    folder = artifacts.load_or_train("../../net of/mine", Training(), steps=3)
    assert folder.parent == runs


def test_a_wrong_checksum_is_refused():
    folder = artifacts.load_or_train("net", Training(), steps=3)
    (folder / "unet" / "weights").write_text("tampered")
    with pytest.raises(UserError, match=r"unet/weights is missing or is not the file"):
        artifacts.load_or_train("net", Training(), steps=3)


def test_a_number_keeps_where_it_came_from(runs):
    ledger = artifacts.Ledger("05_test", seed=1, dataset="phantom")
    ledger.keep("auc", 0.8, low=0.7, high=float("nan"), n=40, steps=5)
    result = json.loads((runs / "results" / "05_test" / "auc.json").read_text())
    assert (result["value"], result["low"], result["high"]) == (0.8, 0.7, None)
    assert (result["n"], result["seed"]) == (40, 1)
    assert result["settings"] == {"dataset": "phantom", "steps": 5}
    assert {"hallulib", "torch", "device"} <= set(result["made_with"])
    assert ledger.values() == {"auc": 0.8}
    assert ledger.table().loc["auc", "n"] == 40
