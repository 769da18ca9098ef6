r"""Synthetic training images where labels are few: the steps, and an estimator.

An autoencoder and an unconditional score model of its latents learn from images without labels
(`pretrained`). A noise-aware classifier of the latents of a few labelled images steers the score
model to their classes (`steers`), and a network trained on these images judges what comes out
(`judged`). `SyntheticAugmenter` adds what was admitted, in the way of imbalanced-learn. Whether
that helps is asked in ``book/grids/augmentation.ipynb``.

Source: Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.utils import check_consistent_length
from torch import nn

from hallulib import UserError
from hallulib.augment import autoencoder, steering
from hallulib.augment.autoencoder import LATENT_CHANNELS, WEIGHTS, Autoencoder
from hallulib.augment.selection import FeatureSpace, copy_threshold, take
from hallulib.data.changes import augmented
from hallulib.data.imageset import ImageSet, choose
from hallulib.diffusion import train, unet
from hallulib.diffusion.score import ScoreModel
from hallulib.evidence.resnet import train_resnet
from hallulib.shapes import AnyImages, Images, Labels
from hallulib.storage import disk, settings, store
from hallulib.storage.estimator import ImageEstimator, Others, must_suit

ENCODING: dict[str, Any] = dict(batch_size=16, lr=1e-3)
PRETRAINING: dict[str, Any] = dict(batch_size=16, lr=1e-3, warmup=100)
VERSIONS = 8  # of each labelled image, that the noise-aware classifier learns from besides
CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True)
class Trial:
    """All settings but the images; a `UserError` for an impossible one.

    Attributes:
        scheme: label column.
        share: of the labels of the split ``train`` that are kept.
        encoding: steps of the autoencoder.
        factor: pixels along each side of a position of its latents: 4 as in the paper suits 64
            pixels and more; of 32 pixels it leaves too little for nuclei to be told apart.
        pretraining: steps of the score model of its latents.
        width: of both networks.
        steering: steps of the noise-aware classifier, with the labels.
        gradient_scale: of its gradient; the paper takes 10.
        sampler_steps: see :func:`hallulib.diffusion.sample.draw`.
        ratio: synthetic images learnt from, for each labelled real one.
        candidates: synthetic images made for each one that is learnt from.
        confidence: least probability of its class, see :mod:`hallulib.augment.selection`.
        resnet_steps, resnet_width: of every ResNet-18 and of its first block.
        seed: of everything random.
    """

    scheme: str
    share: settings.ShareAbove0 = 0.05
    encoding: settings.Positive = 1500
    factor: settings.Positive = 4
    pretraining: settings.Positive = 3000
    width: settings.Width = 32
    steering: settings.Positive = 300
    gradient_scale: settings.Amount = 2.0
    sampler_steps: settings.Positive = 20
    ratio: settings.Above0 = 1.0
    candidates: settings.Positive = 4
    confidence: settings.ShareBelow1 = 0.5
    resnet_steps: settings.Positive = 300
    resnet_width: settings.Positive = 16
    seed: settings.Seed = 0

    def __post_init__(self):
        settings.check(self)


@dataclass(frozen=True)
class Pretrained:
    """What was learnt without labels, and the folders of the two runs, where they are runs."""

    autoencoder: Autoencoder
    model: ScoreModel
    folders: tuple[Path, ...] = ()


def pretrained(images: ImageSet, trial: Trial, from_scratch: bool = False) -> Pretrained:
    """The autoencoder and the score model of its latents, found by their settings or trained now.

    Both learn from the images without labels alone (from ``train`` where there are none), and are
    kept in half precision: what is shipped must be small.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def unlabelled() -> Images:
        return images.unlabelled().to(device)

    told: dict[str, Any] = dict(seed=trial.seed, from_scratch=from_scratch)
    asked: dict[str, Any] = dict(data=images.identity, size=images.size, factor=trial.factor)
    asked |= dict(width=trial.width, latent_channels=LATENT_CHANNELS) | told | ENCODING
    asked |= dict(weights=WEIGHTS)
    first = store.kept(
        f"autoencoder-{images.name}",
        lambda folder: _encoding(unlabelled(), trial, folder),
        lambda state, folder: autoencoder.save(_standardised(state, unlabelled()).half(), folder),
        told=f"encoding {images.name}",
        steps=trial.encoding,
        **asked,
    )
    encoder = autoencoder.load(first).to(device)
    asked = told | PRETRAINING | dict(latents=store.contents(first), width=trial.width)
    second = store.kept(
        f"latent-score-{images.name}",
        lambda folder: _pretraining(encoder, unlabelled(), trial, folder),
        lambda state, folder: unet.save(state.ema.half(), folder),
        told="training on latents",
        steps=trial.pretraining,
        **asked,
    )
    return Pretrained(encoder, unet.load(second).to(device), (first, second))


def _encoding(x: Images, trial: Trial, folder: Path | None = None) -> Iterator[autoencoder.State]:
    """The training of an autoencoder of images."""
    shape = dict(width=trial.width, factor=trial.factor, seed=trial.seed)
    model = autoencoder.build(size=x.shape[2], channels=x.shape[1], **shape).to(x.device)
    how: dict[str, Any] = dict(steps=trial.encoding, seed=trial.seed, folder=folder)
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
    how: dict[str, Any] = dict(steps=trial.pretraining, seed=trial.seed, folder=folder)
    return train.pretrain(model.to(x.device), encoder.encode(x), **how, **PRETRAINING)


def steers(
    prior: Pretrained, trial: Trial, x: Images, y: Labels, seed: int, noised: bool = True
) -> steering.NoisyClassifier:
    """A noise-aware classifier of labelled images, x in [-1, 1] of the classes y, 0 to k - 1.

    It learns from each image and from `VERSIONS` of it, augmented; ``noised`` is as for
    :func:`hallulib.augment.steering.train`. It is on the device of the pretrained models.
    """
    device = next(prior.model.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    several = torch.cat([x, *(augmented(x, rng) for _ in range(VERSIONS))])
    latents, labels = prior.autoencoder.encode(several.to(device)), y.repeat(VERSIONS + 1)
    guide = steering.NoisyClassifier(prior.model, int(y.max()) + 1, seed=seed)
    how: dict[str, Any] = dict(steps=trial.steering, noised=noised, seed=seed)
    return steering.train(guide, latents, labels.to(device), **how)


def classifier(
    images: ImageSet,
    trial: Trial,
    prior: Pretrained,
    *,
    noised: bool = True,
    from_scratch: bool = False,
) -> tuple[steering.NoisyClassifier, Path]:
    """The classifier that `steers` by the labels that are kept, and the folder of its run, found
    by its settings or trained now; it is kept in half precision.
    """

    def learn(folder: Path, **_) -> None:
        x, y = _labelled(images, trial)
        guide = steers(prior, trial, x, y, trial.seed, noised)
        halves = {k: v.half().contiguous() for k, v in guide.state_dict().items()}
        with disk.whole_files(folder) as new:
            save_file(halves, new / CLASSIFIER)

    asked = {k: getattr(trial, k) for k in ("scheme", "share", "steering", "seed")}
    folder = store.load_or_train(
        f"{'noise-aware' if noised else 'clean'}-{images.name}",
        learn,
        from_scratch=from_scratch,
        latents=store.contents(prior.folders[1]),
        data=images.identity,
        versions=VERSIONS,
        **asked,
    )
    weights = load_file(folder / CLASSIFIER)
    guide = steering.NoisyClassifier(prior.model, len(weights["head.1.bias"]))
    guide.load_state_dict(weights)
    return guide.eval().requires_grad_(False), folder


def judged(
    prior: Pretrained, trial: Trial, x: Images, y: Labels, copy_distance: float, seed: int
) -> tuple[nn.Module, AnyImages, pd.DataFrame]:
    """Synthetic images, and what a network trained on the labelled ones says of them.

    Arguments are as of `steers` and :class:`hallulib.augment.selection.FeatureSpace`. Given are
    the network, the images in [-1, 1], equally many of each class, and for each of these the row
    of ``FeatureSpace.judge``.
    """
    steps, width, classes = trial.resnet_steps, trial.resnet_width, int(y.max()) + 1
    judge = train_resnet(x, y, steps=steps, width=width, change=augmented, seed=seed)
    n = per_class(trial.ratio, len(x), classes) * trial.candidates
    guide, wanted = steers(prior, trial, x, y, seed), torch.arange(classes).repeat_interleave(n)
    how: dict[str, Any] = dict(steps=trial.sampler_steps, clip=False, seed=seed)
    z = steering.steered(prior.model, guide, wanted, gradient_scale=trial.gradient_scale, **how)
    made = prior.autoencoder.decode(z).cpu()
    space = FeatureSpace.fit(judge, x, y, copy_distance)
    return judge, made, space.judge(made, wanted, trial.confidence)


def _check_two_of_each(y: Labels, classes: str) -> None:
    counts = torch.bincount(y)
    if len(counts) < 2 or counts.min() < 2:
        raise UserError(
            f"{classes}, the rarest with {counts.min()} images; at least 2 classes with 2 images "
            "each are needed"
        )


def per_class(ratio: float | int, n: int, classes: int) -> int:
    """Synthetic images learnt from of each class, for n labelled ones of all; at least one."""
    return max(1, math.ceil(round(ratio * n) / classes))


@dataclass(eq=False, repr=False, kw_only=True)
class SyntheticAugmenter(ImageEstimator):
    """Adds synthetic images of each class to labelled ones, as far as they pass a selection.

    Forms of images, ``channels``, ``device`` and ``random_state``: see
    :class:`hallulib.storage.estimator.ImageEstimator`, which also saves and loads.

    Args:
        pretrained: folders of an autoencoder and of the score model of its latents, as
            ``hallulib.augment.pretrained(...).folders`` gives them. ``None`` trains both on the
            images without labels that ``fit`` is given, or on the labelled ones.
        width: of the score model; the autoencoder has the same.
        ratio, candidates, confidence, gradient_scale, encoding, pretraining, factor, steering,
            sampler_steps, resnet_steps: see `Trial`.

    Attributes:
        classes_: the labels, sorted.
        synthetic_, labels_: images made, (n, channels, side, side) in [-1, 1], and their classes.
        verdicts_: one row for each, see :meth:`hallulib.augment.selection.FeatureSpace.judge`.

    Example:
        >>> x = np.sign(np.random.default_rng(0).normal(size=(12, 256)))
        >>> told = dict(encoding=2, pretraining=2, width=8, steering=2, resnet_steps=2)
        >>> some = SyntheticAugmenter(sampler_steps=2, **told).fit(x, x[:, 0] > 0)
        >>> some.synthetic_.shape, len(some.verdicts_)
        ((48, 1, 16, 16), 48)
    """

    pretrained: Any = field(default=None, kw_only=False)
    ratio: settings.Above0 = Trial.ratio
    candidates: settings.Positive = Trial.candidates
    confidence: settings.ShareBelow1 = Trial.confidence
    gradient_scale: settings.Amount = Trial.gradient_scale
    encoding: settings.Positive = Trial.encoding
    pretraining: settings.Positive = Trial.pretraining
    width: settings.Width = Trial.width
    factor: settings.Positive = Trial.factor
    steering: settings.Positive = Trial.steering
    sampler_steps: settings.Positive = Trial.sampler_steps
    resnet_steps: settings.Positive = Trial.resnet_steps

    def fit(self, X, y, unlabelled=None) -> "SyntheticAugmenter":
        """Make synthetic images of the classes of ``y`` and judge them.

        Unless ``pretrained`` is given, it pretrains on the ``unlabelled`` images or else on ``X``.

        Raises:
            UserError: a setting or an image that does not suit, or fewer than two classes.
            ValueError: scikit-learn's own checks of X and y.
        """
        x, position = self._first(X, y)
        trial = self._trial()
        y = torch.from_numpy(position)
        _check_two_of_each(y, f"{len(self.classes_)} classes")
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
        that many were admitted. Images come back in the form of ``X``, as grey levels where it
        holds them.

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
        return Trial("y", seed=self._seed, **values)

    def _given(self, x: Images) -> Pretrained:
        """The autoencoder and the score model that ``pretrained`` names, if they suit images."""
        folders = [Path(folder) for folder in self.pretrained]
        if len(folders) != 2:
            raise UserError(
                f"pretrained names {len(folders)} folders; those of an autoencoder and of the "
                "score model of its latents are needed"
            )
        encoder, model = autoencoder.load(folders[0]), unet.load(folders[1])
        config = encoder.kl.config
        shape = config["in_channels"], config["sample_size"], config["sample_size"]
        must_suit(x, shape, "the autoencoder was made for")
        return Pretrained(encoder.to(self._on()), model.to(self._on()))

    def _prior(self, others: Others, trial: Trial) -> Pretrained:
        """The autoencoder and the score model of its latents, trained now."""
        x = others.to(self._on())
        encoded = store.finished(_encoding(x, trial), trial.encoding, "autoencoder")
        encoder = _standardised(encoded, x)
        loop = _pretraining(encoder, x, trial)
        learnt = store.finished(loop, trial.pretraining, "training on latents")
        return Pretrained(encoder, learnt.ema)


def _labelled(images: ImageSet, trial: Trial) -> tuple[Images, Labels]:
    """The training images that keep their label, and their classes."""
    known = images.select("train", labelled=trial.scheme)
    present, y = known.labels(trial.scheme).unique(return_inverse=True)
    told = f"{known.name}: {len(present)} classes of {trial.scheme} in the split train"
    _check_two_of_each(y, told)
    rows = choose(y, 0, trial.seed, trial.share)
    return known.tensor(rows), y[rows]
