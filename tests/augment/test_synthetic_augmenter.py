"""SyntheticAugmenter adds only what was admitted, and pretrains on nothing with a label."""

import numpy as np
import pytest
from sklearn.base import clone

from hallulib import SyntheticAugmenter, UserError
from hallulib.augment import estimator
from hallulib.augment.selection import ADMITTED
from hallulib.data import imageset

TINY = dict(encoding=2, pretraining=2, width=8, steering=2, sampler_steps=2, resnet_steps=4)
TINY |= dict(confidence=0, candidates=3)


@pytest.fixture(scope="module")
def images():
    """Labelled and unlabelled images of the phantom."""
    found = imageset.open("phantom", 16)
    known = found.select("train", labelled="grade2")
    rows = np.arange(0, len(known), 30)
    names = np.array(found.classes("grade2"))[known.labels("grade2")[rows]]
    return known.tensor(rows).numpy(), names, found.select("unlabelled").tensor(range(64)).numpy()


@pytest.fixture(scope="module")
def fitted(images):
    return SyntheticAugmenter(**TINY).fit(*images)


def test_what_is_added_was_admitted_and_the_real_images_stay(fitted, images):
    x, y, _ = images
    more, labels = fitted.resample(x, y)
    np.testing.assert_array_equal(more[: len(x)], x)
    np.testing.assert_array_equal(labels[: len(y)], y)
    per_class = -(-len(x) // 2)
    assert len(fitted.synthetic_) == len(fitted.verdicts_) == 3 * 2 * per_class
    passed = (fitted.verdicts_["verdict"] == ADMITTED).to_numpy()
    pool = {image.tobytes() for image in fitted.synthetic_[passed]}
    assert len(more) > len(x)
    assert all(image.tobytes() in pool for image in more[len(x) :])
    made = fitted.labels_[passed]
    for name in fitted.classes_:
        assert (labels[len(y) :] == name).sum() == min(per_class, (made == name).sum())


def test_images_come_back_in_the_form_they_came_in(fitted, images):
    x, y, _ = images
    whole, _ = fitted.resample(x, y)
    flat, _ = fitted.resample(x.reshape(len(x), -1), y)
    np.testing.assert_array_equal(flat, whole.reshape(len(whole), -1))
    assert fitted.resample(x[:, 0], y)[0].shape[1:] == (16, 16)


def test_the_seed_decides_and_a_clone_does_the_same(images):
    one = SyntheticAugmenter(**TINY)
    first, second = (clone(one).fit_resample(*images)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_it_goes_on_from_what_the_experiment_pretrained(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    whole = imageset.open("phantom", 16)
    whole = whole.select(rows=range(0, len(whole), 20))  # the rest would only take time
    trial = estimator.Trial("grade2", encoding=2, pretraining=2, width=8)
    folders = estimator.pretrained(whole, trial).folders
    x, y, _ = images
    found = SyntheticAugmenter([str(f) for f in folders], **TINY).fit(x, y)
    assert found.synthetic_.shape[1:] == (1, 16, 16)
    with pytest.raises(UserError, match="pretrained names 1 folders"):
        SyntheticAugmenter(folders[:1], **TINY).fit(x, y)
    with pytest.raises(UserError, match=r"\(1, 8, 8\); the autoencoder was made .*16\)"):
        SyntheticAugmenter(folders, **TINY).fit(x[..., ::2, ::2], y)


def test_it_is_saved_without_pickle_and_comes_back(fitted, images, tmp_path):
    x, y, _ = images
    fitted.save(tmp_path)
    again = SyntheticAugmenter.load(tmp_path)
    for one, other in zip(again.resample(x, y), fitted.resample(x, y), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_what_does_not_suit_is_told_in_a_sentence(fitted, images):
    x, y, _ = images
    with pytest.raises(UserError, match="2 classes, the rarest with 1 images"):
        SyntheticAugmenter(**TINY).fit(x[:3], ["low", "low", "high"])
    with pytest.raises(UserError, match="none of .* synthetic images was admitted"):
        SyntheticAugmenter(**TINY | {"confidence": 0.999999}).fit_resample(x, y)
    with pytest.raises(UserError, match="candidates is 0"):
        SyntheticAugmenter(**TINY | {"candidates": 0}).fit(x, y)
    with pytest.raises(ValueError, match="1024 features, .* expecting 256"):
        fitted.resample(np.zeros((4, 1, 32, 32), np.float32), y[:4])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        fitted.resample(x, y[:-1])
    with pytest.raises(UserError, match="label '3' was not among .* training: high, low"):
        fitted.resample(x, np.full(len(y), 3))


def test_grey_levels_come_back_as_grey_levels(fitted, images):
    x, y, _ = images
    grey = ((x + 1) * 127.5).round().astype(np.uint8)
    more, labels = fitted.resample(grey, y)
    whole, _ = fitted.resample(x, y)
    assert more.dtype == np.uint8
    np.testing.assert_array_equal(more[: len(x)], grey)
    np.testing.assert_array_equal(more[len(x) :], ((whole[len(x) :] + 1) * 127.5).round())
    assert len(more) == len(labels)


def test_the_seed_is_that_of_the_judge_too(images, monkeypatch):
    x, y, others = images
    seeds, fit = [], estimator.train_resnet
    spy = lambda *args, seed, **told: (seeds.append(seed), fit(*args, seed=seed, **told))[1]
    monkeypatch.setattr(estimator, "train_resnet", spy)
    SyntheticAugmenter(random_state=7, **TINY).fit(x, y, others)
    assert seeds == [7]


def test_a_small_ratio_adds_one_image_of_each_class(images):
    found = SyntheticAugmenter(**TINY | {"ratio": 1e-3}).fit(*images)
    assert len(found.synthetic_) == 2 * TINY["candidates"]
