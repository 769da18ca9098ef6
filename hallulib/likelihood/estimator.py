"""Classification by likelihood as a scikit-learn estimator, which goes into pipelines as any."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from hallulib import UserError
from hallulib.diffusion import train, unet
from hallulib.diffusion.score import ScoreModel
from hallulib.evidence import calibration
from hallulib.likelihood import bound, density
from hallulib.shapes import Images
from hallulib.storage import checkpoint, settings, store
from hallulib.storage.estimator import OneClass, Others, must_suit


@dataclass(eq=False, repr=False, kw_only=True)
class ScoreClassifier(calibration.ImageClassifier):
    r"""Classify images by the likelihood that a class-conditional score model gives them.

    .. math:: p(c \mid x) \propto p_\theta(x \mid c)^{1/T}

    for classes that are equally frequent; where they are not, add the logarithm of each frequency
    to ``log_ratio(X) / temperature_``. ``fit`` trains the model, from scratch or from a pretrained
    one; images without labels help it to learn what images look like. Forms of images,
    ``channels``, ``device`` and ``random_state``: see
    :class:`hallulib.storage.estimator.ImageEstimator`, which also saves and loads.

    Args:
        pretrained: score model to start from, of any labels, or its folder; ``None``: a new one.
        shift: start each class as the density of all images, moved to the mean of its own, see
            :func:`hallulib.diffusion.unet.moved_to_means`; with ``steps=0`` that is all it learns.
        steps, batch_size, lr: of Adam; 0 steps take a pretrained model as it is.
        class_rate: rate of the class vectors, as a multiple of ``lr``.
        width: of a new network, see :func:`hallulib.diffusion.unet.build`.
        effort: most network evaluations for each image and class.
        exact: answer by the probability flow, as the paper does, with ``effort`` evaluations for
            each image and class; otherwise by a decision, which is adaptive and far faster.
        confidence, power: of the decision, see :func:`hallulib.likelihood.bound.decide`.
        weigh: with 2 or more, only the band of noise levels counts in which labelled images that
            were held out are told apart best (:func:`hallulib.likelihood.bound.best_band`), in so
            many folds, each at the cost of a training; the model that answers learns from all.
        centre: subtract from each class what it is ahead by, on the mean, on images without
            labels; for classes that are about equally frequent among them.
        batch: most pairs of image and class in the network at once.
        folder: where training keeps its checkpoint, so that it can go on after an interruption;
            one of other images or of another start is refused.
        verbose: show a progress bar.

    Attributes:
        classes_, temperature_: the labels, sorted, and T: 1, which takes densities at their word,
            until `calibrate` finds a better one.
        model_: the trained `ScoreModel`, on its device.
        levels_: noise levels at which its classes differ most or, with ``weigh``, the band where
            they are told apart best.
        offset_: what is subtracted from the errors of each class, pair by pair
            (:func:`hallulib.likelihood.bound.common_errors`), if they are centred.

    Source: Sarker et al. 2025, https://arxiv.org/abs/2502.17727; Li et al. 2023.

    Example:
        >>> x = np.sign(np.random.default_rng(0).normal(size=(8, 64)))
        >>> ScoreClassifier(steps=2, width=8, effort=4).fit(x, x[:, 0] > 0).predict(x).shape
        (8,)
    """

    keeps = {
        "pretrained": (unet.save, unet.load),
        "model_": (unet.save, unet.load),
        "levels_": bound.Levels,
    }
    pretrained: Annotated[
        ScoreModel | Path | str | None, settings.needed("a score model or its folder is needed")
    ] = field(default=None, kw_only=False)
    shift: bool = False
    steps: settings.Count = 2000
    batch_size: settings.Positive = 32
    lr: settings.Amount = 4e-4
    class_rate: settings.Amount = 25
    width: settings.Width = 32
    effort: settings.Several = 32
    exact: bool = False
    confidence: settings.Confidence = 0.99
    power: settings.Amount = 0.5
    weigh: settings.Count = 0
    centre: bool = False
    batch: settings.Positive = 128
    folder: settings.Folder = None
    verbose: bool | int = False

    def fit(self, X, y, unlabelled=None) -> "ScoreClassifier":
        """Train the score model: every class is drawn equally often.

        Labels are numbers or strings. Images without labels fill half of every batch.

        Raises:
            UserError: an impossible setting, unsuitable images, or another training's checkpoint.
            ValueError: scikit-learn's own checks of X and y.
        """
        own, position = self._first(X, y)
        if self.exact and (self.centre or self.weigh):
            raise UserError("exact is True, and centre and weigh are of decisions; one is needed")
        labels = torch.from_numpy(position)
        others = own[:0] if unlabelled is None else self._further(unlabelled, learns=True)
        band = self._best_band(own, labels, others) if self.weigh else None
        self.model_ = self._trained(own, labels, others)
        # images it cannot have remembered show where classes differ
        some = _some(others if len(others) else own, 32, self._seed).to(self._on())
        self.levels_ = band or bound.informative_levels(
            self.model_, some, power=self.power, seed=self._seed, batch=self.batch
        )
        self.temperature_, self.offset_ = 1.0, None
        if self.centre and len(others):
            some = _some(others, 96, self._seed + 1).to(self._on())
            self.offset_ = bound.common_errors(self.model_, some, self._noises(), self.batch).cpu()
        return self

    def _noises(self) -> bound.Noises:
        """The same for all images."""
        return bound.Noises(self.effort // 2, self.levels_, self.power, seed=self._seed)

    def calibrate(self, X, y) -> "ScoreClassifier":
        """Set the temperature that makes labels of images it was not trained on most likely.

        A label that was not in the training, or labels of one class, are a `UserError`.
        """
        check_is_fitted(self)
        y = self._known(y)
        if len(np.unique(y)) < 2:
            raise OneClass("images of 1 class found; a temperature needs those of at least 2")
        position = torch.from_numpy(np.searchsorted(self.classes_, y))
        self.temperature_ = calibration.fit_temperature(self.log_ratio(X), position)
        return self

    def log_ratio(self, X) -> calibration.LogDensities:
        """Log-likelihood of each class against the most likely one, in nats."""
        return self.measure(X)[0]

    def measure(self, X) -> tuple[calibration.LogDensities, np.ndarray]:
        """`log_ratio`, and the network evaluations that each image took."""
        x = self._further(X).to(self._on())
        if self.exact:
            how: dict[str, Any] = dict(steps=self.effort - 1, seed=self._seed, batch=self.batch)
            x = density.dequantise(x, self._seed)
            value = calibration.finite(density.log_density(self.model_, x, **how).value.cpu())
            evaluations = np.full(len(x), self.effort * len(self.classes_))
            return value - value.max(1, keepdim=True).values, evaluations
        noises = self._noises()
        if self.offset_ is not None and noises.pairs > self.offset_.shape[1]:
            raise UserError(
                f"effort is {self.effort}, more than when fit centred the classes; fit again with "
                "this effort"
            )
        how = dict(confidence=self.confidence, batch=self.batch)
        found = bound.decide(self.model_, x, noises, offsets=self.offset_, **how)
        value = calibration.finite(found.log_ratio.cpu())
        return value - value.max(1, keepdim=True).values, found.evaluations.cpu().numpy()

    def _log_posterior(self, X) -> calibration.LogDensities:
        return self.log_ratio(X) / self.temperature_

    def _best_band(self, own: Images, labels: Tensor, others: Others) -> bound.Levels:
        """The band of noise levels that tells most about images that a training did not see."""
        least = int(torch.bincount(labels).min())
        if not 2 <= self.weigh <= least:
            raise UserError(
                f"weigh is {self.weigh} and the rarest class has {least} labelled images; 0, or "
                "from 2 to that many are needed"
            )
        folds = StratifiedKFold(self.weigh, shuffle=True, random_state=self._seed)
        leads, most = [], max(2, 96 // self.weigh)  # a few dozen tell enough
        for i, (seen, held_out) in enumerate(folds.split(labels, labels)):
            model = self._trained(own[seen], labels[seen], others, f"fold-{i}")
            few = np.random.default_rng(self._seed).permutation(held_out)[:most]
            x, y = own[few].to(self._on()), labels[few]
            leads.append(bound.leads(model, x, y, seed=self._seed, batch=self.batch))
        return bound.best_band(model.sde, torch.cat(leads).cpu())

    def _trained(self, own: Images, labels: Tensor, others: Others, part: str = "") -> ScoreModel:
        """A model that has learnt from labelled images, and from those without labels."""
        model = self._start(own, labels).to(self._on())
        if self.steps == 0:
            return model.eval().requires_grad_(False)
        weights = 1 / torch.bincount(labels)[labels].double() / len(model.labels)
        folder, identity = None, ""
        if self.folder is not None:
            folder = Path(self.folder) / part
            identity = checkpoint.identity(own, labels, others, *model.state_dict().values())
        labels = torch.cat([labels, labels.new_full((len(others),), -1)])
        weights = torch.cat([weights, torch.ones(len(others)).double() / len(others)])
        loop = train.pretrain(
            model,
            torch.cat([own, others]).to(self._on()),
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
        return store.finished(loop, self.steps, "training", show=bool(self.verbose)).ema

    def _start(self, images: Images, labels: Tensor) -> ScoreModel:
        """The model before it learns: a new one, or the pretrained one with other labels."""
        names = [str(label) for label in self.classes_]
        if self.pretrained is None:
            side, width, seed = images.shape[2], self.width, self._seed
            model = unet.build(
                size=side, channels=self.channels, labels=names, width=width, seed=seed
            )
        else:
            start = self.pretrained
            start = start if isinstance(start, ScoreModel) else unet.load(Path(start))
            model = unet.relabelled(start, names).requires_grad_()
            must_suit(images, model.network.shape, "the score model was trained on")
        return unet.moved_to_means(model, images, labels) if self.shift else model


def _some(images: Others, n: int, seed: int) -> Tensor:
    """At most n images, drawn at random."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]]
