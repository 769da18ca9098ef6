"""What the networks of each chapter will cost here: a few steps timed, times the steps it takes.

An estimate. Images that go through networks are counted from the parameters of a chapter, and an
image is timed on this machine in a network of the chapter's size. Figures, statistics and the
start of a notebook come on top.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from hallulib import autoencoder, encoding, prototypes, train, unet
from hallulib.augment import Trial as Augmentation
from hallulib.score import ScoreModel
from hallulib.sde import VPSDE
from hallulib.settings import vary
from hallulib.trial import Trial

Steps = Iterator[Any]
N_WAY = 4  # classes of an episode of the embedded prostate
ENOUGH = 0.4  # seconds of a timed step, from which on more images would tell no more


class Work(NamedTuple):
    """Images that go through a network.

    Attributes:
        unit: a name in `UNITS`.
        size: side of the images, pixels.
        width: of the network.
        images: how many, counted anew for each step.
        batch: most images in the network at once.
        kept: whether a run is kept and the next call finds it.
    """

    unit: str
    size: int
    width: int
    images: float
    batch: int = 32
    kept: bool = False


def of_chapter(name: str, values: Mapping[str, Any]) -> list[Work]:
    """The work of a chapter with these parameters; none if it has no network or is not known."""
    count = CHAPTERS.get(name)
    return count(SimpleNamespace(**values)) if count else []


def seconds(work: Work) -> float:
    """What the work will take here, measured on a few images."""
    return work.images * per_image(work.unit, work.size, work.width, work.batch)


@functools.cache
def per_image(unit: str, size: int, width: int, batch: int) -> float:
    """Seconds for one image, timed in the batch or, where that takes long, in a smaller one."""
    if not torch.cuda.is_available():
        first = _step(unit, size, width, 2) / 2
        batch = max(2, min(batch, int(ENOUGH / first)))
        if batch == 2:
            return first
    return _step(unit, size, width, batch) / batch


def _step(unit: str, size: int, width: int, batch: int) -> float:
    """Seconds of the fastest of some steps after the first, which makes what the others use."""
    steps, taken = UNITS[unit](size, width, batch), []
    next(steps)
    _wait()
    while len(taken) < 4 and sum(taken) < ENOUGH:
        start = time.perf_counter()
        next(steps)
        _wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _images(size: int, batch: int, channels: int = 1) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.zeros((batch, channels, size, size), device=device)


def _score_steps(size: int, width: int, batch: int) -> Steps:
    x = _images(size, batch)
    return train.pretrain(
        unet.build(size=size, width=width).to(x.device), x, steps=9, batch_size=batch
    )


@torch.no_grad()
def _score_calls(size: int, width: int, batch: int) -> Steps:
    x = _images(size, batch)
    model = unet.build(size=size, width=width).to(x.device).eval()
    model.to(memory_format=torch.channels_last)
    while True:
        yield model(x, torch.full((batch,), 0.5, device=x.device))


def _autoencoder_steps(size: int, width: int, batch: int) -> Steps:
    x = _images(size, batch, 3)
    model = autoencoder.build(size=size, width=width).to(x.device)
    return encoding.train(model, x, steps=9, batch_size=batch)


def _classifier_steps(size: int, width: int, batch: int) -> Steps:
    x = _images(size, batch)
    model = prototypes.build("bdc", width=width).to(x.device)
    while True:
        model.embed(x).sum().backward()
        yield


class _Plane(nn.Module):
    """A network of three hidden layers for points in the plane, as in the chapter on noise."""

    def __init__(self, width: int):
        super().__init__()
        sizes = (2, width, width, width, 2)
        layers = (nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x, timesteps, y):
        return self.layers(x.flatten(1)).view_as(x)


def _plane_steps(size: int, width: int, batch: int) -> Steps:
    x = torch.zeros((batch, 1, 1, 2))
    return train.pretrain(ScoreModel(VPSDE(), _Plane(width)), x, steps=9, batch_size=batch)


UNITS: dict[str, Callable[[int, int, int], Steps]] = {
    "score step": _score_steps,
    "score call": _score_calls,
    "autoencoder step": _autoencoder_steps,
    "classifier step": _classifier_steps,
    "plane step": _plane_steps,
}


def _noise(p) -> list[Work]:
    networks = 3 * p.N_SEEDS  # of three sizes of the training set
    images = networks * p.STEPS * p.BATCH_SIZE
    return [Work("plane step", 1, p.WIDTH, images, p.BATCH_SIZE)]


def _pretraining(p) -> list[Work]:
    images = p.STEPS * p.BATCH_SIZE
    return [Work("score step", p.SIZE, p.WIDTH, images, p.BATCH_SIZE, kept=True)]


def _found(p) -> Work:
    """The model of the chapter on pretraining, where it has not been trained before."""
    return Work("score step", p.SIZE, p.WIDTH, p.STEPS * 32, kept=True)


def _sampling(p) -> list[Work]:
    calls = 5 * (5 + 10 + 20 + 40)  # five samplers, each with these budgets
    calls += 5 * 2 * 10  # and five guidance scales, which double the batch
    return [_found(p), Work("score call", p.SIZE, p.WIDTH, calls * p.N_SAMPLES, 256)]


def _one_shot(p) -> list[Work]:
    return [Work("classifier step", p.SIZE, p.WIDTH, 6 * p.STEPS * N_WAY * (1 + 5))]


def _hallucination(p, **other) -> list[Work]:
    plain = Trial("train", "test", n_way=N_WAY, steps=p.STEPS, n_episodes=p.N_EPISODES)
    t = vary(replace(plain, **other), p.VARY)
    own = dict(size=p.SIZE, width=t.pretraining_width, kept=True)
    most = max(t.counts) * t.fit.candidates
    seen = [t.k_shot + t.n_query + n * t.fit.candidates for n in t.counts]
    tests = t.n_episodes + t.n_validation * -(-t.steps // t.per_epoch)
    learnt = t.n_way * t.k_shot * t.recipe.copies * t.recipe.adapt_steps
    guidance = 2 if t.recipe.guidance_scale > 1 else 1
    made = t.n_way * most * t.recipe.sampler_steps * guidance
    return [
        Work("score step", images=32 * t.pretraining, **own),
        Work("score step", images=(t.steps + tests) * learnt, batch=8, **own),
        Work("score call", images=(t.steps + tests) * made, batch=16, **own),
        Work("classifier step", p.SIZE, t.width, t.steps * t.n_way * sum(seen), kept=True),
    ]


def _your_data(p) -> list[Work]:
    return _hallucination(p, n_way=2, pretraining=p.PRETRAINING, pretraining_width=16)


def _likelihood(p) -> list[Work]:
    pairs = 24 + 2 * 24  # the bound of every test image, decisions for test and validation
    calls = p.N_IMAGES * N_WAY * pairs
    return [_found(p), Work("score call", p.SIZE, p.WIDTH, calls, 256)]


def _augmentation(p) -> list[Work]:
    plain = Augmentation(
        "label", factor=4 if p.SIZE >= 64 else 2, encoder_width=16, width=24, resnet_steps=p.STEPS
    )
    t = vary(plain, p.TRIAL)
    side = p.SIZE // t.factor
    steered = (2 + t.folds) * p.STEPS
    return [
        Work("autoencoder step", p.SIZE, t.encoder_width, p.PRETRAINING // 2 * 16, 16, kept=True),
        Work("score step", side, t.width, p.PRETRAINING * 64, 64, kept=True),
        Work("score step", side, t.width, steered * 64, 64),
        Work("classifier step", p.SIZE, t.resnet_width, (1 + 4 * t.folds) * t.resnet_steps * 32),
    ]


CHAPTERS: dict[str, Callable[[SimpleNamespace], list[Work]]] = {
    "02_noise": _noise,
    "03_pretraining": _pretraining,
    "04_sampling": _sampling,
    "05_one_shot": _one_shot,
    "06_hallucination": _hallucination,
    "07_likelihood": _likelihood,
    "08_latent_augmentation": _augmentation,
    "10_your_data": _your_data,
}
