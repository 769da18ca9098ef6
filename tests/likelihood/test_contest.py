"""A comparison is fair if all methods see the same labels, and no others."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_names import defined

from conftest import ROOT, size_for_tests
from hallulib import UserError
from hallulib.data import imageset
from hallulib.data.imageset import choose
from hallulib.evidence.metrics import auroc, columns, mean_interval, of_contest, read_scores
from hallulib.notebook import grid, parameters

NOTEBOOK = ROOT / "book" / "grids" / "contest.ipynb"
METHODS = defined(NOTEBOOK)["METHODS"]


def on(images, **values):
    """What the notebook defines, for these images."""
    space = defined(NOTEBOOK, SCHEME="isup", **values)
    space["images"] = images
    return space


def never(folder, **_):
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def phantom():
    whole = imageset.open("phantom", size=16)
    rows = np.flatnonzero(whole.table["split"].isin(["train", "test"]))
    return whole.select(rows=rows[::3])


@pytest.fixture(scope="module")
def scores(phantom):
    return on(phantom)["contest"](0)


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


def test_a_draw_is_found_again_and_measured_again_the_same(phantom, scores, tmp_path):
    space = on(phantom)
    space["measure"](tmp_path, draw=0)
    again = read_scores(tmp_path / "scores.csv").assign(draw=0)
    pd.testing.assert_frame_equal(again, scores, rtol=1e-4)
    space["measure"] = never
    pd.testing.assert_frame_equal(space["contest"](0), scores)


def test_labels_that_were_not_chosen_are_not_seen(phantom, scores):
    """Without them the set has exactly the chosen labels, and every answer stays."""
    train = phantom.table["split"].eq("train").to_numpy()
    y = phantom.labels("isup").numpy()
    kept = np.flatnonzero(train)[choose(torch.from_numpy(y[train]), 2, seed=0)]
    blind = phantom.table.copy()
    blind.loc[np.setdiff1d(np.flatnonzero(train), kept), ["gs", "isup", "grade2"]] = ""
    told = on(replace(phantom, table=blind), PER_CLASS=0)["contest"](0)
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
    """Two draws of labels."""
    other = on(phantom)["contest"](1)
    assert not np.allclose(columns(other, "gaussian"), columns(scores, "gaussian"))
    return pd.concat([scores, other])


def test_the_table_pairs_methods_and_is_over_draws_and_patients(draws):
    found = of_contest(draws, METHODS).set_index(["method", "measure"])
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
        gains = of_contest(draws, METHODS, own=own).set_index(["method", "measure"])["gain"]
        for m in METHODS:
            assert gains[m, "accuracy"] == pytest.approx(right[own] - right[m])
            assert gains[m, "AUROC"] == pytest.approx(area[own] - area[m])
    same = draws.copy()
    for c in [c for c in draws if c.startswith("resnet18 ")]:
        same[c] = draws["likelihood" + c.removeprefix("resnet18")]
    row = of_contest(same, METHODS).set_index(["method", "measure"]).loc[("resnet18", "AUROC")]
    assert row["gain"] == row["gain_low"] == row["gain_high"] == 0


def test_accuracy_of_one_image_a_patient_and_one_draw_has_the_interval_of_a_mean(scores):
    alone = scores.assign(patient=np.arange(len(scores)).astype(str))
    row = of_contest(alone, METHODS).set_index(["method", "measure"]).loc[("resnet18", "accuracy")]
    expected = mean_interval(columns(alone, "resnet18").argmax(1) == alone["label"])
    assert tuple(row[["value", "low", "high"]]) == pytest.approx(expected[:3])


def test_draws_with_other_test_images_are_refused(draws):
    other = draws.assign(label=draws["label"].where(draws["draw"] == 0, 0))
    with pytest.raises(UserError, match="draws of labels have different test images"):
        of_contest(other, METHODS)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"PER_CLASS": -1}, "parameter PER_CLASS = -1 must be a whole number of at least 0"),
        ({"SHIFT": 1}, "parameter SHIFT = 1 must be True or False"),
        ({"PER_CLAS": 1}, "unknown parameter PER_CLAS; did you mean PER_CLASS"),
    ],
)
def test_impossible_parameters_are_refused_before_images_are_opened(values, sentence):
    with pytest.raises(UserError, match=sentence):
        defined(NOTEBOOK, DATASET="no such set", **values)


def test_a_width_that_no_network_has_is_refused(phantom):
    with pytest.raises(UserError, match="width is 12; a multiple of 8 is needed"):
        on(phantom, WIDTH=12)["contest"](0)


def test_a_set_without_two_classes_is_refused(phantom):
    alone = phantom.select(rows=np.flatnonzero(phantom.table["isup"].isin(["2"])))
    with pytest.raises(UserError, match="train has 1 classes of isup"):
        on(alone)["contest"](0)


def test_the_notebook_measures_the_numbers_of_the_stored_cells(tmp_path):
    asked = parameters.own_values(NOTEBOOK) | size_for_tests(NOTEBOOK) | {"SHIFT": True}
    cell = grid.run_cell(NOTEBOOK, asked, tmp_path / "cell.json")
    assert cell["error"] is None
    for stored in grid.load(ROOT / "book" / "results" / "labels.json"):
        assert stored["measured"].keys() == cell["measured"].keys()
    space = defined(NOTEBOOK, SHIFT=True)
    space["measure"] = never  # what another process measured is found
    told = of_contest(pd.concat([space["contest"](draw) for draw in (0, 1)]), METHODS)
    for row in told.itertuples():
        number = cell["measured"][f"{row.measure.lower()}_{row.method}"]
        expected = {end: getattr(row, end) for end in ("value", "low", "high", "n")}
        assert number == pytest.approx(expected)
