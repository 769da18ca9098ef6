"""One PI-CAI study as slices of an image set: its lesion slices, or its gland slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.archives.picai.images import Source
from data_prep.archives.picai.labels import (
    GLANDS,
    MASKS,
    Entry,
    check_values,
    gleason,
    rule_counts,
    slice_grades,
)
from data_prep.crop import Window, centre_of, ends, to_bytes
from data_prep.staging import File, Study
from data_prep.volumes import Fault, Volume, on_grid, read_file

ROOM = 2**27  # pixels of all crops of a study, half resampled; each takes 8 bytes three times


@dataclass(frozen=True)
class Case:
    """One study: what the marksheet says, its image, and its masks by source."""

    entry: Entry
    image: Source
    masks: tuple[tuple[str, File], ...]

    @property
    def key(self) -> str:
        """Public pseudonym of patient and study."""
        return self.entry.key


@dataclass(frozen=True)
class Settings:
    """What decides the pixels and rows.

    Args:
        masks: ``human`` or ``paper``.
        size: pixels per side.
        spacing: mm per pixel.
    """

    masks: str = "human"
    size: int = 128
    spacing: float = 0.5


def read_case(case: Case, settings: Settings) -> Study:
    """Reads one study: its lesion slices if it has significant cancer, else its gland slices.

    Raises:
        Fault: it cannot be read.
    """
    image = case.image.read()
    if not np.isfinite(image.pixels).all():
        raise Fault(f"{case.key}: the image has pixels that are not finite", "pixels not finite")
    _check_room(case, image, settings.size)
    masks = {source: read_file(Path(file.path)) for source, file in case.masks}
    notes = list(rule_counts(case.entry, len(image.pixels), masks))
    gland, source = _gland(case, image, masks, notes)
    middle = np.array(image.pixels.shape[1:]) / 2 - 0.5 if gland is None else centre_of(gland)
    window = Window(middle, image.spacing[1:], settings.spacing, settings.size)
    if case.entry.isup >= 2:
        rows = _lesion_rows(case, image, masks, MASKS[settings.masks], window, notes)
    else:
        rows = _gland_rows(case, gland, source, masks, notes)
    if rows and window.reaches_beyond(image.pixels.shape[1:]):
        notes += ["slice whose crop reaches beyond the image: edge repeated"] * len(rows)
    grey = _grey(case, image, gland, window) if rows else None
    return Study([grey[row["slice"]][None] for row in rows], rows, notes)


def _check_room(case: Case, image: Volume, size: int) -> None:
    """Refuses many slices or wide ones: cut to ``size``, few voxels would become many."""
    n, _, columns = image.pixels.shape
    if n * size * max(size, columns) > ROOM:
        raise Fault(
            f"{case.key}: {n} slices of {columns} columns cut to {size} pixels do not fit in"
            f" memory; at most {ROOM / size:g} slices times columns or pixels are needed",
            "too many slices",
        )


def _grey(case: Case, image: Volume, gland: np.ndarray | None, window: Window) -> np.ndarray:
    """Crops of all slices as bytes (slices, size, size)."""
    pixels = window.cut(image.pixels)
    # of the gland alone: a full bladder would darken all else
    tissue = pixels if gland is None else image.pixels[gland > 0]
    black, white = ends(tissue)
    if not white > black:
        raise Fault(f"{case.key}: the image has no contrast; it must show tissue", "no contrast")
    return to_bytes(pixels, black, white)


def _gland(case: Case, image: Volume, masks: dict[str, Volume], notes: list[str]):
    """The first gland mask that is not empty, at the voxels of the image, and its name."""
    for source in GLANDS:
        if source not in masks:
            notes.append(f"study without {source} gland mask")
            continue
        check_values(masks[source].pixels, source, case.key)
        if masks[source].pixels.any():
            gland = _fitted(case, image, masks, source, notes)
            if gland.any():
                return gland, source
        notes.append(f"study with empty {source} gland mask")
    notes.append("study without gland: cropped around the middle of the image")
    return None, ""


def _fitted(case: Case, image: Volume, masks: dict[str, Volume], source: str, notes: list[str]):
    mask = on_grid(masks[source], image, f"{case.key}: the {source} mask")
    if masks[source].pixels.shape != image.pixels.shape:
        notes.append(f"{source} mask on another grid of the same field: nearest voxels taken")
    return mask


def _lesion_rows(
    case: Case,
    image: Volume,
    masks: dict[str, Volume],
    rule: Sequence[str],
    window: Window,
    notes: list[str],
) -> list[dict]:
    source = next((name for name in rule if name in masks), None)
    if source is None or not masks[source].pixels.any():
        kind = f"with empty {source}" if source else f"without {' or '.join(rule)}"
        notes.append(f"study with csPCa {kind} mask: left out")
        return []
    mask = _fitted(case, image, masks, source, notes)
    grades, odd = slice_grades(mask, source, case.entry)
    notes += odd if grades else ["lesion smaller than the voxels of the image: left out"]
    rows = []
    for k, isup in grades.items():
        seen = window.shows(np.array(np.nonzero(mask[k])))
        if not seen.all():
            told = "partly outside the crop" if seen.any() else "outside the crop: left out"
            notes.append(f"lesion slice whose lesion is {told}")
        if seen.any():
            score, odd = gleason(isup, case.entry)
            notes += odd
            labels = {"isup": isup, "gs": score, "grade2": "low" if isup == 2 else "high"}
            rows.append(_row(case, k, source) | labels)
    return rows


def _gland_rows(
    case: Case,
    gland: np.ndarray | None,
    source: str,
    masks: dict[str, Volume],
    notes: list[str],
) -> list[dict]:
    if "expert" in masks:
        check_values(masks["expert"].pixels, "expert", case.key)
        if masks["expert"].pixels.any():
            notes.append("expert mask of a study without csPCa is not empty: ignored")
    if not case.entry.alone:
        notes.append("study without csPCa of a patient with csPCa in another: left out")
    elif gland is None:
        notes.append("study without csPCa without gland mask: left out")
    else:
        slices = np.flatnonzero(gland.any(axis=(1, 2)))
        return [_row(case, int(k), source) | {"split": "unlabelled"} for k in slices]
    return []


def _row(case: Case, k: int, source: str) -> dict:
    patient, study = case.entry.patient, case.entry.study
    return {"patient": patient, "split": "", "study": study, "slice": k, "mask": source}
