r"""Several processes on one training: ``accelerate launch`` starts them, each takes its share.

All processes hold the same weights and draw the same batch from generators with the same seed.
Process r of w takes rows r, r + w, ... and its gradient counts by its number of rows,

.. math:: \nabla \bar L = \sum_r \frac{n_r}{n}\,\nabla \bar L_r,

so that a step is the one that a single process takes with the whole batch, up to the order of a
sum. Files are written by the main process, in a folder that all processes must see. In a single
process nothing here does anything.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Task = TypeVar("Task")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=12)  # the main process may wait for a training of somebody else
_depth = 0  # of `alone`


@functools.cache
def _engine():
    """The processes that were launched together; the device of each is set when it is made."""
    from accelerate import Accelerator, InitProcessGroupKwargs  # a second that few need

    waits = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waits])


def processes() -> int:
    """How many processes work together here; 1 inside `alone`."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return _engine().num_processes if launched and not _depth else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return _engine().process_index if processes() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and shows bars."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself and asks no other."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def share(n: int) -> tuple[slice, float]:
    """The rows of a batch of n that are this process's, and how much their mean counts. Where
    there are fewer rows than processes, each takes them all.
    """
    if n < processes() or processes() == 1:
        return slice(None), 1 / processes()
    mine = slice(rank(), None, processes())
    return mine, len(range(n)[mine]) / n


def combine(
    weights: Iterable[Tensor], loss: Float[Tensor, "*terms"], counts: float
) -> Float[Tensor, "*terms"]:
    """Make the gradients of one share those of the whole batch, in place, and give the loss of
    that, without graph. The loss of the share holds means over it, and it counts as `share` says.
    """
    if processes() == 1:
        return loss.detach()
    parts = [weight.grad for weight in weights if weight.grad is not None] + [loss.detach()]
    flat = torch.cat([part.reshape(-1) for part in parts]) * counts  # one message, not hundreds
    summed = _engine().reduce(flat).split([part.numel() for part in parts])
    for part, new in zip(parts, summed, strict=True):
        part.copy_(new.view(part.shape))
    return parts[-1]


def from_main(decide: Callable[[], Result]) -> Result:
    """What the main process decides, known to all; the others wait for it."""
    if processes() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([decide() if is_main() else None])[0]


def wait() -> None:
    """Go on when all processes have come here."""
    if processes() > 1:
        _engine().wait_for_everyone()


def dealt(work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """``map(work, tasks)`` with the tasks dealt to the processes; all of them get all results."""
    if processes() == 1:
        yield from map(work, tasks)
        return
    from accelerate.utils import gather_object

    place = rank()  # it is 0 inside `alone`
    for first in range(0, len(tasks), processes()):
        group = tasks[first : first + processes()]
        with alone():
            mine = work(group[place]) if place < len(group) else None
        yield from gather_object([mine])[: len(group)]
