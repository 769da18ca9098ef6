r"""What few labels may change of a score model: labels, weights, or what stands for a class.

A pretrained model is given other labels (`relabelled`). Nothing at all has to learn where each
class is the density of all images, moved to the mean of its own (`shifted`). Else all weights
learn, the class vectors alone, or low-rank changes of the matrices,

.. math:: W + B A, \qquad A \in \mathbb R^{r \times m},\; B \in \mathbb R^{n \times r},\; B = 0
          \text{ at the start};

or an encoder of support images takes the place of the class vectors (`SupportEncoder`).

Source:
    Low-rank changes: Hu et al. 2021, https://arxiv.org/abs/2106.09685; conditioning on a set:
    Giannone et al., *Few-Shot Diffusion Models*, 2022, https://arxiv.org/abs/2205.15463.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hallulib import UserError
from hallulib.score import ScoreModel
from hallulib.seeding import seeded
from hallulib.shapes import Images, Labels
from hallulib.unet import ClassUNet

ADAPTS = ("all", "classes", "low_rank")


def relabelled(model: ScoreModel, labels: Sequence[str], forget: bool = False) -> ScoreModel:
    """A copy of a score model for other labels.

    A label it knows keeps its class vector and shift, a new one starts at those of the null class,
    so the copy denoises it as an image of no class until it learns better.

    Args:
        model: any score model, one without labels included.
        labels: of the copy.
        forget: start all labels at the null class, as after a pretraining without labels.

    Returns:
        The copy, on the same device; the model itself stays as it is.
    """
    known = model.network.classes.weight.detach()
    with seeded():  # its random vectors are not kept
        network = ClassUNet(copy.deepcopy(model.network.unet), len(labels)).to(known.device)
    kept = [i for i, label in enumerate(labels) if label in model.labels and not forget]
    before = [model.labels.index(labels[i]) for i in kept]
    vectors = network.classes.weight.data.zero_()
    vectors[kept] = known[before]
    shifts = None
    if model.shifts is not None and kept:
        shifts = model.shifts.new_zeros((len(labels) + 1, *model.shifts.shape[1:]))
        shifts[kept] = model.shifts[before]
    return ScoreModel(model.sde, network, labels, shifts)


def shifted(model: ScoreModel, x: Images, y: Labels) -> ScoreModel:
    r"""The model with each class moved to the mean of its images; no weight changes.

    .. math:: p(x \mid c) = p(x - d_c \mid \varnothing), \qquad
              d_c = \bar x_c - \tfrac1k \textstyle\sum_b \bar x_b .

    For Gaussian images this is the linear discriminant whose covariance is known from images
    without labels; only the means are left to learn, which is why few labels are enough. What
    classes differ in must be where things are and how bright, not a texture.

    Args:
        model: a score model with labels; its shifts so far are replaced, its class vectors kept.
        x: labelled images, at least one of each class.
        y: their classes.

    Returns:
        A model that shares the network.

    Raises:
        UserError: a class without an image.

    Source:
        Few labels suffice generative classifiers: Ng & Jordan, *On Discriminative vs. Generative
        Classifiers*, 2001. Linear discriminant: Fisher 1936.
    """
    counts = torch.bincount(y, minlength=len(model.labels))
    if not counts.all():
        missing = model.labels[int(counts.argmin())]
        raise UserError(f"there is no image of class {missing!r}; one at least is needed")
    means = torch.stack([x[y == c].mean(0) for c in range(len(model.labels))])
    shifts = torch.cat([means - means.mean(0), torch.zeros_like(means[:1])])
    return ScoreModel(model.sde, model.network, model.labels, shifts)


class LowRank(nn.Module):
    """A weight plus a learnt matrix of low rank, which starts at zero. Source: Hu et al. 2021."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def adaptable(model: ScoreModel, adapt: str, rank: int = 4, seed: int = 0) -> list[nn.Parameter]:
    """The weights of a model that an episode may change; all others are frozen.

    Args:
        model: changed in place; ``"low_rank"`` adds its matrices to it.
        adapt: see `Recipe`.
        rank: of the low-rank changes.
        seed: of their initial values.

    Returns:
        Those weights; the class vectors are among them in every case.
    """
    model.requires_grad_(adapt == "all")
    if adapt == "low_rank":
        with seeded(seed):
            for module in list(model.network.unet.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    change = LowRank(module.weight, rank).to(module.weight.device)
                    parametrize.register_parametrization(module, "weight", change)
                    module.parametrizations.weight.original.requires_grad_(False)
    model.network.classes.requires_grad_()
    return [p for p in model.parameters() if p.requires_grad]


class SupportEncoder(nn.Sequential):
    """An image (batch, channels, height, width) as a vector in the place of the class vector.

    Args:
        channels: of the images.
        embedding: entries of the vector.
        width: channels of the first of four convolutions that halve the image.
        seed: of the initial weights; the last layer starts at zero, at the null class.
    """

    def __init__(self, channels: int, embedding: int, width: int = 24, seed: int = 0):
        layers: list[nn.Module] = []
        with seeded(seed):
            for before, after in zip((0, 1, 2, 4), (1, 2, 4, 4), strict=True):
                layers.append(nn.Conv2d(before * width or channels, after * width, 3, 2, 1))
                layers += [nn.GroupNorm(4, after * width), nn.SiLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, embedding)]
            super().__init__(*layers)
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)
