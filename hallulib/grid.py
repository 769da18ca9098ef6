"""Grids: one chapter run again and again with other parameters, collected into one table.

A grid file names a chapter and the values of its parameters::

    chapter: 06_hallucination    # of the book, or the path of a notebook
    common: {N_EPISODES: 600}    # for all cells
    grid: {STEPS: [10, 100], RATE: [1e-4, 1e-3]}    # every combination
    cells: [{STEPS: 0}]          # and single ones; they win over ``common``

Each cell of the grid is one papermill run of the chapter, and `dask.distributed` deals the cells
to processes of this machine or to the workers of a cluster, which need the project and its
environment at the same paths. What the chapter glued as the texts of JSON ``measured`` and
``series`` is kept in one small file per cell, named by a hash of the chapter's name and all its
parameters; so a finished cell never runs twice, and a grid that was stopped goes on where it was.
What else a number depends on stands in its ``made_with``: after a change of the library or of the
chapter, give another folder.
"""

import argparse
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hallulib import UserError, artifacts, commands, disk, notebooks, plain_yaml

PARTS = ("chapter", "common", "grid", "cells")


def read(file: Path) -> list[dict[str, Any]]:
    """The parameters of each cell of a grid, with the chapter's own values filled in.

    Returns:
        One mapping per cell: the combinations of ``grid``, its last name changing fastest, then
        ``cells``. A cell that occurs twice is listed once.

    Raises:
        UserError: the file is no grid, a name is no parameter of the chapter, or a value is
            impossible by the chapter's own plain rules.
    """
    return list(_plan(file)[1].values())


def _plan(file):
    """The notebook of a grid, and the parameters of its cells by key."""
    given = plain_yaml.read(file)
    try:
        for part in given:
            if part not in PARTS:
                raise UserError(f"{part!r} is no part of a grid; those are {', '.join(PARTS)}")
        notebook = _notebook(given.get("chapter"))
        own, rules, plan = notebooks.own_values(notebook), notebooks.declared(notebook), {}
        for chosen in notebooks.choices(**{p: given[p] for p in PARTS[1:] if p in given}):
            values = notebooks.fill(own, chosen)
            notebooks.check_before(notebook.stem, rules, values)
            plan[_key(notebook.stem, values)] = values
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return notebook, plan


def _notebook(name):
    if not isinstance(name, str) or not name:
        raise UserError("it must name its chapter, such as chapter: 06_hallucination")
    # every other path in a chapter's parameters starts at the root of the project too
    path = notebooks.ROOT / (name if name.endswith(".ipynb") else f"book/{name}.ipynb")
    if not path.is_file():
        raise UserError(f"there is no chapter {name}: no file {path}")
    return path


def _key(chapter: str, values: dict) -> str:
    canonical = json.dumps([chapter, values], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def run_cell(notebook: Path, values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Run one cell where this is called and write it to ``file``; ``error`` tells what failed.

    The executed notebook stays beside the file if the cell failed.

    Raises:
        UserError: the file cannot be written.
    """
    # papermill changes the folder of the whole process and back: with several threads in a
    # worker, none may go back to another one than the root
    os.chdir(notebooks.ROOT)
    with disk.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    executed, start = file.with_suffix(".ipynb"), time.monotonic()
    try:
        with TemporaryDirectory() as own:  # the numbers of a cell are in its file, not the book's
            os.environ["HALLULIB_RESULTS"] = own
            told = _results(notebooks.execute(notebook, executed, values))
    except Exception as error:  # whatever it was is the outcome of this cell; the others go on
        told = {"error": _sentence(error)}
    else:  # first this: a cell that is there is not looked at again
        disk.drop(executed)
    told["seconds"] = round(time.monotonic() - start, 1)
    return _write(notebook, values, file, told)


def _write(notebook, values, file, told):
    cell = {"chapter": notebook.stem, "parameters": values, "measured": {}, "series": {}}
    cell |= {"error": None, "seconds": 0.0, "made_with": artifacts.provenance()} | told
    artifacts.write_json(file, cell)
    return cell


def _results(notebook):
    """What the chapter glued, found in the outputs of its executed copy."""
    measured, series = (notebooks.glued(notebook, name) for name in ("measured", "series"))
    if not isinstance(measured, dict) or not all(isinstance(m, dict) for m in measured.values()):
        raise UserError(
            "a chapter of a grid must glue measured, a mapping from each number to its value, "
            f"low, high and n; found {measured!r}"
        )
    return {"measured": measured, "series": series or {}}


def _sentence(error):
    if isinstance(error, UserError):
        return str(error)
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    return " ".join(f"{kind}: {text}".split())


def run(
    file: Path, folder: Path, *, address: str | None = None, workers: int = 2
) -> Iterator[dict[str, Any]]:
    """Finish a grid: run what ``folder`` does not hold yet, and yield every cell of the grid.

    First come the cells that were finished before, then each other one when it ends; one that
    fails is yielded too, with its ``error``, and tried again by the next call. The state of the
    work is shown on the standard error.

    Args:
        file: the grid, as `read` takes it.
        folder: of the cells; made if it is not there.
        address: of a dask scheduler to join, such as ``tcp://host:8786``. Without it, a cluster
            is made on this machine for the time of the run.
        workers: processes of that cluster; each gets its share of the cores.

    Raises:
        UserError: the file is wrong, a stored cell cannot be read, or no scheduler answers.
    """
    if workers < 1:
        raise UserError(f"a grid needs at least 1 worker, found {workers}")
    notebook, plan = _plan(file)
    files = {key: folder.resolve() / f"{key}.json" for key in plan}
    stored = {key: _load(path) for key, path in files.items() if path.exists()}
    finished = {key: cell for key, cell in stored.items() if cell["error"] is None}
    yield from finished.values()
    todo = [key for key in plan if key not in finished]
    if not todo:
        return
    with ExitStack() as stack:
        client = _connect(address, min(workers, len(todo)), stack)
        jobs = {str(files[key]): (notebook, plan[key], files[key]) for key in todo}
        bar = {"total": len(plan), "initial": len(finished), "desc": file.stem}
        yield from tqdm(_compute(client, jobs), file=sys.stderr, **bar)


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
            silence_logs=logging.ERROR,  # it warns of workers that take a while to end
            env=dict.fromkeys(names, str(max(1, CPU_COUNT // workers))),
        )
        client = stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
        client.run(_leave_interrupts)
        return client
    try:
        return stack.enter_context(Client(address, timeout=10, set_as_default=False))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no dask scheduler answers at {address}; give the address that dask scheduler "
            f"printed, such as tcp://host:8786 ({' '.join(str(error).split())})"
        ) from error


def _leave_interrupts():
    # Ctrl-C reaches all processes of a terminal; only the one that asked for the workers ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compute(client, jobs):
    """Cells as they finish; jobs are the arguments of `run_cell` by the name of their task."""
    from distributed import CancelledError, as_completed

    futures = [client.submit(run_cell, *job, key=name) for name, job in jobs.items()]
    for future in as_completed(futures, loop=client.loop):
        job = jobs[future.key]
        try:
            cell = future.result()
        except CancelledError:
            raise UserError("the dask scheduler is gone; finished cells are kept") from None
        except Exception as error:  # a worker that was killed, say, or lacks a package
            cell = _write(*job, {"error": _sentence(error)})
        if not job[-1].exists():  # written on a machine that shares no files with this one
            artifacts.write_json(job[-1], cell)
        yield cell


def load(folder: Path) -> list[dict[str, Any]]:
    """The cells in a folder, ordered by chapter and the values of their parameters.

    Returns:
        One mapping per cell: ``chapter``, ``parameters``, ``measured`` (number: its value, low,
        high and n), ``series`` (method: one number per episode; episode i is the same in all
        cells with the same seed, so cells can be compared in pairs), ``seconds``,
        ``made_with``, and ``error``, None if the cell finished.

    Raises:
        UserError: there is no cell, or a file is none.
    """
    cells = [_load(file) for file in folder.glob("*.json")]
    if not cells:
        raise UserError(f"{folder} holds no cell of a grid; python -m hallulib.grid makes some")
    return sorted(cells, key=_order)


def _load(file):
    try:
        cell = json.loads(file.read_text())
        cell["chapter"], cell["parameters"], cell["measured"], cell["error"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is no cell of a grid; delete it and run the grid again"
        ) from error
    return cell


def _order(cell):
    # numbers by size, all else by its text: a parameter may hold both
    values = [cell["parameters"][name] for name in sorted(cell["parameters"])]
    ranks = [(0, v, "") if isinstance(v, int | float) else (1, 0, repr(v)) for v in values]
    return cell["chapter"], sorted(cell["parameters"]), ranks


def collect(folder: Path) -> pd.DataFrame:
    """The table of a folder: one row per cell, in the order of `load`.

    Returns:
        Columns ``chapter``, each parameter under its name, each number ``x`` as ``x``,
        ``x.low``, ``x.high`` and ``x.n``, then ``seconds`` and ``error``. A cell that failed has
        its sentence in ``error`` and no number.

    Raises:
        UserError: as `load`.
    """
    return pd.DataFrame([_row(cell) for cell in load(folder)])


def _row(cell):
    numbers = {
        name if part == "value" else f"{name}.{part}": row.get(part)
        for name, row in cell["measured"].items()
        for part in ("value", "low", "high", "n")
    }
    ends = {name: cell[name] for name in ("seconds", "error")}
    return {"chapter": cell["chapter"]} | cell["parameters"] | numbers | ends


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a cell failed, or as :func:`hallulib.commands.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m hallulib.grid", description="Run a chapter with each cell of a grid."
    )
    parser.add_argument("file", type=Path, help="YAML: chapter, common, grid, cells")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/grids/NAME")
    parser.add_argument("--address", help="of a dask scheduler to join, tcp://HOST:PORT")
    parser.add_argument("--workers", type=int, default=2, help="processes here; default: 2")
    options = parser.parse_args(arguments)
    return commands.run(lambda: _finish(**vars(options)))


def _finish(file, out, address, workers):
    cells = read(file)
    folder = out or artifacts.runs_folder() / "grids" / file.stem
    varied = [n for n in cells[0] if len({repr(cell[n]) for cell in cells}) > 1] or list(cells[0])
    failed = 0
    for cell in run(file, folder, address=address, workers=workers):
        if cell["error"] is not None:
            failed += 1
            names = ", ".join(f"{name}={cell['parameters'][name]!r}" for name in varied)
            tqdm.write(f"the cell with {names} failed: {cell['error']}", file=sys.stderr)
    kept = f"{len(cells) - failed} of {len(cells)} cells are finished in {folder}"
    print(f"{kept}; the next run tries the others again" if failed else kept)
    return int(failed > 0)


if __name__ == "__main__":
    # workers look functions up in the module of this name, where __main__ is another one
    sys.exit(importlib.import_module("hallulib.grid").main())
