"""Where classes are compared, and what held-out images say about it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_classes import LAWS, classes, generator, images, law

from hallulib.diffusion.mixture import ClassMixture
from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.sde import VPSDE
from hallulib.likelihood.bound import (
    Errors,
    Levels,
    Noises,
    best_band,
    decide,
    informative_levels,
    leads,
)


def test_levels_are_looked_for_where_classes_differ():
    """Paired differences of classes vary less, for the same number of evaluations."""
    model, x = classes(), images(24)
    informed, even = informative_levels(model, x, seed=1), Levels.even(model.sde)
    assert sum(informed.shares) == pytest.approx(1)
    assert min(informed.shares) >= 0.09 / len(informed.shares)
    assert (informed.first, informed.last) == (even.first, even.last)

    def spread(levels):
        gaps = []
        for seed in range(25):
            ratio = decide(
                model, x, Noises(16, levels, seed=seed), first=2, confidence=1
            ).log_ratio
            gaps.append(ratio - ratio.mean(1, keepdim=True))
        return torch.stack(gaps).var(0).mean()

    assert spread(informed) < 0.7 * spread(even)


def test_levels_are_even_where_classes_do_not_differ():
    model = ClassMixture(VPSDE(), {"a": LAWS["a"], "twin": LAWS["a"]})
    assert informative_levels(model, images()).shares == pytest.approx((1 / 12,) * 12)


def spread_of_differences(model, x, antithetic):
    """Standard deviation over noises of what sets classes apart, at one level."""
    gaps = []
    for seed in range(20):
        level = Levels(-1.0, -1.0 + 1e-9)
        cost = Errors(model, x, Noises(1, level, 0, antithetic, seed), 128)(0)
        gaps.append(1e9 * (cost[:, 0] - cost[:, 1]))  # as of a band of width 1
    return torch.stack(gaps).std(0).mean()


def test_with_both_signs_of_the_noise_moved_gaussians_differ_without_chance():
    """What is linear in the noise cancels: of two Gaussians of one shape, all of it."""
    model = ClassMixture(VPSDE(), {"a": law([0.3, 0.1]), "b": law([-0.2, 0.2])})
    assert spread_of_differences(model, images(), True) < 1e-6
    assert spread_of_differences(model, images(), False) > 0.01


def test_the_true_class_leads_and_a_wrong_one_does_not():
    model, x, y = classes(), images(60), torch.arange(3).repeat_interleave(20)
    true, wrong = leads(model, x, y), leads(model, x, y.roll(20))
    assert true.shape == (60, 12)
    assert true.sum(1).mean() > 5 * true.sum(1).std() / 60**0.5
    assert wrong.sum(1).mean() < 0


def test_a_lead_does_not_depend_on_how_well_a_class_is_denoised_on_the_whole():
    """A class whose noise is always off by the same amount is behind everywhere, and no less."""

    class Biased:
        sde, labels, index = VPSDE(), ("a", "b", "c"), ScoreModel.index

        def __call__(self, x_t, t, y):
            eps = classes()(x_t, t, y)
            # orthogonal to the error on average, not for each image: leads agree on the mean
            return eps + 3.0 * (y == 1).view(-1, 1, 1, 1)

    x, y = images(60), torch.arange(3).repeat_interleave(20)
    fair, biased = leads(classes(), x, y).mean(0), leads(Biased(), x, y).mean(0)
    assert (fair - biased).abs().mean() < 0.5 * 9.0


def position(band):
    """Which of three bands of the whole range one is."""
    even = Levels.even(VPSDE())
    width = (even.last - even.first) / 3
    assert band.last - band.first == pytest.approx(width)
    return round((band.first - even.first) / width, 6)


@given(st.integers(0, 10**6), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_the_best_band_does_not_depend_on_the_unit_of_the_leads(seed, unit):
    lead = torch.randn((20, 6), generator=generator(seed), dtype=torch.float64) + 0.3
    assert best_band(VPSDE(), lead) == best_band(VPSDE(), unit * lead)


def test_the_best_band_is_the_surest_neither_the_largest_nor_the_steadiest():
    """Means 1, 9 and 9; the second spreads by 4, the others by 0.2."""
    lead = torch.tensor([[1.0, 9.0, 9.0], [1.2, 13.0, 9.2], [0.8, 5.0, 8.8]], dtype=torch.float64)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert position(best_band(VPSDE(), lead[:, order])) == order.index(2)


def test_a_lead_of_a_wrong_class_counts_less_than_none_however_sure():
    lead = torch.tensor([[-9.0, 0.0, 0.2], [-9.1, 0.1, -0.1]], dtype=torch.float64)
    assert position(best_band(VPSDE(), lead)) == 1
