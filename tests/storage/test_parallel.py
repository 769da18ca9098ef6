"""Two processes train what one trains at the same batch, and write it once."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import toy_processes
from safetensors.torch import load_file

from conftest import ROOT
from hallulib import __main__ as cli
from hallulib.data import imageset
from hallulib.diffusion import train
from hallulib.oneshot.experiment import PART, PERMUTED, TABLE
from hallulib.storage import parallel, store
from hallulib.storage.checkpoint import CHECKPOINT, LOG, within

# the name of the option is that of the launcher: without a GPU it starts processes on the CPU
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH += ["--main_process_port=0"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes; one was killed, and both were launched again."""
    home = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    env = os.environ | {"HALLULIB_RUNS": str(home / "runs"), "PYTHONPATH": paths}
    told = dict(env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    command = [sys.executable, *LAUNCH, toy_processes.__file__, str(home)]
    killed = subprocess.run(command, **told)
    assert killed.returncode != 0
    assert "(exitcode: -9) local_rank: 1" in killed.stderr
    assert sorted(file.name for file in home.iterdir()) == [CHECKPOINT, LOG]
    done = subprocess.run(command, **told)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single process finds, and its runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALLULIB_RUNS", str(tmp_path_factory.mktemp("one")))
        names = ("score", "latents", "joint")
        yield {name: getattr(toy_processes, name)() for name in names}, store.runs_folder()


@pytest.mark.release
def test_all_processes_end_with_the_same_weights_to_the_last_bit(two):
    first, second = (load_file(two / f"rank{rank}") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


@pytest.mark.release
def test_losses_and_weights_are_those_of_one_process_with_the_whole_batch(two, one):
    """Of a training that was killed and went on."""
    shared, whole = within("score", load_file(two / "rank0")), one[0]["score"]
    torch.testing.assert_close(shared["losses"], whole["losses"], rtol=1e-4, atol=1e-6)
    for key, value in within("model", whole).items():
        torch.testing.assert_close(shared[f"model.{key}"], value, rtol=1e-3, atol=1e-4)


@pytest.mark.release
def test_an_autoencoder_learns_as_in_one_process(two, one):
    shared, whole = within("latents", load_file(two / "rank0")), one[0]["latents"]
    torch.testing.assert_close(shared["losses"], whole["losses"], rtol=1e-4, atol=1e-6)
    # not the weights: Adam makes steps of rounding where a norm takes a bias away
    torch.testing.assert_close(shared["again"], whole["again"], rtol=0, atol=1e-3)


@pytest.mark.release
def test_joint_training_has_the_losses_and_episodes_of_one_process(two, one):
    shared, whole = within("joint", load_file(two / "rank0")), one[0]["joint"]
    names = [load_csv(runs, TABLE)[0] for runs in (two / "runs", one[1])]
    assert names[0] == names[1]
    # what the generator makes, and queries of one class under permuted labels, which score nearly
    # alike, differ by rounding, and an AUROC moves by steps
    rounded = ("+1", "+1 at test only", PERMUTED)
    plain = [i for i, name in enumerate(names[0]) if name not in rounded]
    assert torch.equal(shared["auroc"][:, plain], whole["auroc"][:, plain])
    assert (shared["auroc"] - whole["auroc"]).abs().mean() < 0.01
    curves = [
        torch.tensor([[float(v) for v in row] for row in load_csv(runs, LOG)[1:]])
        for runs in (two / "runs", one[1])
    ]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-6)


def load_csv(runs, name):
    (path,) = runs.glob(f"one-shot-*/{name}")
    with path.open() as file:
        return list(csv.reader(file))


@pytest.mark.release
def test_a_run_is_written_once_and_nothing_is_left_over(two):
    (folder,) = (two / "runs").glob("one-shot-*[!k]")
    assert (folder / store.CARD).exists()
    assert not [*folder.glob(f"*{PART}"), *(two / "runs").rglob("*.partial")]
    assert not (folder / CHECKPOINT).exists()


@pytest.mark.release
def test_what_cannot_be_shared_is_done_by_one_process_alone(two):
    (file,) = (two / "runs").glob("by-one-*/trained")
    assert file.read_text() == "1 "


def test_a_batch_smaller_than_the_number_of_processes_is_taken_whole(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 4)
    monkeypatch.setattr(parallel, "rank", lambda: 2)
    assert parallel.share(3) == (slice(None), 0.25)
    mine, counts = parallel.share(6)
    assert (list(range(6))[mine], counts) == ([2], 1 / 6)


# --- the command line -------------------------------------------------------------------------


def test_a_model_trained_by_the_command_line_is_found_by_its_settings(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    sizes = "--size 16 --steps 2 --batch-size 4 --width 8"
    assert cli.main(["train", "phantom", *sizes.split()]) == 0
    (card,) = tmp_path.glob(f"*/{store.CARD}")
    assert str(card.parent) in capsys.readouterr().out
    before = card.stat().st_mtime_ns
    images = imageset.open("phantom", 16)
    asked = dict(scheme=images.schemes[0], steps=2, batch_size=4, width=8)
    assert train.pretrained(images, **asked)[1] == card.parent
    assert card.stat().st_mtime_ns == before
    assert json.loads(card.read_text())["settings"]["steps"] == 2


def test_the_command_line_tells_a_wrong_data_set_in_one_sentence(capsys):
    assert cli.main(["train", "nowhere"]) == 2
    told = capsys.readouterr().err.strip()
    assert "nowhere" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--steps 0", "steps is 0; at least 1"),
        ("--batch-size -1", "batch_size is -1; at least 1"),
        ("--width 7", "width is 7; a multiple of 8"),
    ],
)
def test_impossible_numbers_are_refused_and_no_run_is_kept(
    tmp_path, monkeypatch, capsys, option, sentence
):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    sizes = f"--size 16 --steps 1 --batch-size 4 --width 8 {option}"
    assert cli.main(["train", "phantom", *sizes.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob(f"*/{store.CARD}"))


def test_ctrl_c_is_told_in_a_sentence(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "pretrained", interrupted)
    assert cli.main(["train", "phantom", "--size", "16"]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_an_unknown_scheme_is_refused(capsys):
    assert cli.main(["train", "phantom", "--size", "16", "--scheme", "gs2"]) == 2
    assert "gs2" in capsys.readouterr().err
