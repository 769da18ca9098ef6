r"""Brownian distance covariance of feature maps, and classification by the nearest prototype.

Each channel :math:`x_i` of a map is a point in the space of positions, and the matrix of distances
between channels, centred along rows and columns, is the BDC matrix

.. math:: \tilde A_{ij} = \sqrt{\tau\,\lVert x_i - x_j \rVert^2 + \varepsilon}, \qquad
          A_{ij} = \tilde A_{ij} - \bar A_{i\cdot} - \bar A_{\cdot j} + \bar A_{\cdot\cdot},

and :math:`\operatorname{tr}(A B) / c^2` is the squared distance covariance of two maps whose c
channels are the paired samples. As their number grows it tends to zero only if the two are
independent, where a covariance sees no more than linear dependence.

Axes before those named here are episodes, computed side by side. Classes are the mean of their
examples, and a query belongs to the nearest of these prototypes,

.. math:: p_k = \frac{\sum_i w_{ki}\, v_{ki}}{\sum_i w_{ki}}, \qquad
          P(k \mid q) \propto \exp\bigl(\beta \cos(q, p_k)\bigr)

Source: Székely, Rizzo & Bakirov, *Measuring and testing dependence by correlation of distances*,
2007, doi 10.1214/009053607000000505; Xie et al., *Joint Distribution Matters: Deep Brownian
Distance Covariance for Few-Shot Classification*, 2022. https://arxiv.org/abs/2204.04567; Snell et
al., *Prototypical Networks for Few-shot Learning*, 2017, eqs. (1) and (2).
https://arxiv.org/abs/1703.05175
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from hallulib import UserError
from hallulib.evidence.resnet import resnet18
from hallulib.shapes import Images, seeded
from hallulib.storage import disk

Maps = Float[Tensor, "*batch channels positions"]
Matrices = Float[Tensor, "*batch channels channels"]
Vectors = Float[Tensor, "*batch entries"]
FeatureMaps = Float[Tensor, "batch channels height width"]
Support = Float[Tensor, "*episodes n_way n d"]
Weights = Float[Tensor, "*episodes n_way n"]
Prototypes = Float[Tensor, "*episodes n_way d"]
Queries = Float[Tensor, "*episodes n_query d"]
Similarities = Float[Tensor, "*episodes n_query n_way"]


def at_least_float32(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Half precision made float32: 8 bits of bfloat16 cost 3 % of a BDC matrix."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bdc_matrix(
    features: Maps,
    scale: Float[Tensor, ""] | float | int = 1.0,
    eps: float | int = 1e-5,
) -> Matrices:
    r"""The doubly centred matrix of distances between channels, symmetric, each row of sum zero.

    The cost is :math:`O(c^2 m)` for c channels and m positions, in float32 at least, also under
    autocast. The squared distances are multiplied by ``scale``, above 0. Where two channels are
    equal, ``eps`` keeps the slope of the square root finite, at most ``0.5 * eps ** -0.5``; 0 is
    exact. Source: Xie et al. 2022, whose diagonal before centring is ``sqrt(eps)``, too.

    Example:
        >>> bdc_matrix(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), eps=0)
        tensor([[-2.5000,  2.5000],
                [ 2.5000, -2.5000]])
    """
    with torch.autocast(features.device.type, enabled=False):
        x = at_least_float32(features)
        # distances do not change when all channels are shifted, but their rounding errors do
        x = (x - x.mean(-2, keepdim=True)) * scale**0.5
        square = x.square().sum(-1, keepdim=True)
        one = torch.ones_like(square)
        # |x_i|^2 + eps - 2 x_i . x_j + |x_j|^2 as one product
        squared = torch.cat([-2 * x, square + eps, one], -1) @ torch.cat([x, one, square], -1).mT
        same = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        distance = squared.masked_fill_(same, eps).clamp(min=eps).sqrt()
        row = distance.mean(-1, keepdim=True)
        row = row - row.mean(-2, keepdim=True) / 2
        return distance - row - row.mT


def to_vector(matrices: Matrices) -> Vectors:
    """The upper triangle of symmetric matrices, row by row, as ``c * (c + 1) / 2`` entries.

    Entries off the diagonal stand for two and are multiplied by ``sqrt(2)``, so that the inner
    product of two vectors is the trace of the product of their matrices. The reference code
    leaves out this factor, which halves the weight of all that lies off the diagonal.

    Example:
        >>> to_vector(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        tensor([1.0000, 2.8284, 3.0000])
    """
    size = matrices.shape[-1]
    i, j = torch.triu_indices(size, size, device=matrices.device)
    # index_select is several times faster backward than indexing
    entries = matrices.flatten(-2).index_select(-1, i * size + j)
    return entries * (2 - (i == j).to(entries)).sqrt()


def reduction(channels: int, reduce_to: int | None) -> nn.Module:
    """A 1 x 1 convolution, normalised and rectified, to fewer channels, where that is asked."""
    if reduce_to in (None, channels):
        return nn.Identity()
    convolution = nn.Conv2d(channels, reduce_to, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(reduce_to), nn.ReLU())


class BDC(nn.Module):
    r"""The BDC vector of a feature map of any height h and width w, after a `reduction`.

    The squared distances are divided by :math:`2hw` and multiplied by a learned factor
    :math:`e^\theta` that starts at 1: the temperature of the paper, whose initial value here
    follows the map that comes in. Source: Xie et al. 2022, the BDC module.

    Example:
        >>> BDC(512, reduce_to=64)(torch.rand(2, 512, 4, 4)).shape
        torch.Size([2, 2080])
    """

    def __init__(self, channels: int, *, reduce_to: int | None = None):
        super().__init__()
        self.reduce = reduction(channels, reduce_to)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, maps: FeatureMaps) -> Vectors:
        """One vector per map, with ``d * (d + 1) / 2`` entries for d channels."""
        features = self.reduce(maps).flatten(2)
        return to_vector(bdc_matrix(features, self.log_scale.exp() / (2 * features.shape[-1])))


class Covariance(nn.Module):
    r"""The covariance of the channels of a feature map over its positions, as a vector.

    .. math:: \tfrac1m\,(X - \bar X)(X - \bar X)^\top \qquad X \in \mathbb R^{d \times m}

    Source: Wertheimer & Hariharan, *Few-Shot Learning with Localization in Realistic Settings*,
    2019 ("covariance pooling"). https://arxiv.org/abs/1904.08502
    """

    def __init__(self, channels: int, *, reduce_to: int | None = None):
        super().__init__()
        self.reduce = reduction(channels, reduce_to)

    def forward(self, maps: FeatureMaps) -> Vectors:
        """One vector per map, with ``d * (d + 1) / 2`` entries for d channels."""
        x = at_least_float32(self.reduce(maps).flatten(2))
        with torch.autocast(x.device.type, enabled=False):
            x = x - x.mean(-1, keepdim=True)
            return to_vector(x @ x.mT / x.shape[-1])


class Mean(nn.Module):
    """The mean of each channel over its positions: the embedding of prototypical networks."""

    def forward(self, maps: FeatureMaps) -> Vectors:
        """One vector per map, with an entry per channel."""
        return at_least_float32(maps).mean((-2, -1))


def prototypes(vectors: Support, weights: Weights | None = None) -> Prototypes:
    """The mean vector of each class. Weights are not negative and not all zero in a class; an
    example of weight 0 is left out.

    Example:
        >>> prototypes(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[3.0, 1.0]]))
        tensor([[1.]])
    """
    if weights is None:
        return vectors.mean(-2)
    total = weights.sum(-1, keepdim=True)
    counted = torch.where(weights[..., None] > 0, vectors, 0)  # nothing of what is left out
    return ((weights / total)[..., None] * counted).sum(-2)


def similarity(queries: Queries, prototypes: Prototypes) -> Similarities:
    """Cosine of the angle between query and prototype, in [-1, 1], in float32 at least; 0 where
    one of them is zero.

    Source: Pachetti & Colantonio 2024. Xie et al. 2022 take the inner product for one shot and the
    squared Euclidean distance for more, in which the softmax saturates as channels are added.

    Example:
        >>> similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    with torch.autocast(queries.device.type, enabled=False):
        # vectors shorter than the eps are noise, which must not be blown up to length one
        q, p = (
            functional.normalize(at_least_float32(v), dim=-1, eps=1e-6)
            for v in (queries, prototypes)
        )
        return (q @ p.mT).clamp(-1, 1)


class PrototypeClassifier(nn.Module):
    """Classifies queries by their nearest prototype; its embedding is all that it learns.

    The ``backbone`` makes feature maps of images, the ``embedding``, e.g. `BDC`, vectors of these.
    The similarity, which alone could not come near a probability of 1, is multiplied by
    ``exp(log_scale)``, learned from 10.
    """

    settings: dict | None = None  # what `build` was told

    def __init__(self, backbone: nn.Module, embedding: nn.Module):
        super().__init__()
        self.backbone, self.embedding = backbone, embedding
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def embed(self, images: Images) -> Float[Tensor, "batch d"]:
        """One vector per image; support and queries of an episode belong in one batch."""
        return self.embedding(self.backbone(images))

    def logits(
        self, query_vectors: Queries, support_vectors: Support, weights: Weights | None = None
    ) -> Similarities:
        """Similarity to the `prototypes`, times the learned scale; softmax makes them chances."""
        means = prototypes(support_vectors, weights)
        return self.log_scale.exp() * similarity(query_vectors, means)


KINDS: dict[str, Callable[[int, int | None], nn.Module]] = {
    "bdc": lambda channels, reduce_to: BDC(channels, reduce_to=reduce_to),
    "mean": lambda channels, reduce_to: Mean(),
    "covariance": lambda channels, reduce_to: Covariance(channels, reduce_to=reduce_to),
}


def build(
    kind: str = "bdc",
    *,
    channels: int = 1,
    width: int = 32,
    reduce_to: int | None = 64,
    seed: int = 0,
) -> PrototypeClassifier:
    """A fresh classifier on a `hallulib.evidence.resnet.resnet18`, whose feature map of
    ``8 * width`` channels becomes what ``kind``, a name in `KINDS`, says. Before a matrix is
    taken, channels are reduced, to 64 for 2080 entries. Backbones of one seed are equal for every
    kind.
    """
    with seeded(seed):
        backbone, embedding = resnet18(channels, width), KINDS[kind](8 * width, reduce_to)
        classifier = PrototypeClassifier(backbone, embedding)
    classifier.settings = dict(kind=kind, channels=channels, width=width, reduce_to=reduce_to)
    return classifier


def save(classifier: PrototypeClassifier, folder: Path) -> None:
    """Write a classifier that `build` made: its settings as JSON, its weights as safetensors."""
    with disk.whole_files(folder) as partial:
        state = {k: v.contiguous() for k, v in classifier.state_dict().items()}
        save_file(state, partial / "classifier.safetensors")
        (partial / "classifier.json").write_text(json.dumps(classifier.settings) + "\n")


def load(folder: Path) -> PrototypeClassifier:
    """Read what `save` wrote, in evaluation mode."""
    settings = json.loads((folder / "classifier.json").read_text())
    if settings.pop("metric", "cosine") != "cosine":  # there were others once
        raise UserError(f"{folder} compares otherwise than by the cosine; fit and save it again")
    classifier = build(**settings).eval()
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    return classifier
