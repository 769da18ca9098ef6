"""What labels, patients and splits are called, whatever the archive."""

import argparse
import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import plan
from data_prep.__main__ import main
from hallulib import UserError
from hallulib.data import imageset

SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
PLAIN = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=6)
WORDS = "nan NA N/A <NA> #N/A NaT null ?".split()
DOUBTFUL = "none unknown - -- -1 -1.0 -9".split()


def spelt(words: list[str]) -> st.SearchStrategy[str]:
    """One of the words, in any case, with spaces around it or without."""
    change = st.sampled_from([str.lower, str.upper, str.title, lambda word: f" {word}\t"])
    return st.builds(lambda word, way: way(word), st.sampled_from(words), change)


def read(labels, classes=(), missing=()):
    return plan.read_labels(labels, classes, "table.csv", missing)


@given(spelt(WORDS), st.integers(1, 4))
@settings(deadline=None)
def test_a_word_for_nothing_is_no_class_is_counted_and_leaves_grades_in_order(word, n):
    labels, values, notes = read(["10", *[word] * n, "2"])
    assert values == ["2", "10"]
    assert list(labels) == ["10", *[""] * n, "2"]
    assert notes == [f"label {word.strip()!r} taken as unlabelled"] * n


@given(spelt(DOUBTFUL))
@settings(deadline=None)
def test_a_word_that_may_mean_nothing_is_asked_about_and_both_answers_are_taken(word):
    text = word.strip()
    with pytest.raises(UserError, match=f"table.csv: label {text!r} may mean that there is none"):
        read(["0", word, "1"])
    labels, values, notes = read(["0", word, "1"], missing=[text])
    assert (list(labels), values, len(notes)) == (["0", "", "1"], ["0", "1"], 1)
    labels, values, notes = read(["0", word, "1"], classes=["0", text, "1"])
    assert (list(labels), values, notes) == (["0", text, "1"], ["0", text, "1"], [])


@given(spelt(WORDS))
@settings(deadline=None)
def test_a_class_that_is_named_is_a_class_whatever_it_is_called(word):
    labels, values, notes = read(["a", word], classes=[word.strip(), "a"])
    assert (list(labels), values, notes) == (["a", word.strip()], [word.strip(), "a"], [])


@pytest.mark.parametrize("labels", [["-2", "-1"], ["0", "a-1"], ["nans", "nonesuch"]])
def test_what_only_looks_like_nothing_stays_a_class(labels):
    assert sorted(read(labels)[1]) == sorted(labels)


TWICE = [
    ("Benign", "benign"),
    ("1", "1.0"),
    ("0", "0.0"),
    ("2.5", "2.50"),
    ("01", "1"),
    ("1e1", "10"),
    ("grade 2", "grade  2"),
    ("in situ", "in\u00a0situ"),
    ("Ｔ1", "t1"),
    ("Größe", "GRÖSSE"),
]


@pytest.mark.parametrize(("one", "other"), TWICE)
def test_labels_that_differ_in_spelling_only_are_refused_by_both_names(one, other):
    with pytest.raises(UserError, match="differ in spelling only") as told:
        read([one, "other", other])
    assert repr(one) in str(told.value)
    assert repr(other) in str(told.value)
    assert read([one, other], classes=[one, other])[1] == [one, other]


@given(st.text(st.characters(categories=["Lu", "Ll", "Lo", "Mn"]), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_letter_and_its_accent_are_one_class_and_one_patient_in_any_encoding(text):
    forms = [unicodedata.normalize(form, f"m{text}") for form in ("NFC", "NFD")]
    labels, values, _ = read(forms)
    assert len(values) == 1
    assert list(labels) == values * 2
    assert dealt(forms) == ["p00001", "p00001"]


@given(st.lists(st.one_of(PLAIN, st.integers(0, 300).map(str)), min_size=1, unique=True))
@settings(deadline=None)
def test_sound_labels_stay_as_they_are(labels):
    sound = [label for label in labels if not plan.is_missing(label) and label not in DOUBTFUL]
    found, values, notes = read(sound)
    assert (list(found), sorted(values), notes) == (sound, sorted(sound), [])


def dealt(patients, splits=None, unit="patient") -> list[str]:
    """The pseudonyms of patients with one image each."""
    rows = {"patient": patients, "label": "a", "split": splits or ""}
    settled, _ = plan.settle(pd.DataFrame(rows, dtype=str), SHARES, 0, "table.csv", unit)
    assert (settled.groupby("patient")["split"].nunique() == 1).all()
    return list(settled["patient"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "12.0"),
        ("007", "007."),
        ("P1", "p1"),
        (" P1", "P1 "),
        ("A  B", "a b"),
        ("Ｐ1", "P1"),
    ],
)
def test_a_patient_in_two_spellings_is_one_patient_and_is_told(one, other):
    assert dealt([one, "other", other]) == ["p00001", "p00002", "p00001"]
    rows = pd.DataFrame({"patient": [one, other], "label": "a", "split": ["train", "test"]})
    with pytest.raises(UserError, match="is in train and test"):
        plan.settle(rows, SHARES, 0, "table.csv")
    _, notes = plan.settle(rows.assign(split=""), SHARES, 0, "table.csv")
    assert ("patient in two spellings: taken as one" in notes) == (one.strip() != other.strip())


@given(st.lists(st.from_regex(r"[0-9]{1,4}|[0-9a-f]{8}", fullmatch=True), min_size=1, unique=True))
@settings(deadline=None)
def test_numbers_with_other_leading_zeros_are_other_patients(names):
    assert len(set(dealt(names))) == len(names)


@given(spelt([*WORDS, *DOUBTFUL]))
@settings(deadline=None)
def test_images_of_a_patient_called_nothing_are_not_tied_together(word):
    with pytest.raises(UserError, match="slide .* may mean that it is not known; nothing is need"):
        dealt(["1", word, word], unit="slide")


PUBLISHED = {
    "train": ["train", "Train", " TRAINING "],
    "val": ["val", "valid", "Validation", "dev"],
    "test": ["test", "Testing"],
}


@pytest.mark.parametrize("name", sum(PUBLISHED.values(), []))
def test_published_names_of_splits_are_known(name):
    rows = pd.DataFrame({"patient": ["1", "2"], "label": "a", "split": [name, "test"]})
    found, _ = plan.settle(rows, SHARES | {"val": 0}, 0, "table.csv")
    assert found["split"][0] in PUBLISHED
    assert name in PUBLISHED[found["split"][0]]


@pytest.mark.parametrize("name", ["testA", "1", "nan", "True"])
def test_other_names_of_splits_are_refused(name):
    rows = pd.DataFrame({"patient": ["1", "2"], "label": "a", "split": ["train", name]})
    with pytest.raises(UserError, match=f"row 1 has split '{name}'; known: unlabelled, train"):
        plan.settle(rows, SHARES, 0, "table.csv")


def test_the_unit_is_known_only_where_something_names_it():
    some, none = pd.Series(["", "7"]), pd.Series(["", ""])
    assert plan.unit_of(some, None, "a.npz") == "patient"
    assert plan.unit_of(some, "field", "a.npz") == "field"
    assert plan.unit_of(none, None, "a.npz") == "unknown"
    with pytest.raises(UserError, match="a.npz: --unit is field, but nothing tells the field of"):
        plan.unit_of(none, "field", "a.npz")


@pytest.mark.parametrize("text", ["a,b,a", "a,,b", "é,e\u0301"])
def test_values_are_named_once_each(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not like a,b,c, each value once"):
        plan.values(text)


TABLES = {  # four labels that take turns -> the classes, or the sentence
    "nan among numbers": (["0.0", "2.0", "10.0", "nan"], ("0.0", "2.0", "10.0")),
    "NA": (["yes", "no", "NA", "N/A"], ("no", "yes")),
    "two encodings": (
        ["naevus", "m\u00e9lanome", "naevus", "me\u0301lanome"],
        ("m\u00e9lanome", "naevus"),
    ),
    "minus one": (["0", "1", "-1", "-1"], "label '-1' may mean that there is none"),
    "two formats": (["0", "1", "0.0", "1.0"], "labels '0' and '0.0' differ in spelling only"),
    "two cases": (["benign", "Benign", "bad", "Bad"], "labels 'Bad' and 'bad' differ in spell"),
}


@pytest.mark.parametrize("archive", ["folder", "npz"])
@pytest.mark.parametrize(("labels", "expected"), TABLES.values(), ids=TABLES)
def test_tables_and_arrays_read_labels_alike(tmp_path, capsys, archive, labels, expected):
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)
    command = [archive, str(tmp_path / "in"), str(tmp_path / "set"), "--size=8", "--workers=1"]
    if archive == "npz":
        command[1] += ".npz"
        np.savez(command[1], images=images, label=labels * 6)
    else:
        (tmp_path / "in").mkdir()
        for n, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "in" / f"{n}.png")
        rows = [f"{n}.png,{label}" for n, label in enumerate(labels * 6)]
        (tmp_path / "in.csv").write_text("\n".join(["file,label", *rows]))
        command += [f"--csv={tmp_path / 'in.csv'}"]
    if isinstance(expected, str):
        assert main(command) == 2
        assert expected in capsys.readouterr().err
        return
    assert main(command) == 0
    opened = imageset.open(tmp_path / "set")
    assert opened.classes("label") == expected
    none = sum(label.lower() in ("nan", "na", "n/a") for label in labels) * 6
    assert (opened.table["split"] == "unlabelled").sum() == none
