"""Scikit-learn faces of the library: they fit, predict and go into pipelines as any estimator."""

from hallulib.augment.estimator import SyntheticAugmenter
from hallulib.likelihood.estimator import ScoreClassifier
from hallulib.oneshot.estimator import OneShotClassifier

# one place to import all of them from
__all__ = ["OneShotClassifier", "ScoreClassifier", "SyntheticAugmenter"]
