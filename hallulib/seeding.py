"""Initial weights from a seed, whatever random numbers the program around it uses."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Networks that are built within, on the CPU, start at weights that the seed alone decides.

    The global random numbers are as before afterwards, those of GPUs too: ``torch.manual_seed``
    would seed all of them anew.

    Args:
        seed: any whole number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield
