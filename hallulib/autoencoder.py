r"""Images to small latents and back: a variational autoencoder whose latents have unit variance.

.. math:: z = \kappa\,(\mu(x) - m), \qquad x \approx \mathrm{dec}(z / \kappa + m)

with the mean :math:`m` and the scale :math:`\kappa = 1/\mathrm{std}` of the latents of the
training images, so that a diffusion made for images of unit variance suits the latents too. Both
are kept in the stock configuration (``shift_factor``, ``scaling_factor``) beside the weights.

Source:
    Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022, sections
    3.1 and 4.3.2 (rescaling), https://arxiv.org/abs/2112.10752; the network is diffusers'
    ``AutoencoderKL``.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from hallulib import UserError, disk, unet
from hallulib.seeding import seeded
from hallulib.shapes import Images, Latents


class Autoencoder(nn.Module):
    """An ``AutoencoderKL`` between images in [-1, 1] and latents of unit variance.

    Args:
        kl: the network; its ``scaling_factor`` and ``shift_factor`` are those of `standardise`.
    """

    def __init__(self, kl: AutoencoderKL):
        super().__init__()
        self.kl = kl

    @property
    def factor(self) -> int:
        """Pixels of the image along each side of a latent position."""
        return 2 ** (len(self.kl.config.block_out_channels) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self.kl.config.sample_size // self.factor
        return self.kl.config.latent_channels, side, side

    @torch.no_grad()
    def encode(self, images: Images, batch_size: int = 64) -> Latents:
        """Latents of images: the means of their posteriors, standardised.

        Args:
            images: in [-1, 1].
            batch_size: images in the network at once.

        Raises:
            UserError: images of other channels or of another size than the network's.
        """
        self.check(images)
        found = [self.kl.encode(x).latent_dist.mean for x in images.split(batch_size)]
        shift, scale = self._standard()
        return scale * (torch.cat(found) - shift)

    @torch.no_grad()
    def decode(self, latents: Latents, batch_size: int = 64) -> Images:
        """Images of latents, in [-1, 1].

        Raises:
            UserError: latents of another shape than the network's.
        """
        if latents.shape[1:] != self.shape:
            raise UserError(
                f"latents have (channels, height, width) {tuple(latents.shape[1:])}; the "
                f"autoencoder's have {self.shape}"
            )
        shift, scale = self._standard()
        found = [self.kl.decode(z / scale + shift).sample for z in latents.split(batch_size)]
        return torch.cat(found).clamp(-1, 1)

    def standardise(self, images: Images) -> "Autoencoder":
        """Set shift and scale so that the latents of these images have mean 0 and variance 1."""
        self.kl.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        z = self.encode(images).double()
        if not z.std() > 0:
            raise UserError(f"{len(images)} images have latents that do not differ; train first")
        self.kl.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=float(z.mean()))
        return self

    def _standard(self) -> tuple[float, float]:
        return self.kl.config.shift_factor or 0.0, self.kl.config.scaling_factor

    def check(self, images: Images) -> None:
        """Refuse images of other channels or of another size than the network's."""
        wanted = (self.kl.config.in_channels, *(self.kl.config.sample_size,) * 2)
        if tuple(images.shape[1:]) != wanted:
            raise UserError(
                f"images have (channels, height, width) {tuple(images.shape[1:])}; the "
                f"autoencoder was made for {wanted}"
            )


def build(
    *,
    size: int,
    channels: int = 3,
    latent_channels: int = 4,
    factor: int = 4,
    width: int = 32,
    seed: int = 0,
) -> Autoencoder:
    """A fresh autoencoder for square images.

    Args:
        size: side of the images in pixels, a multiple of ``factor``.
        channels: 1 for grey, 3 for colour.
        latent_channels: of the latent.
        factor: pixels along each side of a latent position, a power of 2; Ye et al. 2023 take 4.
        width: channels at full resolution, a multiple of 8; twice that below. 128 in the paper.
        seed: of the initial weights.

    Raises:
        UserError: a size that is no multiple of the factor, or a factor that is no power of 2.
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
            latent_channels=latent_channels,
            norm_num_groups=8,
            sample_size=size,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
    return Autoencoder(kl)


def save(model: Autoencoder, folder: Path) -> None:
    """Write the weights and the standardisation as an ``AutoencoderKL`` folder of diffusers.

    Raises:
        UserError: the folder cannot be written.
    """
    with disk.whole_files(folder) as partial:
        model.kl.save_pretrained(partial)


def load(folder: Path) -> Autoencoder:
    """Read what `save` wrote, in evaluation mode.

    Raises:
        UserError: the folder holds no autoencoder.
    """
    try:
        kl = unet.load_network(AutoencoderKL, Path(folder))
    except Exception as fault:  # what a damaged configuration makes diffusers throw
        what = (str(fault) or "nothing more is known").splitlines()[0]
        raise UserError(
            f"{folder} is not an autoencoder that hallulib saved ({type(fault).__name__}: {what})"
        ) from fault
    return Autoencoder(kl).eval().requires_grad_(False)
