"""Checkpoints: all state of a training as named tensors, written at once and read back checked.

A checkpoint is written beside its place and renamed into it, so a run that is killed at any
moment leaves the last whole one. It carries the settings of its run and is refused by others.
"""

import csv
import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hallulib import UserError, disk, parallel

CHECKPOINT, LOG = "checkpoint.safetensors", "losses.csv"
PATIENCE = 60.0  # seconds of work that a kill may cost


class Due:
    """Says after which steps a checkpoint is written: regularly, and on a slow machine more often.

    Args:
        every: steps between two checkpoints at most; fewer if they take longer than `PATIENCE`.
        steps: of the whole run; the last one is always due.
    """

    def __init__(self, every: int, steps: int):
        self.every, self.steps, self._last = every, steps, time.monotonic()

    def __call__(self, step: int) -> bool:
        """Whether it is due after so many steps."""
        late = time.monotonic() - self._last > PATIENCE
        if step % self.every and step < self.steps and not late:
            return False
        self._last = time.monotonic()
        return True


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that begin with ``prefix`` and a point."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def identity(*tensors: Tensor) -> str:
    """A checksum of shapes and contents: what a checkpoint of images without a name belongs to."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``named`` put under this prefix, under their own names."""
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each weight, as ``index.name``; no copies."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": v for i, entries in state.items() for k, v in entries.items()}


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser back what ``moments`` wrote; its learning rate stays as it is.

    Raises:
        ValueError: a name that ``moments`` does not give.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for p, entries in optimizer.state.items():
        for key, value in entries.items():
            if key != "step" and value.shape == p.shape:
                # in the layout of the weight, as before: it decides which kernels run
                entries[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def write(
    folder: Path, tensors: dict[str, Tensor], step: int, settings: dict, log: dict[str, list]
) -> None:
    """Write a checkpoint and the log of the run, which of several processes the main one does.

    Args:
        folder: made if it is not there.
        tensors: the whole state.
        step: steps taken.
        settings: what JSON can hold; a run with others cannot resume from here.
        log: column name -> one number per step so far, for ``losses.csv``.

    Raises:
        UserError: they cannot be written; the checkpoint before is still there.
    """
    if not parallel.is_main():
        return
    metadata = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    # the log first: a run that is killed between the two writes it again
    with disk.whole(folder / LOG) as partial, partial.open("w", newline="") as file:
        rows = enumerate(zip(*log.values(), strict=True), start=1)
        csv.writer(file).writerows([("step", *log), *((i, *row) for i, row in rows)])
    with disk.whole_files(folder) as partial:
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, partial / CHECKPOINT, metadata)


def read(folder: Path, settings: dict) -> tuple[dict[str, Tensor], int] | None:
    """The tensors and the step of a checkpoint; ``None`` where there is none.

    Raises:
        UserError: the file is damaged, or was written with other settings.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            found, step = json.loads(metadata["settings"]), int(metadata["step"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        if not isinstance(found, dict):
            raise ValueError("its settings are no table")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise _foreign(path, fault) from fault
    told = json.loads(json.dumps(settings))
    differing = [k for k in told if found.get(k) != told[k]]
    if differing:
        k = differing[0]
        raise UserError(
            f"{path} was trained with {k} = {found.get(k)}, not {told[k]}; "
            "give another folder or delete it"
        )
    return tensors, step


def resume(state, folder: Path, settings: dict) -> None:
    """Let a state take on the checkpoint of its run, if there is one.

    Args:
        state: with ``load_tensors(tensors, step)``, as it comes from a fresh start.
        folder: of the run.
        settings: of the run.

    Raises:
        UserError: as `read`, or the tensors are those of another model.
    """
    found = read(folder, settings)
    parallel.wait()  # none writes the next one before all have read this one
    if found is None:
        return
    try:
        state.load_tensors(*found)
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as fault:
        raise _foreign(folder / CHECKPOINT, fault) from fault


def _foreign(path: Path, fault: Exception) -> UserError:
    what = (str(fault) or type(fault).__name__).splitlines()[0]
    return UserError(
        f"{path} is not a checkpoint of this model ({what}); delete it to start again"
    )
