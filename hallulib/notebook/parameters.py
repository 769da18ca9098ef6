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
Rule = type | tuple | set | frozenset | list

# Only plain values can be parameters: a class such as VPSDE has a capital name too.
_PLAIN = (str, int, float, bool, list, dict, type(None))


def check(namespace: Mapping[str, Any], **declared: Rule) -> None:
    """Stop the run with one sentence if a parameter is misspelt or impossible.

    A kernel that JupyterLab or Binder started in the folder of its notebook is moved to the root
    of the project, where relative paths start under papermill and ``make``.

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
        os.chdir(ROOT)
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
    plain = (name for name, value in namespace.items() if isinstance(value, _PLAIN))
    return {name for name in plain if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)}


def _injected(namespace: Mapping[str, Any]) -> set[str]:
    """Names set in the cell that papermill inserts; IPython keeps all sources in In."""
    sources = (s for s in namespace.get("In", ()) if s.startswith("# Parameters\n"))
    return {name for source in sources for name, _ in _assigned(source)}


def _assigned(source: str) -> Iterator[tuple[str, ast.expr]]:
    """Name and expression of each plain assignment."""
    for line in ast.parse(source).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, line.value


def _allows(rule: Rule, value: Any) -> bool:
    if rule is str:
        return isinstance(value, str) and value.strip() != ""
    if isinstance(rule, tuple):
        low, high = rule
        number = isinstance(value, int if _whole(rule) else (int, float))
        if not number or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (low is None or low <= value) and (high is None or value <= high)
    # True == 1 == 1.0 in Python, but not for a reader
    allowed = (True, False) if rule is bool else rule
    return any(type(value) is type(one) and value == one for one in allowed)


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


def chapters(source: Path) -> list[Path]:
    """The notebooks of the book, in reading order."""
    return sorted(source.glob("[0-9][0-9]_*.ipynb"))


def own_values(chapter: Path) -> dict[str, Any]:
    """Name and value of the parameters that the chapter itself sets.

    Raises:
        UserError: one is an expression, so that its value is known only when the chapter runs.
    """
    cells = nbformat.read(chapter, 4).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", ())), "")
    values = {}
    for name, expression in _assigned(source):
        try:
            values[name] = ast.literal_eval(expression)
        except ValueError:
            text = f"{name} = {ast.unparse(expression)}"
            raise UserError(f"{text} in {chapter.name} is no plain value") from None
    return values


def declared(chapter: Path) -> dict[str, Rule]:
    """The rules in the chapter's call of ``parameters.check`` that are plain expressions."""
    sources = [c.source for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]
    rules = {}
    for source in (s for s in sources if "parameters.check(" in s):
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "parameters.check":
                rules |= {word.arg: _plain(word.value) for word in call.keywords}
    return {name: rule for name, rule in rules.items() if rule is not None}


def _plain(expression: ast.expr) -> Rule | None:
    named = {"str": str, "bool": bool, "parameters.SEEDS": SEEDS}
    try:
        return named.get(ast.unparse(expression)) or ast.literal_eval(expression)
    except ValueError:
        return None


def check_before(chapter: str, rules: Mapping[str, Rule], chosen: Mapping[str, Any]) -> None:
    """Apply the `declared` rules of a chapter to some of its parameters.

    Raises:
        UserError: naming the chapter, the parameter, what was found and what is allowed.
    """
    named = {name: rules[name] for name in chosen if name in rules}
    try:
        check({name: chosen[name] for name in named}, **named)
    except UserError as error:
        raise UserError(f"{chapter}: {error}") from None


def of_chapters(file: Path | None, pairs: list, source: Path) -> dict[str, dict]:
    """The parameters chosen for each chapter, checked before anything runs.

    Args:
        file: YAML with ``NAME: value`` for all chapters that have NAME, and under the name of a
            chapter a mapping for that chapter alone.
        pairs: ``[name, text]`` from the command line; they win over the file.
        source: folder of the chapters.

    Raises:
        UserError: if a name is a parameter of no chapter, or a value is impossible.
    """
    given = read_yaml(file) if file else {}
    given |= {name: parse_yaml(text, f"-p {name}") for name, text in pairs}
    alone = {name: value for name, value in given.items() if isinstance(value, dict)}
    shared = {name: value for name, value in given.items() if name not in alone}
    own = {chapter.stem: own_values(chapter) for chapter in chapters(source)}
    for name in alone.keys() - own.keys():
        raise UserError(f"{file} has settings for {name}; the chapters are {', '.join(own)}")
    all_names = dict.fromkeys(name for values in own.values() for name in values)
    for known, names in [(all_names, shared), *((own[name], alone[name]) for name in alone)]:
        for name in names:
            if name not in known:
                raise UserError(unknown(str(name), known))
    chosen = {
        chapter: {name: value for name, value in shared.items() if name in values}
        | alone.get(chapter, {})
        for chapter, values in own.items()
    }
    for chapter in chapters(source):
        check_before(chapter.stem, declared(chapter), chosen[chapter.stem])
    return chosen


# YAML 1.1, which PyYAML reads, takes 010 for 8, 1:04 for 64, no for False and 1e-3 for text, and
# of a name that occurs twice it keeps the last value without a word. Here a value is what it
# looks like: numbers as in Python, true and false, null, and text.
DEEPEST = 20  # lists in lists
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_WHOLE = "(?:0|[1-9][0-9]*(?:_[0-9]+)*)"  # 010 is a name: eight to some readers, ten to others
_FORMS = {
    "null": "(?:~|null|Null|NULL)?",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": f"[-+]?{_WHOLE}",
    "float": rf"[-+]?(?:{_WHOLE}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # PyYAML's own; those of _FORMS take their place
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse what stands for more, or for something else, than is written there."""
        event = self.peek_event()
        # sixty lines of aliases of aliases stand for more values than any memory holds
        if isinstance(event, yaml.AliasEvent) or self.depth > DEEPEST:
            raise ValueError(f"an alias, *NAME, or lists {DEEPEST} deep; plain values needed")
        if event.tag is not None:
            raise ValueError(f"a tag, {event.tag}; plain values needed")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

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


for _tag, _form in _FORMS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), first=None
    )


def read_yaml(file: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the parameters in {file}: {error}") from error
    given = parse_yaml(text, str(file))
    if not isinstance(given, dict):
        raise UserError(f"{file} must hold lines NAME: value, found {type(given).__name__}")
    return given


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a text: no alias, no tag, no name set twice.

    Args:
        text: YAML.
        where: what it is called in messages.

    Raises:
        UserError: it is something else.

    Example:
        >>> parse_yaml("{STEPS: 1_000, RATE: 1e-3, DATASET: 010, AT: 1:04}", "here")
        {'STEPS': 1000, 'RATE': 0.001, 'DATASET': '010', 'AT': '1:04'}
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # PyYAML and int throw nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the parameters in {where}: {reason}") from error
