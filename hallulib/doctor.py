"""The doctor: what is installed here, what is wrong with it, and what each chapter will cost.

``python -m hallulib.doctor`` ends with status 1 if something is wrong. The cost is an estimate:
see :mod:`hallulib.workload`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from hallulib import UserError, artifacts, commands, notebooks, workload

LOCK = notebooks.ROOT / "requirements.lock"
GB = 1e9


def pins(lock: Path) -> dict[str, str]:
    """Name and version of the packages that a lock file asks for on this machine.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = lock.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the pinned versions in {lock}: {error.strerror}") from None
    found = [Requirement(line.removesuffix("\\")) for line in lines if line[:1].isalnum()]
    kept = [pin for pin in found if not pin.marker or pin.marker.evaluate({"extra": ""})]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in kept}


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
            yield f"the package {name} is missing; {wanted} is pinned in {LOCK.name}: make env"
            continue
        if found != wanted:
            yield f"the package {name} is {found}; {wanted} is pinned in {LOCK.name}: make env"


def _weights() -> Iterator[str]:
    for folder in sorted(path for path in artifacts.SHIPPED.iterdir() if path.is_dir()):
        try:
            settings = json.loads((folder / artifacts.CARD).read_text())["settings"]
            artifacts.is_finished(folder, settings)
        except UserError as error:
            yield str(error)
        except (OSError, ValueError, KeyError):
            yield f"the weights in {folder} have no readable {artifacts.CARD}; fetch them again"


def _runs() -> Iterator[str]:
    folder = artifacts.runs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield (
            f"the folder of runs {folder} cannot be written ({error.strerror}); "
            "name another by HALLULIB_RUNS"
        )


def findings() -> dict[str, str]:
    """What is installed here."""
    made = artifacts.provenance()
    found = {"python": f"{made['python']} on {platform.system()} {platform.machine()}"}
    found |= {name: made[name] for name in ("hallulib", "torch", "diffusers")}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found["memory"] = f"{pages / GB:.0f} GB"
    found["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    found["device"] = made["device"]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        found["device"] += f", {memory / GB:.0f} GB, {torch.cuda.device_count()} of them"
        found["bfloat16"] = "used" if torch.cuda.is_bf16_supported(False) else "emulated: slow"
        found["compile"] = _compiles()
    else:
        found["bfloat16"] = found["compile"] = "not used without a GPU"
    folder = artifacts.runs_folder().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    found["runs"] = f"{folder}, {shutil.disk_usage(there).free / GB:.0f} GB free"
    return found


def _compiles() -> str:
    """Whether the GPU runs compiled code, which training uses."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(4, device="cuda"))
    except Exception as error:  # whatever it is, training would stop at it
        return f"not working ({type(error).__name__}: {str(error).splitlines()[0]})"
    return "works"


def costs(file: Path | None) -> Iterator[tuple[str, float, float]]:
    """Chapter, seconds until its runs are kept, and seconds each time, of networks alone.

    Args:
        file: parameters, as ``make book`` takes them; those of the chapters without it.

    Raises:
        UserError: the file or a value in it is wrong.
    """
    book = notebooks.ROOT / "book"
    chosen = notebooks.read_parameters(file, [], book)
    for chapter in notebooks.chapters(book):
        values = notebooks.fill(notebooks.own_values(chapter), chosen[chapter.stem])
        once = always = 0.0
        for work in workload.of_chapter(chapter.stem, values):
            needed = workload.seconds(work)
            once, always = once + needed * work.kept, always + needed * (not work.kept)
        yield chapter.stem, once, always


def duration(seconds: float | int) -> str:
    """A duration as one reads it.

    Example:
        >>> [duration(s) for s in (0, 20, 200, 20_000)]
        ['-', '20 s', '3 min', '5.6 h']
    """
    if seconds < 1:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, 1 if something is wrong, or as :func:`hallulib.commands.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m hallulib.doctor", description="Check the installation, estimate costs."
    )
    parser.add_argument("--params", type=Path, help="YAML of parameters, see make book")
    options = parser.parse_args(arguments)
    return commands.run(lambda: _report(**vars(options)))


def _report(params: Path | None) -> int:
    for name, value in findings().items():
        print(f"{name:10} {value}")
    wrong = list(faults())
    print(f"\n{len(wrong)} faults found" if wrong else "\nno fault found", *wrong, sep="\n  ")
    told = "estimated from a few steps on this machine; figures and statistics come on top"
    print(f"\n{'cost of the networks':24} {'until kept':>10} {'each time':>10}   ({told})")
    for chapter, once, always in costs(params):
        print(f"{chapter:24} {duration(once):>10} {duration(always):>10}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
