r"""The image set: images, a table with patient, split and labels, and a card of their origin.

A folder holds ``images.npy`` (N, C, H, W) uint8, ``table.csv`` with one row per image
(``patient``, ``split``, one column per label scheme, source coordinates) and ``card.json`` (name,
origin, licence, spacing, processing, label order, counts, SHA-256 of the other two).
``python -m data_prep`` writes it; `open` reads it back and believes nothing unchecked.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from hallulib import UserError
from hallulib.data import checks
from hallulib.data.checks import SPLITS
from hallulib.shapes import Images, Labels, PerImage

FILES = ("images.npy", "table.csv", "card.json")
DRAWN = "hallulib.image_sets"  # entry points: whoever draws an embedded set


@dataclass(frozen=True)
class ImageSet:
    """Images with their table and card, see the module; row i of ``table`` is of ``images[i]``.

    ``images`` are uint8 (N, C, H, H), C 1 or 3, memory-mapped when opened from a folder, their
    ``path``; an embedded set has none. The table holds strings, "" where there is no label;
    ``opened`` is the table as `open` read it.
    """

    images: np.ndarray
    table: pd.DataFrame
    card: dict
    path: Path | None = None
    opened: pd.DataFrame | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """Name of the set, from its card."""
        return self.card["name"]

    @property
    def unit(self) -> str:
        """What the column ``patient`` names: "patient" unless the card says otherwise."""
        return self.card.get("unit", "patient")

    @property
    def units(self) -> str:
        """How many of them there are, in words: "18 patients", "60 fields", "unknown patients"."""
        return checks.count_units(self.unit, self.table["patient"].nunique())

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """Height and width of every image, in pixels."""
        return self.images.shape[2]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Label columns; the first is the default."""
        return tuple(self.card["labels"])

    @property
    def identity(self) -> str | dict:
        """What the images are, for runs that depend on them: a checksum, or how they are drawn.

        Where the table is not as it was opened, with a checksum of the table.
        """
        whole = self.card.get("sha256") or self.card.get("identity") or self.card["origin"]
        if self.opened is not None and self.table.equals(self.opened):
            return whole
        rows = hashlib.sha256(self.table.to_csv(index=False).encode()).hexdigest()
        return {"of": whole, "table": rows}

    def classes(self, scheme: str) -> tuple[str, ...]:
        """The label values of a scheme, in the order of the card; `UserError` if it has none."""
        if scheme not in self.card["labels"]:
            known = ", ".join(self.schemes) or "none"
            raise UserError(f"{self.name}: no label scheme {scheme!r}; known schemes: {known}")
        return tuple(self.card["labels"][scheme]["values"])

    def labels(self, scheme: str) -> Labels:
        """Index of each image's label in ``classes(scheme)``, int64; -1 where it has none."""
        order = {value: index for index, value in enumerate(self.classes(scheme))}
        return torch.tensor([order.get(v, -1) for v in self.table[scheme]], dtype=torch.int64)

    def tensor(self, rows: Sequence[int] | np.ndarray | slice | None = None) -> Images:
        """Images at ``rows``, or all, as float32 in [-1, 1]: ``u / 127.5 - 1``; no other scaling.

        What does not fit into the memory is a `UserError`.
        """
        rows = slice(None) if rows is None else rows
        n = len(np.arange(len(self))[rows])
        # 5 bytes of a value: a copy, as torch must not write through to the file, and as float32
        checks.check_memory(n, self.channels, self.size, self.name, each=5)
        return torch.from_numpy(np.array(self.images[rows])).float().div_(127.5).sub_(1)

    def select(
        self,
        split: str | Sequence[str] | None = None,
        labelled: str | None = None,
        patients: Sequence[str] | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
    ) -> "ImageSet":
        """The images that meet every condition given, in their present order.

        ``split`` is one or several, ``labelled`` a scheme in which they have a label; ``rows`` are
        positions, in any order. Neighbouring rows stay memory-mapped, scattered ones are copied to
        memory. An unknown split or scheme, no image left, or more than fits into the memory is a
        `UserError`.
        """
        keep = np.ones(len(self), bool)
        if split is not None:
            wanted = [split] if isinstance(split, str) else list(split)
            if strange := sorted(set(wanted) - set(SPLITS)):
                known = ", ".join(SPLITS)
                raise UserError(f"{self.name}: no split {strange[0]!r}; known splits: {known}")
            keep &= self.table["split"].isin(wanted).to_numpy()
        if labelled is not None:
            keep &= self.labels(labelled).numpy() >= 0
        if patients is not None:
            keep &= self.table["patient"].isin([str(p) for p in patients]).to_numpy()
        if rows is not None:
            keep &= np.isin(np.arange(len(self)), rows)
        taken = np.flatnonzero(keep)
        if not len(taken):
            raise UserError(
                f"{self.name}: no image with split {split or 'any'} and label scheme"
                f" {labelled or 'any'} among those asked for; its table lists what there is"
            )
        if taken[-1] - taken[0] + 1 == len(taken):
            images = self.images[taken[0] : taken[-1] + 1]
        else:
            checks.check_memory(len(taken), self.channels, self.size, self.name)
            images = self.images[taken]
        return replace(self, images=images, table=self.table.iloc[taken].reset_index(drop=True))

    def hold_out(self, scheme: str, classes: Sequence[str]) -> "ImageSet":
        """The images for a test of ``classes`` that nothing sees before it.

        The split test keeps its images of these classes, the splits train and val those with
        another label of the scheme; the split unlabelled stays, whatever its images show. An
        unknown scheme or class is a `UserError`.
        """
        known = self.classes(scheme)
        if strange := [name for name in classes if name not in known]:
            raise UserError(
                f"{self.name}: no class {strange[0]!r} of scheme {scheme};"
                f" known classes: {', '.join(known)}"
            )
        split, label = self.table["split"], self.table[scheme]
        served = label.isin(known) & (label.isin(list(classes)) == (split == "test"))
        return self.select(rows=np.flatnonzero(served | (split == "unlabelled")))

    def unlabelled(self) -> Images:
        """What may be learnt from without labels: that split, or ``train`` where it is empty."""
        any_unlabelled = (self.table["split"] == "unlabelled").any()
        return self.select("unlabelled" if any_unlabelled else "train").tensor()

    def for_training(self, scheme: str | None) -> tuple[Images, Labels, PerImage]:
        """Unlabelled and training images, class indices (-1 unlabelled), how often to draw each.

        If neither split has an image, it is a `UserError`.
        """
        chosen = self.select(["unlabelled", "train"])
        y = chosen.labels(scheme) if scheme else torch.full((len(chosen),), -1)
        labelled = y >= 0
        weights = torch.where(labelled, 1 / labelled.sum(), 1 / (~labelled).sum())
        return chosen.tensor(), y, weights


def open(path_or_name: str | Path, size: int | None = None) -> ImageSet:
    """Opens and checks an image set.

    Args:
        path_or_name: a folder written by ``python -m data_prep``, or the name of an embedded set:
            ``"lesions"`` (windows of the prostate; ``"lesions_238"`` with the paper's count of
            test images), ``"phantom"`` (whole slices of it), ``"histology"``, or one of the entry
            points ``hallulib.image_sets``, functions of a ``size`` of some default that give
            images, table and card.
        size: side in pixels; images of a folder stay memory-mapped unless it is smaller than
            stored, and are then area-averaged; embedded sets are drawn at it.

    Raises:
        UserError: the set is missing, damaged or inconsistent, ``size`` cannot be reached, or
            images that are drawn or made smaller do not fit into the memory.
    """
    if size is not None and size < 1:
        raise UserError(f"size is {size}; at least 1 pixel is needed")
    drawn = entry_points(group=DRAWN)
    if str(path_or_name) in drawn.names:
        draw = drawn[str(path_or_name)].load()
        image_set = ImageSet(*(draw(size=size) if size else draw()))
    else:
        image_set = _load(Path(path_or_name).expanduser())
    check(image_set)
    image_set = replace(image_set, opened=image_set.table.copy())
    return image_set if size in (None, image_set.size) else _reduced(image_set, size)


def check(image_set: ImageSet) -> None:
    """Raises a `UserError` for the first fault in images, card and table, and in a folder's sums.

    The files of a folder are read once, in bounded memory, for their checksums.
    """
    where = str(image_set.path or image_set.card.get("name", "image set"))
    n, rows = len(image_set.images), len(image_set.table)
    checks.check_images(image_set.images, f"{where}/images.npy")
    if rows != n:
        raise UserError(f"{where}/table.csv: {rows} rows for {n} images; one row each is needed")
    checks.check_table(image_set.table, image_set.card, where)
    if image_set.path is not None:
        checks.check_sums(image_set.path, image_set.card["sha256"])


def choose(
    labels: Labels, per_class: int, seed: int, share: float | int = 1
) -> Int[np.ndarray, " kept"]:
    """Positions of ``per_class`` images of each class, or of a share; more add to fewer.

    Class indices of -1 are left out. With ``per_class`` 0 they are a ``share`` of each class, at
    least two images; all unless given.
    """
    y, rng = labels.numpy(), np.random.default_rng(seed)
    kept = []
    for c in np.unique(y[y >= 0]):
        of_class = rng.permutation(np.flatnonzero(y == c))
        kept.append(of_class[: per_class or max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))


def _reduced(image_set: ImageSet, size: int) -> ImageSet:
    old = image_set.size
    if size > old:
        raise UserError(
            f"{image_set.path or image_set.name}: images are {old} pixels wide and size is {size};"
            " enlarging invents detail, so prepare the set at that size instead"
        )
    checks.check_memory(len(image_set), image_set.channels, size, image_set.name)
    card, processing = dict(image_set.card), image_set.card["processing"]
    if card["spacing_mm"]:
        card["spacing_mm"] = [s * old / size for s in card["spacing_mm"]]
    step = f"area-averaged from {old} to {size} pixels"
    card["processing"] = processing | {"steps": [*processing.get("steps", []), step]}
    return replace(image_set, images=checks.area_average(image_set.images, size), card=card)


def _load(folder: Path) -> ImageSet:
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        embedded = ", ".join(sorted(entry_points(group=DRAWN).names))
        raise UserError(
            f"{folder}: {', '.join(missing)} not found; {embedded} or a folder that python -m"
            " data_prep wrote, from a folder of images for instance, is needed"
        )
    card, file = checks.read_card(folder / "card.json"), folder / "images.npy"
    try:
        images = checks.map_array(file)
        file = folder / "table.csv"
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, OSError, EOFError) as error:  # pandas' parser errors are ValueErrors
        told = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read ({told}); prepare the set again") from error
    return ImageSet(images, table, card, folder)
