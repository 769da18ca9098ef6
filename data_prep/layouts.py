"""Folders of images as a plan: the names of folders are classes and splits, or say nothing."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from data_prep import files, pictures
from data_prep.plan import split_name
from hallulib import UserError
from hallulib.data.checks import SPLITS

AGAIN = "further link to an image left out"
EMPTY = "folder without image"


def plan_of(rows, where: Path) -> pd.DataFrame:
    """The plan of some images.

    Args:
        rows: ``file`` (a path below the folder), ``patient``, ``label`` and ``split`` of each, ""
            where unknown; the index of a table is kept, places in a list count from 1.
        where: the folder or table, for the message.

    Raises:
        UserError: there is no image.
    """
    plan = pd.DataFrame(rows, columns=["file", "patient", "label", "split"], dtype=str)
    if not len(plan):
        known = ", ".join(sorted(pictures.SUFFIXES))
        raise UserError(f"{where}: no image found; files of {known} in class folders are needed")
    if isinstance(rows, list):
        plan.index += 1
    return plan


def tree(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The plan of images without label, at any depth; and notes."""
    found, notes = [], []
    for folder in _tree(root):
        images, others = files.images(folder)
        found += [str(file.relative_to(root)) for file in images]
        notes += [*map(files.left_out, others), *files.hidden(folder)]
    return plan_of([(name, "", "", "") for name in sorted(found)], root), notes


def classes(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The plan of class folders, right in the folder or in its splits; and notes.

    Raises:
        UserError: the folders are not laid out so, or a class has no image that can be read.
    """
    found = [(split, folder, *files.images(folder)) for split, folder in _class_folders(root)]
    rows, notes = [], []
    for folder in {root, *(folder.parent for _, folder, _, _ in found)}:
        notes += [*map(files.left_out, files.images(folder)[1]), *files.hidden(folder)]
    for split, folder, images, others in found:
        bare = split_name(folder.name) == "unlabelled"
        label = "" if bare else folder.name
        rows += [(str(file.relative_to(root)), "", label, split) for file in images]
        place = " without label" if bare else f" of class {label!r}"
        notes += [*(files.left_out(file, place) for file in others), *files.hidden(folder)]
    plan = plan_of(rows, root)
    for _, folder, images, others in found:
        if not images:
            _check_empty(folder, others, set(plan["label"]))
            notes.append(EMPTY)
    return plan, notes


def once(plan: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, list[str]]:
    """Every file once, however many links lead to it.

    Args:
        plan: see `plan_of`.
        root: the folder.

    Returns:
        The plan without further links, its index kept; and a note for each.

    Raises:
        UserError: a file has two classes, splits or patients.
    """
    first: dict[tuple[int, int], tuple[str, ...]] = {}
    new = []
    for name, *told in plan[["file", "patient", "label", "split"]].itertuples(index=False):
        known = first.setdefault(files.identity(root / name), (name, *told))
        if [*known[1:]] != told:
            raise UserError(
                f"{root / name} and {root / known[0]} are one file, but of different classes,"
                " splits or patients; one of the links is needed, the other not"
            )
        new.append(known[0] == name)
    return plan[new], [AGAIN] * new.count(False)


def _tree(root: Path) -> Iterator[Path]:
    """The folder and those below it, each once, wherever links lead."""
    todo, seen = [root], set()
    while todo:
        folder = todo.pop()
        if folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield folder
            todo += files.folders(folder)


def _class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder) of each class; the split is "" where the folders do not tell."""
    tops = files.folders(root)
    splits = _splits(tops)
    for folder in (root, *splits.values()):
        loose, _ = files.images(folder)
        if loose:
            raise UserError(
                f"{loose[0]}: an image outside a class folder; put it in a folder named by its"
                " class (or unlabelled), or give --csv"
            )
    others = [folder for folder in tops if folder not in splits.values()]
    strange = [f for f in others if splits and split_name(f.name) != "unlabelled"]
    if strange:
        told = ", ".join(folder.name for folder in splits.values())
        raise UserError(
            f"{strange[0]}: a class beside train, val or test ({told}); classes go inside them"
        )
    inside = [(split, folder) for split, top in splits.items() for folder in files.folders(top)]
    found = inside + [("", folder) for folder in others]
    for _, folder in found:
        _check_depth(folder, alone=len(tops) == 1 and not splits)
    return found


def _splits(tops: list[Path]) -> dict[str, Path]:
    """Split -> folder, by name; a class may be called valid if a class invalid is beside it."""
    alone = all(split_name(folder.name) for folder in tops)
    splits: dict[str, Path] = {}
    for folder in tops:
        split = split_name(folder.name)
        sure = alone or folder.name in SPLITS or files.folders(folder)
        if split not in ("", "unlabelled") and sure and splits.setdefault(split, folder) != folder:
            raise UserError(
                f"{folder}: split {split} for the second time, after {splits[split].name}; one"
                " folder for each split is needed"
            )
    return splits


def _check_depth(folder: Path, alone: bool) -> None:
    """Refuses folders in a class folder; ``alone``: no other folder is beside it."""
    deeper = files.folders(folder)
    if deeper and alone:
        raise UserError(
            f"{folder}: the only folder there, and holds folders; if the classes or splits are in"
            f" it, {folder} is the folder to give"
        )
    if deeper:
        raise UserError(
            f"{deeper[0]}: a folder in a class folder; images must lie directly in class folders"
            " (in splits named train, val, test). For folders of patients, put the patient into"
            " the names of files (--patient-pattern finds it) or list file, label and patient in"
            " a table (--csv)"
        )


def _check_empty(folder: Path, others: list[Path], labels: set[str]) -> None:
    """Refuses that a class is lost; another split may hold its images."""
    if others:
        suffixes = sorted({file.suffix.lower() or "no suffix" for file in others})
        raise UserError(
            f"{folder}: none of its {len(others)} files is read ({', '.join(suffixes)}); turn them"
            f" into one of {', '.join(sorted(pictures.SUFFIXES))}, or move the folder away"
        )
    if folder.name not in labels and split_name(folder.name) != "unlabelled":
        raise UserError(f"{folder}: a class without image; add images or remove the folder")
