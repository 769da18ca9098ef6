"""A planted shortcut goes with the class as often as it says, and changes nothing else."""

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_names import defined

from conftest import ROOT, size_for_tests
from hallulib import UserError
from hallulib.data import imageset
from hallulib.evidence import metrics
from hallulib.notebook import grid, parameters
from hallulib.storage import store

NOTEBOOK = ROOT / "book" / "grids" / "shortcut.ipynb"


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_cue_goes_with_the_class_as_often_as_its_strength_says(strength):
    dealt, y = defined(NOTEBOOK, STRENGTH=strength)["dealt"], torch.arange(20_000) % 2
    for law, sign in (("kept", 1), ("broken", 0), ("reversed", -1)):
        has = dealt(y, law, 3).double()
        for c in (0, 1):
            expected = (1 + sign * strength * (2 * c - 1)) / 2
            assert float(has[y == c].mean()) == pytest.approx(expected, abs=0.015)
    assert torch.equal(dealt(y, "kept", 3), dealt(y, "kept", 3))


def test_a_mark_is_a_corner_and_the_other_cues_keep_the_mean():
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    marked = defined(NOTEBOOK, CUE="mark")["cued"](x)
    changed = (marked != x).any(0)[0]
    assert changed[-3:, :3].all()
    assert changed.sum() == 9
    flat = defined(NOTEBOOK, CUE="contrast")["cued"](x)
    torch.testing.assert_close(flat.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(flat.std((1, 2, 3)), 0.75 * x.std((1, 2, 3)))
    blurred = defined(NOTEBOOK, CUE="scanner")["cued"](x)
    assert (blurred.std((1, 2, 3)) < 0.6 * x.std((1, 2, 3))).all()


def test_who_reads_the_cue_alone_is_right_as_long_as_it_goes_with_the_class(monkeypatch, tmp_path):
    space = defined(NOTEBOOK, STRENGTH=1.0)
    table = pd.DataFrame({"patient": [f"P{i}" for i in range(40)], "label": np.arange(40) % 2})
    for name in space["METHODS"]:
        table[f"{name} without"], table[f"{name} with"] = -1.0, 1.0
    store.write_table(tmp_path / "scores.csv", table)
    monkeypatch.setattr(store, "load_or_train", lambda *_, **__: tmp_path)
    found = metrics.of_contest(
        space["trained"](0).query("law == 'kept'"), ["moved"], own=["moved"]
    )
    assert set(found["value"]) == {1.0}
    found = space["trained"](0).query("law == 'reversed'")
    assert set(metrics.of_contest(found, ["moved"], own=["moved"])["value"]) == {0.0}
    broken = space["trained"](0).query("law == 'broken'")
    assert 0.2 < metrics.of_contest(broken, ["moved"], own=["moved"])["value"].iloc[0] < 0.8


def test_labels_of_more_than_two_classes_are_refused(tmp_path):
    space = defined(NOTEBOOK, SCHEME="isup")
    with pytest.raises(UserError, match="lesions: the labels isup are not of two classes"):
        space["measure"](tmp_path, seed=0)


def test_an_unknown_cue_is_refused():
    with pytest.raises(UserError, match="CUE = hat: it is one of mark, contrast, scanner"):
        defined(NOTEBOOK, CUE="hat")


def test_the_notebook_measures_the_numbers_of_the_stored_cells(tmp_path):
    asked = parameters.own_values(NOTEBOOK) | size_for_tests(NOTEBOOK)
    cell = grid.run_cell(NOTEBOOK, asked, tmp_path / "cell.json")
    assert cell["error"] is None
    for stored in grid.load(ROOT / "book" / "results" / "shortcut.json"):
        assert stored["measured"].keys() == cell["measured"].keys()


def test_mammograms_are_asked_about_by_what_learnt_from_other_patients(tmp_path):
    """Every labelled image once, and no patient on both sides."""
    notebook = ROOT / "book" / "grids" / "mammograms.ipynb"
    space = defined(notebook, PER_CLASS=20, FOLDS=3, SCHEME="grade2")
    images = imageset.open("lesions", 16)
    rows = np.flatnonzero(images.table["split"].isin(["train", "val"]))
    space["images"] = small = images.select(rows=rows)
    of = {
        x.numpy().tobytes(): p for x, p in zip(small.tensor(), small.table["patient"], strict=True)
    }
    asked = []

    def answers(x, y, others, new, seed):
        assert len(x) == len(y)
        learnt, now = ({of[image.numpy().tobytes()] for image in part} for part in (x, new))
        assert not learnt & now
        asked.append(len(new))
        return {method: torch.zeros(len(new), 2) for method in space["METHODS"]}

    space["answers"] = answers
    space["measure"](tmp_path, seed=0)
    table = metrics.read_scores(tmp_path / "scores.csv")
    assert sum(asked) == len(table) == 40
    assert not table.isna().any().any()
    assert table["label"].value_counts().tolist() == [20, 20]


def test_exact_likelihood_and_its_rivals_are_measured(tmp_path):
    notebook = ROOT / "book" / "grids" / "mammograms.ipynb"
    asked = parameters.own_values(notebook) | size_for_tests(notebook)
    cell = grid.run_cell(notebook, asked, tmp_path / "cell.json")
    assert cell["error"] is None
    rivals = {"decision", "filter_bank", "resnet18"}
    assert {f"gain_auroc_{rival}" for rival in rivals} | {"auroc_exact"} <= set(cell["measured"])
