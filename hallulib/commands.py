"""How every command line ends: its status, and one sentence where it did not get to its end."""

import signal
import sys
from collections.abc import Callable

from hallulib import UserError


class Terminated(KeyboardInterrupt):
    """A request to end, which is obeyed as Ctrl-C is."""


def run(work: Callable[[], int]) -> int:
    """Does the work of a command line, and ends in order when it is asked to end.

    What was started in the background ignores Ctrl-C; SIGTERM must not leave workers or half a
    file behind there either.

    Args:
        work: returns the exit status; its next run goes on from what it keeps.

    Returns:
        The status of the work, 2 after the sentence of a user's error, 130 after Ctrl-C and 143
        after SIGTERM.
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
