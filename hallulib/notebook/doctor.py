"""The doctor: what is installed here, what is wrong with it, and what each chapter took.

``python -m hallulib doctor`` ends with status 1 if something is wrong.
"""

import importlib.metadata
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import nbformat
from packaging.requirements import Requirement

from hallulib import UserError
from hallulib.notebook import parameters
from hallulib.storage import disk, store

LOCK = parameters.ROOT / "requirements.lock"


def pins(lock: Path) -> dict[str, str]:
    """Name and version of the packages that a lock file asks for on this machine."""
    try:
        lines = lock.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the pinned versions in {lock}: {error.strerror}") from None
    found = [Requirement(line.removesuffix("\\")) for line in lines if line[:1].isalnum()]
    here = [pin for pin in found if not pin.marker or pin.marker.evaluate({"extra": ""})]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in here}


def faults() -> Iterator[str]:
    """What is wrong here, one sentence each; a `UserError` if there is no lock file."""
    for name, wanted in pins(LOCK).items():
        try:
            # a build for another device has a suffix, as in 2.14.1+cpu
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            yield f"the package {name} is {found}; {wanted} is pinned in {LOCK.name}: make env"
    for folder in sorted(path for path in store.SHIPPED.iterdir() if path.is_dir()):
        try:
            store.card(folder)
        except UserError as error:
            yield str(error)
    runs = store.runs_folder()
    try:
        with disk.writing(runs):
            runs.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=runs).close()
    except UserError as error:
        yield f"{error}; HALLULIB_RUNS names another"


def costs() -> Iterator[tuple[str, float | None]]:
    """Chapter, and the seconds that it took when `make book` last executed it here."""
    for chapter in parameters.chapters(parameters.ROOT / "book"):
        page = parameters.ROOT / "_build" / "book" / chapter.name
        built = nbformat.read(page, 4).metadata if page.exists() else {}
        yield chapter.stem, built.get("seconds")


def report() -> int:
    """Print what is installed, what is wrong, what chapters cost; returns 1 if anything is."""
    for name, value in (store.provenance() | {"runs": store.runs_folder().absolute()}).items():
        print(f"{name:10} {value}")
    wrong = list(faults())
    print(f"\n{len(wrong)} faults found" if wrong else "\nno fault found", *wrong, sep="\n  ")
    print(
        "\nwhat chapters took when the book was last made here; shipped and kept runs cost nothing"
    )
    for chapter, seconds in costs():
        took = "not made yet" if seconds is None else str(timedelta(seconds=round(seconds)))
        print(f"{chapter:24} {took:>12}")
    return int(bool(wrong))
