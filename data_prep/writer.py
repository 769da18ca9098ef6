r"""The one writer of image sets: parallel, restartable, nothing half-written.

An archive module lists its *items* (a study, a block of files) and gives a function that reads one
item into a `Study`. The writer does the rest::

    items --read, in worker processes--> <out>.partial/<hash>.npz --in item order--> <out>

A staged file is named by a hash of card and item and renamed when whole; so a run that was killed
or stopped by a fault goes on where it stopped and ends with the same bytes. The finished folder is
checked, then moved to ``out`` by one rename. Memory is bounded by one study per worker.
"""

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_prep.output import NEW, claimed, put
from data_prep.splitting import split_patients
from data_prep.staging import (
    Item,
    Study,
    fields,
    grouped,
    listed,
    read_about,
    read_images,
    stage,
)
from hallulib import UserError
from hallulib.data.checks import check_table, count_units
from hallulib.storage.disk import writing

__all__ = ["Item", "Report", "Study", "by_fraction", "prepare", "versions"]

CONTRADICTED = "image with an exact copy under another label"
Splits = Callable[[pd.DataFrame], Mapping[str, str]] | Mapping[str, str] | None


@dataclass(frozen=True)
class Report:
    """What was written, and what was odd.

    Args:
        out: the image set.
        images: how many.
        patients: how many, or what stands for them.
        unit: what that is, a key of `hallulib.data.checks.UNITS`.
        splits: split -> class of the first scheme ("" = none) -> images.
        counts: what was odd, by name -> how often.
        warnings: what readers of the card must know.
        left_out: a sentence for each file or study with a fault; only here, since a path may name
            a patient.
    """

    out: Path
    images: int
    patients: int
    unit: str
    splits: dict[str, dict[str, int]]
    counts: dict[str, int]
    warnings: Sequence[str] = ()
    left_out: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.images} images of {count_units(self.unit, self.patients)}"]
        for split, classes in self.splits.items():
            told = ", ".join(f"{name or 'no label'} {n}" for name, n in classes.items())
            lines.append(f"{sum(classes.values()):>9}  {split:<11} {told}")
        lines += [f"{n:>9}  {name}" for name, n in self.counts.items()]
        lines += [f"{'warning':>9}  {told}" for told in self.warnings]
        lines += [f"{'left out':>9}  {told}" for told in grouped(self.left_out)]
        return "\n".join(lines)


def prepare(
    out: Path | str,
    items: Sequence[Item],
    read: Callable[[Any], Study],
    card: dict,
    *,
    splits: Splits = None,
    notes: Sequence[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    on_fault: str = "stop",
) -> Report:
    """Reads every item and writes the image set, or nothing but what the next run goes on from.

    Args:
        out: the folder to create; ``<out>.partial`` beside it holds the work until then.
        items: what to read, in the order of the images; every ``key`` differs.
        read: ``read(item) -> Study``, a function of a module (it is sent to worker processes).
        card: ``name``, ``origin``, ``licence``, ``spacing_mm`` ([row, column] or None),
            ``processing`` {``steps``: [text], ``versions``}, ``labels`` {scheme: {``values``,
            ``meaning``}} (the first scheme is the default) and ``coordinates``, the allow-list of
            further columns; and if need be ``warnings`` and ``unit``, what ``patient`` names
            (default patient). Every setting that changes a pixel belongs in ``steps``. The writer
            adds ``counts``, ``report``, ``sha256`` and warnings of its own.
        splits: patient -> split, or a function of the whole table that returns it; used for rows
            whose ``split`` is empty. See `by_fraction`.
        notes: oddities found before reading, counted with those of the studies.
        workers: processes; all cores by default, 1 reads in this process.
        overwrite: replace ``out`` if it exists.
        on_fault: ``stop`` tells all that cannot be read, ``skip`` leaves it out; see `stage`.

    Raises:
        UserError: anything wrong with items, labels, splits or the output folder. What was staged
            is kept, unless the disk cannot be written.
    """
    out = Path(out)
    if not items:
        raise UserError(f"{out}: nothing to prepare; at least one image is needed")
    card = _complete(card)
    try:
        with claimed(out, overwrite) as work:
            staged = stage(items, read, card, work, workers, on_fault)
            report = _assemble(out, work / NEW, items, staged, card, splits, notes)
    except ChildProcessError as error:
        raise UserError(
            f"{out}: {error}, most likely for lack of memory; run it again with fewer --workers"
            " to go on"
        ) from error
    if work.exists():
        told = f"{work} stays: it holds files of others"
        report = replace(report, warnings=[*report.warnings, told])
    return report


def by_fraction(scheme: str, fractions: Mapping[str, float], seed: int) -> Splits:
    """The ``splits`` that divides patients at random, stratified by their rarest class.

    Args:
        scheme: the label column that defines the strata.
        fractions: split -> share of the images, summing to 1.
        seed: of the division.
    """
    return partial(_divide, scheme=scheme, fractions=fractions, seed=seed)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, for ``card["processing"]["versions"]``."""
    return {name: metadata.version(name) for name in packages}


def _divide(table: pd.DataFrame, scheme: str, fractions: Mapping[str, float], seed: int):
    todo = table[table["split"] == ""]
    return split_patients(list(todo["patient"]), list(todo[scheme]), fractions, seed)


def _complete(card: dict) -> dict:
    processing = card["processing"]
    found = {"python": platform.python_version()} | versions("hallulib", "numpy")
    told = found | processing.get("versions", {})
    card = {"coordinates": [], "unit": "patient"} | card
    return card | {"processing": processing | {"versions": told}}


def _assemble(out: Path, new: Path, items, staged, card, splits, notes) -> Report:
    from hallulib.data import imageset

    abouts = [read_about(path) for path in staged]
    left_out = [fault for about in abouts for fault in about["faults"]]
    shape = _common_shape(items, abouts, left_out)
    rows = [row for about in abouts for row in about["rows"]]
    table = pd.DataFrame(rows, columns=list(fields(card)), dtype=str)
    _decide_splits(table, splits, out.name)
    odd = Counter([*notes, *(note for about in abouts for note in about["notes"])])
    prints = pd.Series([p for about in abouts for p in about["prints"]], dtype=str)
    odd += _copies(prints, table["split"]) + _contradicted(prints, table[list(card["labels"])])
    counts = {"images": len(table), "patients": table["patient"].nunique()}
    told = {"splits": _tally(table, card), "counts": dict(sorted(odd.items()))}
    warnings = [*card.get("warnings", ()), *_warnings(told["splits"], odd)]
    about = {"unit": card["unit"], "warnings": warnings, "left_out": left_out}
    report = Report(out, **counts, **told, **about)
    card |= {"counts": counts | {"splits": report.splits}, "report": report.counts}
    card |= {"warnings": warnings}
    check_table(table, card, out.name)
    with writing(out):
        _write(new, staged, (len(table), *shape), table, card)
        imageset.open(new)
        put(new, out)
    return report


def _common_shape(items, abouts, left_out: Sequence[str]) -> tuple[int, ...]:
    shapes = {}
    for item, about in zip(items, abouts, strict=True):
        if about["shape"][0]:
            shapes.setdefault(tuple(about["shape"][1:]), item.key)
    if not shapes:
        told = f"{items[0].key}: no image in it or in any other; at least one is needed"
        raise UserError(listed(left_out) if left_out else told)
    if len(shapes) > 1:
        (one, first), (two, other) = list(shapes.items())[:2]
        raise UserError(
            f"{first} has images of (channels, height, width) {one} but {other} of {two};"
            " all must be alike"
        )
    return next(iter(shapes))


def _decide_splits(table: pd.DataFrame, splits: Splits, where: str) -> None:
    todo = table["split"] == ""
    if not todo.any():
        return
    decided = splits(table) if callable(splits) else splits or {}
    table.loc[todo, "split"] = [decided.get(patient, "") for patient in table.loc[todo, "patient"]]
    left = table.loc[table["split"] == "", "patient"]
    if len(left):
        known = "unlabelled, train, val or test"
        raise UserError(f"{where}: patient {left.iloc[0]} has no split; {known} is needed")


def _tally(table: pd.DataFrame, card: dict) -> dict[str, dict[str, int]]:
    """Images per split and class, in the order of the card."""
    scheme = next(iter(card["labels"]), None)
    values = card["labels"][scheme]["values"] if scheme else []
    column = table[scheme] if scheme else [""] * len(table)
    pairs = Counter(zip(table["split"], column, strict=True))
    tally = {
        split: {value: pairs[split, value] for value in ("", *values) if pairs[split, value]}
        for split in ("unlabelled", "train", "val", "test")
    }
    return {split: classes for split, classes in tally.items() if classes}


def _copies(prints: Sequence[str], split: pd.Series) -> Counter[str]:
    """Images whose very pixels occur more than once: the leaks that patients do not show."""
    first: dict[str, str] = {}
    odd: Counter[str] = Counter()
    for image, where in zip(prints, split, strict=True):
        if first.setdefault(image, where) != where:
            odd["image with an exact copy in another split"] += 1
        odd["image that is an exact copy of another"] += 1
    odd["image that is an exact copy of another"] -= len(first)
    return odd


def _contradicted(prints: pd.Series, labels: pd.DataFrame) -> Counter[str]:
    """Images whose very pixels occur with another label."""
    wrong = pd.Series(False, prints.index)
    for scheme in labels:
        told = labels.loc[labels[scheme] != "", scheme]
        wrong[told.index] |= told.groupby(prints[told.index]).transform("nunique") > 1
    return Counter({CONTRADICTED: int(wrong.sum())} if wrong.any() else {})


def _warnings(splits: Mapping[str, Mapping], odd: Mapping[str, int]) -> list[str]:
    """What readers of the card must know of the whole."""
    labelled = set(splits) - {"unlabelled"}
    missing = [split for split in ("val", "test") if labelled and split not in splits]
    warnings = [f"no image is in {split}: what needs it will stop" for split in missing]
    if odd[CONTRADICTED]:
        warnings.append(f"{odd[CONTRADICTED]} images have an exact copy with another label")
    return warnings


def _write(new: Path, staged: Sequence[Path], shape, table: pd.DataFrame, card: dict) -> None:
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    sums = {
        "images.npy": _write_images(new / "images.npy", staged, shape),
        "table.csv": _write_text(
            new / "table.csv", table.to_csv(index=False, lineterminator="\n")
        ),
    }
    text = json.dumps(card | {"sha256": sums}, indent=1, ensure_ascii=False)
    _write_text(new / "card.json", text + "\n")


def _write_images(path: Path, staged: Sequence[Path], shape: tuple[int, ...]) -> str:
    # plain writes: on a full disk a memory map would kill the process instead of raising
    with path.open("w+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for source in staged:
            file.write(read_images(source).data)
        _sync(file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> str:
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # of a file system that knows only bytes
        strange = text[max(0, error.start - 20) : error.end + 20].encode(errors="replace").decode()
        raise UserError(
            f"{path.name}: would hold {strange!r}, which is no Unicode; another name of the file"
            " or folder is needed"
        ) from error
    with path.open("wb") as file:
        file.write(content)
        _sync(file)
    return hashlib.sha256(content).hexdigest()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
