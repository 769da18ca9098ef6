"""Admitted is what is near its class, confident and new, as real images alone define it."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hallulib import UserError
from hallulib.augment.selection import (
    ADMITTED,
    FeatureSpace,
    copy_threshold,
    normalised,
    take,
)


def space(copy_distance=0.01):
    """Images are points of the plane, which are their own features; class by the larger axis."""
    network = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(2, 2, bias=False))
    network[2].weight.data = 4 * torch.eye(2)
    x = points([[0.9, 0.1], [0.7, 0.1], [0.1, 0.8], [0.0, 0.6]])
    y = torch.tensor([0, 0, 1, 1])
    return FeatureSpace.fit(network, x, y, copy_distance)


def points(rows):
    return torch.tensor(rows).view(-1, 2, 1, 1)


def test_each_rule_refuses_what_it_is_for():
    samples = points([[0.8, 0.0], [0.8, 0.0], [0.30, 0.28], [0.901, 0.1], [0.1, 0.5]])
    told = space().judge(samples, torch.tensor([0, 1, 0, 0, 1]), confidence=0.7)
    assert told["verdict"].tolist() == [
        ADMITTED,
        "other class nearer",
        "not confident",
        "copy",
        ADMITTED,
    ]
    assert told["copy_of"][3] == 0
    assert told["copy_distance"][3] == pytest.approx(0.001 / 2**0.5, rel=1e-2)


def test_distance_and_probability_are_those_of_the_wanted_class():
    x, wanted = points([[0.6, 0.2]]), torch.tensor([1])
    told = space().judge(x, wanted).iloc[0]
    f = np.array([0.6, 0.2]) / np.hypot(0.6, 0.2)
    centroid = normalised(np.array([[0.1, 0.8], [0.0, 0.6]])).mean(0)
    assert told["distance"] == pytest.approx(np.square(f - centroid).mean(), rel=1e-5)
    odds = np.exp(4 * 0.2) / (np.exp(4 * 0.6) + np.exp(4 * 0.2))
    assert told["probability"] == pytest.approx(odds, rel=1e-5)


def test_synthetic_images_have_no_say_in_each_others_verdict():
    rng = torch.Generator().manual_seed(0)
    samples = torch.rand((40, 2, 1, 1), generator=rng)
    wanted = torch.randint(2, (40,), generator=rng)
    whole = space().judge(samples, wanted)
    part = space().judge(samples[10:20], wanted[10:20])
    pd.testing.assert_frame_equal(whole[10:20].reset_index(drop=True), part)
    order = torch.randperm(40, generator=rng)
    mixed = space().judge(samples[order], wanted[order])
    pd.testing.assert_frame_equal(whole.iloc[order.numpy()].reset_index(drop=True), mixed)


def test_the_copy_distance_is_that_of_new_real_images():
    x = torch.rand((30, 1, 4, 4))
    held_out = torch.rand((200, 1, 4, 4))
    network = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(16, 2))
    found = FeatureSpace.fit(
        network, x, torch.arange(30) % 2, copy_threshold(x, held_out, quantile=0.1)
    )
    gaps = (held_out[:, None] - x).square().mean((2, 3, 4)).sqrt().amin(1)
    assert (gaps < found.copy_distance).double().mean() == pytest.approx(0.1, abs=0.01)
    assert (found.judge(x, torch.zeros(30).long())["verdict"] == "copy").all()


def test_the_nearest_of_each_class_are_taken_and_no_others():
    verdicts = pd.DataFrame(
        {
            "wanted": [0, 0, 0, 1, 1],
            "distance": [0.3, 0.1, 0.2, 0.5, 0.0],
            "verdict": [ADMITTED] * 4 + ["copy"],
        }
    )
    assert take(verdicts, 2).tolist() == [False, True, True, True, False]
    assert take(verdicts, 9).sum() == 4


def test_nothing_admitted_says_why_and_what_to_do():
    verdicts = pd.DataFrame({"wanted": [0, 1, 1], "distance": 0.0, "verdict": "not confident"})
    verdicts.loc[0, "verdict"] = "copy"
    with pytest.raises(UserError, match="none of 3 synthetic images was admitted"):
        take(verdicts, 2)
    with pytest.raises(UserError, match=r"2 not confident, 1 copy\); a lower confidence"):
        take(verdicts, 2)
