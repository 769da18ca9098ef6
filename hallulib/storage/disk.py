"""Files that are there whole or not at all, and one sentence where they cannot be written.

What is being written lies beside its place under a name that ends in ``.partial``; no reader
looks there. A failure removes it, and what a killed process left is written over or dropped.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from hallulib import UserError

PARTIAL = ".partial"


class CannotWrite(UserError):
    """A full disk, no permission, or a file in the way."""


@contextlib.contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn a failure to write into a `CannotWrite`, one sentence that begins with ``where``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CannotWrite(
            f"{where}: cannot write ({reason}); a writable folder with enough space is needed"
        ) from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under; once that is done, it is renamed to ``path`` in one step.
    After a `CannotWrite`, what was at ``path`` before still is.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _move(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                partial.unlink()
            raise


@contextlib.contextmanager
def whole_files(folder: Path, last: str = "") -> Iterator[Path]:
    """A folder to write files into; once all are there, each is renamed into ``folder``.

    For what libraries write, which make further files of their own while they do. A file without
    which the others are not read goes first and comes ``last``: none reads old among new ones.
    After a `CannotWrite`, a file that was in ``folder`` before is still whole.
    """
    folder, partial = Path(folder), Path(folder) / PARTIAL
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if last:
                drop(folder / last)
            files = (p for p in partial.rglob("*") if p.is_file())
            for file in sorted(files, key=lambda file: (file == partial / last, file)):
                place = folder / file.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                _move(file, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _move(file: Path, place: Path) -> None:
    with file.open("r+b") as written:
        os.fsync(written.fileno())  # some disks tell only now that they are full
    os.replace(file, place)


def checksums(folder: Path, without: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file in a folder and below but some, by its path in there."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: _sha256(files[name]) for name in sorted(files) if name not in without}


def changed(folder: Path, sums: Mapping[str, str]) -> str | None:
    """The first file that is missing or has another checksum, if there is one."""
    for name, checksum in sums.items():
        if not (folder / name).is_file() or _sha256(folder / name) != checksum:
            return name
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop(file: Path) -> None:
    """Remove a file if it is there; a `CannotWrite` if it cannot be removed."""
    if file.exists():  # asked first: a disk that is read-only refuses to remove nothing, too
        with writing(file):
            file.unlink(missing_ok=True)


def drop_partial(folder: Path) -> None:
    """Remove what a process left right in a folder as it was killed while it wrote there."""
    for left in list(folder.glob("*" + PARTIAL)):
        with writing(left):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
