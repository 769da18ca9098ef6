"""Trainings that are followed to their end and kept: a bar, the last state, its folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from hallulib import artifacts, parallel

State = TypeVar("State")  # of a training loop; its ``step`` says how far it is


def finished(loop: Iterator[State], steps: int, told: str, show: bool = True) -> State:
    """The last state of a training loop, which a bar follows on the main process.

    Args:
        loop: yields its state after each step, and at least once.
        steps: of the whole run; a resumed one starts where its checkpoint left it.
        told: what the bar says.
        show: draw the bar.
    """
    bar = None
    for state in loop:
        if bar is None:
            told_here = dict(desc=told, disable=not (show and parallel.is_main()))
            bar = tqdm(total=steps, initial=state.step - 1, **told_here)
        bar.update()
    bar.close()
    return state


def kept(
    name: str,
    start: Callable[[Path], Iterator[State]],
    save: Callable[[State, Path], None],
    *,
    told: str,
    steps: int,
    from_scratch: bool = False,
    **settings,
) -> Path:
    """The folder of a training's finished run: found by its settings, or trained now.

    Args:
        name: of the model, see :func:`hallulib.artifacts.load_or_train`.
        start: the loop, which keeps its checkpoint in the folder that it is given.
        save: writes what is kept of the last state into that folder.
        told: what the bar says.
        steps: of the whole run, one of the settings.
        from_scratch: train even if such a run is there.
        settings: all else that the result depends on.

    Raises:
        UserError: a file of the found run differs from its checksum.
    """

    def train(folder: Path, **_) -> None:
        state = finished(start(folder), steps, told)
        if parallel.is_main():
            save(state, folder)

    settings |= dict(steps=steps)
    return artifacts.load_or_train(
        name, train, together=True, from_scratch=from_scratch, **settings
    )
