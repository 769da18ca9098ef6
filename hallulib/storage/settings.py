"""Settings as dataclasses: what they may be, and how a short text makes one set from another."""

import dataclasses
import functools
import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from hallulib import UserError

Settings = TypeVar("Settings")
Real = float | int


def needed(sentence: str, **bounds: Any) -> Any:
    """What a setting must be besides its type; the sentence ends the refusal of what is not."""
    return Field(description=sentence, **bounds)


def one_of(names: Collection[str]) -> Any:
    """Of a setting that is one of these names."""
    return needed(f"known: {', '.join(names)}", pattern=f"^({'|'.join(names)})$")


Count = Annotated[int, needed("at least 0 is needed", ge=0)]
Positive = Annotated[int, needed("at least 1 is needed", ge=1)]
Several = Annotated[int, needed("at least 2 is needed", ge=2)]
# of networks that norm groups of channels
Width = Annotated[int, needed("a multiple of 8 is needed", ge=8, multiple_of=8)]
# NumPy, PyTorch and scikit-learn all take these
Seed = Annotated[int, needed("at least 0 is needed, and at most 2**32 - 1", ge=0, le=2**32 - 1)]
Amount = Annotated[Real, needed("at least 0 is needed", ge=0)]
Above0 = Annotated[Real, needed("a number above 0 is needed", gt=0)]
Share = Annotated[Real, needed("0 to 1 is needed", ge=0, le=1)]
ShareAbove0 = Annotated[Real, needed("above 0 to 1 is needed", gt=0, le=1)]
ShareBelow1 = Annotated[Real, needed("0 to below 1 is needed", ge=0, lt=1)]
Confidence = Annotated[Real, needed("0.5 to 1 is needed", ge=0.5, le=1)]
Folder = Annotated[Path | str | None, needed("a folder or None is needed")]
# where the kind itself is another
NEEDED = {
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
    "bool_type": "True or False is needed",
    "string_type": "text is needed",
    "tuple_type": "a tuple is needed",
}


def check(settings: Any) -> None:
    """Refuse settings that are not of the kinds that their class declares.

    A dataclass or any object with annotated attributes will do, and may hold NumPy's numbers.
    Nothing is converted: ``"2"``, ``True`` and ``2.5`` are no whole numbers, infinity no number.

    Raises:
        UserError: naming the first that is not, what it is and what is needed.

    Example:
        >>> from hallulib.oneshot.hallucinate import Recipe
        >>> Recipe(copies=0)
        Traceback (most recent call last):
        hallulib.UserError: copies is 0; at least 1 is needed
    """
    kinds = _kinds(settings.__class__)
    values = {name: getattr(settings, name) for name in kinds.model_fields}
    values |= {k: v.item() for k, v in values.items() if isinstance(v, np.generic)}
    try:
        kinds(**values)
    except ValidationError as faults:
        fault = faults.errors()[0]
        name = str(fault["loc"][0])
        wanted = NEEDED.get(fault["type"], kinds.model_fields[name].description)
        raise UserError(f"{name} is {values[name]!r}; {wanted}") from None


@functools.cache
def _kinds(settings: type) -> type[BaseModel]:
    """What a class declares, as that which can check it."""
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = typing.get_type_hints(settings, include_extras=True)
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in hints.items()}
    return create_model(settings.__name__, __config__=strict, **fields)


def vary(standard: Settings, changes: Mapping[str, object] | str) -> Settings:
    """The same settings with other values of some, of those held within them too.

    The ``standard`` is a dataclass, which may hold others, as `Trial` holds its recipe and its
    fit. The ``changes`` are name -> value, or a text as below (a colon does as well);
    ``"nothing"`` changes nothing. Of two settings of one name the last held is meant;
    ``recipe.lr`` names the part as well.

    Raises:
        UserError: an unknown name, a value of the wrong kind, or settings that do not go together.

    Example:
        >>> from hallulib.oneshot.experiment import Trial
        >>> vary(Trial("isup", "isup"), "guidance_scale=4 loss=cross_entropy").fit.loss
        'cross_entropy'
    """
    held: dict[str, Any] = {"": standard}
    held |= {name: part for name, part in vars(standard).items() if dataclasses.is_dataclass(part)}
    known = {}
    for place, part in held.items():
        for name in vars(part).keys() - held:
            known[name] = known[f"{place}.{name}".lstrip(".")] = (place, name)
    new: dict[str, dict[str, object]] = {place: {} for place in held}
    for name, value in (_pairs(changes) if isinstance(changes, str) else changes).items():
        if name not in known:
            names = ", ".join(sorted(key for key in known if "." not in key))
            raise UserError(f"no setting {name!r} to vary; known: {names}")
        place, own = known[name]
        try:
            new[place][own] = _read(str(value), typing.get_type_hints(type(held[place]))[own])
        except (ValueError, KeyError):
            told = f"setting {own} = {str(value)!r}; a value like {getattr(held[place], own)!r}"
            raise UserError(f"{told} is needed") from None
    parts = {place: dataclasses.replace(held[place], **new[place]) for place in held if place}
    return dataclasses.replace(held[""], **parts, **new[""])


def _pairs(changes: str) -> dict[str, str]:
    words = [] if changes == "nothing" else changes.split()
    pairs = [re.split("[=:]", word, maxsplit=1) for word in words]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(
            f"settings to vary are {changes!r}; 'name=value name=value' or 'nothing' is needed"
        )
    return dict(pairs)


def _read(text: str, hint: Any) -> object:
    """A text as what a setting is declared as; ValueError or KeyError if it is none."""
    kind = (*typing.get_args(hint), hint)[0]
    if typing.get_origin(hint) is tuple:
        parts = text.strip("()[]").rstrip(",")
        return tuple(_read(part, kind) for part in re.split(r",\s*", parts) if parts)
    if kind is str:
        return text
    if kind is bool:
        return {"True": True, "False": False}[text]
    number = float(text)
    if kind is int and not number.is_integer():
        raise ValueError
    return kind(number)
