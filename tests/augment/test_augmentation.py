"""Every way of training is asked the same images, and sees no label that it should not."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_names import defined

from conftest import ROOT, size_for_tests
from hallulib import UserError
from hallulib.augment import steering
from hallulib.augment.estimator import Trial, classifier, pretrained, steers
from hallulib.data import imageset
from hallulib.data.imageset import choose
from hallulib.evidence.metrics import columns
from hallulib.evidence.resnet import read, train_resnet
from hallulib.notebook import grid, parameters

NOTEBOOK = ROOT / "book" / "grids" / "augmentation.ipynb"
TINY = Trial(
    "grade2",
    share=0.1,
    encoding=2,
    pretraining=2,
    width=8,
    steering=2,
    sampler_steps=2,
    candidates=3,
    confidence=0,
    resnet_steps=8,
    resnet_width=2,
)


@pytest.fixture(scope="module")
def phantom():
    return imageset.open("phantom", 16)


def on(images, **values):
    """What the notebook defines, for these images."""
    space = defined(NOTEBOOK, SCHEME="grade2", DATASET="phantom", **values)
    space["images"] = space["source"] = images
    return space


def never(folder, **_):
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def space(phantom):
    return on(phantom)


@pytest.fixture(scope="module")
def scores(space):
    return space["scores"](0, 0)


def test_every_way_answers_for_every_image_that_is_asked_about(space, scores):
    assert len(scores) == size_for_tests(NOTEBOOK)["N_TEST"]
    for way in space["METHODS"]:
        assert np.isfinite(columns(scores, way)).all()
        assert columns(scores, way).shape == (len(scores), 2)


@pytest.mark.parametrize("out", ["test", "patients"])
def test_no_patient_is_learnt_from_and_asked_about(phantom, out):
    space = on(phantom, OUT=out, FOLDS=3, N_TEST=10_000)
    who, found = phantom.table["patient"].to_numpy(), space["folds"]()[0]
    assert len(found) == 3
    for kept, asked in found:
        assert not set(who[kept]) & set(who[asked])
    labelled = np.flatnonzero(phantom.labels("grade2") >= 0)
    everything = np.sort(np.concatenate([asked for _, asked in found]))
    if out == "patients":
        assert everything.tolist() == labelled.tolist()
    else:
        test = np.flatnonzero(phantom.table["split"] == "test")
        assert all(asked.tolist() == test.tolist() for _, asked in found)
        draws = {tuple(kept) for kept, _ in found}
        assert len(draws) == 3
        assert set(phantom.table["split"].iloc[np.concatenate([k for k, _ in found])]) == {"train"}


def test_labels_that_a_fold_did_not_keep_change_nothing(phantom, space, scores):
    """All labels of training images but those of the fold are taken away."""
    kept, _ = space["folds"]()[0][0]
    blind = phantom.table.copy()
    known = np.flatnonzero((phantom.table["split"] == "train") & (phantom.table["grade2"] != ""))
    blind.loc[np.setdiff1d(known, kept), ["gs", "isup", "grade2"]] = ""
    told = on(replace(phantom, table=blind), SHARE=1.0)["scores"](0, 0)
    pd.testing.assert_frame_equal(told, scores, rtol=1e-3)


def test_what_was_measured_is_found(phantom, scores):
    space = on(phantom)
    space["measure"] = never
    pd.testing.assert_frame_equal(space["scores"](0, 0), scores)


def test_pseudo_labels_are_of_images_without_label_the_surest_first(phantom, space):
    pool = phantom.unlabelled()
    guide = steers(space["prior"](), space["trial"], pool[:8], torch.arange(8) % 2, 0)
    x, y = space["pseudo"](guide, 3)
    log_p = space["asked_clean"](guide, pool)
    for c in y.unique():
        said = log_p.argmax(1) == c
        surest = log_p[said, c].sort(descending=True).values[:3]
        torch.testing.assert_close(space["asked_clean"](guide, x[y == c])[:, c], surest)


def test_strong_changes_keep_size_and_range_and_come_again(space, phantom):
    x = phantom.tensor(range(6))
    first, again = (space["strongly"](x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == x.shape
    assert first.abs().max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, x)


def test_an_image_of_no_weight_is_never_learnt_from(phantom):
    x, y = phantom.tensor(range(12)), torch.arange(12) % 2
    weights = torch.cat([torch.ones(8), torch.zeros(4)]).double()
    p = []
    for junk in (0.0, 1.0):
        other = torch.cat([x[:8], torch.full_like(x[8:], junk)])
        p.append(read(train_resnet(other, y, steps=3, width=2, weights=weights), x)[1])
    np.testing.assert_array_equal(*p)


def test_the_classifier_that_steers_learns_the_labels_that_are_kept(phantom):
    known = phantom.select("train", labelled="grade2")
    y = known.labels("grade2")
    rows = choose(y, 0, TINY.seed, TINY.share)
    prior = pretrained(phantom, TINY)
    expected = steers(prior, TINY, known.tensor(rows), y[rows], TINY.seed).state_dict()
    for name, value in classifier(phantom, TINY, prior)[0].state_dict().items():
        torch.testing.assert_close(value, expected[name].half().float())


def test_it_is_found_again_and_is_not_the_one_that_never_saw_noise(phantom, monkeypatch):
    prior = pretrained(phantom, TINY)
    guide, folder = classifier(phantom, TINY, prior)
    blind, other = classifier(phantom, TINY, prior, noised=False)
    monkeypatch.setattr(steering, "train", None)  # so that nothing is trained instead
    again, there = classifier(phantom, TINY, prior)
    assert there == folder != other
    for name, value in again.state_dict().items():
        assert torch.equal(value, guide.state_dict()[name])
    assert not torch.equal(blind.head[1].weight, guide.head[1].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(share=0), "share is 0; above 0 to 1 is needed"),
        (dict(confidence=1.0), "confidence is 1.0; 0 to below 1 is needed"),
        (dict(sampler_steps=0), "sampler_steps is 0; at least 1 is needed"),
    ],
)
def test_impossible_settings_are_told_in_a_sentence(change, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)


def test_a_class_with_a_single_image_is_told(phantom):
    train = phantom.table["split"] == "train"
    rare = phantom.classes("grade2")[1]
    rows = np.flatnonzero(train & (phantom.table["grade2"] == rare))[1:]
    few = phantom.table.copy()
    few.loc[rows, "grade2"] = ""
    prior = pretrained(phantom, TINY)
    with pytest.raises(UserError, match="2 classes of grade2 .*, the rarest with 1 images"):
        classifier(replace(phantom, table=few), TINY, prior)


def test_a_set_with_a_single_class_is_told(phantom):
    benign = phantom.table["grade2"].where(phantom.table["split"] != "train", "")
    first = phantom.classes("grade2")[0]
    benign[(phantom.table["split"] == "train") & (phantom.table["grade2"] == first)] = first
    one = replace(phantom, table=phantom.table.assign(grade2=benign))
    with pytest.raises(UserError, match="1 classes of grade2 in the split train"):
        classifier(one, TINY, pretrained(phantom, TINY))
    with pytest.raises(UserError, match="two classes of grade2 are needed in each fold"):
        on(one)["folds"]()


def test_what_is_asked_about_is_one_of_two():
    with pytest.raises(UserError, match="OUT = images: it is test or patients"):
        on(None, OUT="images")


def test_the_notebook_measures_the_numbers_of_the_stored_cells(tmp_path):
    asked = parameters.own_values(NOTEBOOK) | size_for_tests(NOTEBOOK)
    cell = grid.run_cell(NOTEBOOK, asked, tmp_path / "cell.json")
    assert cell["error"] is None
    for stored in grid.load(ROOT / "book" / "results" / "augmentation.json"):
        assert stored["measured"].keys() == cell["measured"].keys()
