import os
import signal
import socket
import sys

import nbformat
import pandas as pd
import pytest
import toy_runs
from jupyter_client.connect import LocalPortCache
from killing import alive, in_session, start, wait_until

from conftest import ROOT
from hallulib import UserError
from hallulib import __main__ as cli
from hallulib.notebook import grid

HEAD = """STEPS = 5  # steps (test: 2)
RATE = 0.1  # per step (test: 0.1)
SCHEME = "isup"  # labels (test: "isup")"""
CHECK = """\
import json, os, time
from hallulib.notebook.ledger import Ledger
from hallulib import UserError
from hallulib.notebook import parameters
parameters.check(globals(), STEPS=(0, 1000), RATE=(0.0, 1.0), SCHEME=str)"""
PUBLISH = """\
ledger = Ledger("01_tiny", seed=0)
ledger.keep("product", STEPS * RATE, low=0.0, n=3)
ledger.publish(mine=[1.5, STEPS])"""


class Tiny:
    """A chapter that leaves a mark at each run, a grid of it, and the file of its cells."""

    def __init__(self, home):
        self.home, self.chapter = home, home / "01_tiny.ipynb"
        self.file, self.cells, self.ran_file = home / "tiny.yaml", home / "all.json", home / "ran"
        self.folder = home / "all.cells"  # while it runs
        self.write("")

    def write(self, code):
        new = nbformat.v4
        mark = f"open({str(self.ran_file)!r}, 'a').write(f'{{STEPS}} ')"
        cells = [new.new_code_cell(HEAD, metadata={"tags": ["parameters"]})]
        cells += [new.new_code_cell(source) for source in (CHECK, mark, code, PUBLISH)]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, self.chapter)

    def ask(self, text):
        chapter = "" if text.startswith("chapter:") else f"chapter: {self.chapter}\n"
        self.file.write_text(f"{chapter}{text}\n")
        return self.file

    def run(self, *options):
        return cli.main(["grid", str(self.file), "--out", str(self.cells), *options])

    def ran(self):
        return sorted(self.ran_file.read_text().split()) if self.ran_file.exists() else []


def collect(place):
    """One row for each cell."""
    rows = [c["parameters"] | c["measured"] | {"error": c["error"]} for c in grid.load(place)]
    return pd.json_normalize(rows)


@pytest.fixture
def tiny(tmp_path):
    return Tiny(tmp_path)


# --- the cells of a grid ----------------------------------------------------------------------


def test_a_grid_is_every_combination_and_then_the_single_cells(tiny):
    tiny.ask(
        "common: {SCHEME: grade2}\n"
        "grid: {STEPS: [1, 2], RATE: [1e-3, 1]}\n"
        "cells: [{STEPS: 7}, {SCHEME: isup}]"
    )
    rows = [(c["STEPS"], c["RATE"], c["SCHEME"]) for c in grid.read(tiny.file)[1].values()]
    product = [(s, r, "grade2") for s in (1, 2) for r in (0.001, 1.0)]
    assert rows == [*product, (7, 0.1, "grade2"), (5, 0.1, "isup")]


def test_one_setting_in_two_spellings_is_one_cell(tiny):
    tiny.ask("grid: {RATE: [1, 1.0, 1e-0]}\ncells: [{RATE: 1.0, STEPS: 5}]")
    assert [c["RATE"] for c in grid.read(tiny.file)[1].values()] == [1.0]


@pytest.mark.parametrize("file", sorted((ROOT / "book" / "grids").glob("*.yaml")), ids=str)
def test_the_grids_of_the_book_fit_its_chapters(file):
    assert grid.read(file)[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grid: {STPES: [1]}", "unknown parameter STPES; did you mean STEPS? known: STEPS, RATE"),
        ("cells: [{3: 1}]", "unknown parameter 3; known: STEPS, RATE, SCHEME"),
        ("grid: {STEPS: [1, -1]}", "01_tiny: parameter STEPS = -1 must be a whole number from 0"),
        ("common: {SCHEME: 2}\ncells: [{}]", "SCHEME = 2 must be text that is not empty"),
        ("grid: {RATE: [.nan]}", "RATE = '.nan' must be a finite number from 0.0 to 1.0"),
        ("grid: {STEPS: [1]}\ngrid: {STEPS: [2]}", "grid is set again in line 3"),
        ("grid: {STEPS: 3}", "grid.STEPS = 3: Input should be a valid list"),
        ("grid: {STEPS: []}", "grid.STEPS = []: List should have at least 1 item"),
        ("grid: [STEPS]", "grid = ['STEPS']: Input should be a valid dictionary"),
        ("common: 3\ncells: [{}]", "common = 3: Input should be a valid dictionary"),
        ("cells: {STEPS: 1}", "cells = {'STEPS': 1}: Input should be a valid list"),
        ("cells: [STEPS]", "cells.0 = 'STEPS': Input should be a valid dictionary"),
        ("common: {STEPS: 1}\ngrid: {STEPS: [2]}", "STEPS is set in common and in grid"),
        ("common: {STEPS: 1}", "grid and cells make no cell; at least 1 is needed"),
        ("gird: {STEPS: [1]}", "gird = {'STEPS': [1]}: Extra inputs are not permitted"),
        ("chapter: 77_none\ncells: [{}]", "there is no chapter 77_none"),
        ("chapter: [1]\ncells: [{}]", "chapter = [1]: Input should be a valid string"),
        ("grid: [", "cannot read the parameters in"),
        ("cells: !!python/object/apply:os.getcwd []", "cannot read the parameters in"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_sentence_before_anything_runs(
    tiny, capsys, text, sentence
):
    tiny.ask(text)
    assert tiny.run() == 2
    printed = capsys.readouterr().err.strip()
    assert sentence in printed
    assert str(tiny.file) in printed
    assert "\n" not in printed
    assert not tiny.cells.exists()
    assert not tiny.folder.exists()


# --- running them -----------------------------------------------------------------------------


def test_two_workers_of_this_machine_fill_the_table(tiny, capsys):
    tiny.ask("grid: {STEPS: [2, 10], RATE: [0.5, 0.25]}\ncommon: {SCHEME: grade2}")
    assert tiny.run("--workers", "2") == 0
    assert "4 of 4 cells are finished" in capsys.readouterr().out
    table = collect(tiny.cells)
    assert table["STEPS"].tolist() == [2, 2, 10, 10]
    assert table["RATE"].tolist() == [0.5, 0.25, 0.5, 0.25]
    assert (table["product.value"] == table["STEPS"] * table["RATE"]).all()
    assert (table["product.low"] == 0).all()
    assert table["product.high"].isna().all()
    assert (table["product.n"] == 3).all()
    assert set(table["SCHEME"]) == {"grade2"}
    assert table["error"].isna().all()
    cells = grid.load(tiny.cells)
    assert {cell["chapter"] for cell in cells} == {"01_tiny"}
    assert [cell["series"] for cell in cells] == [{"mine": [1.5, s]} for s in (2, 2, 10, 10)]
    assert all(cell["seconds"] > 0 and cell["made_with"]["torch"] for cell in cells)
    assert not tiny.folder.exists()


def test_a_finished_cell_never_runs_twice(tiny):
    tiny.ask("cells: [{STEPS: 1}, {STEPS: 2}]")
    assert tiny.run() == 0
    assert tiny.ran() == ["1", "2"]
    tiny.ask("cells: [{STEPS: 3}, {STEPS: 2, RATE: 0.1}]\ngrid: {SCHEME: [isup], STEPS: [1]}")
    assert tiny.run() == 0
    assert tiny.ran() == ["1", "2", "3"]
    tiny.ask("cells: [{STEPS: 3}]")
    assert tiny.run() == 0
    assert tiny.ran() == ["1", "2", "3"]
    assert [c["parameters"]["STEPS"] for c in grid.load(tiny.cells)] == [3, 1, 2]


def test_a_cell_that_fails_is_reported_and_tried_again_and_the_others_are_kept(tiny, capsys):
    tiny.ask("grid: {STEPS: [1, 13]}")
    tiny.write("assert STEPS != 13, 'of all\\nnumbers'")
    assert tiny.run() == 1
    printed = capsys.readouterr()
    assert "the cell with STEPS=13 failed: AssertionError: of all numbers\n" in printed.err
    assert "1 of 2 cells are finished" in printed.out
    table = collect(tiny.cells).set_index("STEPS")
    assert table.loc[1, "product.value"] == 0.1
    assert table.loc[13, "error"] == "AssertionError: of all numbers"
    (kept,) = tiny.folder.glob("*.ipynb")
    assert "AssertionError" in kept.read_text()
    tiny.write("")
    assert tiny.run() == 0
    assert tiny.ran() == ["1", "13", "13"]
    assert collect(tiny.cells)["error"].isna().all()
    assert not tiny.folder.exists()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("raise UserError('no such folder')", "01_tiny: no such folder"),
        ("os._exit(1)", "01_tiny: its process was killed, most likely for lack of memory"),
        ("Ledger.publish = lambda *_, **__: None", "must end with ledger.publish()"),
    ],
    ids=["user", "kernel", "none"],
)
def test_whatever_stops_a_cell_is_told_in_one_sentence(tiny, code, sentence):
    tiny.write(code)
    (cell,) = grid.run(tiny.ask("cells: [{STEPS: 1}]"), tiny.cells)
    assert sentence in cell["error"]
    assert "\n" not in cell["error"]
    assert grid.load(tiny.cells) == [cell]


def _both(kernels, tiny):
    """Whether one cell waits and the other is finished."""
    return kernels.exists() and list(tiny.folder.glob("*.json"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "stop",
    [
        signal.SIGINT,
        pytest.param(signal.SIGKILL, marks=pytest.mark.release),
        pytest.param(signal.SIGTERM, marks=pytest.mark.release),
    ],
)
def test_a_run_that_was_stopped_goes_on_where_it_was(tiny, stop):
    kernels = tiny.home / "kernels"
    tiny.ask("grid: {STEPS: [1, 2]}")
    wait = f"open({str(kernels)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(3600)"
    tiny.write(f"if STEPS == 2:\n    {wait}")
    command = [
        sys.executable,
        "-m",
        "hallulib",
        "grid",
        str(tiny.file),
        "--out",
        str(tiny.cells),
    ]
    with start(command, background=stop == signal.SIGTERM, cwd=ROOT) as process:
        try:
            wait_until(lambda: _both(kernels, tiny) or process.poll() is not None)
            assert process.returncode is None, process.stderr.read().decode()
            # Ctrl-C in a terminal reaches all processes of the group
            os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
            told = process.stderr.read().decode()
        finally:
            process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(stop, -stop)
    assert stop == signal.SIGKILL or "Traceback" not in told  # of workers whose head is gone
    wait_until(lambda: not any(map(alive, kernels.read_text().split())), 60)
    wait_until(lambda: not in_session(process.pid), 60)  # its workers neither
    (finished,) = grid.load(tiny.folder)
    assert finished["parameters"]["STEPS"] == 1
    tiny.write("")
    assert tiny.run() == 0
    assert tiny.ran() == ["1", "2", "2"]
    assert not tiny.folder.exists()


def test_a_kernel_that_lost_its_port_to_another_program_is_started_again(tiny, monkeypatch):
    """A port is found free, and bound seconds later: on a busy machine not always first."""
    tiny.ask("cells: [{STEPS: 1}]")
    free, asked = LocalPortCache.find_available_port, []
    with socket.create_server(("127.0.0.1", 0)) as other:

        def find(*args):
            asked.append(other.getsockname()[1] if len(asked) in (0, 5) else free(*args))
            return asked[-1]

        monkeypatch.setattr(LocalPortCache, "find_available_port", find)
        executed = grid.execute(tiny.chapter, tiny.home / "out.ipynb", {"STEPS": 1})
    assert len(asked) == 15  # five of a kernel, which died twice
    assert tiny.ran() == ["1"]
    assert executed.cells[-1].outputs


def test_a_cell_killed_as_it_ends_is_not_there_before_its_notebook_is_gone(tmp_path, monkeypatch):
    def die(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "execute", toy_runs.execute)
    cell = tmp_path / "toy.ipynb", {"STEPS": 1}, tmp_path / "cell.json"
    with monkeypatch.context() as patch:
        patch.setattr(grid.disk, "drop", die)
        with pytest.raises(KeyboardInterrupt):
            grid.run_cell(*cell)
    assert not (tmp_path / "cell.json").exists()
    assert grid.run_cell(*cell)["measured"]["product"]["value"] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["cell.json"]


def test_a_folder_that_cannot_be_written_is_named_before_a_chapter_runs(tiny, capsys):
    tiny.ask("cells: [{}]")
    (tiny.home / "file").write_text("")
    out = tiny.home / "file" / "cells.json"
    assert cli.main(["grid", str(tiny.file), "--out", str(out)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(str(tiny.home / "file"))
    assert told.endswith(
        "cannot write (Not a directory); a writable folder with enough space is needed"
    )
    assert tiny.ran() == []


def test_at_least_one_worker_is_needed(tiny, capsys):
    tiny.ask("cells: [{}]")
    assert tiny.run("--workers", "0") == 2
    assert "at least 1 worker, found 0" in capsys.readouterr().err


# --- the file ---------------------------------------------------------------------------------


def test_a_place_without_cells_or_with_another_file_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no cell of a grid"):
        grid.load(tmp_path / "nowhere")
    for text in ('{"chapter": 1}', "[3]", '{"half'):
        (tmp_path / "a.json").write_text(text)
        for place in (tmp_path, tmp_path / "a.json"):
            with pytest.raises(UserError, match=r"a\.json is no cell of a grid; delete it"):
                grid.load(place)


def test_cells_are_read_as_they_were_written_in_a_file_that_can_be_reviewed(tmp_path):
    odd = {"A": "[ a,\n  {b} ]  \\n ü", "B": [], "C": None, "D": 1e-30, "E": {"deep": [[1, 2]]}}
    number = {"value": 0.1, "low": None, "high": 1 / 3, "n": 3}
    cell = {"chapter": "c", "parameters": odd, "measured": {"x": number}, "error": "a [\n] b"}
    grid.write(tmp_path / "a.json", [cell | {"series": {"+1": [0.5] * 1000}}] * 2)
    assert grid.load(tmp_path / "a.json") == [cell | {"series": {"+1": [0.5] * 1000}}] * 2
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert len([line for line in lines if '"x":' in line and '"n": 3' in line]) == 2
    assert len(lines) < 60


@pytest.mark.parametrize("file", sorted((ROOT / "book" / "grids").glob("*.yaml")), ids=str)
def test_the_results_of_the_book_are_the_cells_of_its_grids_in_their_order(file):
    cells = grid.load(ROOT / "book" / "results" / f"{file.stem}.json")
    assert [cell["parameters"] for cell in cells] == list(grid.read(file)[1].values())
    assert [cell["error"] for cell in cells] == [None] * len(cells)


def test_the_results_of_the_book_are_of_its_grids_alone():
    names = {path.stem for path in (ROOT / "book" / "grids").glob("*.yaml")}
    assert {path.name for path in (ROOT / "book" / "results").iterdir()} == {
        f"{name}.json" for name in names
    }
