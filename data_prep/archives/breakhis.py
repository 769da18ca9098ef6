r"""BreakHis: eight kinds of breast tumour under a microscope at four magnifications, as a set.

A file such as ``SOB_B_A-14-22549AB-40-001.png`` tells the class (B or M), the subtype (A), the
biopsy (year 14, number 22549), the slide (AB) and the magnification. The biopsy stands for the
patient: of its slides AB, CD and G none may be in another split than the others.

Slide 14-13412 is filed under ductal and under lobular carcinoma, with the same images; such images
keep their diagnosis and lose their subtype.

Source:
    Spanhol et al., A dataset for breast cancer histopathological image classification, IEEE
    Transactions on Biomedical Engineering 63 (2016).
"""

import argparse
import re
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import files, plan, tiles
from data_prep.writer import Report, prepare
from hallulib import UserError

HELP = """
ROOT is BreaKHis_v1, with histology_slides/breast/benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/ and
so on; the eight folders of subtypes are needed. Images of 700 x 460 pixels are cropped to their
centre unless --fit pad.

  python -m data_prep breakhis BreaKHis_v1 sets/breakhis --magnification 200 --size 128
"""
SUBTYPES = {  # folder -> class, code in file names, meaning
    "adenosis": ("benign", "A", "adenosis"),
    "fibroadenoma": ("benign", "F", "fibroadenoma"),
    "phyllodes_tumor": ("benign", "PT", "phyllodes tumour"),
    "tubular_adenoma": ("benign", "TA", "tubular adenoma"),
    "ductal_carcinoma": ("malignant", "DC", "ductal carcinoma"),
    "lobular_carcinoma": ("malignant", "LC", "lobular carcinoma"),
    "mucinous_carcinoma": ("malignant", "MC", "mucinous carcinoma"),
    "papillary_carcinoma": ("malignant", "PC", "papillary carcinoma"),
}
NAME = re.compile(
    r"SOB_(?P<kind>[BM])_(?P<code>[A-Z]+)-(?P<biopsy>\d\d-\d+)(?P<slide>[A-Z]*)"
    r"-(?P<magnification>\d+)-\d+"
)
PUBLISHED = {"40": 1995, "100": 2081, "200": 2013, "400": 1820}  # images at each magnification
COLUMNS = ["file", "patient", "slide", "diagnosis", "subtype", "magnification"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep breakhis``."""
    parser.epilog = HELP
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder BreaKHis_v1")
    plan.add_output(parser)
    told = "which images (default %(default)s)"
    known = [*PUBLISHED, "all"]
    parser.add_argument("--magnification", choices=known, default="40", help=told)
    told = "how to make squares (default crop)"
    parser.add_argument("--fit", choices=["pad", "crop"], default="crop", help=told)
    plan.add_splits(parser)
    tiles.add_arguments(parser, "report")
    plan.add_fault(parser, "file")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: a folder is missing, a file name contradicts its folder, or an image cannot be
            read.
    """
    rows, notes = list_images(args.root)
    wanted = list(PUBLISHED) if args.magnification == "all" else [args.magnification]
    rows = rows[rows["magnification"].isin(wanted)].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{args.root}: no image at {args.magnification}X; at least one is needed")
    rows.index += 1
    # strata of subtypes, the one that is withheld too: what is rare shall be in every split
    rows = rows.assign(label=rows["subtype"], split="")
    twice = rows.groupby("slide")["subtype"].transform("nunique") > 1
    rows.loc[twice, "subtype"] = ""
    notes += ["image of a slide filed under two subtypes: no subtype"] * int(twice.sum())
    rows, odd = plan.settle(rows, args.fractions, args.seed, str(args.root))
    found = rows["magnification"].value_counts()
    missing = [tiles.incomplete(f"{m}X", found.get(m, 0), PUBLISHED[m]) for m in wanted]
    steps = [
        f"magnification {args.magnification}; {args.fit} to a square",
        f"splits by patient, stratified by subtype, seed {args.seed}, {args.fractions}",
    ]
    columns = {name: name for name in ("diagnosis", "subtype", "magnification")}
    how = files.Reading(args.size, args.fit, blanks=tiles.blanks(args))
    return prepare(
        args.out,
        list(files.blocks(rows, columns)),
        partial(files.read_block, how=how),
        archive(sum(missing, ())).card(args, steps, "magnification"),
        notes=[*notes, *odd],
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def archive(warnings: tuple[str, ...]) -> tiles.Archive:
    """The archive, with warnings about what was found of it."""
    diagnoses = {"benign": "benign tumour", "malignant": "malignant tumour"}
    subtypes = {name: meaning for name, (_, _, meaning) in SUBTYPES.items()}
    return tiles.Archive(
        origin="BreakHis 1 (Spanhol et al. 2016), Federal University of Paraná",
        licence="CC BY 4.0",
        labels={"diagnosis": diagnoses, "subtype": subtypes},
        warnings=("a biopsy, whatever its slides, stands for a patient", *warnings),
        unit="patient",
    )


def list_images(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The images of all magnifications.

    Returns:
        One row per image, `COLUMNS`; and notes.

    Raises:
        UserError: a folder is missing or holds no image, or a file name contradicts its folder.
    """
    breast = _breast(root)
    rows, notes = [], []
    for subtype, (diagnosis, _, _) in SUBTYPES.items():
        folder = breast / diagnosis / "SOB" / subtype
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; one for each of the 8 subtypes is needed")
        before = len(rows)
        for slide in files.folders(folder):
            for place in files.folders(slide):
                images, others = files.images(place)
                rows += [_row(file, subtype) for file in images]
                notes += [files.left_out(file) for file in others]
        if len(rows) == before:
            raise UserError(f"{folder}: no image; folders SLIDE/40X and so on are needed in it")
    return pd.DataFrame(rows, columns=COLUMNS, dtype=str), notes


def _breast(root: Path) -> Path:
    """The folder with benign and malignant."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; BreaKHis_v1 is needed")
    for inner in ("", "breast", "histology_slides/breast", "BreaKHis_v1/histology_slides/breast"):
        if (root / inner / "benign").is_dir() or (root / inner / "malignant").is_dir():
            return root / inner
    raise UserError(
        f"{root}: no folder histology_slides/breast/benign in it; BreaKHis_v1 is needed"
    )


def _row(file: Path, subtype: str) -> tuple[str, ...]:
    diagnosis, code, _ = SUBTYPES[subtype]
    told = NAME.fullmatch(file.stem)
    expected = (diagnosis[0].upper(), code, file.parent.name)
    if not told or (told["kind"], told["code"], f"{told['magnification']}X") != expected:
        raise UserError(
            f"{file}: a name like SOB_{expected[0]}_{code}-14-22549AB-40-001.png, at the"
            " magnification of its folder, is needed there"
        )
    slide = told["biopsy"] + told["slide"]
    return str(file), told["biopsy"], slide, diagnosis, subtype, told["magnification"]
