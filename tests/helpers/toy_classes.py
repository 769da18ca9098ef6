"""Classes of two-pixel images whose densities are known exactly."""

import torch

from hallulib.diffusion.mixture import ClassMixture, GaussianMixture
from hallulib.diffusion.sde import VPSDE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def law(*means, variance=0.04, weights=None):
    means = torch.tensor(means, dtype=torch.float64).view(len(means), 1, 1, -1)
    covariance = variance * torch.eye(means.shape[-1], dtype=torch.float64)
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return GaussianMixture(means, covariance.repeat(len(means), 1, 1), weights)


LAWS = {
    "a": law([0.5, 0.0], [-0.5, 0.0], weights=[0.3, 0.7]),
    "b": law([0.0, 0.5], [0.0, -0.5], variance=0.02),
    "c": law([0.0, 0.0], variance=0.09),
}


def classes(sde=None, order="abc"):
    return ClassMixture(sde or VPSDE(), {name: LAWS[name] for name in order})


def images(n=12, seed=0):
    """As many of each class, one after the other."""
    drawn = [part.sample(n // 3, generator(seed + i)) for i, part in enumerate(LAWS.values())]
    return torch.cat([x for x, _ in drawn])
