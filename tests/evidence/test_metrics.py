"""AUROC equals its definition; intervals cover the truth as often as they say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hallulib import UserError
from hallulib.evidence.metrics import (
    Interval,
    auroc,
    bootstrap,
    mean_interval,
    paired_difference,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half(rng):
    y, scores = rng.integers(2, size=60), rng.integers(8, size=60)
    gap = scores[y == 1][:, None] - scores[y == 0]
    assert auroc(y, scores) == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean(), abs=1e-12)


def test_binary_and_macro_auroc_equal_scikit_learn(rng):
    for n_classes in (2, 3, 4):
        y = np.arange(80) % n_classes
        logits = np.round(rng.normal(size=(80, n_classes)), 1)
        scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        if n_classes == 2:
            assert auroc(y, scores[:, 1]) == pytest.approx(roc_auc_score(y, scores[:, 1]))
        else:
            expected = roc_auc_score(y, scores, multi_class="ovr")
            assert auroc(y, scores) == pytest.approx(expected, abs=1e-12)


def test_two_columns_that_sum_to_one_agree_with_the_score_of_class_one(rng):
    y, p = np.arange(30) % 2, rng.random(30)
    assert auroc(y, np.stack([1 - p, p], 1)) == pytest.approx(auroc(y, p))


def test_increasing_functions_of_the_scores_change_nothing_and_negation_mirrors(rng):
    y, scores = np.arange(40) % 2, rng.normal(size=40)
    assert auroc(y, np.exp(3 * scores)) == auroc(y, scores)
    assert auroc(y, -scores) == pytest.approx(1 - auroc(y, scores))


def test_a_batch_of_episodes_gives_each_episode_its_own_auroc(rng):
    y = rng.permuted(np.tile(np.arange(20) % 4, (7, 1)), axis=1)
    scores = rng.normal(size=(7, 20, 4))
    assert auroc(y, scores) == pytest.approx([auroc(a, b) for a, b in zip(y, scores, strict=True)])
    binary = auroc(y == 0, scores[..., 0])
    each = [auroc(a == 0, b) for a, b in zip(y, scores[..., 0], strict=True)]
    assert binary == pytest.approx(each)


def test_tensors_lists_and_bools_are_taken_alike(rng):
    y, scores = np.arange(12) % 3, rng.normal(size=(12, 3))
    tensor = torch.tensor(scores, requires_grad=True)
    assert auroc(torch.tensor(y), tensor) == auroc(y.tolist(), scores.tolist()) == auroc(y, scores)


def test_a_class_without_examples_is_left_out_of_the_macro_mean():
    y = [0, 0, 2, 2]
    scores = np.array([[0.9, 0.5, 0.1], [0.1, 0.2, 0.2], [0.2, 0.1, 0.8], [0.3, 0.9, 0.6]])
    columns = [auroc(np.equal(y, c), scores[:, c]) for c in (0, 2)]
    assert auroc(y, scores) == pytest.approx(np.mean(columns))


@pytest.mark.parametrize(
    ("y", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], "single class"),
        ([0, 2], [0.1, 0.2], "labels from 0 to 2 found: scores of 2 classes need labels 0 to 1"),
        ([-1, 0, 1], np.eye(3), "labels from -1 to 1 found: scores of 3 classes"),
        ([[0, 1], [1, 1]], [[0.1, 0.2], [0.3, 0.4]], "single class"),
    ],
)
def test_scores_that_have_no_auroc_are_refused(y, scores, message):
    with pytest.raises(UserError, match=message):
        auroc(y, scores)


@pytest.mark.parametrize("m", [5, 8, 10])
def test_without_information_the_spread_over_episodes_has_its_closed_form(rng, m):
    y = np.tile(np.repeat([0, 1], m), (20_000, 1))
    values = auroc(y, rng.normal(size=y.shape))
    assert values.mean() == pytest.approx(0.5, abs=0.005)
    assert values.std() == pytest.approx(np.sqrt((2 * m + 1) / (12 * m**2)), rel=0.02)


def test_the_interval_of_a_mean_covers_it_at_the_stated_rate(rng):
    draws = rng.normal(0.6, 0.2, size=(2000, 6))
    rate = np.mean([covers(mean_interval(d), 0.6) for d in draws])
    assert rate == pytest.approx(0.95, abs=3.5 * np.sqrt(0.95 * 0.05 / 2000))


def test_the_bootstrap_by_patient_covers_where_the_one_by_image_does_not(rng):
    """Five images of one patient share the patient's deviation."""
    patients = np.repeat(np.arange(40), 5)
    by_patient, by_image = [], []
    for seed in range(80):
        x = rng.normal(size=40)[patients] + 0.5 * rng.normal(size=200)
        options = {"n_resamples": 150, "seed": seed}
        by_patient.append(covers(bootstrap(np.mean, x, groups=patients, **options), 0))
        by_image.append(covers(bootstrap(np.mean, x, **options), 0))
    assert 0.85 < np.mean(by_patient) <= 1
    assert np.mean(by_image) < 0.75


def test_the_bootstrap_of_an_auroc_covers_the_true_auroc(rng):
    """Scores N(0, 1) and N(1, 1): the true AUROC is Phi(1 / sqrt 2) = 0.7602."""
    y = np.arange(80) % 2
    inside = [
        covers(bootstrap(auroc, y, y + rng.normal(size=80), n_resamples=150, seed=s), 0.7602)
        for s in range(80)
    ]
    assert 0.85 < np.mean(inside) <= 1


def test_the_bootstrap_agrees_with_the_standard_error_of_a_mean_and_repeats(rng):
    x = rng.normal(size=400)
    found = bootstrap(np.mean, x, seed=3)
    assert found == bootstrap(np.mean, x, seed=3)
    assert found.high - found.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.06)


def test_the_bootstrap_leaves_out_resamples_of_one_class_and_says_when_too_many():
    y, scores, patients = [0, 1, 1, 1], [0.1, 0.4, 0.3, 0.05], ["a", "b", "c", "d"]
    found = bootstrap(auroc, y, scores, groups=patients)
    assert found.value == pytest.approx(2 / 3)
    assert 0 <= found.low < found.value < found.high <= 1
    assert found.n == 4
    with pytest.raises(UserError, match="more groups are needed"):
        bootstrap(lambda *_: auroc([1], [1]), y, scores, n_resamples=20)


def test_paired_differences_are_narrower_for_methods_that_find_the_same_episodes_hard(rng):
    hard = rng.normal(0.6, 0.15, size=100)
    a, b = (hard + gain + rng.normal(0, 0.05, size=100) for gain in (0.05, 0.0))
    paired, alone = paired_difference(a, b), mean_interval(a)
    unpaired_width = np.sqrt(2) * (alone.high - alone.low)
    assert paired.value == pytest.approx(np.mean(a) - np.mean(b))
    assert paired.high - paired.low < 0.6 * unpaired_width


@pytest.mark.parametrize("groups", [["a", "a"], ["a", "b", "c"], ["a"]])
def test_an_interval_needs_two_groups_and_one_for_each_row(groups):
    with pytest.raises(UserError, match="needs equal lengths and at least two groups"):
        bootstrap(np.mean, [1, 2], groups=groups)
    with pytest.raises(UserError, match=r"lengths \[2, 3, 2\] with 2 group"):
        bootstrap(auroc, [0, 1], [1, 2, 3], groups=["a", "b"])


def test_right_or_wrong_in_any_type_makes_the_same_difference():
    a, b = [1, 0, 1, 0, 1], [1, 1, 1, 0, 1]
    expected = paired_difference(a, b)
    assert expected.value == pytest.approx(-0.2)
    for kind in (np.uint8, bool, np.float32, torch.bfloat16, torch.bool):
        torches = isinstance(kind, torch.dtype)
        pair = [torch.tensor(v, dtype=kind) if torches else np.array(v, kind) for v in (a, b)]
        assert paired_difference(*pair) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0, 3), st.booleans())
def test_the_interval_of_a_share_ends_at_0_and_1_and_loses_nothing_between(value, half, known):
    low, high = (value - half, value + half) if known else (np.nan, np.nan)
    whole = Interval(value, low, high, 5, 3)
    share = whole.of_share()
    assert (share.value, share.n, share.trainings) == (value, 5, 3)
    if not known:
        assert np.isnan([share.low, share.high]).all()
        return
    assert 0 <= share.low <= value <= share.high <= 1
    for point in (0.0, value, 1.0):
        assert covers(share, point) == covers(whole, point)
