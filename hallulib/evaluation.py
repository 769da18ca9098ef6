"""The AUROC of test episodes: several classifiers, all on the same episodes and extra supports."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hallulib import UserError, parallel
from hallulib.data import ImageSet
from hallulib.episodes import Episode, Episodes
from hallulib.learner import Fit, predict
from hallulib.metrics import auroc
from hallulib.prototypes import PrototypeClassifier
from hallulib.shapes import Images
from hallulib.supports import Shots, Source

EPISODES_AT_ONCE = 20  # whose classes are made and embedded together
SHUFFLES = 20  # of the answers of an episode, for the control without information

MoreShots = Float[Tensor, "episodes n_way _shots channels height width"]


def pictures(images: ImageSet, episode: Episode, device: torch.device) -> tuple[Shots, Images]:
    """Support (n_way, k_shot, ...) and query images of an episode."""
    x = images.tensor(np.concatenate([episode.support.ravel(), episode.query])).to(device)
    support, query = x.split([episode.support.size, len(episode.query)])
    return support.unflatten(0, episode.support.shape), query


class Method(NamedTuple):
    """A classifier with the number of extra supports that it is given."""

    n: int
    classifier: PrototypeClassifier


@torch.no_grad()
def evaluate(
    methods: Sequence[Method],
    source: Source,
    images: ImageSet,
    episodes: Episodes,
    n_episodes: int,
    *,
    first: int = 0,
    fit: Fit | None = None,
    permute: bool = False,
    seed: int = 0,
) -> Iterator[Float[np.ndarray, "episodes methods"]]:
    """Macro one-vs-rest AUROC of episodes, for several methods with one source of supports.

    What the source learns from an episode is undone after it. Vectors of real images are computed
    once; episodes are made and embedded ``EPISODES_AT_ONCE`` together where the source allows.
    Several processes take turns at them, and all get all results.

    Args:
        methods: all of them see the same episodes and the first n of the same extra supports.
        source: of the extra supports.
        images: the image set of the episodes.
        episodes: tasks.
        n_episodes: how many of them.
        first: episodes that are done already, a multiple of ``EPISODES_AT_ONCE``.
        fit: weight and candidates of the extra supports; the source makes ``candidates`` times
            as many as a method is given.
        permute: shuffle the answers, a control that must come out at 0.5: the mean over
            ``SHUFFLES`` orders of the answers of each episode.
        seed: of everything that is made.

    Yields:
        AUROC of the next episodes, one column for each method. That of an episode depends on the
        seed and on its place, not on what was evaluated before it; if the source makes several
        episodes in one call, also on how many of its ``EPISODES_AT_ONCE`` there are.

    Raises:
        UserError: ``first`` is no such multiple, or the source cannot serve an episode.
    """
    if first < n_episodes and first % EPISODES_AT_ONCE:
        raise UserError(
            f"an evaluation cannot go on after {first} episodes; they are measured"
            f" {EPISODES_AT_ONCE} at a time"
        )
    fit = fit or Fit()
    most = max(method.n for method in methods) * fit.candidates
    device = methods[0].classifier.log_scale.device
    vectors = {m.classifier: _Vectors(m.classifier.eval(), images) for m in methods}

    def measured(begin: int) -> Float[np.ndarray, "episodes methods"]:
        chunk = [episodes[i] for i in range(begin, min(begin + EPISODES_AT_ONCE, n_episodes))]
        support = torch.stack([pictures(images, episode, device)[0] for episode in chunk])
        extra = _make(source, chunk, support, most, [seed, begin])
        answers = np.stack([episode.answers for episode in chunk])
        orders = [answers]
        if permute:
            rng = np.random.default_rng([seed, begin])
            orders = [rng.permuted(answers, axis=1) for _ in range(SHUFFLES)]
        logits = [_logits(m, vectors[m.classifier], chunk, extra, fit) for m in methods]
        scores = [x.softmax(-1) for x in logits]
        return np.stack([np.mean([auroc(y, x) for y in orders], 0) for x in scores], 1)

    begins = range(first, n_episodes, EPISODES_AT_ONCE)
    found = parallel.dealt(measured, begins, (EPISODES_AT_ONCE, len(methods)))
    for begin, scores in zip(begins, found, strict=True):
        yield scores[: n_episodes - begin]


def _logits(
    method: Method, known: "_Vectors", chunk: list[Episode], extra: MoreShots, fit: Fit
) -> Float[Tensor, "episodes n_query n_way"]:
    """What a method says of the queries of several episodes."""
    real = known(np.stack([episode.support for episode in chunk]))
    query = known(np.stack([episode.query for episode in chunk]))
    offered = extra[:, :, : method.n * fit.candidates]
    made = real[:, :, :0]
    if method.n:
        made = method.classifier.embed(offered.flatten(0, 2)).unflatten(0, offered.shape[:3])
    return predict(method.classifier, real, made, query, method.n, fit.weight)


class _Vectors:
    """Vectors of real images by one classifier, each computed once."""

    def __init__(self, classifier: PrototypeClassifier, images: ImageSet):
        self.classifier, self.images, self.found = classifier, images, {}

    def __call__(self, rows: Int[np.ndarray, "*shape"]) -> Float[Tensor, "*shape d"]:
        """One vector for each row, in the shape of ``rows``."""
        new = [row for row in np.unique(rows).tolist() if row not in self.found]
        if new:
            x = self.images.tensor(new).to(self.classifier.log_scale.device)
            self.found.update(zip(new, self.classifier.embed(x), strict=True))
        return torch.stack([self.found[row] for row in rows.ravel().tolist()]).unflatten(
            0, rows.shape
        )


def _make(
    source: Source, chunk: list[Episode], support: MoreShots, n: int, seed: list[int]
) -> MoreShots:
    """Extra supports of several episodes: in one call, or one by one and each time undone."""
    if n == 0:
        return support[:, :, :0]
    first, *others = np.random.default_rng(seed).integers(2**31, size=1 + len(chunk)).tolist()
    if source.per_class:
        names = sum((episode.classes for episode in chunk), ())
        # one long episode; its answers are not to be used
        parts = zip(*(episode[1:] for episode in chunk), strict=True)
        joined = Episode(names, *map(np.concatenate, parts))
        return source.make(joined, support.flatten(0, 1), n, first).unflatten(0, support.shape[:2])
    made = []
    for episode, real, own in zip(chunk, support, others, strict=True):
        with source.undone(), torch.enable_grad():
            source.adapt(episode, real, own)
            made.append(source.make(episode, real, n, own))
    return torch.stack(made)
