r"""Hallucinated supports: a score model learns an episode's support and makes more of each class.

What tells the generator its class is either an index,

.. math:: \epsilon_\theta(x_t, t, y), \qquad
          \theta \leftarrow \theta - \eta\,\nabla_\theta\,\mathrm{E}_{t, \epsilon}\,
          \lVert v_\theta(x_t, t, y) - v \rVert^2 \quad \text{on the support},

as published, or (beyond the paper) an embedding :math:`e_\phi(\text{support})`, trained so that
from one image of a class the model denoises *other* images of it. The second needs no step of
training at a test episode and serves classes that were never seen.

Source:
    Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024; guidance: Ho & Salimans 2022;
    low-rank changes: Hu et al. 2021, https://arxiv.org/abs/2106.09685; conditioning on a set:
    Giannone et al., *Few-Shot Diffusion Models*, 2022, https://arxiv.org/abs/2205.15463.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError, checkpoint, parallel
from hallulib.adaptation import ADAPTS, SupportEncoder, adaptable, relabelled
from hallulib.episodes import Episode
from hallulib.sample import SAMPLERS, draw
from hallulib.score import ScoreModel, denoising_loss, stratified_times
from hallulib.settings import Amount, Count, Positive, Share, ShareAbove0, check, one_of
from hallulib.shapes import Images, Labels
from hallulib.supports import Shots, Source, check_support

__all__ = ["Hallucinator", "Pool", "Recipe", "check_pool", "relabelled"]


@dataclass(frozen=True)
class Recipe:
    """How supports are hallucinated: the choices that the paper leaves open.

    Attributes:
        condition: what the generator is told: the ``"class"`` or the ``"support"`` images.
        adapt: weights that learn: ``"all"``, the ``"classes"`` vectors alone, or ``"low_rank"``
            changes of all matrices and the class vectors.
        rank: of the low-rank changes.
        adapt_steps: Adam's steps per episode, at test too if the condition is the class; 0 keeps
            the generator as it is.
        lr: of Adam; the paper's "20^-4" is read as 2e-4.
        copies: noised copies of each support image in such a step; a step that is conditioned on
            the support takes each query once.
        p_uncond: chance that the condition is dropped there, which guidance needs.
        guidance_scale: see :func:`hallulib.score.guided`; 1 is plain conditional sampling.
        start_time: 1 generates from noise, less from the support noised to that time.
        sampler: a name in :data:`hallulib.sample.SAMPLERS`.
        sampler_steps: of the sampler.

    Raises:
        UserError: an unknown name or an impossible number.
    """

    condition: one_of(("class", "support")) = "class"
    adapt: one_of(ADAPTS) = "all"
    rank: Positive = 4
    adapt_steps: Count = 1
    lr: Amount = 2e-4
    copies: Positive = 2
    p_uncond: Share = 0.1
    guidance_scale: Amount = 2.0
    start_time: ShareAbove0 = 1.0
    sampler: one_of(SAMPLERS) = "dpm_solver"
    sampler_steps: Positive = 5

    def __post_init__(self):
        check(self)


class Hallucinator(Source):
    """A score model that learns from episodes and makes more of their supports.

    Args:
        model: the pretrained score model; changed in place.
        recipe: how it learns and generates.
        seed: of the initial values of whatever the recipe adds to the model.
    """

    def __init__(self, model: ScoreModel, recipe: Recipe | None = None, *, seed: int = 0):
        # a quarter faster, on a CPU too
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.recipe = recipe or Recipe()
        weights = adaptable(model, self.recipe.adapt, self.recipe.rank, seed)
        self.encoder = None
        if self.recipe.condition == "support":
            channels, embedding = model.network.shape[0], model.network.classes.embedding_dim
            self.encoder = SupportEncoder(channels, embedding, seed=seed)
            self.encoder.to(weights[0].device)
            weights += self.encoder.parameters()
        self.optimizer = torch.optim.Adam(weights, lr=self.recipe.lr)
        # where a test episode is learnt, it has to be made by itself
        self.per_class = self.encoder is not None or self.recipe.adapt_steps == 0

    def learn(
        self, episode: Episode, support: Shots, query: Images, seed: int
    ) -> Float[Tensor, ""]:
        """The steps of one training episode, which stay.

        Conditioned on the class, the support is learnt; conditioned on the support, it is the
        queries, each from the support of its class.

        Returns:
            The denoising loss before the last step, nan without steps.

        Raises:
            UserError: a class that the model does not know, a support that is not finite.
        """
        if self.encoder is None:
            return self.adapt(episode, support, seed)
        check_support(episode, support)
        loss, rng = torch.tensor(torch.nan), self._rng(seed)
        answers = torch.as_tensor(episode.answers, device=query.device)
        for _ in range(self.recipe.adapt_steps):
            loss = self._step(query, self._embedding(support)[answers], rng)
        return loss

    def adapt(self, episode: Episode, support: Shots, seed: int) -> Float[Tensor, ""]:
        """Steps on the support alone, images and their classes.

        With the support itself as the condition there is nothing to learn from it.

        Returns:
            The denoising loss before the last step, nan without steps.

        Raises:
            UserError: a class that the model does not know, a support that is not finite.
        """
        if self.encoder is not None:
            return torch.tensor(torch.nan)
        check_support(episode, support)
        loss, rng = torch.tensor(torch.nan), self._rng(seed)
        y = self._classes(episode).repeat_interleave(support.shape[1])
        copies = self.recipe.copies
        for _ in range(self.recipe.adapt_steps):
            x_0 = support.flatten(0, 1).repeat_interleave(copies, 0)
            loss = self._step(x_0, y.repeat_interleave(copies), rng)
        return loss

    @torch.no_grad()
    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Images of each class, hallucinated by the present weights.

        The first images do not depend on ``n`` with ``heun`` and ``dpm_solver``, on a CPU; the
        other samplers draw noise for all images on the way.

        Raises:
            UserError: a class that the model does not know, a support that is not finite.
        """
        check_support(episode, support)
        recipe, (n_way, k_shot) = self.recipe, support.shape[:2]
        condition = self._classes(episode) if self.encoder is None else self._embedding(support)
        starts = None
        if recipe.start_time < 1:
            starts = support[:, torch.arange(n) % k_shot].transpose(0, 1).flatten(0, 1)
        made = draw(
            self.model,
            condition.repeat(n, *[1] * (condition.ndim - 1)),
            sampler=recipe.sampler,
            steps=recipe.sampler_steps,
            guidance_scale=recipe.guidance_scale,
            images=starts,
            start_time=recipe.start_time,
            seed=seed,
        )
        # drawn shot by shot: the first shots stay the same when more are asked for
        return made.unflatten(0, (n, n_way)).transpose(0, 1)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever is learnt inside is undone at the end: no test episode leaks into the next."""
        before = {name: value.clone() for name, value in self.tensors().items()}
        try:
            yield
        finally:
            self.load_tensors(before)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        found = checkpoint.named("model", self.model.state_dict())
        if self.encoder is not None:
            found |= checkpoint.named("encoder", self.encoder.state_dict())
        return found | checkpoint.named("adam", checkpoint.moments(self.optimizer))

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take on what ``tensors`` wrote.

        Raises:
            RuntimeError: the tensors are of another model or another recipe.
        """
        self.model.load_state_dict(checkpoint.part("model", tensors))
        if self.encoder is not None:
            self.encoder.load_state_dict(checkpoint.part("encoder", tensors))
        checkpoint.load_moments(self.optimizer, checkpoint.part("adam", tensors))

    def _classes(self, episode: Episode) -> Labels:
        return self.model.index(episode.classes).to(self.model.network.classes.weight.device)

    def _embedding(self, support: Shots) -> Float[Tensor, "n_way embedding"]:
        return self.encoder(support.flatten(0, 1)).unflatten(0, support.shape[:2]).mean(1)

    def _rng(self, seed: int) -> torch.Generator:
        return torch.Generator(self.model.network.classes.weight.device).manual_seed(seed)

    def _step(
        self, x_0: Images, y: Labels | Float[Tensor, "batch embedding"], rng: torch.Generator
    ) -> Float[Tensor, ""]:
        """One step of Adam on the denoising loss, conditions dropped now and then."""
        t = stratified_times(len(x_0), self.model.sde.t_train, rng)
        # strata follow the order of the images: each image gets times from all over
        t = t[torch.randperm(len(t), generator=rng, device=t.device)]
        eps = torch.randn(x_0.shape, generator=rng, device=x_0.device)
        dropped = torch.rand(len(x_0), generator=rng, device=x_0.device) < self.recipe.p_uncond
        if y.is_floating_point():
            y = y.masked_fill(dropped[:, None], 0)
        else:
            y = y.masked_fill(dropped, self.model.null)
        self.optimizer.zero_grad()
        mine, counts = parallel.share(len(x_0))
        loss = denoising_loss(self.model, x_0[mine], t[mine], eps[mine], y[mine]).mean()
        loss.backward()
        weights = self.optimizer.param_groups[0]["params"]
        loss = parallel.combine(weights, loss, counts)
        nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimizer.step()
        return loss


def check_pool(recipe: Recipe) -> None:
    """Refuse a recipe whose images depend on more than the class.

    Raises:
        UserError: they depend on the episode.
    """
    if recipe.condition != "class" or recipe.adapt_steps or recipe.start_time < 1:
        raise UserError(
            f"a pool of images found with condition={recipe.condition}"
            f" adapt_steps={recipe.adapt_steps} start_time={recipe.start_time}; its images are to"
            " depend on nothing but the class: condition=class adapt_steps=0 start_time=1"
        )


class Pool(Source):
    """Draws from images that a hallucinator makes once, when they are first needed.

    Where the condition is the class alone and episodes are not learnt, hallucinations of all
    episodes are independent draws from one law for each class, so thousands of episodes can share
    a pool at the cost of making it once.

    Args:
        hallucinator: conditioned on the class, from noise, without adaptation.
        size: images per class.
        seed: of the images.

    Raises:
        UserError: the images of the hallucinator depend on the episode.
    """

    def __init__(self, hallucinator: Hallucinator, size: int, seed: int = 0):
        check_pool(hallucinator.recipe)
        self.hallucinator, self.size, self.seed = hallucinator, size, seed
        self.images: Shots | None = None

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Images of the pool, drawn without replacement for each class of the episode.

        Raises:
            UserError: the pool holds fewer than ``n``.
        """
        if n > self.size:
            raise UserError(f"{n} images per class asked of a pool of {self.size}")
        if self.images is None:
            self.images = self._all(support)
        rng, classes = np.random.default_rng(seed), self.hallucinator.model.index(episode.classes)
        chosen = np.stack([rng.permutation(self.size)[:n] for _ in classes])
        return self.images[classes[:, None], torch.as_tensor(chosen)].to(support)

    def _all(self, like: Float[Tensor, "_ways _shots channels height width"]) -> Shots:
        """All images of the pool, class by class."""
        names = self.hallucinator.model.labels
        nothing = np.empty((len(names), 0), np.int64)
        every = Episode(names, nothing, nothing[0], nothing[0], nothing)
        blank = like.new_zeros(len(names), 1, *like.shape[2:])
        return self.hallucinator.make(every, blank, self.size, self.seed)

    def tensors(self) -> dict[str, Tensor]:
        """The images, once they are there."""
        return {} if self.images is None else {"images": self.images}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take on what ``tensors`` wrote."""
        self.images = tensors.get("images")
