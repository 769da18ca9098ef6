"""Score-based diffusion for medical images with few labels: the library of the book."""

import importlib
from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"


class UserError(Exception):
    """A fault in what the user gave: what was found, what is needed, and in which file.

    Command lines print this sentence and exit with 2; notebooks show it without a stack trace.
    """

    def _render_traceback_(self):
        return [f"UserError: {self}"]


def lazily(room: str, **modules: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a room, a dotted name, which imports a module when one of its names
    is asked for; ``modules`` maps a module to its names, separated by spaces.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{room}.{places[name]}"), name)

    return find


ESTIMATORS = {  # they fit, predict and go into pipelines as any of scikit-learn's
    "augment.estimator": "SyntheticAugmenter",
    "likelihood.estimator": "ScoreClassifier",
    "oneshot.estimator": "OneShotClassifier",
}
__getattr__ = lazily(__name__, **ESTIMATORS)
