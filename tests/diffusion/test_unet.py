"""The network: its null class, its folder, and stock diffusers reading that folder."""

import errno
import os

import pytest
import torch
from cut_off import save_cut_off

from hallulib import UserError
from hallulib.diffusion import unet
from hallulib.diffusion.score import denoised_of_eps
from hallulib.diffusion.sde import VESDE, VPSDE, SubVPSDE


def small(sde=None, labels=("2", "3"), **kw):
    model = unet.build(**{"size": 16, "labels": labels, "width": 8, **kw})
    model.sde = sde or model.sde
    return model


@pytest.fixture
def x_t():
    return torch.randn(3, 1, 16, 16), torch.tensor([0.1, 0.5, 0.9])


def test_the_label_changes_the_prediction_and_null_is_no_label(x_t):
    m = small()
    torch.nn.init.normal_(m.network.classes.weight[:2])
    answers = [m(*x_t, torch.full((3,), y)) for y in (0, 1, m.null)]
    assert not torch.allclose(answers[0], answers[1])
    assert torch.equal(m(*x_t), answers[2])


def test_the_null_class_stays_zero_in_training(x_t):
    m = small()
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(3):
        m(*x_t, torch.tensor([0, 1, 2])).square().mean().backward()
        optimizer.step()
    assert (m.network.classes.weight[m.null] == 0).all()


def test_an_embedding_may_stand_for_the_class(x_t):
    m = small()
    y = torch.tensor([0, 1, 2])
    assert torch.equal(m(*x_t, m.network.classes.weight[y]), m(*x_t, y))


@pytest.mark.parametrize("sde", [VPSDE(), VPSDE(0.2, 10.0), SubVPSDE(), VESDE(0.02, 20.0)])
def test_a_saved_model_is_the_same_model(sde, x_t, tmp_path):
    m = small(sde, channels=1).eval()
    unet.save(m, tmp_path)
    again = unet.load(tmp_path)
    assert again.sde == m.sde
    assert again.labels == m.labels
    y = torch.tensor([0, 1, 2])
    torch.testing.assert_close(again(*x_t, y), m(*x_t, y))


def test_stock_diffusers_samples_from_the_folder(x_t, tmp_path):
    from diffusers import DDPMPipeline

    m = small().eval()
    unet.save(m, tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipeline.unet(x_t[0], 999 * x_t[1]).sample, m.velocity(*x_t))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    images = pipeline(batch_size=2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 16, 16, 1)
    assert not list(tmp_path.rglob("*.bin"))


def test_the_pipeline_denoises_as_the_model_does(x_t, tmp_path):
    """One step of the stock scheduler from time index i is our denoised image at t = i / 999."""
    from diffusers import DDPMPipeline

    m = small().eval()
    unet.save(m, tmp_path)
    scheduler = DDPMPipeline.from_pretrained(tmp_path).scheduler
    x, i = x_t[0][:1], 600
    t = torch.tensor([i / 999])
    stock = scheduler.step(m.velocity(x, t), i, x).pred_original_sample
    ours = clipped_image(m, x, t)
    torch.testing.assert_close(stock, ours, atol=0.01, rtol=0)


def clipped_image(m, x, t):
    return denoised_of_eps(m.sde, x, m(x, t), t).clamp(-1, 1)


def test_a_ve_model_is_no_ddpm_pipeline(tmp_path):
    unet.save(small(), tmp_path)
    unet.save(small(VESDE()), tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_initial_weights_follow_the_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    weight = lambda m: m.network.unet.conv_in.weight
    assert torch.equal(weight(a), weight(b))
    assert not torch.equal(weight(a), weight(c))


def test_colour_images_are_predicted_too():
    m = unet.build(size=16, channels=3, width=8)
    assert m(torch.zeros(2, 3, 16, 16), torch.zeros(2)).shape == (2, 3, 16, 16)


def test_a_size_that_cannot_be_halved_is_explained():
    with pytest.raises(UserError, match="side 34 can be halved to 17 pixels; .* such as 32"):
        unet.build(size=34)


def test_a_model_that_cannot_be_saved_is_as_it_was_and_so_is_its_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    m = small()
    unet.save(m, tmp_path)
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(unet.DDPMPipeline, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write \(No space left on device\)"):
        unet.save(m, tmp_path)
    assert sorted(tmp_path.rglob("*")) == files
    assert m.network.unet.config.class_embed_type == "identity"


def test_a_save_that_is_cut_off_leaves_no_model_of_old_and_new_files(tmp_path, monkeypatch):
    old, new = small(seed=1), small(VESDE(), seed=2)
    assert save_cut_off(unet.save, unet.load, old, new, tmp_path, monkeypatch) == 1


def test_a_folder_that_is_no_model_is_explained(tmp_path):
    with pytest.raises(UserError, match="is not a score model that hallulib saved"):
        unet.load(tmp_path / "nothing")
    unet.save(small(), tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a score model"):
        unet.load(tmp_path)


@pytest.mark.parametrize(("size", "width"), [(8, 8), (16, 8), (8, 16)])
def test_time_and_class_are_heard_at_every_width(size, width):
    """Groups of a single channel once made the narrowest network deaf to both."""
    model = unet.build(size=size, labels=("a", "b"), width=width)
    torch.nn.init.normal_(model.network.unet.conv_out.weight)
    model.network.classes.weight.data[:2].normal_()
    x, t = torch.randn(1, 1, size, size), torch.tensor([0.5])
    velocity = lambda t, y: model.velocity(x, t, torch.tensor([y]))
    assert (velocity(t, 0) - velocity(t, 1)).abs().mean() > 1e-3
    assert (velocity(t, 0) - velocity(t / 2, 0)).abs().mean() > 1e-3
