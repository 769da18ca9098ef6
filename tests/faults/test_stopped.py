"""What was started in the background, deaf to Ctrl-C, ends in order on SIGTERM; so do tests."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from killing import alive, in_session, start, wait_until
from tiny_chapter import CHECK, write_chapter

from conftest import ROOT

HANGS = r"""\
import subprocess
def test_that_hangs():
    sleep = subprocess.Popen(["sleep", "100"])
    open("begun", "w").write(f"{sleep.pid}\n")
    sleep.wait()
def test_after_it():
    pass
"""
SLEEP = """\
import os, time
with open({}, "w") as file:
    print(os.getpid(), file=file, flush=True)
time.sleep(3600)"""


def book(home):
    """A book whose second chapter does not end; begun when it stands there beside the first."""
    (home / "source").mkdir()
    write_chapter(home / "source" / "01_one.ipynb", CHECK)
    code = SLEEP.format(repr(str(home / "begun")))
    write_chapter(home / "source" / "02_two.ipynb", CHECK, code)
    options = ["--source", str(home / "source"), "--target", str(home / "out")]
    return [sys.executable, str(ROOT / "book" / "build.py"), *options], ["begun", "out/book/01*"]


def training(home):
    """A training of hours; it has begun when a checkpoint is there."""
    options = "phantom --size 16 --steps 1000000 --width 8 --batch-size 1".split()
    command = [sys.executable, "-m", "hallulib", "train", *options]
    return command, ["runs/*/checkpoint.safetensors"]


@pytest.mark.parametrize("work", [book, training])
def test_sigterm_ends_a_command_of_the_background_in_order(work, tmp_path):
    command, begun = work(tmp_path)
    runs = os.environ | {"HALLULIB_RUNS": str(tmp_path / "runs")}
    with start(command, background=True, cwd=ROOT, env=runs, stdout=subprocess.DEVNULL) as process:
        try:
            there = lambda: all(list(tmp_path.glob(mark)) for mark in begun)
            wait_until(lambda: there() or process.poll() is not None)
            process.terminate()
            told = process.stderr.read().decode()
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "interrupted; run the same command again to go on\n" in told
    assert work is book or "Traceback" not in told  # kernels that are shut down may log one
    wait_until(lambda: not in_session(process.pid), 20)
    assert not list(tmp_path.rglob("*.partial"))
    if work is book:
        wait_until(lambda: not alive(int((tmp_path / begun[0]).read_text())), 20)
        done = [page.name for page in (tmp_path / "out" / "book").glob("*.ipynb")]
        assert done == ["01_one.ipynb"]


def hanging(home, *options):
    """A command for tests of which one hangs, under the settings of the project."""
    (home / "test_hanging.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    return [*command, "--rootdir", str(home), "-p", "conftest", "-o", "addopts=", *options]


@pytest.mark.release
def test_a_test_that_hangs_fails_by_its_name_and_the_others_run(tmp_path):
    command = hanging(tmp_path, "-o", "timeout=2", "test_hanging.py")
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert re.search("FAILED .*test_that_hangs - Failed: Timeout", done.stdout)
    assert "1 failed, 1 passed" in done.stdout
    wait_until(lambda: not alive(int((tmp_path / "begun").read_text())), 20)


def test_every_test_has_a_limit(request):
    assert 0 < float(request.config.getini("timeout")) <= 600
    assert request.config.getini("timeout_method") == "signal"


def test_what_executes_chapters_may_take_longer(request, executed):
    limit = request.node.get_closest_marker("timeout").args[0]
    assert float(request.config.getini("timeout")) < limit


@pytest.mark.parametrize("workers", ["-n0", pytest.param("-n1", marks=pytest.mark.release)])
def test_sigterm_ends_tests_of_the_background_with_their_fixtures(workers, tmp_path):
    command, begun = hanging(tmp_path, workers, "test_hanging.py"), tmp_path / "begun"
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    with start(
        command, background=True, cwd=tmp_path, env=path, stdout=subprocess.PIPE
    ) as process:
        wait_until(lambda: begun.exists() and begun.read_text())
        process.terminate()
        assert "KeyboardInterrupt" in process.communicate()[0].decode()
    wait_until(lambda: not alive(int(begun.read_text())), 20)
    wait_until(lambda: not in_session(process.pid), 20)  # no worker either


@pytest.mark.parametrize(
    "words",
    ["book", "book PARAMS=x", "test", "chapters", "grid GRID=x", "doctor", "doctor PARAMS=x"],
)
def test_sigterm_to_make_ends_what_it_started(words, tmp_path):
    program = tmp_path / ".venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho $$ > begun\nexec sleep 100\n")
    program.chmod(0o755)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / ".ready").touch()
    begun = tmp_path / "begun"
    with start(["make", *words.split()], background=True, cwd=tmp_path) as process:
        wait_until(lambda: begun.exists() and begun.read_text())
        process.terminate()
    wait_until(lambda: not in_session(process.pid), 20)
