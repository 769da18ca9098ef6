"""Trainings small enough to compare one process with two; `accelerate launch` runs this file."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from toy_task import IMAGES, TASK

from hallulib.augment import autoencoder
from hallulib.diffusion import unet
from hallulib.diffusion.train import pretrain
from hallulib.oneshot import experiment
from hallulib.oneshot.experiment import Trial
from hallulib.oneshot.hallucinate import Recipe
from hallulib.storage import parallel, store
from hallulib.storage.checkpoint import CHECKPOINT, pack

SMALL = dict(n_way=2, n_query=TASK["n_query"], counts=(0, 1), pretraining=2, pretraining_width=16)
SMALL |= dict(
    kind="mean", width=4, supervised=2, steps=3, per_epoch=2, n_validation=1, n_episodes=22
)
TRIAL = Trial("grade", "grade", **SMALL, recipe=Recipe(sampler_steps=1, copies=3, lr=1e-3))
STEPS, KILLED_AT = 10, 6


def images(n=32, size=8):
    rng = torch.Generator().manual_seed(0)
    return torch.randn((n, 1, size, size), generator=rng).clamp(-1, 1)


def score(folder=None, stop=None):
    """A pretraining whose batches are no multiple of two, which resumes after a kill."""
    model = unet.build(size=8, labels=("a", "b"), width=16)
    told = dict(steps=STEPS, batch_size=7, warmup=2, every=4, folder=folder)
    for state in pretrain(model, images(), torch.arange(32) % 3 - 1, **told):
        if state.step == stop and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"losses": state.losses} | pack({"model": state.ema.state_dict()})


def latents():
    """An autoencoder."""
    model = autoencoder.build(size=16, channels=1, width=8)
    *_, state = autoencoder.train(model, images(size=16), steps=4, batch_size=5)
    again = model.eval().decode(model.encode(images(size=16)))
    return {"losses": state.losses, "again": again} | pack({"model": model.state_dict()})


def joint():
    """A joint training of a generator and classifiers, and its test episodes."""
    result = experiment.run(IMAGES, TRIAL)
    found = {"auroc": torch.tensor(result.auroc.to_numpy())}
    return found | pack({"model": result.source.state_dict()})


def count(folder, **_):
    with (folder / "trained").open("a") as file:
        file.write(f"{parallel.processes()} ")


def main(folder):
    again = (folder / CHECKPOINT).exists()
    found = pack({"score": score(folder, None if again else KILLED_AT)})
    found |= pack({"latents": latents()}) | pack({"joint": joint()})
    store.load_or_train("by-one", count)
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"rank{parallel.rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
