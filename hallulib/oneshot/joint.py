r"""Joint training: episode by episode, a generator learns the support and classifiers the query.

For each episode the source of extra supports learns from it and makes images; every classifier
forms prototypes from the real support and the first n of these images, and lowers

.. math:: F\bigl(\operatorname{softmax}(\beta \cos(q, p)),\; y\bigr), \qquad
          p_k = \frac{\sum_{i \le k_\text{shot}} v_{ki} + w \sum_{j \le n} \hat v_{kj}}
          {k_\text{shot} + n w},

the AUC margin loss of its queries. Nothing flows back from the classifiers into the generator, so
the baseline (n = 0) and all other n share one generator and the same episodes. `evaluate` asks
several classifiers about the same test episodes, with the same extra supports.

Source:
    Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hallulib import UserError
from hallulib.data.imageset import ImageSet
from hallulib.evidence.metrics import auroc
from hallulib.oneshot import auc
from hallulib.oneshot.auc import Memory
from hallulib.oneshot.episodes import Episode, Episodes
from hallulib.oneshot.hallucinate import Source
from hallulib.oneshot.prototypes import PrototypeClassifier
from hallulib.shapes import Images, Labels, Shots
from hallulib.storage import checkpoint, parallel
from hallulib.storage.checkpoint import Stateful
from hallulib.storage.settings import Above0, Amount, check, one_of

EPISODES_AT_ONCE = 20  # whose classes are made and embedded together
SHUFFLES = 20  # of the answers of an episode, for the control without information

MoreShots = Float[Tensor, "episodes n_way _shots channels height width"]


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

    Raises:
        UserError: an unknown name or an impossible number.
    """

    loss: Annotated[str, one_of(("aucm", "cross_entropy"))] = "aucm"
    lr: Amount = 1e-3
    weight_decay: Amount = 1e-2
    mode: Annotated[str, one_of(("adam", "sgd"))] = "adam"
    inner: Annotated[str, one_of(("exact", "running"))] = "exact"
    margin: Above0 = 1.0
    weight: Amount = 1.0

    def __post_init__(self):
        check(self)


class Learner(Stateful):
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
            self.margin_loss = auc.AUCMarginLoss(n_way, fit.margin)
            self.optimizer = auc.optimizer(classifier, self.margin_loss, mode=fit.mode, **rates)
        else:
            self.optimizer = torch.optim.Adam(classifier.parameters(), **rates)

    def step(
        self, support: Shots, extra: Shots, query: Images, answers: Labels
    ) -> Float[Tensor, ""]:
        """One step on one episode, all of whose images go through the network as one batch.

        Args:
            support: real images of each class.
            extra: ``n`` further images of each class.
            query: images to classify.
            answers: position of the class of each query.

        Returns:
            The loss before the step.
        """
        self.classifier.train()
        batch = torch.cat([support.flatten(0, 1), extra.flatten(0, 1), query])
        sizes = [support.shape[:2], extra.shape[:2], query.shape[:1]]
        parts = self.classifier.embed(batch).split([size.numel() for size in sizes])
        real, made, asked = (p.unflatten(0, size) for p, size in zip(parts, sizes, strict=True))
        logits = predict(self.classifier, real, made, asked, self.fit.weight)
        loss = self._loss(logits, answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _loss(self, logits: Float[Tensor, "batch n_way"], answers: Labels) -> Float[Tensor, ""]:
        if self.fit.loss == "cross_entropy":
            return nn.functional.cross_entropy(logits, answers)
        scores = logits.softmax(-1)
        if self.fit.inner == "exact":
            self.margin_loss.settle(scores, answers)
        return self.margin_loss(scores, answers)

    def decay(self) -> None:
        """Divide the learning rate by 10; PESG takes a new reference as well."""
        if self.fit.loss == "aucm":
            self.optimizer.update_regularizer(10)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] /= 10

    def parts(self) -> dict[str, object]:
        """All that training changes."""
        memory = Memory(self.optimizer) if self.fit.loss == "aucm" else self.optimizer
        return {"classifier": self.classifier, "optimizer": memory}


def predict(
    classifier: PrototypeClassifier,
    real: Float[Tensor, "*episodes n_way k_shot d"],
    made: Float[Tensor, "*episodes n_way n d"],
    query: Float[Tensor, "*episodes n_query d"],
    weight: float | int = 1.0,
) -> Float[Tensor, "*episodes n_query n_way"]:
    """Logits of queries from real and made supports.

    Args:
        classifier: as trained.
        real: vectors of the real support.
        made: vectors of the extra supports.
        query: vectors of the queries.
        weight: of an extra support, where a real one has 1; 0 leaves them out.

    Returns:
        One logit per query and class; their softmax is the chance of each class.
    """
    vectors = torch.cat([real, made], -2)
    weights = torch.ones(vectors.shape[:-1], device=vectors.device)
    weights[..., real.shape[-2] :] = weight
    return classifier.logits(query, vectors, weights)


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
    weight: float | int = 1.0,
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
        weight: of an extra support in a prototype.
        permute: shuffle the answers, a control that must come out at 0.5: the mean over
            ``SHUFFLES`` orders of the answers of each episode.
        seed: of everything that is made.

    Yields:
        AUROC of the next episodes, one column for each method. That of an episode depends on the
        seed and on its place, not on what was evaluated before it; if the source makes several
        episodes in one call, also on how many of its ``EPISODES_AT_ONCE`` there are.

    Raises:
        UserError: the source cannot serve an episode.
    """
    most = max(method.n for method in methods)
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
        logits = [_logits(m, vectors[m.classifier], chunk, extra, weight) for m in methods]
        scores = [x.softmax(-1) for x in logits]
        return np.stack([np.mean([auroc(y, x) for y in orders], 0) for x in scores], 1)

    begins = range(first, n_episodes, EPISODES_AT_ONCE)
    measurements = parallel.dealt(measured, begins)
    for begin, scores in zip(begins, measurements, strict=True):
        yield scores[: n_episodes - begin]


def _logits(
    method: Method, known: "_Vectors", chunk: list[Episode], extra: MoreShots, weight: float | int
) -> Float[Tensor, "episodes n_query n_way"]:
    """What a method says of the queries of several episodes."""
    real = known(np.stack([episode.support for episode in chunk]))
    query = known(np.stack([episode.query for episode in chunk]))
    offered = extra[:, :, : method.n]
    made = real[:, :, :0]
    if method.n:
        made = method.classifier.embed(offered.flatten(0, 2)).unflatten(0, offered.shape[:3])
    return predict(method.classifier, real, made, query, weight)


class _Vectors:
    """Vectors of real images by one classifier, each computed once."""

    def __init__(self, classifier: PrototypeClassifier, images: ImageSet):
        self.classifier, self.images, self.known = classifier, images, {}

    def __call__(self, rows: Int[np.ndarray, "*shape"]) -> Float[Tensor, "*shape d"]:
        """One vector for each row, in the shape of ``rows``."""
        new = [row for row in np.unique(rows).tolist() if row not in self.known]
        if new:
            x = self.images.tensor(new).to(self.classifier.log_scale.device)
            self.known.update(zip(new, self.classifier.embed(x), strict=True))
        vectors = torch.stack([self.known[row] for row in rows.ravel().tolist()])
        return vectors.unflatten(0, rows.shape)


def _make(
    source: Source, chunk: list[Episode], support: MoreShots, n: int, seed: list[int]
) -> MoreShots:
    """Extra supports of several episodes: in one call, or one by one and each time undone."""
    if n == 0:
        return support[:, :, :0]
    first, *others = np.random.default_rng(seed).integers(2**31, size=1 + len(chunk)).tolist()
    if source.per_class:
        # one long episode; its answers are not to be used
        names, *parts = zip(*chunk, strict=True)
        joined = Episode(sum(names, ()), *map(np.concatenate, parts))
        return source.make(joined, support.flatten(0, 1), n, first).unflatten(0, support.shape[:2])
    made = []
    for episode, real, own in zip(chunk, support, others, strict=True):
        with source.undone(), torch.enable_grad():
            source.adapt(episode, real, own)
            made.append(source.make(episode, real, n, own))
    return torch.stack(made)


class State(Stateful):
    """Everything a joint training is at one step.

    Args:
        source: of the extra supports, with what it has learnt.
        learners: one for each number of extra supports.
        steps: episodes in all.
        per_epoch: episodes per epoch.
        decays: parts of the steps after which the learning rates fall.

    Attributes:
        losses: (steps, 1 + learners) of the source and of each learner.
        validation: (epochs, learners) mean AUROC over the validation episodes.
        best: weights of each learner's classifier after its best epoch, the later of equals.
        decay_at: steps after which the learning rates fall.
        step: episodes done.
    """

    def __init__(
        self,
        source: Source,
        learners: Sequence[Learner],
        steps: int,
        per_epoch: int,
        decays: Sequence[float | int],
    ):
        self.source, self.learners = source, learners
        device = learners[0].classifier.log_scale.device
        self.losses = torch.full((steps, 1 + len(learners)), torch.nan, device=device)
        self.validation = torch.full((-(-steps // per_epoch), len(learners)), torch.nan)
        self.best = [copy.deepcopy(learner.classifier.state_dict()) for learner in learners]
        self.decay_at = {round(part * steps) for part in decays} - {0}

    def parts(self) -> dict[str, object]:
        """All but the step."""
        parts = {"losses": self.losses, "validation": self.validation, "source": self.source}
        for i, learner in enumerate(self.learners):
            parts |= {f"learner{i}": learner, f"best{i}": self.best[i]}
        return parts

    def log(self) -> dict[str, list]:
        """The losses so far."""
        names = ("generator", *(f"plus_{learner.n}" for learner in self.learners))
        return dict(zip(names, self.losses[: self.step].T.tolist(), strict=True))

    def check(self) -> None:
        """Stops a training that has lost its way.

        Raises:
            UserError: a loss is not finite.
        """
        bad = ~torch.isfinite(self.losses[: self.step])
        bad[:, 0] &= bool(torch.isfinite(self.losses[0, 0]))  # a source may learn nothing
        rows = bad.any(1).nonzero()
        if len(rows):
            who = "the generator" if bad[rows[0], 0] else "a classifier"
            raise UserError(
                f"the loss of {who} is not finite from episode {int(rows[0]) + 1} on; "
                "a lower learning rate is needed"
            )

    def keep_best(self, epoch: int) -> None:
        """Keep the weights of each classifier that has not done better in an epoch before."""
        worst = torch.full((1, len(self.learners)), -1.0)
        before = torch.cat([worst, self.validation[:epoch].nan_to_num(-1)]).amax(0)
        for i, learner in enumerate(self.learners):
            if not self.validation[epoch, i] < before[i]:
                self.best[i] = copy.deepcopy(learner.classifier.state_dict())


def episode(state: State, images: ImageSet, task: Episode, seed: int) -> None:
    """One training episode: the source learns it and makes images, each classifier takes a step.

    Args:
        state: its source and learners change; their losses become a row of ``losses``.
        images: the image set of the task.
        task: the episode.
        seed: of everything that is made.
    """
    support, query = pictures(images, task, state.losses.device)
    answers = torch.as_tensor(task.answers, device=state.losses.device)
    losses = [state.source.learn(task, support, query, seed)]
    most = max(learner.n for learner in state.learners)
    extra = state.source.make(task, support, most, seed) if most else support[:, :0]
    for learner in state.learners:
        losses.append(learner.step(support, extra[:, : learner.n], query, answers))
    state.losses[state.step] = torch.stack([loss.to(state.losses.device) for loss in losses])


def meta_train(
    source: Source,
    classifiers: Mapping[int, PrototypeClassifier],
    images: ImageSet,
    episodes: Episodes,
    *,
    steps: int,
    fit: Fit = Fit(),  # noqa: B008, it is frozen
    validation: Episodes | None = None,
    n_validation: int = 10,
    per_epoch: int = 10,
    decays: Sequence[float | int] = (0.2, 0.5),
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
        settings: all else that the run depends on, what JSON can hold; other settings do not
            resume.

    Yields:
        The state after each episode, the same object every time. After the last one of a
        finished run it is yielded once, with nothing done.

    Raises:
        UserError: a support image or a loss that is not finite, a damaged checkpoint or one of
            other settings.

    Source:
        Pachetti & Colantonio 2024; the loss is theirs where `Fit` says ``"aucm"``.
    """
    settings = (settings or {}) | {"steps": steps, "per_epoch": per_epoch, "seed": seed}
    settings |= {"fit": asdict(fit), "decays": list(decays), "n_validation": n_validation}
    learners = [Learner(c, n, episodes.n_way, fit) for n, c in classifiers.items()]
    methods = [Method(n, c) for n, c in classifiers.items()]

    def take(state: State) -> None:
        own = int(np.random.default_rng([seed, state.step]).integers(2**31))  # of the episode
        episode(state, images, episodes[state.step], own)
        if state.step + 1 in state.decay_at:
            for learner in learners:
                learner.decay()

    def look(state: State) -> None:
        state.check()
        epoch = (state.step - 1) // per_epoch
        if validation is not None and n_validation:
            how = dict(weight=fit.weight, seed=seed)
            parts = evaluate(methods, source, images, validation, n_validation, **how)
            state.validation[epoch] = torch.as_tensor(np.concatenate(list(parts)).mean(0))
        state.keep_best(epoch)

    return checkpoint.loop(
        State(source, learners, steps, per_epoch, decays),
        take,
        steps=steps,
        due=lambda step: step % per_epoch == 0 or step == steps,
        look=look,
        folder=folder,
        settings=settings,
    )
