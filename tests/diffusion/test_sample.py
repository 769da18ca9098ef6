"""Every sampler against data whose score is known exactly."""

import pytest
import torch

from hallulib.diffusion import unet
from hallulib.diffusion.mixture import GaussianMixture
from hallulib.diffusion.sample import SAMPLERS, draw, noise_levels
from hallulib.diffusion.sde import SDES, VESDE, VPSDE, SubVPSDE

ALL = [VPSDE(), SubVPSDE(), VESDE()]
all_sdes = pytest.mark.parametrize("sde", ALL, ids=list(SDES))
all_samplers = pytest.mark.parametrize("name", SAMPLERS)

MEANS = torch.tensor([[[[0.5, -0.3]]], [[[-0.6, 0.2]]]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.09, 0.03], [0.03, 0.05]], [[0.04, -0.02], [-0.02, 0.16]]], dtype=torch.float64
)
MIXTURE = GaussianMixture(MEANS, COVARIANCES, torch.tensor([0.3, 0.7], dtype=torch.float64))
GAUSSIAN = GaussianMixture(MEANS[:1], COVARIANCES[:1])


def run(sde, name, law, n, steps, seed=0, last=None, **kw):
    rng = torch.Generator().manual_seed(seed)
    x = sde.prior((n, 1, 1, 2), rng).double()
    levels = noise_levels(sde, steps, **kw)[:last]
    eps = lambda x, t: law.eps(sde, x, t)
    return list(SAMPLERS[name](sde, eps, x, levels, rng))


@all_sdes
@all_samplers
def test_sampler_reproduces_mean_and_covariance_of_a_mixture(sde, name):
    n = 8_000
    x = run(sde, name, MIXTURE, n, steps=150, rho=7.0)[-1].x.flatten(1)
    truth, _ = MIXTURE.sample(400_000, torch.Generator().manual_seed(5))
    truth = truth.flatten(1)
    mean, covariance = truth.mean(0), torch.cov(truth.T)
    standard_error = (covariance.diag() / n).sqrt()
    assert ((x.mean(0) - mean).abs() < 4.5 * standard_error).all()
    centred = truth - mean
    spread = (centred[:, :, None] * centred[:, None]).std(0) / n**0.5
    # the stochastic rules are of first order: 150 steps leave a bias of some percent
    bias = 0.04 * covariance.diag().max()
    assert ((torch.cov(x.T) - covariance).abs() < 4.5 * spread + bias).all()


@all_sdes
@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("dpm_solver", 2)])
def test_error_of_the_flow_falls_at_the_order_of_the_solver(sde, name, order):
    """The flow of Gaussian data is known: each principal axis scales by its standard deviation."""
    law, n = GAUSSIAN, 64
    ends = torch.tensor([1.0, sde.t_min], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    start = sde.prior((n, 1, 1, 2), rng).double()
    (alpha_1, alpha_0), (sigma_1, sigma_0) = sde.alpha_sigma(ends)
    axes, variances, mean = law.axes[0], law.variances[0], law.means[0]
    along = (start.flatten(1) - alpha_1 * mean) @ axes
    scale = torch.sqrt(
        (alpha_0**2 * variances + sigma_0**2) / (alpha_1**2 * variances + sigma_1**2)
    )
    exact = alpha_0 * mean + (along * scale) @ axes.T

    def error(steps):
        return (run(sde, name, law, n, steps + 1, last=-1)[-1].x.flatten(1) - exact).abs().max()

    errors = torch.stack([error(steps) for steps in (64, 128, 256)])
    slopes = (errors[:-1] / errors[1:]).log2()
    assert (slopes > order - 0.3).all(), (errors, slopes)


@pytest.mark.parametrize("name", ["ancestral", "euler_maruyama"])
def test_error_of_the_stochastic_samplers_halves_as_steps_double(name):
    """Weak order 1, seen in the variance of Gaussian data, whose law is carried exactly.

    A step is affine in the state, x -> a x + c z: its factors are read off from one draw z, so
    the variance follows without any sampling error.
    """
    law = GaussianMixture(torch.zeros(1, 1, 1, 1).double(), torch.full((1, 1, 1), 0.25).double())
    sde = VPSDE()

    def final_variance(steps):
        levels = noise_levels(sde, steps + 1, None)[:-1]
        variance = torch.tensor(float(sde.alpha_sigma(torch.ones(1).double())[1] ** 2)).double()
        eps = lambda x, t: law.eps(sde, x, t)
        for pair in zip(levels[:-1], levels[1:], strict=True):
            step = lambda x, seed, pair=pair: (
                next(
                    SAMPLERS[name](
                        sde, eps, x, torch.stack(pair), torch.Generator().manual_seed(seed)
                    )
                ).x
            )
            zero, one = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
            noisy = step(zero, 3)
            z = torch.randn(
                (1, 1, 1, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64
            )
            a, c = step(one, 3) - noisy, noisy / z
            variance = (a**2 * variance + c**2).squeeze()
        return variance

    t_end = torch.tensor([sde.t_min], dtype=torch.float64)
    alpha, sigma = sde.alpha_sigma(t_end)
    exact = alpha**2 * 0.25 + sigma**2
    errors = torch.stack([(final_variance(n) - exact).abs().squeeze() for n in (250, 500, 1000)])
    slopes = (errors[:-1] / errors[1:]).log2()
    assert (slopes > 0.8).all(), (errors, slopes)


@all_samplers
def test_one_denoising_step_gives_the_posterior_mean(name):
    """With a single level before 0 every sampler answers E[x_0 | x_1]."""
    sde = VPSDE()
    state = run(sde, name, MIXTURE, 5, steps=1)[-1]
    torch.testing.assert_close(state.x, state.x_0)
    assert state.t == 0


@all_samplers
def test_a_trajectory_has_falling_times_and_costs_the_calls_that_it_should(name):
    calls = 0

    def eps(x, t):
        nonlocal calls
        calls += 1
        return MIXTURE.eps(VPSDE(), x, t)

    rng = torch.Generator().manual_seed(0)
    x = VPSDE().prior((3, 1, 1, 2), rng).double()
    states = list(SAMPLERS[name](VPSDE(), eps, x, noise_levels(VPSDE(), 7), rng))
    assert len(states) == 7
    assert calls == {"heun": 13, "predictor_corrector": 14}.get(name, 7)
    times = [state.t for state in states]
    assert times == sorted(times, reverse=True)


def test_dpm_solver_agrees_with_diffusers():
    """An independent implementation: same noise, same levels, EDM form of the scheduler."""
    from diffusers import EDMDPMSolverMultistepScheduler

    law, steps = MIXTURE, 12
    sde = VESDE(sigma_min=0.002, sigma_max=80.0)
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        rho=7.0,
        final_sigmas_type="zero",
        lower_order_final=False,
        euler_at_final=True,
    )
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.double()
    start = 80.0 * torch.randn(4, 1, 1, 2, dtype=torch.float64)
    ours = list(SAMPLERS["dpm_solver"](sde, lambda x, t: law.eps(sde, x, t), start, levels))[-1].x
    x = start
    for i, t in enumerate(scheduler.timesteps):
        s = levels[i]
        x_0 = x - s * law.eps(sde, x, sde.time_of(s).expand(4))
        scheduler._init_step_index(t) if i == 0 else None
        c_skip = 0.25 / (s**2 + 0.25)
        c_out = s * 0.5 / (s**2 + 0.25) ** 0.5
        x = scheduler.step((x_0 - c_skip * x) / c_out, t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_guidance_of_a_known_mixture_pulls_towards_its_class():
    """Guided by its exact posterior, the mixture is sampled as its second component alone."""
    from hallulib.diffusion.score import classifier_guided

    sde = VPSDE()
    eps = classifier_guided(
        sde,
        lambda x, t: MIXTURE.eps(sde, x, t),
        lambda x, t: MIXTURE.posterior(sde, x, t)[:, 1].log(),
    )
    rng = torch.Generator().manual_seed(0)
    x = sde.prior((4_000, 1, 1, 2), rng).double()
    *_, last = SAMPLERS["dpm_solver"](sde, eps, x, noise_levels(sde, 40))
    x = last.x.flatten(1)
    torch.testing.assert_close(x.mean(0), MEANS[1].flatten(), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), COVARIANCES[1], atol=0.01, rtol=0)


@pytest.fixture(scope="module")
def model():
    return unet.build(size=16, labels=("a", "b"), width=8).eval()


def test_draw_is_deterministic_and_in_range(model):
    y = torch.tensor([0, 1, model.null])
    first, again = (draw(model, y, steps=3, guidance_scale=2.0, seed=4) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 1, 16, 16)
    assert first.abs().max() <= 1
    assert not torch.equal(first, draw(model, y, steps=3, guidance_scale=2.0, seed=5))


@all_sdes
def test_a_walk_may_start_at_any_time(sde):
    for start in (1.0, 0.4, 0.05):
        for rho in (7.0, None):
            levels = noise_levels(sde, 6, rho, start_time=start)
            begin = sde.noise_level(torch.tensor([start], dtype=torch.float64))
            torch.testing.assert_close(levels[:1], begin)
            assert (levels.diff() < 0).all()
            assert levels[-1] == 0
    torch.testing.assert_close(noise_levels(sde, 6), noise_levels(sde, 6, start_time=1))


@all_samplers
def test_images_start_the_walk_where_little_of_them_is_lost(model, name):
    images = torch.rand((3, 1, 16, 16), generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    y = torch.tensor([0, 1, model.null])

    def distance(start):
        drawn = draw(model, y, sampler=name, steps=3, images=images, start_time=start)
        return (drawn - images).square().mean().sqrt().item()

    assert distance(0.01) < 0.1  # the noise of the start is 0.04
    assert distance(0.01) < distance(0.06) < min(distance(0.2), distance(0.9))


def test_images_are_noised_each_by_itself_whatever_the_batch(model):
    """The flow uses the noise of its start alone, so batches of two draw as one of four."""
    images = torch.linspace(-0.5, 0.5, 4).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    y = torch.tensor([0, 1, 0, 1])
    options = dict(steps=2, images=images, start_time=0.1, seed=3)
    whole = draw(model, y, **options)
    torch.testing.assert_close(draw(model, y, batch_size=2, **options), whole)


def test_without_images_a_walk_starts_from_pure_noise_and_none_wanted_are_none(model):
    y = torch.tensor([0, 1])
    assert torch.equal(draw(model, y, steps=2, start_time=0.5), draw(model, y, steps=2))
    assert draw(model, y[:0], steps=2).shape == (0, 1, 16, 16)


@pytest.mark.parametrize("scale", [0, 1, 2.5])
def test_an_embedding_that_is_a_class_vector_draws_as_the_class(model, scale):
    y = torch.tensor([1, 0])
    vectors = model.network.classes.weight.detach()[y]
    options = dict(steps=2, guidance_scale=scale, seed=1)
    torch.testing.assert_close(draw(model, vectors, **options), draw(model, y, **options))
