"""Settings as dataclasses: what they may be, and how a short text makes one set from another."""

import dataclasses
import math
import re
import typing
from collections.abc import Collection, Mapping
from typing import TypeVar

from hallulib import UserError

Settings = TypeVar("Settings")


def check_least(settings: object, **least: float | int) -> None:
    """Refuse numbers that are too small, infinite or no numbers.

    Args:
        settings: holds them as attributes.
        least: name of each and the least it may be.

    Raises:
        UserError: one of them is less.
    """
    for name, low in least.items():
        if not low <= getattr(settings, name) < math.inf:
            raise UserError(f"{name} is {getattr(settings, name)}; at least {low} is needed")


def check_known(settings: object, **known: Collection[str]) -> None:
    """Refuse names that nobody knows.

    Args:
        settings: holds them as attributes.
        known: name of each and the values it may have.

    Raises:
        UserError: one of them is another.
    """
    for name, values in known.items():
        if getattr(settings, name) not in values:
            raise UserError(f"{name} is {getattr(settings, name)!r}; known: {', '.join(values)}")


def vary(standard: Settings, changes: Mapping[str, object] | str) -> Settings:
    """The same settings with other values of some, of those held within them too.

    Args:
        standard: a dataclass, which may hold others, as `Trial` holds its recipe and its fit.
        changes: name -> value, or a text such as ``"guidance_scale=4 loss=cross_entropy"`` (a
            colon does as well); ``"nothing"`` changes nothing. Of two settings of one name the
            last held is meant; ``recipe.lr`` names the part as well.

    Raises:
        UserError: an unknown name, a value of the wrong kind, or settings that do not go together.

    Example:
        >>> from hallulib.trial import Trial
        >>> vary(Trial("isup", "isup"), "guidance_scale=4 loss=cross_entropy").fit.loss
        'cross_entropy'
    """
    held = {field.name: getattr(standard, field.name) for field in dataclasses.fields(standard)}
    parts = {"": standard} | {n: v for n, v in held.items() if dataclasses.is_dataclass(v)}
    known = {
        key: (part, field)
        for part, inside in parts.items()
        for field in dataclasses.fields(inside)
        for key in (field.name, f"{part}.{field.name}" if part else field.name)
        if key not in parts
    }
    new: dict[str, dict[str, object]] = {part: {} for part in parts}
    for name, value in (_pairs(changes) if isinstance(changes, str) else changes).items():
        if name not in known:
            names = ", ".join(sorted(key for key in known if "." not in key))
            raise UserError(f"no setting {name!r} to vary; known: {names}")
        part, field = known[name]
        new[part][field.name] = _like(field, value, getattr(parts[part], field.name))
    for part in parts:
        if part:
            new[""][part] = dataclasses.replace(parts[part], **new[part])
    return dataclasses.replace(standard, **new[""])


def _pairs(changes: str) -> dict[str, str]:
    words = [] if changes == "nothing" else changes.split()
    pairs = [re.fullmatch(r"([\w.]+)[=:](\S+)", word) for word in words]
    if not all(pairs):
        raise UserError(
            f"settings to vary are {changes!r}; 'name=value name=value' or 'nothing' is needed"
        )
    return {pair[1]: pair[2] for pair in pairs}


def _like(field: dataclasses.Field, value: object, old: object) -> object:
    """A value, or its text, as the kind of thing that the setting holds."""
    kinds = typing.get_args(field.type) or (field.type,)
    kind = float if float in kinds else kinds[0]
    text = str(value)
    try:
        if isinstance(old, tuple):
            parts = text.strip("()[]").rstrip(",")
            return tuple(_read(part, kind) for part in re.split(r",\s*", parts) if parts)
        return _read(text, kind)
    except (ValueError, KeyError):
        raise UserError(
            f"setting {field.name} = {text!r}; a value like {old!r} is needed"
        ) from None


def _read(text: str, kind: type) -> object:
    """A text as a value of a kind; ValueError or KeyError if it is none."""
    if kind is bool:
        return {"True": True, "False": False}[text]
    if kind is str:
        return text
    number = float(text)
    if not (math.isfinite(number) and kind(number) == number):
        raise ValueError
    return kind(number)
