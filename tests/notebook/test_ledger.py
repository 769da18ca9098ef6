import errno
import json
import os

import pytest

from hallulib import UserError
from hallulib.evidence.metrics import Interval
from hallulib.notebook import ledger as ledger_module
from hallulib.notebook.ledger import MEASURED, Ledger


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_number_that_cannot_be_written_is_one_sentence(runs, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    ledger = Ledger("05_test", seed=1)
    ledger.keep("auc", 0.8, n=40)
    before = (runs / "results" / "05_test" / "auc.json").read_bytes()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"auc\.json: cannot write \({os.strerror(code)}\)"):
        ledger.keep("auc", 0.9, n=40)
    (kept,) = (runs / "results" / "05_test").iterdir()
    assert kept.read_bytes() == before


def test_a_number_keeps_where_it_came_from(runs):
    ledger = Ledger("05_test", seed=1, dataset="phantom")
    ledger.keep("auc", 0.8, low=0.7, high=float("nan"), n=40, steps=5)
    result = json.loads((runs / "results" / "05_test" / "auc.json").read_text())
    assert (result["value"], result["low"], result["high"]) == (0.8, 0.7, None)
    assert (result["n"], result["seed"]) == (40, 1)
    assert result["settings"] == {"dataset": "phantom", "steps": 5}
    assert {"hallulib", "torch", "device"} <= set(result["made_with"])
    assert ledger.values() == {"auc": 0.8}
    assert ledger.table().loc["auc", "n"] == 40


def test_a_text_has_the_numbers_of_its_ledger_and_no_others(runs):
    ledger = Ledger("05_test", seed=1)
    ledger.keep("gain_at_0.5", Interval(0.0312, 0.012, 0.0504, 1400))
    ledger.keep("+2", 0.25, n=3)
    ledger.keep("unknown", None)
    text = "{gain_at_0.5:+.2fi} of {gain_at_0.5:n}, {where}; {share:.0%}, {unknown:.2f}, {}, {1}"
    told = ledger.written(text, where="*here*", share=0.5)
    assert told == "+0.03 [+0.01, +0.05] of 1,400, *here*; 50%, (not measured here), {}, {1}"
    assert ledger.measured["unknown"] == {"value": None, "low": None, "high": None, "n": 0}
    with pytest.raises(
        UserError, match=r"the text says \{gain:\.2f\}, and no number is kept as gain"
    ):
        ledger.written("{gain:.2f}")


def test_what_a_grid_finds_is_what_was_kept(runs, monkeypatch):
    shown = []
    monkeypatch.setattr(ledger_module, "display", lambda data, **_: shown.append(data))
    ledger = Ledger("05_test", seed=1)
    ledger.keep("auc", 0.8, n=40)
    ledger.publish(mine=[1, 2])
    held = json.loads(json.dumps(shown[0][MEASURED]))
    assert held == {"measured": ledger.measured, "series": {"mine": [1, 2]}}
