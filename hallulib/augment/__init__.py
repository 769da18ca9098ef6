"""Latent diffusion for augmentation: synthetic images, steered and selected."""

from hallulib import lazily

__getattr__ = lazily(
    __name__,
    estimator="Trial Pretrained pretrained synthesise per_class changed SyntheticAugmenter ARMS"
    " run read_fold",
)
