r"""Classes as the mean of their examples, and queries by the nearest of these prototypes.

.. math:: p_k = \frac{\sum_i w_{ki}\, v_{ki}}{\sum_i w_{ki}}, \qquad
          P(k \mid q) \propto \exp\bigl(\beta\; \mathrm{sim}(q, p_k)\bigr)

The vectors come from an embedding of the feature map of a backbone: its BDC matrix, its
covariance or its mean. Axes before those named here are episodes, and computed side by side.

Source:
    Snell et al., *Prototypical Networks for Few-shot Learning*, 2017, eqs. (1) and (2).
    https://arxiv.org/abs/1703.05175
"""

import math
from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hallulib import UserError
from hallulib.backbone import resnet18
from hallulib.bdc import BDC, Covariance, Mean, at_least_float32
from hallulib.seeding import seeded
from hallulib.shapes import Images

Support = Float[Tensor, "*episodes n_way n d"]
Weights = Float[Tensor, "*episodes n_way n"]
Prototypes = Float[Tensor, "*episodes n_way d"]
Queries = Float[Tensor, "*episodes n_query d"]
Similarities = Float[Tensor, "*episodes n_query n_way"]


def prototypes(vectors: Support, weights: Weights | None = None) -> Prototypes:
    """The mean vector of each class, or its mean with weights.

    Args:
        vectors: the examples of each class.
        weights: not negative and not all zero in a class; their common factor has no effect.
            An example of weight 0 is left out. ``None`` weighs all alike.

    Raises:
        UserError: a weight that is negative or infinite, or a class without weight.

    Example:
        >>> prototypes(torch.tensor([[[0.0], [4.0]]]), torch.tensor([[3.0, 1.0]]))
        tensor([[1.]])
    """
    if weights is None:
        return vectors.mean(-2)
    total = weights.sum(-1, keepdim=True)
    if not ((weights >= 0).all() and ((total > 0) & total.isfinite()).all()):
        raise UserError(
            f"weights of shape {tuple(weights.shape)} found that no prototype can be made with: "
            "none may be negative or infinite, and one in each class must be above zero"
        )
    counted = torch.where(weights[..., None] > 0, vectors, 0)  # nothing of what is left out
    return ((weights / total)[..., None] * counted).sum(-2)


def cosine(queries: Queries, prototypes: Prototypes) -> Similarities:
    """Cosine of the angle between query and prototype, in [-1, 1]; 0 where one of them is zero."""
    # vectors shorter than the eps are noise, which must not be blown up to length one
    directions = functional.normalize(prototypes, dim=-1, eps=1e-6)
    return inner(functional.normalize(queries, dim=-1, eps=1e-6), directions).clamp(-1, 1)


def inner(queries: Queries, prototypes: Prototypes) -> Similarities:
    """Inner product; of BDC vectors, their squared distance covariance times ``c ** 2``."""
    return queries @ prototypes.mT


def euclidean(queries: Queries, prototypes: Prototypes) -> Similarities:
    """Minus the squared Euclidean distance, in (-inf, 0]."""
    # differences do not change when all is shifted, but their rounding errors do
    centre = prototypes.mean(-2, keepdim=True)
    q, p = queries - centre, prototypes - centre
    squares = q.square().sum(-1)[..., None] + p.square().sum(-1)[..., None, :]
    return (2 * q @ p.mT - squares).clamp(max=0)


METRICS: dict[str, Callable[..., Tensor]] = {
    "cosine": cosine,
    "inner": inner,
    "euclidean": euclidean,
}


def similarity(queries: Queries, prototypes: Prototypes, metric: str = "cosine") -> Similarities:
    """How near each query is to each prototype; higher is nearer.

    Args:
        queries: vectors to be classified.
        prototypes: one vector per class of the same episode.
        metric: ``"cosine"`` in [-1, 1], ``"inner"`` product, or ``"euclidean"``, minus the
            *squared* distance. Computed in float32 at least, also under autocast.

    Raises:
        UserError: an unknown metric.

    Source:
        Cosine: Pachetti & Colantonio 2024. Xie et al. 2022 take the inner product for one shot
        and the squared Euclidean distance for more; both grow with the number of channels, until
        the softmax of them saturates.

    Example:
        >>> similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    function = METRICS[_known(metric, METRICS, "metric")]
    with torch.autocast(queries.device.type, enabled=False):
        return function(at_least_float32(queries), at_least_float32(prototypes))


class PrototypeClassifier(nn.Module):
    """Classifies queries by their nearest prototype; its embedding is all that it learns.

    Args:
        backbone: images to feature maps ``(b, c, h, w)``.
        embedding: feature maps to vectors ``(b, d)``, e.g. `hallulib.bdc.BDC`.
        metric: as for `similarity`. It is multiplied by ``exp(log_scale)``, learned from 10 for
            the cosine, which alone could not come near a probability of 1, and from 1 otherwise.

    Attributes:
        settings: what `build` was told; none for a classifier put together otherwise.

    Raises:
        UserError: an unknown metric.
    """

    settings: dict | None = None

    def __init__(self, backbone: nn.Module, embedding: nn.Module, metric: str = "cosine"):
        super().__init__()
        self.backbone, self.embedding = backbone, embedding
        self.metric = _known(metric, METRICS, "metric")
        self.log_scale = nn.Parameter(torch.tensor(math.log(10) if metric == "cosine" else 0.0))

    def embed(self, images: Images) -> Float[Tensor, "batch d"]:
        """One vector per image; support and queries of an episode belong in one batch."""
        return self.embedding(self.backbone(images))

    def logits(
        self, query_vectors: Queries, support_vectors: Support, weights: Weights | None = None
    ) -> Similarities:
        """Similarity to the prototype of each class, times the learned scale.

        Args:
            query_vectors: of the images to be classified.
            support_vectors: of the examples of each class, in the order of the logits.
            weights: of the examples, as for `prototypes`.

        Raises:
            UserError: weights that give no mean.
        """
        means = prototypes(support_vectors, weights)
        return self.log_scale.exp() * similarity(query_vectors, means, self.metric)

    def probabilities(
        self, query_vectors: Queries, support_vectors: Support, weights: Weights | None = None
    ) -> Similarities:
        """Chance of each class, the softmax of `logits`."""
        return self.logits(query_vectors, support_vectors, weights).softmax(-1)


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
    metric: str = "cosine",
    seed: int = 0,
) -> PrototypeClassifier:
    """A fresh classifier on a ResNet-18.

    Args:
        kind: what a feature map becomes: ``"bdc"`` its BDC matrix, ``"covariance"`` that of its
            channels, ``"mean"`` their averages over positions (prototypical networks).
        channels: 1 for grey, 3 for colour images.
        width: of the `hallulib.backbone.resnet18`, whose maps have ``8 * width`` channels.
        reduce_to: channels before a matrix is taken; 64 give 2080 entries. No effect on a mean.
        metric: as for `similarity`.
        seed: of the initial weights; backbones of one seed are equal for every kind.

    Raises:
        UserError: an unknown kind or metric.

    Source:
        Xie et al. 2022 (BDC), Wertheimer & Hariharan 2019 (covariance), Snell et al. 2017 (mean).
    """
    embedding = KINDS[_known(kind, KINDS, "kind of embedding")]
    with seeded(seed):
        classifier = PrototypeClassifier(
            resnet18(channels, width), embedding(8 * width, reduce_to), metric
        )
    classifier.settings = dict(
        kind=kind, channels=channels, width=width, reduce_to=reduce_to, metric=metric
    )
    return classifier


def _known(name: str, names: Collection[str], what: str) -> str:
    if name not in names:
        raise UserError(f"unknown {what} {name!r}: needed is one of {', '.join(names)}")
    return name
