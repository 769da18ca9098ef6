"""Trained weights and measured results, found again by their settings and checked by checksum.

A *run* is a folder with what a training wrote and a ``run.json``: its settings, the SHA-256 of
every file, versions, seconds and device. The runs of this machine lie in ``runs/`` (or where
``HALLULIB_RUNS`` says); a few ship with the library.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from hallulib import UserError, __version__, disk, parallel
from hallulib.checkpoint import CHECKPOINT

SHIPPED = Path(__file__).parent / "weights"
CARD = "run.json"


def runs_folder() -> Path:
    """Where this machine keeps its runs."""
    return Path(os.environ.get("HALLULIB_RUNS", "runs"))


def results_folder() -> Path:
    """Where chapters write down their numbers; each cell of a grid has a folder of its own."""
    return Path(os.environ.get("HALLULIB_RESULTS", runs_folder() / "results"))


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
    together: bool = False,
    from_scratch: bool = False,
    **settings,
) -> Path:
    """The folder of a finished run with these settings: found, shipped, or trained now.

    Looks, in this order, for a finished run on this machine, for shipped weights, and else calls
    ``train(folder, **settings)``, which keeps its checkpoint in ``folder`` and so goes on where
    an interrupted call stopped. Of several processes that `accelerate launch` started, the main
    one looks and decides for all.

    Args:
        name: of the model; characters that do not suit a folder become hyphens.
        train: writes its model into the folder it is given.
        together: several processes share the work of ``train``; else the main one does it.
        from_scratch: train even if a finished run or shipped weights are there.
        settings: everything the result depends on; what JSON can hold.

    Raises:
        UserError: a file of the found run differs from its checksum, or the folder of the runs
            cannot be written.
    """
    name = re.sub(r"[^\w-]+", "-", name)  # a name may come from a data set: it stays one folder
    folder = runs_folder() / f"{name}-{key(settings)}"
    if parallel.is_main() and (folder / CARD).exists():
        # left by a run that was killed as it finished; from scratch must not go on from it
        disk.drop(folder / CHECKPOINT)
        if from_scratch:
            disk.drop(folder / CARD)
    places = () if from_scratch else (folder, SHIPPED / name)
    found = parallel.from_main(lambda: _first_finished(places, settings))
    if found < len(places):
        return places[found]
    with _locked(folder):
        if parallel.from_main(lambda: from_scratch or not is_finished(folder, settings)):
            _train(folder, train, settings, together)
        parallel.wait()
    return folder


def _first_finished(places: Sequence[Path], settings: dict) -> int:
    """Position of the first place that holds the run, the number of places if none does."""
    finished = (i for i, place in enumerate(places) if is_finished(place, settings))
    return next(finished, len(places))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of several programs that need one model, the first trains it and the others wait."""
    if not parallel.is_main():
        yield
        return
    with disk.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + ".lock")).acquire()
    with lock:
        yield


def _train(folder: Path, train: Callable[..., None], settings: dict, together: bool) -> None:
    if not (together or parallel.is_main()):
        return
    start = time.monotonic()
    with contextlib.nullcontext() if together else parallel.alone():
        train(folder, **settings)
    if parallel.is_main():
        finish(folder, settings, time.monotonic() - start)


def key(settings: dict) -> str:
    """A short checksum of what JSON can hold."""
    canonical = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def finish(folder: Path, settings: dict, seconds: float) -> None:
    """Declare a run finished: write its card at once, and only then drop its checkpoint."""
    disk.drop_partial(folder)
    card = {
        "settings": settings,
        "seconds": round(seconds, 1),
        "made_with": provenance(),
        "sha256": disk.checksums(folder, without=(CARD, CHECKPOINT)),
    }
    write_json(folder / CARD, card)
    disk.drop(folder / CHECKPOINT)


def is_finished(folder: Path, settings: dict) -> bool:
    """Whether a folder holds a finished run with exactly these settings, its files intact.

    Raises:
        UserError: the settings agree but a file is missing or changed.
    """
    if not (folder / CARD).exists():
        return False
    try:
        card = json.loads((folder / CARD).read_text())
        found, sums = card["settings"], dict(card["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / CARD} is not the card of a run ({type(error).__name__}); settings and"
            f" sha256 are needed: delete {folder} or fetch it again"
        ) from error
    if key(found) != key(settings):
        return False
    changed = disk.changed(folder, sums)
    if changed:
        raise UserError(
            f"{folder / changed} is missing or is not the file that the run wrote "
            f"(SHA-256 {sums[changed][:12]}...); delete {folder} or fetch it again"
        )
    return True


def contents(folder: Path) -> str:
    """Checksum of what a finished run wrote, whenever and wherever that was."""
    return key(json.loads((folder / CARD).read_text())["sha256"])


def ship(folder: Path, name: str) -> Path:
    """Copy a finished run of this machine to the weights that travel with the library."""
    shutil.copytree(folder, SHIPPED / name, dirs_exist_ok=True)
    return SHIPPED / name


class Ledger:
    """The numbers that a chapter measured, each kept with what it takes to trust it.

    Args:
        chapter: folder below `results_folder` for one JSON file per number.
        seed: of the chapter.
        settings: parameters of the chapter that its numbers depend on.
    """

    def __init__(self, chapter: str, *, seed: int, **settings):
        self.chapter, self.seed, self.settings = chapter, seed, settings
        self.measured: dict[str, dict] = {}
        self._since = time.monotonic()

    def keep(
        self,
        name: str,
        value: float,
        *,
        n: int,
        low: float | None = None,
        high: float | None = None,
        **settings,
    ) -> None:
        """Write down a number; the seconds it took run from the one before.

        Args:
            name: of the number.
            value: the number.
            n: how many things it was measured on.
            low: lower end of its 95 % interval, where it has one.
            high: upper end.
            settings: of this measurement alone.
        """
        value, low, high = (None if v is None or v != v else float(v) for v in (value, low, high))
        now = time.monotonic()
        self.measured[name] = {"value": value, "low": low, "high": high, "n": n}
        told = {"seed": self.seed, "settings": self.settings | settings}
        told |= {"seconds": round(now - self._since, 2), "made_with": provenance()}
        path = results_folder() / self.chapter / f"{name}.json"
        write_json(path, self.measured[name] | told)
        self._since = now

    def values(self) -> dict[str, float]:
        """Name and value of every number, to be glued into the text."""
        return {name: row["value"] for name, row in self.measured.items()}

    def table(self) -> pd.DataFrame:
        """One row per number: value, ends of its interval, n."""
        return pd.DataFrame(self.measured).T.rename_axis("number").astype(float)


def write_json(path: Path, content: dict) -> None:
    """Write JSON beside its place and rename it, so that no reader sees half of it."""
    with disk.whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
