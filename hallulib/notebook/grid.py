"""Grids: one chapter run again and again with other parameters, collected into one table.

A grid file names a chapter and the values of its parameters::

    chapter: 06_hallucination    # of the book, or the path of a notebook
    common: {N_EPISODES: 600}    # for all cells
    grid: {STEPS: [10, 100], RATE: [1e-4, 1e-3]}    # every combination
    cells: [{STEPS: 0}]          # and single ones; they win over ``common``

Each cell is one papermill run of the chapter, and `dask.distributed` deals the cells to processes
of this machine or to the workers of a cluster, which need the project and its environment at the
same paths. What the chapter glued as the texts of JSON ``measured`` and ``series`` is kept. A
finished cell never runs twice: after a change of the library or of the chapter, give another file.
"""

import ast
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import nbformat
import pandas as pd
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm.auto import tqdm

from hallulib import UserError
from hallulib.notebook import parameters
from hallulib.storage import disk, store

Cell = dict[str, Any]
MOST_CELLS = 10_000  # each is a run of a chapter, minutes at least
PATIENCE = 10  # seconds for a scheduler to answer
TIMEOUT = 12 * 3600  # seconds for one code cell: a training run on real data is one of them


class Grid(BaseModel):
    """What a grid file holds.

    Example:
        >>> Grid(chapter="06_hallucination", grid={"A": [1, 2]}, cells=[{"B": 3}]).choices()
        [{'A': 1}, {'A': 2}, {'B': 3}]
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    chapter: str
    common: dict = {}
    grid: dict[Any, Annotated[list, Len(1)]] = {}
    cells: list[dict] = []

    def notebook(self) -> Path:
        """The chapter, whose path starts at the root of the project as all paths do."""
        name = self.chapter
        path = parameters.ROOT / (name if name.endswith(".ipynb") else f"book/{name}.ipynb")
        if not path.is_file():
            raise UserError(f"there is no chapter {name}: no file {path}")
        return path

    def choices(self) -> list[dict]:
        """What is set in each cell: every combination of values, then single cells."""
        for name in self.common.keys() & self.grid.keys():
            raise UserError(f"{name} is set in common and in grid; keep one of them")
        n_products = math.prod(map(len, self.grid.values())) if self.grid else 0
        if not 0 < (n := n_products + len(self.cells)) <= MOST_CELLS:
            raise UserError(f"grid and cells make {n:,} cells; 1 to {MOST_CELLS:,} are needed")
        products = itertools.product(*self.grid.values()) if self.grid else ()
        combined = [dict(zip(self.grid, values, strict=True)) for values in products]
        return [self.common | chosen for chosen in combined + self.cells]


def read(file: Path) -> list[dict[str, Any]]:
    """All parameters of each cell, one that occurs twice listed once: the combinations of
    ``grid``, its last name changing fastest, then ``cells``.

    Raises:
        UserError: the file is no grid, a name is no parameter of the chapter, or a value is
            impossible by the chapter's own plain rules.
    """
    return list(_plan(file)[1].values())


def _plan(file: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The notebook of a grid, and the parameters of its cells by key."""
    given = parameters.read_yaml(file)
    try:
        grid = Grid(**given)
        notebook, plan = grid.notebook(), {}
        own, rules = parameters.own_values(notebook), parameters.declared(notebook)
        for chosen in grid.choices():
            values = dict(own)
            for name, value in chosen.items():
                if name not in own:
                    raise UserError(parameters.unknown(str(name), own))
                # 1 and 1.0 are one learning rate
                whole = isinstance(own[name], float) and type(value) is int
                values[name] = float(value) if whole else value
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


def execute(chapter: Path, out: Path, values: dict, **options: Any) -> nbformat.NotebookNode:
    """Execute a notebook with papermill as all chapters are: at the root of the project. What was
    executed is kept in ``out``, cell by cell; the options are papermill's.

    Raises:
        UserError: the chapter stopped with one, told after its name, or its process was killed.
        papermill.PapermillExecutionError: it failed otherwise.
    """
    import papermill  # it takes seconds
    from nbclient.exceptions import DeadKernelError

    settings = {"kernel_name": "python3", "cwd": parameters.ROOT, "execution_timeout": TIMEOUT}
    # the kernel warns at each start that it talks to us over TCP on this machine
    quiet = {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=40"]}
    tries = 3
    while True:
        try:
            return papermill.execute_notebook(chapter, out, values, **settings, **quiet | options)
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
    """Run one cell where this is called and write it to ``file``; ``error`` tells what failed. The
    executed notebook stays beside the file if the cell failed.
    """
    # papermill changes the folder of the whole process and back: with several threads in a
    # worker, none may go back to another one than the root
    os.chdir(parameters.ROOT)
    with disk.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    executed, start = file.with_suffix(".ipynb"), time.monotonic()
    try:
        with TemporaryDirectory() as own:  # the numbers of a cell are in its file, not the book's
            os.environ["HALLULIB_RESULTS"] = own
            outcome = _glued(execute(notebook, executed, values))
    except Exception as error:  # whatever it was is the outcome of this cell; the others go on
        outcome = {"error": _sentence(error)}
    else:  # first this: a cell that is there is not looked at again
        disk.drop(executed)
    outcome["seconds"] = round(time.monotonic() - start, 1)
    return _write(notebook, values, file, outcome)


def _write(notebook, values, file, outcome):
    cell = {"chapter": notebook.stem, "parameters": values, "error": None, "measured": {}}
    cell |= {"series": {}, "seconds": 0.0, "made_with": store.provenance()} | outcome
    store.write_json(file, cell)
    return cell


def _glued(notebook):
    """What the chapter glued as texts of JSON, found in the outputs of its executed copy."""
    glued = {}
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        label = output.get("metadata", {}).get("scrapbook", {})
        if label.get("name") in ("measured", "series"):
            text = output["data"][label["mime_prefix"] + "text/plain"]
            glued[label["name"]] = json.loads(ast.literal_eval(text))
    if "measured" not in glued:
        raise UserError(
            "a chapter of a grid must glue measured, a mapping from each number to its value, "
            "low, high and n, as a text of JSON"
        )
    return glued


def _sentence(error):
    if isinstance(error, UserError):
        return str(error)
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    return " ".join(f"{kind}: {text}".split())


def run(file: Path, out: Path, *, address: str | None = None, workers: int = 2) -> Iterator[Cell]:
    """Finish a grid: run what ``out`` does not hold yet, and yield every cell of the grid.

    First come the cells that were finished before, then each other one when it ends; one with an
    ``error`` is tried again by the next call. At the end ``out``, a JSON file, holds the cells in
    the order of the grid, and after them whatever else it held. Until then those that ended lie
    beside it, in a folder of that name with ``.cells`` in place of ``.json``. Cells run where the
    dask scheduler at an ``address`` such as ``tcp://host:8786`` sends them, or without one in so
    many ``workers``, processes that share the cores of this machine.

    Raises:
        UserError: the file is wrong, a stored cell cannot be read, or no scheduler answers.
    """
    if workers < 1:
        raise UserError(f"a grid needs at least 1 worker, found {workers}")
    notebook, plan = _plan(file)
    out = out.resolve()
    folder = out.with_suffix(".cells")
    stored = [cell for place in (out, folder) if place.exists() for cell in _cells(place)]
    cells = {_key(cell["chapter"], cell["parameters"]): cell for cell in stored}
    todo = [key for key in plan if key not in cells or cells[key]["error"] is not None]
    jobs = {key: (notebook, plan[key], folder / f"{key}.json") for key in todo}
    yield from (cells[key] for key in plan if key not in jobs)
    bar = {"total": len(plan), "initial": len(plan) - len(jobs), "desc": file.stem}
    with ExitStack() as stack:
        ended = _compute(_connect(address, min(workers, len(jobs)), stack), jobs) if jobs else ()
        for key, cell in tqdm(ended, file=sys.stderr, disable=not jobs, **bar):
            cells[key] = cell
            yield cell
    write(out, [cells[key] for key in dict.fromkeys([*plan, *cells])])
    if all(cells[key]["error"] is None for key in plan):  # else the executed notebooks stay
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address, workers, stack):
    """A dask client of the cluster at the address, or of a new one on this machine."""
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    if address is None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        # no address for the dashboard: nothing of the cluster is seen from outside
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            # a cell that takes its worker with it may have run for hours: no silent second try
            scheduler_kwargs={"allowed_failures": 0},
            silence_logs=logging.CRITICAL,  # workers that end, and take a while to, tell of it
            env=dict.fromkeys(names, str(max(1, CPU_COUNT // workers))),
        )
        client = stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
        client.run(_leave_interrupts)
        return client
    try:
        return stack.enter_context(Client(address, timeout=PATIENCE, set_as_default=False))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no dask scheduler answers at {address}; give the address that dask scheduler "
            f"printed, such as tcp://host:8786 ({' '.join(str(error).split())})"
        ) from error


def _leave_interrupts():
    # Ctrl-C reaches all processes of a terminal; only the one that asked for the workers ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compute(client, jobs):
    """Keys and cells as they end; jobs are the arguments of `run_cell` by key."""
    from distributed import CancelledError, as_completed

    # tasks of one name are one task to a scheduler: the name is that of the file
    keys = {client.submit(run_cell, *job, key=str(job[-1])): key for key, job in jobs.items()}
    for future in as_completed(keys, loop=client.loop):
        job = jobs[keys[future]]
        try:
            cell = future.result()
        except CancelledError:
            raise UserError("the dask scheduler is gone; finished cells are kept") from None
        except Exception as error:  # a worker that was killed, say, or lacks a package
            cell = _write(*job, {"error": _sentence(error)})
        if not job[-1].exists():  # written on a machine that shares no files with this one
            store.write_json(job[-1], cell)
        yield keys[future], cell


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


def collect(place: Path) -> pd.DataFrame:
    """The table of a grid: one row per cell, in the order of `load`.

    Its columns are ``chapter``, each parameter under its name, each number ``x`` as ``x.value``,
    ``x.low``, ``x.high`` and ``x.n``, then ``seconds`` and ``error``. A cell that failed has its
    sentence in ``error`` and no number.
    """
    rows = []
    for cell in load(place):
        ends = {"seconds": cell["seconds"], "error": cell["error"]}
        rows.append({"chapter": cell["chapter"]} | cell["parameters"] | cell["measured"] | ends)
    return pd.json_normalize(rows)


def finish(file: Path, out: Path | None, address: str | None, workers: int) -> int:
    """Run a grid and say how it ended; returns 0, or 1 if a cell failed."""
    cells = read(file)
    out = out or store.runs_folder() / "grids" / f"{file.stem}.json"
    varied = [n for n in cells[0] if len({repr(cell[n]) for cell in cells}) > 1] or list(cells[0])
    failed = 0
    for cell in run(file, out, address=address, workers=workers):
        if cell["error"] is not None:
            failed += 1
            names = ", ".join(f"{name}={cell['parameters'][name]!r}" for name in varied)
            tqdm.write(f"the cell with {names} failed: {cell['error']}", file=sys.stderr)
    finished = f"{len(cells) - failed} of {len(cells)} cells are finished in {out}"
    print(f"{finished}; the next run tries the others again" if failed else finished)
    return int(failed > 0)
