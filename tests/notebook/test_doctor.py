"""The doctor names what is wrong, each in one sentence."""

import shutil
from importlib.metadata import version

import nbformat
import pytest

from conftest import ROOT
from hallulib import __main__ as cli
from hallulib.notebook import doctor
from hallulib.storage import store


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A lock of three packages, shipped weights and a folder of runs that may be spoilt."""
    shutil.copytree(store.SHIPPED / "score-lesions", tmp_path / "weights" / "score-lesions")
    torch = version("torch").split("+")[0]
    pins = (f"torch=={torch}", "pywin32==1 ; sys_platform == 'win32'")
    (tmp_path / "lock").write_text("".join(f"{pin} \\\n    --hash=sha256:0\n" for pin in pins))
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "weights")
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    return tmp_path


def test_the_lock_of_the_project_is_read_whole():
    found = doctor.pins(ROOT / "requirements.lock")
    assert len(found) > 100
    assert found["accelerate"] == "1.15.0"
    assert all(version[:1].isdigit() for version in found.values())


def test_a_sound_installation_has_no_fault(capsys):
    assert list(doctor.faults()) == []
    assert cli.main(["doctor"]) == 0
    assert "no fault found" in capsys.readouterr().out


def test_every_fault_is_told_in_one_sentence_and_the_status_is_1(places, capsys):
    text = (places / "lock").read_text().replace("torch==", "torch==0.")
    (places / "lock").write_text(text + "no-such-package==3 \\\n")
    (places / "weights" / "score-lesions" / "classes.safetensors").write_bytes(b"damaged")
    (places / "weights" / "empty").mkdir()
    (places / "runs").write_text("a file where a folder should be")
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "5 faults found" in told
    for sentence in (
        "the package torch is",
        "the package no-such-package is missing; 3 is pinned in lock",
        "classes.safetensors is missing or is not the file that the run wrote",
        "run.json is not the card of a run (FileNotFoundError)",
        "runs: cannot write (File exists); a writable folder",
    ):
        (line,) = (line for line in told.splitlines() if sentence in line)
        assert line.startswith("  ")


def test_a_lock_that_is_not_there_is_one_sentence(places, capsys):
    (places / "lock").unlink()
    assert cli.main(["doctor"]) == 2
    assert "cannot read the pinned versions in" in capsys.readouterr().err


def test_what_chapters_took_is_told_and_what_was_not_made_is_said(places, monkeypatch, capsys):
    """The build wrote it into the executed chapter."""
    monkeypatch.setattr(doctor.parameters, "ROOT", places)
    for name in ("01_one", "02_two"):
        made = nbformat.v4.new_notebook(metadata={"seconds": 200} if name == "01_one" else {})
        for folder in ("book", "_build/book")[: 1 + (name == "01_one")]:
            (places / folder).mkdir(parents=True, exist_ok=True)
            nbformat.write(made, places / folder / f"{name}.ipynb")
    assert list(doctor.costs()) == [("01_one", 200), ("02_two", None)]
    doctor.report()
    told = capsys.readouterr().out
    assert "01_one                        0:03:20" in told
    assert "02_two                   not made yet" in told
