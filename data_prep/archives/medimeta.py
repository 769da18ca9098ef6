r"""One set of MedIMeta, its tasks as labels; there are 19, of ten domains, in one layout.

A set is a folder with ``info.yaml``, ``annotations.csv``, ``task_labels/TASK.npy``, ``splits`` and
``original_splits`` (``train.txt`` and so on), and its images in ``images.hdf5``, ``images`` or
both. Images are numbered from 0; the number leads from each file to the others.

Source:
    Woerner et al., A comprehensive and easy-to-use multi-domain multi-task medical imaging
    meta-dataset (2024). https://arxiv.org/abs/2404.16000
    The layout is that of the authors' package ``medimeta`` and of the scripts that wrote the sets;
    no published set has been read with this module.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from data_prep import arrays, files, grouping, plan, tables, tiles
from data_prep.writer import Report, prepare
from hallulib import UserError
from hallulib.data.checks import map_array

HELP = """
FOLDER is one unpacked set. A task becomes a label column of its name, with the classes that
info.yaml names; the grades of an ordinal task are classes, in order. Of a multi-label task each
class becomes a column, "TASK: CLASS", absent or present. Tasks without classes (regression,
segmentation) are left out, and the report names them.

Patients are the column patient_id of annotations.csv, if there is one; --patient names another, or
"none" if images are independent. Slices of one volume share their original_filepath. The warnings
of the card name the other sets that may show the same people or are of the same domain; whoever
holds this set out keeps those from the training as well.

  python -m data_prep medimeta MedIMeta/cxr sets/cxr --size 64
  python -m data_prep medimeta MedIMeta/organs_axial sets/organs --patient original_filepath \\
      --unit exam --fractions train=.7,val=.1,test=.2
"""
SPLITS = {"published": "splits", "original": "original_splits"}  # option -> folder
SEVERAL = "MULTILABEL_CLASSIFICATION"
KINDS = ("BINARY_CLASSIFICATION", "MULTICLASS_CLASSIFICATION", "ORDINAL_REGRESSION", SEVERAL)
PRESENCE = {0: "absent", 1: "present"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
OVERLAPS = {  # entry of info.yaml that lists other sets -> what it means
    "subject_overlaps": "may show the same people as",
    "domain_overlaps": "is of the same domain as",
}
UNKNOWN = "patients are not known: each image counts as one of its own, and splits may share some"


def _name(name: str) -> str:
    if not plan.is_below(name) or re.search(r"[/\\\0]", name) or name.lower() in plan.RESERVED:
        raise ValueError(f"{name!r} can name no file and column")
    return name


def _classes(labels: dict[int, str]) -> dict[int, str]:
    names = [name.strip() for name in labels.values()]
    if len(set(names) - {""}) < len(names):
        raise ValueError("a class is empty or there twice")
    return dict(sorted(zip(labels, names, strict=True)))


class _Task(BaseModel):
    task_name: Annotated[str, AfterValidator(_name)]
    task_target: str
    labels: Annotated[dict[int, str], AfterValidator(_classes)] = {}


def _schemes(task: _Task) -> list[str]:
    """The label columns that a task becomes."""
    if task.task_target == SEVERAL:
        return [f"{task.task_name}: {name}" for name in task.labels.values()]
    return [task.task_name] if task.labels else []


def _tasks(tasks: list[_Task]) -> list[_Task]:
    schemes = [_schemes(task) for task in tasks if task.task_target in KINDS]
    names = sum(schemes, [])
    if not schemes or not all(schemes) or len(set(names)) < len(names):
        raise ValueError("no task with classes, one without them, or one there twice")
    return tasks


class _Info(BaseModel):
    id: str
    license: str
    tasks: Annotated[list[_Task], AfterValidator(_tasks)]
    input_size: tuple[Literal["1", "3"], int, int]  # channels, height, width
    splits_num_samples: dict[str, int] = {}
    original_splits_num_samples: dict[str, int] = {}
    subject_overlaps: list[str] = []
    domain_overlaps: list[str] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep medimeta``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="FOLDER", help="folder of one set")
    plan.add_output(parser)
    splits = parser.add_mutually_exclusive_group()
    told = "splits to keep: those of MedIMeta or those of the source (default %(default)s)"
    splits.add_argument("--splits", choices=list(SPLITS), default="published", help=told)
    told = "or new splits by patient, of these shares: train=.7,val=.1,test=.2"
    splits.add_argument("--fractions", type=plan.fractions, help=told)
    plan.add_seed(parser)
    told = "column of annotations.csv that tells patients apart, or none (default patient_id)"
    parser.add_argument("--patient", metavar="COLUMN", help=told)
    plan.add_unit(parser)
    tiles.add_arguments(parser, "ignore")
    plan.add_fault(parser, "file")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a file is missing or damaged, files do not fit each other, a name leads out of
            the folder, no task has classes, or it is not clear who the patients are.
    """
    info, where = _info(args.root / "info.yaml"), args.root / "annotations.csv"
    kept = [task for task in info.tasks if task.task_target in KINDS]
    rows = _annotations(args, where, kept)
    values: dict[str, list[str]] = {}
    for task in kept:
        values |= _read_task(args.root, task, rows)
    rows["label"] = rows[f"tasks/{next(iter(values))}"]
    rows["split"] = "" if args.fractions else _splits(args, info, len(rows))
    unit = plan.unit_of(rows["patient"], args.unit, str(where))
    if args.fractions and unit == "unknown" and args.patient is None:
        raise UserError(
            f"{where}: names no patients to divide by --fractions; --patient names a column that"
            f" does, --patient {grouping.NOBODY} says that the images are independent"
        )
    out = [task for task in info.tasks if task not in kept]
    warnings = [f"task {task.task_name!r} left out: {task.task_target}" for task in out]
    others = {told: ", ".join(getattr(info, entry)) for entry, told in OVERLAPS.items()}
    warnings += [f"{told} {sets}" for told, sets in others.items() if sets]
    warnings += [UNKNOWN] * (unit == "unknown")
    warnings += grouping.check(rows, f"column {args.patient or 'patient_id'}", where, args.unit)
    rows, notes = plan.settle(rows, args.fractions or {"train": 1.0}, args.seed, str(where), unit)
    archive = tiles.Archive(
        origin=f"MedIMeta {info.id} (Woerner et al. 2024), doi 10.48550/arXiv.2404.16000",
        licence=f"{info.license}; that of the source is in info.yaml",
        labels={scheme: {name: name for name in names} for scheme, names in values.items()},
        warnings=tuple(warnings),
        unit=unit,
    )
    told = f"new splits by {args.fractions}, seed {args.seed}"
    card = archive.card(args, [told if args.fractions else f"{args.splits} splits"])
    items, read = _images(args, info, rows, {scheme: f"tasks/{scheme}" for scheme in values})
    options = {"workers": args.workers, "overwrite": args.overwrite, "on_fault": args.on_fault}
    return prepare(args.out, list(items), read, card, notes=notes, **options)


class _Loader(yaml.BaseLoader):
    """Builds texts, lists and mappings, whatever tags ask for; a name that is set twice, of which
    the last value would win without a word, is refused.
    """

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{name} is set twice in the mapping of line {line}")
        return super().construct_mapping(node, deep)


def _info(file: Path) -> _Info:
    """What a set says of itself; each plain value is read as a text, so that No stays No."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; the folder of one MedIMeta set is needed")
    try:
        text = file.read_text("utf-8")
        return _Info.model_validate(_Loader(text).get_single_data())
    except ValidationError as faults:
        fault = faults.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "all of it"
        told = f"{place} is missing or wrong ({fault['msg']})"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = f"not readable YAML ({' '.join(str(error).split())})"
    raise UserError(f"{file}: {told}; the published file is needed")


def _annotations(args: argparse.Namespace, file: Path, kept: Sequence[_Task]) -> pd.DataFrame:
    """By the number of the image: ``patient``, and ``tasks/TASK`` as the table has it."""
    table = tables.read(file)
    if table.empty:
        raise UserError(f"{file}: has no row; at least one is needed")
    needed = ["filepath", *(f"tasks/{task.task_name}" for task in kept)]
    needed += [args.patient] if args.patient not in (None, grouping.NOBODY) else []
    rows = tables.choose(table, file, needed, ["patient_id"])
    owner = "" if args.patient == grouping.NOBODY else rows[args.patient or "patient_id"]
    rows = rows.assign(patient=owner)
    if args.patient is None and (rows["patient"] == "").all():
        grouping.ask(table, range(table.shape[1]), f"{file}: column")
    return rows.set_axis(_numbers(rows["filepath"], len(rows), file)).sort_index()


def _numbers(names: Iterable[str], n: int, where: Path | str) -> list[int]:
    """The numbers of images by their names, if they are 0 to n - 1 in any order."""
    known = {f"images/{number:06d}.tiff": number for number in range(n)}
    found, needed = Counter(names), Counter(known.keys())
    told = [f"{name!r} is one too many" for name in found - needed]
    told += [f"{name!r} is missing" for name in needed - found]
    if told:
        last = f"images/{n - 1:06d}.tiff"
        raise UserError(f"{where}: {told[0]}; images/000000.tiff to {last} are needed, each once")
    return [known[name] for name in names]


def _splits(args: argparse.Namespace, info: _Info, n: int) -> list[str]:
    """The split of each image; one without images has no file."""
    folder, names, splits = args.root / SPLITS[args.splits], [], []
    for split in ("train", "val", "test"):
        file = folder / f"{split}.txt"
        found = file.read_bytes().decode("ascii", "replace").split() if file.is_file() else []
        told = getattr(info, f"{folder.name}_num_samples").get(split, len(found))
        if len(found) != told:
            raise UserError(f"{file}: has {len(found)} images; {told} are needed by info.yaml")
        names += found
        splits += [split] * len(found)
    return list(pd.Series(splits, _numbers(names, n, folder), dtype=str).sort_index())


def _read_task(root: Path, task: _Task, rows: pd.DataFrame) -> dict[str, list[str]]:
    """Puts the labels of a task into the rows, where those of annotations.csv were.

    Returns:
        Label column -> its values.
    """
    file, several = root / "task_labels" / f"{task.task_name}.npy", task.task_target == SEVERAL
    names = PRESENCE if several else task.labels
    try:
        codes = map_array(file)  # refuses pickled objects
    except ValueError as error:
        raise UserError(f"{file}: not a readable array ({error}); fetch it again") from error
    shape = (len(rows), len(task.labels))[: 1 + several]
    if codes.shape != shape:
        raise UserError(f"{file}: has shape {codes.shape}; {shape} is needed")
    lines = codes.reshape(len(rows), -1).tolist()
    for number, (line, cell) in enumerate(
        zip(lines, rows[f"tasks/{task.task_name}"], strict=True)
    ):
        if not all(code in names for code in line):
            told = ", ".join(map(str, names))
            raise UserError(f"{file}: image {number} has label {line}; known: {told}")
        if list(map(float, NUMBER.findall(cell))) != line:
            raise UserError(
                f"{file}: image {number} has label {line} but annotations.csv has {cell!r}; both"
                " are needed as they were published"
            )
    for scheme, column in zip(_schemes(task), zip(*lines, strict=True), strict=True):
        rows[f"tasks/{scheme}"] = [names[code] for code in column]
    return dict.fromkeys(_schemes(task), list(names.values()))


def _images(args: argparse.Namespace, info: _Info, rows: pd.DataFrame, columns: dict[str, str]):
    """What to read, and how: the array of images if it is there, else the pictures."""
    channels, *shape = map(int, info.input_size)
    file, folder, blanks = args.root / "images.hdf5", args.root / "images", tiles.blanks(args)
    if file.is_file():
        arrays.check(file, "images", len(rows), (*shape, channels)[: 2 + (channels == 3)])
        rows = rows.assign(part="images", file=str(file), array="images")
        read = partial(arrays.read_block, size=args.size, blanks=blanks)
        return arrays.blocks(rows, columns), read
    found = files.images(folder)[0] if folder.is_dir() else []
    names = [f"images/{picture.name}" for picture in found]
    _numbers(names, len(rows), f"{folder} (there is no {file.name})")
    rows = rows.assign(file=[str(folder / f"{number:06d}.tiff") for number in rows.index])
    how = files.Reading(args.size, channels=channels, shape=tuple(shape), blanks=blanks)
    return files.blocks(rows, columns), partial(files.read_block, how=how)
