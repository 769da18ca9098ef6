"""Whether images fit into the memory of this machine, asked before it is filled with them."""

import math

import psutil

from hallulib import UserError

LITTLE = 2**28  # bytes that are there; asking takes a tenth of a millisecond


def free() -> int:
    """Bytes that this machine can give away without putting anything on its disk."""
    return psutil.virtual_memory().available


def check(n: int, channels: int, size: int, where: str, *, each: int = 1) -> None:
    """Refuse images that do not fit.

    Args:
        n: images.
        channels: of each.
        size: its height and width, pixels.
        where: whose images they are, for the sentence.
        each: bytes that a value of a pixel needs.

    Raises:
        UserError: they need more than is free.
    """
    needed = n * channels * size**2 * each
    if needed <= LITTLE or needed <= (there := free()):
        return
    fits = math.isqrt(there // (n * channels * each))
    raise UserError(
        f"{where}: {n:,} images of {size} x {size} pixels need {needed / 1e9:.3g} GB of memory and"
        f" {there / 1e9:.3g} GB are free; a size of at most {fits}, fewer images or more memory"
        " is needed"
    )
