"""An autoencoder learns what it is asked to, and goes on where it was."""

import pytest
import torch
from toy_blobs import images

from hallulib import UserError
from hallulib.autoencoder import build
from hallulib.encoding import TERMS, sharpness, train


def test_sharpness_sees_edges_and_no_offset():
    x, y = images(4), images(4, seed=1)
    torch.testing.assert_close(sharpness(x, x), torch.zeros(4))
    torch.testing.assert_close(sharpness(x + 0.3, x), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(sharpness(3 * x, 3 * y), 3 * sharpness(x, y))
    torch.testing.assert_close(sharpness(x, y), sharpness(x.mT, y.mT))


def test_sharpness_of_a_lost_step():
    """A step of height 1 across 16 columns: 1 / 15, 1 / 7 and 1 / 3 of the horizontal pairs."""
    x = torch.zeros(1, 1, 16, 16)
    x[..., 8:] = 1
    expected = (1 / 15 + 1 / 7 + 1 / 3) / 2
    assert sharpness(x, torch.zeros_like(x)).item() == pytest.approx(expected)


def run(steps, **settings):
    model = build(size=16, width=8)
    for state in train(model, images(), steps=steps, batch_size=8, **settings):
        last = state
    return last


def test_training_lowers_every_term_it_is_asked_to():
    x = images()
    found = run(80, lr=3e-3)
    first, last = found.losses[:5].mean(0), found.losses[-5:].mean(0)
    assert last[0] < 0.6 * first[0]
    assert last[1] < first[1]
    model = found.model.eval().standardise(x)
    again = model.decode(model.encode(x))
    assert (again - x).abs().mean() < 0.7 * (x - x.mean()).abs().mean()


@pytest.mark.parametrize("critic_weight", [0.0, 0.1])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(critic_weight, tmp_path):
    told = dict(critic_weight=critic_weight, critic_start=0.4, every=2)
    whole = run(5, **told)
    model = build(size=16, width=8)
    for state in train(model, images(), steps=5, batch_size=8, folder=tmp_path, **told):
        if state.step == 3:  # the checkpoint is that of step 2
            break
    resumed = run(5, folder=tmp_path, **told)
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_the_critic_learns_from_its_start_on_and_only_if_it_counts():
    fresh = torch.cat([p.flatten() for p in run(1).judge.parameters()]).detach()
    silent = run(4, critic_weight=0.0, critic_start=0.0)
    judged = run(4, critic_weight=0.1, critic_start=0.5)
    weights = [torch.cat([p.flatten() for p in s.judge.parameters()]) for s in (silent, judged)]
    assert torch.equal(weights[0], fresh)
    assert not torch.equal(weights[1], fresh)
    told = judged.losses[:, TERMS.index("critic")]
    assert (told[:2] == 0).all()
    assert (told[2:] != 0).all()


def test_images_that_do_not_suit_are_refused():
    with pytest.raises(UserError, match=r"\(1, 16, 16\); the autoencoder was made for"):
        next(train(build(size=16, width=8), images(channels=1), steps=1))
