"""The parameters of a chapter: one call refuses misspelt names and impossible values.

It also makes relative paths start at the root of the project, as they do under papermill and
``make``: JupyterLab and Binder start a kernel in the folder of its notebook.
"""

import ast
import difflib
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hallulib import UserError

BOOK = Path(__file__).resolve().parents[1] / "book"
SEEDS = (0, 2**32 - 1)  # all that torch, NumPy and scikit-learn take
Rule = type | tuple | set | frozenset | list

# Only plain values can be parameters: a class such as VPSDE has a capital name too.
_PLAIN = (str, int, float, bool, list, dict, type(None))


def check(namespace: Mapping[str, Any], **declared: Rule) -> None:
    """Stop the run with one sentence if a parameter is misspelt or impossible.

    A kernel that was started in the folder of the chapters is moved to the root of the project.

    A rule is one of

    * ``str`` (text that is not empty) or ``bool``;
    * ``(low, high)``, both included, ``None`` for an open end: a whole number if every end that is
      given is an ``int``, any finite number otherwise;
    * a set or list of the allowed values.

    Args:
        namespace: ``globals()`` of the notebook. Looked at are all names in capitals that hold a
            plain value, and whatever papermill injected, in capitals or not.
        **declared: ``NAME=rule``, one for each parameter of the chapter.

    Raises:
        UserError: naming the parameter, what was found and what is allowed.

    Example:
        >>> check({"STEPS": 20, "SCHEME": "isup"}, STEPS=(1, 10_000), SCHEME={"isup", "grade2"})
        >>> check({"STEPS": 0}, STEPS=(1, None))
        Traceback (most recent call last):
        hallulib.UserError: parameter STEPS = 0 must be a whole number of at least 1
    """
    if Path.cwd() in (BOOK, BOOK / "grids"):
        os.chdir(BOOK.parent)
    for name in sorted(_capitals(namespace) | _injected(namespace)):
        if name not in declared:
            raise UserError(unknown(name, declared))
    for name, rule in declared.items():
        if name not in namespace:
            raise UserError(f"parameter {name} is checked but not set in the parameters cell")
        if not _allows(rule, namespace[name]):
            raise UserError(f"parameter {name} = {namespace[name]!r} must be {_describe(rule)}")


def unknown(name: str, known: Collection[str]) -> str:
    """The sentence about a name that is no parameter, with the nearest that is one.

    Example:
        >>> unknown("STPES", ["SEED", "STEPS"])
        'unknown parameter STPES; did you mean STEPS? known: SEED, STEPS'
    """
    near = difflib.get_close_matches(name.upper(), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown parameter {name}; {hint}known: {', '.join(known)}"


def _capitals(namespace: Mapping[str, Any]) -> set[str]:
    return {
        name
        for name, value in namespace.items()
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and isinstance(value, _PLAIN)
    }


def _injected(namespace: Mapping[str, Any]) -> set[str]:
    """Names set in the cell that papermill inserts; IPython keeps all sources in In."""
    cells = [source for source in namespace.get("In", ()) if source.startswith("# Parameters\n")]
    return {
        target.id
        for source in cells
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _allows(rule: Rule, value: Any) -> bool:
    if rule is str:
        return isinstance(value, str) and value.strip() != ""
    if rule is bool:
        return isinstance(value, bool)
    if isinstance(rule, tuple):
        return _in_range(rule, value)
    if isinstance(rule, Collection):
        # True == 1 == 1.0 in Python, but not for a reader
        return any(type(value) is type(allowed) and value == allowed for allowed in rule)
    raise TypeError(f"{rule!r} is no rule: give str, bool, (low, high) or the allowed values")


def _in_range(ends: tuple, value: Any) -> bool:
    low, high = ends
    number = isinstance(value, int if _whole(ends) else (int, float))
    if not number or isinstance(value, bool) or not math.isfinite(value):
        return False
    return (low is None or low <= value) and (high is None or value <= high)


def _whole(ends: tuple) -> bool:
    return all(isinstance(end, int) for end in ends if end is not None)


def _describe(rule: Rule) -> str:
    if rule is str:
        return "text that is not empty (papermill: -r instead of -p keeps digits as text)"
    if rule is bool:
        return "True or False"
    if isinstance(rule, tuple):
        return ("a whole number" if _whole(rule) else "a finite number") + _span(*rule)
    values = sorted(rule, key=repr) if isinstance(rule, set | frozenset) else rule
    return "one of " + ", ".join(map(repr, values))


def _span(low: int | float | None, high: int | float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"
