r"""Training of an autoencoder: pixels, edges, the divergence of its latents, and a critic.

No trained network is asked what looks right, in contrast to a perceptual loss: edges are compared
at three resolutions (`sharpness`), and an adversary that judges patches may be added (`critic`).

Source:
    Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022, appendix
    G, https://arxiv.org/abs/2112.10752.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError, checkpoint, parallel, runs
from hallulib.autoencoder import Autoencoder, build, load, save
from hallulib.data import ImageSet
from hallulib.seeding import seeded
from hallulib.shapes import Images, PerImage

TERMS = ("pixels", "sharpness", "kl", "critic")


def sharpness(x: Images, y: Images, octaves: int = 3) -> PerImage:
    r"""How much edges differ: the mean absolute error of differences between neighbours.

    .. math:: \sum_{o=0}^{2} \tfrac12 \left( \overline{|\partial_h (x_o - y_o)|}
              + \overline{|\partial_w (x_o - y_o)|} \right)

    over the full, half and quarter resolution: blur costs much here and little in the plain error.
    No trained network is asked, in contrast to a perceptual loss.

    Source: Mathieu et al., *Deep Multi-Scale Video Prediction Beyond Mean Square Error*, 2016,
    eq. (6), over octaves. https://arxiv.org/abs/1511.05440
    """
    off, total = x - y, x.new_zeros(len(x))
    for octave in range(octaves):
        off = F.avg_pool2d(off, 2) if octave else off
        edges = (off.diff(dim=2).abs(), off.diff(dim=3).abs())
        total = total + sum(e.flatten(1).mean(1) for e in edges) / 2
    return total


def critic(channels: int, width: int = 32) -> nn.Module:
    """A small convolutional judge of patches: real images should score above 1, others below -1.

    Source: Isola et al. 2017 (patches), https://arxiv.org/abs/1611.07004.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.GroupNorm(8, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 4, 1, 1),
    )


@dataclass
class State:
    """Everything a training is at one step.

    Attributes:
        model: the autoencoder being trained, not yet standardised.
        judge: the adversary of the ``critic`` term.
        optimizers: of the two, in this order.
        rng: where all randomness comes from.
        losses: the terms of `TERMS`, unweighted, for every step so far.
        step: optimiser steps taken.
    """

    model: Autoencoder
    judge: nn.Module
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    rng: torch.Generator
    losses: Float[Tensor, "steps terms"]
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        found = {"rng": self.rng.get_state(), "losses": self.losses}
        for name, module, optimizer in self._parts():
            found |= checkpoint.named(name, module.state_dict())
            found |= checkpoint.named(f"{name}-moments", checkpoint.moments(optimizer))
        return found

    def load_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take on a state that ``tensors`` wrote."""
        for name, module, optimizer in self._parts():
            module.load_state_dict(checkpoint.part(name, tensors))
            checkpoint.load_moments(optimizer, checkpoint.part(f"{name}-moments", tensors))
        self.rng.set_state(tensors["rng"].cpu())
        self.losses.copy_(tensors["losses"])
        self.step = step

    def _parts(self):
        return zip(("model", "judge"), (self.model, self.judge), self.optimizers, strict=True)


def train(
    model: Autoencoder,
    images: Images,
    *,
    steps: int,
    batch_size: int = 16,
    lr: float = 1e-3,
    sharpness_weight: float = 0.5,
    kl_weight: float = 1e-4,
    critic_weight: float = 0.0,
    critic_start: float = 0.5,
    seed: int = 0,
    folder: Path | None = None,
    every: int = 200,
) -> Iterator[State]:
    r"""Train an autoencoder, one yielded state per step.

    .. math:: \overline{|x - \hat x|} + \lambda_s\,\mathrm{sharpness}
              + \lambda_k\,\tfrac1d\,\mathrm{KL}(q(z \mid x) \,\|\, \mathcal N(0, 1))
              - \lambda_c\,\overline{D(\hat x)}

    with d the entries of the latent and D the `critic`, which learns with the hinge loss.

    Args:
        model: trained in place, on the images' device.
        images: in [-1, 1].
        steps: optimiser steps in the whole run; the rate falls to 0 along a cosine.
        batch_size: images per step.
        lr: Adam's highest learning rate.
        sharpness_weight: of `sharpness`.
        kl_weight: of the divergence per latent entry.
        critic_weight: of the adversarial term; 0 leaves it out.
        critic_start: share of the steps after which it sets in.
        seed: of every draw.
        folder: of the checkpoint, which is resumed where there is one.
        every: steps between checkpoints, see :class:`hallulib.checkpoint.Due`.

    Raises:
        UserError: images that do not suit the network, or a checkpoint of other settings.

    Source: Rombach et al. 2022, appendix G (terms); Lim & Ye 2017 (hinge).
    """
    model.check(images)
    model.train().to(memory_format=torch.channels_last)
    with seeded(seed):
        judge = critic(images.shape[1]).to(images.device)
    networks = (model, judge)
    optimizers = tuple(torch.optim.Adam(n.parameters(), lr, betas=(0.5, 0.9)) for n in networks)
    rng = torch.Generator(images.device).manual_seed(seed)
    state = State(
        model, judge, optimizers, rng, torch.full((steps, len(TERMS)), torch.nan).to(images.device)
    )
    weights = dict(sharpness=sharpness_weight, kl=kl_weight, critic=critic_weight)
    settings = dict(steps=steps, batch_size=batch_size, lr=lr, critic_start=critic_start)
    settings |= dict(seed=seed, weights=weights, images=list(images.shape))
    if folder is not None:
        checkpoint.resume(state, Path(folder), settings)
    due = checkpoint.Due(every, steps)
    if state.step == steps:  # killed between its last step and what the caller does with it
        yield state
    while state.step < steps:
        x = images[torch.randint(len(images), (batch_size,), generator=rng, device=images.device)]
        judged = critic_weight > 0 and state.step >= critic_start * steps
        rate = lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * state.step / steps)).item())
        state.losses[state.step] = _step(state, x, weights, judged, rate)
        state.step += 1
        if folder is not None and due(state.step):
            log = dict(zip(TERMS, state.losses[: state.step].T.tolist(), strict=True))
            checkpoint.write(Path(folder), state.tensors(), state.step, settings, log)
        yield state


def _step(state: State, x: Images, weights: dict, judged: bool, rate: float) -> Tensor:
    """One step of the autoencoder and, where it judges, one of the critic; the terms."""
    kl, (optimizer, judging) = state.model.kl, state.optimizers
    mine, counts = parallel.share(len(x))
    n, x = len(x), x[mine]
    for group in (*optimizer.param_groups, *judging.param_groups):
        group["lr"] = rate
    posterior = kl.encode(x).latent_dist
    noise = torch.randn((n, *state.model.shape), generator=state.rng, device=x.device)
    again = kl.decode(posterior.mean + posterior.std * noise[mine]).sample
    spread = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    terms = dict(pixels=(x - again).abs().mean(), sharpness=sharpness(x, again).mean())
    terms |= dict(kl=spread.mean(), critic=x.new_zeros(()))
    if judged:
        terms["critic"] = -state.judge(again).mean()
    loss = terms["pixels"] + sum(w * terms[name] for name, w in weights.items())
    loss.backward()
    told = torch.stack([terms[name].detach() for name in TERMS])
    told = parallel.combine(state.model.parameters(), told, counts)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    state.judge.zero_grad()
    if judged:
        real, false = state.judge(x), state.judge(again.detach())
        loss = F.relu(1 - real).mean() + F.relu(1 + false).mean()
        loss.backward()
        parallel.combine(state.judge.parameters(), loss, counts)
        judging.step()
        judging.zero_grad()
    return told


def pretrained(
    images: ImageSet,
    *,
    steps: int,
    batch_size: int = 16,
    lr: float = 1e-3,
    width: int = 32,
    latent_channels: int = 4,
    factor: int = 4,
    critic_weight: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    from_scratch: bool = False,
) -> tuple[Autoencoder, Path]:
    """The autoencoder of an image set: found by its settings, or trained now, standardised.

    It learns from the images without labels, or from the split ``train`` where there are none;
    validation and test images are never seen.

    Args:
        images: an open image set.
        steps: optimiser steps.
        batch_size: images per step.
        lr: Adam's highest learning rate.
        width: see :func:`hallulib.autoencoder.build`.
        latent_channels: of the latent.
        factor: pixels along each side of a latent position.
        critic_weight: of the adversarial term, see `train`.
        seed: of weights and draws.
        device: where to train and to leave it; a GPU if there is one.
        from_scratch: train even if such a model is there.

    Returns:
        The model in evaluation mode, and the folder of its run.

    Raises:
        UserError: no image to train on.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = dict(width=width, latent_channels=latent_channels, factor=factor)
    settings = dict(steps=steps, batch_size=batch_size, lr=lr, critic_weight=critic_weight)

    def start(folder: Path) -> Iterator[State]:
        model = build(size=images.size, channels=images.channels, seed=seed, **shape).to(device)
        x = unlabelled(images).to(device)
        return train(model, x, folder=folder, seed=seed, **settings)

    def keep(state: State, folder: Path) -> None:
        x = unlabelled(images)
        x = x[:: max(1, len(x) // 1000)].to(device)
        save(state.model.eval().standardise(x), folder)

    folder = runs.kept(
        f"autoencoder-{images.name}",
        start,
        keep,
        told=f"encoding {images.name}",
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        seed=seed,
        **shape,
        **settings,
    )
    return load(folder).to(device), folder


def unlabelled(images: ImageSet) -> Images:
    """What may be learnt from without labels: that split, or ``train`` where it is empty.

    Raises:
        UserError: neither split has an image.
    """
    for split in ("unlabelled", "train"):
        if (images.table["split"] == split).any():
            return images.select(split).tensor()
    raise UserError(f"{images.name} has no image in the splits unlabelled and train")
