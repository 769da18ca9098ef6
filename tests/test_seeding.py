"""Initial weights depend on the seed alone, and nothing outside depends on them."""

import pytest
import torch

from hallulib import prototypes, unet
from hallulib.seeding import seeded


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: unet.build(size=8, width=8, seed=seed),
        lambda seed: prototypes.build("mean", width=2, reduce_to=4, seed=seed),
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
