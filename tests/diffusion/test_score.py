"""Noise, score and denoised image are one; guidance and the loss do what their equations say."""

import pytest
import torch
from torch import nn

from hallulib import UserError
from hallulib.diffusion import unet
from hallulib.diffusion.mixture import GaussianMixture
from hallulib.diffusion.score import (
    ScoreModel,
    classifier_guided,
    clipped,
    denoised_of_eps,
    denoising_loss,
    eps_of_denoised,
    guided,
    score_of_eps,
    stratified_times,
)
from hallulib.diffusion.sde import SDES, VESDE, VPSDE, SubVPSDE

all_sdes = pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=list(SDES))


class ClassIsValue(nn.Module):
    """A network that answers the class index everywhere, and counts its calls."""

    calls = 0

    def forward(self, x, timesteps, y):
        self.calls += 1
        return y.view(-1, 1, 1, 1).expand_as(x).to(x)


def model(labels=("low", "high"), sde=None):
    return ScoreModel(sde or VPSDE(), ClassIsValue(), labels)


@all_sdes
def test_conversions_undo_each_other(sde):
    x, eps, t = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3), torch.rand(4) * 0.8 + 0.1
    sigma = sde.alpha_sigma(t)[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(-sigma * score_of_eps(sde, eps, t), eps)
    x_0 = denoised_of_eps(sde, x, eps, t)
    torch.testing.assert_close(eps_of_denoised(sde, x, x_0, t), eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sde.diffuse(x_0, t, eps), x, rtol=1e-3, atol=1e-3)


@all_sdes
def test_score_is_the_gradient_of_the_log_density(sde):
    law = GaussianMixture(torch.randn(3, 1, 1, 2), torch.eye(2).repeat(3, 1, 1) * 0.1)
    x, t = torch.randn(5, 1, 1, 2, requires_grad=True), torch.full((5,), 0.3)
    (gradient,) = torch.autograd.grad(law.log_prob(sde, x, t).sum(), x)
    torch.testing.assert_close(
        score_of_eps(sde, law.eps(sde, x, t), t).detach(), gradient, rtol=1e-3, atol=1e-4
    )


@all_sdes
def test_noise_and_denoised_image_follow_from_the_velocity(sde):
    """The rotation of the docstring, and its inverse, on a network whose answer is known."""
    m, t, y = model(sde=sde), torch.rand(4) * 0.9 + 0.05, torch.tensor([0, 1, 2, 1])
    x = torch.randn(4, 1, 2, 2)
    cos, sin, scale = (a.view(-1, 1, 1, 1) for a in sde.angle(t))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(4, 1, 1, 1))
    v = y.view(-1, 1, 1, 1).expand_as(x).float()
    eps = m(x, t, y)
    torch.testing.assert_close(eps, sin * scale * x + cos * v)
    x_0 = denoised_of_eps(sde, x, eps, t)
    torch.testing.assert_close(x_0, cos * scale * x - sin * v, rtol=1e-3, atol=1e-3)


def test_guidance_is_unconditional_at_0_conditional_at_1_and_linear_between():
    x, t, y = torch.zeros(2, 1, 2, 2), torch.zeros(2), torch.tensor([0, 1])
    # at t = 0 the noise is the network's answer: the class index, 2 for null
    at = lambda w: guided(model(), y, w)(x, t)[:, 0, 0, 0].tolist()
    assert at(0.0) == [2, 2]
    assert at(1.0) == [0, 1]
    assert at(0.5) == [1, 1.5]
    assert at(3.0) == [-4, -1]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_one_network_call(scale):
    m = model()
    guided(m, torch.tensor([1]), scale)(torch.zeros(1, 1, 2, 2), torch.tensor([0.5]))
    assert m.network.calls == 1


def test_classifier_guidance_at_1_is_bayes_rule():
    """eps of the mixture plus the gradient of its posterior is eps of the component."""
    sde, means = VPSDE(), torch.randn(2, 1, 1, 2)
    law = GaussianMixture(means, torch.eye(2).repeat(2, 1, 1) * 0.2)
    component = GaussianMixture(means[1:], torch.eye(2)[None] * 0.2)
    x, t = torch.randn(6, 1, 1, 2), torch.full((6,), 0.4)
    log_prob = lambda x, t: law.posterior(sde, x, t)[:, 1].log()
    eps = lambda x, t: law.eps(sde, x, t)
    torch.testing.assert_close(
        classifier_guided(sde, eps, log_prob)(x, t), component.eps(sde, x, t), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(classifier_guided(sde, eps, log_prob, 0.0)(x, t), eps(x, t))


@all_sdes
def test_clipping_changes_only_what_leaves_the_range(sde):
    """Noise of an image inside stays as it is; an image outside is brought to the edge."""
    t, x = torch.full((2,), 0.6), torch.randn(2, 1, 2, 2)
    images = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 3.0)])
    eps = lambda x, t: eps_of_denoised(sde, x, images, t)
    back = denoised_of_eps(sde, x, clipped(sde, eps)(x, t), t)
    torch.testing.assert_close(back, images.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_the_exact_noise_minimises_the_loss():
    """No prediction beats the conditional mean of the noise, which the mixture knows."""
    sde = VPSDE()
    law = GaussianMixture(torch.randn(2, 1, 1, 2), torch.eye(2).repeat(2, 1, 1) * 0.05)
    x_0, _ = law.sample(4000, torch.Generator().manual_seed(0))
    t, noise = torch.full((4000,), 0.3), torch.randn(4000, 1, 1, 2)

    class Exact(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, x, timesteps, y):
            cos, sin, scale = (a.view(-1, 1, 1, 1) for a in sde.angle(timesteps / 999))
            return (law.eps(sde, x / scale, timesteps / 999) - sin * x) / cos + self.shift

    def loss_of(shift):
        return denoising_loss(ScoreModel(sde, Exact(shift)), x_0, t, noise).mean()

    best = loss_of(0.0)
    for shift in (0.05, -0.05):
        # E|e + c|^2 = E|e|^2 + c^2, because the error of the conditional mean is centred
        assert loss_of(shift).item() == pytest.approx(best.item() + shift**2, abs=3e-3)


@all_sdes
def test_the_loss_is_the_weighted_error_of_the_noise(sde):
    m, t, y = model(sde=sde), torch.rand(5) * 0.8 + 0.1, torch.tensor([0, 1, 2, 0, 1])
    x_0, eps = torch.randn(5, 1, 3, 3), torch.randn(5, 1, 3, 3)
    error = (m(sde.diffuse(x_0, t, eps), t, y) - eps).square().flatten(1).mean(1)
    weight = 1 + sde.noise_level(t) ** 2
    torch.testing.assert_close(
        denoising_loss(m, x_0, t, eps, y), weight * error, rtol=1e-3, atol=0
    )


def test_stratified_times_fill_every_stratum_and_are_uniform_alone():
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_times(16, 0.0, rng) for _ in range(2000)])
    strata = (draws.sort(1).values * 16).floor()
    assert (strata.diff(dim=1) >= 1).all() or (strata.diff(dim=1) >= 0).float().mean() > 0.99
    first = draws[:, 0].sort().values
    assert (first - torch.linspace(0, 1, 2000)).abs().max() < 0.05  # Kolmogorov-Smirnov
    assert stratified_times(8, 0.1, rng).min() >= 0.1


@pytest.mark.parametrize("scale", [0, 1, 0.5, 3])
def test_guidance_by_an_embedding_is_guidance_by_its_class(scale):
    """The null class is the zero vector: class vectors as embeddings give the same noise."""
    network = unet.build(size=8, labels=("low", "high"), width=16)
    y, x, t = torch.tensor([1, 0, 1]), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    vectors = network.network.classes.weight.detach()[y]
    with torch.no_grad():
        told = guided(network, vectors, scale)(x, t)
        torch.testing.assert_close(told, guided(network, y, scale)(x, t))


def test_the_loss_takes_embeddings_in_the_place_of_classes():
    network = unet.build(size=8, labels=("low", "high"), width=16)
    y, x, t = torch.tensor([1, 2, 0]), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    eps, vectors = torch.randn(3, 1, 8, 8), network.network.classes.weight.detach()[y]
    with torch.no_grad():
        loss = denoising_loss(network, x, t, eps, vectors)
        torch.testing.assert_close(loss, denoising_loss(network, x, t, eps, y))
    assert loss.shape == (3,)


def test_unknown_label_lists_the_known_ones():
    assert model().index(["high", "low"]).tolist() == [1, 0]
    with pytest.raises(UserError, match="does not know the label 'medium'; it knows low, high"):
        model().index(["medium"])
    with pytest.raises(UserError, match="trained without labels"):
        model(()).index(["low"])
