r"""Images to small latents and back: a variational autoencoder whose latents have unit variance.

.. math:: z = \kappa\,(\mu(x) - m), \qquad x \approx \mathrm{dec}(z / \kappa + m)

with the mean :math:`m` and the scale :math:`\kappa = 1/\mathrm{std}` of the latents of the
training images, so that a diffusion made for images of unit variance suits the latents too. Both
are kept in the stock configuration (``shift_factor``, ``scaling_factor``) beside the weights.

It learns to keep pixels and edges (`sharpness`), without perceptual loss or adversary.

Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022,
sections 3.1 and 4.3.2 (rescaling), appendix G (terms), https://arxiv.org/abs/2112.10752; the
network is diffusers' ``AutoencoderKL``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError
from hallulib.diffusion import unet
from hallulib.shapes import Images, Latents, PerImage, seeded
from hallulib.storage import checkpoint, disk, parallel

WEIGHTS = dict(sharpness=0.5, kl=1e-2)  # of the terms of the loss besides the pixels
TERMS = ("pixels", *WEIGHTS)
LATENT_CHANNELS = 4


class Autoencoder(nn.Module):
    """An ``AutoencoderKL`` between images in [-1, 1] and latents of unit variance."""

    def __init__(self, kl: AutoencoderKL):
        super().__init__()
        self.kl = kl

    @property
    def factor(self) -> int:
        """Pixels of the image along each side of a latent position."""
        return 2 ** (len(self.kl.config["block_out_channels"]) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self.kl.config["sample_size"] // self.factor
        return self.kl.config["latent_channels"], side, side

    @torch.no_grad()
    def encode(self, images: Images, batch_size: int = 64) -> Latents:
        """Latents of images in [-1, 1]: the means of their posteriors, standardised."""
        means = [self.kl.encode(x).latent_dist.mean for x in images.split(batch_size)]
        shift, scale = self._standard()
        return scale * (torch.cat(means) - shift)

    @torch.no_grad()
    def decode(self, latents: Latents, batch_size: int = 64) -> Images:
        """Images of latents, in [-1, 1]."""
        shift, scale = self._standard()
        parts = [self.kl.decode(z / scale + shift).sample for z in latents.split(batch_size)]
        return torch.cat(parts).clamp(-1, 1)

    def standardise(self, images: Images) -> "Autoencoder":
        """Set shift and scale so that latents of these images have mean 0 and variance 1.

        Of more than a thousand images every second, third ... is asked. Latents that do not
        differ, or are no numbers, are a `UserError`.
        """
        self.kl.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        z = self.encode(images[:: max(1, len(images) // 1000)]).double()
        if not z.std() > 0:
            raise UserError(f"{len(images)} images have latents that do not differ; train first")
        self.kl.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=float(z.mean()))
        return self

    def _standard(self) -> tuple[float, float]:
        return self.kl.config["shift_factor"] or 0.0, self.kl.config["scaling_factor"]


def build(
    *, size: int, channels: int = 3, factor: int = 4, width: int = 32, seed: int = 0
) -> Autoencoder:
    """A fresh autoencoder for square images.

    A latent position has ``factor`` pixels along each side, a power of 2 that divides the size
    (else a `UserError`). There are ``width`` channels, a multiple of 8, at full resolution (128 in
    the paper), and twice as many below.
    """
    levels = factor.bit_length()
    if factor != 2 ** (levels - 1) or size % factor:
        raise UserError(
            f"size {size} and factor {factor} found; the factor must be a power of 2 that "
            "divides the size"
        )
    with seeded(seed):
        kl = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(width * min(i + 1, 2) for i in range(levels)),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=size,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
    return Autoencoder(kl)


def save(model: Autoencoder, folder: Path) -> None:
    """Write weights and standardisation as an ``AutoencoderKL`` folder, or raise a `UserError`."""
    with disk.whole_files(folder, last=unet.CONFIG) as partial:
        model.kl.save_pretrained(partial)


def load(folder: Path) -> Autoencoder:
    """Read what `save` wrote, in evaluation mode, or raise a `UserError`."""
    with unet.understood(folder, "an autoencoder", f"{unet.CONFIG} and {unet.WEIGHTS}"):
        kl = unet.load_network(AutoencoderKL, Path(folder))
    return Autoencoder(kl).eval().requires_grad_(False)


def sharpness(x: Images, y: Images, octaves: int = 3) -> PerImage:
    r"""How much edges differ: the mean absolute error of differences between neighbours.

    .. math:: \sum_{o=0}^{2} \tfrac12 \left( \overline{|\partial_h (x_o - y_o)|}
              + \overline{|\partial_w (x_o - y_o)|} \right)

    over the full, half and quarter resolution: blur costs much here and little in the plain error.

    Source: Mathieu et al., *Deep Multi-Scale Video Prediction Beyond Mean Square Error*, 2016,
    eq. (6), over octaves. https://arxiv.org/abs/1511.05440
    """
    off, total = x - y, x.new_zeros(len(x))
    for octave in range(octaves):
        off = F.avg_pool2d(off, 2) if octave else off
        edges = (off.diff(dim=2).abs(), off.diff(dim=3).abs())
        total = total + sum(e.flatten(1).mean(1) for e in edges) / 2
    return total


@dataclass
class State(checkpoint.Stateful):
    """Everything a training is at one step; the model is not yet standardised.

    ``losses`` are the terms of `TERMS`, unweighted, for every step so far.
    """

    model: Autoencoder
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    losses: Float[Tensor, "steps terms"]
    step: int = 0

    def log(self) -> dict[str, list]:
        """The terms so far."""
        return dict(zip(TERMS, self.losses[: self.step].T.tolist(), strict=True))


def train(
    model: Autoencoder,
    images: Images,
    *,
    steps: int,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    folder: Path | None = None,
    every: int = 200,
) -> Iterator[State]:
    r"""Train an autoencoder, one yielded state per step.

    .. math:: \overline{|x - \hat x|} + \lambda_s\,\mathrm{sharpness}
              + \lambda_k\,\tfrac1d\,\mathrm{KL}(q(z \mid x) \,\|\, \mathcal N(0, 1))

    with d the entries of the latent and :math:`\lambda` of `WEIGHTS`, is lowered by Adam, whose
    rate falls from ``lr`` to 0 along a cosine.

    The model must be on the images' device and made for their size. The checkpoint in ``folder``
    is resumed, see :func:`hallulib.storage.checkpoint.loop`; another run's is a `UserError`.
    """
    model.train().to(memory_format=torch.channels_last)
    device = images.device
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.9))
    rng = torch.Generator(device).manual_seed(seed)
    state = State(model, optimizer, rng, torch.full((steps, len(TERMS)), torch.nan, device=device))
    settings: dict[str, Any] = dict(steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    settings |= dict(weights=WEIGHTS, images=list(images.shape))

    def take(state: State) -> None:
        rows = torch.randint(len(images), (batch_size,), generator=rng, device=device)
        for group in optimizer.param_groups:
            cosine = torch.cos(torch.tensor(torch.pi * state.step / steps)).item()
            group["lr"] = lr * 0.5 * (1 + cosine)
        step(state, images[rows])

    return checkpoint.loop(state, take, steps=steps, every=every, folder=folder, settings=settings)


def step(state: State, x: Images) -> None:
    """One step on a batch of images."""
    kl, optimizer = state.model.kl, state.optimizer
    noise = torch.randn((len(x), *state.model.shape), generator=state.rng, device=x.device)
    mine, counts = parallel.share(len(x))
    x = x[mine]
    posterior = kl.encode(x).latent_dist
    again = kl.decode(posterior.mean + posterior.std * noise[mine]).sample
    spread = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    terms = dict(pixels=(x - again).abs().mean(), sharpness=sharpness(x, again).mean())
    terms |= dict(kl=spread.mean())
    loss = terms["pixels"] + sum(w * terms[name] for name, w in WEIGHTS.items())
    loss.backward()
    row = torch.stack([terms[name].detach() for name in TERMS])
    state.losses[state.step] = parallel.combine(state.model.parameters(), row, counts)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
