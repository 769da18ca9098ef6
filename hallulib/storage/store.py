"""Trained weights and measured results, found again by their settings and checked by checksum.

A *run* is a folder with what a training wrote and a ``run.json``: its settings and which of them
differ from the defaults, the SHA-256 of every file, versions, seconds and device. The runs of
this machine lie in ``runs/`` (or where ``HALLULIB_RUNS`` says); a few ship with the library.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from hallulib import UserError, __version__
from hallulib.storage import disk, parallel
from hallulib.storage.checkpoint import CHECKPOINT, State

Settings = Mapping[str, Any]
SHIPPED = Path(__file__).parents[1] / "weights"
CARD = "run.json"
FORMAT = 2  # of keys: raised where a default changes, so that one key has one meaning


def runs_folder() -> Path:
    """Where this machine keeps its runs."""
    return Path(os.environ.get("HALLULIB_RUNS", "runs"))


def provenance() -> dict[str, str]:
    """Versions and device that a number depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "hallulib": __version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
        "device": device or platform.machine(),
    }


def load_or_train(
    name: str,
    train: Callable[..., None],
    *,
    defaults: Callable | None = None,
    together: bool = False,
    from_scratch: bool = False,
    **settings: Any,
) -> Path:
    """The folder of a finished run with these settings: found, shipped, or trained now.

    Looks, in this order, for a finished run on this machine, for shipped weights, and else calls
    ``train(folder, **settings)``, which keeps its checkpoint in ``folder`` and so goes on where
    an interrupted call stopped. Of several processes the main one looks and decides for all.

    Args:
        name: of the model; characters that do not suit a folder become hyphens.
        train: writes its model into the folder.
        defaults: the dataclass or function whose settings these are. A run is found by those
            that differ from its defaults, so that one with a default may come and go.
        together: several processes share the work of ``train``; else the main one does it.
        from_scratch: train even if such a run is there.
        settings: everything the result depends on; what JSON can hold.

    Raises:
        UserError: a file of the found run has changed, or the folder of runs cannot be written.
    """
    name = re.sub(r"[^\w-]+", "-", name)  # a name may come from a data set: it stays one folder
    usual = defaults_of(defaults) if defaults else {}
    folder = runs_folder() / f"{name}-{key(differing(settings, usual) | {'format': FORMAT})}"
    if parallel.is_main() and (folder / CARD).exists():
        # left by a run that was killed as it finished; from scratch must not go on from it
        disk.drop(folder / CHECKPOINT)
        if from_scratch:
            disk.drop(folder / CARD)
    if not from_scratch:
        if there := parallel.from_main(lambda: _found(name, folder, settings, usual)):
            return there
    with contextlib.ExitStack() as until_done:
        if parallel.is_main():
            with disk.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                # of several programs that need one model, the first trains it, the others wait
                until_done.enter_context(FileLock(folder.with_name(folder.name + ".lock")))
        missing = parallel.from_main(lambda: not is_finished(folder, settings, usual))
        if missing and (together or parallel.is_main()):
            start = time.monotonic()
            with contextlib.nullcontext() if together else parallel.alone():
                train(folder, **settings)
            if parallel.is_main():
                finish(folder, settings, time.monotonic() - start, usual)
        parallel.wait()
    return folder


def _found(name: str, folder: Path, settings: Settings, defaults: Settings) -> Path | None:
    """Where the run is finished: under its key, shipped, or under the key of another format."""
    for place in (folder, SHIPPED / name):
        if is_finished(place, settings, defaults):
            return place
    for other in sorted(runs_folder().glob(f"{name}-{'[0-9a-f]' * 12}")):
        with contextlib.suppress(UserError):  # what is damaged there is no concern of this run
            if is_finished(other, settings, defaults):
                return other
    return None


def kept(
    name: str,
    start: Callable[[Path], Iterator[State]],
    save: Callable[[State, Path], None],
    *,
    told: str,
    steps: int,
    **settings: Any,
) -> Path:
    """As `load_or_train`, of a training loop, whose steps are one of the settings: ``start`` gives
    the loop, which keeps its checkpoint in the folder, ``save`` writes what is kept of its last
    state there, and ``told`` is what the bar says.
    """

    def train(folder: Path, **_) -> None:
        state = finished(start(folder), steps, told)
        if parallel.is_main():
            save(state, folder)

    return load_or_train(name, train, together=True, steps=steps, **settings)


def finished(loop: Iterator[State], steps: int, told: str, show: bool = True) -> State:
    """The last state of a training loop, which yields it after each step, and at least once. Where
    ``show`` is true, a bar that says ``told`` follows it on the main process; ``steps`` are those
    of the whole run, not of what a checkpoint left of it.
    """
    first, hidden = next(loop), not (show and parallel.is_main())
    bar = tqdm(loop, told, steps, initial=first.step, disable=hidden)
    return functools.reduce(lambda _, state: state, bar, first)


def defaults_of(thing: Callable) -> dict[str, Any]:
    """The defaults of a function or a dataclass, none of which a factory makes."""
    parameters = inspect.signature(thing).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def differing(settings: Settings, defaults: Settings) -> dict[str, Any]:
    """Settings that are not at their defaults, those within others named as ``recipe.lr``.

    Example:
        >>> differing({"lr": 1, "seed": 0, "fit": {"margin": 2}}, {"seed": 0, "fit": {"lr": 1}})
        {'lr': 1, 'fit.margin': 2}
    """
    usual = _flat(defaults)
    return {k: v for k, v in _flat(settings).items() if k not in usual or usual[k] != v}


def _flat(settings: Settings) -> dict[str, Any]:
    """Settings as what JSON can hold, those within others named as ``recipe.lr``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            value = vars(value)
        if isinstance(value, Mapping):
            found |= {f"{name}.{within}": v for within, v in _flat(value).items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def told(of: Settings, defaults: Settings) -> dict[str, Any]:
    """Settings on a card that differ from the defaults: today's, and its own where those went."""
    settings = _flat(of["settings"])
    former = {k: v for k, v in settings.items() if k not in of["differing"]}
    return differing(settings, former | _flat(defaults))


def key(settings: Settings) -> str:
    """A short checksum of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def finish(
    folder: Path, settings: Settings, seconds: float, defaults: Mapping[str, Any] = {}
) -> None:
    """Declare a run finished: write its card at once, and only then drop its checkpoint."""
    disk.drop_partial(folder)
    content = {
        "format": FORMAT,
        "settings": settings,
        "differing": sorted(differing(settings, defaults)),
        "seconds": round(seconds, 1),
        "made_with": provenance(),
        "sha256": disk.checksums(folder, without=(CARD, CHECKPOINT)),
    }
    write_json(folder / CARD, content)
    disk.drop(folder / CHECKPOINT)


def is_finished(folder: Path, settings: Settings, defaults: Mapping[str, Any] = {}) -> bool:
    """Whether a folder holds a finished run with these settings, its files intact. A `UserError`
    if the settings agree but a file is missing or changed, or if its card is none.
    """
    if not (folder / CARD).exists():
        return False
    if told(card(folder, intact=False), defaults) != differing(settings, defaults):
        return False
    card(folder)
    return True


def card(folder: Path, intact: bool = True) -> dict[str, Any]:
    """The card of a finished run, whose files have to be what it wrote unless ``intact`` is false.
    A `UserError` if it is no card, or a file is missing or changed.
    """
    try:
        found = json.loads((folder / CARD).read_text())
        sums = dict(found["sha256"])
        found |= {"settings": dict(found["settings"]), "differing": list(found["differing"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / CARD} is not the card of a run ({type(error).__name__}); settings,"
            f" differing and sha256 are needed: delete {folder} or fetch it again"
        ) from error
    changed = intact and disk.changed(folder, sums)
    if changed:
        raise UserError(
            f"{folder / changed} is missing or is not the file that the run wrote "
            f"(SHA-256 {sums[changed][:12]}...); delete {folder} or fetch it again"
        )
    return found


def contents(folder: Path) -> str:
    """Checksum of what a finished run wrote, whenever and wherever that was."""
    return key(card(folder, intact=False)["sha256"])


def trained(name: str) -> Path:
    """The folder of a finished run that is named by where it lies, or by its name among those that
    ship; a `UserError` if it is none.
    """
    for folder in (SHIPPED / name, Path(name).expanduser()):
        if (folder / CARD).exists():
            return folder
    known = ", ".join(sorted(card.parent.name for card in SHIPPED.glob(f"*/{CARD}")))
    raise UserError(f"{name!r} is no finished training; the folder of one or {known} is needed")


def ship(folder: Path, name: str) -> Path:
    """Copy a finished run of this machine to the weights that travel with the library."""
    return Path(shutil.copytree(folder, SHIPPED / name, dirs_exist_ok=True))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write CSV beside its place and rename it, so that no reader sees half of it."""
    with disk.whole(path) as partial:
        table.to_csv(partial, index=False)


def write_json(path: Path, content: Settings) -> None:
    """Write JSON beside its place and rename it, so that no reader sees half of it."""
    with disk.whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
