"""Grids: one chapter run again and again with other parameters, collected into one table.

A grid file names a chapter and the values of its parameters::

    chapter: 07_hallucination    # of the book, or the path of a notebook
    common: {N_EPISODES: 600}    # for all cells
    grid: {STEPS: [10, 100], RATE: [1e-4, 1e-3]}    # every combination
    cells: [{STEPS: 0}]          # and single ones; they win over ``common``

Each cell is one papermill run of the chapter, in a process of its own. What the chapter published
by its ledger is kept. A finished cell never runs twice: after a
change of the library or of the chapter, give another file.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nbformat
from annotated_types import Len
from joblib import cpu_count
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm.auto import tqdm

from hallulib import UserError
from hallulib.notebook import parameters
from hallulib.notebook.ledger import MEASURED
from hallulib.storage import disk, store

Cell = dict[str, Any]
TIMEOUT = 12 * 3600  # seconds for one code cell: a training run on real data is one of them


class Grid(BaseModel):
    """What a grid file holds."""

    model_config = ConfigDict(extra="forbid", strict=True)
    chapter: str
    common: dict = {}
    grid: dict[Any, Annotated[list, Len(1)]] = {}
    cells: list[dict] = []

    def choices(self) -> list[dict]:
        """What is set in each cell: every combination of values, then single cells."""
        for name in self.common.keys() & self.grid.keys():
            raise UserError(f"{name} is set in common and in grid; keep one of them")
        products = itertools.product(*self.grid.values()) if self.grid else ()
        combined = [dict(zip(self.grid, values, strict=True)) for values in products]
        if not combined and not self.cells:
            raise UserError("grid and cells make no cell; at least 1 is needed")
        return [self.common | chosen for chosen in combined + self.cells]


def read(file: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The notebook of a grid, and the parameters of each cell by its key: the combinations of
    ``grid``, its last name changing fastest, then ``cells``; one that occurs twice is there once.

    Raises:
        UserError: the file is no grid, a name is no parameter of the chapter, or a value is
            impossible by the chapter's own rules.
    """
    given = parameters.read_yaml(file)
    try:
        grid = Grid(**given)
        name, plan = grid.chapter, {}
        # as all paths it starts at the root of the project
        notebook = parameters.ROOT / (name if name.endswith(".ipynb") else f"book/{name}.ipynb")
        if not notebook.is_file():
            raise UserError(f"there is no chapter {name}: no file {notebook}")
        if "ledger.publish(" not in notebook.read_text():
            raise UserError(
                f"{name} never calls ledger.publish(), so a grid has nothing to collect"
            )
        own, rules = parameters.own_values(notebook), parameters.declared(notebook)
        for chosen in grid.choices():
            values = dict(own)
            for one, value in chosen.items():
                if one not in own:
                    raise UserError(parameters.unknown(str(one), own))
                # 1 and 1.0 are one learning rate
                whole = isinstance(own[one], float) and type(value) is int
                values[one] = float(value) if whole else value
            parameters.check_before(notebook.stem, rules, values)
            plan[_key(notebook.stem, values)] = values
    except ValidationError as faults:
        fault = faults.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(f"{file}: {where} = {fault['input']!r}: {fault['msg']}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return notebook, plan


def _key(chapter: str, values: dict) -> str:
    canonical = json.dumps([chapter, values], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def execute(
    chapter: Path, out: Path, values: dict, before: str = "pass", **options: Any
) -> nbformat.NotebookNode:
    """Execute a notebook with papermill as all chapters are: at the root of the project. What was
    executed is kept in ``out``, cell by cell; ``before`` is a line of Python that its process runs
    first, and the options are papermill's.

    Raises:
        UserError: the chapter stopped with one, told after its name, or its process was killed.
        papermill.PapermillExecutionError: it failed otherwise.
    """
    import papermill  # it takes seconds
    from nbclient.exceptions import DeadKernelError

    settings = {"kernel_name": "python3", "cwd": parameters.ROOT, "execution_timeout": TIMEOUT}
    # the kernel warns at each start that it talks to us over TCP on this machine
    arguments = ["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={before}"]
    settings |= {"progress_bar": False, "extra_arguments": arguments}
    tries = 3
    while True:
        try:
            return papermill.execute_notebook(chapter, out, values, **settings | options)
        except papermill.PapermillExecutionError as error:
            if error.ename == "UserError":
                raise UserError(f"{chapter.stem}: {error.evalue}") from None
            raise
        except DeadKernelError as error:
            raise UserError(
                f"{chapter.stem}: its process was killed, most likely for lack of memory; smaller "
                "parameters or more memory are needed"
            ) from error
        except RuntimeError:  # another program took a port that was just found free
            tries -= 1
            if not tries:
                raise


def run_cell(notebook: Path, values: dict[str, Any], file: Path) -> Cell:
    """Run one cell and write it to ``file``; its ``error`` tells what failed, if anything did, and
    then the executed notebook stays beside the file.
    """
    with disk.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    executed, start = file.with_suffix(".ipynb"), time.monotonic()
    cell: Cell = {"chapter": notebook.stem, "parameters": values, "error": None}
    cell |= {"measured": {}, "series": {}}
    try:
        with TemporaryDirectory() as own:  # the numbers of a cell are in its file, not the book's
            before = f"import os; os.environ['HALLULIB_RESULTS'] = {own!r}"
            cell |= _published(execute(notebook, executed, values, before))
    except Exception as error:  # whatever it was is the outcome of this cell; the others go on
        cell["error"] = _sentence(error)
    else:  # first this: a cell that is there is not looked at again
        disk.drop(executed)
    cell |= {"seconds": round(time.monotonic() - start, 1), "made_with": store.provenance()}
    store.write_json(file, cell)
    return cell


def _published(notebook):
    """What the chapter published, found in the outputs of its executed copy."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    shown = (output.get("data", {}) for output in outputs)
    found = next((data[MEASURED] for data in shown if MEASURED in data), None)
    if found is None:
        raise UserError("a chapter of a grid must end with ledger.publish(), and this one did not")
    return found


def _sentence(error):
    if isinstance(error, UserError):
        return str(error)
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    return " ".join(f"{kind}: {text}".split())


def run(file: Path, out: Path, workers: int = 2) -> Iterator[Cell]:
    """Finish a grid: run what ``out`` does not hold yet, and yield every cell of the grid.

    First come the cells that were finished before, then each other one when it ends; one with an
    ``error`` is tried again by the next call. At the end ``out``, a JSON file, holds the cells in
    the order of the grid, and after them whatever else it held. Until then those that ended lie
    beside it, in a folder of that name with ``.cells`` in place of ``.json``. So many ``workers``
    run side by side and share the cores of this machine.

    Raises:
        UserError: the file is wrong, a stored cell cannot be read, or a folder not be written.
    """
    if workers < 1:
        raise UserError(f"a grid needs at least 1 worker, found {workers}")
    notebook, plan = read(file)
    out = out.resolve()
    folder = out.with_suffix(".cells")
    stored = [cell for place in (out, folder) if place.exists() for cell in _cells(place)]
    cells = {_key(cell["chapter"], cell["parameters"]): cell for cell in stored}
    todo = [key for key in plan if key not in cells or cells[key]["error"] is not None]
    yield from (cells[key] for key in plan if key not in todo)
    workers = max(1, min(workers, len(todo)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // workers)))
    # papermill changes the folder of all threads and back: none may go back to another one
    os.chdir(parameters.ROOT)
    bar = {"total": len(plan), "initial": len(plan) - len(todo), "desc": file.stem}
    # threads that only wait; the process of a cell ends by itself when this one is gone
    with ThreadPool(workers) as pool:
        cell_of = lambda key: run_cell(notebook, plan[key], folder / f"{key}.json")
        ended = pool.imap_unordered(cell_of, todo)
        for cell in tqdm(ended, file=sys.stderr, disable=not todo, **bar):
            cells[_key(cell["chapter"], cell["parameters"])] = cell
            yield cell
    write(out, [cells[key] for key in dict.fromkeys([*plan, *cells])])
    if all(cells[key]["error"] is None for key in plan):  # else the executed notebooks stay
        shutil.rmtree(folder, ignore_errors=True)


def load(place: Path) -> list[Cell]:
    """The cells in a file, in their order there, or of a grid that still runs, in its folder.

    Each holds ``chapter``, ``parameters``, ``measured`` (number: its value, low, high and n),
    ``series`` (method: one number per episode; episode i is the same in all cells with the same
    seed, so cells can be compared in pairs), ``seconds``, ``made_with``, and ``error``, None if
    the cell finished.

    Raises:
        UserError: there is no cell, or a file holds something else.
    """
    if cells := _cells(place):
        return cells
    raise UserError(f"{place} holds no cell of a grid; python -m hallulib grid makes some")


def _cells(place):
    cells = []
    for file in [place] if place.is_file() else sorted(place.glob("*.json")):
        try:
            held = json.loads(file.read_text())
            cells += held if isinstance(held, list) else [held]
            {_key(cell["chapter"], cell["parameters"]): cell["error"] for cell in cells}
        except (OSError, ValueError, TypeError, KeyError) as error:
            told = f"{file} is no cell of a grid; delete it and run the grid again"
            raise UserError(told) from error
    return cells


def write(file: Path, cells: list[Cell]) -> None:
    """Write cells as one file of JSON that can be reviewed: a line per number and series."""
    text = json.dumps(cells, indent=1, ensure_ascii=False)
    # line breaks stand between values alone: in a text JSON writes them as \n
    flat = re.sub(r"[\[{]\n[^\[\]{}]*[\]}]", lambda m: re.sub(r"\n *", " ", m[0]), text)
    with disk.whole(file) as partial:
        partial.write_text(flat + "\n")


def finish(file: Path, out: Path | None, workers: int) -> int:
    """Run a grid and say how it ended; returns 0, or 1 if a cell failed."""
    cells = list(read(file)[1].values())
    out = out or store.runs_folder() / "grids" / f"{file.stem}.json"
    varied = [n for n in cells[0] if len({repr(cell[n]) for cell in cells}) > 1] or list(cells[0])
    failed = 0
    for cell in run(file, out, workers):
        if cell["error"] is not None:
            failed += 1
            names = ", ".join(f"{name}={cell['parameters'][name]!r}" for name in varied)
            tqdm.write(f"the cell with {names} failed: {cell['error']}", file=sys.stderr)
    finished = f"{len(cells) - failed} of {len(cells)} cells are finished in {out}"
    print(f"{finished}; the next run tries the others again" if failed else finished)
    return int(failed > 0)
