"""The doctor names what is wrong, each in one sentence, and counts what chapters will do."""

import shutil
from importlib.metadata import version

import pytest

from conftest import ROOT, size_for_tests
from hallulib import artifacts, doctor, notebooks, workload
from hallulib.workload import Work

BOOK = ROOT / "book"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A lock of three packages, shipped weights and a folder of runs that may be spoilt."""
    shutil.copytree(artifacts.SHIPPED / "score-phantom", tmp_path / "weights" / "score-phantom")
    torch = version("torch").split("+")[0]
    pins = (f"torch=={torch}", "pywin32==1 ; sys_platform == 'win32'")
    (tmp_path / "lock").write_text("".join(f"{pin} \\\n    --hash=sha256:0\n" for pin in pins))
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(artifacts, "SHIPPED", tmp_path / "weights")
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Nothing is timed: an image takes a millisecond in every network."""
    monkeypatch.setattr(workload, "per_image", lambda *_: 1e-3)


def test_the_lock_of_the_project_is_read_whole():
    found = doctor.pins(ROOT / "requirements.lock")
    assert len(found) > 100
    assert found["accelerate"] == "1.15.0"
    assert all(version[:1].isdigit() for version in found.values())


def test_a_sound_installation_has_no_fault(quick, capsys):
    assert list(doctor.faults()) == []
    assert doctor.main([]) == 0
    told = capsys.readouterr().out
    assert "no fault found" in told
    assert all(chapter.stem in told for chapter in notebooks.chapters(BOOK))


def test_every_fault_is_told_in_one_sentence_and_the_status_is_1(places, quick, capsys):
    text = (places / "lock").read_text().replace("torch==", "torch==0.")
    (places / "lock").write_text(text + "no-such-package==3 \\\n")
    (places / "weights" / "score-phantom" / "classes.safetensors").write_bytes(b"damaged")
    (places / "weights" / "empty").mkdir()
    (places / "runs").write_text("a file where a folder should be")
    assert doctor.main([]) == 1
    told = capsys.readouterr().out
    assert "5 faults found" in told
    for sentence in (
        "the package torch is",
        "the package no-such-package is missing; 3 is pinned in lock",
        "classes.safetensors is missing or is not the file that the run wrote",
        "empty have no readable run.json; fetch them again",
        "cannot be written (File exists); name another by HALLULIB_RUNS",
    ):
        (line,) = (line for line in told.splitlines() if sentence in line)
        assert line.startswith("  ")


def test_a_lock_that_is_not_there_is_a_fault(places):
    (places / "lock").unlink()
    (fault,) = doctor.faults()
    assert "cannot read the pinned versions in" in fault


def test_wrong_parameters_are_one_sentence_and_status_2(places, quick, capsys):
    file = places / "wrong.yaml"
    file.write_text("STPES: 3\n")
    assert doctor.main(["--params", str(file)]) == 2
    assert "STPES" in capsys.readouterr().err


# --- the cost ---------------------------------------------------------------------------------


def values(chapter):
    return notebooks.own_values(BOOK / f"{chapter}.ipynb")


def images(chapter, **changed):
    return sum(work.images for work in workload.of_chapter(chapter, values(chapter) | changed))


@pytest.mark.parametrize("chapter", sorted(workload.CHAPTERS))
def test_more_steps_cost_more_and_every_size_is_that_of_the_parameters(chapter):
    own = values(chapter)
    grows = "PRETRAINING" if "PRETRAINING" in own else "STEPS"
    assert images(chapter, **{grows: 2 * own[grows]}) > 1.2 * images(chapter)
    sizes = {work.size for work in workload.of_chapter(chapter, own | {"SIZE": 48})}
    assert sizes <= {1, 24, 48}
    small = size_for_tests(BOOK / f"{chapter}.ipynb")
    assert images(chapter, **small) < 0.5 * images(chapter)


def test_the_parameters_of_a_gpu_cost_more(quick):
    cheap, dear = (
        {name: once + always for name, once, always in doctor.costs(file)}
        for file in (None, BOOK / "params" / "gpu.yaml")
    )
    assert cheap["01_images"] == dear["01_images"] == 0
    assert dear["03_pretraining"] == pytest.approx(25 * cheap["03_pretraining"])


def test_a_pretraining_is_counted_to_the_image():
    own = values("03_pretraining") | {"STEPS": 10, "BATCH_SIZE": 8}
    (work,) = workload.of_chapter("03_pretraining", own)
    assert work == Work("score step", own["SIZE"], own["WIDTH"], 80, 8, kept=True)


@pytest.mark.parametrize("unit", sorted(workload.UNITS))
def test_every_unit_takes_time(unit):
    workload.per_image.cache_clear()
    assert 0 < workload.per_image(unit, 16, 8, 2) < 10
