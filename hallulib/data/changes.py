"""Changes of images that keep their class: mirrored, translated, of other contrast.

Each takes images in [-1, 1] on any device and draws from a generator on the CPU.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib.shapes import Images


def _uniform(
    n: int, low: float, high: float, rng: torch.Generator, like: Images
) -> Float[Tensor, "n 1 1 1"]:
    return (low + (high - low) * torch.rand(n, generator=rng)).to(like).view(-1, 1, 1, 1)


def mirrored(x: Images, rng: torch.Generator) -> Images:
    """Mirrored left to right; no other axis of the body is symmetric."""
    return x.flip(-1)


def translated(x: Images, rng: torch.Generator) -> Images:
    """Moved by up to a tenth of the side, the edge pixels repeated."""
    most = max(1, x.shape[-1] // 10)
    padded = torch.nn.functional.pad(x, (most,) * 4, mode="replicate")
    corners = torch.randint(2 * most + 1, (len(x), 2), generator=rng).tolist()
    side = x.shape[-1]
    moved = [p[:, i : i + side, j : j + side] for p, (i, j) in zip(padded, corners, strict=True)]
    return torch.stack(moved) if moved else x


def lightly_changed(x: Images, rng: torch.Generator) -> Images:
    """Mirrored half of the time, then translated."""
    mirror = _uniform(len(x), 0.0, 1.0, rng, x) < 0.5
    return translated(torch.where(mirror, x.flip(-1), x), rng)


def augmented(x: Images, rng: torch.Generator) -> Images:
    """Lightly changed, and of other contrast: the classical way."""
    x = lightly_changed(x, rng)
    gain, offset = _uniform(len(x), 0.8, 1.2, rng, x), _uniform(len(x), -0.1, 0.1, rng, x)
    return (gain * x + offset).clamp(-1, 1)


CHANGES: dict[str, Callable[[Images, torch.Generator], Images]] = {
    "flips": mirrored,
    "shifts": translated,
    "augmentation": augmented,
}
