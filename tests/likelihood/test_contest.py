"""A comparison is fair if all methods see the same labels, and no others."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib import UserError
from hallulib.data import imageset
from hallulib.data.imageset import choose
from hallulib.diffusion import train
from hallulib.evidence.metrics import METHODS, auroc, columns, mean_interval, of_contest
from hallulib.likelihood.estimator import Contest, run
from hallulib.storage.settings import vary

TINY = Contest(
    "isup",
    per_class=2,
    n_test=8,
    pretraining=2,
    steps=2,
    width=8,
    effort=8,
    resnet_steps=2,
    resnet_width=4,
)


@pytest.fixture(scope="module")
def phantom():
    whole = imageset.open("phantom", size=16)
    rows = np.flatnonzero(whole.table["split"].isin(["train", "test"]))
    return whole.select(rows=rows[::3])


@pytest.fixture(scope="module")
def scores(phantom):
    return run(phantom, TINY)


@given(
    st.lists(st.integers(-1, 2), min_size=12, max_size=40).filter(lambda y: {0, 1} <= set(y)),
    st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_fewer_labels_are_a_part_of_more_and_none_is_invented(y, seed):
    y = torch.tensor(y)
    one, five, every = (choose(y, n, seed) for n in (1, 5, 0))
    assert set(one) <= set(five) <= set(every) == set(np.flatnonzero(y >= 0))
    for c in y[y >= 0].unique():
        of_class = int((y == c).sum())
        assert int((y[one] == c).sum()) == 1
        assert int((y[five] == c).sum()) == min(5, of_class)


def test_all_methods_answer_for_the_same_images(scores):
    k = scores["label"].nunique()
    assert len(scores) >= 8
    assert k >= 2
    for method in METHODS:
        assert columns(scores, method).shape == (len(scores), k)
        assert np.isfinite(columns(scores, method)).all()
    for method in METHODS[2:]:
        np.testing.assert_allclose(columns(scores, method).sum(1), 1, rtol=1e-5)
    assert (scores["evaluations"] <= 8 * k).all()


def test_the_same_contest_is_found_again_and_measured_again_the_same(phantom, scores):
    pd.testing.assert_frame_equal(run(phantom, TINY), scores)
    again = run(phantom, TINY, from_scratch=True)
    pd.testing.assert_frame_equal(again, scores, rtol=1e-4)


def test_labels_that_were_not_chosen_are_not_seen(phantom, scores):
    """Without them the set has exactly the chosen labels, and every answer stays."""
    train = phantom.table["split"].eq("train").to_numpy()
    y = phantom.labels("isup").numpy()
    kept = np.flatnonzero(train)[choose(torch.from_numpy(y[train]), 2, TINY.draw)]
    blind = phantom.table.copy()
    blind.loc[np.setdiff1d(np.flatnonzero(train), kept), ["gs", "isup", "grade2"]] = ""
    told = run(replace(phantom, table=blind), replace(TINY, per_class=0))
    pd.testing.assert_frame_equal(told, scores, rtol=1e-4)


@given(st.integers(0, 10**6), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_a_share_of_every_class_is_kept(seed, share):
    y = torch.tensor([0] * 50 + [1] * 9 + [2] * 2)
    rows = choose(y, 0, seed, share)
    assert len(set(rows)) == len(rows)
    expected = [max(2, round(share * n)) for n in (50, 9, 2)]
    assert torch.bincount(y[rows]).tolist() == expected
    assert set(choose(y, 0, seed, share / 2)) <= set(rows)


@pytest.fixture(scope="module")
def draws(phantom, scores):
    """Two draws of labels; what is trained without labels is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        trained = train.pretrained(phantom, steps=TINY.pretraining, width=TINY.width)
        patch.setattr(train, "pretrained", lambda *_, steps, width: trained)
        other = run(phantom, replace(TINY, draw=1))
    assert not np.allclose(columns(other, "gaussian"), columns(scores, "gaussian"))
    return pd.concat([scores.assign(draw=0), other.assign(draw=1)])


def test_the_table_pairs_methods_and_is_over_draws_and_patients(draws):
    found = of_contest(draws).set_index(["method", "measure"])
    assert len(found) == 2 * len(METHODS)
    assert (found["low"] <= found["value"]).all()
    assert (found["value"] <= found["high"]).all()
    assert (found["n"] == draws["patient"].nunique()).all()
    assert (found["trainings"] == 2).all()
    right, area = {}, {}
    for m in METHODS:
        each = [(d["label"].to_numpy(), columns(d, m)) for _, d in draws.groupby("draw")]
        right[m] = np.mean([p.argmax(1) == y for y, p in each])
        area[m] = np.mean([auroc(y, p) for y, p in each])
        assert found["value"][m, "accuracy"] == pytest.approx(right[m])
        assert found["value"][m, "AUROC"] == pytest.approx(area[m])
    for own in METHODS[:2]:
        gains = of_contest(draws, own).set_index(["method", "measure"])["gain"]
        for m in METHODS:
            assert gains[m, "accuracy"] == pytest.approx(right[own] - right[m])
            assert gains[m, "AUROC"] == pytest.approx(area[own] - area[m])
    same = draws.copy()
    for c in [c for c in draws if c.startswith("resnet18 ")]:
        same[c] = draws["likelihood" + c.removeprefix("resnet18")]
    row = of_contest(same).set_index(["method", "measure"]).loc[("resnet18", "AUROC")]
    assert row["gain"] == row["gain_low"] == row["gain_high"] == 0


def test_accuracy_of_one_image_a_patient_and_one_draw_has_the_interval_of_a_mean(scores):
    alone = scores.assign(draw=0, patient=np.arange(len(scores)).astype(str))
    row = of_contest(alone).set_index(["method", "measure"]).loc[("resnet18", "accuracy")]
    expected = mean_interval(columns(alone, "resnet18").argmax(1) == alone["label"])
    assert tuple(row[["value", "low", "high"]]) == pytest.approx(expected[:3])


def test_draws_with_other_test_images_are_refused(draws):
    other = draws.assign(label=draws["label"].where(draws["draw"] == 0, 0))
    with pytest.raises(UserError, match="draws of labels have different test images"):
        of_contest(other)


def test_settings_come_as_text_and_impossible_ones_are_refused():
    told = vary(Contest("isup"), "per_class=5 shift=True")
    assert (told.per_class, told.shift) == (5, True)
    with pytest.raises(UserError, match="per_class is -1; at least 0"):
        vary(Contest("isup"), "per_class=-1")


def test_a_set_without_two_classes_is_refused(phantom):
    alone = phantom.select(rows=np.flatnonzero(phantom.table["isup"].isin(["2"])))
    with pytest.raises(UserError, match="train has 1 classes of isup"):
        run(alone, TINY)
