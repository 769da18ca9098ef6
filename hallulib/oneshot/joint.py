r"""Joint training: episode by episode, a generator learns the support and classifiers the query.

For each episode the source of extra supports learns from it and makes images; every classifier
forms prototypes from the real support and the first n of these images, and lowers

.. math:: F\bigl(\operatorname{softmax}(\beta \cos(q, p)),\; y\bigr), \qquad
          p_k = \frac{\sum_{i \le k_\text{shot}} v_{ki} + w \sum_{j \le n} \hat v_{kj}}
          {k_\text{shot} + n w}.

Nothing flows back from the classifiers into the generator, so the baseline (n = 0) and all other
n share one generator and the same episodes.

F is the AUC margin loss of each class against the rest, so that every class weighs the same. The
AUROC of class c is the chance that one of its images scores above another image. Its smooth
stand-in is the mean of :math:`(m - h_i + h_j)^2` over pairs of a positive i and a negative j.
Written as a saddle point it needs no pairs,

.. math::

    F_c = \mathrm{E}_+[(h - a)^2] + \mathrm{E}_-[(h - b)^2]
        + 2 \alpha\,(m + \mathrm{E}_-[h] - \mathrm{E}_+[h]) - \alpha^2,

minimal in the network, a and b, maximal in :math:`\alpha \ge 0`; then a and b are the means of
the two sides and :math:`\alpha = [m + \mathrm{E}_-[h] - \mathrm{E}_+[h]]_+`.

Source: Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024; Yuan et al., *Large-scale
Robust Deep AUC Maximization*, 2021. https://arxiv.org/abs/2012.03173
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hallulib import UserError
from hallulib.data.changes import lightly_changed
from hallulib.data.imageset import ImageSet
from hallulib.evidence.metrics import auroc
from hallulib.oneshot.bdc import PrototypeClassifier, at_least_float32
from hallulib.oneshot.episodes import Episode, Episodes, images_at
from hallulib.oneshot.hallucinate import Source
from hallulib.shapes import Images, Labels, Shots, seeded
from hallulib.storage import checkpoint, parallel
from hallulib.storage.settings import Above0, Amount, check, one_of

EPISODES_AT_ONCE = 20  # whose classes are made and embedded together
PULL = 3e-3  # gamma of `pesg`: the pull to the last reference, LibAUC's epoch_decay
MOMENTS = ("exp_avg", "exp_avg_sq")  # what it remembers of one parameter

Tasks = Episodes | Sequence[Episode]
MoreShots = Float[Tensor, "episodes n_way _shots channels height width"]
Scores = Float[Tensor, "batch n_classes"]
PerClass = Float[Tensor, " n_classes"]


@dataclass(frozen=True)
class Fit:
    """How classifiers learn; an unknown name or an impossible number raises a `UserError`.

    Attributes:
        loss: ``"aucm"``, the AUC margin loss with LibAUC's PESG, or ``"cross_entropy"`` with Adam.
        lr: the paper's, for a pretrained backbone; from random weights it moves little.
        weight_decay: the paper's.
        inner: a, b and alpha of that loss are solved ``"exact"`` for each episode, or left to
            PESG, ``"running"``, which at small learning rates takes thousands of episodes.
        margin: of that loss, on probabilities.
        weight: of a hallucinated image in a prototype, where a real one has 1.
    """

    loss: Annotated[str, one_of(("aucm", "cross_entropy"))] = "aucm"
    lr: Amount = 1e-4
    weight_decay: Amount = 1e-2
    inner: Annotated[str, one_of(("exact", "running"))] = "exact"
    margin: Above0 = 1.0
    weight: Amount = 1.0

    def __post_init__(self):
        check(self)


class AUCMarginLoss:
    """The loss with its own a, b and alpha, one of each per class.

    Positives should score above negatives by the ``margin``; ``a`` and ``b`` are running means of
    the two sides. It is no module: the optimiser, which lowers parameters, would lower alpha too.
    Source: Yuan et al. 2021, without the class prior (version 2 of LibAUC, whose multi-label loss
    on one-hot labels is the same up to rounding).
    """

    def __init__(self, n_classes: int, margin: float | int = 1.0):
        self.margin = float(margin)
        self.a, self.b, self.alpha = (torch.zeros(n_classes, requires_grad=True) for _ in range(3))

    def __call__(self, scores: Scores, y: Labels) -> Float[Tensor, ""]:
        """The loss of one batch; it may be negative before a, b and alpha have settled. Two
        classes at least are needed; one that is absent contributes nothing.
        """
        scores = at_least_float32(scores)
        plus, minus = _means(scores, y)
        within = _means((scores - self.a) ** 2, y)[0] + _means((scores - self.b) ** 2, y)[1]
        of_class = within + 2 * self.alpha * (self.margin + minus - plus) - self.alpha**2
        present = torch.isin(torch.arange(len(of_class), device=y.device), y)
        return of_class.where(present, 0).sum() / present.sum()

    @torch.no_grad()
    def settle(self, scores: Scores, y: Labels) -> None:
        """Set a, b and alpha to their best values for these scores, before `pesg`. From zero,
        alpha takes some 1 / (2 lr) steps to get near: five thousand at 1e-4, in which the loss
        draws the scores together and hardly ranks them.
        """
        plus, minus = _means(at_least_float32(scores), y)
        self.a.copy_(plus)
        self.b.copy_(minus)
        self.alpha.copy_((self.margin + minus - plus).clamp(min=0))


def _means(values: Scores, y: Labels) -> tuple[PerClass, PerClass]:
    """Mean of each column over the rows of its class, and over all other rows."""
    positive = y[:, None] == torch.arange(values.shape[1], device=y.device)
    n = positive.sum(0)
    plus = values.where(positive, 0).sum(0) / n.clamp(min=1)
    return plus, values.where(~positive, 0).sum(0) / (len(y) - n)


def pesg(
    model: nn.Module,
    loss: AUCMarginLoss,
    *,
    lr: float | int = 1e-4,
    weight_decay: float | int = 1e-2,
) -> Any:
    r"""LibAUC's PESG over a model and the loss: descends on weights, a and b, ascends on alpha.

    .. math::

        g &= \mathrm{clip}(\nabla F, \pm 1) + \gamma\,(v - v_\mathrm{ref}) + \lambda v,
        \qquad v = (w, a, b), \\
        \alpha &\leftarrow [\alpha + 2\,\mathrm{lr}\,(m + b - a - \alpha)]_+,

    and v moves along g, scaled as by Adam. ``update_regularizer(10)`` of the result divides lr by
    10 and moves :math:`v_\mathrm{ref}` to the mean of v over the steps since the last time, at
    least one. LibAUC's other mode, averaged SGD, stands still at the paper's rate of 1e-4.

    Repaired here: PESG draws :math:`v_\mathrm{ref}` from the global generator, where its
    documentation says :math:`v_0`, so that a pretrained network would be pulled to zero; and it
    expects a GPU wherever there is one. The loss is moved to the device of the model.

    Source: Yuan et al. 2021, and libauc 2.0.1, optimizers/pesg.py.
    """
    from libauc.optimizers import PESG  # seconds to import

    weights = [p for p in model.parameters() if p.requires_grad]
    device = weights[0].device
    for own in (loss.a, loss.b, loss.alpha):
        own.data = own.data.to(device)
    options = dict(lr=lr, weight_decay=weight_decay, epoch_decay=PULL, device=device)
    with seeded():  # its random reference is replaced below
        optimizer = PESG(weights, loss_fn=loss, mode="adam", verbose=False, **options)
    for reference, value in zip(optimizer.model_ref, optimizer.params, strict=True):
        reference.copy_(value.detach())
    return optimizer


class PESGState:
    """All that `pesg` and its loss are at a step, apart from the model's weights.

    Names are ``a``, ``b``, ``alpha``, ``lr``, ``steps``, ``T`` (steps since the last reference)
    and, for the i-th parameter, ``exp_avg.i``, ``model_ref.i`` and the like.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Tensor]:
        """All of it; no copies."""
        pesg = self.optimizer
        tensors = {name: getattr(pesg, name).detach() for name in ("a", "b", "alpha")}
        for name in ("model_ref", "model_acc"):
            tensors |= {f"{name}.{i}": v for i, v in enumerate(getattr(pesg, name))}
        tensors |= {name: torch.tensor(getattr(pesg, name)) for name in ("steps", "T")}
        tensors["lr"] = torch.tensor(pesg.param_groups[0]["lr"], dtype=torch.float64)
        for i, p in enumerate(pesg.params):
            tensors |= {f"{name}.{i}": torch.as_tensor(v) for name, v in pesg.state[p].items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take on what `state_dict` gave, as if the run had not been left; a KeyError or
        RuntimeError if the tensors are of another model or other settings.
        """
        pesg = self.optimizer
        for name, own in self.state_dict().items():
            own.copy_(tensors[name])
        pesg.steps, pesg.T = int(tensors["steps"]), int(tensors["T"])
        pesg.param_groups[0]["lr"] = float(tensors["lr"])
        for name, value in tensors.items():
            key, _, i = name.partition(".")
            if key == "step":
                pesg.state[pesg.params[int(i)]][key] = int(value)
            elif key in MOMENTS:
                p = pesg.params[int(i)]
                # in the layout of the parameter: it decides the order of sums on some devices
                pesg.state[p][key] = torch.empty_like(p.data).copy_(value)


class Learner(checkpoint.Stateful):
    """A classifier, trained in place with n extra supports per class, its loss and optimiser."""

    def __init__(self, classifier: PrototypeClassifier, n: int, n_way: int, fit: Fit):
        self.classifier, self.n, self.fit = classifier, n, fit
        rates: dict[str, Any] = {"lr": fit.lr, "weight_decay": fit.weight_decay}
        self.margin_loss = AUCMarginLoss(n_way, fit.margin)
        if fit.loss == "aucm":
            self.optimizer = pesg(classifier, self.margin_loss, **rates)
        else:
            self.optimizer = torch.optim.Adam(classifier.parameters(), **rates)

    def learn(
        self, support: Shots, extra: Shots, query: Images, answers: Labels
    ) -> Float[Tensor, ""]:
        """One step on an episode, whose images are one batch; the loss before it."""
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

    def _loss(self, logits: Scores, answers: Labels) -> Float[Tensor, ""]:
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
        memory = PESGState(self.optimizer) if self.fit.loss == "aucm" else self.optimizer
        return {"classifier": self.classifier, "optimizer": memory}


def predict(
    classifier: PrototypeClassifier,
    real: Float[Tensor, "*episodes n_way k_shot d"],
    made: Float[Tensor, "*episodes n_way n d"],
    query: Float[Tensor, "*episodes n_query d"],
    weight: float | int = 1.0,
) -> Float[Tensor, "*episodes n_query n_way"]:
    """Logits of queries from vectors of real supports, and of made ones with a weight beside 1."""
    vectors = torch.cat([real, made], -2)
    weights = torch.ones(vectors.shape[:-1], device=vectors.device)
    weights[..., real.shape[-2] :] = weight
    return classifier.logits(query, vectors, weights)


def pictures(images: ImageSet, episode: Episode, device: torch.device) -> tuple[Shots, Images]:
    """Support and query images of an episode."""
    support, query = images_at(images, episode.support), images.tensor(episode.query)
    return support.to(device), query.to(device)


class Method(NamedTuple):
    """A classifier with the number of extra supports that it is given."""

    n: int
    classifier: PrototypeClassifier


@torch.no_grad()
def evaluate(
    methods: Sequence[Method],
    source: Source,
    images: ImageSet,
    episodes: Tasks,
    n_episodes: int,
    *,
    first: int = 0,
    weight: float | int = 1.0,
    seed: int = 0,
) -> Iterator[Float[np.ndarray, "episodes methods"]]:
    """Macro one-vs-rest AUROC of episodes, for several methods with one source of supports.

    All methods see the same episodes and the first n of the same extra supports; ``weight`` is
    that of an extra support in a prototype. What the source learns from an episode is undone after
    it. Episodes are made and embedded ``EPISODES_AT_ONCE`` together where the source allows;
    ``first`` of them, a multiple of that, are done already. All processes get all results.

    Yields:
        AUROC of the next episodes, one column for each method. That of an episode depends on the
        seed and on its place, not on what was evaluated before it; if the source makes several
        episodes in one call, also on how many of its ``EPISODES_AT_ONCE`` there are.

    Raises:
        UserError: the source cannot serve an episode.
    """
    most = max(method.n for method in methods)
    device = methods[0].classifier.log_scale.device
    known: dict[nn.Module, dict[int, Tensor]] = {m.classifier.eval(): {} for m in methods}

    def embedded(
        classifier: PrototypeClassifier, rows: Int[np.ndarray, "*shape"]
    ) -> Float[Tensor, "*shape d"]:
        """Vectors of real images, each computed once."""
        vectors = known[classifier]
        new = [row for row in np.unique(rows).tolist() if row not in vectors]
        if new:
            x = images.tensor(new).to(device)
            vectors.update(zip(new, classifier.embed(x), strict=True))
        stacked = torch.stack([vectors[row] for row in rows.ravel().tolist()])
        return stacked.unflatten(0, rows.shape)

    def measured(begin: int) -> Float[np.ndarray, "episodes methods"]:
        chunk = [episodes[i] for i in range(begin, min(begin + EPISODES_AT_ONCE, n_episodes))]
        supports = np.stack([episode.support for episode in chunk])
        queries = np.stack([episode.query for episode in chunk])
        answers = np.stack([episode.answers for episode in chunk])
        extra = _make(source, chunk, images_at(images, supports).to(device), most, [seed, begin])
        columns = []
        for n, classifier in methods:
            real, query = embedded(classifier, supports), embedded(classifier, queries)
            offered, made = extra[:, :, :n], real[:, :, :0]
            if n:
                made = classifier.embed(offered.flatten(0, 2)).unflatten(0, offered.shape[:3])
            chances = predict(classifier, real, made, query, weight).softmax(-1)
            columns.append(np.asarray(auroc(answers, chances)))
        return np.stack(columns, 1)

    yield from parallel.dealt(measured, range(first, n_episodes, EPISODES_AT_ONCE))


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


class State(checkpoint.Stateful):
    """Everything a joint training is at one step.

    ``losses`` (steps, 1 + learners) are those of the source and of each learner, ``validation``
    (epochs, learners) the mean AUROC over the validation episodes, and ``best`` the weights of
    each learner's classifier after its best epoch, the later of equals.
    """

    def __init__(self, source: Source, learners: Sequence[Learner], steps: int, per_epoch: int):
        self.source, self.learners = source, learners
        device = learners[0].classifier.log_scale.device
        self.losses = torch.full((steps, 1 + len(learners)), torch.nan, device=device)
        self.validation = torch.full((-(-steps // per_epoch), len(learners)), torch.nan)
        self.best = [copy.deepcopy(learner.classifier.state_dict()) for learner in learners]

    def parts(self) -> dict[str, object]:
        """All but the step, each learner by itself."""
        parts = {"losses": self.losses, "validation": self.validation, "source": self.source}
        for i, learner in enumerate(self.learners):
            parts |= {f"learner{i}": learner, f"best{i}": self.best[i]}
        return parts

    def log(self) -> dict[str, list]:
        """The losses so far."""
        names = ("generator", *(f"plus_{learner.n}" for learner in self.learners))
        return dict(zip(names, self.losses[: self.step].T.tolist(), strict=True))

    def check(self) -> None:
        """Raises a `UserError` if a loss is not finite."""
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
        better_before = (self.validation[:epoch] > self.validation[epoch]).any(0)
        for i, learner in enumerate(self.learners):
            if not better_before[i]:
                self.best[i] = copy.deepcopy(learner.classifier.state_dict())


def episode(state: State, images: ImageSet, task: Episode, seed: int) -> None:
    """One training episode: the source learns it and makes images, each classifier takes a step on
    all of them, lightly changed. Its losses become a row of the state's.
    """
    support, query = pictures(images, task, state.losses.device)
    answers = torch.as_tensor(task.answers, device=state.losses.device)
    losses = [state.source.adapt(task, support, seed)]
    most = max(learner.n for learner in state.learners)
    extra = state.source.make(task, support, most, seed) if most else support[:, :0]
    rng = torch.Generator().manual_seed(seed)
    support = lightly_changed(support.flatten(0, 1), rng).view_as(support)
    query, extra = lightly_changed(query, rng), extra.clone()
    for i in range(most):  # one after the other: the first n are the same whatever comes after
        extra[:, i] = lightly_changed(extra[:, i], rng)
    for learner in state.learners:
        losses.append(learner.learn(support, extra[:, : learner.n], query, answers))
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

    The source learns from each of so many ``steps`` episodes before it makes images;
    ``classifiers`` maps a number of extra supports to the classifier that is trained with them,
    whose learning rate is divided by 10 after the parts ``decays`` of the steps.

    After each epoch of ``per_epoch`` episodes, the weights that did best on the first
    ``n_validation`` tasks of ``validation`` so far are kept, without it the last ones, and a
    checkpoint is written to ``folder``, see :func:`hallulib.storage.checkpoint.loop`. With
    ``settings``, all else that the run depends on and JSON can hold, others do not resume it.

    Raises:
        UserError: an image or loss that is not finite, a checkpoint damaged or of other settings.
    """
    settings = (settings or {}) | {"steps": steps, "per_epoch": per_epoch, "seed": seed}
    settings |= {"fit": asdict(fit), "decays": list(decays), "n_validation": n_validation}
    learners = [Learner(c, n, episodes.n_way, fit) for n, c in classifiers.items()]
    methods = [Method(n, c) for n, c in classifiers.items()]
    decay_at = {round(part * steps) for part in decays} - {0}

    def take(state: State) -> None:
        own = int(np.random.default_rng([seed, state.step]).integers(2**31))  # of the episode
        episode(state, images, episodes[state.step], own)
        if state.step + 1 in decay_at:
            for learner in learners:
                learner.decay()

    def look(state: State) -> None:
        state.check()
        epoch = (state.step - 1) // per_epoch
        if validation is not None and n_validation:
            parts = evaluate(
                methods, source, images, validation, n_validation, weight=fit.weight, seed=seed
            )
            state.validation[epoch] = torch.as_tensor(np.concatenate(list(parts)).mean(0))
        state.keep_best(epoch)

    return checkpoint.loop(
        State(source, learners, steps, per_epoch),
        take,
        steps=steps,
        every=per_epoch,
        patience=math.inf,  # an epoch is whole when it is looked at
        look=look,
        folder=folder,
        settings=settings,
    )
