"""Image sets: images with their patients, splits and labels, opened and checked."""

from hallulib import lazily

__getattr__ = lazily(
    __name__,
    imageset="FILES ImageSet check choose open",
)
