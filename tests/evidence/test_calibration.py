"""Probabilities that say how often they are right, against plain loops and known truths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib import UserError
from hallulib.diffusion.mixture import ClassMixture, GaussianMixture
from hallulib.diffusion.sde import VPSDE
from hallulib.evidence.calibration import (
    calibration_error,
    fit_temperature,
    posterior,
    risk_coverage,
    threshold,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture_data(n=4000):
    """Log-densities of images under the three classes they were drawn from, and their classes."""
    means = torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.0, 0.6]], dtype=torch.float64)
    covariance = 0.09 * torch.eye(2, dtype=torch.float64)[None]
    laws = [GaussianMixture(mean.view(1, 1, 1, 2), covariance) for mean in means]
    y = torch.randint(3, (n,), generator=generator())
    x = means[y] + 0.3 * torch.randn(n, 2, generator=generator(1), dtype=torch.float64)
    model = ClassMixture(VPSDE(), dict(zip("abc", laws, strict=True)))
    return model, x.view(n, 1, 1, 2), y


def random_answers(seed, n=60, k=3, digits=1):
    """Probabilities with many ties, and labels."""
    rng = generator(seed)
    p = (torch.rand(n, k, generator=rng, dtype=torch.float64) * 10**digits).round() + 1
    return p / p.sum(1, keepdim=True), torch.randint(k, (n,), generator=rng)


seeds = st.integers(0, 10_000)


def test_bayes_rule_is_exact_for_a_mixture():
    model, x, _ = mixture_data(50)
    torch.testing.assert_close(posterior(model.log_prob(x)), model.posterior(x))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shift=st.floats(-1e4, 1e4), temperature=st.floats(0.05, 1e4))
def test_rows_sum_to_one_and_keep_their_order_whatever_is_added(seed, shift, temperature):
    log_density = 100 * torch.randn(5, 4, generator=generator(seed), dtype=torch.float64)
    p = posterior(log_density, temperature=temperature)
    torch.testing.assert_close(p.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(posterior(log_density + shift, temperature=temperature), p)
    swapped = posterior(log_density[:, [2, 0, 3, 1]], temperature=temperature)
    torch.testing.assert_close(swapped, p[:, [2, 0, 3, 1]])
    assert torch.equal(p.argmax(1), log_density.argmax(1))


def test_temperature_moves_from_the_winner_to_no_preference():
    log_density = torch.tensor([[1.0, 0.0]]).double()
    cold, hot = (posterior(log_density, temperature=t) for t in (1e-3, 1e9))
    torch.testing.assert_close(cold, torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(hot, torch.tensor([[0.5, 0.5]]).double())


def test_densities_that_are_true_need_no_temperature():
    """The error of a fitted 1 / T is one over the root of its Fisher information."""
    model, x, y = mixture_data()
    log_density = model.log_prob(x)
    p = posterior(log_density)
    mean = (p * log_density).sum(1, keepdim=True)
    information = (p * (log_density - mean) ** 2).sum()
    found = fit_temperature(log_density, y)
    assert 1 / found == pytest.approx(1, abs=3.5 / math.sqrt(float(information)))
    assert float(information) > 1000  # so the line above says something
    assert calibration_error(p, y).error < 0.03


@pytest.mark.parametrize("c", [1e-3, 0.5, 30.0, 1e5])
def test_densities_that_are_too_sure_by_a_factor_get_it_back(c):
    model, x, y = mixture_data(500)
    log_density = model.log_prob(x)
    plain = fit_temperature(log_density, y)
    assert fit_temperature(c * log_density, y) == pytest.approx(c * plain, rel=1e-6)
    shifted = log_density + torch.randn(500, 1, generator=generator()).double()
    assert fit_temperature(shifted, y) == pytest.approx(plain, rel=1e-6)
    order = torch.tensor([2, 0, 1])
    swapped = fit_temperature(log_density[:, order], order.argsort()[y])
    assert swapped == pytest.approx(plain, rel=1e-6)


def test_the_fitted_temperature_is_the_best_of_a_fine_search():
    model, x, y = mixture_data(300)
    log_density = 7 * model.log_prob(x)
    cost = lambda t: -posterior(log_density, temperature=t).gather(1, y[:, None]).log().mean()
    found = fit_temperature(log_density, y)
    grid = torch.linspace(math.log(0.1), math.log(100), 2000).exp()
    costs = torch.stack([cost(float(t)) for t in grid])
    assert float(cost(found)) <= float(costs.min()) + 1e-12
    assert found == pytest.approx(float(grid[costs.argmin()]), rel=0.01)


def test_the_range_bounds_what_has_no_best_temperature():
    """Gaps of 2 nats are 1 nat from the mean of their row."""
    log_density = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert fit_temperature(log_density, torch.tensor([0, 1])) == pytest.approx(0.01)
    assert fit_temperature(log_density, torch.tensor([1, 0])) == pytest.approx(1e4)
    assert fit_temperature(torch.zeros(2, 2), torch.tensor([1, 0])) == 1


@settings(max_examples=25, deadline=None)
@given(seed=seeds, bins=st.integers(1, 20))
def test_calibration_error_equals_a_plain_loop(seed, bins):
    p, y = random_answers(seed, digits=8)  # no ties, which are counted in part
    found, expected = calibration_error(p, y, bins), 0.0
    for m in range(bins):
        rows = [
            i for i in range(len(y)) if m / bins < max(p[i].tolist()) <= (m + 1) / bins + 1e-15
        ]
        assert int(found.count[m]) == len(rows)
        if rows:
            accuracy = sum(p[i, y[i]] == max(p[i]) for i in rows) / len(rows)
            confidence = sum(max(p[i].tolist()) for i in rows) / len(rows)
            assert float(found.accuracy[m]) == pytest.approx(float(accuracy))
            assert float(found.confidence[m]) == pytest.approx(confidence)
            expected += len(rows) / len(y) * abs(float(accuracy) - confidence)
        else:
            assert found.accuracy[m].isnan()
            assert found.confidence[m].isnan()
    assert found.error == pytest.approx(expected)


def test_calibration_error_of_constructions():
    p = torch.tensor([[0.75, 0.25]] * 4 + [[0.4, 0.6]] * 5)
    right = torch.tensor([0, 0, 0, 1] + [1, 1, 1, 0, 0])
    assert calibration_error(p, right).error == pytest.approx(0, abs=1e-7)
    assert calibration_error(p, torch.tensor([1] * 4 + [0] * 5)).error == pytest.approx(
        (4 * 0.75 + 5 * 0.6) / 9
    )
    sure = torch.tensor([[1.0, 0.0]] * 3)
    assert calibration_error(sure, torch.zeros(3, dtype=torch.int64)).error == 0
    assert calibration_error(sure, torch.ones(3, dtype=torch.int64)).error == 1
    assert int(calibration_error(sure, torch.zeros(3, dtype=torch.int64)).count[-1]) == 3


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_order_of_classes_and_rows_changes_no_measure(seed):
    """Also where two classes share the top probability."""
    p, y = random_answers(seed)
    rows, order = torch.randperm(60, generator=generator(seed)), torch.tensor([1, 2, 0])
    q, z = p[rows][:, order], order.argsort()[y[rows]]
    assert calibration_error(q, z).error == pytest.approx(calibration_error(p, y).error)
    for a, b in zip(risk_coverage(p, y), risk_coverage(q, z), strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_risk_and_coverage_equal_a_plain_loop(seed):
    p, y = random_answers(seed)
    top, found = p.max(1).values.tolist(), risk_coverage(p, y)
    wrong = [1 - (p[i, y[i]] == max(p[i])) / (p[i] == max(p[i])).sum() for i in range(60)]
    area = 0.0
    for level, (limit, coverage, risk) in enumerate(
        zip(found.threshold.tolist(), found.coverage.tolist(), found.risk.tolist(), strict=True)
    ):
        taken = [i for i in range(60) if top[i] >= limit]
        assert coverage == pytest.approx(len(taken) / 60)
        assert risk == pytest.approx(float(sum(wrong[i] for i in taken)) / len(taken))
        area += risk * (coverage - (float(found.coverage[level - 1]) if level else 0))
    assert sorted(set(top), reverse=True) == found.threshold.tolist()
    assert found.area == pytest.approx(area)
    assert (found.coverage[-1], found.risk[-1]) == pytest.approx((1, float(sum(wrong)) / 60))


def test_the_area_without_ties_is_the_mean_risk_over_all_coverages():
    p = torch.tensor([0.95, 0.9, 0.8, 0.7])
    y = torch.tensor([0, 1, 0, 1])
    found = risk_coverage(torch.stack([p, 1 - p], 1), y)
    torch.testing.assert_close(found.risk, torch.tensor([0, 1 / 2, 1 / 3, 1 / 2]).double())
    assert found.area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    same = risk_coverage(torch.full((8, 2), 0.5), torch.arange(8) % 2)
    assert (same.coverage.tolist(), same.risk.tolist(), same.area) == ([1], [0.5], 0.5)


def test_any_softening_of_two_classes_leaves_risk_and_coverage_alone():
    log_density = torch.randn(80, 2, generator=generator())
    y = torch.arange(80) % 2
    curves = [risk_coverage(posterior(log_density, temperature=t), y) for t in (1, 3)]
    torch.testing.assert_close(curves[0].risk, curves[1].risk)
    assert curves[0].area == pytest.approx(curves[1].area)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, risk=st.floats(0.3, 1))
def test_the_threshold_keeps_the_risk_and_answers_as_often_as_it_can(seed, risk):
    p, y = random_answers(seed, digits=8)
    top = p.max(1).values
    right = (p.argmax(1) == y).double()
    least = float(risk_coverage(p, y).risk.min())
    if least > risk:
        with pytest.raises(UserError, match="no threshold keeps the risk at .*: the least is"):
            threshold(p, y, risk)
        return
    limit = threshold(p, y, risk)
    assert 1 - right[top >= limit].mean() <= risk + 1e-9
    for lower in top[top < limit].tolist():
        assert 1 - right[top >= lower].mean() > risk


HALVES, TWO = torch.full((2, 2), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: posterior(HALVES * math.nan), "a log-density is not finite"),
        (lambda: fit_temperature(HALVES * math.inf, TWO), "a log-density is not finite"),
        (lambda: threshold(HALVES, TWO, 0.1), "no threshold keeps the risk at 0.1: the least"),
    ],
)
def test_what_has_no_probability_is_told_in_a_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()
