"""A few images of grey levels, and the fastest fit of them."""

import numpy as np

from hallulib import ScoreClassifier

GREY = np.random.default_rng(7).integers(0, 256, (6, 8, 8)).astype(np.uint8)
ANSWERS = np.array(["dark", "light"])[np.arange(6) % 2]


def moved(x, **told):
    """The fastest fit there is: no step, and one pair of noise and level."""
    return ScoreClassifier(steps=0, effort=2, width=8, shift=True, **told).fit(x, ANSWERS)
