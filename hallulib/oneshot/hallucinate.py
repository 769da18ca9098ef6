r"""Where extra supports come from: a score model that learns an episode, or its controls.

A `Source` is asked for n more images of each class of an episode. Real images are the ceiling of
any generator (`Oracle`), remembered and changed ones are the cheap way (`ClassMemory`, `Changed`).
A `Hallucinator` learns the support,

.. math:: \theta \leftarrow \theta - \eta\,\nabla_\theta\,\mathrm{E}_{t, \epsilon}\,
          \lVert v_\theta(x_t, t, y) - v \rVert^2 \quad \text{on the support and its classes } y,

and makes more of it.

Source: Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024; guidance: Ho & Salimans 2022.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hallulib import UserError
from hallulib.data.changes import CHANGES
from hallulib.data.imageset import ImageSet
from hallulib.diffusion.sample import SAMPLERS, draw
from hallulib.diffusion.score import ScoreModel, stratified_times
from hallulib.diffusion.train import descend
from hallulib.oneshot.episodes import Episode, images_at, unasked
from hallulib.shapes import Labels, Shots
from hallulib.storage.checkpoint import Stateful
from hallulib.storage.settings import Amount, Count, Positive, Share, ShareAbove0, check, one_of

CONTROLS = ("oracle", "memory", *CHANGES)


class Source(Stateful):
    """Makes more supports; a source that has nothing to learn only needs ``make``."""

    per_class = True  # the images of a class depend on its own support alone: see `evaluate`

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """``n`` more images of each class, in [-1, 1]; the first do not depend on ``n``. A
        `UserError` if it has not so many of a class, or does not know the class.
        """
        raise NotImplementedError

    def adapt(self, episode: Episode, support: Shots, seed: int) -> Float[Tensor, ""]:
        """Learn from an episode, before ``make``; the loss, or nan where nothing is learnt."""
        return torch.tensor(torch.nan)

    def undone(self) -> contextlib.AbstractContextManager:
        """A context at whose end everything is as it was before."""
        return contextlib.nullcontext()

    def parts(self) -> dict[str, object]:
        """Nothing that training changes."""
        return {}


class Oracle(Source):
    """Spare real images of the episode, from its own split: the ceiling of any generator."""

    def __init__(self, images: ImageSet):
        self.images = images

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """The episode's spare images."""
        found = episode.spare.shape[1]
        if found < n:
            raise UserError(f"an oracle needs {n} spare images per class; the episode has {found}")
        return images_at(self.images, episode.spare[:, :n]).to(support)


class ClassMemory(Source):
    """Real images that the class has in the split ``train``: what a generator could remember."""

    def __init__(self, images: ImageSet, scheme: str):
        self.images = images
        labels = images.table[scheme].where(images.table["split"] == "train", "")
        self.rows = {c: np.flatnonzero(labels == c) for c in images.classes(scheme)}

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Training images of each class, drawn without replacement."""
        rng, chosen = np.random.default_rng(seed), []
        for name in episode.classes:
            rows = self.rows.get(name, ())
            if len(rows) < n:
                raise UserError(
                    f"{self.images.name}: a memory of class {name!r} needs {n} images in the split"
                    f" train; there are {len(rows)}"
                )
            chosen.append(rng.permutation(rows)[:n])
        return images_at(self.images, np.stack(chosen)).to(support)


class Changed(Source):
    """Copies of the support, each changed at random in one of the ways of ``CHANGES``."""

    def __init__(self, change: str):
        self.change = CHANGES[change]

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """The j-th copy is one of the j-th support, counted round and round."""
        rngs, k = [torch.Generator().manual_seed(seed + j) for j in range(n)], support.shape[1]
        made = [self.change(support[:, j % k], rng) for j, rng in enumerate(rngs)]
        return torch.stack(made, 1)


def control(name: str, images: ImageSet, scheme: str) -> Source:
    """A source that needs no training, by its name in ``CONTROLS``."""
    if name == "oracle":
        return Oracle(images)
    return ClassMemory(images, scheme) if name == "memory" else Changed(name)


@dataclass(frozen=True)
class Recipe:
    """How supports are hallucinated: the choices that the paper leaves open.

    An unknown name or an impossible number raises a `UserError`.

    Attributes:
        adapt_steps: Adam's steps per episode, at test too; 0 keeps the generator as it is.
        lr: of Adam; the paper's "20^-4" is read as 2e-4.
        copies: noised copies of each support image in such a step.
        p_uncond: chance that the class is dropped there, which guidance needs.
        guidance_scale: see `hallulib.diffusion.score.guided`; 1 is plain conditional sampling.
        start_time: 1 generates from noise, less from the support noised to that time.
        sampler, sampler_steps: a name in `hallulib.diffusion.sample.SAMPLERS`, and its steps.
    """

    adapt_steps: Count = 1
    lr: Amount = 2e-4
    copies: Positive = 2
    p_uncond: Share = 0.1
    guidance_scale: Amount = 2.0
    start_time: ShareAbove0 = 1.0
    sampler: Annotated[str, one_of(SAMPLERS)] = "dpm_solver"
    sampler_steps: Positive = 5

    def __post_init__(self):
        check(self)


class Hallucinator(Source):
    """A pretrained score model that learns from episodes and makes more of their supports."""

    def __init__(self, model: ScoreModel, recipe: Recipe):
        # a quarter faster, on a CPU too
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.optimizer = torch.optim.Adam(model.requires_grad_().parameters(), lr=recipe.lr)
        # where a test episode is learnt, it has to be made by itself
        self.per_class = recipe.adapt_steps == 0

    def adapt(self, episode: Episode, support: Shots, seed: int) -> Float[Tensor, ""]:
        """Steps on the support alone; the denoising loss before the last one, nan without steps. A
        `UserError` for a class that the model does not know.
        """
        y, copies = self._classes(episode), self.recipe.copies
        loss, rng = torch.tensor(torch.nan), torch.Generator(y.device).manual_seed(seed)
        x_0 = support.flatten(0, 1).repeat_interleave(copies, 0)
        y = y.repeat_interleave(support.shape[1] * copies)
        for _ in range(self.recipe.adapt_steps):
            t = stratified_times(len(x_0), self.model.sde.t_train, rng)
            # strata follow the order of the images: each image gets times from all over
            t = t[torch.randperm(len(t), generator=rng, device=t.device)]
            loss = descend(self.model, self.optimizer, x_0, y, t, rng, self.recipe.p_uncond)
        return loss

    @torch.no_grad()
    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Images of each class, hallucinated by the present weights. The first do not depend on
        ``n`` with ``heun`` and ``dpm_solver``, on a CPU; the others draw noise for all on the way.
        """
        recipe, starts = self.recipe, None
        if recipe.start_time < 1:
            rounds = torch.arange(n) % support.shape[1]
            starts = support[:, rounds].transpose(0, 1).flatten(0, 1)
        made = draw(
            self.model,
            self._classes(episode).repeat(n),
            sampler=recipe.sampler,
            steps=recipe.sampler_steps,
            guidance_scale=recipe.guidance_scale,
            images=starts,
            start_time=recipe.start_time,
            seed=seed,
        )
        # drawn shot by shot: the first shots stay the same when more are asked for
        return made.unflatten(0, (n, len(episode.classes))).transpose(0, 1)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever is learnt inside is undone at the end: no test episode leaks into the next."""
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            yield
        finally:
            self.load_state_dict(before)

    def parts(self) -> dict[str, object]:
        """All that training changes."""
        return {"model": self.model, "adam": self.optimizer}

    def _classes(self, episode: Episode) -> Labels:
        return self.model.index(episode.classes).to(next(self.model.parameters()).device)


class Pool(Source):
    """Draws from images that a hallucinator makes once, when they are first needed. Where episodes
    are not learnt and images start from noise, hallucinations of all episodes are independent
    draws from one law for each class, so thousands of them can share ``size`` a class.
    """

    def __init__(self, hallucinator: Hallucinator, size: int, seed: int = 0):
        self.hallucinator, self.size, self.seed = hallucinator, size, seed
        self.images: Shots | None = None

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Images of the pool, drawn without replacement for each class of the episode."""
        if n > self.size:
            raise UserError(f"{n} images per class asked of a pool of {self.size}")
        model = self.hallucinator.model
        if self.images is None:
            blank = support.new_zeros(len(model.labels), 1, *support.shape[2:])
            every = unasked(model.labels)
            self.images = self.hallucinator.make(every, blank, self.size, self.seed)
        rng, classes = np.random.default_rng(seed), model.index(episode.classes)
        chosen = np.stack([rng.permutation(self.size)[:n] for _ in classes])
        return self.images[classes[:, None], torch.as_tensor(chosen)].to(support)

    def parts(self) -> dict[str, object]:
        """The images, once they are there."""
        return {} if self.images is None else {"images": self.images}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take on images that may be there or not."""
        self.images = tensors.get("images")
