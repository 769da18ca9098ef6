r"""PanNuke: 7,901 tiles of 19 tissues, in three folds of arrays, as a set.

The folds become train, val and test, or all images are without label. Neither patients nor slides
are published.

Source:
    Gamper et al., PanNuke dataset extension, insights and baselines (2020).
    https://arxiv.org/abs/2003.10778
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data_prep import arrays, plan, tiles
from data_prep.writer import Report
from hallulib import UserError
from hallulib.data.checks import map_array

HELP = """
ROOT holds the unpacked folds: "Fold 1/images/fold1/images.npy" and types.npy beside it, and so on;
masks are not read.

  python -m data_prep pannuke PanNuke sets/pannuke --unlabelled
  python -m data_prep pannuke PanNuke sets/pannuke --folds 2,1,3
"""
TISSUES = (
    "Adrenal_gland Bile-duct Bladder Breast Cervix Colon Esophagus HeadNeck Kidney Liver Lung"
    " Ovarian Pancreatic Prostate Skin Stomach Testis Thyroid Uterus"
).split()
PUBLISHED = {1: 2656, 2: 2523, 3: 2722}
SPLITS = ("train", "val", "test")
SHAPE = (256, 256, 3)
MICROMETRES = 0.25  # per pixel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep pannuke``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the folds")
    plan.add_output(parser)
    told = "folds that become train, val and test, in this order (default %(default)s)"
    parser.add_argument("--folds", type=_folds, default="1,2,3", help=told)
    told = "all images without label; types.npy is not needed"
    parser.add_argument("--unlabelled", action="store_true", help=told)
    tiles.add_arguments(parser, "report")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a fold is missing, or its arrays are damaged or do not fit each other.
    """
    parts = [
        _fold(args.root, fold, "" if args.unlabelled else split)
        for fold, split in zip(args.folds, SPLITS, strict=False)
    ]
    rows, notes = plan.settle(pd.concat(parts), {"train": 1.0}, 0, str(args.root))
    found = [
        tiles.incomplete(f"fold {fold}", len(part), PUBLISHED[fold])
        for fold, part in zip(args.folds, parts, strict=True)
    ]
    told = "no labels" if args.unlabelled else "train, val, test"
    card = archive(args.unlabelled, sum(found, ())).card(
        args, [f"folds {', '.join(map(str, args.folds))}: {told}"]
    )
    items = list(arrays.blocks(rows, {"tissue": "label", "item": "item"}))
    return arrays.write(args, items, card, notes, args.workers)


def archive(unlabelled: bool, warnings: Sequence[str]) -> tiles.Archive:
    """The archive, with or without its labels, with warnings about what was found of it."""
    tissues = {name: name.replace("_", " ").replace("-", " ").lower() for name in TISSUES}
    return tiles.Archive(
        origin="PanNuke (Gamper et al. 2020), doi 10.48550/arXiv.2003.10778",
        licence="CC BY-NC-SA 4.0",
        labels={} if unlabelled else {"tissue": tissues | {"HeadNeck": "head and neck"}},
        warnings=(
            "neither patients nor slides are published: folds may share them",
            *warnings,
        ),
        width=SHAPE[1] * MICROMETRES / 1000,
    )


def find(root: Path, fold: int) -> Path:
    """The folder of the images of a fold.

    Raises:
        UserError: there is none, or several.
    """
    found = sorted({f.parent for f in root.glob(f"**/fold{fold}/images.npy")})
    if len(found) != 1:
        told = f"{len(found)} folders" if found else "no folder"
        raise UserError(
            f"{root}: {told} fold{fold} with images.npy in it; one is needed, as in"
            f" Fold {fold}/images/fold{fold} of the archive"
        )
    return found[0]


def _fold(root: Path, fold: int, split: str) -> pd.DataFrame:
    """The plan of one fold; without split, without label too."""
    folder = find(root, fold)
    file = folder / "images.npy"
    if split:
        types = _types(folder / "types.npy")
    else:
        types = [""] * arrays.opened(str(file), "").shape[0]
    arrays.check(file, "", len(types), SHAPE)
    item = [f"fold{fold} {position}" for position in range(len(types))]
    rows = {"label": types, "split": split, "patient": "", "item": item}
    return pd.DataFrame(rows, dtype=str).assign(part=f"fold{fold}", file=str(file), array="")


def _types(file: Path) -> list[str]:
    """The tissue of each image, as text."""
    try:
        types = map_array(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a readable array of texts ({error}); fetch it again, or use --unlabelled"
        ) from error
    if types.ndim != 1 or types.dtype.kind not in "US":
        raise UserError(f"{file}: is {types.dtype} {types.shape}; one text per image is needed")
    names = types.astype(str).tolist()
    strange = sorted(set(names) - set(TISSUES))
    if strange:
        raise UserError(f"{file}: has {strange[0]!r}; known: {', '.join(TISSUES)}")
    return names


def _folds(text: str) -> list[int]:
    folds = [int(part) for part in text.split(",")]
    if not set(folds) <= set(PUBLISHED) or len(set(folds)) != len(folds):
        raise argparse.ArgumentTypeError(f"{text} is not like 1,2,3, each fold at most once")
    return folds
