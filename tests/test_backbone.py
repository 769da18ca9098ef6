"""The backbone is torchvision's ResNet-18 with a stem for small images."""

import pytest
import torch
import torchvision
from torch import nn

from hallulib.backbone import resnet18


@pytest.mark.parametrize(("side", "map_side"), [(32, 4), (64, 8), (40, 5), (33, 5)])
def test_the_map_has_an_eighth_of_the_side(side, map_side):
    network = resnet18(channels=2, width=8)
    assert network(torch.randn(1, 2, side, side)).shape == (1, 64, map_side, map_side)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_that_of_torchvision_but_for_the_stem(channels):
    """Its weights fit by name, and give the same map."""
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity(), nn.Identity()
    ours = resnet18(channels).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, channels, 32, 32)
    torch.testing.assert_close(ours(images).flatten(1), theirs.eval()(images))


def test_initial_weights_keep_the_variance_of_what_follows():
    """Kaiming's rule by outputs: variance 2 / (outputs x kernel area) in every convolution."""
    torch.manual_seed(0)
    network = resnet18(width=16)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.2)
            assert module.bias is None


def test_every_weight_receives_a_gradient():
    network = resnet18(width=8)
    network(torch.randn(4, 1, 32, 32)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
