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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hallulib import UserError, checkpoint
from hallulib.data import ImageSet
from hallulib.episodes import Episode, Episodes
from hallulib.evaluation import EPISODES_AT_ONCE, Method, evaluate, pictures
from hallulib.learner import Fit, Learner, predict
from hallulib.prototypes import PrototypeClassifier
from hallulib.supports import Source

# one place to import joint training and evaluation from
__all__ = [
    "EPISODES_AT_ONCE",
    "Fit",
    "Learner",
    "Method",
    "State",
    "evaluate",
    "meta_train",
    "pictures",
    "predict",
]


@dataclass
class State:
    """Everything a joint training is at one step.

    Attributes:
        source: of the extra supports, with what it has learnt.
        learners: one for each number of extra supports.
        log: (steps, 1 + learners) loss of the source and of each learner.
        validation: (epochs, learners) mean AUROC over the validation episodes.
        best: weights of each learner's classifier after its best epoch, the later of equals.
        decay_at: steps after which the learning rates fall.
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
        """Take on a state that ``tensors`` wrote at this step.

        Raises:
            KeyError, RuntimeError: the tensors are of another training.
        """
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
    fit = fit or Fit()
    settings = (settings or {}) | {"steps": steps, "per_epoch": per_epoch, "seed": seed}
    settings |= {"fit": asdict(fit), "decays": list(decays), "n_validation": n_validation}
    learners = [Learner(c, n, episodes.n_way, fit) for n, c in classifiers.items()]
    state = _start(source, learners, steps, per_epoch, decays)
    if folder is not None:
        checkpoint.resume(state, Path(folder), settings)
    if state.step == steps:  # killed between its last step and what the caller does with it
        yield state
    while state.step < steps:
        state.log[state.step] = _episode(state, images, episodes[state.step], seed)
        state.step += 1
        if state.step in state.decay_at:
            for learner in learners:
                learner.decay()
        if state.step % per_epoch == 0 or state.step == steps:
            _check_finite(state)
            _validate(state, -(-state.step // per_epoch), images, validation, n_validation, seed)
            if folder is not None:
                columns = ("generator", *(f"plus_{learner.n}" for learner in learners))
                log = dict(zip(columns, state.log[: state.step].T.tolist(), strict=True))
                checkpoint.write(Path(folder), state.tensors(), state.step, settings, log)
        yield state


def _start(
    source: Source,
    learners: Sequence[Learner],
    steps: int,
    per_epoch: int,
    decays: Sequence[float | int],
) -> State:
    """The state before the first episode."""
    device = learners[0].classifier.log_scale.device
    epochs = -(-steps // per_epoch)
    return State(
        source,
        learners,
        torch.full((steps, 1 + len(learners)), torch.nan, device=device),
        torch.full((epochs, len(learners)), torch.nan),
        [copy.deepcopy(learner.classifier.state_dict()) for learner in learners],
        sorted({round(part * steps) for part in decays} - {0}),
    )


def _episode(
    state: State, images: ImageSet, episode: Episode, seed: int
) -> Float[Tensor, " columns"]:
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


def _check_finite(state: State) -> None:
    log = state.log[: state.step]
    bad = ~torch.isfinite(log)
    bad[:, 0] &= bool(torch.isfinite(log[0, 0]))  # a source that learns nothing has no loss
    rows = bad.any(1).nonzero()
    if len(rows):
        who = "the generator" if bad[rows[0], 0] else "a classifier"
        raise UserError(
            f"the loss of {who} is not finite from episode {int(rows[0]) + 1} on; "
            "a lower learning rate is needed"
        )


def _validate(
    state: State,
    epoch: int,
    images: ImageSet,
    validation: Episodes | None,
    n_validation: int,
    seed: int,
) -> None:
    """Keep the weights of each classifier that did best on the validation episodes so far."""
    before = state.validation[: epoch - 1].nan_to_num(-1).amax(0) if epoch > 1 else None
    if validation is not None and n_validation:
        methods = [Method(learner.n, learner.classifier) for learner in state.learners]
        fit = state.learners[0].fit
        parts = evaluate(
            methods, state.source, images, validation, n_validation, fit=fit, seed=seed
        )
        found = torch.as_tensor(np.concatenate(list(parts)).mean(0))
        state.validation[epoch - 1] = found
    for i, learner in enumerate(state.learners):
        if before is None or not state.validation[epoch - 1, i] < before[i]:
            state.best[i] = copy.deepcopy(learner.classifier.state_dict())
