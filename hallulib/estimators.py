"""Scikit-learn faces of the library: they fit, predict and go into pipelines as any estimator."""

from hallulib.one_shot_classifier import OneShotClassifier
from hallulib.score_classifier import ScoreClassifier
from hallulib.synthetic_augmenter import SyntheticAugmenter

# one place to import all of them from
__all__ = ["OneShotClassifier", "ScoreClassifier", "SyntheticAugmenter"]
