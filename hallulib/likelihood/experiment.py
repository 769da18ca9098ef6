r"""The same task for a likelihood and for discriminative classifiers, with ever fewer labels.

Of the images of the training split, ``per_class`` of each class keep their label; to the score
model the others are images without label. All methods see the same labelled images and are asked
about the same test images:

====================  =======================================================================
likelihood            a score model, pretrained without labels, that goes on with these, or
                      whose density is moved to each class without any training
gaussian              the moved density in closed form: a Gaussian in place of the network
resnet18              a ResNet-18 trained on the labelled images alone, moved and mirrored
linear                logistic regression on that network's pooled features
filter_bank           logistic regression on fixed features that nobody trained
====================  =======================================================================
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hallulib import UserError
from hallulib.data.imageset import ImageSet, choose
from hallulib.diffusion.train import pretrained
from hallulib.evidence.calibration import log_odds
from hallulib.evidence.compare import METHODS, read_scores
from hallulib.evidence.quality import features
from hallulib.evidence.resnet import read, train_resnet
from hallulib.likelihood.density import MovedGaussian
from hallulib.likelihood.estimator import ScoreClassifier
from hallulib.shapes import AnyImages, Images, Labels
from hallulib.storage import disk, store
from hallulib.storage.settings import (
    Count,
    Positive,
    Seed,
    Several,
    Width,
    check,
)

SCORES = "scores.csv"


@dataclass(frozen=True)
class Contest:
    """All settings of a comparison but the images.

    Attributes:
        scheme: label column.
        per_class: labelled images per class; 0 keeps every label. A class that has fewer gives
            all it has.
        n_test: test images, about: equally many of each class, as far as it has so many.
        pretraining: steps of the score model without labels.
        steps: its steps with them, at most: 40 and 3 for each labelled image, since more only
            teach it to remember the few there are.
        shift: train nothing with labels, but move the density to the mean of each class
            (:func:`hallulib.diffusion.unet.moved_to_means`).
        copies: moved and mirrored copies of each labelled image it learns from as well.
        width: of the score model.
        effort: of the decision, see :class:`hallulib.likelihood.estimator.ScoreClassifier`.
        resnet_steps: of the ResNet-18.
        resnet_width: of its first block.
        seed: of the choice of labels and of all training.

    Raises:
        UserError: an impossible number.
    """

    scheme: str
    per_class: Count = 0
    n_test: Several = 240
    pretraining: Positive = 2000
    steps: Positive = 400
    shift: bool = False
    copies: Count = 0
    width: Width = 24
    effort: Several = 32
    resnet_steps: Positive = 400
    resnet_width: Positive = 24
    seed: Seed = 0

    def __post_init__(self):
        check(self)


def run(images: ImageSet, contest: Contest, *, from_scratch: bool = False) -> pd.DataFrame:
    """Every method's scores of every test image, found by the settings or measured now.

    Args:
        images: an open image set with training and test images of at least two classes.
        contest: the settings.
        from_scratch: measure even if such a run is there.

    Returns:
        One row per test image: ``patient``, ``label`` (index of the class), ``evaluations`` of
        the likelihood, and for each method and class ``<method> <class>``: log-odds for the
        first two, probabilities for the others.

    Raises:
        UserError: fewer than two classes in one of the two splits.
    """
    folder = store.load_or_train(
        f"few-labels-{images.name}",
        lambda folder, **_: _measure(images, contest, folder),
        defaults=Contest,
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        **asdict(contest),
    )
    return read_scores(folder / SCORES)


def _measure(images: ImageSet, contest: Contest, folder: Path) -> None:
    train = images.select(("train", "unlabelled"))
    test = images.select("test", labelled=contest.scheme)
    y, y_test = train.labels(contest.scheme), test.labels(contest.scheme)
    present = y[y >= 0].unique()
    if len(present) < 2 or not torch.isin(y_test, present).all():
        raise UserError(
            f"{images.name}: the split train has {len(present)} classes of {contest.scheme} and "
            f"test {len(y_test.unique())}; the same two or more are needed"
        )
    labelled = choose(y, contest.per_class, contest.seed)
    others = train.tensor(np.setdiff1d(np.arange(len(train)), labelled))
    x, y = train.tensor(labelled), torch.searchsorted(present, y[labelled])
    asked = choose(y_test, -(-contest.n_test // len(present)), seed=0)  # the same for all seeds
    new = test.tensor(asked)

    classifier = _classifier(images, contest, torch.bincount(y), folder)
    classifier.fit(x.numpy(), y.numpy(), others.numpy() if len(others) else None)
    log_ratio, evaluations = classifier.log_ratio(new.numpy(), return_evaluations=True)
    gaussian = MovedGaussian(train.tensor())
    s = gaussian.noise_level(x, y, seed=contest.seed)
    scores = {"likelihood": log_odds(log_ratio).numpy()}
    scores["gaussian"] = log_odds(gaussian.log_ratio(x, y, new, s)).numpy()
    scores |= _discriminative(contest, x, y, new)

    table = test.table[["patient"]].iloc[asked].reset_index(drop=True)
    table["label"] = torch.searchsorted(present, y_test[asked]).numpy()
    table["evaluations"] = evaluations
    classes = [images.classes(contest.scheme)[c] for c in present]
    for method in METHODS:
        table[[f"{method} {c}" for c in classes]] = scores[method]
    with disk.whole(folder / SCORES) as partial:
        table.to_csv(partial, index=False)


def _classifier(
    images: ImageSet, contest: Contest, counts: Labels, folder: Path
) -> ScoreClassifier:
    """One that will learn from so many labelled images of each class."""
    n, least = int(counts.sum()), int(counts.min())
    if contest.shift:  # folds cost no training; the power is for what leaves none to hold out
        learning = dict(shift=True, steps=0, power=2, weigh=min(5, least) if least > 1 else 0)
    else:  # few images are soon remembered
        learning = dict(steps=min(contest.steps, 40 + 3 * n), class_rate=min(25, max(1, n / 3)))
        learning["weigh"] = 2 if 2 <= least <= 20 else 0
    start, _ = pretrained(
        images, steps=contest.pretraining, width=contest.width, seed=contest.seed
    )
    return ScoreClassifier(
        start,
        channels=images.channels,
        copies=contest.copies,
        effort=contest.effort,
        centre=True,
        folder=folder,
        random_state=contest.seed,
        verbose=True,
        **learning,
    )


def _discriminative(
    contest: Contest, x: Images, y: Labels, new: AnyImages
) -> dict[str, np.ndarray]:
    """Class probabilities of new images by what is trained on the labelled images alone."""
    settings = dict(steps=contest.resnet_steps, width=contest.resnet_width, seed=contest.seed)
    network = train_resnet(x, y, **settings)
    (pooled, _), (pooled_new, by_network) = read(network, x), read(network, new)
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced")
    )
    by_features = linear.fit(pooled, y.numpy()).predict_proba(pooled_new)
    by_filters = linear.fit(features(x).numpy(), y.numpy()).predict_proba(features(new).numpy())
    return {"resnet18": by_network, "linear": by_features, "filter_bank": by_filters}
