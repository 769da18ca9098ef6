"""The closed forms that other tests lean on, against independent implementations."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from hallulib.diffusion.mixture import GaussianMixture
from hallulib.diffusion.sde import VESDE, VPSDE, SubVPSDE


def law(k=3, pixels=4):
    rng = torch.Generator().manual_seed(1)
    root = torch.randn((k, pixels, pixels), generator=rng).double()
    covariances = root @ root.mT / pixels + 0.05 * torch.eye(pixels)
    means = torch.randn((k, 1, 2, pixels // 2), generator=rng).double()
    return GaussianMixture(means, covariances, torch.tensor([1.0, 2.0, 5.0]).double()), covariances


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()])
def test_density_and_posterior_agree_with_torch_distributions(sde):
    mixture, covariances = law()
    t = torch.full((5,), 0.3, dtype=torch.float64)
    alpha, sigma = (a[0] for a in sde.alpha_sigma(t))
    components = MultivariateNormal(
        alpha * mixture.means, alpha**2 * covariances + sigma**2 * torch.eye(4)
    )
    independent = MixtureSameFamily(Categorical(mixture.weights), components)
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(sde, x, t), independent.log_prob(x.flatten(1)))
    joint = components.log_prob(x.flatten(1)[:, None]) + mixture.weights.log()
    torch.testing.assert_close(mixture.posterior(sde, x, t), joint.softmax(1))


def test_samples_have_the_moments_of_the_mixture():
    mixture, covariances = law()
    x, y = mixture.sample(100_000, torch.Generator().manual_seed(0))
    for k in range(3):
        of_class = x[y == k].flatten(1)
        assert len(of_class) / 1e5 == pytest.approx(float(mixture.weights[k]), abs=0.006)
        torch.testing.assert_close(of_class.mean(0), mixture.means[k], atol=0.05, rtol=0)
        torch.testing.assert_close(torch.cov(of_class.T), covariances[k], atol=0.06, rtol=0)
