"""Every setting has a kind and bounds, and what is neither is refused by its name."""

import copy

import numpy as np
import pytest
from toy_greys import ANSWERS, GREY, moved

from hallulib import OneShotClassifier, ScoreClassifier, SyntheticAugmenter, UserError
from hallulib.augment import estimator as augment
from hallulib.oneshot import experiment as oneshot
from hallulib.oneshot.hallucinate import Recipe
from hallulib.oneshot.joint import Fit

BAD = ["2", None, True, 2.5, np.float64(2.5), float("nan"), float("inf"), -1, -0.5, 2**32, [1], {}]
WHOLE, SEED = "whole", "seed"
NUMBERS = {
    ScoreClassifier: dict.fromkeys(["channels", "steps", "batch_size", "width"], WHOLE)
    | dict.fromkeys(["effort", "weigh", "batch"], WHOLE)
    | dict.fromkeys(["lr", "class_rate", "confidence", "power"], "real")
    | dict.fromkeys(["shift", "centre"], "bool")
    | {"random_state": SEED},
    OneShotClassifier: {"n_hallucinated": WHOLE, "channels": WHOLE, "random_state": SEED},
    SyntheticAugmenter: dict.fromkeys(["channels", "candidates", "encoding", "width"], WHOLE)
    | dict.fromkeys(["pretraining", "factor", "steering", "sampler_steps", "resnet_steps"], WHOLE)
    | dict.fromkeys(["ratio", "confidence", "gradient_scale"], "real")
    | {"random_state": SEED},
}


def right(kind, value):
    """Whether a value is of a kind, by Python's own types."""
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int if kind != "real" else (int, float)):
        return False
    return 0 <= value < (2**32 if kind == SEED else float("inf"))


@pytest.mark.parametrize(
    ("estimator", "name"), [(e, name) for e, names in NUMBERS.items() for name in names]
)
def test_every_number_of_an_estimator_is_refused_by_name(estimator, name):
    for value in BAD:
        if not right(NUMBERS[estimator][name], value):
            with pytest.raises(UserError, match=rf"^{name} is .*; .*needed[^\n]*$"):
                estimator().set_params(**{name: value}).fit(GREY, ANSWERS)


def test_every_parameter_of_an_estimator_is_checked():
    others = {"pretrained", "exact", "folder", "device", "verbose"}
    for estimator, names in NUMBERS.items():
        assert set(estimator().get_params()) - others == set(names)
    for name, value in {"pretrained": 3, "folder": 3, "device": "gpu", "verbose": "no"}.items():
        with pytest.raises(UserError, match=rf"^{name} is {value!r}; "):
            ScoreClassifier(steps=0, width=8).set_params(**{name: value}).fit(GREY, ANSWERS)


SETTINGS = {
    oneshot.Trial("a", "b"): {"forget": "bool", "seed": SEED},
    Recipe(): {},
    Fit(): {},
    augment.Trial("a"): {"seed": SEED},
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{type(s).__module__}")
def test_every_number_of_an_experiment_is_refused_by_name(settings):
    checked = 0
    for name, value in vars(settings).items():
        kind = {int: WHOLE, float: "real", bool: "bool"}.get(type(value))
        kind = SETTINGS[settings].get(name, kind)
        kind = "real" if name == "class_rate" else kind
        for bad in BAD if kind else ():
            if not right(kind, bad):
                # past the types that the tests themselves check
                wrong = copy.copy(settings)
                object.__setattr__(wrong, name, bad)
                with pytest.raises(UserError, match=rf"^{name} is .*; .*needed[^\n]*$"):
                    wrong.__post_init__()
                checked += 1
    assert checked > 20


# ---- one class


@pytest.mark.parametrize("estimator", NUMBERS)
@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (GREY, ["a"] * 6, "1 class found, 'a'; at least 2 classes are needed"),
        (GREY[:1], ["a"], "1 class found, 'a'; at least 2 classes are needed"),
        (GREY[:0], [], r"Found array with 0 sample\(s\)"),
        (GREY, ["a", "b"], "inconsistent numbers of samples"),
        (np.full((6, 64), np.inf), ANSWERS, "Input X contains infinity"),
        (np.full((6, 64), np.nan), ANSWERS, "Input X contains NaN"),
    ],
)
def test_a_fit_that_can_learn_nothing_is_one_sentence(estimator, x, y, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimator().fit(x, y)


def test_calibrating_on_one_class_is_one_sentence():
    fitted = moved(GREY)
    with pytest.raises(UserError, match="images of 1 class found; a temperature needs those of"):
        fitted.calibrate(GREY[::2], ANSWERS[::2])
    assert fitted.temperature_ == 1
