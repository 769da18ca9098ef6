"""Where extra supports come from: other real images, changed ones, or (`hallucinate`) new ones.

A source is asked for n more images of each class of an episode. Those here are what a generator is
compared with: real images are the ceiling, changed copies of the support are the cheap way.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hallulib import UserError
from hallulib.data import ImageSet
from hallulib.episodes import Episode
from hallulib.shapes import Images

Shots = Float[Tensor, "n_way _shots channels height width"]


class Source:
    """Makes more supports; a source that has nothing to learn only needs ``make``.

    Attributes:
        per_class: whether the images of a class depend on its own support alone, so that the
            classes of many episodes can be made in one call.
    """

    per_class = True

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """``n`` more images of each class; the first of them do not depend on ``n``.

        Args:
            episode: the classes, and the positions of all images of the task.
            support: the real images of each class, in [-1, 1].
            n: images per class.
            seed: of every draw.

        Raises:
            UserError: it has not so many images of a class.
        """
        raise NotImplementedError

    def learn(
        self, episode: Episode, support: Shots, query: Images, seed: int
    ) -> Float[Tensor, ""]:
        """Learn from a training episode.

        Args:
            episode: the classes, and the classes of the queries.
            support: the real images of each class, in [-1, 1].
            query: (n_queries, ...) images that a test episode would not show; ``make`` is to
                help with such ones.
            seed: of every draw.

        Returns:
            The loss, or nan where nothing is learnt.
        """
        return torch.tensor(torch.nan)

    def adapt(self, episode: Episode, support: Shots, seed: int) -> None:
        """Learn from the support of an episode outside of the training, before ``make``."""

    def undone(self) -> contextlib.AbstractContextManager:
        """A context at whose end everything is as it was before."""
        return contextlib.nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take on what ``tensors`` wrote."""


def check_support(episode: Episode, support: Shots) -> None:
    """Refuse a support with holes.

    Args:
        episode: names its classes.
        support: the real images of each class.

    Raises:
        UserError: a pixel is not a finite number.
    """
    holes = (~torch.isfinite(support)).flatten(2).any(2).nonzero()
    if len(holes):
        c, i = holes[0].tolist()
        raise UserError(
            f"support image {i + 1} of class {episode.classes[c]!r} has pixels that are no"
            " numbers; finite images in [-1, 1] are needed"
        )


class Oracle(Source):
    """Other real images of the class, from the episode's own split: the ceiling of any generator.

    Args:
        images: the image set that the episodes were drawn from, with spare images.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """The episode's spare images.

        Raises:
            UserError: the episode has fewer.
        """
        found = episode.spare.shape[1]
        if found < n:
            raise UserError(f"an oracle needs {n} spare images per class; the episode has {found}")
        rows = episode.spare[:, :n]
        return self.images.tensor(rows.ravel()).unflatten(0, rows.shape).to(support)


class ClassMemory(Source):
    """Real images that the class has in the split ``train``: what a generator could remember.

    Args:
        images: the whole image set.
        scheme: the label column of the episodes.
    """

    def __init__(self, images: ImageSet, scheme: str):
        self.images = images
        labels = images.table[scheme].where(images.table["split"] == "train", "")
        self.rows = {c: np.flatnonzero(labels == c) for c in images.classes(scheme)}

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """Training images of each class, drawn without replacement.

        Raises:
            UserError: a class has fewer.
        """
        rng, chosen = np.random.default_rng(seed), []
        for name in episode.classes:
            rows = self.rows.get(name, ())
            if len(rows) < n:
                raise UserError(
                    f"{self.images.name}: a memory of class {name!r} needs {n} images in the split"
                    f" train; there are {len(rows)}"
                )
            chosen.append(rng.permutation(rows)[:n])
        rows = np.stack(chosen)
        return self.images.tensor(rows.ravel()).unflatten(0, rows.shape).to(support)


class Changed(Source):
    """Copies of the support, each changed at random: flips, shifts, jitter, mixup, or all.

    Args:
        change: a name in ``CHANGES``.

    Raises:
        UserError: an unknown change.
    """

    def __init__(self, change: str):
        if change not in CHANGES:
            raise UserError(f"no change {change!r} of supports; known: {', '.join(CHANGES)}")
        self.change = CHANGES[change]
        self.per_class = change != "mixup"

    def make(self, episode: Episode, support: Shots, n: int, seed: int) -> Shots:
        """The j-th copy is one of the j-th support, counted round and round."""
        k_shot = support.shape[1]
        copies = []
        for j in range(n):
            rng = torch.Generator().manual_seed(seed + j)
            copies.append(self.change(support[:, j % k_shot], support, rng))
        return torch.stack(copies, 1)


def _uniform(
    n: int, low: float, high: float, rng: torch.Generator, like: Images
) -> Float[Tensor, "n 1 1 1"]:
    return (low + (high - low) * torch.rand(n, generator=rng)).to(like).view(-1, 1, 1, 1)


def flipped(x: Images, support: Shots, rng: torch.Generator) -> Images:
    """Mirrored left to right; no other axis of the body is symmetric."""
    return x.flip(-1)


def shifted(x: Images, support: Shots, rng: torch.Generator) -> Images:
    """Moved by up to a tenth of the side, the edge pixels repeated."""
    most = max(1, x.shape[-1] // 10)
    padded = torch.nn.functional.pad(x, (most,) * 4, mode="replicate")
    corners = torch.randint(2 * most + 1, (len(x), 2), generator=rng).tolist()
    side = x.shape[-1]
    return torch.stack(
        [p[:, i : i + side, j : j + side] for p, (i, j) in zip(padded, corners, strict=True)]
    )


def jittered(x: Images, support: Shots, rng: torch.Generator) -> Images:
    """With white noise of standard deviation 0.1, in a range of 2."""
    return (x + 0.1 * torch.randn(x.shape, generator=rng).to(x)).clamp(-1, 1)


def mixed(x: Images, support: Shots, rng: torch.Generator) -> Images:
    """Mixed with another support of the episode, of which it keeps the larger part (mixup).

    Source: Zhang et al., *mixup*, 2018. https://arxiv.org/abs/1710.09412
    """
    others = support.flatten(0, 1)
    partner = others[torch.randint(len(others), (len(x),), generator=rng).to(x.device)]
    kept = _uniform(len(x), 0.5, 1.0, rng, x)
    return kept * x + (1 - kept) * partner


def moved(x: Images, rng: torch.Generator) -> Images:
    """Mirrored half of the time, then shifted."""
    mirror = _uniform(len(x), 0.0, 1.0, rng, x) < 0.5
    return shifted(torch.where(mirror, x.flip(-1), x), x[:, None], rng)


def augmented(x: Images, support: Shots, rng: torch.Generator) -> Images:
    """Mirrored half of the time, moved, and of other contrast: the classical way."""
    x = moved(x, rng)
    gain, offset = _uniform(len(x), 0.8, 1.2, rng, x), _uniform(len(x), -0.1, 0.1, rng, x)
    return (gain * x + offset).clamp(-1, 1)


CHANGES: dict[str, Callable[[Images, Shots, torch.Generator], Images]] = {
    "flips": flipped,
    "shifts": shifted,
    "jitter": jittered,
    "mixup": mixed,
    "augmentation": augmented,
}
