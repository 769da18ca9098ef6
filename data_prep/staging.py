"""Reads items in worker processes and stages each as one file, so that a killed run can go on."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from hallulib import UserError
from hallulib.storage.disk import writing

LISTED = 50  # faults that are named; one more, and reading stops
UNREADABLE = "unreadable file"


class Fault(UserError):
    """What is wrong with one study, in one sentence, and its kind in a few words.

    The kind names no file, so it may be counted in a report.
    """

    def __init__(self, sentence: str, kind: str):
        super().__init__(sentence, kind)  # both in args: it is pickled on its way from a worker

    def __str__(self) -> str:
        return self.args[0]

    @property
    def kind(self) -> str:
        """A few words."""
        return self.args[1]

    @classmethod
    def of(cls, name: str, error: Exception) -> "Fault":
        """Whatever a reader of a foreign format throws; ``name``: what it was to read."""
        if isinstance(error, cls):
            return error
        if isinstance(error, UserError):
            return cls(str(error), UNREADABLE)
        told = " ".join(str(error).split())[:200]
        return cls(f"{name}: cannot be read ({type(error).__name__}: {told})", UNREADABLE)


class Item(Protocol):
    """One unit of work: picklable, best a frozen dataclass.

    ``key`` names it in messages and identifies nobody. ``repr(item)`` must hold everything that,
    apart from the card, decides its pixels and rows (path, file size and time, grade ...): it is
    hashed for the restart.
    """

    @property
    def key(self) -> str:
        """Unique name."""


@dataclass(frozen=True)
class File:
    """A file as it was found; if it changes, what was made of it is made again."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "File":
        """The file as it is now."""
        now = path.stat()
        return cls(str(path), now.st_size, now.st_mtime_ns)


@dataclass
class Study:
    """What was read from one item.

    Args:
        images: uint8 arrays (C, H, H), C 1 or 3, alike in all studies; may be empty.
        rows: one dict per image: ``patient``, ``split`` ("" = decided by the ``splits`` of
            `prepare`), the label columns of the card ("" = unlabelled) and the coordinates that
            the card lists. Any other field is refused.
        notes: what was odd, by name (``"empty mask"``), once per occurrence; no identifiers.
        faults: of the files of an item that cannot be read, where others can.
    """

    images: Sequence[np.ndarray]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def stage(
    items: Sequence[Item],
    read: Callable[[Any], Study],
    card: Mapping,
    folder: Path,
    workers: int | None = None,
    on_fault: str = "stop",
) -> list[Path]:
    """Reads what is not staged yet into ``folder``, and again what had a fault.

    Args:
        items: what to read.
        read: function of a module, sent to the workers.
        card: complete apart from counts; part of the name of each staged file.
        folder: exists.
        workers: processes; all cores by default, 1 reads in this process.
        on_fault: ``stop`` reads all, unless more than `LISTED` have a fault, and tells which;
            ``skip`` leaves out what has one.

    Returns:
        The staged file of each item, in order.

    Raises:
        UserError: an item cannot be read, or breaks the contract of `Study`.
    """
    keys = Counter(item.key for item in items)
    if len(keys) < len(items):
        raise UserError(f"{keys.most_common(1)[0][0]} is listed twice; every key must differ")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; at least 1 is needed")
    settings = json.dumps(card, sort_keys=True)
    staged = [folder / f"{_digest(settings, repr(item))}.npz" for item in items]
    todo = [(item, path) for item, path in zip(items, staged, strict=True) if not _whole(path)]
    job = partial(_stage, read=read, fields=fields(card), skip=on_fault == "skip")
    workers, faults = min(workers or _cores(), len(todo)), []
    with contextlib.closing(_run(job, todo, workers)) as found:
        for more in tqdm(found, total=len(todo), unit="item"):
            faults += more
            if len(faults) > LISTED and on_fault == "stop":
                break
    if faults and on_fault == "stop":
        raise UserError(listed(faults))
    return staged


def listed(faults: Sequence[Fault | str]) -> str:
    """One sentence of all that has a fault."""
    hint = "--on-fault skip leaves it out; the next run goes on from what was read"
    lines = grouped(faults)
    if len(lines) == 1:
        return f"{lines[0]} ({hint})"
    return "\n  ".join([f"{len(faults)} faults ({hint}):", *lines])


def grouped(faults: Sequence[Fault | str]) -> list[str]:
    """A line for each way to be at fault: the names of those that are, as far as `LISTED`.

    Example:
        >>> grouped(["a.png: empty", "b.png: cut short", "c.png: empty"])
        ['a.png, c.png: empty', 'b.png: cut short']
    """
    names: dict[str, list[str]] = {}
    for fault in faults[:LISTED]:
        name, mark, reason = str(fault).partition(": ")
        names.setdefault(mark + reason, []).append(name)
    lines = [", ".join(found) + reason for reason, found in names.items()]
    return lines + ["and others"] * (len(faults) > LISTED)


def fields(card: Mapping) -> dict[str, list[str] | None]:
    """The allow-list of columns, in order; label columns with their values."""
    labels = {scheme: about["values"] for scheme, about in card["labels"].items()}
    return {"patient": None, "split": None} | labels | dict.fromkeys(card["coordinates"])


def read_about(path: Path) -> dict:
    """Rows, notes, faults, shape and fingerprints of a staged file; images stay on disk."""
    with np.load(path, allow_pickle=False) as staged:
        return json.loads(staged["about"].tobytes())


def read_images(path: Path) -> np.ndarray:
    """Images (n, C, H, W) of a staged file."""
    with np.load(path, allow_pickle=False) as staged:
        return np.ascontiguousarray(staged["images"])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(job, todo, workers: int) -> Iterator[list[Fault]]:
    if workers < 2:
        with threadpool_limits(1):
            yield from (job(item, path) for item, path in todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        waiting: deque = deque()
        try:
            for item, path in todo:
                waiting.append(pool.submit(job, item, path))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker was killed") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threadpool_limits(1)  # a worker per core: threads of BLAS would only wait for each other

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _stage(item, path: Path, read, fields: Mapping, skip: bool) -> list[Fault]:
    """Stages what was read without a fault, and with ``skip`` the rest of what has one."""
    try:
        study = read(item)
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, Fault):
            raise  # of more than this item
        study = Study([], [], faults=[Fault.of(item.key, error)])
    if not study.faults or skip:
        _write(path, study, fields, item.key)
    return study.faults


def _write(path: Path, study: Study, fields: Mapping, key: str) -> None:
    images = _stack(study, key)
    about = {
        "rows": [_row(row, fields, key) for row in study.rows],
        "notes": [*study.notes, *(f"left out: {fault.kind}" for fault in study.faults)],
        "faults": list(map(str, study.faults)),
        "shape": images.shape,
        "prints": [hashlib.blake2b(image.data, digest_size=12).hexdigest() for image in images],
    }
    text = json.dumps(about)
    hidden = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(path.parent):
        with hidden.open("wb") as file:
            np.savez(file, images=images, about=np.frombuffer(text.encode(), np.uint8))
        os.replace(hidden, path)


def _stack(study: Study, key: str) -> np.ndarray:
    if len(study.images) != len(study.rows):
        found = f"{len(study.images)} images and {len(study.rows)} rows"
        raise UserError(f"{key}: {found}; one row per image is needed")
    kinds = sorted({(x.dtype.name, x.shape) for x in study.images})
    for dtype, shape in kinds:
        square = len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]
        if dtype != "uint8" or not square:
            raise UserError(
                f"{key}: image is {dtype} {shape}; uint8 (1 or 3, size, size) is needed"
            )
    if len(kinds) > 1:
        raise UserError(f"{key}: images of shapes {[s for _, s in kinds]}; all must be alike")
    return np.stack(study.images) if kinds else np.zeros((0, 0, 0, 0), np.uint8)


def _row(row: Mapping[str, Any], fields: Mapping, key: str) -> dict[str, str]:
    strange = sorted(set(row) - set(fields))
    if strange:
        allowed = ", ".join(fields)
        raise UserError(f"{key}: field {strange[0]!r} is not on the allow-list ({allowed})")
    texts = {name: "" if row.get(name) is None else str(row[name]) for name in fields}
    for scheme, values in fields.items():
        if values is not None and texts[scheme] not in ("", *values):
            known = ", ".join(values)
            raise UserError(f"{key}: {scheme} is {texts[scheme]!r}; known labels are {known}")
    return texts


def _whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as staged:
            return staged.testzip() is None and not read_about(path)["faults"]
    except (OSError, zipfile.BadZipFile, KeyError):  # cut short, or of another version
        return False


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
