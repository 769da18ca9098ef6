"""Where classes are compared, and what held-out images say about it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_classes import LAWS, classes, generator, images, law

from hallulib import UserError
from hallulib.bound import decide
from hallulib.levels import Errors, Levels, informative_levels, leads, weighed_levels
from hallulib.mixture import ClassMixture
from hallulib.sde import VPSDE


def test_levels_are_looked_for_where_classes_differ():
    """Paired differences of classes vary less, for the same number of evaluations."""
    model, x = classes(), images(24)
    informed, even = informative_levels(model, x, seed=1), Levels.even(model.sde)
    assert sum(informed.shares) == pytest.approx(1)
    assert min(informed.shares) >= 0.09 / len(informed.shares)
    assert (informed.first, informed.last) == (even.first, even.last)

    def spread(levels):
        options = {"pairs": 16, "first": 2, "confidence": 1.0, "levels": levels}
        gaps = []
        for seed in range(25):
            ratio = decide(model, x, seed=seed, **options).log_ratio
            gaps.append(ratio - ratio.mean(1, keepdim=True))
        return torch.stack(gaps).var(0).mean()

    assert spread(informed) < 0.7 * spread(even)


def test_levels_are_even_where_classes_do_not_differ():
    model = ClassMixture(VPSDE(), {"a": LAWS["a"], "twin": LAWS["a"]})
    assert informative_levels(model, images(), bands=4).shares == pytest.approx((0.25,) * 4)


def spread_of_differences(model, x, antithetic):
    """Standard deviation over noises of what sets classes apart, at one level."""
    level, everything = (
        Levels(-1.0, -1.0 + 1e-9, (1.0,), (1e9,)),
        torch.ones(len(x), 2, dtype=torch.bool),
    )
    found = []
    for seed in range(20):
        told = dict(pairs=1, seed=seed, batch=128, antithetic=antithetic)
        cost = Errors(model, x, torch.arange(2), level, **told)(0, everything)
        found.append(cost[:, 0] - cost[:, 1])
    return torch.stack(found).std(0).mean()


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
        sde, labels = VPSDE(), ("a", "b", "c")

        def __call__(self, x_t, t, y):
            eps = classes()(x_t, t, y)
            # orthogonal to the error on average, not for each image: leads agree on the mean
            return eps + 3.0 * (y == 1).view(-1, 1, 1, 1)

    x, y = images(60), torch.arange(3).repeat_interleave(20)
    fair, biased = leads(classes(), x, y).mean(0), leads(Biased(), x, y).mean(0)
    assert (fair - biased).abs().mean() < 0.5 * 9.0


@given(st.integers(0, 10**6), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_weights_do_not_depend_on_the_unit_of_the_leads(seed, unit):
    lead = torch.randn((20, 6), generator=generator(seed), dtype=torch.float64) + 0.3
    one, other = weighed_levels(VPSDE(), lead), weighed_levels(VPSDE(), unit * lead)
    assert one.shares == pytest.approx(other.shares)
    assert one.weights == pytest.approx(other.weights)
    assert sum(one.shares) == pytest.approx(1)
    assert max(one.weights) == pytest.approx(1)
    sure = lead.mean(0) - 2 * lead.std(0) / 20**0.5
    behind = (sure <= 0).tolist()
    assert all((w == 0) == b for w, b in zip(one.weights, behind, strict=True)) or all(behind)


def test_of_two_bands_the_one_with_less_spread_counts_more():
    """And counts as far as it is sure: mean 9 and spread 0.2 or 4, of three images."""
    lead = torch.tensor([[9.0, 9.0], [9.2, 13.0], [8.8, 5.0]], dtype=torch.float64)
    found = weighed_levels(VPSDE(), lead)
    sure = [9 - 2 * spread / 3**0.5 for spread in (0.2, 4.0)]
    expected = (4.0 / 0.2) ** 2 * sure[0] / sure[1]
    assert found.weights[0] / found.weights[1] == pytest.approx(expected)


def test_a_lead_that_may_be_chance_counts_only_where_none_is_sure():
    lead = torch.tensor([[1.0, 1.0], [1.0, 5.0], [1.1, -4.0]], dtype=torch.float64)
    assert weighed_levels(VPSDE(), lead).weights[1] == 0
    assert weighed_levels(VPSDE(), lead[:, 1:]).weights == (1.0,)
    both = torch.stack([lead[:, 1], -lead[:, 1]], 1)
    assert weighed_levels(VPSDE(), both).weights == (1.0, 0.0)


def test_the_peak_is_the_band_that_is_drawn_from_most():
    found = Levels(0.0, 4.0, (0.1, 0.2, 0.6, 0.1)).peak()
    assert (found.first, found.last) == (2.0, 3.0)
    s, _ = found.draw(50, generator())
    assert 2.0 <= s.log().min() <= s.log().max() <= 3.0


def test_where_nothing_leads_all_bands_vote_alike():
    lead = -torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
    found = weighed_levels(VPSDE(), lead)
    assert found.shares == pytest.approx((0.5, 0.5))
    assert found.weights[0] / found.weights[1] == pytest.approx(2)


ONE = ClassMixture(VPSDE(), {"a": LAWS["a"]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: informative_levels(m, x[:0]), "3 classes, 0 images, 12 bands found; at"),
        (lambda m, x: informative_levels(ONE, x), "1 classes, 12 images, 12 bands found; at"),
        (lambda m, x: informative_levels(m, x, bands=0), "3 classes, 12 images, 0 bands found"),
        (lambda m, x: leads(ONE, x, torch.zeros(12).long()), "1 classes, 12 images, 12 bands"),
        (lambda m, x: weighed_levels(m.sde, torch.ones(1, 3)), "1 held-out images found; at"),
    ],
)
def test_levels_that_cannot_be_found_are_told_in_a_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call(classes(), images())
