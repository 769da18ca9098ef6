r"""What the archives of tiles share: their card, and one rule for blank tiles.

A pixel is *white* if its darkest channel is above `WHITE`, and *grey* if its channels differ by at
most `GREY`: stained tissue is coloured, glass and the padding of scanners are not. A tile is white
or grey if more than a share of its pixels are. On the tiles of GlaS this finds the very 98 whose
published share of white is above 0.8; where that share is below 0.5, no tile is more than half
grey.

Background may be a class of its own (NCT-CRC-HE), so nothing is dropped unless it is asked for.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from data_prep.writer import versions

WHITE = 216  # of 255
GREY = 20  # of 255
ACTIONS = ("ignore", "report", "drop")


@dataclass(frozen=True)
class Blanks:
    """What becomes of blank tiles.

    Args:
        action: one of `ACTIONS`.
        share: of the pixels, above which a tile is blank; in [0, 1).
    """

    action: str = "ignore"
    share: float = 0.8

    def check(
        self, tile: np.ndarray, around: int = 0, colour: np.ndarray | int = 0
    ) -> tuple[bool, list[str]]:
        """Whether a tile stays, and notes.

        Args:
            tile: uint8 (H, W) or (H, W, 3).
            around: how many pixels more pad it.
            colour: of these.
        """
        found = "" if self.action == "ignore" else kind(tile, self.share, around, colour)
        if not found:
            return True, []
        dropped = self.action == "drop"
        return not dropped, [f"blank tile, {found}{': left out' if dropped else ''}"]

    @property
    def steps(self) -> list[str]:
        """For the card."""
        told = f"more than {self.share:g} of the pixels above {WHITE} or colourless within {GREY}"
        return [] if self.action == "ignore" else [f"blank tiles ({told}): {self.action}"]


@dataclass(frozen=True)
class Archive:
    """What the card says of an archive.

    Args:
        origin: where the images come from.
        licence: their terms of use.
        labels: label scheme -> value -> meaning; the first is the default.
        warnings: what readers of the card must know.
        width: of a tile, in mm; None if tiles differ or it is not known.
        unit: what the archive tells of each tile, see `hallulib.data.checks.UNITS`.
    """

    origin: str
    licence: str
    labels: dict[str, dict[str, str]]
    warnings: tuple[str, ...] = ()
    width: float | None = None
    unit: str = "unknown"

    def card(self, args: argparse.Namespace, steps: Sequence[str], *coordinates: str) -> dict:
        """The card.

        Args:
            args: of the command line.
            steps: what was done, besides blank tiles and the size.
            coordinates: columns besides patient, split, labels and item.
        """
        schemes = {
            scheme: {"values": list(meaning), "meaning": meaning}
            for scheme, meaning in self.labels.items()
        }
        steps = [*steps, *blanks(args).steps, f"area-averaged to {args.size} pixels"]
        return {
            "name": args.name or args.out.name,
            "origin": self.origin,
            "licence": self.licence,
            "spacing_mm": self.width and [self.width / args.size] * 2,
            "processing": {"steps": steps, "versions": versions("pillow")},
            "labels": schemes,
            "unit": self.unit,
            "coordinates": [*coordinates, "item"],
            "warnings": list(self.warnings),
        }


def incomplete(part: str, found: int, published: int) -> tuple[str, ...]:
    """A warning, if a part of an archive does not hold as many images as were published."""
    return () if found == published else (f"{part} holds {found} of {published} images",)


def add_arguments(parser: argparse.ArgumentParser, action: str) -> None:
    """The options of every archive of tiles.

    Args:
        parser: of the archive.
        action: what becomes of blank tiles by default.
    """
    told = "white or grey tiles: keep them, count them, or leave them out (default %(default)s)"
    parser.add_argument("--blank", choices=ACTIONS, default=action, help=told)
    told = "share of white, or of grey, pixels above which a tile is blank (default %(default)s)"
    parser.add_argument("--blank-share", type=_share, default=0.8, help=told)


def blanks(args: argparse.Namespace) -> Blanks:
    """What the command line says."""
    return Blanks(args.blank, args.blank_share)


def kind(tile: np.ndarray, share: float, around: int = 0, colour: np.ndarray | int = 0) -> str:
    """``"white"``, ``"grey"``, or "" for a tile that shows something.

    Args:
        tile: uint8 (H, W), which can be white only, or (H, W, 3).
        share: of the pixels, above which it is blank.
        around: how many pixels more pad it.
        colour: of these.

    Example:
        >>> kind(np.full((2, 2, 3), 240, np.uint8), 0.8), kind(np.zeros((2, 2, 3), np.uint8), 0.8)
        ('white', 'grey')
    """
    planes = np.moveaxis(np.atleast_3d(tile), 2, 0)
    frame = np.reshape(colour, (-1, 1, 1)).astype(np.uint8)
    for name, rule in (("white", _is_white), ("grey", _is_grey))[: tile.ndim - 1]:
        count = np.count_nonzero(rule(planes)) + around * rule(frame).item()
        if count / (planes[0].size + around) > share:
            return name
    return ""


def _is_white(planes: np.ndarray) -> np.ndarray:
    return reduce(np.minimum, planes) > WHITE  # much faster than min(axis=0)


def _is_grey(planes: np.ndarray) -> np.ndarray:
    return reduce(np.maximum, planes) - reduce(np.minimum, planes) <= GREY


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of 0 or more and below 1")
    return share
