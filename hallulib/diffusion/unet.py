"""The class-conditional noise network, and its folder, which stock ``diffusers`` can sample from.

A class enters as a vector added to the time embedding. The vector of the null class is zero, so
the network without class *is* a plain ``UNet2DModel`` and a saved model is an ordinary
``DDPMPipeline`` with the class vectors in a small file beside it.

A pretrained model is given other labels by `relabelled`, to learn them or to be moved to their
means (`moved_to_means`).
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models import UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from hallulib import UserError
from hallulib.diffusion.score import Condition, ScoreModel
from hallulib.diffusion.sde import SDES, VPSDE
from hallulib.shapes import Images, Labels, Times, seeded
from hallulib.storage import disk

SIDECAR, CLASSES = "score_model.json", "classes.safetensors"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
Network = TypeVar("Network", bound=ModelMixin)


class ClassUNet(nn.Module):
    """A ``UNet2DModel`` whose time embedding is shifted by a vector per class.

    Its ``class_embed_type`` is "identity"; index ``n_classes`` is the null class, its vector zero.
    """

    def __init__(self, unet: UNet2DModel, n_classes: int):
        super().__init__()
        self.unet = unet
        width = unet.config["block_out_channels"][0] * 4
        self.classes = nn.Embedding(n_classes + 1, width, padding_idx=n_classes)
        nn.init.normal_(self.classes.weight[:n_classes], std=0.02)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        side = self.unet.config["sample_size"]
        return self.unet.config["in_channels"], side, side

    def forward(self, x: Images, timesteps: Times, y: Condition) -> Images:
        """Predict the noise; ``y`` holds class indices or ready embeddings."""
        vectors = y if y.is_floating_point() else self.classes(y)
        return self.unet(x, timesteps, class_labels=vectors).sample


def build(
    *,
    size: int,
    channels: int = 1,
    labels: Sequence[str] = (),
    width: int = 32,
    seed: int = 0,
) -> ScoreModel:
    """A fresh score model for square images.

    The image is halved until its side is 8 pixels or odd; the resolutions have once, twice, and
    from the third on three times ``width`` channels, with self-attention at the coarsest. A width
    of 32 suits a CPU at 32 pixels (1.8 M weights), 128 a GPU. Without labels the model is
    unconditional; its diffusion is VP.

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
            f"images of side {size} can be halved to {side} pixels; a side that comes to 16 or "
            f"less is needed, such as {size // 16 * 16}"
        )
    with seeded(seed):
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(width * min(i + 1, 3) for i in range(levels)),
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            # a group of one channel would normalise away what time and class add to it
            norm_num_groups=min(8, width // 2),
            class_embed_type="identity",
        )
        return ScoreModel(VPSDE(), ClassUNet(unet, len(labels)), labels)


def relabelled(model: ScoreModel, labels: Sequence[str], forget: bool = False) -> ScoreModel:
    """A copy of a score model for other labels, on the same device.

    A label it knows keeps its class vector and shift, unless the copy is to ``forget`` them; a new
    one starts at those of the null class.
    """
    old = model.network.classes.weight.detach()
    with seeded():  # its random vectors are not kept
        network = ClassUNet(copy.deepcopy(model.network.unet), len(labels)).to(old.device)
    known = [i for i, label in enumerate(labels) if label in model.labels and not forget]
    before = [model.labels.index(labels[i]) for i in known]
    vectors = network.classes.weight.data.zero_()
    vectors[known] = old[before]
    shifts = None
    if model.shifts is not None and known:
        shifts = model.shifts.new_zeros((len(labels) + 1, *model.shifts.shape[1:]))
        shifts[known] = model.shifts[before]
    return ScoreModel(model.sde, network, labels, shifts)


def moved_to_means(model: ScoreModel, x: Images, y: Labels) -> ScoreModel:
    r"""The model with each class moved to the mean of its images; no weight changes.

    .. math:: p(x \mid c) = p(x - d_c \mid \varnothing), \qquad
              d_c = \bar x_c - \tfrac1k \textstyle\sum_b \bar x_b .

    For Gaussian images this is Fisher's linear discriminant, with the covariance of images without
    labels: few labels are enough for the means. What classes differ in must be where things are
    and how bright, not a texture. There must be images of every class.

    Source: Ng & Jordan, *On Discriminative vs. Generative Classifiers*, 2001; Fisher 1936.
    """
    means = torch.stack([x[y == c].mean(0) for c in range(len(model.labels))])
    shifts = torch.cat([means - means.mean(0), torch.zeros_like(means[:1])])
    return ScoreModel(model.sde, model.network, model.labels, shifts)


def save(model: ScoreModel, folder: Path) -> None:
    """Write a model as a ``diffusers`` folder of safetensors, or raise a `UserError`.

    Of a VP model with the default rates, ``DDPMPipeline.from_pretrained(folder)`` samples the null
    class; other diffusions are no DDPM, so only the network is written.
    """
    unet = copy.copy(model.network.unet)  # shares the weights
    unet.register_to_config(class_embed_type=None)  # the null class needs no class input
    name = next(name for name, kind in SDES.items() if type(model.sde) is kind)
    sidecar = {"sde": {"name": name, **asdict(model.sde)}, "labels": model.labels}
    of_classes = {"classes": model.network.classes.weight.detach()}
    if model.shifts is not None:
        of_classes["shifts"] = model.shifts.contiguous()
    with disk.whole_files(folder, last=SIDECAR) as partial:
        if model.sde == VPSDE():
            ddpm = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction")
            DDPMPipeline(unet, ddpm).save_pretrained(partial)
        else:
            disk.drop(Path(folder) / "model_index.json")  # of a DDPM that was there before
            unet.save_pretrained(partial / "unet")
        save_file(of_classes, partial / CLASSES)
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n")


def load(folder: Path) -> ScoreModel:
    """Read a model that ``save`` wrote, in evaluation mode, or raise a `UserError`."""
    folder = Path(folder)
    with understood(folder, "a score model", f"{SIDECAR}, {CLASSES} and a folder unet"):
        sidecar = json.loads((folder / SIDECAR).read_text())
        of_classes = load_file(folder / CLASSES)
        unet = load_network(UNet2DModel, folder / "unet", class_embed_type="identity")
        sde = SDES[sidecar["sde"].pop("name")](**sidecar["sde"])
        with seeded():  # its random vectors are not kept
            network = ClassUNet(unet, len(sidecar["labels"]))
        network.classes.load_state_dict({"weight": of_classes["classes"]})
        return ScoreModel(sde, network, sidecar["labels"], of_classes.get("shifts")).eval()


@contextlib.contextmanager
def understood(folder: Path, kind: str, needed: str) -> Iterator[None]:
    """Tells whatever a damaged folder of a network makes diffusers throw in a `UserError`."""
    try:
        yield
    except Exception as fault:
        what = f"{type(fault).__name__}: {fault}".splitlines()[0]
        raise UserError(
            f"{folder} is not {kind} that hallulib saved ({what}); it needs {needed}"
        ) from fault


def load_network(kind: type[Network], folder: Path, **changes: object) -> Network:
    """A network of diffusers from a folder of ``save_pretrained``, its configuration changed.

    Unlike ``from_pretrained``, it follows no index to other files, which may hold code, and makes
    up no weight that is missing. What is wrong is for `understood` to tell.
    """
    config = json.loads((folder / CONFIG).read_text()) | changes
    tensors = load_file(folder / WEIGHTS)
    # diffusers would go on for ever building layers that no weight is there for
    if config["layers_per_block"] > len(tensors):
        raise ValueError(f"{config['layers_per_block']} layers for {len(tensors)} tensors")
    with torch.device("meta"):  # takes no memory, whatever the configuration asks for
        network = kind.from_config(config)  # type: ignore[attr-defined]
    network.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return network
