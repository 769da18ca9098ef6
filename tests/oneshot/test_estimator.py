"""OneShotClassifier answers as the experiment does, with any labels, and is saved and loaded."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from hallulib import OneShotClassifier, UserError
from hallulib.data import imageset
from hallulib.evidence.metrics import auroc
from hallulib.oneshot import experiment
from hallulib.oneshot.episodes import unasked
from hallulib.oneshot.hallucinate import Recipe
from hallulib.oneshot.joint import predict
from hallulib.storage import store

SHIPPED = store.SHIPPED / "one-shot-lesions"
TINY = experiment.Trial(
    "isup",
    "isup",
    pretraining=2,
    pretraining_width=8,
    width=2,
    reduce_to=4,
    supervised=2,
    steps=2,
    per_epoch=2,
    n_validation=0,
    n_episodes=2,
    recipe=Recipe(sampler_steps=2),
)


@pytest.fixture(scope="module")
def images():
    return imageset.open("phantom", 16)


@pytest.fixture(scope="module")
def result(images):
    return experiment.run(images, TINY)


def episode(images, i=0, **changes):
    """Support, queries and their classes of a test episode."""
    found = replace(TINY, **changes).episodes(images, "test")[i]
    support = images.tensor(found.support.ravel()).numpy()
    names = np.repeat(found.classes, found.support.shape[1])
    return (
        support,
        names,
        images.tensor(found.query).numpy(),
        np.array(found.classes)[found.answers],
    )


@pytest.mark.parametrize("n", [0, 1, 2])
def test_it_answers_as_the_learner_of_the_experiment(result, images, n):
    support, names, query, _ = episode(images)
    own = OneShotClassifier(result.folder, n_hallucinated=n, random_state=5)
    p = own.fit(support, names).predict_proba(query)
    classes, k = tuple(own.classes_), len(own.classes_)
    task = unasked(classes)
    shots = torch.from_numpy(support)[:, None]
    with result.source.undone(), torch.enable_grad():
        result.source.adapt(task, shots, 5)
        made = result.source.make(task, shots, n, 5) if n else shots[:, :0]
    network = result.classifiers[n]
    with torch.no_grad():
        real, new = (network.embed(x.flatten(0, 1)).unflatten(0, (k, -1)) for x in (shots, made))
        expected = predict(network, real, new, network.embed(torch.from_numpy(query)))
    np.testing.assert_allclose(p, expected.softmax(1), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(own.hallucinated_, made, atol=1e-2)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_the_shipped_one_gives_the_auroc_that_its_run_has_measured():
    images = imageset.open("lesions", 32).hold_out("isup", ["4", "5"])
    measured = pd.read_csv(SHIPPED / "auroc.csv")
    for i in range(3):
        support, names, query, truth = episode(images, i, n_way=2)
        some = OneShotClassifier(n_hallucinated=0).fit(support, names)
        position = np.searchsorted(some.classes_, truth)
        found = auroc(position, some.predict_proba(query))
        assert found == pytest.approx(measured["baseline"][i], abs=0.01)


def test_classes_may_be_new_unequal_and_in_any_order(result, images):
    x, names, query, _ = episode(images, k_shot=2)
    keep = np.array([0, 1, 2, 4, 5, 6])  # 2, 1, 2, 1 images of the four classes
    renamed = np.array([f"kind {c}" for c in names])[keep]
    one = OneShotClassifier(result.folder, n_hallucinated=0).fit(x[keep], renamed)
    order = np.random.default_rng(0).permutation(len(keep))
    two = OneShotClassifier(result.folder, n_hallucinated=0).fit(x[keep][order], renamed[order])
    np.testing.assert_allclose(one.predict_proba(query), two.predict_proba(query), atol=1e-5)
    once = one.network_.embed(torch.from_numpy(x[keep])).detach().numpy()
    expected = np.stack([once[renamed == c].mean(0) for c in one.classes_])
    np.testing.assert_allclose(one.prototypes_.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_query_is_judged_alone_and_the_seed_decides(result, images):
    support, names, query, _ = episode(images)
    fit = lambda seed: OneShotClassifier(result.folder, random_state=seed).fit(support, names)
    one = fit(0)
    whole = one.predict_proba(query)
    np.testing.assert_allclose(one.predict_proba(query[3:5]), whole[3:5], rtol=1e-4)
    np.testing.assert_array_equal(fit(0).predict_proba(query), whole)
    assert not np.array_equal(fit(1).hallucinated_, one.hallucinated_)


def test_it_is_saved_without_pickle_and_comes_back(result, images, tmp_path):
    support, names, query, _ = episode(images)
    one = OneShotClassifier(result.folder, n_hallucinated=1).fit(support, names)
    one.save(tmp_path / "one")
    again = OneShotClassifier.load(tmp_path / "one")
    np.testing.assert_array_equal(again.predict(query), one.predict(query))
    np.testing.assert_array_equal(again.decision_function(query), one.decision_function(query))
    np.testing.assert_array_equal(again.hallucinated_, one.hallucinated_)
    assert again.get_params() == one.get_params() | {"pretrained": str(result.folder)}
    kinds = {p.suffix for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_it_goes_into_a_pipeline_and_is_cloned(result, images):
    support, names, query, _ = episode(images)
    flat = FunctionTransformer(lambda x: x.reshape(len(x), -1))
    one = OneShotClassifier(result.folder, n_hallucinated=1)
    whole = make_pipeline(flat, clone(one)).fit(support, names)
    np.testing.assert_array_equal(whole.predict(query), one.fit(support, names).predict(query))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(pretrained="nowhere"),
            "nowhere is not a finished joint .*oneshot.experiment.run",
        ),
        (dict(n_hallucinated=-1), "n_hallucinated is -1; at least 0 is needed"),
        (dict(n_hallucinated=1.5), "n_hallucinated is 1.5"),
        (dict(channels=3), r"images of shape \(1, 16, 16\) found; \(3, side, side\)"),
        (dict(pretrained=None), "pretrained is None; the folder of a run"),
        (dict(pretrained="no/such/place/one-shot-lesions"), "one-shot-lesions is not a finished"),
    ],
)
def test_impossible_settings_are_told(result, images, settings, message):
    support, names, _, _ = episode(images)
    one = OneShotClassifier(result.folder).set_params(**settings)
    with pytest.raises(UserError, match=message):
        one.fit(support, names)


def test_images_of_another_size_and_other_runs_are_told(result, images, tmp_path, monkeypatch):
    support, names, _, _ = episode(images)
    one = OneShotClassifier(result.folder)
    with pytest.raises(
        UserError, match=r"images have .* \(1, 8, 8\); .* trained on \(1, 16, 16\)"
    ):
        one.fit(support[..., ::2, ::2], names)
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    flips = experiment.run(images, replace(TINY, generator="flips"))
    with pytest.raises(UserError, match="generator=flips pool=0; generator=score_model"):
        OneShotClassifier(flips.folder).fit(support, names)
    card = flips.folder / "run.json"
    card.write_text(json.dumps({"settings": {}}))
    with pytest.raises(UserError, match="is not the card of a run"):
        OneShotClassifier(flips.folder).fit(support, names)
    one.fit(support, names).save(tmp_path / "one")
    next((tmp_path / "one").rglob("*.safetensors")).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a saved OneShotClassifier .*has changed"):
        OneShotClassifier.load(tmp_path / "one")
