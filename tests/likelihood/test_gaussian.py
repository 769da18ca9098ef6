"""The discriminant in closed form agrees with the density, and with the network's moved one."""

import numpy as np
import pytest
import torch
from notebook_names import defined
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from conftest import ROOT

MovedGaussian = defined(ROOT / "book" / "grids" / "contest.ipynb")["MovedGaussian"]


def images(n, seed=0, shape=(1, 4, 4)):
    """Correlated images of two classes that differ in their means, and the classes."""
    rng = torch.Generator().manual_seed(seed)
    pixels = int(np.prod(shape))
    mix = torch.randn(pixels, pixels, generator=torch.Generator().manual_seed(9)).double()
    y = torch.arange(n) % 2
    x = torch.randn(n, pixels, generator=rng).double() @ mix
    return (x + y[:, None]).view(n, *shape), y


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_it_is_the_density_of_noisy_images(s):
    (x, y), (new, _) = images(60), images(5, seed=1)
    told = MovedGaussian(x).log_ratio(x, y, new, s)
    flat = x.flatten(1)
    covariance = torch.cov(flat.T) + s**2 * torch.eye(16).double()
    exact = torch.stack(
        [
            torch.distributions.MultivariateNormal(flat[y == c].mean(0), covariance).log_prob(
                new.flatten(1)
            )
            for c in (0, 1)
        ],
        1,
    )
    torch.testing.assert_close(told[:, 1] - told[:, 0], exact[:, 1] - exact[:, 0])


def test_fewer_images_than_pixels_leave_the_rest_to_the_noise():
    (x, y), (new, _) = images(6), images(5, seed=1)
    told = MovedGaussian(x).log_ratio(x, y, new, 0.5)
    full = torch.cov(x.flatten(1).T) + 0.25 * torch.eye(16).double()
    offset = torch.stack([new.flatten(1) - x[y == c].flatten(1).mean(0) for c in (0, 1)], 1)
    exact = -0.5 * torch.einsum("nkp,pq,nkq->nk", offset, full.inverse(), offset)
    torch.testing.assert_close(told, exact)


def test_with_every_label_and_hardly_noise_it_is_the_textbooks_discriminant():
    """Within classes and over all the covariance differs; the direction of the rule does not."""
    (x, y), (new, _) = images(400), images(100, seed=1)
    told = MovedGaussian(x).log_ratio(x, y, new, 1e-4)
    textbook = LinearDiscriminantAnalysis(solver="lsqr").fit(x.flatten(1).numpy(), y.numpy())
    ours, theirs = (told[:, 1] - told[:, 0]).numpy(), textbook.decision_function(new.flatten(1))
    assert np.corrcoef(ours, theirs)[0, 1] == pytest.approx(1, abs=1e-7)


def test_a_level_is_taken_at_which_held_out_labels_are_likely():
    x, y = images(60)
    model = MovedGaussian(x)
    assert model.noise_level(x[:2], y[:2]) == model.ALONE
    chosen = model.noise_level(x, y)
    assert chosen in model.LEVELS
    new, truth = images(400, seed=1)
    loss = {
        s: float(nn.NLLLoss()(model.log_ratio(x, y, new, s).log_softmax(1), truth))
        for s in model.LEVELS
    }
    assert loss[chosen] <= 1.2 * min(loss.values())
