"""The place of an image set: one run at a time works for it, and what others put there stays.

The work lies in ``<out>.partial`` until it is done: staged files, the new set, and the set that it
replaces between the two renames.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from hallulib import UserError
from hallulib.storage.disk import CannotWrite, writing

SET = {"images.npy", "table.csv", "card.json"}
NEW, REPLACED, LOCK = "set", "replaced", "lock"
STAGED = re.compile(r"[0-9a-f]{32}\.npz")
CUT_SHORT = re.compile(r"[0-9a-f]{32}\.\d+\.tmp")  # by the end of the run that staged it


@contextlib.contextmanager
def claimed(out: Path, overwrite: bool) -> Iterator[Path]:
    """The folder of the work for ``out``, for this run alone.

    Afterwards staged files are left for the next run to go on from, unless ``out`` was made or the
    disk could not be written; nothing else from here is.

    Args:
        out: the image set.
        overwrite: it may be replaced.

    Raises:
        UserError: another run works for ``out``, it may not be replaced or cannot be written, or
            the folder holds files of others.
    """
    work = out.with_name(out.name + ".partial")
    if not all(map(_is_ours, work.glob("*"))):
        raise UserError(f"{work} holds files of others; name another output or move it")
    made = [folder for folder in work.parents if not folder.exists()]
    with contextlib.ExitStack() as ends:
        ends.callback(_drop_empty, [work, *made])
        ends.enter_context(_locked(out, work))
        keep = True
        try:
            with writing(out):
                _put_back(out, work)
            _check_free(out, overwrite)
            yield work
            keep = False
        except CannotWrite:
            keep = False  # gives the space back
            raise
        finally:
            _leave(out, work, keep)


def put(new: Path, out: Path) -> None:
    """Moves a new set out of the folder of the work, into the place of an older one if need be."""
    if out.exists():
        shutil.rmtree(new.with_name(REPLACED), ignore_errors=True)  # of a run killed as it ended
        os.replace(out, new.with_name(REPLACED))
    os.replace(new, out)


def _locked(out: Path, work: Path) -> AcquireReturnProxy:
    """A lock of the system: it ends with this process, however that ends."""
    with writing(out):
        work.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(work / LOCK).acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"{out}: another run is making it; wait for its end or name another output"
            ) from error


def _check_free(out: Path, overwrite: bool) -> None:
    """Nothing but an image set is ever replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; name another output or pass --overwrite")
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} == SET):
        raise UserError(f"{out} is not an image set, so it is not replaced; name another output")


def _put_back(out: Path, work: Path) -> None:
    """The set that was to be replaced, if the run ended before another took its place."""
    if (work / REPLACED).exists() and not out.exists():
        os.replace(work / REPLACED, out)


def _leave(out: Path, work: Path, keep: bool) -> None:
    with contextlib.suppress(OSError):  # what ended the run is the one to tell
        _put_back(out, work)
        for path in sorted(
            work.glob("*"), key=lambda path: path.name == LOCK
        ):  # last: others wait
            if path.is_dir() and _is_ours(path):
                shutil.rmtree(path)
            elif _is_ours(path) and not (keep and STAGED.fullmatch(path.name)):
                path.unlink()


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return path.name in (NEW, REPLACED) and {file.name for file in path.iterdir()} <= SET
    return bool(path.name == LOCK or STAGED.fullmatch(path.name) or CUT_SHORT.fullmatch(path.name))


def _drop_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # others are in it
            folder.rmdir()
