"""What the README says can be done, done."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
MODULES = sorted(set(re.findall(r"python -m (\w+(?: [a-z]\w*)?) --help", README)))


def test_there_is_an_example_of_each_estimator():
    from hallulib import estimators

    for name in estimators.__all__:
        assert sum(f"import {name}\n" in block for block in BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"(\w+)\(", block)[1])
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


def test_every_command_of_data_prep_explains_itself():
    from data_prep.__main__ import ARCHIVES, parser

    named = [words.split()[1] for words in MODULES if words.startswith("data_prep ")]
    assert sorted(named) == sorted(ARCHIVES)
    for name in named:
        assert "OUT" in parser(name).format_help()


def test_the_command_line_of_data_prep_starts():
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "folder", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "--patient-pattern" in done.stdout


def test_every_file_that_is_named_exists():
    paths = re.findall(r"book/[\w./]+\w", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
