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
    space = defined(NOTEBOOK, **{"SCHEME": "isup"} | values)
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
    assert (scores["evaluations"] <= 4 * k).all()
    assert np.isfinite(scores["bits"]).all()


def test_places_share_no_image_and_labels_come_from_here(phantom):
    column = phantom.table["size_mm"].replace("", "0").astype(float).gt(16)
    small = replace(phantom, table=phantom.table.assign(large=column.map({True: "y", False: "n"})))
    space = on(small, PLACE="large:y", SCHEME="grade2")
    learn, asked, _ = space["rows"]()
    assert set(small.table["large"].iloc[learn]) == {"y"}
    assert set(small.table["split"].iloc[learn]) == {"train"}
    assert set(small.table["large"].iloc[asked["here"]]) == {"y"}
    assert set(small.table["large"].iloc[asked["elsewhere"]]) == {"n"}
    assert set(small.table["split"].iloc[np.concatenate(list(asked.values()))]) == {"test"}


def test_what_learns_without_labels_sees_no_test_image(phantom):
    seen = on(phantom)["pool"]()
    assert set(seen.table["split"]) <= {"train", "unlabelled"}
    assert len(seen) == phantom.table["split"].isin(["train", "unlabelled"]).sum()


def test_the_time_at_which_held_out_labels_are_likeliest_is_taken():
    """At one time the activations are the class, at the others noise."""
    space = defined(NOTEBOOK)
    rng, y = torch.Generator().manual_seed(0), torch.arange(40) % 2
    described = torch.randn(40, len(space["TIMES"]), 6, generator=rng)
    described[:, 2, 3:] += 4 * y[:, None]
    t, layer = space["chosen"](described, [slice(0, 3), slice(3, 6)], y)
    assert (t, layer) == (2, slice(3, 6))
    assert space["chosen"](described[:2], [slice(0, 3)], y[:2]) == (1, slice(None))


def test_an_image_is_silenced_in_the_order_of_its_doubt_or_of_its_bits():
    table = pd.DataFrame({"draw": 0, "patient": list("abcd"), "label": [0, 0, 1, 1]})
    table["resnet18 0"] = [3.0, -2.0, -1.0, -4.0]  # the second is wrong, the third doubts most
    table["resnet18 1"] = -table["resnet18 0"]
    table["bits"] = [4.0, 1.0, 3.0, 2.0]  # the second costs least
    areas, less = defined(NOTEBOOK)["silence"](
        pd.concat([table, table.assign(draw=1)]), "resnet18"
    )
    assert areas["all"] == 0.25
    assert areas["bits"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert areas["doubt"] == pytest.approx((1 / 3 + 1 / 4) / 4)
    assert less.value == pytest.approx(areas["bits"] - areas["doubt"])


def test_a_draw_is_found_again_and_measured_again_the_same(phantom, scores, tmp_path):
    space = on(phantom)
    space["measure"](tmp_path, draw=0, seed=0)
    again = read_scores(tmp_path / "scores.csv").assign(draw=0, seed=0)
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
        table = of_contest(draws, METHODS, own=METHODS[:2]).query("own == @own")
        gains = table.set_index(["method", "measure"])["gain"]
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
        ({"EFFORT": 1}, "parameter EFFORT = 1 must be a whole number of at least 2"),
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
    asked = parameters.own_values(NOTEBOOK) | size_for_tests(NOTEBOOK) | {"PLACE": "val"}
    cell = grid.run_cell(NOTEBOOK, asked, tmp_path / "cell.json")
    assert cell["error"] is None
    names = set(cell["measured"])
    alone = {name for name in names if "here" not in name.split("_")}
    for stored in grid.load(ROOT / "book" / "results" / "labels.json"):
        assert set(stored["measured"]) == (
            alone if stored["parameters"]["PLACE"] == "none" else names
        )
    space = defined(NOTEBOOK, PLACE="val")
    space["measure"] = never  # what another process measured is found
    scores = pd.concat([space["contest"](draw) for draw in range(4)])
    told = of_contest(scores.query("place == 'elsewhere'"), METHODS)
    for row in told.itertuples():
        number = cell["measured"][f"{row.measure.lower()}_{row.method}"]
        expected = {end: getattr(row, end) for end in ("value", "low", "high", "n")}
        assert number == pytest.approx(expected)
