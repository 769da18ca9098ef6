"""What a radiologist drew around: the contours of a film in an Apple property list."""

import plistlib
from pathlib import Path

from data_prep import birads
from hallulib import UserError

MOST_BYTES = 2**24  # a film has some dozen contours of some hundred points
# the first that any contour of the film bears; the file spells some of them in several ways
KINDS = {"mass": ("mass",), "calcification": ("calcific", "cluster")}
SCHEME = birads.scheme(
    {
        "none": "no contour",
        "mass": "a contour named mass",
        "calcification": "calcifications or clusters, no mass",
        "other": "other contours: asymmetry, distortion, spiculated region",
    }
)


def finding(file: Path) -> str:
    """The kind of lesion drawn in a film, a value of ``SCHEME``.

    Args:
        file: of the contours of one film; a film without lesions has none.

    Raises:
        UserError: it is too large, or no list of contours.
    """
    if not file.exists():
        return "none"
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        # entities, which could grow without end, are refused by the module itself
        held = plistlib.loads(file.read_bytes(), fmt=plistlib.FMT_XML)
        names = [roi["Name"].strip().lower() for one in held["Images"] for roi in one["ROIs"]]
    except (
        Exception
    ) as fault:  # expat, plistlib and wrong kinds of things have errors of their own
        raise UserError(
            f"{file}: not the contours of a film ({type(fault).__name__}); an XML property list "
            "of Images with ROIs, each with a Name, is needed"
        ) from fault
    for kind, starts in KINDS.items():
        if any(name.startswith(starts) for name in names):
            return kind
    return "other" if names else "none"
