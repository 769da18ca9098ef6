"""The bound of the likelihood and the decisions it leads to, on data known exactly."""

import math

import pytest
import torch
from scipy import integrate
from toy_classes import LAWS, classes, generator, images, law

from hallulib.diffusion.mixture import ClassMixture
from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.sde import SDES, VPSDE
from hallulib.likelihood.bound import Errors, Levels, Noises, bound, common_errors, decide
from hallulib.likelihood.density import log_density

all_sdes = pytest.mark.parametrize("sde", [sde() for sde in SDES.values()], ids=list(SDES))


def decided(model, x, first=4, confidence=0.99, offsets=None, batch=128, **told):
    """`decide` with such noises."""
    how = dict(first=first, confidence=confidence, offsets=offsets, batch=batch)
    return decide(model, x, Noises(**told), **how)


class Counting:
    """A model that keeps what it was asked for."""

    index = ScoreModel.index

    def __init__(self, model):
        self.model, self.sde, self.labels, self.calls = model, model.sde, model.labels, []

    def __call__(self, x_t, t, y):
        self.calls.append((x_t, t, y))
        return self.model(x_t, t, y)


@all_sdes
def test_the_bound_stays_below_the_density_and_comes_near_it(sde):
    """A perfect model leaves no gap but that of the first noise, about s_0^2 / variance here."""
    model, x = classes(sde), images()
    exact = model.log_prob(x, sde.t_train)
    found = bound(model, x, pairs=400)
    distance = (found.value - exact) / found.error
    assert (distance < 4).all()
    assert (distance > -4).all()
    assert (distance.abs() < 1).double().mean() > 0.6
    assert found.error.max() < 3


def bound_of_a_gaussian(sde, x, variance):
    """The bound of one pixel from N(0, variance), its integral by quadrature."""
    ends = torch.tensor([sde.t_train, 1.0], dtype=torch.float64)
    s_0, s_1 = sde.noise_level(ends).tolist()

    def integrand(log_s):
        s2 = math.exp(2 * log_s)
        return (variance**2 + s2 * x**2) / (variance + s2) ** 2

    integral, _ = integrate.quad(integrand, math.log(s_0), math.log(s_1), limit=200)
    return -0.5 * math.log(2 * math.pi * math.e * s_0**2) - x**2 / (2 * s_1**2) - integral


@all_sdes
def test_the_bound_of_a_gaussian_is_its_integral(sde):
    """The mean over twelve seeds, whose spread tells its error."""
    x, variance = 0.3, 0.16
    model = ClassMixture(sde, {"a": law([0.0], variance=variance)})
    pixel = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    found = torch.stack([bound(model, pixel, pairs=64, seed=s).value for s in range(12)])
    found, exact = found.flatten(), bound_of_a_gaussian(sde, x, variance)
    assert float(found.mean()) == pytest.approx(exact, abs=4.4 * float(found.std()) / 12**0.5)
    # and what a Gaussian leaves open in closed form: half the share of the first noise
    s_0 = float(sde.noise_level(torch.tensor(sde.t_train, dtype=torch.float64)))
    blurred = variance + s_0**2
    density = -0.5 * (math.log(2 * math.pi * blurred) + x**2 / blurred)
    assert exact == pytest.approx(density - 0.5 * s_0**2 / blurred, abs=1e-3)


def test_the_stated_error_covers_the_mean_over_seeds_at_least_at_its_rate():
    """The levels are even, not independent, so the limits are wide."""
    model, x = classes(), images(3)
    found = [bound(model, x, pairs=48, seed=s) for s in range(30)]
    values = torch.stack([f.value for f in found])
    off = (values - values.mean(0)).abs() / torch.stack([f.error for f in found])
    assert (off < 1.96).double().mean() > 0.9


@all_sdes
def test_the_bound_agrees_with_the_flow(sde):
    model, x = classes(sde), images(3)
    flow = log_density(model, x, probes="full").value
    found = bound(model, x, ["c", "a"], pairs=300, seed=1)
    assert ((found.value - flow[:, [2, 0]]).abs() < 4 * found.error + 0.02).all()


UNEVEN = Levels(-3.0, 2.0, (0.1, 0.6, 0.05, 0.25))


def test_weighted_levels_have_the_mean_of_the_integral_whatever_their_density():
    """Over shifts a mean is unbiased, and a band is drawn as often as its share says."""
    f = lambda log_s: torch.exp(-log_s) + torch.cos(3 * log_s)
    exact, _ = integrate.quad(lambda a: math.exp(-a) + math.cos(3 * a), -3, 2)
    means, bands = [], torch.zeros(4)
    for seed in range(400):
        s, width = UNEVEN.draw(9, generator(seed))
        assert (s.log() > -3 - 1e-9).all()
        assert (s.log() < 2 + 1e-9).all()
        means.append((width * f(s.log())).mean())
        bands += torch.histc(s.log().float(), 4, -3, 2)
    means = torch.stack(means)
    assert float(means.mean()) == pytest.approx(exact, abs=3.5 * float(means.std()) / 20)
    torch.testing.assert_close(bands / 3600, torch.tensor(UNEVEN.shares), atol=0.02, rtol=0)


def test_the_levels_fill_their_range_evenly_from_the_first_few_on():
    levels = Levels.even(VPSDE())
    for n in (5, 8, 21, 48):
        s, width = levels.draw(n, generator(n))
        share = ((s.log() - levels.first) / (levels.last - levels.first)).sort().values
        assert share.diff().max() < 2.7 / n  # of independent ones about log(n) / n
        assert (width == levels.last - levels.first).all()


def test_the_levels_tell_nothing_about_the_noise():
    """Both come from one seed: drawn apart, the same bits would make both."""
    shifts, norms = [], []
    for seed in range(400):
        model = Counting(ClassMixture(VPSDE(), {"a": law([0.0] * 16)}))
        bound(model, torch.zeros(1, 1, 1, 16, dtype=torch.float64), pairs=2, seed=seed)
        x_t, t, _ = model.calls[0]
        shifts.append(t[0])
        norms.append((x_t / model.sde.alpha_sigma(t)[1]).flatten()[[0, 8]].square().sum())
    both = torch.stack([torch.stack(shifts), torch.stack(norms)])
    assert torch.corrcoef(both)[0, 1].abs() < 3.5 / 20


def test_identical_classes_differ_by_nothing_at_all():
    model = ClassMixture(VPSDE(), {"a": LAWS["a"], "b": LAWS["b"], "twin": LAWS["a"]})
    found = bound(model, images(), pairs=6).samples
    assert torch.equal(found[:, 0], found[:, 2])
    found = decided(model, images(), pairs=12, first=4)
    assert torch.equal(found.log_ratio[:4, 0], found.log_ratio[:4, 2])
    assert not found.sure[:4].any()


@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["plain", "antithetic"])
@pytest.mark.parametrize("power", [0, 0.5])
def test_with_full_confidence_nothing_is_dropped_and_a_plain_loop_agrees(power, signs):
    model, x = Counting(classes()), images()
    told = dict(pairs=10, first=3, confidence=1, power=power, seed=4)
    found = decided(model, x, antithetic=len(signs) == 2, **told)
    assert (found.evaluations == 30 * len(signs)).all()
    assert not found.sure.any()
    rng = generator(4)
    levels, sde = Levels.even(model.sde), model.sde
    s, width = levels.draw(10, rng)
    cost = torch.zeros(12, 3, 10, dtype=torch.float64)
    for r in range(10):
        noise = torch.randn(1, 1, 2, generator=rng, dtype=torch.float64)
        t = sde.time_of(s[r]).expand(12)
        for sign in signs:
            x_t = sde.diffuse(x, t, sign * noise.expand_as(x))
            for c in range(3):
                off = model.model(x_t, t, torch.full((12,), c)) - sign * noise
                weight = width[r] * s[r] ** power / len(signs)
                cost[:, c, r] += weight * off.square().flatten(1).sum(1)
    ratio = -cost.mean(2)
    ratio = ratio - ratio.max(1, keepdim=True).values
    torch.testing.assert_close(found.log_ratio, ratio)


def test_differences_of_the_bound_are_those_of_a_decision_without_weights():
    model, x = classes(), images()
    told = dict(pairs=10, first=2, confidence=1, power=0, seed=3)
    found = decided(model, x, antithetic=False, **told).log_ratio
    value = bound(model, x, pairs=10, seed=3).value
    torch.testing.assert_close(found, value - value.max(1, keepdim=True).values)


def apart():
    """Four classes of 16 pixels, far enough apart for every image to be plain."""
    means = 0.4 * torch.randn(4, 16, generator=generator(9), dtype=torch.float64)
    parts = {str(i): law(mean.tolist()) for i, mean in enumerate(means)}
    x = torch.cat([part.sample(10, generator(i))[0] for i, part in enumerate(parts.values())])
    return ClassMixture(VPSDE(), parts), x


def test_dropping_classes_finds_the_winner_of_the_exact_posterior_with_less_work():
    model, x = apart()
    counting = Counting(model)
    found = decided(counting, x, pairs=48, first=8, antithetic=False)
    assert torch.equal(found.log_ratio.argmax(1), model.posterior(x).argmax(1))
    assert found.sure.all()
    assert found.evaluations.double().mean() < 0.5 * 48 * 4
    assert found.evaluations.min() >= 8 * 4
    assert int(found.evaluations.sum()) == sum(len(y) for *_, y in counting.calls)
    assert (found.log_ratio.max(1).values == 0).all()
    assert (found.log_ratio.sort(1).values[:, :-1] < 0).all()


def test_a_class_that_was_dropped_never_wins():
    """Few pairs and little confidence drop classes against a front that is overtaken later."""
    model, x = apart()
    x = torch.rand(x.shape, generator=generator(), dtype=torch.float64) - 0.5
    for seed in range(6):
        model_seen = Counting(model)
        found = decided(model_seen, x, pairs=24, first=2, confidence=0.7, seed=seed)
        assert (found.log_ratio.max(1).values == 0).all()
        alone = decided(model_seen.model, x, pairs=24, first=2, confidence=0.7, seed=seed)
        assert torch.equal(found.log_ratio.argmax(1), alone.log_ratio.argmax(1))
    racing = decided(model, x, pairs=24, first=24, confidence=0.7).log_ratio
    whole = decided(model, x, pairs=24, first=24, confidence=1).log_ratio
    torch.testing.assert_close(racing, whole)  # dropped at the last pair: all have seen all


def test_a_decision_depends_neither_on_companions_nor_on_the_batch():
    model, x = classes(), images()
    whole = decided(model, x, pairs=24, first=4)
    for batch in (128, 2):
        part = decided(model, x[3:7], pairs=24, first=4, batch=batch)
        torch.testing.assert_close(part.log_ratio, whole.log_ratio[3:7])
        assert torch.equal(part.evaluations, whole.evaluations[3:7])
        assert torch.equal(part.sure, whole.sure[3:7])


def test_the_order_of_classes_is_that_of_the_columns_and_nothing_else():
    x = images()
    plain = decided(classes(), x, pairs=24, first=4)
    found = decided(classes(order="cab"), x, pairs=24, first=4)
    torch.testing.assert_close(found.log_ratio, plain.log_ratio[:, [2, 0, 1]])
    assert torch.equal(found.evaluations, plain.evaluations)
    swapped = bound(classes(), x, pairs=4).samples[:, [2, 0, 1]]
    torch.testing.assert_close(bound(classes(order="cab"), x, pairs=4).samples, swapped)
    torch.testing.assert_close(bound(classes(), x, ["c", "a", "b"], pairs=4).samples, swapped)


def test_the_batch_bounds_the_rows_and_every_class_sees_the_same_noise():
    model, x = Counting(classes()), images()
    found = bound(model, x, pairs=4, batch=7)
    assert max(len(y) for *_, y in model.calls) == 7
    assert sum(len(y) for *_, y in model.calls) == 4 * 12 * 3
    torch.testing.assert_close(found.samples, bound(classes(), x, pairs=4).samples)
    model.calls.clear()
    decided(model, x, pairs=4, first=2, confidence=1)
    assert len(model.calls) == 8  # each noise with both signs
    for x_t, t, _ in model.calls:
        assert (t == t[0]).all()
        assert torch.equal(*x_t.view(12, 3, 1, 1, 2)[:, :2].unbind(1))


def test_a_single_pair_decides_by_its_errors_and_is_sure_of_nothing():
    model, x = classes(), images()
    found = decided(model, x, pairs=1, antithetic=False, power=0, seed=3)
    cost = Errors(model, x, Noises(1, None, 0, False, 3), 128)(0)
    torch.testing.assert_close(found.log_ratio, cost.amin(1, keepdim=True) - cost)
    assert (found.evaluations == 3).all()
    assert not found.sure.any()
    assert decided(model, x, pairs=48, first=1, seed=3).sure.any()


def test_what_all_images_have_in_common_is_the_mean_error_of_each_class():
    model, x = classes(), images()
    noises = Noises(5, power=1, antithetic=False, seed=2)
    found, errors = common_errors(model, x, noises), Errors(model, x, noises, 128)
    cost = torch.stack([errors(r) for r in range(5)], 2).mean(0)
    torch.testing.assert_close(found, cost - cost.mean(0))
    torch.testing.assert_close(found.sum(0), torch.zeros(5, dtype=torch.float64))


def test_without_what_is_common_the_noise_of_moved_gaussians_decides_nothing():
    """What it does to a class is the same for all images, so it goes, and no chance is left."""
    model = ClassMixture(VPSDE(), {"a": law([0.3, 0.1]), "b": law([-0.2, 0.2])})
    told = dict(pairs=1, antithetic=False, levels=Levels(-1.0, -1.0 + 1e-9), power=0)
    ratios = []
    for seed in range(6):
        offsets = common_errors(model, images(), Noises(seed=seed, **told))
        found = decided(model, images(), offsets=offsets, seed=seed, **told).log_ratio
        ratios.append(1e9 * (found[:, 0] - found[:, 1]))  # as of a band of width 1
    ratios = torch.stack(ratios)
    assert ratios.std(0).max() < 1e-6
    assert ratios[0].std() > 0.1


def test_a_single_class_wins_without_a_race():
    found = decided(ClassMixture(VPSDE(), {"b": LAWS["b"]}), images())
    assert found.sure.all()
    assert (found.log_ratio == 0).all()


def test_no_image_is_no_row():
    assert bound(classes(), images()[:0], pairs=2).value.shape == (0, 3)
    assert decided(classes(), images()[:0]).log_ratio.shape == (0, 3)
