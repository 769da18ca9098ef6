r"""The residual network that turns an image into a feature map.

Torchvision's ResNet-18 up to its last block, for small images: the stock stem quarters the image
before the first block, which leaves a single position of a 32-pixel image. Here the stem keeps
the size, so an image of side 32 gives a 4 x 4 map, as the stock stem does at side 128.

Source:
    He et al., *Deep Residual Learning for Image Recognition*, 2016, table 1.
    https://arxiv.org/abs/1512.03385
"""

from collections import OrderedDict

from torch import nn
from torchvision.models.resnet import BasicBlock


def resnet18(channels: int = 1, width: int = 64) -> nn.Module:
    """ResNet-18 without pooling and classifier, with fresh weights.

    It maps images ``(b, channels, s, s)`` to ``(b, 8 * width, s / 8, s / 8)``, rounded up. Names
    of the layers and the law of their initial weights are torchvision's; only the first
    convolution, 3 x 3 with stride 1 in place of 7 x 7 with stride 2, has another shape.

    Args:
        channels: 1 for grey, 3 for colour.
        width: channels of the first block, doubled three times; 64 is ResNet-18 (11 M weights),
            32 suits a CPU (2.8 M).

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
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
    )
