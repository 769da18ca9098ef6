"""Latents have unit variance on the way in, and the same images come out again."""

import pytest
import torch
from diffusers import AutoencoderKL

from hallulib import UserError, autoencoder
from hallulib.autoencoder import TERMS, build, sharpness, train


def images(n=12, channels=3, size=16, seed=0):
    """Smooth blobs in noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, channels, 4, 4), generator=rng) * 1.6 - 0.8
    fine = 0.1 * torch.randn((n, channels, size, size), generator=rng)
    return (torch.nn.functional.interpolate(coarse, size=size) + fine).clamp(-1, 1)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def model(request):
    return build(size=16, channels=request.param, width=8).eval()


def test_latents_of_the_images_it_was_standardised_on_have_mean_0_and_variance_1(model):
    x = images(channels=model.kl.config.in_channels)
    z = model.standardise(x).encode(x)
    assert z.shape == (12, 4, 4, 4) == (12, *model.shape)
    assert z.mean() == pytest.approx(0, abs=1e-5)
    assert z.std() == pytest.approx(1, rel=1e-5)


def test_the_scale_is_taken_back_on_the_way_out(model):
    x = images(channels=model.kl.config.in_channels)
    with torch.no_grad():
        plain = model.kl.decode(model.kl.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    for scale, shift in ((1.0, 0.0), (7.0, -0.3), (0.1, 2.0)):
        model.kl.register_to_config(scaling_factor=scale, shift_factor=shift)
        torch.testing.assert_close(model.decode(model.encode(x)), plain, atol=2e-4, rtol=0)


def test_the_scale_is_saved_with_the_weights_and_a_stock_autoencoder_reads_both(model, tmp_path):
    x = images(channels=model.kl.config.in_channels)
    expected = model.standardise(x).encode(x)
    autoencoder.save(model, tmp_path)
    torch.testing.assert_close(autoencoder.load(tmp_path).encode(x), expected)
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = stock.encode(x).latent_dist.mean
    theirs = (theirs - stock.config.shift_factor) * stock.config.scaling_factor
    torch.testing.assert_close(theirs, expected)


def test_parts_of_a_batch_are_encoded_as_the_whole(model):
    x = images(channels=model.kl.config.in_channels)
    torch.testing.assert_close(model.encode(x, batch_size=5), model.encode(x), atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(images(channels=1)), r"\(1, 16, 16\); the .* \(3, 16, 16\)"),
        (lambda m: m.encode(images(size=32)), r"\(3, 32, 32\); the autoencoder was made for"),
        (lambda m: m.decode(torch.zeros(1, 3, 4, 4)), r"\(3, 4, 4\); .*\(4, 4, 4\)"),
        (lambda m: next(train(m, images(channels=1), steps=1)), "made for"),
        (lambda m: m.standardise(images(2)), "2 images have latents that do not differ; train"),
        (lambda m: build(size=16, factor=3), "size 16 and factor 3 found; the factor must be a"),
        (lambda m: build(size=18, factor=4), "size 18 and factor 4 found"),
    ],
)
def test_what_does_not_suit_is_told_in_a_sentence(call, message):
    model = build(size=16, width=8)
    if "differ" in message:  # a network that answers 0
        torch.nn.init.zeros_(model.kl.quant_conv.weight)
        torch.nn.init.zeros_(model.kl.quant_conv.bias)
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_folder_without_autoencoder_is_told(tmp_path):
    with pytest.raises(UserError, match="is not an autoencoder that hallulib saved"):
        autoencoder.load(tmp_path)
