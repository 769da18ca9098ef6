r"""The residual network that turns an image into a feature map, and its training as a classifier.

Torchvision's ResNet-18 up to its last block, for small images: the stock stem quarters the image
and would leave a single position of side 32. Here the stem keeps the size, and the map is 4 x 4.

Source: He et al., *Deep Residual Learning for Image Recognition*, 2016, table 1.
https://arxiv.org/abs/1512.03385
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm.auto import tqdm

from hallulib.data.changes import lightly_changed
from hallulib.shapes import Images, Labels, seeded


def resnet18(channels: int = 1, width: int = 64) -> nn.Module:
    """ResNet-18 without pooling and classifier, with fresh weights.

    It maps images ``(b, channels, s, s)`` to ``(b, 8 * width, s / 8, s / 8)``, rounded up. Names
    of the layers and the law of their initial weights are torchvision's; only the first
    convolution, 3 x 3 with stride 1 in place of 7 x 7 with stride 2, has another shape. A width
    of 64 is ResNet-18 (11 M weights), 32 suits a CPU (2.8 M).

    Example:
        >>> resnet18(width=8)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 64, 4, 4])
    """
    layers = OrderedDict(
        conv1=nn.Conv2d(channels, width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        layer1=_blocks(width, width, stride=1),
        layer2=_blocks(width, 2 * width, stride=2),
        layer3=_blocks(2 * width, 4 * width, stride=2),
        layer4=_blocks(4 * width, 8 * width, stride=2),
    )
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _blocks(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Two residual blocks, the first of which changes width and size."""
    shortcut = None
    if inputs != outputs:
        projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, BasicBlock(outputs, outputs))


def train_resnet(
    x: Images,
    y: Labels,
    *,
    steps: int,
    width: int = 32,
    pooling: nn.Module | None = None,
    change: Callable[[Images, torch.Generator], Images] | None = lightly_changed,
    weights: Float[Tensor, " batch"] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> nn.Sequential:
    """A ResNet-18 with pooling and classifier, trained with Adam; the rate falls to 0 by a cosine.

    The ``pooling``, learnt along, makes a vector of each feature map; without one it is the mean
    over positions. Classes, 0 to k - 1, are drawn equally often, as for the score model, unless
    ``weights`` say how often each image is. Each drawn batch goes through ``change``, if any.
    """
    rng = torch.Generator().manual_seed(seed)
    pooling = pooling or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with seeded(seed), torch.no_grad():
        backbone = resnet18(x.shape[1], width).eval()
        features = pooling.eval()(backbone(x[:1])).shape[1]
        classes = nn.Linear(features, int(y.max()) + 1)
    network = nn.Sequential(backbone, pooling, classes).to(memory_format=torch.channels_last)
    weights = 1 / torch.bincount(y)[y].double() if weights is None else weights
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in tqdm(range(steps), desc="ResNet-18"):
        rows = torch.multinomial(weights, batch_size, replacement=True, generator=rng)
        seen = x[rows] if change is None else change(x[rows], rng)
        loss = F.cross_entropy(network(seen), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def read(
    network: nn.Module, x: Images
) -> tuple[Float[np.ndarray, "batch features"], Float[np.ndarray, "batch classes"]]:
    """Pooled features of images, and the class probabilities that `train_resnet` learnt."""
    backbone, pooling, classes = network.children()
    pooled = torch.cat([pooling(backbone(part)) for part in x.split(256)])
    return pooled.numpy(), classes(pooled).softmax(1).numpy()
