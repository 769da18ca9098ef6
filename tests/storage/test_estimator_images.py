"""Whole numbers are grey levels in any form; a scale from 0 to 1 is not taken for [-1, 1]."""

import numpy as np
import pandas as pd
import pytest
import torch
from toy_greys import ANSWERS, GREY, moved

from hallulib import OneShotClassifier, ScoreClassifier, SyntheticAugmenter, UserError

FORMS = {
    **{f"array of {kind}": GREY.astype(kind) for kind in ("uint8", "int16", "int64", "uint64")},
    "tensor": torch.from_numpy(GREY),
    "tensor of int64": torch.from_numpy(GREY).long()[:, None],
    "rows": GREY.reshape(6, 64),
    "table": pd.DataFrame(GREY.reshape(6, 64)),
    "table of int64": pd.DataFrame(GREY.reshape(6, 64).astype(int)),
    "list of rows": GREY.reshape(6, 64).tolist(),
    "list of images": list(GREY),
    "list of lists": GREY.tolist(),
    "table of floats": pd.DataFrame((GREY / np.float32(127.5) - 1).reshape(6, 64)),
    "list of floats": (GREY / np.float32(127.5) - 1).tolist(),
    "doubles": (GREY / np.float32(127.5) - 1).astype(float),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_grey_levels_give_the_same_answer_in_any_form(form):
    expected = moved(GREY / np.float32(127.5) - 1)
    answer = expected.decision_function(GREY / np.float32(127.5) - 1)
    np.testing.assert_array_equal(expected.decision_function(FORMS[form]), answer)
    np.testing.assert_array_equal(moved(FORMS[form]).decision_function(GREY), answer)


WRONG = {
    "a mask": (GREY > 99).astype(np.uint8),
    "a mask of int64": (GREY > 99).astype(int),
    "a mask of ones": np.ones((6, 64), int),
    "booleans": GREY > 99,
    "a tensor of booleans": torch.from_numpy(GREY > 99),
    "a table of booleans": pd.DataFrame(GREY.reshape(6, 64) > 99),
    "a list of booleans": (GREY > 99).tolist(),
    "16 bits": GREY.astype(np.uint16) * 257,
    "Hounsfield units": GREY.astype(np.int16) - 1024,
    "-1 and 1": np.where(GREY > 99, 1, -1),
    "grey levels as floats": GREY.astype(np.float32),
}


@pytest.mark.parametrize("name", WRONG)
def test_whole_numbers_that_are_no_grey_levels_are_refused(name):
    fitted = moved(GREY)
    for use in (moved, fitted.predict):
        with pytest.raises(UserError, match="^images (hold nothing but 0|reach from .* to)"):
            use(WRONG[name])


def test_black_is_black_whatever_a_mask_would_mean():
    fitted = moved(GREY)
    black = np.zeros((1, 8, 8), np.uint8)
    np.testing.assert_array_equal(fitted.predict_proba(black), fitted.predict_proba(black - 1.0))


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.Tensor, pd.DataFrame, list])
def test_a_scale_from_0_to_1_is_refused_by_a_fit_and_told_of_a_query(kind):
    unit = GREY.reshape(6, 64) / np.float32(255)
    form = {torch.Tensor: torch.from_numpy, list: np.ndarray.tolist}.get(kind, kind)(unit)
    with pytest.raises(UserError, match=r"reach from 0 to 1, and none is below 0; .* x \* 2 - 1"):
        moved(form)
    fitted = moved(GREY)
    with pytest.warns(UserWarning, match="reach from 0 to 1, where images of the fit are below 0"):
        fitted.predict(form)
    with pytest.raises(UserError, match="images of the fit are below 0"):
        ScoreClassifier(steps=0, effort=2, width=8).fit(GREY, ANSWERS, unlabelled=form)


@pytest.mark.parametrize("estimator", [ScoreClassifier, OneShotClassifier, SyntheticAugmenter])
@pytest.mark.parametrize("form", [GREY / np.float32(255), *WRONG.values()])
def test_no_estimator_guesses_a_scale(estimator, form):
    with pytest.raises(UserError, match="^images (hold nothing but 0|reach from .* to)"):
        estimator().fit(form, ANSWERS)


def test_bright_images_are_no_scale_from_0_to_1(recwarn):
    bright = 128 + GREY // 2
    fitted = moved(bright)
    fitted.predict(bright / np.float32(127.5) - 1)
    fitted.predict(bright)
    moved(GREY).predict(bright)
    assert not [w for w in recwarn if "images reach" in str(w.message)]
