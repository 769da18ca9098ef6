"""A command line ends in order, with its status and one sentence, whatever ends it."""

import os
import signal

import pytest

from hallulib import UserError
from hallulib.__main__ import run

SENTENCE = "interrupted; run the same command again to go on\n"


def told(text):
    raise UserError(text)


def ctrl_c():
    raise KeyboardInterrupt


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


ENDS = {
    "done": (lambda: 0, 0, ""),
    "failed": (lambda: 1, 1, ""),
    "user's error": (lambda: told("one sentence"), 2, "one sentence\n"),
    "Ctrl-C": (ctrl_c, 130, SENTENCE),
    "SIGTERM": (sigterm, 143, SENTENCE),
}


@pytest.mark.parametrize("end", ENDS)
def test_each_end_has_its_status_and_its_sentence(end, capsys):
    work, status, sentence = ENDS[end]
    before = signal.getsignal(signal.SIGTERM)
    assert run(work) == status
    assert capsys.readouterr() == ("", sentence)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_request_to_end_does_not_cut_the_orderly_end_short():
    cleaned = []

    def work():
        try:
            sigterm()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    assert run(work) == 143
    assert cleaned


def test_what_is_no_end_of_a_command_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)
