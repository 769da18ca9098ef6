"""A saved estimator is whole, or one sentence says that it is not."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_greys import GREY, moved

from hallulib import ScoreClassifier, UserError


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two estimators that are alike in everything but their weights, each in its folder."""
    folders = [tmp_path_factory.mktemp("saved") / "one" for _ in range(2)]
    for seed, folder in enumerate(folders):
        moved(GREY, random_state=seed).save(folder)
    return folders


DAMAGE = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b" {}"),
    "of another estimator": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_with_a_damaged_file_is_one_sentence(saved, tmp_path, what):
    one, other = saved
    damaged = 0
    for name in files(one):
        shutil.copytree(one, tmp_path / "x", dirs_exist_ok=True)
        if (one / name).read_bytes() == (other / name).read_bytes() and "another" in what:
            continue
        DAMAGE[what](tmp_path / "x" / name, other / name)
        with pytest.raises(UserError, match=r"^[^\n]* is not a saved ScoreClassifier \([^\n]*$"):
            ScoreClassifier.load(tmp_path / "x")
        damaged += 1
    assert damaged >= 3


def same_json(one, other):
    with contextlib.suppress(ValueError):
        return json.loads(one) == json.loads(other)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(share=st.floats(0, 1), bit=st.integers(0, 7), which=st.integers(0, 100))
def test_a_flipped_bit_is_refused_or_means_the_same(saved, share, bit, which):
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "one"
        shutil.copytree(saved[0], folder)
        path = folder / files(folder)[which % len(files(folder))]
        before, content = path.read_bytes(), bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)
        if path.suffix == ".json" and same_json(before, content):  # as 1e-5 and 1E-5
            return
        with pytest.raises(UserError, match=r"^[^\n]* is not a saved ScoreClassifier \([^\n]*$"):
            ScoreClassifier.load(folder)


def test_a_folder_without_checksums_is_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "one")
    path = tmp_path / "one" / "estimator.json"
    state = json.loads(path.read_text())
    for name in ("sha256", "checksum"):
        del state[name]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"is not a saved ScoreClassifier .*has changed"):
        ScoreClassifier.load(tmp_path / "one")


def test_a_save_over_another_leaves_no_file_of_it(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "one")
    (tmp_path / "one" / "files-7").mkdir()  # a save that was killed
    for seed in (1, 0):
        moved(GREY, random_state=seed).save(tmp_path / "one")
        assert len(files(tmp_path / "one")) == len(files(saved[0]))
        assert len(list((tmp_path / "one").iterdir())) == 2
    old, new = ScoreClassifier.load(tmp_path / "one"), ScoreClassifier.load(saved[0])
    np.testing.assert_array_equal(old.predict_proba(GREY), new.predict_proba(GREY))


def test_what_cannot_be_saved_leaves_what_was_there(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "one")
    before = {name: (tmp_path / "one" / name).read_bytes() for name in files(tmp_path / "one")}
    broken = moved(GREY)
    broken.strange_ = object()
    with pytest.raises(UserError, match="fitted.strange_ is a object, which cannot be saved"):
        broken.save(tmp_path / "one")
    found = {name: (tmp_path / "one" / name).read_bytes() for name in files(tmp_path / "one")}
    assert found == before
