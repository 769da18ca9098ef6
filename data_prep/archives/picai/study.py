"""One PI-CAI study as slices of an image set: its lesion slices, or its gland slices.

Each slice shows the same square around the gland, or a window of its own: around the centroid of
its lesion or, in a study without, around a random point of its gland.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

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

PLACE = ("row", "column")  # of the middle of a window, in voxels of the slice
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
        windows: whether each slice has a window of its own.
    """

    masks: str = "human"
    size: int = 128
    spacing: float = 0.5
    windows: bool = False


def read_case(case: Case, settings: Settings) -> Study:
    """Reads one study: its lesion slices if it has significant cancer, else its gland slices.

    Raises:
        Fault: it cannot be read, or its slices are smaller than a window.
    """
    image = case.image.read()
    if not np.isfinite(image.pixels).all():
        raise Fault(f"{case.key}: the image has pixels that are not finite", "pixels not finite")
    _check_room(case, image, settings.size)
    masks = {source: read_file(Path(file.path)) for source, file in case.masks}
    notes = list(rule_counts(case.entry, len(image.pixels), masks))
    gland, source = _gland(case, image, masks, notes)
    if gland is None:
        told = "grey levels of" if settings.windows else "cropped around the middle of"
        notes.append(f"study without gland: {told} the image")
    middle = np.array(image.pixels.shape[1:]) / 2 - 0.5 if gland is None else centre_of(gland)
    window = Window(middle, image.spacing[1:], settings.spacing, settings.size)
    if settings.windows:
        _check_fits(case, image, window)
    if case.entry.isup >= 2:
        found = _lesion_slices(case, image, masks, settings, window, notes)
    else:
        found = _gland_slices(case, gland, source, masks, settings, window, notes)
    if not found:
        return Study([], [], notes)
    if not settings.windows and window.reaches_beyond(image.pixels.shape[1:]):
        notes += ["slice whose crop reaches beyond the image: edge repeated"] * len(found)
    if gland is not None:  # of it alone: a full bladder would darken all else
        grey = _ends(case, image.pixels[gland > 0])
    else:
        grey = _ends(case, image.pixels if settings.windows else window.cut(image.pixels))
    images = [to_bytes(view.cut(image.pixels[[row["slice"]]]), *grey) for row, view in found]
    return Study(images, [row for row, _ in found], notes)


def _check_room(case: Case, image: Volume, size: int) -> None:
    """Refuses many slices or wide ones: cut to ``size``, few voxels would become many."""
    n, _, columns = image.pixels.shape
    if n * size * max(size, columns) > ROOM:
        raise Fault(
            f"{case.key}: {n} slices of {columns} columns cut to {size} pixels do not fit in"
            f" memory; at most {ROOM / size:g} slices times columns or pixels are needed",
            "too many slices",
        )


def _ends(case: Case, tissue: np.ndarray) -> tuple[float, float]:
    """The grey values of a study that become black and white."""
    black, white = ends(tissue)
    if not white > black:
        raise Fault(f"{case.key}: the image has no contrast; it must show tissue", "no contrast")
    return black, white


def _check_fits(case: Case, image: Volume, window: Window) -> None:
    """Refuses slices that a window would leave."""
    height, width = image.pixels.shape[1:] * image.spacing[1:]
    side = window.target * window.size
    if side > min(height, width) + 1e-3:  # what is less is rounding of directions
        raise Fault(
            f"{case.key}: a window of {side:g} mm is larger than the slice of {height:g} x"
            f" {width:g} mm; a smaller --window-mm is needed",
            "window larger than the slice",
        )


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
    return None, ""


def _fitted(case: Case, image: Volume, masks: dict[str, Volume], source: str, notes: list[str]):
    mask = on_grid(masks[source], image, f"{case.key}: the {source} mask")
    if masks[source].pixels.shape != image.pixels.shape:
        notes.append(f"{source} mask on another grid of the same field: nearest voxels taken")
    return mask


def _lesion_slices(
    case: Case,
    image: Volume,
    masks: dict[str, Volume],
    settings: Settings,
    window: Window,
    notes: list[str],
) -> list[tuple[dict, Window]]:
    """The row of each lesion slice, and what is seen of it."""
    rule = MASKS[settings.masks]
    source = next((name for name in rule if name in masks), None)
    if source is None or not masks[source].pixels.any():
        kind = f"with empty {source}" if source else f"without {' or '.join(rule)}"
        notes.append(f"study with csPCa {kind} mask: left out")
        return []
    mask = _fitted(case, image, masks, source, notes)
    grades, odd = slice_grades(mask, source, case.entry)
    notes += odd if grades else ["lesion smaller than the voxels of the image: left out"]
    found = []
    for k, isup in grades.items():
        lesion = largest_lesion(mask[k]) if settings.windows else mask[k]
        place, view = np.array(np.nonzero(lesion)), window
        if settings.windows:
            view = _moved(window, place.mean(axis=1), lesion.shape, notes)
        seen = view.shows(place)
        if not seen.all():
            told = "partly outside the crop" if seen.any() else "outside the crop: left out"
            notes.append(f"lesion slice whose lesion is {told}")
        if seen.any():
            score, odd = gleason(isup, case.entry)
            notes += odd
            labels = {"isup": isup, "gs": score, "grade2": "low" if isup == 2 else "high"}
            found.append((_row(case, k, source, settings, view) | labels, view))
    return found


def _gland_slices(
    case: Case,
    gland: np.ndarray | None,
    source: str,
    masks: dict[str, Volume],
    settings: Settings,
    window: Window,
    notes: list[str],
) -> list[tuple[dict, Window]]:
    """The row of each slice with gland, and what is seen of it."""
    if "expert" in masks:
        check_values(masks["expert"].pixels, "expert", case.key)
        if masks["expert"].pixels.any():
            notes.append("expert mask of a study without csPCa is not empty: ignored")
    found = []
    if not case.entry.alone:
        notes.append("study without csPCa of a patient with csPCa in another: left out")
    elif gland is None:
        notes.append("study without csPCa without gland mask: left out")
    else:
        rng, view = np.random.default_rng(int(case.entry.study)), window
        for k in np.flatnonzero(gland.any(axis=(1, 2))):
            if settings.windows:
                view = _moved(window, _point(gland[k], rng), gland[k].shape, notes)
            row = _row(case, int(k), source, settings, view) | {"split": "unlabelled"}
            found.append((row, view))
    return found


def largest_lesion(mask: np.ndarray) -> np.ndarray:
    """The largest connected part, corners included, of the highest value in a slice.

    Args:
        mask: (rows, columns), not empty.

    Returns:
        bool (rows, columns); of parts of one size the first.
    """
    parts, _ = ndimage.label(mask == mask.max(), np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    return parts == 1 + sizes[1:].argmax()


def _point(gland: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A row and column (2,) anywhere in the voxels of a gland, with equal chances."""
    return rng.choice(np.argwhere(gland)) + rng.uniform(-0.5, 0.5, 2)


def _moved(window: Window, centre: np.ndarray, shape: tuple, notes: list[str]) -> Window:
    view = window.moved(centre, shape)
    if not np.array_equal(view.centre, centre):
        notes.append("window at the border of the slice: moved inwards")
    return view


def _row(case: Case, k: int, source: str, settings: Settings, view: Window) -> dict:
    patient, study = case.entry.patient, case.entry.study
    row = {"patient": patient, "split": "", "study": study, "slice": k, "mask": source}
    places = [f"{x:.2f}" for x in view.centre]
    return row | (dict(zip(PLACE, places, strict=True)) if settings.windows else {})
