"""The backbone is torchvision's ResNet-18 with a stem for small images."""

import pytest
import torch
import torchvision
from torch import nn

from hallulib.evidence.resnet import read, resnet18, train_resnet
from hallulib.oneshot.bdc import BDC


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


def test_a_resnet_learns_what_tells_two_classes_apart_and_starts_the_same():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    x = 0.3 * torch.randn((40, 1, 8, 8), generator=rng) + 0.8 * y[:, None, None, None] - 0.4
    x = x.clamp(-1, 1)
    networks = [train_resnet(x, y, steps=80, width=4, seed=s).eval() for s in (0, 0, 1)]
    answers = [n(x).detach() for n in networks]
    assert (answers[0].argmax(1) == y).float().mean() > 0.95
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_a_pooling_of_its_own_is_learnt_along_and_read():
    y = torch.arange(12) % 3
    x = torch.rand((12, 1, 16, 16)) + y[:, None, None, None] * 0.3 - 0.8
    pooling = BDC(32, reduce_to=5)
    before = pooling.reduce[0].weight.clone()
    network = train_resnet(x, y, steps=2, width=4, pooling=pooling, change=None)
    assert network[1] is pooling
    assert not torch.equal(pooling.reduce[0].weight, before)
    pooled, _ = read(network, x)
    torch.testing.assert_close(torch.from_numpy(pooled), pooling(network[0](x)).detach())
    assert network[2].weight.shape == (3, 15)


def test_what_is_read_are_pooled_maps_and_the_probabilities_of_the_last_layer():
    y = torch.arange(10) % 2
    x = torch.rand((10, 1, 16, 16)) - 0.5 + y[:, None, None, None] * 0.4
    network = train_resnet(x, y, steps=2, width=4, change=None)
    pooled, probabilities = read(network, x)
    torch.testing.assert_close(torch.from_numpy(pooled), network[0](x).mean((2, 3)).detach())
    torch.testing.assert_close(torch.from_numpy(probabilities), network(x).softmax(1).detach())
