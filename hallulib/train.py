"""Training loops as generators of their state, and checkpoints that resume to the same bytes."""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hallulib import UserError, checkpoint, commands, data, parallel, parameters, runs, unet
from hallulib.data import ImageSet
from hallulib.score import ScoreModel, denoising_loss, stratified_times
from hallulib.shapes import Images, Labels


@dataclass
class State:
    """Everything a training run is at one step; a checkpoint is this, written down.

    Attributes:
        model: the weights being trained.
        ema: their exponential moving average, the model to sample from.
        optimizer: Adam, with its moments.
        rng: where all randomness of the run comes from, on the images' device.
        losses: the loss of every step so far, on the device, so that reading none costs no wait.
        step: optimiser steps taken.
    """

    model: ScoreModel
    ema: ScoreModel
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    losses: Float[Tensor, " steps"]
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        found = checkpoint.named("model", self.model.state_dict())
        found |= checkpoint.named("ema", self.ema.state_dict())
        found |= checkpoint.named("optimizer", checkpoint.moments(self.optimizer))
        return found | {"rng": self.rng.get_state(), "losses": self.losses}

    def load_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take on a state that ``tensors`` wrote."""
        self.model.load_state_dict(checkpoint.part("model", tensors))
        self.ema.load_state_dict(checkpoint.part("ema", tensors))
        checkpoint.load_moments(self.optimizer, checkpoint.part("optimizer", tensors))
        self.rng.set_state(tensors["rng"].cpu())
        self.losses.copy_(tensors["losses"])
        self.step = step


def pretrain(
    model: ScoreModel,
    images: Images,
    labels: Labels | None = None,
    *,
    steps: int,
    weights: Float[Tensor, " batch"] | None = None,
    batch_size: int = 64,
    lr: float = 2e-4,
    class_rate: float | int = 1,
    warmup: int = 500,
    p_uncond: float = 0.1,
    ema_decay: float = 0.999,
    clip: float = 1.0,
    seed: int = 0,
    folder: Path | None = None,
    identity: str = "",
    every: int = 500,
) -> Iterator[State]:
    r"""Train a score model by denoising score matching, one yielded state per step.

    Each step draws images with replacement, noises them at stratified times and lowers
    :func:`hallulib.score.denoising_loss`. The network runs channels last, on a GPU in bfloat16
    and compiled; the caller decides when to look, since nothing here waits for the device. Several
    processes share each batch, see :mod:`hallulib.parallel`.

    Args:
        model: trained in place, on its own device.
        images: the training images, in [-1, 1], on the model's device.
        labels: class index per image, -1 where unlabelled; ``None`` is all unlabelled.
        steps: optimiser steps in the whole run.
        weights: how often to draw each image, relative to the others; equal unless given.
        batch_size: images per step.
        lr: Adam's learning rate, reached linearly over ``warmup`` steps.
        class_rate: learning rate of the class vectors as a multiple of ``lr``. A pretrained
            model with new labels needs more than 1: its vectors start at zero, and until they
            have grown, the other weights have nothing to tell classes apart by.
        warmup: steps of the linear rise.
        p_uncond: chance that a label is dropped, which trains the null class as well.
        ema_decay: of the averaged weights; early averages are shorter.
        clip: largest norm of the gradient.
        seed: of every draw in the run.
        folder: where the checkpoint and ``losses.csv`` are kept; a checkpoint found there is
            resumed, to the same bytes on a CPU as if it had never stopped.
        identity: of the images and the start, kept in the checkpoint: one of another identity is
            refused. Needed where the folder does not stand for them.
        every: steps between checkpoints, and between looks at whether the loss is finite; see
            :class:`hallulib.checkpoint.Due`.

    Raises:
        UserError: no step, no image in a batch, a checkpoint of other settings, or a loss that is
            no longer finite.

    Source:
        Ho et al. 2020 (loss, Adam 2e-4, clipping at 1); Ho & Salimans 2022, algorithm 1
        (dropped labels).
    """
    if steps < 1 or batch_size < 1:
        raise UserError(f"steps is {steps}, batch_size is {batch_size}; at least 1 is needed")
    device = images.device
    settings = dict(steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, p_uncond=p_uncond)
    settings |= dict(ema_decay=ema_decay, clip=clip, seed=seed, images=list(images.shape))
    settings |= dict(class_rate=class_rate) | (dict(identity=identity) if identity else {})
    state = _start(model, steps, lr, class_rate, seed, device)
    if folder is not None:
        checkpoint.resume(state, Path(folder), settings)
    y = torch.full((len(images),), -1, device=device) if labels is None else labels
    y = torch.where(y < 0, model.null, y)
    on_gpu = device.type == "cuda"
    loss_of = torch.compile(denoising_loss) if on_gpu else denoising_loss
    averaged, trained = list(state.ema.parameters()), list(model.parameters())
    due = checkpoint.Due(every, steps)

    if state.step == steps:  # killed between its last step and what the caller does with it
        yield state
    while state.step < steps:
        rng, n = state.rng, batch_size
        if weights is None:
            rows = torch.randint(len(images), (n,), generator=rng, device=device)
        else:
            rows = torch.multinomial(weights, n, replacement=True, generator=rng)
        t = stratified_times(n, model.sde.t_train, rng)
        eps = torch.randn((n, *images.shape[1:]), generator=rng, device=device)
        dropped = torch.rand(n, generator=rng, device=device) < p_uncond
        y_batch = torch.where(dropped, model.null, y[rows])
        mine, counts = parallel.share(n)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            of_each = loss_of(model, images[rows[mine]], t[mine], eps[mine], y_batch[mine])
        loss = of_each.mean()
        loss.backward()
        loss = parallel.combine(trained, loss, counts)
        torch.nn.utils.clip_grad_norm_(trained, clip)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["rate"] * min(1.0, (state.step + 1) / max(warmup, 1))
        state.optimizer.step()
        state.optimizer.zero_grad()
        decay = min(ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        state.losses[state.step] = loss
        state.step += 1
        if due(state.step):
            _check_finite(state)
            if folder is not None:
                log = {"loss": state.losses[: state.step].tolist()}
                checkpoint.write(Path(folder), state.tensors(), state.step, settings, log)
        yield state


def _start(
    model: ScoreModel,
    steps: int,
    lr: float,
    class_rate: float | int,
    seed: int,
    device: torch.device,
) -> State:
    model.train()
    model.to(memory_format=torch.channels_last)  # a step takes 0.73 of the time on a CPU too
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # any network may be trained; one without class vectors has a single group
    rates = {1.0: [], class_rate: []}
    for name, p in model.named_parameters():
        rates[class_rate if name == "network.classes.weight" else 1.0].append(p)
    groups = [dict(params=params, rate=rate) for rate, params in rates.items() if params]
    optimizer = torch.optim.Adam(groups, lr=lr, fused=device.type == "cuda")
    rng = torch.Generator(device).manual_seed(seed)
    return State(model, ema, optimizer, rng, torch.full((steps,), torch.nan, device=device))


def _check_finite(state: State) -> None:
    bad = (~torch.isfinite(state.losses[: state.step])).nonzero()
    if len(bad):
        raise UserError(
            f"the loss is not finite from step {int(bad[0]) + 1} on; "
            "a lower learning rate or images without holes are needed"
        )


def pretrained(
    images: ImageSet,
    *,
    scheme: str | None = None,
    steps: int,
    batch_size: int = 32,
    lr: float = 4e-4,
    width: int = 32,
    seed: int = 0,
    device: str | None = None,
    from_scratch: bool = False,
) -> tuple[ScoreModel, Path]:
    """The class-conditional score model of an image set: found by its settings, or trained now.

    It learns from the images without labels and from the split ``train``; where there are both,
    half of every batch comes from each. Validation and test images are never seen.

    Args:
        images: an open image set.
        scheme: the label column that conditions the model; ``None`` makes it unconditional.
        steps: optimiser steps.
        batch_size: images per step.
        lr: Adam's learning rate.
        width: of the network, see :func:`hallulib.unet.build`.
        seed: of the initial weights and of every draw.
        device: where to train and to leave the model; a GPU if there is one.
        from_scratch: train even if such a model is there.

    Returns:
        The averaged model in evaluation mode, and the folder of its run.

    Raises:
        UserError: no image to train on.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    labels = images.classes(scheme) if scheme else ()

    def start(folder: Path) -> Iterator[State]:
        x, y, weights = training_images(images, scheme)
        model = unet.build(
            size=images.size, channels=images.channels, labels=labels, width=width, seed=seed
        ).to(device)
        return pretrain(
            model,
            x.to(device),
            y.to(device),
            weights=weights.to(device),
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            folder=folder,
        )

    folder = runs.kept(
        f"score-{images.name}",
        start,
        lambda state, folder: unet.save(state.ema, folder),
        told=f"training on {images.name}",
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        scheme=scheme,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        width=width,
        seed=seed,
    )
    return unet.load(folder).to(device), folder


def training_images(
    images: ImageSet, scheme: str | None
) -> tuple[Images, Labels, Float[Tensor, " batch"]]:
    """Unlabelled and training images, class indices (-1 unlabelled) and how often to draw each."""
    rows = images.table["split"].isin(["unlabelled", "train"]).to_numpy().nonzero()[0]
    if not len(rows):
        raise UserError(f"{images.name} has no image in the splits unlabelled and train")
    chosen = images.select(rows=rows)
    y = chosen.labels(scheme) if scheme else torch.full((len(chosen),), -1)
    labelled = y >= 0
    weights = torch.where(labelled, 1 / labelled.sum(), 1 / (~labelled).sum())
    return chosen.tensor(), y, weights


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or as :func:`hallulib.commands.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m hallulib.train",
        description="Train the score model of an image set where chapters with these settings "
        "find it, on several GPUs with: accelerate launch -m hallulib.train ...",
    )
    parser.add_argument("dataset", help="image set: a name or a folder")
    parser.add_argument("--scheme", default="auto", help="label column; auto is the set's first")
    parser.add_argument("--size", type=int, help="side the images are reduced to, pixels")
    for name, value in dict(steps=4000, batch_size=32, width=32, seed=0).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=value, help=f"default: {value}")
    options = parser.parse_args(arguments)
    return commands.run(lambda: _train(**vars(options)))


def _train(dataset: str, size: int | None, scheme: str | None, **settings: int) -> int:
    rules = dict(steps=(1, None), batch_size=(1, None), width=(8, None), seed=parameters.SEEDS)
    parameters.check(settings, **rules)
    images = data.open(dataset, size)
    if scheme == "auto":
        scheme = (images.schemes or (None,))[0]
    _, folder = pretrained(images, scheme=scheme, **settings)
    if parallel.is_main():
        print(f"the score model is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
