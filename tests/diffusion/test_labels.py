"""What few labels change of a model: classes that are moved, and what a copy keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_classes import generator

from hallulib.diffusion import unet
from hallulib.diffusion.mixture import ClassMixture, GaussianMixture
from hallulib.diffusion.sample import draw
from hallulib.diffusion.score import ScoreModel, denoising_loss
from hallulib.diffusion.sde import SDES, VPSDE, per_image
from hallulib.diffusion.unet import moved_to_means, relabelled
from hallulib.likelihood.bound import Noises, decide
from hallulib.likelihood.density import log_density

all_sdes = pytest.mark.parametrize("sde", [sde() for sde in SDES.values()], ids=list(SDES))
COVARIANCE = torch.tensor([[0.09, 0.05], [0.05, 0.04]], dtype=torch.float64)


class Gaussian(nn.Module):
    """The exact velocity of points of one Gaussian law, whatever the class."""

    shape = (1, 1, 2)

    def __init__(self, sde):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells samplers the device
        everything = GaussianMixture(torch.zeros(1, 1, 1, 2).double(), COVARIANCE[None])
        self.sde, self.exact = sde, ClassMixture(sde, {"all": everything})

    def forward(self, x, timesteps, y):
        t = timesteps / 999
        cos, sin, scale = (per_image(a, x) for a in self.sde.angle(t))
        eps = self.exact(x / scale, t, torch.zeros_like(y))
        return ((eps - sin * x) / cos).to(x)


def points(n, seed=0):
    drawn = torch.randn(n, 1, 1, 2, generator=generator(seed), dtype=torch.float64)
    return 0.3 * drawn.clamp(-2, 2)


def moved(sde, k=3):
    """A model of k classes that differ in their means, with the points that it learnt from."""
    x, y = points(4 * k, 1), torch.arange(k).repeat(4)
    plain = ScoreModel(sde, Gaussian(sde), [str(c) for c in range(k)])
    return plain, moved_to_means(plain, x, y), x, y


@all_sdes
@given(st.integers(0, 10**6), st.floats(1e-4, 1))
@settings(max_examples=20, deadline=None)
def test_a_moved_class_is_the_same_density_elsewhere(sde, seed, t):
    plain, model, _, _ = moved(sde)
    x, times = points(6, seed), torch.full((6,), t, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    there = x - per_image(sde.alpha_sigma(times)[0], x) * model.shifts[y]
    torch.testing.assert_close(model(x, times, y), plain(there, times))
    torch.testing.assert_close(model(x, times), plain(x, times))


@all_sdes
def test_its_log_density_is_that_of_the_image_moved_back(sde):
    """Up to the prior, which is centred at 0 and not at what is left of the shift at time 1."""
    plain, model, _, _ = moved(sde)
    x = points(5)
    found = log_density(model, x, probes="full").value
    for c in range(3):
        back = log_density(plain, x - model.shifts[c], ["0"], probes="full").value
        torch.testing.assert_close(found[:, c : c + 1], back, rtol=0, atol=0.02)


def test_moved_gaussians_are_fishers_linear_discriminant():
    """With equal priors and a covariance that is known, by the closed form."""
    sde = VPSDE()
    _, model, x, y = moved(sde)
    asked = points(20, 2)
    found = log_density(model, asked, probes="full").value
    inverse = COVARIANCE.inverse()
    means = torch.stack([x[y == c].flatten(1).mean(0) for c in range(3)])
    means = means - means.mean(0)
    linear = asked.flatten(1) @ inverse @ means.T - 0.5 * ((means @ inverse) * means).sum(1)
    gap, expected = found - found[:, :1], linear - linear[:, :1]
    torch.testing.assert_close(gap, expected, rtol=2e-3, atol=5e-3)
    decided = decide(model, asked, Noises(40, power=0), confidence=1).log_ratio.argmax(1)
    clear = expected.sort(1).values.diff()[:, -1] > 1
    assert torch.equal(decided[clear], expected.argmax(1)[clear])


def test_shifts_are_centred_and_do_not_depend_on_how_many_images_a_class_has():
    plain, model, x, y = moved(VPSDE())
    torch.testing.assert_close(model.shifts.sum(0), torch.zeros(1, 1, 2, dtype=torch.float64))
    assert (model.shifts[-1] == 0).all()
    twice = torch.cat([x, x[y == 1]]), torch.cat([y, y[y == 1]])
    torch.testing.assert_close(moved_to_means(plain, *twice).shifts, model.shifts)


@all_sdes
def test_training_knows_of_the_shift(sde):
    """The loss of moved images under their class is that of the images under none."""
    plain, model, _, _ = moved(sde)
    x, eps, y = points(6, 3), points(6, 4), torch.arange(6) % 3
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    here = denoising_loss(plain, x, t, eps)
    torch.testing.assert_close(denoising_loss(model, x + model.shifts[y], t, eps, y), here)


def test_samples_move_with_their_class():
    plain, model, _, _ = moved(VPSDE())
    y = torch.tensor([0, 1, 2])
    told = dict(steps=20, clip=False)
    went = draw(model, y, **told) - draw(plain, y, **told)
    torch.testing.assert_close(went, model.shifts[:3], rtol=0, atol=0.02)


def test_a_saved_model_keeps_its_shifts(tmp_path):
    start = unet.build(size=8, width=8, labels=["a", "b"])
    x = torch.rand(4, 1, 8, 8) - 0.5
    model = moved_to_means(start, x, torch.tensor([0, 1, 0, 1])).eval()
    unet.save(model, tmp_path / "model")
    loaded = unet.load(tmp_path / "model")
    assert torch.equal(loaded.shifts, model.shifts)
    t, y = torch.full((4,), 0.3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(loaded(x, t, y), model(x, t, y))


def test_other_labels_keep_the_shift_of_those_that_were_known():
    start = unet.build(size=8, width=8, labels=["a", "b"])
    model = moved_to_means(start, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    found = relabelled(model, ["c", "b"])
    assert torch.equal(found.shifts[1], model.shifts[1])
    assert (found.shifts[[0, 2]] == 0).all()
    assert relabelled(model, ["c"]).shifts is None
    assert relabelled(model, ["a"], forget=True).shifts is None
