"""An autoencoder learns what it is asked to, and goes on where it was."""

import pytest
import torch
from toy_blobs import images

from hallulib.augment.autoencoder import build, sharpness, train


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
    assert last[0] < 0.7 * first[0]
    assert last[1] < first[1]
    model = found.model.eval().standardise(x)
    again = model.decode(model.encode(x))
    assert (again - x).abs().mean() < 0.7 * (x - x.mean()).abs().mean()


def test_a_training_that_was_stopped_ends_with_the_same_bytes(tmp_path):
    whole = run(5)
    model = build(size=16, width=8)
    for state in train(model, images(), steps=5, batch_size=8, folder=tmp_path, every=2):
        if state.step == 3:  # the checkpoint is that of step 2
            break
    resumed = run(5, folder=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
