"""Training loops as generators of their state, and checkpoints that resume to the same bytes."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError
from hallulib.data.imageset import ImageSet
from hallulib.diffusion import unet
from hallulib.diffusion.score import ScoreModel, denoising_loss, stratified_times
from hallulib.shapes import Images, Labels, PerImage, Times
from hallulib.storage import checkpoint, parallel, store

Loss = Callable[..., PerImage]  # `denoising_loss`, compiled or not
P_UNCOND = 0.1  # chance that a label is dropped, which trains the null class as well
MAX_NORM = 1.0  # of the gradient, which is scaled down to it
CLASS_RATE = 10  # of class vectors, see `pretrain`: at 1 samples show their class less surely
NEW_CLASSES = 25  # of those that a trained model has yet to learn


@dataclass
class State(checkpoint.Stateful):
    """Everything a training run is at one step; a checkpoint is this, written down.

    ``ema`` is the moving average of the model's weights, to sample from. ``losses``, one for each
    step so far, stay on the device: only who reads them waits for it.
    """

    model: ScoreModel
    ema: ScoreModel
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    losses: Float[Tensor, " steps"]
    step: int = 0

    def log(self) -> dict[str, list]:
        """The losses so far."""
        return {"loss": self.losses[: self.step].tolist()}

    def check(self) -> None:
        """Raises a `UserError` if a loss is not finite."""
        bad = (~torch.isfinite(self.losses[: self.step])).nonzero()
        if len(bad):
            raise UserError(
                f"the loss is not finite from step {int(bad[0]) + 1} on; "
                "a lower learning rate or images without holes are needed"
            )


def step(state: State, x_0: Images, y: Labels, ema_decay: float, loss_of: Loss) -> None:
    """One step of denoising score matching on a batch, and of the averaged weights."""
    model, rng = state.model, state.rng
    t = stratified_times(len(x_0), model.sde.t_train, rng)
    loss = descend(model, state.optimizer, x_0, y, t, rng, P_UNCOND, loss_of)
    state.losses[state.step] = loss
    decay = min(ema_decay, (1 + state.step) / (10 + state.step))
    weights: list[Tensor] = list(model.parameters())
    averages: list[Tensor] = list(state.ema.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(averages, weights, 1 - decay)


def descend(
    model: ScoreModel,
    optimizer: torch.optim.Optimizer,
    x_0: Images,
    y: Labels,
    t: Times,
    rng: torch.Generator,
    p_uncond: float | int,
    loss_of: Loss = denoising_loss,
) -> Float[Tensor, ""]:
    """One step down a batch's denoising loss, some classes dropped; returns the loss before it."""
    eps = torch.randn(x_0.shape, generator=rng, device=x_0.device)
    dropped = torch.rand(len(x_0), generator=rng, device=x_0.device) < p_uncond
    y = y.masked_fill(dropped, model.null)
    mine, counts = parallel.share(len(x_0))
    loss = loss_of(model, x_0[mine], t[mine], eps[mine], y[mine]).mean()
    loss.backward()
    loss = parallel.combine(model.parameters(), loss, counts)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss


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
    ema_decay: float = 0.999,
    seed: int = 0,
    folder: Path | None = None,
    identity: str = "",
    every: int = 500,
) -> Iterator[State]:
    r"""Train a score model by denoising score matching, one yielded state per step.

    The network runs channels last, on a GPU in bfloat16 and compiled; nothing here waits for the
    device. Several processes share each batch, see :mod:`hallulib.storage.parallel`.

    Args:
        model: trained in place.
        images: in [-1, 1], on the model's device.
        labels: class index per image, -1 where unlabelled; ``None`` is all unlabelled.
        steps: optimiser steps in the whole run.
        weights: how often to draw each image, relative to the others; equal unless given.
        batch_size: images per step, drawn with replacement.
        lr: Adam's learning rate, reached linearly over ``warmup`` steps.
        class_rate: rate of the class vectors as a multiple of ``lr``. New labels need more than 1:
            until their vectors have grown from zero, the other weights cannot tell classes apart.
        warmup: steps of the linear rise.
        ema_decay: of the averaged weights; early averages are shorter.
        seed: of every draw.
        folder: of the checkpoint and ``losses.csv``, see :func:`hallulib.storage.checkpoint.loop`.
        identity: of images and start, where the folder does not stand for them; a checkpoint of
            another is refused.
        every: steps between checkpoints, and between looks at whether the loss is finite.

    Raises:
        UserError: no step, an empty batch, another run's checkpoint, or a loss that is not finite.

    Source: Ho et al. 2020 (loss, clipping); Ho & Salimans 2022, algorithm 1 (dropped labels).
    """
    if steps < 1 or batch_size < 1:
        raise UserError(f"steps is {steps}, batch_size is {batch_size}; at least 1 is needed")
    device = images.device
    settings: dict[str, Any] = dict(steps=steps, batch_size=batch_size, lr=lr)
    settings |= dict(class_rate=class_rate, warmup=warmup, ema_decay=ema_decay, seed=seed)
    settings |= dict(images=list(images.shape)) | (dict(identity=identity) if identity else {})
    # in this layout a step takes 0.73 of the time, on a CPU too
    model.train().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    rng = torch.Generator(device).manual_seed(seed)
    losses = torch.full((steps,), torch.nan, device=device)
    start = State(model, ema, _adam(model, lr, class_rate), rng, losses)
    y = torch.full((len(images),), -1, device=device) if labels is None else labels
    y = torch.where(y < 0, model.null, y)
    loss_of: Loss = denoising_loss
    if device.type == "cuda":
        loss_of = torch.autocast("cuda", torch.bfloat16)(torch.compile(denoising_loss))

    def take(state: State) -> None:
        if weights is None:
            rows = torch.randint(len(images), (batch_size,), generator=state.rng, device=device)
        else:
            rows = torch.multinomial(weights, batch_size, replacement=True, generator=state.rng)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["rate"] * min(1.0, (state.step + 1) / max(warmup, 1))
        step(state, images[rows], y[rows], ema_decay, loss_of)

    return checkpoint.loop(
        start, take, steps=steps, every=every, look=State.check, folder=folder, settings=settings
    )


def _adam(model: ScoreModel, lr: float, class_rate: float | int) -> torch.optim.Adam:
    """Adam with a rate of their own for the class vectors, where the network has any."""
    rates: dict[float, list[nn.Parameter]] = {1.0: [], class_rate: []}
    for name, p in model.named_parameters():
        rates[class_rate if name == "network.classes.weight" else 1.0].append(p)
    groups = [dict(params=params, rate=rate) for rate, params in rates.items() if params]
    return torch.optim.Adam(groups, lr=lr, fused=next(model.parameters()).is_cuda)


def pretrained(
    images: ImageSet,
    *,
    scheme: str | None = None,
    steps: int,
    batch_size: int = 32,
    width: int = 32,
    seed: int = 0,
    begin: str = "nothing",
    device: str | None = None,
    from_scratch: bool = False,
) -> tuple[ScoreModel, Path]:
    """The class-conditional score model of an image set: found by its settings, or trained now.

    It learns from the images without labels and from the split ``train`` (a `UserError` if both
    are empty); where there are both, half of every batch comes from each. Validation and test
    images are never seen. Without ``scheme``, the label column, it is unconditional; it is trained
    on a GPU if there is one. It can ``begin`` from a model that learnt other images, and forgets
    their classes: from one that ships, by its name, or from the folder of a run (a `UserError` if
    size, channels or width are others). A class of which it sees no image has the vector of the
    null class. The averaged model is given, in evaluation mode, with the
    folder of its run.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    labels = images.classes(scheme) if scheme else ()
    settings: dict[str, Any] = dict(steps=steps, batch_size=batch_size, seed=seed)
    model = unet.build(
        size=images.size, channels=images.channels, labels=labels, width=width, seed=seed
    )
    if labels:
        settings["class_rate"] = CLASS_RATE if begin == "nothing" else NEW_CLASSES
    if begin != "nothing":
        origin = store.trained(begin)
        model, begin = _taught(model, origin), store.contents(origin)

    def start(folder: Path) -> Iterator[State]:
        x, y, weights = (part.to(device) for part in images.for_training(scheme))
        # the vector of a class without an image learns nothing: it is the null class's, not random
        absent = ~torch.isin(torch.arange(len(labels)), y.cpu())
        model.network.classes.weight.data[:-1][absent] = 0
        return pretrain(
            model.to(device), x, y, weights=weights, lr=4e-4, folder=folder, **settings
        )

    folder = store.kept(
        f"score-{images.name}",
        start,
        lambda state, folder: unet.save(state.ema, folder),
        told=f"training on {images.name}",
        defaults=pretrained,
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        scheme=scheme,
        width=width,
        begin=begin,
        **settings,
    )
    return unet.load(folder).to(device), folder


def _taught(model: ScoreModel, folder: Path) -> ScoreModel:
    """The model as one of the same shape has learnt it, but for the classes."""
    learnt = unet.relabelled(unet.load(folder), model.labels, forget=True)
    told = []
    for network in (learnt.network, model.network):
        width = network.unet.config["block_out_channels"][0]
        told.append(f"{network.shape[0]} channel(s), {network.shape[1]} pixels and width {width}")
    if told[0] != told[1]:
        raise UserError(
            f"{folder} is a score model of {told[0]}; one of {told[1]} is needed, or begin=nothing"
        )
    return learnt
