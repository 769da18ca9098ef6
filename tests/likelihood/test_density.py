"""The flow's log-densities against data whose density, flow and trace are known exactly."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchdiffeq import odeint

from hallulib import UserError
from hallulib.diffusion import unet
from hallulib.diffusion.mixture import ClassMixture, GaussianMixture
from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.sde import SDES, VPSDE
from hallulib.likelihood.density import (
    GREY_STEP,
    SPREAD,
    bits_per_dim,
    dequantise,
    log_density,
    walk,
)

all_sdes = pytest.mark.parametrize("sde", [sde() for sde in SDES.values()], ids=list(SDES))
VARIANCES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotated(variances, seed):
    """A covariance whose axes are none of the pixels': Rademacher probes must not be exact."""
    d = len(variances)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64))
    return axes @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ axes.T


def gaussian(variances=VARIANCES, seed=0):
    mean = torch.zeros(1, 1, 1, len(variances), dtype=torch.float64)
    return GaussianMixture(mean, rotated(variances, seed)[None])


def two_bumps():
    """A mixture around 0: the flow ends at a prior around 0, and pays for means that are not."""
    mean = 0.15 * torch.randn(1, 1, 1, 6, generator=generator(1), dtype=torch.float64)
    covariances = torch.stack([rotated(VARIANCES, 1), rotated(VARIANCES[::-1], 2)])
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return GaussianMixture(torch.cat([0.7 * mean, -0.3 * mean]), covariances, weights)


def classes(sde=None):
    return ClassMixture(sde or VPSDE(), {"a": gaussian(), "b": two_bumps()})


def images(n=8, seed=3):
    """The first half is of class a, the second of class b."""
    return torch.cat([law.sample(n // 2, generator(seed))[0] for law in (gaussian(), two_bumps())])


class Linear:
    """Gaussian images of one covariance in a single product: quick enough for many repeats."""

    labels, index = ("a",), ScoreModel.index

    def __init__(self, sde, covariance):
        self.sde, self.covariance = sde, covariance

    def __call__(self, x_t, t, y):
        alpha, sigma = self.sde.alpha_sigma(t[0])
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance))
        return sigma * torch.linalg.solve(noisy, x_t.flatten(1).T).T.view_as(x_t)


class Counting:
    """A model that keeps the number of rows of each call."""

    index = ScoreModel.index

    def __init__(self, model):
        self.model, self.sde, self.labels, self.rows = model, model.sde, model.labels, []

    def __call__(self, x_t, t, y):
        assert len(x_t) == len(t) == len(y)
        self.rows.append(len(x_t))
        return self.model(x_t, t, y)


def stretch(sde, variances):
    """Log of how far the flow stretches each axis of Gaussian data, from x to x_1 and to u_1."""
    ends = torch.tensor([sde.t_train, 1.0], dtype=torch.float64)
    (s_0, s_1), alpha_1 = sde.noise_level(ends).tolist(), float(sde.alpha_sigma(ends)[0][1])
    v = np.array(variances)
    to_y = 0.5 * np.log((v + s_1**2) / (v + s_0**2))
    to_u = to_y - 0.5 * math.log((SPREAD**2 + s_1**2) / (SPREAD**2 + s_0**2))
    return to_y + math.log(alpha_1), to_u


@all_sdes
def test_images_have_the_density_and_the_posterior_of_their_mixture(sde):
    """The density is that of images blurred with the noise at which the flow starts."""
    model, x = classes(sde), images()
    exact = model.log_prob(x, sde.t_train)
    found = log_density(model, x, probes="full")
    assert found.evaluations == 33
    own = (torch.arange(8), torch.tensor([0] * 4 + [1] * 4))
    assert ((found.value - exact)[own].abs() / 6).max() < 1e-3
    torch.testing.assert_close(found.value.softmax(1), exact.softmax(1), atol=1e-2, rtol=0)


@all_sdes
def test_the_error_falls_with_the_third_power_of_the_steps(sde):
    """Against the flow of Gaussian data in closed form, which scales each axis."""
    law, variances = gaussian([0.02, 0.4]), torch.tensor([0.02, 0.4], dtype=torch.float64)
    x, _ = law.sample(4, generator())
    grow, _ = stretch(sde, variances.numpy())
    values, axes = torch.linalg.eigh(rotated([0.02, 0.4], 0))
    torch.testing.assert_close(values, variances)
    along = x.flatten(1) @ axes * torch.from_numpy(np.exp(grow))
    exact = sde.prior_log_prob(along.view_as(x)) + grow.sum()
    model = ClassMixture(sde, {"a": law})
    errors = torch.stack(
        [
            (log_density(model, x, steps=n, probes="full").value[:, 0] - exact).abs().max()
            for n in (48, 96)
        ]
    )
    assert errors[0] > 5.5 * errors[1], errors  # twice the steps: an eighth, in the end


@pytest.mark.parametrize(
    ("mean", "spread", "x", "published", "near"),
    [(0.0, 0.5, 0.3, -0.405803, 2e-5), (0.5, 0.2, 1.2, -5.445642, 4e-4)],
)
def test_one_pixel_has_the_flow_density_known_in_closed_form(mean, spread, x, published, near):
    """Exact for our conventions: the density is that of x plus the start's noise, and the prior
    has the noise scale of time 1, 0.99998. Both set us apart from the published numbers, which
    start at 0 and end at 1, and by more where the image is far out.
    """
    sde = VPSDE()
    law = GaussianMixture(torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1), spread**2))
    pixel = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    found = log_density(ClassMixture(sde, {"a": law}), pixel, steps=192, probes="full").value
    (grow,), _ = stretch(sde, [spread**2])
    alpha_1 = float(sde.alpha_sigma(torch.ones((), dtype=torch.float64))[0])
    end = alpha_1 * mean + math.exp(grow) * (x - mean)
    exact = sde.prior_log_prob(torch.full((1, 1, 1, 1), end, dtype=torch.float64)) + grow
    assert float(found) == pytest.approx(float(exact), abs=2e-5)
    assert float(found) == pytest.approx(published, abs=near)


def test_the_probes_have_the_variance_of_their_trace():
    """For Gaussian images the matrix whose trace is integrated is S = A diag(log stretch) A^T.

    One probe of signs varies by 2 (|S|^2 - sum S_ii^2), where normal numbers would by 2 |S|^2.
    """
    sde, covariance = VPSDE(), rotated(VARIANCES, 0)
    values, axes = torch.linalg.eigh(covariance)
    _, log_stretch = stretch(sde, values.numpy())
    s = axes @ torch.diag(torch.from_numpy(log_stretch)) @ axes.T
    norm, diagonal = s.square().sum(), s.diag().square().sum()
    x, model = images(2)[:1], Linear(sde, covariance)
    full = log_density(model, x, probes="full", steps=6).value
    found = log_density(model, x, probes=600, steps=6, seed=5)
    assert float(found.samples.var(2)) == pytest.approx(float(2 * (norm - diagonal)), rel=0.25)
    assert (found.value - full).abs() < 4 * found.error
    assert diagonal > 0.2 * norm  # signs are worth it


def test_the_standard_error_covers_the_full_trace_at_its_rate():
    """Student's limits of eight probes; 200 repeats know a rate of 0.9 within 3.3 x 0.021."""
    model, x = Linear(VPSDE(), rotated(VARIANCES * 2, 0)), torch.full((1, 1, 3, 4), 0.2).double()
    truth = log_density(model, x, steps=2, probes="full").value
    limit, inside = stats.t.ppf(0.95, 7), 0
    for seed in range(200):
        found = log_density(model, x, steps=2, probes=8, seed=seed)
        inside += bool((found.value - truth).abs() < limit * found.error)
    assert inside / 200 == pytest.approx(0.9, abs=0.07)


def test_one_probe_has_no_error_and_is_one_of_many():
    model, x = classes(), images(2)
    one = log_density(model, x, steps=3, seed=4)
    many = log_density(model, x, steps=3, seed=4, probes=3)
    assert one.error.isnan().all()
    torch.testing.assert_close(one.samples[..., 0], many.samples[..., 0])
    torch.testing.assert_close(many.value, many.samples.mean(2))


@pytest.fixture(scope="module")
def network():
    """A network as it starts, whose class vectors are random; in double precision, as its classes
    differ by little more than what single precision rounds away.
    """
    return unet.build(size=8, labels=("a", "b", "c"), width=16).eval().double()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand((3, 1, 8, 8), generator=generator(), dtype=torch.float64) * 1.6 - 0.8


def test_the_label_changes_the_likelihood(network, pictures):
    """The one published implementation of this idea passes the label on, but never uses it."""
    found = log_density(network, pictures, steps=4).value
    assert (found.diff(dim=1).abs() > 1e-5).all()  # rounding leaves 1e-11
    exact = log_density(classes(), images(), steps=4).value
    assert (exact.diff(dim=1).abs() > 0.1).all()


def test_classes_are_scored_in_any_order_or_number(network, pictures):
    every = log_density(network, pictures, steps=3).value
    some = log_density(network, pictures, ["c", "a"], steps=3).value
    torch.testing.assert_close(some, every[:, [2, 0]], rtol=0, atol=1e-8)
    model, x = classes(), images()
    swapped = ClassMixture(model.sde, {"b": two_bumps(), "a": gaussian(), "c": gaussian(seed=7)})
    found = log_density(swapped, x, steps=5).value
    torch.testing.assert_close(found[:, [1, 0]], log_density(model, x, steps=5).value)


def test_neither_the_batch_nor_other_images_change_a_value(network, pictures):
    whole = log_density(network, pictures, steps=3).value
    parts = log_density(network, pictures, steps=3, batch=2).value
    alone = log_density(network, pictures[1:2], steps=3).value
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-8)
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-8)


def by_torchdiffeq(method):
    """A solver in place of `adams`; adaptive methods choose steps of their own."""

    def solve(field, u, nodes):
        def slope(psi, state):
            f, divergence = field(state[0].to(u), float(psi))
            return f.to(state[0]), divergence.to(state[1])

        start, grid = (u, u.new_zeros(len(field.z), len(u))), torch.tensor(nodes)
        with torch.no_grad():
            path = odeint(slope, start, grid, method=method, rtol=1e-5, atol=1e-5)
        yield nodes[-1], path[0][-1], path[1][-1].double()

    return solve


@pytest.mark.parametrize(("method", "steps"), [("rk4", 32), ("dopri5", 1)])
def test_the_solvers_of_torchdiffeq_agree(method, steps):
    model, x = classes(), images(4)
    ours = log_density(model, x, steps=64)
    theirs = log_density(model, x, steps=steps, solver=by_torchdiffeq(method))
    torch.testing.assert_close(theirs.value, ours.value, atol=6e-3, rtol=0)
    assert theirs.evaluations > 64


def test_the_work_is_bounded_by_the_batch_and_grows_with_images_and_classes():
    model = Counting(classes())
    found = log_density(model, images(6), steps=3, batch=5)
    assert found.evaluations == 4
    assert max(model.rows) <= 5
    assert sum(model.rows) == 4 * 6 * 2
    assert len(model.rows) == 4 * 3
    few = Counting(classes())
    log_density(few, images(6)[:3], ["b"], steps=3, batch=5)
    assert sum(few.rows) == sum(model.rows) / 4
    adaptive = Counting(classes())
    found = log_density(adaptive, images(4), solver=by_torchdiffeq("dopri5"), batch=8)
    assert found.evaluations == len(adaptive.rows)


def test_no_image_is_no_row():
    assert log_density(classes(), images()[:0], steps=2).value.shape == (0, 2)


def test_the_flow_starts_at_the_image_and_ends_where_the_density_was_read():
    model, x, y = classes(), images(4), torch.tensor([0, 1, 1, 0])
    states = list(walk(model, x, y, steps=6, seed=2))
    assert len(states) == 7
    torch.testing.assert_close(states[0].x_t, x, rtol=1e-6, atol=0)
    assert (states[0].divergence == 0).all()
    times = [state.t for state in states]
    assert times == sorted(times)
    assert (times[0], times[-1]) == pytest.approx((model.sde.t_train, 1))
    # the density of the end, and all that the way has stretched
    ends = torch.tensor([model.sde.t_train, 1.0], dtype=torch.float64)
    s, alpha = model.sde.noise_level(ends), model.sde.alpha_sigma(ends)[0][1]
    scale = (alpha * ((s[1] ** 2 + SPREAD**2) / (s[0] ** 2 + SPREAD**2)).sqrt()).log()
    by_hand = model.sde.prior_log_prob(states[-1].x_t) + 6 * scale + states[-1].divergence[0]
    found = log_density(model, x, steps=6, seed=2).value
    torch.testing.assert_close(by_hand, found.gather(1, y[:, None])[:, 0])


def test_a_uniform_density_over_all_grey_levels_costs_eight_bits():
    for d in (1, 64):
        log_uniform = -d * torch.log(torch.tensor(256 * GREY_STEP, dtype=torch.float64))
        assert float(bits_per_dim(log_uniform, d)) == pytest.approx(8, abs=1e-12)
    halved = bits_per_dim(log_uniform + 64 * math.log(2), 64)
    assert float(halved) == pytest.approx(7)  # twice the density everywhere saves a bit


def test_dequantised_images_fill_their_grey_levels_and_round_back():
    levels = torch.arange(256).float().view(1, 1, 16, 16) / 127.5 - 1
    x = dequantise(levels.repeat(3, 1, 1, 1), seed=1)
    assert torch.equal(((x + 1) * 127.5).round(), ((levels + 1) * 127.5).round().expand_as(x))
    assert torch.equal(x[0], x[1])  # the same noise for all
    noise = (x[0] - levels[0]) / GREY_STEP
    assert stats.kstest(noise.flatten().numpy(), "uniform", (-0.5, 1)).pvalue > 1e-3
    assert not torch.equal(x, dequantise(levels, seed=2).expand_as(x))


def test_an_unknown_label_is_refused_with_those_that_are_known(network, pictures):
    with pytest.raises(UserError, match="does not know the label 'd'; it knows a, b, c"):
        log_density(network, pictures, ["a", "d"])
    with pytest.raises(UserError, match="does not know the label 'd'; it knows a, b"):
        log_density(classes(), images(), ["d"])
