"""Images that do not fit into the memory are refused before they are drawn or read."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_set import write

from data_prep.drawn import histology, prostate
from hallulib import UserError
from hallulib.data import checks, imageset

SENTENCE = r"[\w ]+: [\d,]+ images of \d+ x \d+ pixels need \S+ GB of memory and \S+ GB are free; "
SENTENCE += r"a size of at most (\d+), fewer images or more memory is needed"
DRAWN = {"phantom": (prostate, prostate.prostate), "histology": (histology, histology.histology)}


def refused(work):
    with pytest.raises(UserError) as told:
        work()
    return int(re.fullmatch(SENTENCE, str(told.value))[1])


@given(*[st.integers(1, 10**5)] * 3, st.sampled_from([1, 3]), st.integers(0, 2**40))
def test_images_pass_if_they_fit_and_else_the_largest_size_that_fits_is_told(
    n, size, each, channels, free
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "free_memory", lambda: free)
        needed = lambda side: n * channels * side**2 * each
        if needed(size) <= free:
            checks.check_memory(n, channels, size, "here", each=each)
        else:
            fits = refused(lambda: checks.check_memory(n, channels, size, "here", each=each))
            assert needed(fits) <= free < needed(fits + 1)


def test_what_is_free_is_less_than_all_and_more_than_a_little():
    assert 2**26 < checks.free_memory() < 2**50


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("size", [1024, 4096, 10**6, 10**12])
def test_embedded_sets_that_do_not_fit_are_refused_before_they_are_drawn(name, size, monkeypatch):
    module, draw = DRAWN[name]
    monkeypatch.setattr(module, "render", None)
    monkeypatch.setattr(checks, "free_memory", lambda: 10**9)
    fits = refused(lambda: imageset.open(name, size))
    assert fits == refused(lambda: draw(size))
    assert 100 < fits < 512
    with pytest.raises(TypeError, match="NoneType"):  # it begins to draw
        draw(fits)


def test_a_folder_is_opened_without_its_images_and_they_are_refused_where_they_are_read(
    tmp_path, monkeypatch
):
    found = imageset.open(write(tmp_path / "set"))
    n, values = len(found), found.images[0].size
    monkeypatch.setattr(checks, "free_memory", lambda: 5 * values * (n - 1))
    assert len(imageset.open(tmp_path / "set")) == n
    assert len(found.tensor(slice(1, None))) == len(found.tensor(np.arange(n) > 0)) == n - 1
    assert len(found.tensor(range(n - 1))) == n - 1
    for rows in (None, slice(None), range(n), np.ones(n, bool), [*range(n)]):
        assert refused(lambda rows=rows: found.tensor(rows)) < found.size
    monkeypatch.setattr(checks, "free_memory", lambda: 1)
    assert len(found.select(rows=[0, 1])) == 2  # neighbours stay in the file
    refused(lambda: found.select(rows=[0, 2]))
    refused(lambda: imageset.open(tmp_path / "set", found.size // 2))
