"""YAML in which a value is what it looks like, for the files that users write.

YAML 1.1, which PyYAML reads, takes ``010`` for 8, ``1:04`` for 64, ``no`` for False and ``1e-3``
for text, and of a name that occurs twice it keeps the last value without a word.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from hallulib import UserError

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
    """Numbers as in Python, true and false, null, and text: nothing else has a meaning."""

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


def read(file: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the parameters in {file}: {error}") from error
    given = parse(text, str(file))
    if not isinstance(given, dict):
        raise UserError(f"{file} must hold lines NAME: value, found {type(given).__name__}")
    return given


def parse(text: str, where: str) -> Any:
    """The plain value of a text: no alias, no tag, no name set twice.

    Args:
        text: YAML.
        where: what it is called in messages.

    Raises:
        UserError: it is something else.

    Example:
        >>> parse("{STEPS: 1_000, RATE: 1e-3, DATASET: 010, AT: 1:04}", "here")
        {'STEPS': 1000, 'RATE': 0.001, 'DATASET': '010', 'AT': '1:04'}
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # PyYAML and int throw nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the parameters in {where}: {reason}") from error
