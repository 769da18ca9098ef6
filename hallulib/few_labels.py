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
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hallulib import UserError, artifacts, disk, metrics
from hallulib.adaptation import ADAPTS
from hallulib.backbone import read, train_resnet
from hallulib.calibration import log_odds
from hallulib.data import ImageSet
from hallulib.gaussian import MovedGaussian
from hallulib.quality import features
from hallulib.score_classifier import ScoreClassifier
from hallulib.settings import (
    Amount,
    Confidence,
    Count,
    Positive,
    Seed,
    Several,
    Width,
    check,
    one_of,
)
from hallulib.shapes import Labels
from hallulib.train import pretrained

METHODS = ("likelihood", "gaussian", "resnet18", "linear", "filter_bank")
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
            (:func:`hallulib.adaptation.shifted`); ``power`` is then 2 where no label can be held
            out.
        copies: moved and mirrored copies of each labelled image it learns from as well.
        adapt: which of its weights learn then.
        lr: their learning rate.
        class_rate: that of the class vectors, as a multiple of ``lr``, at most: a third of the
            number of labelled images, since few of them are soon remembered.
        width: of the score model.
        effort, confidence, power: of the decision, see :func:`hallulib.bound.decide`.
        weigh: folds in which labelled images are held out to find the noise levels that tell them
            apart best, from two labels per class to ``weigh_up_to``; with more, ``power`` weighs.
            With ``shift``, where folds cost no training, up to five and always.
        weigh_up_to: labelled images per class.
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
    adapt: one_of(ADAPTS) = "all"
    lr: Amount = 4e-4
    class_rate: Amount = 25
    width: Width = 24
    effort: Several = 32
    confidence: Confidence = 0.99
    power: Amount = 0.5
    weigh: Count = 2
    weigh_up_to: Count = 20
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

    def measure(folder: Path, **_) -> None:
        scores = _measure(images, contest, folder)
        with disk.whole(folder / SCORES) as partial:
            scores.to_csv(partial, index=False)

    folder = artifacts.load_or_train(
        f"few-labels-{images.name}",
        measure,
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        **asdict(contest),
    )
    return read_scores(folder / SCORES)


def read_scores(file: Path) -> pd.DataFrame:
    """A table of scores; a patient may be called anything, ``NA`` as well."""
    return pd.read_csv(file, dtype={"patient": str}, keep_default_na=False)


def table(scores: pd.DataFrame, seed: int = 0, own: str = "likelihood") -> pd.DataFrame:
    """Accuracy and AUROC of every method with 95 % intervals, and against one of them.

    Args:
        scores: what `run` gave.
        seed: of the bootstrap, which draws whole patients.
        own: the method that the others are compared with.

    Returns:
        One row per method and measure: ``value, low, high, n`` and the paired difference from
        ``own``, ``gain, gain_low, gain_high`` (positive where that is better).
    """
    y, patient = scores["label"].to_numpy(), scores["patient"].to_numpy()
    of_own = columns(scores, own)
    rows = []
    for method in METHODS:
        p = columns(scores, method)
        for name, measure in (("accuracy", _accuracy), ("AUROC", metrics.auroc)):
            # a statistic of both, so that resamples are paired
            gap = lambda y, a, b, measure=measure: measure(y, a) - measure(y, b)
            told = metrics.bootstrap(measure, y, p, groups=patient, n_resamples=1000, seed=seed)
            row = {"method": method, "measure": name, **told._asdict()}
            if method != own:
                gain = metrics.bootstrap(
                    gap, y, of_own, p, groups=patient, n_resamples=1000, seed=seed
                )
                row |= {"gain": gain[0], "gain_low": gain[1], "gain_high": gain[2]}
            rows.append(row)
    return pd.DataFrame(rows)


def columns(scores: pd.DataFrame, method: str) -> np.ndarray:
    """Scores of one method, (images, classes)."""
    return scores[[c for c in scores if c.startswith(f"{method} ")]].to_numpy()


def choose(
    labels: Labels, per_class: int, seed: int, share: float | int = 1
) -> Int[np.ndarray, " kept"]:
    """Positions of ``per_class`` images of each class, or of a share; more labels add to fewer.

    With the same seed the images for 1 per class are among those for 5, and so on.

    Args:
        labels: class indices, -1 where there is none.
        per_class: images of each class; 0 takes a share of them.
        seed: of the order in which images of a class are taken.
        share: of the images of each class, at least two; all unless given.
    """
    y, rng = labels.numpy(), np.random.default_rng(seed)
    kept = []
    for c in np.unique(y[y >= 0]):
        of_class = rng.permutation(np.flatnonzero(y == c))
        kept.append(of_class[: per_class or max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))


def _measure(images: ImageSet, contest: Contest, folder: Path) -> pd.DataFrame:
    classes = images.classes(contest.scheme)
    train = images.select(("train", "unlabelled"))
    test = images.select("test", labelled=contest.scheme)
    y, y_test = train.labels(contest.scheme), test.labels(contest.scheme)
    present = sorted(set(y[y >= 0].tolist()))
    if len(present) < 2 or not set(y_test.tolist()) <= set(present):
        raise UserError(
            f"{images.name}: the split train has {len(present)} classes of {contest.scheme} and "
            f"test {len(set(y_test.tolist()))}; the same two or more are needed"
        )
    asked = choose(y_test, -(-contest.n_test // len(present)), seed=0)  # the same for all seeds
    x_test, y_test = test.tensor(asked), y_test[asked]
    labelled = choose(y, contest.per_class, contest.seed)
    others = np.setdiff1d(np.arange(len(train)), labelled)
    least = int(torch.bincount(y[labelled])[present].min())
    x, names = train.tensor(labelled), np.array(classes)[y[labelled]]

    start, _ = pretrained(
        images, scheme=None, steps=contest.pretraining, width=contest.width, seed=contest.seed
    )
    classifier = ScoreClassifier(
        start,
        channels=images.channels,
        copies=contest.copies,
        effort=contest.effort,
        confidence=contest.confidence,
        centre=True,
        folder=folder,
        random_state=contest.seed,
        verbose=True,
        **(_moving if contest.shift else _training)(contest, len(labelled), least),
    ).fit(x.numpy(), names, train.tensor(others).numpy() if len(others) else None)
    order = [classifier.classes_.tolist().index(classes[c]) for c in present]
    log_ratio, evaluations = classifier.log_ratio(x_test.numpy(), return_evaluations=True)
    found = {"likelihood": log_odds(log_ratio[:, order]).numpy()}

    target = torch.tensor([present.index(c) for c in y[labelled].tolist()])
    gaussian = MovedGaussian(train.tensor())
    s = gaussian.noise_level(x, target, seed=contest.seed)
    found["gaussian"] = log_odds(gaussian.log_ratio(x, target, x_test, s)).numpy()
    network = train_resnet(
        x, target, steps=contest.resnet_steps, width=contest.resnet_width, seed=contest.seed
    )
    pooled, _ = read(network, x)
    pooled_test, found["resnet18"] = read(network, x_test)
    found["linear"] = _linear(pooled, target, pooled_test)
    found["filter_bank"] = _linear(features(x).numpy(), target, features(x_test).numpy())

    told = {"patient": test.table["patient"].iloc[asked].to_numpy()}
    told["label"] = [present.index(c) for c in y_test.tolist()]
    told["evaluations"] = evaluations
    for method in METHODS:
        for i, c in enumerate(present):
            told[f"{method} {classes[c]}"] = found[method][:, i]
    return pd.DataFrame(told)


def _training(contest: Contest, n: int, least: int) -> dict:
    """How a classifier learns from n labelled images, of which the rarest class has ``least``."""
    return dict(
        adapt=contest.adapt,
        steps=min(contest.steps, 40 + 3 * n),
        lr=contest.lr,
        class_rate=min(contest.class_rate, max(1, n / 3)),
        power=contest.power,
        weigh=contest.weigh if contest.weigh <= least <= contest.weigh_up_to else 0,
    )


def _moving(contest: Contest, n: int, least: int) -> dict:
    """The same without training: only the means of the classes are learnt."""
    return dict(shift=True, steps=0, power=2, weigh=min(5, least) if least > 1 else 0)


def _linear(
    train: Float[np.ndarray, "n features"], y: Tensor, test: Float[np.ndarray, "m features"]
) -> Float[np.ndarray, "m classes"]:
    """Probabilities of a logistic regression with classes weighted equally."""
    model = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced")
    )
    return model.fit(train, y.numpy()).predict_proba(test)


def _accuracy(y: np.ndarray, scores: np.ndarray) -> float:
    return float((scores.argmax(1) == y).mean())
