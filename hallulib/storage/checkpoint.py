"""Checkpoints: all state of a training as named tensors, written at once and read back checked.

A checkpoint is written beside its place and renamed into it, so a run that is killed at any
moment leaves the last whole one. It carries the settings of its run and is refused by others.
"""

import csv
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hallulib import UserError
from hallulib.storage import disk, parallel

CHECKPOINT, LOG = "checkpoint.safetensors", "losses.csv"
PATIENCE = 60.0  # seconds of work that a kill may cost
# name -> a tensor, a generator, an optimiser, what has a state_dict, or such a mapping
Parts = Mapping[str, Any]
Tensors = dict[str, Tensor]


class Stateful:
    """What a checkpoint holds whole, by PyTorch's protocol: all that `parts` names."""

    step: int = 0  # steps taken, by the state of a training

    def parts(self) -> Parts:
        """All that is kept: every attribute but the step, unless a class says otherwise."""
        return {name: part for name, part in vars(self).items() if name != "step"}

    def state_dict(self) -> Tensors:
        """All parts as named tensors; no copies."""
        return pack(self.parts())

    def load_state_dict(self, tensors: Tensors) -> None:
        """Take on what ``state_dict`` gave; it raises what `restore` does."""
        restore(self.parts(), tensors)

    def log(self) -> dict[str, list]:
        """Column -> one number for each step so far, for ``losses.csv``."""
        return {}


State = TypeVar("State", bound=Stateful)


def pack(parts: Parts) -> Tensors:
    """Parts as named tensors: the names of what lies within are joined by points; no copies."""
    found = {}
    for name, part in parts.items():
        if isinstance(part, Tensor):
            found[name] = part
        elif isinstance(part, torch.Generator):
            found[name] = part.get_state()
        else:
            within = part if isinstance(part, Mapping) else _state_of(part)
            found |= {f"{name}.{key}": value for key, value in pack(within).items()}
    return found


def restore(parts: Parts, tensors: Tensors) -> None:
    """Gives parts back what `pack` made of them; a KeyError, RuntimeError or ValueError if the
    tensors are of other parts.
    """
    for name, part in parts.items():
        if isinstance(part, Tensor):
            part.copy_(tensors[name])
        elif isinstance(part, torch.Generator):
            part.set_state(tensors[name].cpu())
        elif isinstance(part, Mapping):
            restore(part, within(name, tensors))
        elif isinstance(part, torch.optim.Optimizer):
            _load_moments(part, within(name, tensors))
        else:
            part.load_state_dict(within(name, tensors))


def within(name: str, tensors: Tensors) -> Tensors:
    """The tensors of one part, under their names within it."""
    start = name + "."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def identity(*tensors: Tensor) -> str:
    """A checksum of shapes and contents: what a checkpoint of images without a name belongs to."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _state_of(part: Any) -> Parts:
    """The state of a module, or what an optimiser remembers of each weight and its rates."""
    state = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return state
    moments = {str(i): entries for i, entries in state["state"].items()}
    rates = [group["lr"] for group in state["param_groups"]]
    return moments | {"lr": torch.tensor(rates, dtype=torch.float64)}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, tensors["lr"].tolist(), strict=True):
        group["lr"] = rate
    weights = dict.fromkeys(name.split(".")[0] for name in tensors if name != "lr")
    moments = {int(i): within(i, tensors) for i in weights}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for p, entries in optimizer.state.items():
        for key, value in entries.items():
            if key != "step" and value.shape == p.shape:
                # in the layout of the weight, as before: it decides which kernels run
                entries[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def write(folder: Path, tensors: Tensors, step: int, settings: dict, log: dict[str, list]) -> None:
    """Write a checkpoint and the log of the run, which of several processes the main one does. A
    `UserError` if they cannot be written; the checkpoint before is still there.
    """
    if not parallel.is_main():
        return
    metadata = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    # the log first: a run that is killed between the two writes it again
    with disk.whole(folder / LOG) as partial, partial.open("w", newline="") as file:
        rows = enumerate(zip(*log.values(), strict=True), start=1)
        csv.writer(file).writerows([("step", *log), *((i, *row) for i, row in rows)])
    with disk.whole_files(folder) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / CHECKPOINT, metadata)


def read(folder: Path, settings: dict) -> tuple[Tensors, int] | None:
    """The tensors and the step of a checkpoint; ``None`` where there is none. A `UserError` if the
    file is damaged, or was written with other settings.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            found, step = dict(json.loads(metadata["settings"])), int(metadata["step"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as fault:
        raise _foreign(path, fault) from fault
    for name, asked in json.loads(json.dumps(settings)).items():
        if found.get(name) != asked:
            raise UserError(
                f"{path} was trained with {name} = {found.get(name)}, not {asked}; "
                "give another folder or delete it"
            )
    return tensors, step


def resume(state: Stateful, folder: Path, settings: dict) -> None:
    """Let a fresh state take on the checkpoint of its run, if there is one. A `UserError` as by
    `read`, or if the tensors are those of another model.
    """
    found = read(folder, settings)
    parallel.wait()  # none writes the next one before all have read this one
    if found is None:
        return
    try:
        state.load_state_dict(found[0])
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as fault:
        raise _foreign(folder / CHECKPOINT, fault) from fault
    state.step = found[1]


def _foreign(path: Path, fault: Exception) -> UserError:
    what = (str(fault) or type(fault).__name__).splitlines()[0]
    return UserError(
        f"{path} is not a checkpoint of this model ({what}); delete it to start again"
    )


def loop(
    state: State,
    step: Callable[[State], None],
    *,
    steps: int,
    every: int,
    patience: float = PATIENCE,
    look: Callable[[State], None] = lambda state: None,
    folder: Path | str | None,
    settings: dict,
) -> Iterator[State]:
    """A training as a generator of its state: resumed, checked and written down when it is due.

    The state is that of a fresh start; a checkpoint in ``folder``, ``losses.csv`` beside it, is
    resumed, on a CPU to the same bytes as if it had never stopped. ``step`` takes one of all the
    ``steps``, in place. The next checkpoint is due after ``every`` so many, ``patience`` seconds,
    or the last; before it, ``look`` may stop the training by a `UserError`. ``settings`` are what
    JSON can hold; a checkpoint of others is refused.

    Yields:
        The same object after each step; after the last one of a run that had taken it, once.

    Raises:
        UserError: as `resume`, or what ``look`` finds.
    """
    if folder is not None:
        resume(state, Path(folder), settings)
    if state.step == steps:  # killed between its last step and what the caller does with it
        yield state
    last = time.monotonic()
    while state.step < steps:
        step(state)
        state.step += 1
        late = time.monotonic() - last > patience
        if state.step % every == 0 or state.step == steps or late:
            last = time.monotonic()
            look(state)
            if folder is not None:
                write(Path(folder), state.state_dict(), state.step, settings, state.log())
        yield state
