"""One-shot classification with hallucinated supports."""

from hallulib import lazily

__getattr__ = lazily(
    __name__,
    experiment="GENERATORS Result Trial run start",
)
