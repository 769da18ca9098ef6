"""Several prepared image sets as one, each a domain with classes and patients of its own."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from data_prep import arrays, pictures, plan
from data_prep.staging import File, Study
from data_prep.writer import Report, prepare
from hallulib import UserError
from hallulib.data.checks import area_average, map_array

HELP = """
SET is a folder that python -m data_prep wrote, or the name of an embedded set; COLUMN is one of
its label columns. A set keeps its splits and its patients, whose names are prefixed by its own.
The label column class holds "SET: LABEL", the label column domain the set; the columns set and
item lead back to each image. Where any set has colours, grey is repeated in three channels.

  python -m data_prep join sets/both sets/brain=label sets/lesions=label --size 32
  python -m data_prep join sets/drawn lesions=isup histology=tissue --size 32 --grey
"""


@dataclass(frozen=True)
class Block:
    """Neighbouring images of one set from ``start`` on, and their rows of the table.

    ``source`` is the file of images, or the name of an embedded set.
    """

    key: str
    source: File | str
    start: int
    rows: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class Shape:
    """What all images become: their side and channels; ``margin``: see `add_arguments`."""

    size: int
    channels: int
    margin: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    plan.add_output(parser)
    told = "a prepared set and the label column that names its classes"
    parser.add_argument("sets", nargs="+", metavar="SET=COLUMN", help=told)
    parser.add_argument("--grey", action="store_true", help="make all images grey")
    told = (
        "sets smaller than --size keep their pixels and get a mirrored margin (default: refused)"
    )
    parser.add_argument("--margin", action="store_true", help=told)


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a set is no image set, has no such column, is smaller than the size or has the
            name of another, or the output lies in one of them.
    """
    columns = dict(map(_pair, args.sets))
    if len(columns) < len(args.sets):
        raise UserError(f"{' '.join(args.sets)}: a set is there twice; each once is needed")
    parts = _parts(args, columns)
    colour = not args.grey and any(part.channels == 3 for part in parts.values())
    shape = Shape(args.size, 3 if colour else 1, args.margin)
    items = [
        block
        for (path, column), part in zip(columns.items(), parts.values(), strict=True)
        for block in _blocks(path, part, column)
    ]
    card = _card(args, parts, dict(zip(parts, columns.values(), strict=True)), shape)
    read = partial(read_block, shape=shape)
    # one process: an embedded set is drawn once, and folders are read as fast as the disk gives
    return prepare(args.out, items, read, card, workers=1, overwrite=args.overwrite)


def read_block(block: Block, shape: Shape) -> Study:
    """Reads one block; its images become of this shape."""
    images = _images(block.source, shape.size)
    images = np.asarray(images[block.start : block.start + len(block.rows)])
    images = _to_size(images, shape.size)
    if images.shape[1] > shape.channels:
        grey = [pictures.luminance(np.moveaxis(image, 0, -1)) for image in images]
        images = np.stack(grey)[:, None]
    images = np.repeat(images, shape.channels // images.shape[1], axis=1)
    return Study(list(np.ascontiguousarray(images)), [dict(row) for row in block.rows])


def _pair(text: str) -> tuple[str, str]:
    path, _, column = text.rpartition("=")
    if not path or not column:
        raise UserError(f"{text!r} is not like SET=COLUMN, a set and one of its label columns")
    return path, column


def _parts(args: argparse.Namespace, columns: Mapping[str, str]) -> dict:
    """The sets by their names."""
    parts: dict = {}
    for path, column in columns.items():
        part = _open(path, args)
        part.classes(column)  # refuses a column that is not there
        if part.name in parts or ":" in part.name:
            told = "is that of another set too" if part.name in parts else "has a colon"
            raise UserError(
                f"{path}: its name {part.name!r} {told}; prepare it with another --name"
            )
        parts[part.name] = part
    return parts


def _open(path: str, args: argparse.Namespace):
    """A set as it is stored; an embedded one as it is drawn at this size."""
    from hallulib.data import imageset  # late: torch takes seconds

    part = imageset.open(path)
    if part.path is None:
        return imageset.open(path, args.size)
    folder, out = part.path.resolve(), args.out.resolve()
    if out == folder or out.is_relative_to(folder):
        raise UserError(f"{args.out} lies in the set {path}; another output is needed")
    if part.size < args.size and not args.margin:
        raise UserError(
            f"{path}: images are {part.size} pixels wide and --size is {args.size}; enlarging"
            " invents detail, so a smaller --size is needed, or --margin that mirrors their edges"
        )
    return part


def _blocks(path: str, part, scheme: str) -> Iterator[Block]:
    """The images of a set in blocks, with the rows that they get."""
    rows = []
    told = ("patient", "split", scheme)
    for item, (patient, split, label) in enumerate(zip(*map(part.table.get, told), strict=True)):
        row = {"patient": f"{part.name}: {patient}", "split": split}
        row |= {"class": f"{part.name}: {label}"} if label else {}
        # what is unlabelled has no label at all; the column set tells where it comes from
        row |= {"domain": part.name} if split != "unlabelled" else {}
        rows.append(tuple((row | {"set": part.name, "item": str(item)}).items()))
    source = File.of(part.path / "images.npy") if part.path else path
    for start in range(0, len(rows), arrays.BLOCK):
        block = tuple(rows[start : start + arrays.BLOCK])
        yield Block(f"{part.name} {start // arrays.BLOCK}", source, start, block)


@lru_cache(maxsize=1)
def _images(source: File | str, size: int) -> np.ndarray:
    if isinstance(source, File):
        return map_array(source.path)
    from hallulib.data import imageset

    return imageset.open(source, size).images


def _to_size(images: np.ndarray, size: int) -> np.ndarray:
    """Area-averaged, or with a mirrored margin around the pixels as they are."""
    side = images.shape[-1]
    if side > size:
        return area_average(images, size)
    before = (size - side) // 2
    around = (before, size - side - before)
    return np.pad(images, ((0, 0), (0, 0), around, around), "symmetric")


def _card(args: argparse.Namespace, parts: Mapping, schemes: Mapping, shape: Shape) -> dict:
    """All that the cards of the sets say, each sentence after the name of its set."""
    domains = {name: _domain(part, schemes[name], shape.size) for name, part in parts.items()}
    of_each = lambda key: "; ".join(f"{name}: {about[key]}" for name, about in domains.items())
    (first, *others), classes = domains.values(), {}
    common = lambda key: all(one[key] == first[key] for one in others) and first[key]
    for name, part in parts.items():
        about = part.card["labels"][schemes[name]]
        told = {value: value for value in about["values"]} | about.get("meaning", {})
        classes |= {f"{name}: {value}": f"{name}: {told[value]}" for value in about["values"]}
    how = "smaller sets with a mirrored margin" if shape.margin else "none enlarged"
    steps = _sentences(parts, lambda card: card["processing"].get("steps", []))
    joined = f"joined: area-averaged to {shape.size} pixels, {how}; channels {shape.channels}"
    return {
        "name": args.name or args.out.name,
        "origin": of_each("origin"),
        "licence": of_each("licence"),
        "spacing_mm": common("spacing_mm") or None,
        "processing": {"steps": [*steps, joined]},
        "labels": {
            "class": {"values": list(classes), "meaning": classes},
            "domain": {"values": list(parts), "meaning": {name: name for name in parts}},
        },
        "unit": common("unit") or "group",
        "coordinates": ["set", "item"],
        "warnings": _sentences(parts, lambda card: card.get("warnings", [])),
        "domains": domains,
    }


def _domain(part, scheme: str, size: int) -> dict:
    """What the card tells of one set at this size."""
    spacing, reduced = part.card["spacing_mm"], max(1, part.size / size)
    return {
        "scheme": scheme,
        "classes": [f"{part.name}: {value}" for value in part.classes(scheme)],
        "origin": part.card["origin"],
        "licence": part.card["licence"],
        "unit": part.unit,
        "spacing_mm": spacing and [mm * reduced for mm in spacing],
        "identity": part.identity,
    }


def _sentences(parts: Mapping, of: Callable[[dict], list[str]]) -> list[str]:
    return [f"{name}: {told}" for name, part in parts.items() for told in of(part.card)]
