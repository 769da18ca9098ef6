r"""NCT-CRC-HE-100K and CRC-VAL-HE-7K: nine tissues of colorectal cancer, stained, as a set.

Train and val are divided from the first, test is the second, of other patients. No file tells its
patient, so tiles of one patient are in train and in val; only test is clean.

Source:
    Kather et al., PLoS Medicine 16, e1002730 (2019); Zenodo record 1214456.
"""

import argparse
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import files, plan, tiles
from data_prep.writer import Report, prepare
from hallulib import UserError

HELP = """
TRAIN is NCT-CRC-HE-100K, or NCT-CRC-HE-100K-NONORM; each folder holds one folder per tissue, ADI,
BACK, DEB, LYM, MUC, MUS, NORM, STR and TUM, with tiles such as ADI/ADI-AAAFLCLY.tif. BACK is glass
and ADI mostly white, so --blank drop would empty classes.

  python -m data_prep nct_crc NCT-CRC-HE-100K sets/crc --test CRC-VAL-HE-7K --size 64
"""
TISSUES = {
    "ADI": "adipose tissue",
    "BACK": "background",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal colon mucosa",
    "STR": "cancer-associated stroma",
    "TUM": "colorectal adenocarcinoma epithelium",
}
PUBLISHED = {"train": 100_000, "test": 7_180}
SHAPE = (224, 224)
MICROMETRES = 0.5  # per pixel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep nct_crc``."""
    parser.epilog = HELP
    parser.add_argument("train", type=Path, metavar="TRAIN", help="folder NCT-CRC-HE-100K")
    plan.add_output(parser)
    parser.add_argument("--test", type=Path, help="folder CRC-VAL-HE-7K, the test images")
    plan.add_splits(parser)
    parser.set_defaults(fractions="train=.9,val=.1")
    tiles.add_arguments(parser, "report")
    plan.add_fault(parser, "file")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a folder is missing or holds something else, or a tile cannot be read.
    """
    rows, notes = list_tiles(args.train, "")
    warnings = tiles.incomplete("the part for train and val", len(rows), PUBLISHED["train"])
    if args.test:
        more, odd = list_tiles(args.test, "test")
        warnings += tiles.incomplete("test", len(more), PUBLISHED["test"])
        rows, notes = pd.concat([rows, more], ignore_index=True), notes + odd
    rows.index += 1
    rows, odd = plan.settle(rows, args.fractions, args.seed, str(args.train))
    steps = [f"test: {bool(args.test)}; other splits by class, seed {args.seed}, {args.fractions}"]
    how = files.Reading(args.size, shape=SHAPE, blanks=tiles.blanks(args))
    return prepare(
        args.out,
        list(files.blocks(rows, {"tissue": "label"})),
        partial(files.read_block, how=how),
        archive(warnings).card(args, steps),
        notes=[*notes, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def archive(warnings: tuple[str, ...]) -> tiles.Archive:
    """The archive, with warnings about what was found of it."""
    return tiles.Archive(
        origin="NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al. 2019), Zenodo record 1214456",
        licence="CC BY 4.0",
        labels={"tissue": TISSUES},
        warnings=(
            "patients are not published: train and val share patients; only CRC-VAL-HE-7K, which"
            " becomes test, is of other patients",
            *warnings,
        ),
        width=SHAPE[1] * MICROMETRES / 1000,
    )


def list_tiles(root: Path, split: str) -> tuple[pd.DataFrame, list[str]]:
    """The tiles of one of the two parts.

    Returns:
        One row per tile: ``file``, ``patient`` (""), ``label``, ``split``; and notes.

    Raises:
        UserError: a tissue's folder is missing or empty, another folder is there, or a tile is in
            the folder of another tissue.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; NCT-CRC-HE-100K or CRC-VAL-HE-7K is needed")
    found = [folder.name for folder in files.folders(root)]
    if found != sorted(TISSUES):
        raise UserError(
            f"{root}: holds the folders {', '.join(found) or '(none)'};"
            f" {', '.join(TISSUES)} and no other are needed"
        )
    rows, notes = [], []
    for tissue in TISSUES:
        images, others = files.images(root / tissue)
        strange = [file for file in images if not file.name.startswith(f"{tissue}-")]
        if strange or not images:
            told = strange[0] if strange else f"{root / tissue}: no image"
            raise UserError(f"{told}: tiles named {tissue}-XXXXXXXX.tif are needed there")
        rows += [(str(file), "", tissue, split) for file in images]
        notes += [files.left_out(file) for file in others]
    return pd.DataFrame(rows, columns=["file", "patient", "label", "split"], dtype=str), notes
