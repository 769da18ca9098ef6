"""Synthetic training images as an estimator in the way of imbalanced-learn: fit, then resample.

``fit`` steers an unconditional latent diffusion model to the classes of a few labelled images and
lets a network trained on these judge what comes out; ``resample`` adds what was admitted. The
steps lie beside it, for the experiment: `pretrained`, `synthesise`, `judged`.

Source:
    Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from sklearn.utils import check_consistent_length
from torch import Tensor, nn
from tqdm.auto import tqdm

from hallulib import UserError
from hallulib.augment import autoencoder, steering
from hallulib.augment.autoencoder import LATENT_CHANNELS, Autoencoder
from hallulib.augment.selection import FeatureSpace, copy_threshold, take
from hallulib.data.changes import augmented
from hallulib.data.imageset import ImageSet
from hallulib.diffusion import train, unet
from hallulib.diffusion.sample import SAMPLERS
from hallulib.diffusion.score import ScoreModel
from hallulib.evidence.resnet import train_resnet
from hallulib.shapes import AnyImages, Images, Labels
from hallulib.storage import settings, store
from hallulib.storage.estimator import ImageEstimator, Others

ENCODING, PRETRAINING = dict(batch_size=16, lr=1e-3), dict(batch_size=64, lr=4e-4)


@dataclass(frozen=True)
class Trial:
    """All settings of the experiment but the images.

    Attributes:
        scheme: label column.
        share: of the labels of the split ``train`` that are kept in a fold, above 0 to 1.
        folds: draws of those labels, each with networks of its own.
        encoding: steps of the autoencoder.
        factor: pixels along each side of a position of its latents: 4 as in the paper suits 64
            pixels and more; of 32 pixels it leaves too little for nuclei to be told apart.
        pretraining: steps of the score model of its latents.
        width: of that score model.
        encoder_width: of the first block of the autoencoder.
        steering: steps of the noise-aware classifier, with the labels.
        gradient_scale: of its gradient; the paper takes 10.
        sampler, sampler_steps: see :func:`hallulib.diffusion.sample.draw`.
        ratio: synthetic images learnt from, for each labelled real one.
        candidates: synthetic images made for each one that is learnt from.
        confidence: see :mod:`hallulib.augment.selection`.
        resnet_steps: of every ResNet-18.
        resnet_width: of its first block.
        n_test: test images, at most; classes keep their shares.
        seed: of everything random; fold i adds i.

    Raises:
        UserError: an impossible number or name.
    """

    scheme: str
    share: settings.ShareAbove0 = 0.05
    folds: settings.Positive = 5
    encoding: settings.Positive = 1500
    factor: settings.Positive = 4
    pretraining: settings.Positive = 3000
    width: settings.Width = 32
    encoder_width: settings.Width = 32
    steering: settings.Positive = 300
    gradient_scale: settings.Amount = 2.0
    sampler: Annotated[str, settings.one_of(SAMPLERS)] = "dpm_solver"
    sampler_steps: settings.Positive = 20
    ratio: settings.Above0 = 1.0
    candidates: settings.Positive = 4
    confidence: settings.ShareBelow1 = 0.5
    resnet_steps: settings.Positive = 300
    resnet_width: settings.Positive = 16
    n_test: settings.Several = 600
    seed: settings.Seed = 0

    def __post_init__(self):
        settings.check(self)


@dataclass(frozen=True)
class Pretrained:
    """What was learnt without labels.

    Attributes:
        autoencoder: between images and latents.
        model: the unconditional score model of the latents.
        folders: of the two runs, where they are runs.
    """

    autoencoder: Autoencoder
    model: ScoreModel
    folders: tuple[Path, ...] = ()


def pretrained(images: ImageSet, trial: Trial, from_scratch: bool = False) -> Pretrained:
    """The autoencoder and the score model of its latents, found by their settings or trained now.

    Both learn from the images without labels alone (from ``train`` where there are none).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def unlabelled() -> Images:
        return images.unlabelled().to(device)

    told = dict(told=f"encoding {images.name}", steps=trial.encoding, from_scratch=from_scratch)
    shape = dict(width=trial.encoder_width, factor=trial.factor, latent_channels=LATENT_CHANNELS)
    first = store.kept(
        f"autoencoder-{images.name}",
        lambda folder: _encoding(unlabelled(), trial, folder),
        lambda state, folder: autoencoder.save(_standardised(state, unlabelled()), folder),
        **dict(data=images.identity, size=images.size, seed=trial.seed) | shape | ENCODING | told,
    )
    encoder = autoencoder.load(first).to(device)
    told |= dict(told="training on latents", steps=trial.pretraining)
    second = store.kept(
        f"latent-score-{images.name}",
        lambda folder: _pretraining(encoder, unlabelled(), trial, folder),
        lambda state, folder: unet.save(state.ema, folder),
        **dict(latents=store.contents(first), width=trial.width, seed=trial.seed),
        **PRETRAINING | told,
    )
    return Pretrained(encoder, unet.load(second).to(device), (first, second))


def _encoding(x: Images, trial: Trial, folder: Path | None = None) -> Iterator[autoencoder.State]:
    """The training of an autoencoder of images."""
    shape = dict(width=trial.encoder_width, factor=trial.factor, seed=trial.seed)
    model = autoencoder.build(size=x.shape[2], channels=x.shape[1], **shape).to(x.device)
    how = dict(steps=trial.encoding, seed=trial.seed, folder=folder)
    return autoencoder.train(model, x, **how, **ENCODING)


def _standardised(state: autoencoder.State, x: Images) -> Autoencoder:
    """What that training ends with, for use."""
    return state.model.eval().standardise(x).requires_grad_(False)


def _pretraining(
    encoder: Autoencoder, x: Images, trial: Trial, folder: Path | None = None
) -> Iterator[train.State]:
    """The training of a score model of their latents."""
    channels, side, _ = encoder.shape
    model = unet.build(size=side, channels=channels, width=trial.width, seed=trial.seed)
    how = dict(steps=trial.pretraining, seed=trial.seed, folder=folder)
    return train.pretrain(model.to(x.device), encoder.encode(x), **how, **PRETRAINING)


def synthesise(
    prior: Pretrained, trial: Trial, x: Images, y: Labels, n: int, seed: int
) -> tuple[AnyImages, Int[Tensor, " _made"]]:
    """Synthetic images of every class, equally many, from what was learnt without labels.

    Args:
        prior: the pretrained models, on the device to work on.
        trial: how to steer and to sample.
        x: the labelled images.
        y: their classes, 0 to k - 1.
        n: images wanted of each class.
        seed: of training and noise.

    Returns:
        Images in [-1, 1] and the class each was made for.
    """
    device = next(prior.model.parameters()).device
    latents, labels = prior.autoencoder.encode(x.to(device)), y.to(device)
    classes = int(y.max()) + 1
    guide = steering.NoisyClassifier(prior.model, classes, seed=seed)
    loop = steering.train(guide, latents, labels, steps=trial.steering, seed=seed)
    for _ in tqdm(loop, total=trial.steering, desc="noise-aware classifier"):
        pass
    wanted = torch.arange(classes, device=device).repeat_interleave(n)
    how = dict(sampler=trial.sampler, steps=trial.sampler_steps, clip=False, seed=seed)
    made = steering.steered(prior.model, guide, wanted, gradient_scale=trial.gradient_scale, **how)
    return prior.autoencoder.decode(made).cpu(), wanted.cpu()


def judged(
    prior: Pretrained, trial: Trial, x: Images, y: Labels, copy_distance: float, seed: int
) -> tuple[nn.Module, AnyImages, pd.DataFrame]:
    """Synthetic images, and what a network trained on the labelled ones says of them.

    Args:
        prior: the pretrained models, on the device to work on.
        trial: the settings.
        x: the labelled images.
        y: their classes, 0 to k - 1.
        copy_distance: below which a synthetic image counts as a copy of one of them.
        seed: of every training and of noise.

    Returns:
        The network that judges, the images, and one row for each, see
        :meth:`hallulib.augment.selection.FeatureSpace.judge`.
    """
    how = dict(steps=trial.resnet_steps, width=trial.resnet_width, seed=seed)
    judge = train_resnet(x, y, change=changed, told="classical", **how)
    n = per_class(trial.ratio, len(x), int(y.max()) + 1) * trial.candidates
    made, wanted = synthesise(prior, trial, x, y, n, seed)
    space = FeatureSpace.fit(judge, x, y, copy_distance)
    return judge, made, space.judge(made, wanted, trial.confidence)


def per_class(ratio: float | int, n: int, classes: int) -> int:
    """Synthetic images learnt from of each class, for n labelled ones of all; at least one."""
    return max(1, math.ceil(round(ratio * n) / classes))


def changed(x: Images, rng: torch.Generator) -> Images:
    """Shifted, mirrored and of other contrast: the classical way."""
    return augmented(x, x[:, None], rng)


class SyntheticAugmenter(ImageEstimator):
    """Adds synthetic images of each class to labelled ones, as far as they pass a selection.

    Forms of images: see :class:`hallulib.storage.estimator.ImageEstimator`, which also saves and
    loads.

    Args:
        pretrained: folders of an autoencoder and of the score model of its latents, as
            ``hallulib.augment.pretrained(...).folders`` gives them. ``None`` trains both on the
            images without labels that ``fit`` is given, or on the labelled ones.
        channels: of images that come as rows.
        ratio: synthetic images to add, for each labelled one.
        candidates: images made for each one to add.
        confidence: least probability of its class, see :mod:`hallulib.augment.selection`.
        gradient_scale: of the classifier's gradient; the paper takes 10.
        encoding, pretraining: steps of the two trainings without labels.
        width: of the score model; the autoencoder has the same.
        factor: pixels along each side of a position of the latents, a power of 2.
        steering: steps of the noise-aware classifier.
        sampler_steps: of DPM-Solver++.
        resnet_steps: of the network that judges.
        device: a GPU if there is one.
        random_state: of everything, a whole number.

    Attributes:
        classes_: the labels, sorted.
        synthetic_: images that were made, (n, channels, side, side) in [-1, 1].
        labels_: the class each was made for.
        verdicts_: one row for each, see :meth:`hallulib.augment.selection.FeatureSpace.judge`.

    Example:
        >>> x = np.sign(np.random.default_rng(0).normal(size=(12, 256)))
        >>> told = dict(encoding=2, pretraining=2, width=8, steering=2, resnet_steps=2)
        >>> some = SyntheticAugmenter(sampler_steps=2, **told).fit(x, x[:, 0] > 0)
        >>> some.synthetic_.shape, len(some.verdicts_)
        ((48, 1, 16, 16), 48)
    """

    ratio: settings.Above0
    candidates: settings.Positive
    confidence: settings.ShareBelow1
    gradient_scale: settings.Amount
    encoding: settings.Positive
    pretraining: settings.Positive
    width: settings.Width
    factor: settings.Positive
    steering: settings.Positive
    sampler_steps: settings.Positive
    resnet_steps: settings.Positive

    # no types of arguments here and below: in scikit-learn anything goes in, and fit refuses it
    def __init__(
        self,
        pretrained=None,
        *,
        channels=1,
        ratio=1.0,
        candidates=4,
        confidence=0.5,
        gradient_scale=2.0,
        encoding=1500,
        pretraining=3000,
        width=32,
        factor=4,
        steering=300,
        sampler_steps=20,
        resnet_steps=300,
        device=None,
        random_state=0,
    ):
        given = locals()  # every parameter under its own name, as scikit-learn asks
        for name in self._get_param_names():
            setattr(self, name, given[name])

    def fit(self, X, y, unlabelled=None) -> "SyntheticAugmenter":
        """Make synthetic images of the classes of ``y`` and judge them.

        Args:
            X: labelled images, two of each class at least.
            y: their labels, numbers or strings.
            unlabelled: images without labels to pretrain on, unless ``pretrained`` is given.

        Raises:
            UserError: a setting or an image that does not suit, or fewer than two classes.
            ValueError: scikit-learn's own checks of X and y.
        """
        x, position = self._first(X, y)
        y = torch.from_numpy(position)
        rarest = int(torch.bincount(y).min())
        if rarest < 2:
            raise UserError(
                f"{len(self.classes_)} classes, the rarest with {rarest} images, found; at least "
                "2 images of each are needed"
            )
        trial = self._trial()
        others = x if unlabelled is None else self._further(unlabelled, learns=True)
        prior = self._prior(others, trial) if self.pretrained is None else self._given(x)
        # how near real images are to each other tells what is a copy
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(trial.seed))
        distance = copy_threshold(x[order[::2]], x[order[1::2]])
        _, made, self.verdicts_ = judged(prior, trial, x, y, distance, trial.seed)
        self.synthetic_, self.labels_ = made.numpy(), self.classes_[self.verdicts_["wanted"]]
        return self

    def resample(self, X, y) -> tuple[np.ndarray, np.ndarray]:
        """The images with synthetic ones after them, and the labels of both.

        Of each class the admitted ones nearest to its centroid are added, equally many as far as
        that many were admitted.

        Args:
            X: labelled images, in any form; the answer has the form of ``X``, and grey levels
                where ``X`` holds them.
            y: their labels.

        Raises:
            UserError: nothing was admitted, or a label that the fit did not see.
            ValueError: not one label for each image.
        """
        x, y = self._further(X), self._known(y)
        check_consistent_length(x, y)
        added = take(self.verdicts_, per_class(self.ratio, len(x), len(self.classes_)))
        both = np.concatenate([x.numpy(), self.synthetic_[added]]).reshape(-1, *np.shape(X)[1:])
        given = np.asarray(self._flat(X)).dtype
        if given.kind in "iu":
            both = ((both + 1) * 127.5).round().astype(given)
        return both, np.concatenate([y, self.labels_[added]])

    def fit_resample(self, X, y, unlabelled=None) -> tuple[np.ndarray, np.ndarray]:
        """``fit(X, y, unlabelled).resample(X, y)``."""
        return self.fit(X, y, unlabelled).resample(X, y)

    def _trial(self) -> Trial:
        """The parameters that are settings of an experiment, as these."""
        shared = {f.name for f in fields(Trial)} & self.get_params().keys()
        values = {name: getattr(self, name) for name in shared}
        return Trial("y", encoder_width=self.width, seed=self._seed, **values)

    def _given(self, x: Images) -> Pretrained:
        """The autoencoder and the score model that ``pretrained`` names, if they suit images."""
        folders = [Path(folder) for folder in self.pretrained]
        if len(folders) != 2:
            raise UserError(
                f"pretrained names {len(folders)} folders; those of an autoencoder and of the "
                "score model of its latents are needed"
            )
        encoder, model = autoencoder.load(folders[0]), unet.load(folders[1])
        shape = (encoder.kl.config.in_channels, *(encoder.kl.config.sample_size,) * 2)
        if tuple(x.shape[1:]) != shape:
            raise UserError(
                f"images have (channels, height, width) {tuple(x.shape[1:])}; the autoencoder "
                f"was made for {shape}"
            )
        return Pretrained(encoder.to(self._on()), model.to(self._on()))

    def _prior(self, others: Others, trial: Trial) -> Pretrained:
        """The autoencoder and the score model of its latents, trained now."""
        x = others.to(self._on())
        state = store.finished(_encoding(x, trial), trial.encoding, "autoencoder")
        encoder = _standardised(state, x)
        loop = _pretraining(encoder, x, trial)
        state = store.finished(loop, trial.pretraining, "training on latents")
        return Pretrained(encoder, state.ema)
