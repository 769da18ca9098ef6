"""Intervals over patients, trainings and draws cover the truth as often as they say, simulated.

A world is an image set whose images are vectors: what all images of a patient share (70 % of the
variance), what an image has of its own, and in some worlds something of its class. A training is a
random linear map, and its classifier compares mapped vectors by their cosine, as `bdc` does.
Patients and trainings are drawn anew in each of `REPEATS` repeats.
"""

import numpy as np
import pandas as pd
import pytest

from hallulib.data.imageset import ImageSet
from hallulib.evidence.metrics import (
    auroc,
    mean_interval,
    of_contest,
    over_patients,
    share_of_oracle,
)
from hallulib.oneshot.episodes import Episodes

REPEATS, EPISODES, GROUPS, AXES = 300, 200, 10, 24
PATIENT = np.repeat(np.arange(160), 3)
CLASS = PATIENT % 4


@pytest.fixture(scope="module")
def deal():
    """Support, spare and query images of the test episodes; the answers are the same in each."""
    table = pd.DataFrame({"patient": PATIENT.astype(str), "split": "test"})
    table["grade"] = np.array(list("abcd"))[CLASS]
    card = {"name": "world", "labels": {"grade": {"values": list("abcd")}}}
    images = ImageSet(np.zeros((len(table), 1, 2, 2), np.uint8), table, card)
    episodes = Episodes(images, "grade", split="test", n_spare=4, groups=GROUPS)
    assert episodes.groups == GROUPS
    tasks = list(episodes.take(EPISODES))
    shown = np.stack([np.concatenate([task.support, task.spare], 1) for task in tasks])
    return shown, np.stack([task.query for task in tasks]), tasks[0].answers


def world(rng, signal):
    """Images (n, axes) of new patients."""
    of_patient = rng.normal(size=(PATIENT.max() + 1, AXES))[PATIENT]
    images = np.sqrt(0.7) * of_patient + np.sqrt(0.3) * rng.normal(size=(len(PATIENT), AXES))
    images[np.arange(len(PATIENT)), CLASS] += signal
    return images


def training(rng, noise):
    """A map that sees some axes more than others; how much so is the luck of the training."""
    return np.diag(np.exp(noise * rng.normal(size=AXES)))


def measured(images, trained, deal, supports):
    """AUROC of each episode; supports are the columns of those shown that make the prototypes."""
    shown, query, answers = deal
    v = images @ trained
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    prototypes = v[shown[..., supports]].mean(2)
    prototypes /= np.linalg.norm(prototypes, axis=-1, keepdims=True)
    scores = v[query] @ prototypes.swapaxes(1, 2)
    return auroc(np.tile(answers, (len(scores), 1)), scores)


def rate(intervals, truth):
    return np.mean([i.low <= truth <= i.high for i in intervals])


@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize("trainings", [1, 3])
def test_the_mean_of_episodes_is_covered(deal, signal, trainings):
    """The classifiers of signal 0 know patients and nothing of classes: the truth is 0.5. For one
    training the truth is that of this training, which has no luck here.
    """
    rng, found, naive = np.random.default_rng(1), [], []
    for _ in range(REPEATS):
        images = world(rng, signal)
        maps = [training(rng, 0.5 if trainings > 1 else 0.0) for _ in range(trainings)]
        values = np.stack([measured(images, one, deal, [0]) for one in maps])
        found.append(over_patients(values, GROUPS))
        naive.append(mean_interval(values[0]))
    truth = np.mean([i.value for i in found]) if signal else 0.5
    assert 0.92 <= rate(found, truth) <= 0.98
    assert rate(naive, truth) < 0.9  # over episodes alone, it promised too much


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_the_difference_of_two_methods_is_covered(deal, noise):
    """Two methods that are the same, trained three times each: the true difference is 0."""
    rng, found = np.random.default_rng(2), []
    for _ in range(REPEATS):
        images = world(rng, 1.0)
        a, b = (
            np.stack([measured(images, training(rng, noise), deal, own) for _ in range(3)])
            for own in ([0, 1], [0, 2])
        )
        found.append(over_patients(a - b, GROUPS))
    assert 0.92 <= rate(found, 0) <= 0.98


def test_the_share_of_the_oracle_s_gain_is_covered(deal):
    """What is made has the law of what the oracle gives: the true share is 1."""
    rng, found = np.random.default_rng(3), []
    supports = {"baseline": [0], "+2": [0, 3, 4], "oracle +2": [0, 1, 2]}
    while len(found) < REPEATS:
        images, table = world(rng, 2.0), []
        for _ in range(3):
            one = training(rng, 0.2)
            of = {name: measured(images, one, deal, own) for name, own in supports.items()}
            table.append(pd.DataFrame(of))
        found.append(share_of_oracle(table, 2, GROUPS))
    assert 0.92 <= rate(found, 1) <= 0.98, rate(found, 1)
    assert np.median([i.high - i.low for i in found]) < 2  # it says something all the same


def contest(rng, draws, luck, seeds=None):
    """Scores of two classifiers of one law. Each draw of labels gives each of them directions of
    two classes that are off by luck; the test images, one or two of a patient, are the same. Draws
    may take turns with seeds, whose own luck they share.
    """
    of_patient = rng.normal(size=(60, 3))
    who = np.sort(np.r_[np.arange(60), rng.choice(60, 20, replace=False)])
    images = 0.6 * of_patient[who] + 0.8 * rng.normal(size=(len(who), 3))
    images[:, 0] += who % 2
    tables, methods = [], ("likelihood", "linear")
    of_seed = luck * rng.normal(size=(seeds or 1, 2, 3)) * (seeds is not None)
    for draw in range(draws):
        table = pd.DataFrame({"patient": who.astype(str), "label": who % 2, "draw": draw})
        if seeds:
            table["seed"] = draw % seeds
        for i, method in enumerate(methods):
            towards = [1, 0, 0] + luck * rng.normal(size=3) + of_seed[draw % (seeds or 1), i]
            table[f"{method} a"] = towards[0] / 2 - images @ towards
            table[f"{method} b"] = -table[f"{method} a"]
        tables.append(table)
    return pd.concat(tables)


@pytest.mark.parametrize(("luck", "seeds"), [(0.1, None), (1.0, None), (0.7, 3)])
def test_a_contest_covers_the_luck_of_the_draw_of_labels(luck, seeds):
    """Of two methods that are the same the true difference is 0. With little luck they differ on
    single images alone, where the interval is wider than it has to be; of three seeds little can
    be told of their luck, and it is a little too narrow.
    """
    rng, methods = np.random.default_rng(4), ("likelihood", "linear")
    tables = [contest(rng, 10, luck, seeds) for _ in range(REPEATS)]
    found = pd.concat([of_contest(table, methods) for table in tables])
    for _, rows in found.groupby("measure"):
        own, other = (part for _, part in rows.groupby("method"))
        truth = rows["value"].mean()
        least = 0.9 if seeds else 0.92
        assert least <= (own["low"].le(truth) & own["high"].ge(truth)).mean() <= 0.98
        assert (other["gain_low"].le(0) & other["gain_high"].ge(0)).mean() >= least
