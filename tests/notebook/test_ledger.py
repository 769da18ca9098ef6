import errno
import json
import os

import pytest

from hallulib import UserError
from hallulib.notebook.ledger import Ledger


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
