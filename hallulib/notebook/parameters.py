"""The parameters of chapters: misspelt names and impossible values are refused by name.

A chapter checks its own with one call of `check`. Whoever runs chapters (the book, a grid) reads
parameters and rules out of the notebook, and so refuses a wrong value before anything runs.
"""

import ast
import difflib
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from hallulib import UserError

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
SEEDS = (0, 2**32 - 1)  # all that torch, NumPy and scikit-learn take
PLAIN = (str, int, float, list, dict, type(None))  # a class such as VPSDE is no parameter
Rule = type[str] | type[bool] | tuple


def check(namespace: Mapping[str, Any], **declared: Rule) -> None:
    """Stop the run with one sentence if a parameter is misspelt or impossible.

    The ``namespace`` is ``globals()`` of the notebook. Looked at are all names in capitals that
    hold a plain value, and whatever papermill injected. A kernel that JupyterLab or Binder started
    in the folder of its notebook is moved to the root of the project, where relative paths start
    under papermill and ``make``.

    Each parameter of the chapter is ``declared`` as ``NAME=rule``, and a rule is one of

    * ``str`` (text that is not empty) or ``bool``;
    * ``(low, high)``, both included, or ``(low, None)``: a whole number if every end that is given
      is an ``int``, any finite number otherwise.

    Raises:
        UserError: naming the parameter, what was found and what is allowed.

    Example:
        >>> check({"STEPS": 20, "SCHEME": "isup"}, STEPS=(1, 10_000), SCHEME=str)
        >>> check({"STEPS": 0}, STEPS=(1, None))
        Traceback (most recent call last):
        hallulib.UserError: parameter STEPS = 0 must be a whole number of at least 1
    """
    if Path.cwd() in (BOOK, BOOK / "grids"):
        os.chdir(ROOT)
    plain = {name for name, value in namespace.items() if isinstance(value, PLAIN)}
    capitals = {name for name in plain if re.fullmatch("[A-Z][A-Z0-9_]*", name)}
    # papermill inserts a cell, and IPython keeps the sources of all cells in In
    cells = (source for source in namespace.get("In", ()) if source.startswith("# Parameters\n"))
    injected = {name for source in cells for name, _ in _assigned(source)}
    for name in sorted(capitals | injected):
        if name not in declared:
            raise UserError(unknown(name, declared))
    for name, rule in declared.items():
        if needed := _needed(rule, namespace[name]):
            raise UserError(f"parameter {name} = {namespace[name]!r} must be {needed}")


def unknown(name: str, known: Collection[str]) -> str:
    """The sentence about a name that is no parameter, with the nearest that is one."""
    near = difflib.get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown parameter {name}; {hint}known: {', '.join(known)}"


def _assigned(source: str) -> Iterator[tuple[str, ast.expr]]:
    """Name and expression of each plain assignment."""
    for line in ast.parse(source).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, line.value


def _needed(rule: Rule, value: Any) -> str:
    """What a value must be by the rule that it breaks, or nothing."""
    if isinstance(rule, type):
        suits = isinstance(value, rule) and str(value).strip() != ""
        text = "text that is not empty (papermill: -r instead of -p keeps digits as text)"
        told = text if rule is str else "True or False"
    else:
        low, high = rule
        whole = all(isinstance(end, int) for end in rule if end is not None)
        # True is an int in Python
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        suits = number and low <= value < math.inf and (high is None or value <= high)
        told = "a whole number" if whole else "a finite number"
        told += f" of at least {low}" if high is None else f" from {low} to {high}"
    return "" if suits else told


def chapters(source: Path) -> list[Path]:
    """The notebooks of the book, in reading order."""
    return sorted(source.glob("[0-9][0-9]_*.ipynb"))


def own_values(chapter: Path) -> dict[str, Any]:
    """Name and value of the parameters that the chapter itself sets, plain values all of them."""
    cells = nbformat.read(chapter, 4).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", ())), "")
    return {name: ast.literal_eval(expression) for name, expression in _assigned(source)}


def declared(chapter: Path) -> dict[str, Rule]:
    """The rules in the chapter's call of ``parameters.check``, which are plain expressions."""
    named: dict[str, Rule] = {"str": str, "bool": bool, "parameters.SEEDS": SEEDS}
    code = (c.source for c in nbformat.read(chapter, 4).cells if c.cell_type == "code")
    trees = [ast.parse(source) for source in code if "parameters.check(" in source]
    rules: dict[str, Rule] = {}
    for call in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parameters.check":
            for word in call.keywords:
                text = ast.unparse(word.value)
                rules[str(word.arg)] = named.get(text) or ast.literal_eval(text)
    return rules


def check_before(chapter: str, rules: Mapping[str, Rule], chosen: Mapping[str, Any]) -> None:
    """Apply the `declared` rules of a chapter to some of its parameters, as `check` does."""
    named = {name: rules[name] for name in chosen if name in rules}
    try:
        check({name: chosen[name] for name in named}, **named)
    except UserError as error:
        raise UserError(f"{chapter}: {error}") from None


# YAML 1.1, which PyYAML reads, takes 010 for 8, 1:04 for 64, no for False and 1e-3 for text, and
# of a name that occurs twice it keeps the last value without a word. Here a value is what it
# looks like: numbers as in Python, true and false, null, and text.
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_WHOLE = "(?:0|[1-9][0-9]*(?:_[0-9]+)*)"  # 010 is a name: eight to some readers, ten to others
_FORMS = (
    ("null", "(?:~|null)?"),
    ("bool", "true|True|false|False"),
    ("int", f"[-+]?{_WHOLE}"),
    ("float", rf"[-+]?(?:{_WHOLE}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"),
)


class _Loader(yaml.SafeLoader):
    # by the first letter of a value, None for any: these forms alone, and none of PyYAML's own
    yaml_implicit_resolvers = {
        None: [(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{form})\Z")) for tag, form in _FORMS]
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuse an alias: sixty lines of them stand for more values than any memory holds."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("an alias, *NAME, found; plain values are needed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a name that is set twice."""
        names = set()
        for given, _ in node.value:
            name = self.construct_object(given, deep=True)
            if name in names:
                line = given.start_mark.line + 1
                raise ValueError(f"{name} is set again in line {line}; one value is needed")
            names.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict:
    """The mapping in a YAML file, read as by `parse_yaml`."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the parameters in {file}: {error}") from error
    given = parse_yaml(text, str(file))
    if not isinstance(given, dict):
        raise UserError(f"{file} must hold lines NAME: value, found {type(given).__name__}")
    return given


def parse_yaml(text: str, where: str) -> Any:
    """The value of a text of YAML that sets no name twice and has no alias; else, and of an
    unreadable text, a `UserError`. ``where`` tells the user which text.

    Example:
        >>> parse_yaml("{STEPS: 1_000, RATE: 1e-3, DATASET: 010, AT: 1:04}", "here")
        {'STEPS': 1000, 'RATE': 0.001, 'DATASET': '010', 'AT': '1:04'}
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # PyYAML and int throw nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the parameters in {where}: {reason}") from error
