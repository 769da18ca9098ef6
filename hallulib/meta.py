r"""Joint training: episode by episode, a generator learns the support and classifiers the query.

For each episode the source of extra supports learns from it and makes images; every classifier
forms prototypes from the real support and the first n of these images, and lowers

.. math:: F\bigl(\operatorname{softmax}(\beta \cos(q, p)),\; y\bigr), \qquad
          p_k = \frac{v_k + \sum_{j \le n} w\, \hat v_{kj}}{1 + n w},

the AUC margin loss of its queries. Nothing flows back from the classifiers into the generator, so
the baseline (n = 0) and all other n share one generator and the same episodes.

Source:
    Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError, aucm, checkpoint
from hallulib.data import ImageSet
from hallulib.episodes import Episode, Episodes
from hallulib.metrics import auroc
from hallulib.prototypes import PrototypeClassifier
from hallulib.shapes import Images, Labels
from hallulib.supports import Shots, Source

EPISODES_AT_ONCE = 20  # whose classes are made and embedded together at evaluation


@dataclass(frozen=True)
class Fit:
    """How classifiers learn.

    Attributes:
        loss: ``"aucm"``, the AUC margin loss with LibAUC's PESG, or ``"cross_entropy"`` with Adam.
        lr: the paper's 1e-4 is for a pretrained backbone; from scratch it moves little.
        weight_decay: the paper's.
        mode: of PESG, ``"adam"`` or ``"sgd"``; the latter stands still at the paper's lr.
        inner: a, b and alpha of that loss are solved ``"exact"`` for each episode, or left to
            PESG, ``"running"``, which at small learning rates takes thousands of episodes.
        margin: of that loss, on probabilities.
        weight: of a hallucinated image in a prototype, where a real one has 1.
        candidates: images made for each one kept; those that the real support alone takes most
            surely for their class are kept. 1 keeps all.

    Raises:
        UserError: an unknown name or an impossible number.
    """

    loss: str = "aucm"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    mode: str = "adam"
    inner: str = "exact"
    margin: float = 1.0
    weight: float = 1.0
    candidates: int = 1

    def __post_init__(self):
        known = {"loss": ("aucm", "cross_entropy"), "mode": ("adam", "sgd")}
        known["inner"] = ("exact", "running")
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; known: {', '.join(allowed)}")
        least = {"lr": 0, "weight_decay": 0, "margin": 0, "weight": 0, "candidates": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} is {getattr(self, name)}; at least {low} is needed")


class Learner:
    """A classifier with the number of extra supports it works with, its loss and its optimiser.

    Args:
        classifier: trained in place.
        n: extra supports per class.
        n_way: classes per episode.
        fit: how it learns.
    """

    def __init__(self, classifier: PrototypeClassifier, n: int, n_way: int, fit: Fit):
        self.classifier, self.n, self.fit = classifier, n, fit
        rates = {"lr": fit.lr, "weight_decay": fit.weight_decay}
        if fit.loss == "aucm":
            self.margin_loss = aucm.AUCMarginLoss(n_way, fit.margin)
            self.optimizer = aucm.optimizer(classifier, self.margin_loss, mode=fit.mode, **rates)
        else:
            self.optimizer = torch.optim.Adam(classifier.parameters(), **rates)

    def step(self, support: Shots, extra: Shots, query: Images, answers: Labels) -> Tensor:
        """One step on one episode, all of whose images go through the network as one batch."""
        self.classifier.train()
        sizes = [support.shape[:2], extra.shape[:2], (len(query),)]
        batch = torch.cat([support.flatten(0, 1), extra.flatten(0, 1), query])
        parts = self.classifier.embed(batch).split([int(np.prod(size)) for size in sizes])
        real, made, asked = (p.unflatten(0, size) for p, size in zip(parts, sizes, strict=True))
        logits = predict(self.classifier, real, made, asked, self.n, self.fit.weight)
        if self.fit.loss == "aucm":
            scores = logits.softmax(-1)
            if self.fit.inner == "exact":
                self.margin_loss.settle(scores, answers)
            loss = self.margin_loss(scores, answers)
        else:
            loss = nn.functional.cross_entropy(logits, answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def decay(self) -> None:
        """Divide the learning rate by 10; PESG takes a new reference as well."""
        if self.fit.loss == "aucm":
            self.optimizer.update_regularizer(10)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] /= 10

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        aucm_used = self.fit.loss == "aucm"
        memory = aucm.state_tensors if aucm_used else checkpoint.moments
        found = checkpoint.named("classifier", self.classifier.state_dict())
        return found | checkpoint.named("optimizer", memory(self.optimizer))

    def load_tensors(self, tensors: dict[str, Tensor], decays: int) -> None:
        """Take on what ``tensors`` wrote after so many calls of ``decay``."""
        self.classifier.load_state_dict(checkpoint.part("classifier", tensors))
        memory = checkpoint.part("optimizer", tensors)
        if self.fit.loss == "aucm":
            aucm.load_state_tensors(self.optimizer, memory)
        else:
            checkpoint.load_moments(self.optimizer, memory)
            for _ in range(decays):
                self.decay()


def predict(
    classifier: PrototypeClassifier,
    real: Float[Tensor, "*episodes n_way k_shot d"],
    made: Float[Tensor, "*episodes n_way m d"],
    query: Float[Tensor, "*episodes n_query d"],
    n: int,
    weight: float | int = 1.0,
) -> Float[Tensor, "*episodes n_query n_way"]:
    """Logits of queries from real supports and the best ``n`` of the ``m`` made ones.

    Best are those that the prototypes of the real support alone give to their class with the
    highest probability.

    Args:
        classifier: as trained.
        real: vectors of the real support.
        made: vectors of the candidates.
        query: vectors of the queries.
        n: made supports that are kept, at most m.
        weight: of each of them, where a real one has 1.
    """
    if n < made.shape[-2]:
        with torch.no_grad():
            sure = classifier.logits(made.flatten(-3, -2), real).softmax(-1)
            sure = sure.unflatten(-2, made.shape[-3:-1])  # ... class, candidate, probability of
            own = torch.diagonal(sure, dim1=-3, dim2=-1).mT
            best = own.topk(n, -1).indices
        made = made.gather(-2, best[..., None].expand(*best.shape, made.shape[-1]))
    vectors = torch.cat([real, made], -2)
    weights = torch.ones(vectors.shape[:-1], device=vectors.device)
    weights[..., real.shape[-2] :] = weight
    return classifier.logits(query, vectors, weights)


@dataclass
class State:
    """Everything a joint training is at one step.

    Attributes:
        source: of the extra supports, with what it has learnt.
        learners: one for each number of extra supports.
        log: (steps, 1 + learners) loss of the source and of each learner.
        validation: (epochs, learners) mean AUROC over the validation episodes.
        best: weights of each learner's classifier after its best epoch.
        step: episodes done.
    """

    source: Source
    learners: Sequence[Learner]
    log: Float[Tensor, "steps columns"]
    validation: Float[Tensor, "epochs learners"]
    best: list[dict[str, Tensor]]
    decay_at: Sequence[int]
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        found = {"log": self.log, "validation": self.validation}
        found |= checkpoint.named("source", self.source.tensors())
        for i, learner in enumerate(self.learners):
            found |= checkpoint.named(f"learner{i}", learner.tensors())
            found |= checkpoint.named(f"best{i}", self.best[i])
        return found

    def load_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take on a state that ``tensors`` wrote."""
        self.log.copy_(tensors["log"])
        self.validation.copy_(tensors["validation"])
        self.source.load_tensors(checkpoint.part("source", tensors))
        decays = sum(step >= at for at in self.decay_at)
        for i, learner in enumerate(self.learners):
            learner.load_tensors(checkpoint.part(f"learner{i}", tensors), decays)
            self.best[i] = checkpoint.part(f"best{i}", tensors)
        self.step = step


def meta_train(
    source: Source,
    classifiers: Mapping[int, PrototypeClassifier],
    images: ImageSet,
    episodes: Episodes,
    *,
    steps: int,
    fit: Fit | None = None,
    validation: Episodes | None = None,
    n_validation: int = 10,
    per_epoch: int = 10,
    decays: Sequence[float] = (0.2, 0.5),
    seed: int = 0,
    folder: Path | None = None,
    settings: dict | None = None,
) -> Iterator[State]:
    """Train a source of supports and classifiers together, one yielded state per episode.

    Args:
        source: of extra supports; it learns from each episode before it makes images.
        classifiers: number of extra supports -> the classifier that is trained with them.
        images: the image set of the episodes.
        episodes: training tasks.
        steps: episodes in all.
        fit: how classifiers learn.
        validation: tasks of the validation split; after each epoch the weights that did best on
            them so far are kept. Without it the last weights are the best.
        n_validation: such tasks, the same after each epoch.
        per_epoch: episodes per epoch, and between checkpoints.
        decays: parts of the steps after which the learning rate of classifiers is divided by 10.
        seed: of everything that is made.
        folder: where the checkpoint and ``losses.csv`` are kept; a checkpoint found there is
            resumed, to the same bytes on a CPU as if it had never stopped.
        settings: all else that the run depends on; other settings do not resume.

    Raises:
        UserError: a support image or a loss that is not finite, a checkpoint of other settings.
    """
    fit = fit or Fit()
    learners = [Learner(c, n, episodes.n_way, fit) for n, c in classifiers.items()]
    settings = (settings or {}) | {"steps": steps, "per_epoch": per_epoch, "seed": seed}
    epochs = -(-steps // per_epoch)
    device = learners[0].classifier.log_scale.device
    state = State(
        source,
        learners,
        torch.full((steps, 1 + len(learners)), torch.nan, device=device),
        torch.full((epochs, len(learners)), torch.nan),
        [copy.deepcopy(learner.classifier.state_dict()) for learner in learners],
        [round(part * steps) for part in decays],
    )
    if folder is not None:
        checkpoint.resume(state, Path(folder), settings)
    if state.step == steps:
        yield state
    while state.step < steps:
        state.log[state.step] = _episode(state, images, episodes[state.step], seed)
        state.step += 1
        if state.step in state.decay_at:
            for learner in learners:
                learner.decay()
        if state.step % per_epoch == 0 or state.step == steps:
            _check_finite(state)
            _validate(state, images, validation, n_validation, seed)
            if folder is not None:
                columns = ("generator", *(f"plus_{learner.n}" for learner in learners))
                log = dict(zip(columns, state.log[: state.step].T.tolist(), strict=True))
                checkpoint.write(Path(folder), state.tensors(), state.step, settings, log)
        yield state


def _episode(state: State, images: ImageSet, episode: Episode, seed: int) -> Tensor:
    """Losses of the source and of each learner in one training episode."""
    device = state.log.device
    support, query = pictures(images, episode, device)
    answers = torch.as_tensor(episode.answers, device=device)
    own = int(np.random.default_rng([seed, state.step]).integers(2**31))  # a seed per episode
    losses = [state.source.learn(episode, support, query, own)]
    most = max(learner.n * learner.fit.candidates for learner in state.learners)
    extra = state.source.make(episode, support, most, own) if most else support[:, :0]
    for learner in state.learners:
        offered = extra[:, : learner.n * learner.fit.candidates]
        losses.append(learner.step(support, offered, query, answers))
    return torch.stack([loss.to(device) for loss in losses])


def pictures(images: ImageSet, episode: Episode, device: torch.device) -> tuple[Shots, Images]:
    """Support (n_way, k_shot, ...) and query images of an episode."""
    x = images.tensor(np.concatenate([episode.support.ravel(), episode.query])).to(device)
    support, query = x.split([episode.support.size, len(episode.query)])
    return support.unflatten(0, episode.support.shape), query


def _check_finite(state: State) -> None:
    bad = (~torch.isfinite(state.log[: state.step, 1:])).any(1).nonzero()
    if len(bad):
        raise UserError(
            f"the loss of a classifier is not finite from episode {int(bad[0]) + 1} on; "
            "a lower learning rate is needed"
        )


def _validate(
    state: State, images: ImageSet, validation: Episodes | None, n_validation: int, seed: int
) -> None:
    """Keep the weights of each classifier that did best on the validation episodes so far."""
    epoch = int(torch.isfinite(state.validation).all(1).sum())
    found = [torch.nan] * len(state.learners)
    if validation is not None:
        methods = [Method(learner.n, learner.classifier) for learner in state.learners]
        fit = state.learners[0].fit
        parts = evaluate(
            methods, state.source, images, validation, n_validation, fit=fit, seed=seed
        )
        found = np.concatenate(list(parts)).mean(0).tolist()
    for i, (learner, value) in enumerate(zip(state.learners, found, strict=True)):
        if not value < np.nanmax([*state.validation[:, i].tolist(), -1.0]):
            state.best[i] = copy.deepcopy(learner.classifier.state_dict())
    state.validation[epoch] = torch.tensor(found)


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

    Args:
        methods: all of them see the same episodes and the first n of the same extra supports.
        source: of the extra supports.
        images: the image set of the episodes.
        episodes: tasks.
        n_episodes: how many of them.
        first: episodes that are done already, a multiple of ``EPISODES_AT_ONCE``.
        fit: weight and candidates of the extra supports.
        permute: shuffle the answers, a control that must come out at 0.5.
        seed: of everything that is made.

    Yields:
        AUROC of the next episodes, one column for each method.
    """
    fit = fit or Fit()
    most = max(method.n for method in methods) * fit.candidates
    device = methods[0].classifier.log_scale.device
    vectors = [_Vectors(method.classifier.eval(), images) for method in methods]
    for begin in range(first, n_episodes, EPISODES_AT_ONCE):
        chunk = [episodes[i] for i in range(begin, min(begin + EPISODES_AT_ONCE, n_episodes))]
        support = torch.stack([pictures(images, episode, device)[0] for episode in chunk])
        extra = _make(source, chunk, support, most, [seed, begin])
        answers = np.stack([episode.answers for episode in chunk])
        if permute:
            answers = np.random.default_rng([seed, begin]).permuted(answers, axis=1)
        columns = []
        for (n, classifier), known in zip(methods, vectors, strict=True):
            real = known(np.stack([episode.support for episode in chunk]))
            query = known(np.stack([episode.query for episode in chunk]))
            offered = extra[:, :, : n * fit.candidates]
            made = real[:, :, :0]
            if n:
                made = classifier.embed(offered.flatten(0, 2)).unflatten(0, offered.shape[:3])
            logits = predict(classifier, real, made, query, n, fit.weight)
            columns.append(auroc(answers, logits.softmax(-1)))
        yield np.stack(columns, 1)


class _Vectors:
    """Vectors of real images by one classifier, each computed once."""

    def __init__(self, classifier: PrototypeClassifier, images: ImageSet):
        self.classifier, self.images, self.found = classifier, images, {}

    def __call__(self, rows: np.ndarray) -> Tensor:
        """One vector for each row, in the shape of ``rows``."""
        new = [row for row in np.unique(rows).tolist() if row not in self.found]
        if new:
            x = self.images.tensor(new).to(self.classifier.log_scale.device)
            self.found.update(zip(new, self.classifier.embed(x), strict=True))
        return torch.stack([self.found[row] for row in rows.ravel().tolist()]).unflatten(
            0, rows.shape
        )


def _make(source: Source, chunk: list[Episode], support: Tensor, n: int, seed: list[int]):
    """Extra supports of several episodes: in one call, or one by one and each time undone."""
    if n == 0:
        return support[:, :, :0]
    first, *others = np.random.default_rng(seed).integers(2**31, size=1 + len(chunk)).tolist()
    if source.per_class:
        names = sum((episode.classes for episode in chunk), ())
        parts = zip(*(episode[1:] for episode in chunk), strict=True)
        joined = Episode(names, *map(np.concatenate, parts))
        return source.make(joined, support.flatten(0, 1), n, first).unflatten(0, support.shape[:2])
    made = []
    for episode, real, own in zip(chunk, support, others, strict=True):
        with source.undone(), torch.enable_grad():
            source.adapt(episode, real, own)
            made.append(source.make(episode, real, n, own))
    return torch.stack(made)
