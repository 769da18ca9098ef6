"""Several sets as one: every image of each, as the set alone shows it, and no two patients one."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
import toy_set
from toy_tiles import prepared, refused, written

from conftest import ROOT
from data_prep.__main__ import parser
from data_prep.archives import join
from data_prep.drawn import histology
from hallulib.data import imageset

RECIPE = ROOT / "book" / "grids" / "unseen.txt"
CORNERS = slice(2, 14)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def sets(tmp_path):
    """Two sets with the same names of patients and labels, of other sizes and channels."""
    grey = toy_set.write(
        tmp_path / "grey", pixels(5, 1, 12, 12), name="mri", warnings=["small"], unit="exam"
    )
    rows = [("p1", "test", "high", "0"), ("p2", "train", "low", "1"), ("p3", "train", "", "2")]
    rows = rows[:2] + [("p4", "unlabelled", "", "2")]
    colour = toy_set.write(tmp_path / "colour", pixels(3, 3, 16, 16), rows, name="tissue")
    return grey, colour


def command(sets, *options):
    return ["join", None, *(f"{folder}=grade" for folder in sets), *options]


def part(joined, name):
    return joined.images[(joined.table["set"] == name).to_numpy()]


def test_every_image_of_each_set_is_there_as_the_set_alone_shows_it_at_that_size(sets, tmp_path):
    joined = prepared(tmp_path / "all", *command(sets, "--size=8"))
    for name, folder in zip(("mri", "tissue"), sets, strict=True):
        alone = imageset.open(folder, 8)
        assert (part(joined, name) == alone.images).all()  # grey is the same in three channels
        rows = joined.table[joined.table["set"] == name].reset_index(drop=True)
        assert list(rows["item"]) == list(map(str, range(len(alone))))
        assert list(rows["split"]) == list(alone.table["split"])
        assert list(rows["patient"]) == [f"{name}: {p}" for p in alone.table["patient"]]
        labels = alone.table["grade"]
        assert list(rows["class"]) == [label and f"{name}: {label}" for label in labels]
    assert len(joined) == 5 + 3


def test_equal_names_of_two_sets_stay_apart(sets, tmp_path):
    joined = prepared(tmp_path / "all", *command(sets, "--size=8"))
    assert joined.table["patient"].nunique() == 4 + 3
    assert joined.classes("class") == ("mri: low", "mri: high", "tissue: low", "tissue: high")
    assert joined.classes("domain") == ("mri", "tissue")
    # what is unlabelled has no label, and the column set still tells where it is from
    unlabelled = joined.table[joined.table["split"] == "unlabelled"]
    assert set(unlabelled["domain"]) == {""}
    assert list(unlabelled["set"]) == ["mri", "tissue"]


def test_the_card_keeps_what_those_of_the_sets_say(sets, tmp_path):
    joined = prepared(tmp_path / "all", *command(sets, "--size=8", "--name=both"))
    card = joined.card
    assert (card["name"], card["unit"]) == ("both", "group")  # exams and patients
    assert [card["domains"][name]["unit"] for name in ("mri", "tissue")] == ["exam", "patient"]
    assert card["domains"]["tissue"]["spacing_mm"] == [1.0, 0.5]
    assert card["spacing_mm"] is None
    assert card["licence"] == "mri: none; tissue: none"
    assert "mri: small" in card["warnings"]
    assert str(tmp_path) not in written(joined)


def test_grey_is_what_pillow_makes_of_colours(sets, tmp_path):
    image = pytest.importorskip("PIL.Image")
    joined = prepared(tmp_path / "all", *command(sets, "--size=8", "--grey"))
    assert joined.channels == 1
    colours = imageset.open(sets[1], 8).images.transpose(0, 2, 3, 1)
    expected = [np.asarray(image.fromarray(one).convert("L")) for one in colours]
    assert (part(joined, "tissue")[:, 0] == expected).all()


def test_a_smaller_set_keeps_its_pixels_in_a_mirrored_margin(sets, tmp_path):
    joined = prepared(tmp_path / "all", *command(sets, "--size=16", "--margin"))
    small = imageset.open(sets[0]).images
    found = part(joined, "mri")
    assert (found[..., CORNERS, CORNERS] == small).all()
    assert (found[..., :2, CORNERS] == small[..., 1::-1, :]).all()
    assert (part(joined, "tissue") == imageset.open(sets[1]).images).all()
    assert joined.card["domains"]["mri"]["spacing_mm"] == [0.5, 0.25]


def test_an_embedded_set_is_drawn_at_the_size(sets, tmp_path, monkeypatch):
    few = dict(n_unlabelled=12, n_train=48, n_val=48, n_test=48)
    drawn = lambda size: imageset.ImageSet(*histology.histology(size, **few))
    opened = imageset.open

    def with_few(name, size=None):
        return drawn(size or 16) if name == "few" else opened(name, size)

    monkeypatch.setattr(imageset, "open", with_few)
    join._images.cache_clear()
    joined = prepared(tmp_path / "all", *command(sets[:1]), "few=tissue", "--size=24", "--margin")
    assert (part(joined, "histology") == drawn(24).images).all()


def test_a_label_that_a_column_lacks_leaves_the_image_in_its_split(sets, tmp_path):
    folder = tmp_path / "two"
    images, table = pixels(2, 1, 12, 12), pd.DataFrame(index=range(2))
    folder.mkdir()
    np.save(folder / "images.npy", images)
    table["patient"], table["split"] = ["a", "b"], "train"
    table["one"], table["other"] = ["x", "x"], ["", "y"]
    table.to_csv(folder / "table.csv", index=False, lineterminator="\n")
    labels = {"one": {"values": ["x"]}, "other": {"values": ["y"]}}
    toy_set.seal(folder, 2, 2, labels=labels, name="two")
    joined = prepared(tmp_path / "all", "join", None, f"{folder}=other", "--size=12")
    assert list(joined.table["class"]) == ["", "two: y"]
    assert list(joined.table["domain"]) == ["two", "two"]
    assert list(joined.table["split"]) == ["train", "train"]


def test_what_cannot_be_joined_is_refused_in_one_sentence(sets, tmp_path, capsys):
    grey, colour = sets
    out = tmp_path / "all"
    for words, told in (
        ([grey, f"{grey}=grade"], "is not like SET=COLUMN, a set and one of its label columns"),
        ([f"{grey}=isup"], "mri: no label scheme 'isup'; known schemes: grade"),
        ([f"{grey}=grade", f"{grey}=grade"], "a set is there twice; each once is needed"),
        ([f"{tmp_path}/none=grade"], "images.npy, table.csv, card.json not found"),
        ([f"{grey}=grade", "--size=13"], "images are 12 pixels wide and --size is 13; enlarging"),
    ):
        assert told in refused(capsys, out, "join", None, "--size=8", *words)
    toy_set.write(tmp_path / "other", name="mri")
    told = refused(
        capsys, out, "join", None, f"{grey}=grade", f"{tmp_path}/other=grade", "--size=8"
    )
    assert "its name 'mri' is that of another set too; prepare it with another --name" in told
    toy_set.write(tmp_path / "odd", name="a: b")
    told = refused(capsys, out, "join", None, f"{tmp_path}/odd=grade", "--size=8")
    assert "its name 'a: b' has a colon; prepare it with another --name" in told


@pytest.mark.parametrize("where", ["grey", "grey/within"])
def test_nothing_is_written_into_a_set(sets, tmp_path, capsys, where):
    before = written(imageset.open(sets[0]))
    out = tmp_path / where
    told = refused(capsys, out, "join", None, f"{sets[0]}=grade", "--size=8", "--overwrite")
    assert f"{out} lies in the set {sets[0]}; another output is needed" in told
    assert written(imageset.open(sets[0])) == before


def test_a_second_run_makes_the_same_bytes(sets, tmp_path):
    one = prepared(tmp_path / "one", *command(sets, "--size=8", "--name=x"))
    other = prepared(tmp_path / "other", *command(sets, "--size=8", "--name=x"))
    assert json.loads((one.path / "card.json").read_text())["sha256"] == other.card["sha256"]


def test_the_recipe_of_the_real_sets_is_made_of_commands_that_are_taken():
    commands = [line for line in RECIPE.read_text().splitlines() if line.startswith("python")]
    read = [shlex.split(line)[3:] for line in commands]
    *made, joined = [parser(words[0]).parse_args(words) for words in read]
    assert [pair.partition("=")[0] for pair in joined.sets] == [str(one.out) for one in made]
