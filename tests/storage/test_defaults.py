"""Runs are found by what differs from the defaults: a default that changes raises the format."""

import importlib
import json
import re
from pathlib import Path

from conftest import ROOT
from hallulib.storage import store

RECORDED = Path(__file__).with_name("defaults.json")
NO_SETTINGS = {"device", "from_scratch"}  # arguments of `pretrained` that name no other run


def defaults():
    """Room and name of what `load_or_train` is told as ``defaults`` -> the defaults."""
    found = {}
    for path in sorted((ROOT / "hallulib").rglob("*.py")):
        for name in re.findall(r"\bdefaults=([A-Za-z]+),$", path.read_text(), re.M):
            parts = path.relative_to(ROOT).with_suffix("").parts
            thing = getattr(importlib.import_module(".".join(parts)), name)
            told = store.differing(store.defaults_of(thing), {})
            found[f"{parts[1]}.{name}"] = {k: v for k, v in told.items() if k not in NO_SETTINGS}
    return found


def changed(before, now):
    """Settings with another default than before; new ones and ones that are gone change no key."""
    return [
        f"{of}: {name}"
        for of in before.keys() & now.keys()
        for name in sorted(before[of].keys() & now[of].keys())
        if before[of][name] != now[of][name]
    ]


def test_whoever_changes_a_default_is_told_to_raise_the_format():
    recorded, now = json.loads(RECORDED.read_text()), defaults()
    assert len(now) == 2
    if recorded["format"] == store.FORMAT:
        told = "with another default one key has two meanings, and a run would take the folder of "
        told += f"one from before: raise store.FORMAT and record both in {RECORDED.name}"
        assert changed(recorded["defaults"], now) == [], told
    today = {"format": store.FORMAT, "defaults": now}
    assert recorded == today, f"{RECORDED.name} should be: {json.dumps(today, indent=2)}"


def test_a_default_that_changed_is_told_from_a_setting_that_came_or_went():
    before = {"a": {"steps": 3, "fit.lr": 1.0, "gone": 0}}
    assert changed(before, {"a": {"steps": 3, "fit.lr": 1.0, "new": 2}, "b": {"steps": 4}}) == []
    assert changed(before, {"a": {"steps": 3, "fit.lr": 2.0, "gone": 0}}) == ["a: fit.lr"]
