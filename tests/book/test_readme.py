"""What the README says can be done, done."""

import re
import subprocess
import sys

import pytest

from conftest import ROOT
from hallulib import ESTIMATORS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def estimator(block):
    return re.search(r"from hallulib import (\w+)", block)[1]


def test_there_is_an_example_of_each_estimator():
    assert sorted(map(estimator, BLOCKS)) == sorted(ESTIMATORS.values())


@pytest.mark.parametrize("block", BLOCKS, ids=estimator)
def test_an_example_runs_as_it_is_written(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    assert len(block.splitlines()) <= 12
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:^|`)make ([a-z]+)", README, re.M)
    assert named
    assert set(named) <= set(targets)


def test_every_archive_is_named_and_explains_itself(capsys):
    from data_prep.__main__ import ARCHIVES, main

    named = re.findall(r"python -m data_prep (\w+) --help", README)
    assert sorted(named) == sorted(ARCHIVES)
    for name in named:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: python -m data_prep {name}" in capsys.readouterr().out


def test_the_module_of_that_command_is_one():
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_is_named_exists():
    paths = re.findall(r"book/[\w./]+\w", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
