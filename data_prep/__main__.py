"""``python -m data_prep NAME ...``: makes an image set from an archive."""

import argparse
import importlib
import sys
from functools import partial

from hallulib import UserError
from hallulib.__main__ import run

ARCHIVES = {
    "folder": "images in one folder per class, images and a CSV, or tiles without labels",
    "npz": "arrays of one NumPy .npz file",
    "medmnist": "a MedMNIST collection, downloaded or from its .npz file",
    "medimeta": "one set of MedIMeta, its tasks as labels",
    "picai": "PI-CAI prostate MRI: T2-weighted slices graded by expert masks",
    "cbis_ddsm": "CBIS-DDSM film mammograms: benign or malignant by biopsy",
    "inbreast": "INbreast digital mammograms: benign or malignant by BI-RADS",
    "vindr": "VinDr-Mammo digital mammograms: benign or malignant by BI-RADS",
    "nct_crc": "NCT-CRC-HE-100K and CRC-VAL-HE-7K: nine tissues of colorectal cancer",
    "pannuke": "PanNuke: tiles of 19 tissues, with that label or without",
    "patch_camelyon": "PatchCamelyon: lymph nodes, normal or with metastasis",
    "breakhis": "BreakHis: breast tumours, benign or malignant, of eight kinds",
    "join": "several prepared sets as one, each a domain with classes of its own",
}


def parser(archive: str | None = None) -> argparse.ArgumentParser:
    """The command line; only the archive asked for is imported."""
    top = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Makes an image set (images.npy, table.csv, card.json), which every chapter of"
        " the book accepts as DATASET.",
        epilog="A run that was killed, or stopped by a fault, goes on where it stopped when it is"
        " started again; OUT.partial keeps what it read until then.",
    )
    names = top.add_subparsers(dest="archive", metavar="NAME", required=True)
    for name, told in ARCHIVES.items():
        sub = names.add_parser(
            name,
            help=told,
            description=told[0].upper() + told[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == archive:
            importlib.import_module(f"data_prep.archives.{name}").add_arguments(sub)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs one archive; returns the exit status, see `hallulib.__main__.run`."""
    given = sys.argv[1:] if arguments is None else arguments
    args = parser(given[0] if given else None).parse_args(given)
    return run(partial(_make, args))


def _make(args: argparse.Namespace) -> int:
    try:
        report = importlib.import_module(f"data_prep.archives.{args.archive}").run(args)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; a readable file is needed"
        ) from error
    print(report)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be Unicode
    sys.exit(main())
