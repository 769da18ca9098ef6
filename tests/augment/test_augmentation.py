"""The experiment compares its arms on the same folds, and sees no label that it should not."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from hallulib import UserError
from hallulib.augment import steering
from hallulib.augment.estimator import (
    ARMS,
    Trial,
    classifier,
    pretrained,
    run,
    steers,
)
from hallulib.augment.selection import ADMITTED
from hallulib.data import imageset
from hallulib.data.imageset import choose
from hallulib.evidence.metrics import of_folds, read_scores
from hallulib.storage import store

TINY = Trial(
    "grade2",
    share=0.1,
    folds=2,
    encoding=2,
    pretraining=2,
    width=8,
    steering=2,
    sampler_steps=2,
    candidates=3,
    confidence=0,
    resnet_steps=8,
    resnet_width=2,
    n_test=20,
)


@pytest.fixture(scope="module")
def phantom():
    return imageset.open("phantom", 16)


@pytest.fixture(scope="module")
def found(phantom):
    return run(phantom, TINY)


def test_every_fold_asks_the_same_test_images_and_every_arm_answers(found):
    scores, verdicts = found
    assert verdicts["fold"].nunique() == scores["fold"].nunique() == 2
    first, second = (part.reset_index(drop=True) for _, part in scores.groupby("fold"))
    pd.testing.assert_frame_equal(first[["patient", "label"]], second[["patient", "label"]])
    for arm in ARMS:
        total = scores[[c for c in scores if c.startswith(f"{arm} ")]].sum(axis=1)
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_as_many_unselected_as_selected_images_of_each_class_are_learnt_from(found, phantom):
    n = len(choose(phantom.select("train", labelled="grade2").labels("grade2"), 0, 0, TINY.share))
    for _, verdicts in found[1].groupby("fold"):
        assert len(verdicts) == 3 * 2 * -(-n // 2)
        assert (verdicts.loc[verdicts["selected"], "verdict"] == ADMITTED).all()
        counts = [verdicts.loc[verdicts[a], "wanted"].value_counts() for a in ARMS[2:]]
        pd.testing.assert_series_equal(*counts, check_names=False, check_like=True)


def test_the_classifier_that_steers_learns_the_labels_of_the_first_fold(found, phantom):
    known = phantom.select("train", labelled="grade2")
    y = known.labels("grade2")
    rows = choose(y, 0, TINY.seed, TINY.share)
    prior = pretrained(phantom, TINY)
    expected = steers(prior, TINY, known.tensor(rows), y[rows], TINY.seed).state_dict()
    for name, value in classifier(phantom, TINY, prior)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name].half().float())


def test_it_is_found_again_and_is_not_the_one_that_never_saw_noise(found, phantom, monkeypatch):
    prior = pretrained(phantom, TINY)
    guide, folder = classifier(phantom, TINY, prior)
    blind, other = classifier(phantom, TINY, prior, noised=False)
    monkeypatch.setattr(steering, "train", None)  # so that nothing is trained instead
    again, there = classifier(phantom, TINY, prior)
    assert there == folder != other
    for name, value in again.state_dict().items():
        assert torch.equal(value, guide.state_dict()[name])
    assert not torch.equal(blind.head[1].weight, guide.head[1].weight)


def test_what_was_found_is_not_measured_again_and_a_lost_fold_comes_out_the_same(found, phantom):
    lost = next(store.runs_folder().glob("augmented-phantom-*/run.json"))
    lost.unlink()
    for again, before in zip(run(phantom, TINY), found, strict=True):
        pd.testing.assert_frame_equal(again, before, rtol=1e-4)
    assert lost.exists()


def test_labels_that_a_fold_did_not_keep_change_nothing(found, phantom):
    """All labels of training images but those of the fold are taken away."""
    known = (phantom.table["split"] == "train") & (phantom.table["grade2"] != "")
    positions = np.flatnonzero(known)
    y = phantom.select("train", labelled="grade2").labels("grade2")
    kept = positions[choose(y, 0, 0, 0.1)]
    blind = phantom.table.copy()
    blind.loc[np.setdiff1d(positions, kept), ["gs", "isup", "grade2"]] = ""
    told, _ = run(replace(phantom, table=blind), replace(TINY, share=1, folds=1))
    expected = found[0].query("fold == 0")
    pd.testing.assert_frame_equal(told, expected, rtol=1e-3)


def made_up(accuracy, folds=5, patients=30, seed=0):
    """Scores of four arms with the given chances of being right, two images a patient."""
    rng = np.random.default_rng(seed)
    n = folds * patients * 2
    scores = pd.DataFrame({"fold": np.repeat(np.arange(folds), patients * 2)})
    scores["patient"] = np.tile(np.repeat(np.arange(patients), 2), folds).astype(str)
    scores["label"] = np.tile(rng.integers(2, size=patients * 2), folds)
    for arm, chance in zip(ARMS, accuracy, strict=True):
        right = rng.random(n) < chance
        scores[f"{arm} a"] = np.where(right == (scores["label"] == 0), 0.9, 0.1)
        scores[f"{arm} b"] = 1 - scores[f"{arm} a"]
    return scores


def test_the_table_says_what_the_scores_say():
    scores = made_up((0.6, 0.7, 0.7, 0.8))
    found = of_folds(scores, ARMS).set_index("arm")
    for arm in ARMS:
        right = (scores[f"{arm} b"] > 0.5) == (scores["label"] == 1)
        assert found.loc[arm, "accuracy"] == pytest.approx(right.mean())
    assert (found["low"] < found["accuracy"]).all()
    assert (found["accuracy"] < found["high"]).all()
    gain = found["accuracy"] - found.loc["classical", "accuracy"]
    np.testing.assert_allclose(found["gain"].drop("classical"), gain.drop("classical"))


def test_an_arm_that_answers_as_the_other_gains_nothing_for_sure():
    scores = made_up((0.6, 0.7, 0.7, 0.8))
    for name in "ab":
        scores[f"selected {name}"] = scores[f"classical {name}"]
    row = of_folds(scores, ARMS).set_index("arm").loc["selected"]
    assert row["gain"] == row["gain_low"] == row["gain_high"] == 0


def test_patients_may_have_any_name(tmp_path):
    scores = made_up((0.6, 0.7, 0.7, 0.8))
    names = dict(zip(scores["patient"].unique(), ["NA", "None", "nan", "007"], strict=False))
    named = scores.assign(patient=scores["patient"].map(lambda p: names.get(p, p)))
    named.to_csv(tmp_path / "scores.csv", index=False)
    read = read_scores(tmp_path / "scores.csv")
    assert read["patient"].tolist() == named["patient"].astype(str).tolist()
    pd.testing.assert_frame_equal(of_folds(read, ARMS), of_folds(scores, ARMS))


def test_intervals_of_no_gain_hold_zero_about_as_often_as_they_should():
    held = 0
    for seed in range(40):
        row = (
            of_folds(made_up((0.7,) * 4, seed=seed), ARMS, resamples=200)
            .set_index("arm")
            .loc["selected"]
        )
        held += row["gain_low"] <= 0 <= row["gain_high"]
    assert held >= 35


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(share=0), "share is 0; above 0 to 1 is needed"),
        (dict(confidence=1.0), "confidence is 1.0; 0 to below 1 is needed"),
        (dict(folds=0), "folds is 0; at least 1 is needed"),
    ],
)
def test_impossible_settings_are_told_in_a_sentence(change, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)


def test_a_class_with_a_single_image_is_told(phantom, found):
    train = phantom.table["split"] == "train"
    rare = phantom.classes("grade2")[1]
    rows = np.flatnonzero(train & (phantom.table["grade2"] == rare))[1:]
    few = phantom.table.copy()
    few.loc[rows, "grade2"] = ""
    with pytest.raises(UserError, match="2 classes of grade2 .*, the rarest with 1 images"):
        run(replace(phantom, table=few), replace(TINY, folds=1))


def test_a_set_with_a_single_class_is_told(phantom, found):
    benign = phantom.table["grade2"].where(phantom.table["split"] != "train", "")
    first = phantom.classes("grade2")[0]
    benign[(phantom.table["split"] == "train") & (phantom.table["grade2"] == first)] = first
    one = replace(phantom, table=phantom.table.assign(grade2=benign))
    with pytest.raises(UserError, match="1 classes of grade2 in the split train"):
        run(one, replace(TINY, folds=1))


def test_a_set_without_validation_images_is_told(phantom, found):
    table_ = phantom.table.assign(
        split=phantom.table["split"].where(phantom.table["split"] != "val", "test")
    )
    with pytest.raises(UserError, match=r"phantom: no image with split val and label scheme grad"):
        run(replace(phantom, table=table_), replace(TINY, folds=1))
