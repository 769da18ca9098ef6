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
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hallulib import UserError
from hallulib.storage import disk, parallel

CHECKPOINT, LOG = "checkpoint.safetensors", "losses.csv"
PATIENCE = 60.0  # seconds of work that a kill may cost
State = TypeVar("State", bound="Stateful")


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


class Stateful:
    """What a checkpoint holds whole, by PyTorch's protocol: all that `parts` names.

    Attributes:
        step: steps taken; only the state of a training has it.
    """

    step: int = 0

    def parts(self) -> dict[str, object]:
        """Name -> a tensor, a generator, an optimiser, what has a ``state_dict``, or a dict."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """All parts as named tensors; no copies."""
        return pack(self.parts())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take on what ``state_dict`` gave.

        Raises:
            KeyError, RuntimeError, ValueError: the tensors are of something else.
        """
        restore(self.parts(), tensors)

    def log(self) -> dict[str, list]:
        """Column -> one number for each step so far, for ``losses.csv``."""
        return {}


def pack(parts: Mapping[str, object]) -> dict[str, Tensor]:
    """Parts as named tensors: the names of what lies within are joined by points; no copies.

    Example:
        >>> sorted(pack({"a": torch.zeros(1), "b": torch.nn.Linear(1, 1)}))
        ['a', 'b.bias', 'b.weight']
    """
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


def restore(parts: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
    """Gives parts back what `pack` made of them.

    Raises:
        KeyError, RuntimeError, ValueError: the tensors are of other parts.
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


def within(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def _state_of(part) -> dict[str, object]:
    """The state of a module, or what an optimiser remembers of each weight and its rates."""
    state = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        return state
    moments = {str(i): entries for i, entries in state["state"].items()}
    rates = [group["lr"] for group in state["param_groups"]]
    return moments | {"lr": torch.tensor(rates, dtype=torch.float64)}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    rates = tensors["lr"].tolist()
    for name, value in tensors.items():
        if name != "lr":
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
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
    """Let a state take on the checkpoint of its run, if there is one.

    Args:
        state: as it comes from a fresh start.
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
        state.load_state_dict(found[0])
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as fault:
        raise _foreign(folder / CHECKPOINT, fault) from fault
    state.step = found[1]


def loop(
    state: State,
    step: Callable[[State], None],
    *,
    steps: int,
    due: Callable[[int], bool],
    look: Callable[[State], None] = lambda state: None,
    folder: Path | str | None,
    settings: dict,
) -> Iterator[State]:
    """A training as a generator of its state: resumed, checked and written down when it is due.

    Args:
        state: of a fresh start.
        step: takes one step, in place.
        steps: of the whole run.
        due: whether to look and to write after so many steps, as `Due` says.
        look: what is done before writing: it may stop the training by a `UserError`.
        folder: where the checkpoint and ``losses.csv`` are kept; a checkpoint found there is
            resumed, to the same bytes on a CPU as if it had never stopped.
        settings: what JSON can hold; a checkpoint of others is refused.

    Yields:
        The state after each step, the same object every time. Of a run that had taken its last
        step, it is yielded once, with nothing done.

    Raises:
        UserError: a damaged checkpoint or one of other settings, or what ``look`` finds.
    """
    if folder is not None:
        resume(state, Path(folder), settings)
    if state.step == steps:  # killed between its last step and what the caller does with it
        yield state
    while state.step < steps:
        step(state)
        state.step += 1
        if due(state.step):
            look(state)
            if folder is not None:
                write(Path(folder), state.state_dict(), state.step, settings, state.log())
        yield state


def _foreign(path: Path, fault: Exception) -> UserError:
    what = (str(fault) or type(fault).__name__).splitlines()[0]
    return UserError(
        f"{path} is not a checkpoint of this model ({what}); delete it to start again"
    )
