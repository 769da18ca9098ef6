"""What radiologists' categories mean in image sets of mammograms: one vocabulary for all."""

import re
from collections.abc import Sequence

from hallulib import UserError

DIAGNOSES = ("benign", "malignant")
MEANING = {
    "1": "negative",
    "2": "benign",
    "3": "probably benign",
    "4": "suspicious",
    "5": "highly suggestive of malignancy",
    "6": "known malignancy, proven by biopsy",
}
DENSITIES = {
    "A": "almost entirely fatty",
    "B": "scattered fibroglandular tissue",
    "C": "heterogeneously dense",
    "D": "extremely dense",
}
CATEGORY = re.compile(r"(?:BI-?RADS\s*)?([0-6])[ABC]?")
DENSITY = re.compile(r"(?:DENSITY\s*|ACR\s*)?([A-D]|[1-4])")


def category(text: str, where: str) -> str:
    """``BI-RADS 4``, ``4b`` or ``4`` as ``4``; ``0``, which is no assessment yet, as "".

    Raises:
        UserError: it is none.
    """
    match = CATEGORY.fullmatch(text.strip().upper())
    if not match:
        raise UserError(f"{where} has BI-RADS {text!r}; 0 to 6 (with 4a, 4b, 4c) are known")
    return match[1].replace("0", "")


def density(text: str, where: str) -> str:
    """``DENSITY C``, ``C`` or ``3`` as ``C``; "" or 0, where it was not assessed, as "".

    Raises:
        UserError: it is none.
    """
    match = DENSITY.fullmatch(text.strip().upper())
    if not match and text.strip().upper() not in ("", "0", "N/A"):
        raise UserError(f"{where} has density {text!r}; A to D, 1 to 4 or nothing is known")
    return match[1].translate(str.maketrans("1234", "ABCD")) if match else ""


def diagnosis(found: str, three: str) -> str:
    """Benign for categories 1 and 2, malignant for 4 to 6.

    Args:
        found: a category.
        three: what category 3 is: ``benign``, ``malignant`` or ``drop``.

    Returns:
        "" where there is none: for "", and for 3 if it is dropped.
    """
    if found == "3":
        return "" if three == "drop" else three
    return {"": "", "1": "benign", "2": "benign"}.get(found, "malignant")


def scheme(meaning: dict[str, str]) -> dict:
    """A label scheme for the card."""
    return {"values": list(meaning), "meaning": dict(meaning)}


def schemes(categories: Sequence[str], benign: str, malignant: str) -> dict[str, dict]:
    """The label schemes of all mammography archives, the diagnosis first.

    Args:
        categories: BI-RADS categories that occur, in order.
        benign: what makes an image benign.
        malignant: what makes it malignant.
    """
    return {
        "diagnosis": scheme(dict(zip(DIAGNOSES, (benign, malignant), strict=True))),
        "birads": scheme({name: MEANING[name] for name in categories}),
        "density": scheme(DENSITIES),
    }


def rule(three: str, last: str) -> tuple[str, str]:
    """What makes an image benign and malignant, in words.

    Args:
        three: what category 3 is, see `diagnosis`.
        last: the highest category that occurs.
    """
    benign = "1 to 3" if three == "benign" else "1 to 2"
    return f"BI-RADS {benign}", f"BI-RADS {3 if three == 'malignant' else 4} to {last}"
