"""Training: it learns, it resumes to the same bytes, and it refuses what it cannot use."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_task import IMAGES

from hallulib import UserError
from hallulib.diffusion import train, unet
from hallulib.diffusion.score import ScoreModel, denoised_of_eps
from hallulib.diffusion.sde import VPSDE
from hallulib.diffusion.train import pretrain
from hallulib.storage import store
from hallulib.storage.checkpoint import CHECKPOINT, LOG


def model(**kw):
    return unet.build(size=8, labels=("a", "b"), width=8, **kw)


def images(n=32):
    return torch.randn((n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


SETTINGS = dict(batch_size=8, warmup=5, every=4)


def run(folder=None, stop=None, labels=None, **kw):
    loop = pretrain(model(), images(), labels, folder=folder, **{**SETTINGS, "steps": 12, **kw})
    for state in loop:
        if state.step == stop:
            loop.close()
            break
    return state


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_seed_trains_the_same_weights_and_another_seed_others():
    assert same(run(), run())
    assert not same(run(), run(seed=1))


def test_the_global_random_state_is_neither_used_nor_changed():
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(first, run())


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_a_stopped_training_resumes_to_the_same_bytes(tmp_path, stop):
    run(tmp_path, stop=stop, labels=torch.arange(32) % 3 - 1)
    resumed = run(tmp_path, labels=torch.arange(32) % 3 - 1)
    assert same(resumed, run(labels=torch.arange(32) % 3 - 1))


def test_a_finished_training_only_hands_over_its_state(tmp_path):
    whole = run(tmp_path)
    stamp = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    (again,) = pretrain(model(), images(), folder=tmp_path, steps=12, **SETTINGS)
    assert same(again, whole)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == stamp


def test_training_learns_a_constant_image():
    """All training images alike: the denoised image must become that image."""
    m, x = model(), torch.full((16, 1, 8, 8), 0.5)
    t, eps = torch.full((16,), 0.7), torch.randn(16, 1, 8, 8)
    x_t = m.sde.diffuse(x, t, eps)

    def error(m):
        return (denoised_of_eps(m.sde, x_t, m(x_t, t), t) - x).square().mean().sqrt().item()

    before = error(m)
    *_, state = pretrain(m, x, steps=200, batch_size=32, lr=3e-3, warmup=10, ema_decay=0.95)
    assert error(state.ema) < 0.4 * before


def test_weights_decide_what_is_drawn():
    weights = torch.zeros(32)
    weights[3] = 1.0
    only = pretrain(model(), images(), steps=2, weights=weights, **SETTINGS)
    repeated = pretrain(
        model(), images()[3:4].repeat(32, 1, 1, 1), steps=2, weights=weights, **SETTINGS
    )
    assert same(list(only)[-1], list(repeated)[-1])


def test_labels_reach_the_class_vectors_and_dropping_all_of_them_does_not(monkeypatch):
    start = model().network.classes.weight.detach()
    y = torch.zeros(32, dtype=torch.int64)
    moved = run(labels=y).model.network.classes.weight.detach() - start
    assert moved[0].abs().max() > 0
    assert (moved[1:] == 0).all()
    monkeypatch.setattr(train, "P_UNCOND", 1.0)
    dropped = run(labels=y).model.network.classes.weight
    assert torch.equal(dropped.detach(), start)


def test_class_vectors_move_as_fast_as_they_are_told_and_the_first_step_of_others_is_the_same(
    monkeypatch,
):
    """Adam's first step is the learning rate, whatever the gradient."""
    monkeypatch.setattr(train, "P_UNCOND", 0.0)
    labels = torch.arange(32) % 2
    start = dict(model().named_parameters())
    told = dict(labels=labels, steps=1, warmup=0, lr=1e-3)
    slow, fast = run(**told).model, run(**told, class_rate=10).model
    for name, p in slow.named_parameters():
        moved = (dict(fast.named_parameters())[name] - start[name]).abs().max()
        if name == "network.classes.weight":
            assert moved.item() == pytest.approx(1e-2, rel=1e-2)
        else:
            assert moved == (p - start[name]).abs().max()


def test_a_network_without_class_vectors_learns_as_well():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, timesteps, y):
            return self.layer(x)

    plain = ScoreModel(VPSDE(), Plain())
    before = plain.network.layer.weight.clone()
    *_, state = pretrain(plain, images(), steps=2, class_rate=5, **SETTINGS)
    assert not torch.equal(state.model.network.layer.weight, before)


def test_the_log_has_one_line_per_step(tmp_path):
    state = run(tmp_path)
    lines = (tmp_path / LOG).read_text().splitlines()
    assert lines[0] == "step,loss"
    assert len(lines) == 13
    assert float(lines[-1].split(",")[1]) == pytest.approx(state.losses[-1].item())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path, stop=4)
    with pytest.raises(UserError, match=r"trained with lr = 0.0002, not 0.1; give another folder"):
        run(tmp_path, lr=0.1)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, stop=4)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a checkpoint of this model"):
        run(tmp_path)


def test_a_diverging_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    broken = images()
    broken[:] = torch.nan
    loop = pretrain(model(), broken, steps=4, folder=tmp_path, **{**SETTINGS, "every": 2})
    with pytest.raises(UserError, match="not finite from step 1 on"):
        list(loop)
    assert not (tmp_path / CHECKPOINT).exists()


# ---- a model that goes on from another

ASKED = dict(scheme="grade", steps=1, batch_size=4, width=8, device="cpu")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A finished run on these images: the model and its folder."""
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    return train.pretrained(IMAGES, **ASKED)


def test_a_training_can_begin_from_a_run_but_for_what_its_classes_were(before, monkeypatch):
    known, folder = before
    seen = {}

    def keep(start, *args, **settings):
        seen.update(settings | {"start": {k: v.clone() for k, v in start.state_dict().items()}})
        return pretrain(start, *args, **settings)

    monkeypatch.setattr(train, "pretrain", keep)
    model, own = train.pretrained(IMAGES, begin=str(folder), **ASKED)
    assert own != folder
    classes = "network.classes.weight"
    assert not seen["start"].pop(classes).any()
    assert known.get_parameter(classes).any()
    assert all(torch.equal(known.state_dict()[k], v) for k, v in seen["start"].items())
    assert seen["class_rate"] > 1
    assert model.get_parameter(classes)[:2].any()


def test_a_class_without_an_image_is_to_the_model_no_class(before):
    known, _ = before
    rest = IMAGES.select(rows=np.flatnonzero(IMAGES.table["grade"] != IMAGES.classes("grade")[0]))
    model, _ = train.pretrained(rest, **ASKED)
    assert known.get_parameter("network.classes.weight")[:-1].any(1).all()
    assert model.get_parameter("network.classes.weight").any(1).tolist() == [False, True, False]


def test_what_began_from_a_run_is_found_until_the_run_is_another(before, tmp_path):
    _, folder = before
    _, first = train.pretrained(IMAGES, begin=str(folder), **ASKED)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert train.pretrained(IMAGES, begin=str(elsewhere), **ASKED)[1] == first
    _, other = train.pretrained(IMAGES, **ASKED | {"seed": 1})
    assert train.pretrained(IMAGES, begin=str(other), **ASKED)[1] not in (first, folder, other)


def test_a_model_that_ships_is_named_by_one_word(before, monkeypatch):
    _, folder = before
    _, first = train.pretrained(IMAGES, begin=str(folder), **ASKED)
    monkeypatch.setattr(store, "SHIPPED", folder.parent)
    assert train.pretrained(IMAGES, begin=folder.name, **ASKED)[1] == first


@pytest.mark.parametrize(
    ("repeats", "width", "found"),
    [
        ((1, 1, 2, 2), 8, "1 channel(s), 16 pixels and width 8"),
        ((1, 3, 1, 1), 8, "3 channel(s), 8 pixels and width 8"),
        ((1, 1, 1, 1), 16, "1 channel(s), 8 pixels and width 16"),
    ],
    ids=["size", "channels", "width"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(before, repeats, width, found):
    _, folder = before
    images = replace(IMAGES, images=np.tile(IMAGES.images, repeats))
    runs = sorted(store.runs_folder().iterdir())
    with pytest.raises(UserError) as told:
        train.pretrained(images, begin=str(folder), **ASKED | {"width": width})
    of = "1 channel(s), 8 pixels and width 8"
    sentence = f"{folder} is a score model of {of}; one of {found} is needed, or begin=nothing"
    assert str(told.value) == sentence
    assert sorted(store.runs_folder().iterdir()) == runs


def test_a_model_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match="'score-lesion' is no finished training; .*score-lesions"):
        train.pretrained(IMAGES, begin="score-lesion", **ASKED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_learns():
    m, x = model().cuda(), torch.full((16, 1, 8, 8), 0.5, device="cuda")
    *_, state = pretrain(m, x, steps=300, batch_size=32, lr=3e-3, warmup=10)
    assert state.losses[-50:].mean() < 0.5 * state.losses[:5].mean()
