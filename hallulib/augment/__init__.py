"""Latent diffusion for augmentation: synthetic images, steered and selected."""

from hallulib import lazily

__getattr__ = lazily(
    __name__,
    estimator="Trial pretrained classifier SyntheticAugmenter",
)
