"""Chapters seen from outside: what their parameters may be, and how each is executed.

Whoever runs chapters (the book, a grid) reads their parameters and the rules for them out of the
notebook, and so refuses a wrong value before anything runs.
"""

import ast
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from hallulib import UserError, parameters, plain_yaml

ROOT = parameters.BOOK.parent
TIMEOUT = 12 * 3600  # seconds for one code cell: a training run on real data is one of them
MOST_CELLS = 10_000  # of a grid: each is a run of a chapter, minutes at least
STARTS = 3  # of a kernel that finds its port taken


def defaults(chapter: Path) -> dict[str, str]:
    """Name and text of the values in the chapter's parameters cell."""
    import papermill  # it takes seconds

    found = papermill.inspect_notebook(str(chapter))
    return {name: entry["default"] for name, entry in found.items()}


def own_values(chapter: Path) -> dict[str, Any]:
    """Name and value of the parameters that the chapter itself sets.

    Raises:
        UserError: one is an expression, so that its value is known only when the chapter runs.
    """
    values = {}
    for name, text in defaults(chapter).items():
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise UserError(f"{name} = {text} in {chapter.name} is no plain value") from None
    return values


def fill(own: Mapping[str, Any], chosen: Mapping) -> dict[str, Any]:
    """All parameters of a chapter: what was chosen, and for the rest its own values.

    Raises:
        UserError: a name is unknown.

    Example:
        >>> fill({"STEPS": 5, "RATE": 0.1}, {"RATE": 1})
        {'STEPS': 5, 'RATE': 1.0}
    """
    filled = dict(own)
    for name, value in chosen.items():
        if name not in own:
            raise UserError(parameters.unknown(str(name), list(own)))
        # 1 and 1.0 are one learning rate
        whole = isinstance(own[name], float) and type(value) is int
        filled[name] = float(value) if whole else value
    return filled


def choices(common: Any = None, grid: Any = None, cells: Any = None) -> list[dict]:
    """What is set in each cell of a grid: every combination of its values, then single cells.

    Args:
        common: ``{NAME: value}`` for all cells.
        grid: ``{NAME: [values]}``; the last name changes fastest.
        cells: ``[{NAME: value}]``, which win over ``common``.

    Raises:
        UserError: one of them has another form, or there is no cell, or more than `MOST_CELLS`.

    Example:
        >>> choices(grid={"A": [1, 2]}, cells=[{"B": 3}])
        [{'A': 1}, {'A': 2}, {'B': 3}]
    """
    common, axes = _mapping("common", common), _mapping("grid", grid)
    if not isinstance(cells, list | None):
        raise UserError(f"cells must be a list of {{NAME: value}}, found {cells!r}")
    singles = [_mapping("each of cells", single) for single in cells or []]
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name} in grid must be a list of values, found {values!r}")
        if name in common:
            raise UserError(f"{name} is set in common and in grid; keep one of them")
    n_cells = len(singles) + (math.prod(map(len, axes.values())) if axes else 0)
    if not n_cells:
        raise UserError("there is neither grid nor cells: nothing to run")
    if n_cells > MOST_CELLS:
        raise UserError(f"{n_cells:,} cells; values for at most {MOST_CELLS:,} are needed")
    products = itertools.product(*axes.values()) if axes else ()
    found = [dict(zip(axes, values, strict=True)) for values in products] + singles
    return [common | chosen for chosen in found]


def _mapping(part, value):
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UserError(f"{part} must hold NAME: value, found {value!r}")
    return value


def check_before(
    chapter: str, rules: Mapping[str, parameters.Rule], chosen: Mapping[str, Any]
) -> None:
    """Apply the `declared` rules of a chapter to some of its parameters.

    Raises:
        UserError: naming the chapter, the parameter, what was found and what is allowed.
    """
    named = {name: rules[name] for name in chosen if name in rules}
    try:
        parameters.check({name: chosen[name] for name in named}, **named)
    except UserError as error:
        raise UserError(f"{chapter}: {error}") from None


def declared(chapter: Path) -> dict[str, parameters.Rule]:
    """The rules in the chapter's call of ``parameters.check`` that are plain expressions."""
    sources = [c.source for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]
    rules = {}
    for source in sources:
        if "parameters.check(" not in source:
            continue
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "parameters.check":
                rules |= {word.arg: _plain(word.value) for word in call.keywords}
    return {name: rule for name, rule in rules.items() if rule is not None}


def _plain(expression):
    if isinstance(expression, ast.Name):
        return {"str": str, "bool": bool}.get(expression.id)
    if ast.unparse(expression) == "parameters.SEEDS":
        return parameters.SEEDS
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def chapters(source: Path) -> list[Path]:
    """The notebooks of the book, in reading order."""
    return sorted(source.glob("[0-9][0-9]_*.ipynb"))


def read_parameters(file: Path | None, pairs: list, source: Path) -> dict[str, dict]:
    """The parameters of each chapter, checked before anything runs.

    Args:
        file: YAML with ``NAME: value`` for all chapters that have NAME, and under the name of a
            chapter a mapping for that chapter alone.
        pairs: ``[name, text]`` from the command line; they win over the file.
        source: folder of the chapters.

    Raises:
        UserError: if a name is a parameter of no chapter, or a value is impossible.
    """
    given = plain_yaml.read(file) if file else {}
    given |= {name: plain_yaml.parse(text, f"-p {name}") for name, text in pairs}
    known = {chapter.stem: list(defaults(chapter)) for chapter in chapters(source)}
    chosen = {chapter: {} for chapter in known}
    for name, value in sorted(given.items(), key=lambda item: isinstance(item[1], dict)):
        targets = [name] if isinstance(value, dict) else list(known)
        entries = value if isinstance(value, dict) else {name: value}
        if not set(targets) <= set(known):
            raise UserError(f"{file} has settings for {name}; the chapters are {', '.join(known)}")
        for entry, setting in entries.items():
            takers = [chapter for chapter in targets if entry in known[chapter]]
            if not takers:
                names = dict.fromkeys(n for chapter in targets for n in known[chapter])
                raise UserError(parameters.unknown(str(entry), list(names)))
            for chapter in takers:
                chosen[chapter][entry] = setting
    for chapter in chapters(source):
        rules = declared(chapter)
        check_before(chapter.stem, rules, chosen[chapter.stem])
    return chosen


def execute(
    chapter: Path, out: Path, values: dict, *, progress_bar: bool | dict = False, stderr_file=None
) -> nbformat.NotebookNode:
    """Execute a notebook with papermill as all chapters are: at the root of the project.

    Args:
        chapter: the notebook.
        out: where papermill keeps the executed notebook, cell by cell.
        values: parameters to inject.
        progress_bar: of papermill.
        stderr_file: where the standard error of the chapter is echoed.

    Raises:
        UserError: the chapter stopped with one; its sentence, after the chapter's name. Or its
            process was killed.
        papermill.PapermillExecutionError: it failed otherwise.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    settings = dict(
        kernel_name="python3",
        cwd=ROOT,
        execution_timeout=TIMEOUT,
        progress_bar=progress_bar,
        stderr_file=stderr_file,
        # the kernel warns at each start that it talks to us over TCP on this machine
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    for left in reversed(range(STARTS)):
        try:
            return papermill.execute_notebook(chapter, out, values, **settings)
        except papermill.PapermillExecutionError as error:
            if error.ename == "UserError":
                raise UserError(f"{chapter.stem}: {error.evalue}") from None
            raise
        except DeadKernelError as error:
            raise UserError(
                f"{chapter.stem}: its process was killed, most likely for lack of memory; smaller "
                "parameters or more memory are needed"
            ) from error
        except RuntimeError as error:
            # kernels that start at the same moment may find the same port free; no cell has run
            if "before replying" not in str(error) or not left:
                raise


def glued(notebook: nbformat.NotebookNode, name: str) -> Any:
    """What an executed chapter glued under a name as a text of JSON, None if it did not.

    Raises:
        UserError: it glued something else.
    """
    texts = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        label = output.get("metadata", {}).get("scrapbook", {})
        if label.get("name") == name:
            texts.append(output["data"][label["mime_prefix"] + "text/plain"])
    if not texts:
        return None
    try:
        return json.loads(ast.literal_eval(texts[-1]))
    except (ValueError, SyntaxError, TypeError):
        raise UserError(f"{name} must be glued as a text of JSON, found {texts[-1]:.60}") from None
