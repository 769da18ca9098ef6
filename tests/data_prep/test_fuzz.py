"""Readers and chance: whatever bytes change, a `UserError` or success, never anything else."""

import os
import shutil

import pytest
from faults import CASE, FORMATS, bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hallulib import UserError

HOW = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "put", "double"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits) -> bytes:
    """Some bytes replaced, flipped, cut out, put in or repeated, at shares of the length."""
    for what, share, told in edits:
        place = int(share * len(content))
        head, tail = content[:place], content[place:]
        n = len(told)
        changed = {
            "set": told + tail[n:],
            "flip": bytes(a ^ b for a, b in zip(tail, told, strict=False)) + tail[n:],
            "cut": tail[8 * n :],
            "put": told + tail,
            "double": tail[: 8 * n] + tail,
        }
        content = head + changed[what]
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole file of a format, made once: its folder, its path and its bytes."""
    made = {}

    def make(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("fuzz") / CASE
            folder.mkdir()
            path = FORMATS[name].make(folder)
            made[name] = folder, path, path.read_bytes()
        return made[name]

    return make


@pytest.mark.parametrize("name", FORMATS)
@given(edits=EDITS)
@settings(max_examples=30, **HOW)
def test_a_reader_survives_any_bytes(whole, name, edits):
    folder, path, content = whole(name)
    path.write_bytes(edited(content, edits))
    before = sorted(os.listdir(folder))
    try:
        with bounded(2**30):
            FORMATS[name].read(path)
    except UserError as error:
        told = str(error)
    else:
        told = ""
        shutil.rmtree(folder / "set", ignore_errors=True)
    assert "\n" not in told
    assert sorted(os.listdir(folder)) == before
