"""ScoreClassifier is a scikit-learn estimator wherever its input is images."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from hallulib import ScoreClassifier, UserError
from hallulib.diffusion import unet
from hallulib.diffusion.unet import moved_to_means
from hallulib.likelihood.bound import Levels, Noises, bound, decide, leads
from hallulib.likelihood.density import log_density

TINY = dict(width=8, batch_size=8, effort=6)
# checks that do not apply to networks on images
EXPECTED = {
    "check_methods_subset_invariance": "it asks for agreement to 1e-7, and the rounding of a"
    " network depends on how many rows it sees; below they agree to 1e-4",
}


class Framed(ScoreClassifier):
    """Any table as images of 8 x 8: squashed into [-1, 1], then framed in black.

    Scikit-learn's checks use tables of 1 to 20 columns of any range; all else is the estimator's.
    """

    def __init__(self, steps=2, width=8, batch_size=4, effort=2, random_state=0):
        super().__init__()
        # scikit-learn hands over anything, past the types that the tests themselves check
        self.steps, self.width, self.batch_size = steps, width, batch_size
        self.effort, self.random_state = effort, random_state

    def _images(self, rows):
        framed = np.full((len(rows), 64), -1, np.float32)
        columns = min(rows.shape[1], 64)
        framed[:, :columns] = np.tanh(rows[:, :columns])
        return super()._images(framed)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # two steps of training
        return tags


def bars(n=48, seed=0):
    """Images with a bright upper or left half, in noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(0, 0.2, (n, 8, 8))
    x[y == 0, :4] += 0.5
    x[y == 1, :, :4] += 0.5
    return np.clip(x - 0.25, -1, 1).astype(np.float32), np.array(["upper", "left"])[y]


@pytest.fixture(scope="module")
def fitted():
    return ScoreClassifier(steps=250, lr=2e-3, **TINY | {"effort": 16}).fit(*bars())


@pytest.mark.release
def test_scikit_learns_checks_pass_on_tables_made_into_images():
    found = check_estimator(Framed(), expected_failed_checks=EXPECTED, on_fail=None)
    failed = {c["check_name"]: str(c["exception"]) for c in found if c["status"] == "failed"}
    assert not failed
    assert sum(c["status"] == "passed" for c in found) > 50


@pytest.mark.parametrize("exact", [False, True])
def test_it_learns_what_tells_two_classes_apart(fitted, exact):
    x, y = bars(seed=1)
    fitted = ScoreClassifier(fitted.model_, steps=0, exact=exact, effort=16).fit(*bars())
    assert fitted.score(x, y) > 0.9
    p = fitted.predict_proba(x)
    np.testing.assert_allclose(p.sum(1), 1)
    assert roc_auc_score(y == fitted.classes_[1], fitted.decision_function(x)) > 0.95


def test_all_forms_of_the_same_images_give_the_same_answer(fitted):
    grey = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    scaled = grey / np.float32(127.5) - 1
    expected = fitted.decision_function(grey)
    for x in (scaled, scaled.reshape(5, 64), scaled[:, None], torch.from_numpy(scaled)):
        np.testing.assert_allclose(fitted.decision_function(x), expected)


def test_an_image_is_judged_alone(fitted):
    x, _ = bars(seed=2)
    some = fitted.decision_function(x[7:9])
    np.testing.assert_allclose(fitted.decision_function(x)[7:9], some, rtol=1e-4)


def test_names_of_classes_do_not_matter_and_numbers_come_back_as_numbers():
    x, y = bars(16)
    named = ScoreClassifier(steps=3, **TINY).fit(x, y)
    numbered = ScoreClassifier(steps=3, **TINY).fit(x, np.where(y == "upper", 9, 4))
    assert set(numbered.predict(x)) <= {4, 9}
    np.testing.assert_array_equal(numbered.predict_proba(x), named.predict_proba(x))


def test_unlabelled_images_change_the_model_and_a_pretrained_one_stays_as_it_is():
    x, y = bars(16)
    plain = ScoreClassifier(steps=3, **TINY).fit(x, y).model_
    helped = ScoreClassifier(steps=3, **TINY).fit(x, y, unlabelled=x).model_
    weights = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.equal(weights(plain), weights(helped))
    before = weights(plain).clone()
    ScoreClassifier(plain, steps=2, **TINY).fit(x, y)
    assert torch.equal(weights(plain), before)


def test_moving_the_density_is_enough_where_classes_lie_elsewhere(fitted, tmp_path):
    """Six labels, no step of training, no class the network knows."""
    x, y = bars(6, seed=5)
    told = TINY | {"shift": True, "steps": 0, "power": 1, "weigh": 3}
    found = ScoreClassifier(fitted.model_, **told).fit(x, np.char.add(y, " half"))
    mine, theirs = (m.model_.network.unet.parameters() for m in (found, fitted))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    x, y = bars(seed=1)
    assert found.score(x, np.char.add(y, " half")) > 0.9
    found.save(tmp_path)
    again = ScoreClassifier.load(tmp_path)
    told = found.decision_function(x)
    np.testing.assert_allclose(again.decision_function(x), told, rtol=1e-3)


def test_centring_takes_what_all_images_have_in_common_and_needs_the_same_effort(fitted):
    x, y = bars()
    told = TINY | {"centre": True, "steps": 0}
    plain = ScoreClassifier(fitted.model_, **told).fit(x, y)
    assert plain.offset_ is None
    plain.predict(x[:2])
    found = ScoreClassifier(fitted.model_, **told).fit(x, y, unlabelled=x[:16])
    assert found.offset_.shape == (2, 3)
    assert found.score(x, y) > 0.9
    found.set_params(effort=8)
    with pytest.raises(UserError, match="effort is 8, more than when fit centred the classes"):
        found.predict(x[:2])


def test_a_temperature_makes_it_less_sure_and_leaves_its_order(fitted):
    x, y = bars(seed=3)
    flipped = np.where(np.arange(len(y)) % 5 == 0, np.roll(y, 1), y)  # a fifth is labelled wrong
    sure, order = fitted.predict_proba(x).max(1).mean(), fitted.decision_function(x).argsort()
    calibrated = ScoreClassifier(fitted.model_, steps=0, effort=16).fit(*bars())
    calibrated.calibrate(x, flipped)
    assert calibrated.temperature_ > 1
    assert calibrated.predict_proba(x).max(1).mean() < sure
    np.testing.assert_array_equal(calibrated.decision_function(x).argsort(), order)


def test_centring_takes_from_each_class_what_it_is_ahead_by_without_labels(fitted):
    (x, y), (others, _) = bars(), bars(seed=4)
    told = dict(steps=0, effort=16, confidence=1)
    plain = ScoreClassifier(fitted.model_, **told).fit(x, y, others)
    centred = ScoreClassifier(fitted.model_, centre=True, **told).fit(x, y, others)
    torch.testing.assert_close(
        centred.log_ratio(others).diff(dim=1).mean(), torch.zeros((), dtype=torch.float64)
    )
    moved = centred.decision_function(x) - plain.decision_function(x)
    np.testing.assert_allclose(moved, moved[0], atol=1e-5)


def test_it_goes_into_pipelines_cross_validation_and_calibration():
    x, y = bars(24)
    classifier = ScoreClassifier(steps=2, **TINY)
    halved = make_pipeline(FunctionTransformer(np.negative), classifier)
    assert cross_val_score(halved, x.reshape(24, -1), y, cv=2).shape == (2,)
    calibrated = CalibratedClassifierCV(classifier, cv=2).fit(x.reshape(24, -1), y)
    np.testing.assert_allclose(calibrated.predict_proba(x.reshape(24, -1)).sum(1), 1)


def test_training_goes_on_from_its_folder(tmp_path):
    x, y = bars(16)
    whole = ScoreClassifier(steps=4, **TINY).fit(x, y)
    ScoreClassifier(steps=4, folder=tmp_path, **TINY).fit(x, y)
    again = ScoreClassifier(steps=4, folder=tmp_path, **TINY).fit(x, y)
    np.testing.assert_array_equal(again.predict_proba(x), whole.predict_proba(x))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(channels=3), "rows have 64 features; channels"),
        (dict(channels=0), "channels is 0; at least 1"),
        (dict(effort=1), "effort is 1; at least 2"),
        (dict(exact=True, weigh=2), "centre and weigh are of decisions"),
        (dict(steps=-1), "steps is -1; at least 0"),
        (dict(batch_size=0), "batch_size is 0; at least 1"),
        (dict(width=12), "width is 12; a multiple of 8"),
        (dict(random_state=None), "random_state is None; a whole number"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(change, sentence):
    x, y = bars(8)
    with pytest.raises(UserError, match=sentence):
        ScoreClassifier(steps=2, **TINY).set_params(**change).fit(x.reshape(8, 64), y)


def test_the_whole_numbers_of_numpy_are_whole_numbers():
    x, y = bars(8)
    model = ScoreClassifier(steps=2, **TINY)
    found = [clone(model).set_params(random_state=s).fit(x, y) for s in (3, np.int64(3))]
    np.testing.assert_array_equal(*[f.predict_proba(x) for f in found])


@pytest.mark.parametrize("shape", [(4, 16, 4), (1, 4, 16), (4, 4, 4), (64, 1, 1)])
def test_images_of_another_shape_are_refused_though_they_have_as_many_pixels(fitted, shape):
    with pytest.raises(UserError, match=r"images of shape .* found; \(1, side, side\) is needed"):
        fitted.predict(np.zeros((2, *shape), np.float32))


def test_images_may_lie_in_memory_in_any_way(fitted):
    x, y = bars(8)
    expected = fitted.predict_proba(x)
    np.testing.assert_array_equal(fitted.predict_proba(x[::-1]), expected[::-1])
    halves = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(
        fitted.predict_proba(halves), fitted.predict_proba(halves.float())
    )
    ScoreClassifier(steps=1, **TINY).fit(x[::-1], y[::-1, None]).calibrate(x, y[:, None])


def test_a_training_of_other_images_is_not_taken_for_its_own(tmp_path):
    x, y = bars(8)
    told = dict(steps=2, folder=tmp_path, **TINY)
    start = ScoreClassifier(**told).fit(x, y).model_
    again = ScoreClassifier(**told).fit(x, y).model_  # the same images go on
    for a, b in zip(start.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for others in ((-x, y), (x, y[::-1])):
        with pytest.raises(UserError, match="was trained with identity = .*; give another folder"):
            ScoreClassifier(**told).fit(*others)
    with pytest.raises(UserError, match="was trained with identity = .*; give another folder"):
        ScoreClassifier(start, **told).fit(x, y)


@pytest.mark.parametrize("method", ["decide", "bound", "exact"])
def test_a_model_of_single_precision_takes_double_images_and_none(fitted, method):
    x = torch.from_numpy(bars(4)[0])[:, None]
    model = fitted.model_
    score = {
        "decide": lambda x: decide(model, x, Noises()).log_ratio,
        "bound": lambda x: bound(model, x, pairs=2).value,
        "exact": lambda x: log_density(model, x, steps=2).value,
    }[method]
    assert torch.equal(score(x.double()), score(x))
    if method != "decide":  # which has nobody to decide for
        assert score(x[:0]).shape == (0, 2)


def test_images_it_cannot_use_are_refused(fitted):
    x, y = bars(8)
    with pytest.raises(UserError, match=r"images reach from .* values in \[-1, 1\]"):
        ScoreClassifier(steps=2, **TINY).fit(3 * x, y)
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict(np.full((1, 64), np.nan))
    with pytest.raises(ValueError, match="features"):
        fitted.predict(np.zeros((1, 256)))
    with pytest.raises(UserError, match="was trained on"):
        ScoreClassifier(unet.build(size=16, width=8), steps=1).fit(x, y)
    with pytest.raises(UserError, match="'neither' was not among those of the training"):
        fitted.calibrate(x, ["neither"] * 8)


def test_a_copy_answers_the_same(fitted):
    x, _ = bars(8)
    other = copy.deepcopy(fitted)
    np.testing.assert_array_equal(other.predict_proba(x), fitted.predict_proba(x))


def one_of_twelve(band, whole):
    """Which twelfth of the whole range of noise levels a band is."""
    width = (whole.last - whole.first) / 12
    assert band.last - band.first == pytest.approx(width)
    return round((band.first - whole.first) / width, 6)


def test_held_out_images_choose_the_noise_levels_and_the_answer_learns_from_all():
    x, y = bars(24)
    told = dict(steps=150, lr=2e-3, **TINY | {"effort": 16})
    plain = ScoreClassifier(**told).fit(x, y)
    chosen = ScoreClassifier(weigh=2, **told).fit(x, y)
    assert one_of_twelve(chosen.levels_, plain.levels_) in range(12)
    assert sum(chosen.levels_.shares) == pytest.approx(1)
    for a, b in zip(plain.model_.parameters(), chosen.model_.parameters(), strict=True):
        assert torch.equal(a, b)
    assert chosen.score(*bars(seed=1)) > 0.9


def test_the_band_is_the_one_in_which_held_out_images_lead_most_surely(fitted):
    """By a plain loop over the folds, which cost no training where classes are only moved."""
    x, y = bars(12, seed=5)
    labels = torch.from_numpy(np.unique(y, return_inverse=True)[1])
    told = TINY | {"shift": True, "steps": 0, "weigh": 3}
    found = ScoreClassifier(fitted.model_, **told).fit(x, y)
    images, leading = torch.from_numpy(x)[:, None], []
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for seen, held_out in folds.split(labels, labels):
        model = moved_to_means(fitted.model_, images[seen], labels[seen])
        leading.append(leads(model, images[held_out], labels[held_out]))
    lead = torch.cat(leading)
    best = int((lead.mean(0) / lead.std(0)).argmax())
    assert one_of_twelve(found.levels_, Levels.even(fitted.model_.sde)) == best


@pytest.mark.parametrize("weigh", [1, 5])
def test_more_folds_than_labelled_images_are_told(weigh):
    x, y = bars(8)
    with pytest.raises(UserError, match=rf"weigh is {weigh} and the rarest class has 4 labelled"):
        ScoreClassifier(weigh=weigh, steps=1, **TINY).fit(x, y)


def test_it_is_saved_without_pickle_and_comes_back(fitted, tmp_path):
    x, y = bars(seed=5)
    told = dict(steps=0, effort=6, centre=True)
    one = ScoreClassifier(fitted.model_, **told).fit(x, y, bars(seed=6)[0]).calibrate(x, y)
    one.save(tmp_path / "one")
    again = ScoreClassifier.load(tmp_path / "one")
    # the layout of weights in memory is not written, and decides which kernels run
    np.testing.assert_allclose(again.predict_proba(x), one.predict_proba(x), rtol=1e-3)
    assert again.levels_ == one.levels_
    files = [p for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    with pytest.raises(UserError, match="is not a saved ScoreClassifier"):
        ScoreClassifier.load(tmp_path)


def test_changed_class_vectors_and_labels_of_any_kind_come_back(fitted, tmp_path):
    x, y = bars(16)
    told = dict(steps=3, lr=1e-2, **TINY)
    one = ScoreClassifier(fitted.model_, **told).fit(x, y == "upper")
    one.save(tmp_path / "one")
    state = torch.get_rng_state()
    again = ScoreClassifier.load(tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(again.predict_proba(x), one.predict_proba(x), rtol=1e-3)
    assert again.predict(x).dtype == bool
    one.save(tmp_path / "twice")  # saving has changed nothing
    np.testing.assert_array_equal(
        ScoreClassifier.load(tmp_path / "twice").predict_proba(x), again.predict_proba(x)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_was_saved_on_a_gpu_can_be_read_where_there_is_none(fitted, tmp_path):
    copy.deepcopy(fitted).set_params(device="cuda").save(tmp_path / "one")
    with pytest.raises(UserError, match="device is 'cuda'; PyTorch finds no GPU"):
        ScoreClassifier.load(tmp_path / "one")
    again = ScoreClassifier.load(tmp_path / "one", device="cpu")
    assert again.predict(bars(4)[0]).shape == (4,)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_gives_no_number_gives_no_answer(fitted, exact, value):
    broken = copy.deepcopy(fitted).set_params(exact=exact)
    with torch.no_grad():
        broken.model_.network.unet.conv_out.bias.fill_(value)
    for answer in (broken.predict, broken.predict_proba, broken.decision_function):
        with pytest.raises(UserError, match="not finite"):
            answer(bars(4)[0])


def test_the_same_seed_gives_the_same_model_in_threads():
    def fit(seed):
        model = ScoreClassifier(steps=1, random_state=seed, **TINY).fit(*bars(8)).model_
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    expected = [fit(seed) for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda i: fit(i % 2), range(4))):
            assert torch.equal(found, expected[i % 2])
