"""The class-conditional noise network, and its folder, which stock ``diffusers`` can sample from.

A class enters as a vector added to the time embedding. The vector of the null class is zero, so
the network without class *is* a plain ``UNet2DModel`` and a saved model is an ordinary
``DDPMPipeline`` with the class vectors in a small file beside it.
"""

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hallulib import UserError, disk
from hallulib.score import ScoreModel
from hallulib.sde import SDE, SDES, VPSDE
from hallulib.seeding import seeded
from hallulib.shapes import Images, Labels, Times

SIDECAR, CLASSES = "score_model.json", "classes.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
Network = TypeVar("Network", bound=ModelMixin)


class ClassUNet(nn.Module):
    """A ``UNet2DModel`` whose time embedding is shifted by a vector per class.

    Args:
        unet: a ``UNet2DModel`` with ``class_embed_type="identity"``.
        n_classes: number of classes; index ``n_classes`` is the null class, whose vector is zero.
    """

    def __init__(self, unet: UNet2DModel, n_classes: int):
        super().__init__()
        self.unet = unet
        width = unet.config.block_out_channels[0] * 4
        self.classes = nn.Embedding(n_classes + 1, width, padding_idx=n_classes)
        nn.init.normal_(self.classes.weight[:n_classes], std=0.02)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def forward(
        self, x: Images, timesteps: Times, y: Labels | Float[Tensor, "batch embedding"]
    ) -> Images:
        """Predict the noise; ``y`` holds class indices or ready embeddings."""
        vectors = y if y.is_floating_point() else self.classes(y)
        return self.unet(x, timesteps, class_labels=vectors).sample


def build(
    sde: SDE | None = None,
    *,
    size: int,
    channels: int = 1,
    labels: Sequence[str] = (),
    width: int = 32,
    layers: int = 1,
    seed: int = 0,
) -> ScoreModel:
    """A fresh score model for square images.

    The image is halved until its side is 8 pixels or odd; the resolutions have once, twice, and
    from the third on three times ``width`` channels, with self-attention at the coarsest.

    Args:
        sde: the forward diffusion, VP unless given.
        size: side of the images in pixels.
        channels: 1 for grey, 3 for colour, more for latents.
        labels: the label strings, in order; none makes an unconditional model.
        width: channels at full resolution, a multiple of 8; 32 suits a CPU at 32 pixels (1.8 M
            weights), 128 a GPU.
        layers: residual blocks per resolution.
        seed: of the initial weights.

    Raises:
        UserError: a width that is no multiple of 8, or a size that leaves more than 16 pixels a
            side at the coarsest resolution, where attention would compare too many positions.
    """
    if width < 8 or width % 8:
        raise UserError(f"width is {width}; a multiple of 8 is needed")
    levels, side = 1, size
    while side > 8 and side % 2 == 0:
        levels, side = levels + 1, side // 2
    if side > 16:
        raise UserError(
            f"images of side {size} do not suit the network, which halves them while they are "
            f"even and is left with {side}; a side that so comes to 16 or less is needed, such as "
            f"{size // 16 * 16 or 16}"
        )
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=layers,
            block_out_channels=tuple(width * min(i + 1, 3) for i in range(levels)),
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            # a group of one channel would normalise away what time and class add to it
            norm_num_groups=min(8, width // 2),
            class_embed_type="identity",
        )
        return ScoreModel(sde or VPSDE(), ClassUNet(unet, len(labels)), labels)


def save(model: ScoreModel, folder: Path) -> None:
    """Write a model as a ``diffusers`` folder of safetensors.

    For a VP model with the default rates, ``DDPMPipeline.from_pretrained(folder)`` samples the
    null class; other diffusions keep the network but are no DDPM, so no scheduler is written.

    Raises:
        UserError: the folder cannot be written.
    """
    unet = model.network.unet
    if any(map(parametrize.is_parametrized, unet.modules())):
        unet = _plain(unet)
    unet.register_to_config(class_embed_type=None)  # the null class needs no class input
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
    name = next(name for name, kind in SDES.items() if type(model.sde) is kind)
    sidecar = {"sde": {"name": name, **asdict(model.sde)}, "labels": model.labels}
    with disk.whole_files(folder) as partial:
        try:
            if model.sde == VPSDE():
                DDPMPipeline(unet, scheduler).save_pretrained(partial)
            else:
                unet.save_pretrained(partial / "unet")
        finally:
            unet.register_to_config(class_embed_type="identity")
        of_classes = {"classes": model.network.classes.weight.detach()}
        if model.shifts is not None:
            of_classes["shifts"] = model.shifts.contiguous()
        save_file(of_classes, partial / CLASSES)
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")


def _plain(unet: UNet2DModel) -> UNet2DModel:
    """An ordinary network of the weights that low-rank changes have led to."""
    with torch.device("meta"):
        plain = UNet2DModel.from_config(unet.config)
    weights = {name: operator.attrgetter(name)(unet).detach() for name in plain.state_dict()}
    plain.load_state_dict(weights, assign=True)
    return plain


def load(folder: Path) -> ScoreModel:
    """Read a model that ``save`` wrote, in evaluation mode.

    Raises:
        UserError: the folder is not such a model.
    """
    folder = Path(folder)
    try:
        sidecar = json.loads((folder / SIDECAR).read_text())
        of_classes = load_file(folder / CLASSES)
        unet = load_network(UNet2DModel, folder / "unet", class_embed_type="identity")
        sde = SDES[sidecar["sde"].pop("name")](**sidecar["sde"])
        with seeded():  # its random vectors are not kept
            network = ClassUNet(unet, len(sidecar["labels"]))
        network.classes.load_state_dict({"weight": of_classes["classes"]})
        shifts = of_classes.get("shifts")
        if shifts is not None and shifts.shape != (len(sidecar["labels"]) + 1, *network.shape):
            raise ValueError(f"classes are moved by images of shape {tuple(shifts.shape)}")
        return ScoreModel(sde, network, sidecar["labels"], shifts).eval()
    except Exception as fault:  # what a damaged configuration makes diffusers throw
        what = (str(fault) or "nothing more is known").splitlines()[0]
        raise UserError(
            f"{folder} is not a score model that hallulib saved ({type(fault).__name__}: {what});"
            f" it needs {SIDECAR}, {CLASSES} and a folder unet"
        ) from fault


def load_network(kind: type[Network], folder: Path, **changes: object) -> Network:
    """A network of diffusers, from its folder of one configuration and one file of weights.

    Unlike ``from_pretrained``, it follows no index to other files, which may hold code, and makes
    up no weight that is missing.

    Args:
        kind: its class.
        folder: what ``save_pretrained`` wrote.
        **changes: of the configuration.

    Raises:
        ValueError: configuration and weights do not belong together.
        Exception: whatever diffusers throws at an impossible configuration.
    """
    config = json.loads((folder / "config.json").read_text()) | changes
    tensors = load_file(folder / WEIGHTS)
    # diffusers would go on for ever building layers that no weight is there for
    if not config["layers_per_block"] <= len(tensors):
        raise ValueError(f"{config['layers_per_block']} layers for {len(tensors)} tensors")
    with torch.device("meta"):  # takes no memory, whatever the configuration asks for
        network = kind.from_config(config)
    shapes = [{k: v.shape for k, v in held.items()} for held in (network.state_dict(), tensors)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{WEIGHTS} does not hold the weights that config.json asks for")
    network.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return network
