"""Synthetic training images as an estimator in the way of imbalanced-learn: fit, then resample.

``fit`` steers an unconditional latent diffusion model to the classes of a few labelled images and
lets a network trained on these judge what comes out; ``resample`` adds what was admitted.

Source:
    Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.utils import check_consistent_length

from hallulib import UserError, augment, autoencoder, encoding, runs, train, unet
from hallulib.backbone import train_resnet
from hallulib.image_estimator import ImageEstimator, Others
from hallulib.selection import FeatureSpace, copy_threshold, take
from hallulib.settings import Above0, Amount, Positive, ShareBelow1, Width


class SyntheticAugmenter(ImageEstimator):
    """Adds synthetic images of each class to labelled ones, as far as they pass a selection.

    Forms of images: see :class:`hallulib.image_estimator.ImageEstimator`, which also saves and
    loads.

    Args:
        pretrained: folders of an autoencoder and of the score model of its latents, as
            ``hallulib.augment.pretrained(...).folders`` gives them. ``None`` trains both on the
            images without labels that ``fit`` is given, or on the labelled ones.
        channels: of images that come as rows.
        ratio: synthetic images to add, for each labelled one.
        candidates: images made for each one to add.
        confidence: least probability of its class, see :mod:`hallulib.selection`.
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
        verdicts_: one row for each, see :meth:`hallulib.selection.FeatureSpace.judge`.

    Example:
        >>> x = np.sign(np.random.default_rng(0).normal(size=(12, 256)))
        >>> told = dict(encoding=2, pretraining=2, width=8, steering=2, resnet_steps=2)
        >>> some = SyntheticAugmenter(sampler_steps=2, **told).fit(x, x[:, 0] > 0)
        >>> some.synthetic_.shape, len(some.verdicts_)
        ((48, 1, 16, 16), 48)
    """

    ratio: Above0
    candidates: Positive
    confidence: ShareBelow1
    gradient_scale: Amount
    encoding: Positive
    pretraining: Positive
    width: Width
    factor: Positive
    steering: Positive
    sampler_steps: Positive
    resnet_steps: Positive

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
        self.pretrained = pretrained
        self.channels = channels
        self.ratio = ratio
        self.candidates = candidates
        self.confidence = confidence
        self.gradient_scale = gradient_scale
        self.encoding = encoding
        self.pretraining = pretraining
        self.width = width
        self.factor = factor
        self.steering = steering
        self.sampler_steps = sampler_steps
        self.resnet_steps = resnet_steps
        self.device = device
        self.random_state = random_state

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
        names, seed = [str(c) for c in self.classes_], self._seed
        labels, rarest = torch.from_numpy(position), np.bincount(position).min()
        if rarest < 2:
            raise UserError(
                f"{len(names)} classes, the rarest with {rarest} images, found; at least 2 "
                "images of each are needed"
            )
        trial = augment.Trial(
            "y",
            ratio=self.ratio,
            candidates=self.candidates,
            confidence=self.confidence,
            gradient_scale=self.gradient_scale,
            encoding=self.encoding,
            encoder_width=self.width,
            pretraining=self.pretraining,
            width=self.width,
            steering=self.steering,
            sampler_steps=self.sampler_steps,
            resnet_steps=self.resnet_steps,
            seed=seed,
        )
        others = x if unlabelled is None else self._further(unlabelled, learns=True)
        prior = self._prior(others)
        judge = train_resnet(
            x,
            labels,
            steps=self.resnet_steps,
            width=trial.resnet_width,
            change=augment.changed,
            seed=seed,
        )
        # how near real images are to each other tells what is a copy
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        space = FeatureSpace.fit(judge, x, labels, copy_threshold(x[order[::2]], x[order[1::2]]))
        n = augment.per_class(self.ratio, len(x), len(names)) * self.candidates
        made, wanted = augment.synthesise(prior, trial, x, labels, names, n, seed)
        self.synthetic_, self.labels_ = made.numpy(), self.classes_[wanted.numpy()]
        self.verdicts_ = space.judge(made, wanted, self.confidence)
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
        n = augment.per_class(self.ratio, len(x), len(self.classes_))
        kept = take(self.verdicts_, n, [str(c) for c in self.classes_])
        both = np.concatenate([x.numpy(), self.synthetic_[kept]]).reshape(-1, *np.shape(X)[1:])
        given = np.asarray(self._flat(X)).dtype
        if given.kind in "iu":
            both = ((both + 1) * 127.5).round().astype(given)
        return both, np.concatenate([y, self.labels_[kept]])

    def fit_resample(self, X, y, unlabelled=None) -> tuple[np.ndarray, np.ndarray]:
        """``fit(X, y, unlabelled).resample(X, y)``."""
        return self.fit(X, y, unlabelled).resample(X, y)

    def _prior(self, others: Others) -> augment.Pretrained:
        """The autoencoder and the score model of its latents, read or trained."""
        device, seed = self._on(), self._seed
        if self.pretrained is not None:
            folders = [Path(folder) for folder in self.pretrained]
            if len(folders) != 2:
                raise UserError(
                    f"pretrained names {len(folders)} folders; those of an autoencoder and of the "
                    "score model of its latents are needed"
                )
            encoder, model = autoencoder.load(folders[0]), unet.load(folders[1])
            return augment.Pretrained(encoder.to(device), model.to(device), tuple(folders))
        x = others.to(device)
        encoder = autoencoder.build(
            size=x.shape[2],
            channels=self.channels,
            width=self.width,
            factor=self.factor,
            seed=seed,
        ).to(device)
        loop = encoding.train(encoder, x, steps=self.encoding, seed=seed)
        runs.finished(loop, self.encoding, "autoencoder")
        latents = encoder.eval().standardise(x[:1000]).encode(x)
        channels, side, _ = encoder.shape
        model = unet.build(size=side, channels=channels, width=self.width, seed=seed).to(device)
        loop = train.pretrain(model, latents, steps=self.pretraining, lr=4e-4, seed=seed)
        last = runs.finished(loop, self.pretraining, "score model of latents").ema
        return augment.Pretrained(encoder.requires_grad_(False), last, ())
