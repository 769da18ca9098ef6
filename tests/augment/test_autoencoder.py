"""Latents have unit variance on the way in, and the same images come out again."""

import pytest
import torch
from cut_off import save_cut_off
from diffusers import AutoencoderKL
from toy_blobs import images

from hallulib import UserError
from hallulib.augment import autoencoder
from hallulib.augment.autoencoder import build


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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


def test_a_save_that_is_cut_off_leaves_no_model_of_old_and_new_files(tmp_path, monkeypatch):
    old, new = (build(size=16, width=8, seed=seed) for seed in (1, 2))
    save, load = autoencoder.save, autoencoder.load
    assert save_cut_off(save, load, old, new, tmp_path, monkeypatch) == 1
