r"""PI-CAI prostate MRI as an image set: T2W slices with a graded lesion, and benign ones without.

The steps, each of them written to the card:

1. lesion slices: human masks (expert, else Pooch25), or with ``--masks paper`` expert, else
   Bosma22a, the rule nearest to the paper's 2,049 slices, which no rule gives;
2. unlabelled slices: those with gland, of patients without significant cancer in any study;
3. a square crop around the gland, percentiles of its voxels to black and white; with ``--window
   lesion`` a smaller square around the lesion, or around a random point of the gland where there
   is none, of the same grey levels: in 219 lesion slices of 40 studies 16 mm hold 49 % of the
   lesions whole, 24 mm 81 %;
4. patients divided 1,611 : 200 : 238 by images, stratified by grade.

What is odd is counted in the report; studies that cannot be read stop the run (``--on-fault
stop``) or are left out (``skip``), all by name. Patient and study in the table are the public
pseudonyms of the labels repository; of images only pixels and their place are kept, of the
marksheet only grades.

Source:
    Pachetti & Colantonio, MIDL 2024 (short paper): data and proportions. Saha et al. 2024: PI-CAI.
"""

import argparse
from functools import partial
from pathlib import Path

import pandas as pd

from data_prep import plan
from data_prep.archives.picai.images import find
from data_prep.archives.picai.labels import (
    GLANDS,
    LABELS,
    LESIONS,
    MASKS,
    read_mapping,
    read_marksheet,
)
from data_prep.archives.picai.study import PLACE, Case, Settings, read_case
from data_prep.crop import HIGH, LOW
from data_prep.staging import Fault, File, listed
from data_prep.writer import Report, by_fraction, prepare, versions
from hallulib import UserError

WINDOW_MM = 16.0
SHARES = {"train": 1611 / 2049, "val": 200 / 2049, "test": 238 / 2049}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m data_prep picai``."""
    parser.epilog = (
        "example: python -m data_prep picai picai_public_images picai_labels picai_128\n"
        "         python -m data_prep picai picai_public_images picai_labels lesions"
        " --window lesion\n"
        "IMAGES holds picai_public_images_fold*.zip, PATIENT/PATIENT_STUDY_t2w.mha or DICOM series"
        " in folders\nProstateX-NNNN or PATIENT_STUDY, at any depth."
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    parser.add_argument("labels", type=Path, metavar="LABELS", help="clone of picai_labels")
    plan.add_output(parser, "128, of a --window 32")
    parser.set_defaults(size=None)
    add = parser.add_argument
    add("--masks", choices=list(MASKS), default="human", help="lesion masks (default human)")
    add("--spacing", type=float, help="mm per pixel (default 0.5)")
    told = "show each slice by a window around its lesion, or a random point of a benign gland"
    add("--window", choices=["lesion"], help=f"{told} (default: the whole gland)")
    told = f"default {WINDOW_MM:g}, which holds half of the lesions whole; 24 mm: four of five"
    add("--window-mm", type=float, help=f"side of a --window in mm ({told})")
    plan.add_seed(parser)
    plan.add_fault(parser, "study")


def run(args: argparse.Namespace) -> Report:
    """Prepares the image set.

    Raises:
        UserError: nothing to read, impossible settings, or a fault with ``--on-fault stop``.
    """
    settings = _settings(args)
    cases, notes = list_cases(args.images, args.labels, args.on_fault)
    return prepare(
        args.out,
        cases,
        partial(read_case, settings=settings),
        card(args.name or args.out.name, settings, args.seed),
        splits=partial(_divide, notes=notes, seed=args.seed),
        notes=notes,
        workers=args.workers,
        overwrite=args.overwrite,
        on_fault=args.on_fault,
    )


def _settings(args: argparse.Namespace) -> Settings:
    if args.window:
        if args.spacing is not None:
            raise UserError("--spacing is given with --window; --size and --window-mm tell it")
        size = 32 if args.size is None else args.size
        width = WINDOW_MM if args.window_mm is None else args.window_mm
        spacing, found = width / size, f"size {size} and window {width:g} mm"
    else:
        if args.window_mm is not None:
            raise UserError("--window-mm is given without --window; --window lesion is needed")
        size = 128 if args.size is None else args.size
        spacing = 0.5 if args.spacing is None else args.spacing
        found = f"size {size} and spacing {spacing:g}"
    if not (0.01 <= spacing <= 10 and 8 <= size <= 1024):
        raise UserError(f"{found} are given; 8 to 1024 pixels of 0.01 to 10 mm are needed")
    return Settings(args.masks, size, spacing, bool(args.window))


def list_cases(images: Path, labels: Path, on_fault: str = "stop") -> tuple[list[Case], list[str]]:
    """The studies whose image is there, in the order of the marksheet; and what was odd.

    Args:
        images: folder of zips, MetaImages or DICOM series.
        labels: clone of the labels repository.
        on_fault: ``stop`` tells all faults, ``skip`` counts them.

    Raises:
        UserError: there is no image, or a fault with ``stop``.
    """
    entries = read_marksheet(labels)
    found = find(images, read_mapping(labels))
    unknown = "image without a row in the marksheet"
    for key in sorted(set(found.of) - set(entries)):
        sentence = f"{labels}: the marksheet has no study {key} of {images}; a row is needed"
        found.faults.append(Fault(sentence, unknown))
    if on_fault == "stop" and found.faults:
        raise UserError(listed(found.faults))
    keys = [key for key in entries if key in found.of]
    if not keys:
        raise UserError(
            f"{images}: no T2W image of PI-CAI; zips or folders with PATIENT_STUDY_t2w.mha, or"
            " DICOM series in folders ProstateX-NNNN or PATIENT_STUDY are needed"
        )
    notes = found.notes + [f"left out: {fault.kind}" for fault in found.faults]
    notes += ["study of the marksheet without image"] * (len(entries) - len(keys))
    return [Case(entries[key], found.of[key], _masks(labels, key)) for key in keys], notes


def card(name: str, settings: Settings, seed: int) -> dict:
    """What a reader must know of the set; every setting that changes a pixel is in the steps."""
    width = settings.size * settings.spacing
    crop = f"crop {width:g} mm around the gland, linear to {settings.spacing:g} mm, edge repeated"
    if settings.windows:
        crop = (
            f"window {width:g} mm around the centroid of the slice's largest lesion of its grade,"
            " unlabelled around a random point of its gland seeded by the study, moved inwards at"
            f" the border; linear to {settings.spacing:g} mm"
        )
    steps = [
        f"lesion slices: any voxel of the {', else '.join(MASKS[settings.masks])} mask",
        "grade: highest voxel of the slice for expert masks, else case_ISUP",
        f"unlabelled: slices with gland ({', else '.join(GLANDS)}) of patients without csPCa",
        "masks at the nearest voxel in space; slices counted from feet to head",
        "DICOM: rescaled; pixel padding as background",
        crop,
        f"percentiles {LOW:g} to {HIGH:g} of the gland's voxels (else of the"
        f" {'image' if settings.windows else 'crop'}) to 0 to 255",
        f"patients divided 1611:200:238 by images, stratified by isup, seed {seed}",
    ]
    return {
        "name": name,
        "origin": "PI-CAI public training images (Saha et al. 2024), T2W, with the labels of"
        " github.com/DIAGNijmegen/picai_labels (Bosma et al. 2022, Pooch et al. 2025)",
        "licence": "labels CC BY-NC 4.0; images under the terms of the archive they come from",
        "spacing_mm": [settings.spacing, settings.spacing],
        "processing": {"steps": steps, "versions": versions("pydicom", "scipy")},
        "labels": {name: {"values": list(told), "meaning": told} for name, told in LABELS.items()},
        "unit": "patient",
        "coordinates": ["study", "slice", "mask", *PLACE * settings.windows],
    }


def too_few(table: pd.DataFrame) -> list[str]:
    """Grades whose patients, in some split, cannot fill both support and query.

    Args:
        table: with ``patient``, ``split`` and ``isup``.
    """
    notes = []
    for grade in LABELS["isup"]:
        of_grade = table[table["isup"] == grade]
        n = {s: of_grade.loc[of_grade["split"] == s, "patient"].nunique() for s in SHARES}
        if min(n.values()) < 2:
            told = ", ".join(f"{count} in {split}" for split, count in n.items())
            notes.append(
                f"isup {grade} has too few patients ({told}): support and query of different"
                " patients need 2 in each split"
            )
    return notes


def _divide(table: pd.DataFrame, notes: list[str], seed: int) -> dict[str, str]:
    """The division of patients; adds to ``notes``, which the writer counts after it."""
    decided = by_fraction("isup", SHARES, seed)(table)
    notes += too_few(table.assign(split=table["patient"].map(decided)))
    return decided


def _masks(labels: Path, key: str) -> tuple[tuple[str, File], ...]:
    paths = {
        source: labels / folder / f"{key}.nii.gz" for source, folder in (LESIONS | GLANDS).items()
    }
    return tuple((source, File.of(path)) for source, path in paths.items() if path.is_file())
