"""Laws of the three diffusions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hallulib.diffusion.sde import SDES, VESDE, VPSDE, SubVPSDE

ALL = [VPSDE(), SubVPSDE(), VESDE()]
IDS = list(SDES)
TIMES = torch.tensor([1e-5, 1e-3, 0.1, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
all_sdes = pytest.mark.parametrize("sde", ALL, ids=IDS)


def test_vp_scales_square_to_one():
    alpha, sigma = VPSDE().alpha_sigma(torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101, dtype=torch.float64))


def test_sub_vp_sigma_is_the_square_of_vp_sigma():
    torch.testing.assert_close(
        SubVPSDE().alpha_sigma(TIMES)[1], VPSDE().alpha_sigma(TIMES)[1] ** 2
    )


def test_scales_have_their_published_values():
    """float64 constants computed apart from this code."""
    alpha, sigma = VPSDE().alpha_sigma(TIMES)
    known = [1.0004971e-3, 0.0104854163, 0.3220525355, 0.6901596036, 0.9596542021]
    torch.testing.assert_close(sigma[:5], torch.tensor(known).double(), rtol=1e-7, atol=0)
    assert alpha[-1].item() == pytest.approx(0.0065715865, rel=1e-8)
    assert VPSDE().noise_level(TIMES)[-1].item() == pytest.approx(152.16697, rel=1e-7)
    g = SubVPSDE().drift_diffusion(torch.zeros(7, 1, 1, 1), TIMES)[1]
    assert g[0].item() ** 2 == pytest.approx(2.005972e-7, rel=1e-6)
    assert g[2].item() ** 2 == pytest.approx(0.41105761, rel=1e-7)


def test_vp_is_the_ddpm_schedule_of_diffusers():
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod
    alpha, _ = VPSDE().alpha_sigma(torch.linspace(0, 1, 1000))
    # the discrete product is a left Riemann sum of the integral: apart by less than beta dt / 2
    assert (alpha**2 - schedule).abs().max() < 5e-3


@all_sdes
def test_small_noise_is_accurate_in_float32(sde):
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    exact = sde.alpha_sigma(t.double())[1]
    torch.testing.assert_close(sde.alpha_sigma(t)[1].double(), exact, rtol=2e-6, atol=0)


@all_sdes
@given(t=st.floats(1e-6, 1.0))
def test_time_of_inverts_the_noise_level(sde, t):
    t = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(sde.time_of(sde.noise_level(t)), t, rtol=1e-8, atol=1e-12)


@all_sdes
def test_drift_and_diffusion_are_the_derivatives_of_the_scales(sde):
    """Of a linear SDE: d alpha/dt = f alpha and d sigma^2/dt = 2 f sigma^2 + g^2."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma = sde.alpha_sigma(t)
    ones = torch.ones(50, 1, 1, 1, dtype=torch.float64)
    f, g = sde.drift_diffusion(ones, t)
    f = f.flatten()
    (d_variance,) = torch.autograd.grad((sigma**2).sum(), t, retain_graph=True)
    torch.testing.assert_close(d_variance, (2 * f * sigma**2 + g**2))
    if alpha.requires_grad:
        (d_alpha,) = torch.autograd.grad(alpha.sum(), t)
        torch.testing.assert_close(d_alpha, f * alpha)
    else:
        assert (f == 0).all()


@all_sdes
def test_simulating_the_forward_sde_gives_the_closed_form_marginals(sde):
    n, steps, x_start = 40_000, 2_000, 1.5
    rng = torch.Generator().manual_seed(0)
    # from t = 0, where VE already holds noise of sigma_min
    x = x_start + float(sde.alpha_sigma(torch.zeros(1))[1]) * torch.randn(
        (n, 1, 1, 1), generator=rng
    )
    for i in range(steps):
        drift, g = sde.drift_diffusion(x, torch.full((n,), (i + 0.5) / steps))
        noise = torch.randn(x.shape, generator=rng)
        x = x + drift / steps + g.view(-1, 1, 1, 1) * noise / steps**0.5
        if i + 1 in (steps // 4, steps // 2, steps):
            t = torch.full((1,), (i + 1) / steps)
            alpha, std = sde.alpha_sigma(t)
            standard_error = std.item() / n**0.5
            assert abs(x.mean() - alpha * x_start).item() < 4 * standard_error + 1e-3
            assert x.std().item() == pytest.approx(std.item(), rel=4 / (2 * n) ** 0.5 + 2e-3)


@all_sdes
def test_the_flow_has_the_forward_marginals_of_gaussian_data(sde):
    """Fokker-Planck for Gaussian data: the flow's velocity is x times d log(std) / dt."""
    t = torch.full((3,), 0.4, dtype=torch.float64, requires_grad=True)
    alpha, sigma = sde.alpha_sigma(t)
    std = torch.sqrt(alpha**2 * 0.3**2 + sigma**2)
    (rate,) = torch.autograd.grad(std.log().sum(), t)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    score = lambda x, t: -x / (std.detach() ** 2).view(-1, 1, 1, 1)
    flow = sde.probability_flow(score, x, t.detach())
    torch.testing.assert_close(flow, rate.view(-1, 1, 1, 1) * x)


@all_sdes
def test_prior_draws_have_the_prior_density(sde):
    x = sde.prior((2_000, 1, 4, 4), torch.Generator().manual_seed(0))
    sigma = sde.alpha_sigma(torch.ones(1))[1].item()
    entropy = 16 * (0.5 + 0.5 * torch.log(torch.tensor(2 * torch.pi * sigma**2)))
    assert -sde.prior_log_prob(x).mean().item() == pytest.approx(entropy.item(), abs=0.3)
