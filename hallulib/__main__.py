"""``python -m hallulib train | grid | doctor``: what the library does from a command line."""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from hallulib import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m hallulib", description=__doc__)
    names = top.add_subparsers(metavar="COMMAND", required=True)
    train = names.add_parser(
        "train",
        help="train the score model of an image set where chapters find it",
        description="On several GPUs: accelerate launch -m hallulib train ...",
    )
    train.set_defaults(work=_train)
    train.add_argument("dataset", help="image set: a name or a folder")
    train.add_argument("--scheme", default="auto", help="label column; auto is the set's first")
    train.add_argument("--size", type=int, help="side the images are reduced to, pixels")
    for option, value in {"--steps": 4000, "--batch-size": 32, "--width": 32, "--seed": 0}.items():
        train.add_argument(option, type=int, default=value, help=f"default: {value}")
    grid = names.add_parser("grid", help="run a chapter with each cell of a grid")
    grid.set_defaults(work=_grid)
    grid.add_argument("file", type=Path, help="YAML: chapter, common, grid, cells")
    grid.add_argument("--out", type=Path, metavar="FILE.json", help="default: in runs/grids")
    grid.add_argument("--workers", type=int, default=2, help="cells side by side; default: 2")
    doctor = names.add_parser("doctor", help="check the installation")
    doctor.set_defaults(work=_doctor)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 if something found is wrong, or as `run`."""
    options = vars(parser().parse_args(arguments))
    work = options.pop("work")
    return run(lambda: work(**options))


def _train(dataset: str, scheme: str | None, size: int | None, **settings: Any) -> int:
    from hallulib.data import imageset
    from hallulib.diffusion.train import pretrained
    from hallulib.storage import parallel
    from hallulib.storage.settings import Positive, Seed, Width, check

    kinds = dict(steps=Positive, batch_size=Positive, width=Width, seed=Seed)
    check(make_dataclass("Training", kinds.items())(**settings))  # before images are opened
    images = imageset.open(dataset, size)
    if scheme == "auto":
        scheme = (images.schemes or (None,))[0]
    _, folder = pretrained(images, scheme=scheme, **settings)
    if parallel.is_main():
        print(f"the score model is in {folder}")
    return 0


def _grid(**options: Any) -> int:
    from hallulib.notebook import grid

    return grid.finish(**options)


def _doctor() -> int:
    from hallulib.notebook import doctor

    return doctor.report()


class Terminated(KeyboardInterrupt):
    """A request to end, which is obeyed as Ctrl-C is."""


def run(work: Callable[[], int]) -> int:
    """Does the work of a command line, and ends in order when it is asked to end. What was started
    in the background ignores Ctrl-C; SIGTERM must not leave workers or half a file behind there.

    Returns:
        The work's status, 2 after a user's error, 130 after Ctrl-C and 143 after SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return work()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, _) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the orderly end short
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
