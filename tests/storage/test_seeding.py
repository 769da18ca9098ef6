"""Initial weights depend on the seed alone, and nothing outside depends on them."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hallulib.augment import autoencoder
from hallulib.diffusion import unet
from hallulib.evidence import resnet
from hallulib.evidence.resnet import train_resnet
from hallulib.oneshot import bdc
from hallulib.shapes import seeded


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: unet.build(size=8, width=8, seed=seed),
        lambda seed: bdc.build("mean", width=2, reduce_to=4, seed=seed),
    ],
)
def test_no_generator_of_the_program_is_touched(make, monkeypatch):
    """On no device: a GPU's generators would be seeded through this function."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded a GPU"))
    state = torch.get_rng_state()
    one, other, again = (
        torch.cat([p.detach().flatten() for p in make(seed).parameters()]) for seed in (1, 2, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_numbers_are_those_of_the_seed():
    with seeded(5):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


NETWORKS = {
    "unet": lambda seed: unet.build(size=8, width=8, labels=("low", "high"), seed=seed),
    "prototypes": lambda seed: bdc.build("bdc", width=2, reduce_to=4, seed=seed),
    "autoencoder": lambda seed: autoencoder.build(size=8, channels=1, width=8, seed=seed),
    "resnet": lambda seed: train_resnet(
        torch.zeros(2, 1, 8, 8), torch.arange(2), steps=0, width=2, seed=seed
    ),
}


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_those_that_the_seed_gives_to_all_of_pytorch(name, monkeypatch):
    """The plain way, as weights that ship with the library were made."""
    found = weights(NETWORKS[name](3))

    @contextlib.contextmanager
    def globally(seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield

    for module in (unet, bdc, autoencoder, resnet):
        monkeypatch.setattr(module, "seeded", globally)
    assert torch.equal(found, weights(NETWORKS[name](3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_that_build_and_draw_at_once_change_no_weight(name):
    expected = [weights(NETWORKS[name](seed)) for seed in range(4)]
    ended = threading.Event()

    def draw():
        while not ended.is_set():
            torch.rand(100)

    others = [threading.Thread(target=draw) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        for other in others:
            other.start()
        try:
            found = list(pool.map(lambda i: weights(NETWORKS[name](i % 4)), range(16)))
        finally:
            ended.set()
    for i, one in enumerate(found):
        assert torch.equal(one, expected[i % 4])


def test_a_context_within_another_and_a_generator_that_is_given_keep_their_numbers():
    rng = lambda seed: torch.Generator().manual_seed(seed)
    with seeded(5):
        with seeded(6):
            assert torch.equal(torch.randn(3), torch.randn(3, generator=rng(6)))
        assert torch.equal(torch.rand(3, generator=rng(7)), torch.rand(3, generator=rng(7)))
        drawn = torch.empty(3).normal_()
    assert torch.equal(drawn, torch.randn(3, generator=rng(5)))
