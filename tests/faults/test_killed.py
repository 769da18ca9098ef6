"""Works that are killed, or find a full or read-only disk, go on to the same bytes.

The four works are those of `toy_runs`: pretraining, joint training, cells of a grid, and the
preparation of an archive. Each is killed twenty times: by turns before an operation on its folder,
before one with half of the file written, and at a random time. Whole grids, with their
workers and kernels, are killed in test_grid.py.
"""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import toy_archive
from killing import Server
from safetensors import safe_open
from toy_greys import GREY, moved

from hallulib import ScoreClassifier
from hallulib.data import imageset

WORKS = ["pretraining", "joint_training", "cells", "archive"]
KILLS = 20
PLACES = "set", "set.partial/replaced"  # of a set that is being replaced


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Work -> what a life without interruption leaves, how long it took and its operations."""
    found = {}
    for work in WORKS:
        folder = begin(work, tmp_path_factory.mktemp("whole"))
        told = server.live(work, folder)
        assert told["error"] is None
        found[work] = contents(folder), told["seconds"], told["operations"]
    return found


def begin(work, home):
    """A folder to work in; an archive takes the place of a set that was there before."""
    folder = home / work
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if work == "archive":
        toy_archive.make(folder / "set", [toy_archive.Patient(1)])
    return folder


def contents(folder):
    """The text of JSON but for the seconds that the work took, the bytes of every other file."""
    found = {}
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".json":
            found[name] = re.sub(r'"seconds": [\d.]+', '"seconds": 0', file.read_text())
        else:
            found[name] = file.read_bytes() if file.is_file() else None
    return found


def check(folder):
    """What a reader would read is whole; a run that is there is all there; no set is lost."""
    for file in folder.rglob("*"):
        if ".partial" in str(file.relative_to(folder)):
            continue
        if file.suffix == ".json":
            card = json.loads(file.read_text())
            assert all((file.parent / name).is_file() for name in card.get("sha256", ()))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert all(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
        elif file.suffix == ".csv":
            lines = file.read_text().splitlines(keepends=True)
            assert len({line.count(",") for line in lines}) == 1
            assert lines[-1].endswith("\n")
    if folder.name == "archive":
        assert len(imageset.open(next(folder / f for f in PLACES if (folder / f).exists())))


def left(folder):
    return [file for file in folder.rglob("*") if ".partial" in str(file.relative_to(folder))]


@pytest.mark.release
@pytest.mark.parametrize("work", WORKS)
def test_a_work_killed_twenty_times_ends_with_the_same_bytes(server, whole, tmp_path, work):
    expected, seconds, operations = whole[work]
    rng, folder = np.random.default_rng(WORKS.index(work)), begin(work, tmp_path)
    deaths = [{"dies_at": int(rng.integers(1, operations // 2))} for _ in range(KILLS)]
    deaths[1::3] = [death | {"half": True} for death in deaths[1::3]]
    deaths[2::3] = [{"after": rng.uniform(0, seconds)} for _ in deaths[2::3]]
    while deaths:
        told = server.live(work, folder, **deaths[-1])
        check(folder)
        if told["killed"]:
            deaths.pop()
            continue
        assert told["error"] is None  # it ended before it was to die, and begins anew
        assert contents(folder) == expected
        begin(work, tmp_path)
        if "after" in deaths[-1]:
            deaths[-1]["after"] /= 2
    assert server.live(work, folder)["error"] is None
    assert contents(folder) == expected


@pytest.mark.parametrize("work", WORKS)
def test_a_full_disk_is_one_sentence_and_with_space_again_the_work_goes_on(
    server, whole, tmp_path, work
):
    """Full from one operation on, each time from a later one."""
    expected, _, operations = whole[work]
    folder, told = begin(work, tmp_path), []
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        start = 1 + round(part * operations)
        told.append(server.live(work, folder, fails_from=start, code=errno.ENOSPC)["error"])
        check(folder)
        assert left(folder) == []
    refused(told[0], folder, errno.ENOSPC)  # those that begin where it stopped may get to the end
    for sentence in filter(None, told):
        refused(sentence, folder, errno.ENOSPC)
    assert server.live(work, folder)["error"] is None
    assert contents(folder) == expected


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_is_read_only_is_one_sentence_and_stays_as_it_is(
    server, whole, tmp_path, work, code
):
    folder = begin(work, tmp_path)
    before = contents(folder)
    refused(server.live(work, folder, fails_from=1, code=code)["error"], folder, code)
    assert contents(folder) == before


@pytest.mark.parametrize("work", WORKS)
def test_a_file_for_which_there_is_no_space_is_told_whoever_writes_it(
    server, whole, tmp_path, work
):
    """By a limit of the system itself, which also holds for what Python does not write."""
    folder, sizes = begin(work, tmp_path), sorted(len(v) for v in whole[work][0].values() if v)
    for limit in (sizes[0] // 2, sizes[-1] // 2):
        told = server.live(work, folder, limit=limit)
        refused(told["error"], folder, errno.EFBIG)
        check(folder)
        assert left(folder) == []


def refused(told, folder, code):
    assert told.startswith(str(folder))
    assert ": cannot write (" in told
    assert os.strerror(code) in told
    assert "; a writable folder with enough space is needed" in told
    assert "\n" not in told


@pytest.mark.parametrize("work", WORKS)
def test_seed_and_versions_stand_in_what_a_work_leaves(whole, work):
    ends = {"archive": "set/card.json", "cells": ".json"}
    cards = [
        json.loads(text)
        for name, text in whole[work][0].items()
        if name.endswith(ends.get(work, "run.json"))
    ]
    assert cards
    for card in cards:
        if work == "archive":
            assert {"python", "numpy", "hallulib"} <= set(card["processing"]["versions"])
        else:
            told = {"hallulib", "torch", "diffusers", "python", "device"}
            assert told <= set(card["made_with"])
            settings = card.get("settings") or card["parameters"]
            assert settings.get("seed", settings.get("SEED")) == 0


LIVES = {
    "killed": {"half": True, "dies_at": 1},
    "no space": {"code": errno.ENOSPC, "fails_from": 1},
}


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.release), "no space"])
def test_an_estimator_that_stops_at_any_write_is_the_old_or_the_new_one(server, tmp_path, how):
    """Every operation of a save over another one is once the one at which it ends."""
    old, new = (weights(moved(GREY, random_state=seed)) for seed in (0, 1))
    moved(GREY).save(tmp_path / "old")
    folder, (*fixed, (at, count)) = tmp_path / "one", LIVES[how].items()
    found = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        told = server.live("estimator", folder, **dict(fixed) | {at: count})
        found.append(weights(ScoreClassifier.load(folder)))
        assert found[-1] in (old, new)
        if not told["killed"] and told["error"] is None:
            break
        if not told["killed"]:
            refused(told["error"], folder, errno.ENOSPC)
            assert found[-1] == old
        count += 1
    assert found[-1] == new
    assert found.count(old) > 10


def weights(estimator):
    """All numbers of its network."""
    held = estimator.model_.state_dict().values()
    return torch.cat([v.flatten() for v in held]).numpy().tobytes()
