r"""PatchCamelyon: 327,680 tiles of lymph nodes, with or without metastasis, as a set.

Splits are the official ones. The table of each, if it is there, names the slide of each tile; the
slide stands for the patient.

Source:
    Veeling et al., Rotation equivariant CNNs for digital pathology, MICCAI 2018.
    https://arxiv.org/abs/1806.03962
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep import arrays, plan, tiles
from data_prep.tables import read_table
from data_prep.writer import Report
from hallulib import UserError

HELP = """
ROOT holds camelyonpatch_level_2_split_train_x.h5 and ..._train_y.h5, unpacked by gunzip, and the
same for valid and test; with ..._train_meta.csv and so on, tiles are kept together by slide.

  python -m data_prep patch_camelyon pcam sets/pcam --size 48
"""
SPLITS = {"train": "train", "valid": "val", "test": "test"}
PUBLISHED = {"train": 262_144, "valid": 32_768, "test": 32_768}
TISSUES = {
    "normal": "no tumour in the 32 x 32 pixels in the middle",
    "tumor": "at least one pixel of metastasis there",
}
SHAPE = (96, 96, 3)
MICROMETRES = 0.972  # per pixel
NO_TABLE = "no table names slides of {}: they may be in other splits too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep patch_camelyon``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the HDF5 files")
    plan.add_output(parser)
    tiles.add_arguments(parser, "report")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a file is missing or damaged, or files do not fit each other.
    """
    parts = {name: _split(args.root, name) for name in SPLITS}
    warnings = [NO_TABLE.format(name) for name, part in parts.items() if not part["patient"].any()]
    for name, part in parts.items():
        warnings += tiles.incomplete(name, len(part), PUBLISHED[name])
    rows = pd.concat(parts.values())
    unit = "slide" if rows["patient"].any() else "unknown"
    rows, notes = plan.settle(rows, {"train": 1.0}, 0, str(args.root), unit)
    archive = tiles.Archive(
        origin="PatchCamelyon (Veeling et al. 2018), from CAMELYON16",
        licence="CC0 1.0",
        labels={"tissue": TISSUES},
        warnings=("a slide stands for a patient", *warnings),
        width=SHAPE[1] * MICROMETRES / 1000,
        unit=unit,
    )
    items = list(arrays.blocks(rows, {"tissue": "label", "item": "item"}))
    card = archive.card(args, ["official splits"])
    return arrays.write(args, items, card, notes, args.workers)


def _split(root: Path, name: str) -> pd.DataFrame:
    """The plan of one split: labels and, where they are told, slides."""
    start = f"camelyonpatch_level_2_split_{name}"
    x, y = (_present(root / f"{start}_{array}.h5") for array in "xy")
    labels = _labels(y)
    arrays.check(x, "x", len(labels), SHAPE)
    table = root / f"{start}_meta.csv"
    slides = read_table(table, ["wsi"])["wsi"] if table.is_file() else [""] * len(labels)
    if len(slides) != len(labels):
        raise UserError(f"{table}: {len(slides)} rows for {len(labels)} labels; one each needed")
    item = [f"{name} {position}" for position in range(len(labels))]
    rows = {"label": labels, "split": SPLITS[name], "patient": list(slides), "item": item}
    return pd.DataFrame(rows, dtype=str).assign(part=name, file=str(x), array="x")


def _present(file: Path) -> Path:
    packed = file.with_name(f"{file.name}.gz")
    if not file.is_file():
        told = f"; {packed.name} is there, which gunzip unpacks" if packed.is_file() else ""
        raise UserError(f"{file}: no such file; all splits are needed, x and y of each{told}")
    return file


def _labels(file: Path) -> list[str]:
    found = arrays.dataset(str(file), "y")
    if not found.shape or found.size != found.shape[0] or found.dtype.kind not in "bui":
        told = f"{found.dtype} {found.shape}"
        raise UserError(f"{file}: array y is {told}; one whole number per image is needed")
    try:
        values = arrays.entries(found, 0, found.shape[0]).ravel()
    except OSError as error:
        raise UserError(f"{file}: array y is damaged ({error}); fetch it again") from error
    strange = values[~np.isin(values, (0, 1))]
    if len(strange):
        raise UserError(f"{file}: array y has {strange[0]}; 0 (normal) and 1 (tumor) are known")
    return [list(TISSUES)[int(value)] for value in values]
