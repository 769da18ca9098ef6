"""Joint training and evaluation: who learns from what, the same bytes again, nothing leaks."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from toy_task import IMAGES, classifiers, hallucinator, image_set, same, score_model, tasks

from hallulib import UserError
from hallulib.oneshot import bdc
from hallulib.oneshot.hallucinate import Changed, Hallucinator, Recipe, Source
from hallulib.oneshot.joint import Fit, Learner, Method, evaluate, meta_train, pictures, predict
from hallulib.storage.checkpoint import CHECKPOINT, LOG

RUNNING = Fit(lr=0.05, inner="running")
FITS = {"exact": Fit(), "running": RUNNING, "cross_entropy": Fit(loss="cross_entropy")}
TRAIN, VALIDATION, TEST = (tasks(split) for split in ("train", "val", "test"))


def train(folder=None, stop=None, source=None, counts=(0, 1), **options):
    """Seven episodes in epochs of three; the learning rate falls after four and six."""
    standard = dict(steps=7, per_epoch=3, decays=(0.6, 0.85), validation=VALIDATION)
    loop = meta_train(
        source or hallucinator(),
        classifiers(counts),
        IMAGES,
        TRAIN,
        folder=folder,
        **(standard | {"n_validation": 2} | options),
    )
    for state in loop:
        if state.step == stop:
            loop.close()
            break
    return state


def all_of(evaluation):
    return np.concatenate(list(evaluation))


# ---- what a prediction is


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weightless_and_missing_supports_give_the_baseline():
    classifier = classifiers()[1]
    real, made, query = vectors(3, 2, 5), vectors(3, 4, 5, seed=1), vectors(6, 5, seed=2)
    baseline = classifier.logits(query, real)
    torch.testing.assert_close(predict(classifier, real, made[:, :0], query), baseline)
    torch.testing.assert_close(predict(classifier, real, made, query, 0.0), baseline)


def test_a_prediction_is_that_of_the_weighted_mean():
    classifier = bdc.build("mean", width=4)
    real, made, query = vectors(3, 1, 5), vectors(3, 2, 5, seed=1), vectors(6, 5, seed=2)
    means = (real.sum(1) + 0.5 * made.sum(1)) / 2
    expected = 10 * torch.cosine_similarity(query[:, None], means, dim=-1)
    torch.testing.assert_close(
        predict(classifier, real, made, query, 0.5), expected, rtol=1e-4, atol=1e-4
    )


def test_permuting_the_classes_permutes_the_logits():
    classifier, order = classifiers()[1], torch.tensor([2, 0, 1])
    real, made, query = vectors(3, 1, 5), vectors(3, 4, 5, seed=1), vectors(6, 5, seed=2)
    told = predict(classifier, real, made, query)
    turned = predict(classifier, real[order], made[order], query)
    torch.testing.assert_close(turned, told[:, order])


# ---- joint training


def test_the_same_seed_trains_the_same_bytes_and_another_seed_others():
    before = torch.get_rng_state()
    first = train().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, train().state_dict())
    assert not same(first, train(seed=1).state_dict())


@pytest.mark.parametrize("fit", FITS.values(), ids=list(FITS))
def test_a_stopped_training_resumes_to_the_same_bytes(tmp_path, fit):
    """Stopped at a checkpoint (3, 6) and after one; the rate falls after 4 and 6 episodes."""
    whole = train(fit=fit)
    for stop in (3, 5):
        folder = tmp_path / str(stop)
        train(folder, stop=stop, fit=fit)
        resumed = train(folder, fit=fit)
        assert same(resumed.state_dict(), whole.state_dict()), stop
        rates = [
            [learner.optimizer.param_groups[0]["lr"] for learner in state.learners]
            for state in (resumed, whole)
        ]
        assert rates[0] == rates[1] == pytest.approx([fit.lr / 100] * 2)


def test_a_generator_that_learns_nothing_resumes_to_the_same_bytes(tmp_path):
    whole = train(source=hallucinator(adapt_steps=0))
    train(tmp_path, stop=4, source=hallucinator(adapt_steps=0))
    resumed = train(tmp_path, source=hallucinator(adapt_steps=0))
    assert same(resumed.state_dict(), whole.state_dict())


def test_rates_that_fall_at_the_same_step_or_never_resume_alike(tmp_path):
    decays = (0.0, 0.5, 0.51)  # 0, and 4 twice
    whole = train(fit=FITS["cross_entropy"], decays=decays)
    train(tmp_path, stop=6, fit=FITS["cross_entropy"], decays=decays)
    resumed = train(tmp_path, fit=FITS["cross_entropy"], decays=decays)
    assert same(resumed.state_dict(), whole.state_dict())
    assert resumed.learners[0].optimizer.param_groups[0]["lr"] == pytest.approx(Fit().lr / 10)


def test_a_finished_training_only_hands_over_its_state(tmp_path):
    whole = train(tmp_path)
    stamp = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    assert same(train(tmp_path).state_dict(), whole.state_dict())
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == stamp


def test_a_checkpoint_of_other_settings_is_refused_and_a_damaged_one_too(tmp_path):
    train(tmp_path, stop=3)
    with pytest.raises(UserError, match="trained with seed = 0, not 4"):
        train(tmp_path, seed=4)
    with pytest.raises(UserError, match="trained with fit = "):
        train(tmp_path, fit=RUNNING)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a checkpoint of this model"):
        train(tmp_path)


def test_the_log_has_a_column_for_the_generator_and_for_each_classifier(tmp_path):
    state = train(tmp_path)
    header, *rows = (tmp_path / LOG).read_text().splitlines()
    assert header == "step,generator,plus_0,plus_1"
    assert len(rows) == 7
    told = torch.tensor([[float(v) for v in row.split(",")[1:]] for row in rows])
    torch.testing.assert_close(told, state.losses)
    assert torch.isfinite(state.losses).all()


def generator_of(state):
    return {k: v.clone() for k, v in state.source.state_dict().items()}


def test_the_classifiers_do_not_influence_the_generator():
    one, two = train(steps=3), train(steps=3, counts=(0, 2, 1), fit=RUNNING, n_validation=1)
    assert same(generator_of(one), generator_of(two))


def test_the_baseline_does_not_depend_on_the_source_or_on_other_classifiers():
    baselines = [
        train(steps=3, source=source, counts=counts).learners[0].state_dict()
        for source, counts in (
            (hallucinator(), (0, 1)),
            (hallucinator(adapt_steps=3), (0, 1)),
            (Changed("flips"), (0, 2, 1)),
            (Source(), (0,)),
        )
    ]
    assert all(same(baselines[0], other) for other in baselines[1:])


def test_a_classifier_is_the_same_whatever_larger_counts_are_beside_it():
    alone, beside = (train(steps=3, counts=counts).learners for counts in ((0, 2), (0, 2, 5)))
    assert same(alone[1].state_dict(), beside[1].state_dict())


def test_the_best_weights_are_those_of_the_best_epoch():
    weights, found = [], []
    state = None
    for state in meta_train(
        Changed("shifts"),
        classifiers(),
        IMAGES,
        TRAIN,
        steps=8,
        per_epoch=2,
        validation=VALIDATION,
        n_validation=4,
        fit=Fit(lr=0.05),
    ):
        if state.step % 2 == 0:
            kept = [copy.deepcopy(learner.classifier.state_dict()) for learner in state.learners]
            weights.append(kept)
            methods = [Method(learner.n, learner.classifier) for learner in state.learners]
            parts = evaluate(methods, state.source, IMAGES, VALIDATION, 4)
            found.append(all_of(parts).mean(0))
    torch.testing.assert_close(state.validation, torch.tensor(np.array(found)).float())
    for i in range(2):
        column = state.validation[:, i].tolist()
        best = max(epoch for epoch, value in enumerate(column) if value == max(column))
        assert same(state.best[i], weights[best][i])


@pytest.mark.parametrize("options", [{"validation": None}, {"n_validation": 0}])
def test_without_validation_the_last_weights_are_the_best(options):
    state = train(source=Changed("flips"), **options)
    for learner, best in zip(state.learners, state.best, strict=True):
        assert same(best, learner.classifier.state_dict())
    assert torch.isnan(state.validation).all()


@pytest.mark.parametrize("loss", ["aucm", "cross_entropy"])
def test_joint_training_learns_to_tell_bright_from_dark(loss):
    images = image_set(noise=60.0, seed=3)
    episodes = {split: tasks(split, images=images) for split in ("train", "test")}
    loop = meta_train(
        Changed("shifts"),
        classifiers(),
        images,
        episodes["train"],
        steps=80,
        per_epoch=80,
        decays=(),
        fit=Fit(lr=1e-2, loss=loss),
    )
    *_, state = loop
    methods = [Method(learner.n, learner.classifier) for learner in state.learners]
    told = all_of(evaluate(methods, state.source, images, episodes["test"], 20)).mean(0)
    assert (told > 0.95).all(), told


def test_a_loss_that_is_not_finite_stops_with_one_sentence(tmp_path):
    with pytest.raises(UserError, match="loss of a classifier is not finite from episode 2 on; a"):
        train(tmp_path, source=Source(), counts=(0,), fit=Fit(loss="cross_entropy", lr=1e30))
    assert not (tmp_path / CHECKPOINT).exists()


class Bursting(Source):
    """Its loss grows until it is none."""

    def adapt(self, episode, support, seed):
        self.loss = getattr(self, "loss", 1e30) * 1e5
        return torch.tensor(self.loss)


def test_a_generator_that_diverges_stops_the_run_as_well():
    with pytest.raises(UserError, match="loss of the generator is not finite from episode 2 on"):
        train(source=Bursting(), counts=(0,))


def test_training_learns_from_each_episode_once_and_before_it_makes():
    calls = []

    class Told(Changed):
        def adapt(self, episode, support, seed):
            calls.append(("adapt", episode.support.tolist()))
            return super().adapt(episode, support, seed)

        def make(self, episode, support, n, seed):
            calls.append(("make", episode.support.tolist()))
            return super().make(episode, support, n, seed)

    train(source=Told("flips"), steps=3, validation=None)
    expected = [(what, TRAIN[i].support.tolist()) for i in range(3) for what in ("adapt", "make")]
    assert calls == expected


# ---- evaluation


def one_by_one(method, source, n_episodes):
    """Plain code: each episode alone, with the classifier's own methods and scikit-learn."""
    values = []
    for i in range(n_episodes):
        episode = TEST[i]
        support, query = pictures(IMAGES, episode, torch.device("cpu"))
        with torch.no_grad():
            everything = support
            if method.n:
                everything = torch.cat([support, source.make(episode, support, method.n, 0)], 1)
            embedded = method.classifier.eval().embed(everything.flatten(0, 1))
            logits = method.classifier.logits(
                method.classifier.embed(query), embedded.unflatten(0, everything.shape[:2])
            )
        values.append(roc_auc_score(episode.answers, logits.softmax(-1)[:, 1]))
    return np.array(values)


def test_batched_evaluation_equals_one_episode_at_a_time():
    """With flips, which draw nothing; more episodes than are evaluated together."""
    source, found = Changed("flips"), classifiers((0, 2), kind="bdc")
    methods = [Method(0, found[0]), Method(2, found[2]), Method(1, found[0])]
    told = all_of(evaluate(methods, source, IMAGES, TEST, 23))
    assert told.shape == (23, 3)
    for column, method in zip(told.T, methods, strict=True):
        np.testing.assert_allclose(column, one_by_one(method, source, 23), atol=1e-9)


def test_several_classes_are_macro_averaged_as_scikit_learn_does():
    episodes = tasks("test", "subtype", n_query=2)
    classifier = classifiers()[0].eval()
    (told,) = evaluate([Method(0, classifier)], Source(), IMAGES, episodes, 3)
    for i in range(3):
        support, query = pictures(IMAGES, episodes[i], torch.device("cpu"))
        with torch.no_grad():
            embedded = classifier.embed(support.flatten(0, 1))[:, None]
            scores = classifier.logits(classifier.embed(query), embedded).softmax(-1).double()
        expected = roc_auc_score(
            episodes[i].answers, scores / scores.sum(1, keepdim=True), multi_class="ovr"
        )
        assert told[i, 0] == pytest.approx(expected)


def adapting(**options):
    """A generator for which it matters much what it has just learnt."""
    return Hallucinator(score_model(), Recipe(sampler_steps=2, lr=3e-2, adapt_steps=3, **options))


def chances(source, episodes, n=3, first=0):
    methods = [Method(1, classifiers(kind="bdc")[1])]
    return all_of(evaluate(methods, source, IMAGES, episodes, n, first=first))


class Rows:
    """Images made for each episode, in the place of the AUROC, which has few values."""

    def __init__(self, monkeypatch, source):
        self.made = {}
        plain = source.make

        def make(episode, support, n, seed):
            made = plain(episode, support, n, seed)
            self.made.setdefault(tuple(episode.support.ravel().tolist()), []).append(made)
            return made

        monkeypatch.setattr(source, "make", make)


def test_what_is_learnt_in_a_test_episode_does_not_leak_into_the_next(monkeypatch):
    """Made after other episodes, or as the first of a fresh source: the same images."""
    source = adapting()
    before = {k: v.clone() for k, v in source.state_dict().items()}
    rows = Rows(monkeypatch, source)
    one = chances(source, TEST)
    assert same(source.state_dict(), before)
    two = chances(source, TEST)  # the same source once more
    fresh = chances(adapting(), TEST)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, fresh)
    assert all(torch.equal(first, again) for first, again in rows.made.values())
    # alone with a source that has seen nothing, from the seed that this place in the list has
    seeds = np.random.default_rng([0, 0]).integers(2**31, size=4).tolist()
    episode = TEST[2]
    support, _ = pictures(IMAGES, episode, torch.device("cpu"))
    alone = adapting()
    alone.adapt(episode, support, seeds[3])
    made = rows.made[tuple(episode.support.ravel().tolist())][0]
    assert torch.equal(alone.make(episode, support, 1, seeds[3]), made)


def test_an_evaluation_does_learn_from_the_support():
    source, still = adapting(), adapting()
    episode = TEST[0]
    support, _ = pictures(IMAGES, episode, torch.device("cpu"))
    source.adapt(episode, support, 0)
    assert not torch.allclose(
        source.make(episode, support, 1, 0), still.make(episode, support, 1, 0), atol=1e-3
    )


@pytest.mark.parametrize("kind", ["adapting", "per class"])
def test_an_evaluation_that_was_stopped_goes_on_where_it_was(monkeypatch, kind):
    monkeypatch.setattr("hallulib.oneshot.joint.EPISODES_AT_ONCE", 2)
    source = adapting() if kind == "adapting" else Changed("shifts")
    whole = chances(source, TEST, n=5)
    np.testing.assert_array_equal(chances(source, TEST, n=5, first=2), whole[2:])
    assert list(evaluate([Method(0, classifiers()[0])], source, IMAGES, TEST, 5, first=5)) == []


def test_evaluation_leaves_the_weights_as_they_are():
    found, before = classifiers((0, 1)), classifiers((0, 1))
    all_of(evaluate([Method(n, c) for n, c in found.items()], Changed("flips"), IMAGES, TEST, 3))
    assert all(same(found[n].state_dict(), before[n].state_dict()) for n in found)


# ---- settings


def test_a_learner_learns_one_episode_by_heart():
    for fit in (Fit(lr=0.01), Fit(lr=0.01, loss="cross_entropy")):
        learner = Learner(classifiers()[0], 0, 2, fit)
        support, query = pictures(IMAGES, TRAIN[0], torch.device("cpu"))
        answers = torch.as_tensor(TRAIN[0].answers)
        losses = [learner.learn(support, support[:, :0], query, answers) for _ in range(25)]
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'; known: aucm, cross_entropy"),
        ({"inner": "none"}, "inner is 'none'; known: exact, running"),
        ({"lr": float("inf")}, "lr is inf; at least 0"),
        ({"margin": 0}, "margin is 0; a number above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_fits_are_explained(options, told):
    with pytest.raises(UserError, match=told):
        Fit(**options)
