"""Images that a small autoencoder learns in a few dozen steps."""

import torch


def images(n=12, channels=3, size=16, seed=0):
    """Smooth blobs in noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, channels, 4, 4), generator=rng) * 1.6 - 0.8
    fine = 0.1 * torch.randn((n, channels, size, size), generator=rng)
    return (torch.nn.functional.interpolate(coarse, size=size) + fine).clamp(-1, 1)
