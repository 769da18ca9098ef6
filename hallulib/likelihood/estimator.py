"""Classification by likelihood as a scikit-learn estimator, which goes into pipelines as any."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from hallulib import UserError
from hallulib.data.changes import lightly_changed
from hallulib.diffusion import unet
from hallulib.diffusion.score import ScoreModel
from hallulib.diffusion.train import pretrain
from hallulib.diffusion.unet import ADAPTS, adaptable, moved_to_means, relabelled
from hallulib.evidence.calibration import (
    LogDensities,
    finite,
    fit_temperature,
    log_odds,
    posterior,
)
from hallulib.likelihood.bound import (
    Levels,
    best_band,
    bound,
    common_errors,
    decide,
    informative_levels,
    leads,
)
from hallulib.likelihood.density import dequantise, log_density
from hallulib.shapes import Images
from hallulib.storage import checkpoint, store
from hallulib.storage.estimator import ImageEstimator, OneClass, Others
from hallulib.storage.settings import (
    Above0,
    Amount,
    Confidence,
    Count,
    Folder,
    Positive,
    Width,
    needed,
    one_of,
)

METHODS = ("decide", "bound", "exact")


class ScoreClassifier(ClassifierMixin, ImageEstimator):
    r"""Classify images by the likelihood that a class-conditional score model gives them.

    .. math:: p(c \mid x) \propto p(c)\, p_\theta(x \mid c)^{1/T}

    ``fit`` trains the model, from scratch or from a pretrained one; images without labels help
    it to learn what images look like. Forms of images: see
    :class:`hallulib.storage.estimator.ImageEstimator`, which also saves and loads.

    Args:
        pretrained: score model to start from, or its folder; its own labels may be others.
            ``None`` starts from scratch.
        adapt: which weights of a pretrained model learn: ``"all"``, ``"classes"``.
        shift: start each class as the density of all images, moved to the mean of its own
            (:func:`hallulib.diffusion.unet.moved_to_means`); with ``steps=0`` that is all it
            learns.
        channels: of images that come as rows.
        copies: moved and mirrored copies of each labelled image to train on as well; with few
            labels they keep the model from remembering the images instead of the class.
        steps: optimiser steps; 0 takes a pretrained model as it is.
        batch_size: images per step.
        lr: Adam's learning rate.
        class_rate: that of the class vectors, as a multiple of ``lr``; see
            :func:`hallulib.diffusion.train.pretrain`.
        width: of a new network, see :func:`hallulib.diffusion.unet.build`.
        method: ``"decide"``, adaptive and fast; ``"bound"``; or ``"exact"``, by the probability
            flow.
        effort: network evaluations for each image and class, at most for ``"decide"``.
        confidence: of each comparison that drops a class, see
            :func:`hallulib.likelihood.bound.decide`.
        power: weight ``s ** power`` of noise levels in ``"decide"``; 0 is the likelihood.
        weigh: with 2 or more, only the band of noise levels counts in which labelled images that
            were held out are told apart best, in so many folds of which each costs a training of
            its own; the model that answers learns from all. With few labels that is more than a
            sum over bands can know (:func:`hallulib.likelihood.bound.best_band`).
        priors: ``"equal"``, ``"observed"`` frequencies of the labels, or one number per class.
        centre: subtract from each class what it is ahead by, on the mean, on images without
            labels; for classes that are about equally frequent among them.
        temperature: T, 1 takes densities at their word; `calibrate` finds a better one.
        batch: most pairs of image and class in the network at once.
        folder: where training keeps its checkpoint, so that it can go on after an interruption;
            one of other images or of another start is refused.
        device: a GPU if there is one.
        random_state: of everything, a whole number.
        verbose: show a progress bar.

    Attributes:
        classes_: the labels, sorted.
        model_: the trained `ScoreModel`, on its device.
        levels_: noise levels at which its classes differ most or, with ``weigh``, the band where
            they are told apart best, for ``"decide"``.
        priors_: one number per class.
        offset_: what is subtracted from the log-likelihood of each class; for ``"decide"`` from
            its errors, pair by pair (:func:`hallulib.likelihood.bound.common_errors`).
        temperature_: T.

    Source:
        Sarker et al. 2025, https://arxiv.org/abs/2502.17727; Li et al. 2023.

    Example:
        >>> x = np.sign(np.random.default_rng(0).normal(size=(8, 64)))
        >>> ScoreClassifier(steps=2, width=8, effort=4).fit(x, x[:, 0] > 0).predict(x).shape
        (8,)
    """

    keeps = {
        "pretrained": (unet.save, unet.load),
        "model_": (unet.save, unet.load),
        "levels_": Levels,
    }
    pretrained: Annotated[
        ScoreModel | Path | str | None, needed("a score model or its folder is needed")
    ]
    adapt: Annotated[str, one_of(ADAPTS)]
    shift: bool
    copies: Count
    steps: Count
    batch_size: Positive
    lr: Amount
    class_rate: Amount
    width: Width
    method: Annotated[str, one_of(METHODS)]
    effort: Positive
    confidence: Confidence
    power: Amount
    weigh: Count
    centre: bool
    temperature: Above0
    batch: Positive
    folder: Folder
    verbose: bool | int

    # no types of arguments here and below: in scikit-learn anything goes in, and fit refuses it
    def __init__(
        self,
        pretrained=None,
        *,
        adapt="all",
        shift=False,
        channels=1,
        copies=0,
        steps=2000,
        batch_size=32,
        lr=4e-4,
        class_rate=25,
        width=32,
        method="decide",
        effort=32,
        confidence=0.99,
        power=0.5,
        weigh=0,
        priors="equal",
        centre=False,
        temperature=1.0,
        batch=128,
        folder=None,
        device=None,
        random_state=0,
        verbose=False,
    ):
        self.pretrained = pretrained
        self.adapt = adapt
        self.shift = shift
        self.channels = channels
        self.copies = copies
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.class_rate = class_rate
        self.width = width
        self.method = method
        self.effort = effort
        self.confidence = confidence
        self.power = power
        self.weigh = weigh
        self.priors = priors
        self.centre = centre
        self.temperature = temperature
        self.batch = batch
        self.folder = folder
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y, unlabelled=None) -> "ScoreClassifier":
        """Train the score model: every class is drawn equally often.

        Args:
            X: labelled images.
            y: their labels, numbers or strings.
            unlabelled: images without labels, of the same kind; they fill half of every batch.

        Raises:
            UserError: an unknown or impossible setting, images that do not suit the network, or
                a checkpoint of another training.
            ValueError: scikit-learn's own checks of X and y.
        """
        own, position = self._first(X, y)
        if self.effort < 2 and self.method != "decide":
            raise UserError(f"effort is {self.effort}; at least 2 is needed, or method 'decide'")
        labels = torch.from_numpy(position)
        self.priors_ = self._priors(labels)
        others = own[:0]
        if unlabelled is not None:
            others = self._further(unlabelled, learns=True)
        adaptive = self.method == "decide"
        weighed = self._best_band(own, labels, others) if adaptive and self.weigh else None
        folder = None if self.folder is None else Path(self.folder)
        self.model_ = self._trained(own, labels, others, folder)
        if adaptive:
            # images it cannot have remembered show where classes differ
            self.levels_ = weighed or informative_levels(
                self.model_,
                _some(others if len(others) else own, 32, self._seed).to(self._on()),
                power=self.power,
                seed=self._seed,
                batch=self.batch,
            )
        self.temperature_ = self.temperature
        self.offset_ = torch.zeros((len(self.classes_), 1), dtype=torch.float64)
        if self.centre and len(others):
            self.offset_ = self._ahead(_some(others, 96, self._seed + 1), adaptive)
        return self

    def _ahead(self, some: Images, adaptive: bool) -> Tensor:
        """What each class has on all images, pair by pair where it is adaptive."""
        if adaptive:
            return common_errors(self.model_, some.to(self._on()), **self._race()).cpu()
        ahead = self.log_ratio(some.numpy())
        return (ahead.mean(0) - ahead.mean())[:, None]

    def _race(self) -> dict:
        """The errors that ``"decide"`` compares: the same noises for all images."""
        told = {"pairs": max(1, self.effort // 2), "antithetic": self.effort > 1}
        told |= {"levels": self.levels_, "power": self.power}
        return told | {"seed": self._seed, "batch": self.batch}

    def calibrate(self, X, y) -> "ScoreClassifier":
        """Set the temperature that makes the probabilities of other images most likely.

        Args:
            X: images that the model was not trained on.
            y: their labels.

        Raises:
            UserError: a label that was not in the training, or labels of one class.
        """
        check_is_fitted(self)
        y = self._known(y)
        if len(np.unique(y)) < 2:
            raise OneClass("images of 1 class found; a temperature needs those of at least 2")
        position = torch.from_numpy(np.searchsorted(self.classes_, y))
        self.temperature_ = fit_temperature(self.log_ratio(X), position, self.priors_)
        return self

    def log_ratio(
        self, X, return_evaluations: bool = False
    ) -> LogDensities | tuple[LogDensities, np.ndarray]:
        """Log-likelihood of each class against the most likely one, before priors, in nats.

        Args:
            X: images.
            return_evaluations: give the network evaluations that each image took as well.
        """
        x, k = self._further(X).to(self._on()), len(self.classes_)
        common = {"seed": self._seed, "batch": self.batch}
        if self.method == "decide":
            race = self._race()
            race |= {"first": min(4, race["pairs"]), "confidence": self.confidence}
            if self.offset_.any():
                race["offsets"] = self.offset_
                if race["pairs"] > self.offset_.shape[1]:
                    raise UserError(
                        f"effort is {self.effort}, more than when fit centred the classes; fit "
                        "again with this effort"
                    )
            found = decide(self.model_, x, **race)
            value, evaluations = found.log_ratio.double().cpu(), found.evaluations
        else:
            x = dequantise(x, self._seed)
            if self.method == "bound":
                value = bound(self.model_, x, pairs=self.effort, **common).value
            else:
                value = log_density(self.model_, x, steps=self.effort - 1, **common).value
            value = value.double().cpu() - self.offset_[:, 0]
            evaluations = torch.full((len(x),), k * self.effort)
        value = finite(value) - value.max(1, keepdim=True).values
        return (value, evaluations.cpu().numpy()) if return_evaluations else value

    def predict_proba(self, X) -> np.ndarray:
        """Probability of each class, in the order of ``classes_``."""
        return posterior(self.log_ratio(X), self.priors_, self.temperature_).numpy()

    def decision_function(self, X) -> np.ndarray:
        """Log-odds of each class against all others; of the second class alone if there are two.

        Unlike probabilities they stay distinct where one class is all but certain.
        """
        odds = log_odds(self._log_posterior(X)).numpy()
        return odds[:, 1] if len(self.classes_) == 2 else odds

    def predict(self, X) -> np.ndarray:
        """The class of highest probability."""
        best = self._log_posterior(X).argmax(1).numpy()
        return self.classes_[best]

    def _log_posterior(self, X) -> LogDensities:
        """Log-probability of each class, up to a constant per image."""
        return self.log_ratio(X) / self.temperature_ + self.priors_.log()

    def _best_band(self, own: Images, labels: Tensor, others: Others) -> Levels:
        """The band of noise levels that tells most about images that a training did not see."""
        least = int(torch.bincount(labels).min())
        if not 2 <= self.weigh <= least:
            raise UserError(
                f"weigh is {self.weigh} and the rarest class has {least} labelled images; 0, or "
                "from 2 to that many are needed"
            )
        folds = StratifiedKFold(self.weigh, shuffle=True, random_state=self._seed)
        found = []
        for i, (seen, held_out) in enumerate(folds.split(labels, labels)):
            folder = None if self.folder is None else Path(self.folder) / f"fold-{i}"
            model = self._trained(own[seen], labels[seen], others, folder)
            # a few dozen tell enough
            held_out = np.random.default_rng(self._seed).permutation(held_out)
            held_out = held_out[: max(2, 96 // self.weigh)]
            x, y = own[held_out].to(self._on()), labels[held_out]
            found.append(leads(model, x, y, seed=self._seed, batch=self.batch))
        return best_band(model.sde, torch.cat(found).cpu())

    def _trained(
        self, own: Images, labels: Tensor, others: Others, folder: Path | None
    ) -> ScoreModel:
        """A model that has learnt from labelled images, their copies, and those without labels."""
        rng = torch.Generator().manual_seed(self._seed)
        images = torch.cat([own, *(lightly_changed(own, rng) for _ in range(self.copies))])
        labels = labels.repeat(1 + self.copies)
        model = self._start(images, labels).to(self._on())
        if self.steps == 0:
            return model.eval().requires_grad_(False)
        weights = 1 / torch.bincount(labels)[labels].double() / len(model.labels)
        identity = ""
        if folder is not None:
            parts = checkpoint.identity(images, labels, others, *model.state_dict().values())
            identity = f"{parts} {self.adapt}"
        if len(others):
            images = torch.cat([images, others])
            labels = torch.cat([labels, labels.new_full((len(others),), -1)])
            weights = torch.cat([weights, weights.new_full((len(others),), 1 / len(others))])
        loop = pretrain(
            model,
            images.to(self._on()),
            labels.to(self._on()),
            weights=weights.to(self._on()),
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            class_rate=self.class_rate,
            warmup=min(500, self.steps // 10),
            seed=self._seed,
            folder=folder,
            identity=identity,
        )
        return store.finished(loop, self.steps, "training", show=self.verbose).ema

    def _start(self, images: Images, labels: Tensor) -> ScoreModel:
        """The model before it learns: a new one, or the pretrained one with other labels."""
        names = [str(label) for label in self.classes_]
        if self.pretrained is None:
            told = dict(channels=self.channels, labels=names, width=self.width)
            model = unet.build(size=images.shape[2], seed=self._seed, **told)
        else:
            start = self.pretrained
            start = start if isinstance(start, ScoreModel) else unet.load(Path(start))
            model = relabelled(start, names)
            if images.shape[1:] != model.network.shape:
                raise UserError(
                    f"images have (channels, height, width) {tuple(images.shape[1:])}; the score "
                    f"model was trained on {tuple(model.network.shape)}"
                )
            adaptable(model, self.adapt)
        return moved_to_means(model, images, labels) if self.shift else model

    def _priors(self, labels: Tensor) -> Tensor:
        counts = torch.bincount(labels).double()
        if isinstance(self.priors, str):
            if self.priors not in ("equal", "observed"):
                raise UserError(
                    f"priors is {self.priors!r}; 'equal', 'observed' or one number per class "
                    "is needed"
                )
            counts = counts if self.priors == "observed" else torch.ones_like(counts)
            return counts / counts.sum()
        given = np.ravel(self.priors)
        numbers = given.dtype.kind in "fiu" and len(given) == len(counts)
        if not (numbers and given.min() > 0 and abs(given.sum() - 1) < 1e-6):
            raise UserError(
                f"priors are {self.priors}; {len(counts)} numbers above 0 that sum to 1 are needed"
            )
        return torch.from_numpy(given.astype(float))


def _some(images: Others, n: int, seed: int) -> Tensor:
    """At most n images, drawn at random."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]]
