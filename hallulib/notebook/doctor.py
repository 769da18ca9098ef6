"""The doctor: what is installed here, what is wrong with it, and what each chapter took.

``python -m hallulib doctor`` ends with status 1 if something is wrong.
"""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import nbformat
import psutil
import torch
from packaging.requirements import Requirement

from hallulib import UserError
from hallulib.notebook import parameters
from hallulib.storage import disk, store

LOCK = parameters.ROOT / "requirements.lock"
GB = 1e9


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
    """What is wrong with the installation, one sentence each."""
    for check in (_packages, _weights, _runs):
        try:
            yield from check()
        except UserError as error:
            yield str(error)


def _packages() -> Iterator[str]:
    for name, wanted in pins(LOCK).items():
        try:
            # a build for another device has a suffix, as in 2.14.1+cpu
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != wanted:
            yield f"the package {name} is {found}; {wanted} is pinned in {LOCK.name}: make env"


def _weights() -> Iterator[str]:
    for folder in sorted(path for path in store.SHIPPED.iterdir() if path.is_dir()):
        try:
            store.card(folder)
        except UserError as error:
            yield str(error)


def _runs() -> Iterator[str]:
    folder = store.runs_folder()
    try:
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except UserError as error:
        yield f"{error}; HALLULIB_RUNS names another"


def findings() -> dict[str, str]:
    """What is installed here."""
    made, bfloat16 = store.provenance(), "not used without a GPU"
    compiled = bfloat16
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        made["device"] += f", {memory / GB:.0f} GB, {torch.cuda.device_count()} of them"
        bfloat16 = "used" if torch.cuda.is_bf16_supported(False) else "emulated: slow"
        compiled = _compiles()
    folder = store.runs_folder().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "python": f"{made.pop('python')} on {platform.system()} {platform.machine()}",
        **made,
        "memory": f"{psutil.virtual_memory().total / GB:.0f} GB",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "bfloat16": bfloat16,
        "compile": compiled,
        "runs": f"{folder}, {shutil.disk_usage(there).free / GB:.0f} GB free",
    }


def _compiles() -> str:
    """Whether the GPU runs compiled code, which training uses."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(4, device="cuda"))
    except Exception as error:  # whatever it is, training would stop at it
        return f"not working ({type(error).__name__}: {str(error).splitlines()[0]})"
    return "works"


def costs() -> Iterator[tuple[str, float | None]]:
    """Chapter, and the seconds that it took when `make book` last executed it here."""
    for chapter in parameters.chapters(parameters.ROOT / "book"):
        page = parameters.ROOT / "_build" / "book" / chapter.name
        built = nbformat.read(page, 4).metadata if page.exists() else {}
        yield chapter.stem, built.get("seconds")


def report() -> int:
    """Print what is installed, what is wrong, what chapters cost; returns 1 if anything is."""
    for name, value in findings().items():
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
