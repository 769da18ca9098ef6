r"""Brownian distance covariance: a feature map as the distances between its channels.

Each channel :math:`x_i` of a feature map is a point in the space of positions. The matrix of
distances between channels, centred along rows and columns, is the BDC matrix

.. math:: \tilde A_{ij} = \sqrt{\tau\,\lVert x_i - x_j \rVert^2 + \varepsilon}, \qquad
          A_{ij} = \tilde A_{ij} - \bar A_{i\cdot} - \bar A_{\cdot j} + \bar A_{\cdot\cdot},

and :math:`\operatorname{tr}(A B) / c^2` is the squared distance covariance of two maps whose c
channels are the paired samples. As their number grows it tends to zero only if the two are
independent, where a covariance sees no more than linear dependence. Pooled means and covariances
of channels are here too, to be compared with.

Source:
    Székely, Rizzo & Bakirov, *Measuring and testing dependence by correlation of distances*,
    2007, doi 10.1214/009053607000000505; Xie et al., *Joint Distribution Matters: Deep Brownian
    Distance Covariance for Few-Shot Classification*, 2022. https://arxiv.org/abs/2204.04567
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

Maps = Float[Tensor, "*batch channels positions"]
Matrices = Float[Tensor, "*batch channels channels"]
Vectors = Float[Tensor, "*batch entries"]
FeatureMaps = Float[Tensor, "batch channels height width"]


def at_least_float32(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Half precision made float32: 8 bits of bfloat16 cost 3 % of a BDC matrix."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bdc_matrix(
    features: Maps,
    scale: Float[Tensor, ""] | float | int = 1.0,
    eps: float | int = 1e-5,
) -> Matrices:
    r"""The doubly centred matrix of distances between channels.

    One product of matrices gives all squared distances, and means take the place of the
    reference's products with all-ones matrices: :math:`O(c^2 m)` for c channels and m positions,
    not :math:`O(c^3)`. Under autocast, and for half-precision features, it is computed in float32.

    Args:
        features: channels over positions, of any size; a height and a width are one axis.
        scale: positive factor of the squared distances; a tensor receives its gradient.
        eps: keeps the slope of the square root finite, at most ``0.5 * eps ** -0.5``, where two
            channels are equal; 0 is exact, with finite gradients only for channels that differ.

    Returns:
        Symmetric matrices whose rows sum to zero; float32, or float64 for such features.

    Source:
        Xie et al. 2022, the BDC module. Before centring the diagonal is ``sqrt(eps)``, as there.

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
    product of two vectors is the trace of the product of their matrices, and the distance of two
    vectors is the Frobenius distance. The reference code leaves out this factor, which halves
    the weight of all that lies off the diagonal.

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
    """A 1 x 1 convolution, normalised and rectified, to fewer channels; nothing where not needed.

    Args:
        channels: of the feature maps that come in.
        reduce_to: channels that go out; ``None`` keeps them as they are.

    Source:
        Xie et al. 2022, the BDC module.
    """
    if reduce_to in (None, channels):
        return nn.Identity()
    convolution = nn.Conv2d(channels, reduce_to, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(reduce_to), nn.ReLU())


class BDC(nn.Module):
    r"""The BDC vector of a feature map of any height h and width w.

    The squared distances are divided by :math:`2hw` and multiplied by a learned factor
    :math:`e^\theta` that starts at 1: the temperature of the paper, whose initial value here
    follows the map that comes in.

    Args:
        channels: of the feature maps.
        reduce_to: channels after a `reduction` by a 1 x 1 convolution; ``None`` keeps them.
        learn_scale: whether the factor is trained.

    Source:
        Xie et al. 2022, the BDC module.

    Example:
        >>> BDC(512, reduce_to=64)(torch.rand(2, 512, 4, 4)).shape
        torch.Size([2, 2080])
    """

    def __init__(self, channels: int, *, reduce_to: int | None = None, learn_scale: bool = True):
        super().__init__()
        self.reduce = reduction(channels, reduce_to)
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=learn_scale)

    def forward(self, maps: FeatureMaps) -> Vectors:
        """One vector per map, with ``d * (d + 1) / 2`` entries for d channels."""
        features = self.reduce(maps).flatten(2)
        return to_vector(bdc_matrix(features, self.log_scale.exp() / (2 * features.shape[-1])))


class Covariance(nn.Module):
    r"""The covariance of the channels of a feature map over its positions, as a vector.

    .. math:: \tfrac1m\,(X - \bar X)(X - \bar X)^\top \qquad X \in \mathbb R^{d \times m}

    The second moments against which BDC is compared; arguments as for `BDC`.

    Source:
        Wertheimer & Hariharan, *Few-Shot Learning with Localization in Realistic Settings*, 2019
        ("covariance pooling"). https://arxiv.org/abs/1904.08502
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
    """The mean of each channel of a feature map over its positions: global average pooling.

    Source:
        The embedding of Snell et al., *Prototypical Networks for Few-shot Learning*, 2017, on a
        network that ends in a map. https://arxiv.org/abs/1703.05175
    """

    def forward(self, maps: FeatureMaps) -> Vectors:
        """One vector per map, with an entry per channel."""
        return at_least_float32(maps).mean((-2, -1))
