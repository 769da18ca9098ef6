"""The whole experiment: settings, runs that find themselves again, and honest tables."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy_task import IMAGES, same

from hallulib import UserError
from hallulib.data.imageset import ImageSet
from hallulib.diffusion import train
from hallulib.evidence.metrics import (
    auroc,
    mean_interval,
    of_episodes,
    over_patients,
    share_of_oracle,
)
from hallulib.oneshot import experiment, joint
from hallulib.oneshot.experiment import Trial
from hallulib.oneshot.hallucinate import Pool, Recipe
from hallulib.oneshot.joint import Fit, Method, evaluate
from hallulib.storage import store
from hallulib.storage.settings import vary

SMALL = dict(n_way=2, n_query=3, counts=(0, 1), pretraining=2, pretraining_width=16, kind="mean")
SMALL |= dict(width=4, supervised=2, steps=2, per_epoch=2, n_validation=1, n_episodes=22)
TRIAL = Trial("grade", "grade", **SMALL, recipe=Recipe(sampler_steps=1, lr=1e-2))
CONTROLS = ["baseline", "permuted patients", "oracle +1", "memory +1", "flips +1", "shifts +1"]
UNSUPPORTED = ["class mean", "supervised"]


@pytest.fixture(scope="module")
def result():
    return experiment.run(IMAGES, TRIAL)


def test_all_classifiers_start_from_labels_learnt_through_their_embedding(monkeypatch):
    started, trial = [], replace(TRIAL, kind="bdc", reduce_to=5, seed=7)
    taught = experiment._supervised(IMAGES, trial, "grade")

    def spy(source, classifiers, *args, **how):
        started.extend(classifiers.values())
        raise KeyboardInterrupt

    monkeypatch.setattr(joint, "meta_train", spy)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(IMAGES, trial)
    assert len(started) == 2
    for classifier in started:
        assert same(classifier.backbone.state_dict(), taught[0].state_dict())
        assert same(classifier.embedding.state_dict(), taught[1].state_dict())


@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=12),
    st.lists(st.integers(1, 6), min_size=3, max_size=12),
    st.integers(1, 6),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_what_a_split_cannot_serve_is_told_with_the_most_that_it_can(x, y, n_query, n_spare):
    rows = [
        (f"{split}{name}{i}", split, name)
        for split in ("train", "val", "test")
        for name, sizes in (("x", x), ("y", y))
        for i, n in enumerate(sizes)
        for _ in range(n)
    ]
    table = pd.DataFrame(rows, columns=["patient", "split", "g"])
    card = {"name": "toy", "labels": {"g": {"values": ["x", "y"]}}}
    images = ImageSet(np.zeros((len(rows), 1, 4, 4), np.uint8), table, card)
    serves = lambda **task: experiment._too_few(images, replace(trial, **task)) is None
    trial = Trial("g", "g", n_way=2, n_query=n_query, n_spare=n_spare)
    if serves():
        experiment.check_served(images, trial)
        return
    with pytest.raises(UserError) as stop:
        experiment.check_served(images, trial)
    found = re.search(r"n_query=(\d+) n_spare=(\d+) is the most", str(stop.value))
    if found is None:
        assert not serves(n_query=1, n_spare=0)
        assert "one query for each class is too many too: more patients" in str(stop.value)
        return
    most = dict(n_query=int(found[1]), n_spare=int(found[2]))
    assert serves(**most)
    assert most["n_query"] == n_query or not serves(n_query=most["n_query"] + 1, n_spare=0)


# ---- settings


STANDARD = Trial("isup", "isup")


def test_varying_nothing_changes_nothing():
    assert vary(STANDARD, "nothing") == vary(STANDARD, "") == vary(STANDARD, {}) == STANDARD


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("guidance_scale=4", lambda t: t.recipe.guidance_scale, 4.0),
        ("adapt_steps=3", lambda t: t.recipe.adapt_steps, 3),
        ("n_episodes=1e2", lambda t: t.n_episodes, 100),
        ("loss=cross_entropy", lambda t: t.fit.loss, "cross_entropy"),
        ("forget=True", lambda t: t.forget, True),
        ("counts=0,1,4", lambda t: t.counts, (0, 1, 4)),
        ("decays=0.5", lambda t: t.decays, (0.5,)),
        ("decays=[]", lambda t: t.decays, ()),
        ("lr=1e-2", lambda t: (t.fit.lr, t.recipe.lr), (1e-2, 2e-4)),
        ("recipe.lr=1e-2", lambda t: (t.fit.lr, t.recipe.lr), (1e-4, 1e-2)),
        ("pool=50 adapt_steps=0", lambda t: (t.pool, t.recipe.adapt_steps), (50, 0)),
    ],
)
def test_settings_are_read_as_what_they_are(text, read, value):
    varied = vary(STANDARD, text)
    assert read(varied) == value
    assert repr(read(varied)) == repr(value)  # of the same type
    assert vary(STANDARD, dict(pair.split("=") for pair in text.split())) == varied


def test_every_setting_can_be_varied_to_the_value_it_has():
    for prefix, part in (("recipe.", STANDARD.recipe), ("fit.", STANDARD.fit), ("", STANDARD)):
        for name, value in vars(part).items():
            if name not in ("recipe", "fit"):
                assert vary(STANDARD, {prefix + name: value}).settings() == STANDARD.settings()


def test_a_whole_number_does_not_fix_the_kind_of_a_setting():
    once = vary(STANDARD, {"guidance_scale": 3})
    assert vary(once, "guidance_scale=2.5").recipe.guidance_scale == 2.5
    held = replace(STANDARD, recipe=Recipe(guidance_scale=3))
    assert vary(held, "guidance_scale=2.5").recipe.guidance_scale == 2.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("guidance 4", "settings to vary are 'guidance 4'; 'name=value name=value' or 'noth"),
        ("width=", "settings to vary are"),
        ("guidance=4", "no setting 'guidance' to vary; known: adapt_steps, begin, copies"),
        ("recipe=4", "no setting 'recipe' to vary"),
        ("adapt_steps=few", "setting adapt_steps = 'few'; a value like 1 is needed"),
        ("adapt_steps=1e-3", "setting adapt_steps = '1e-3'; a value like 1 is needed"),
        ("n_episodes=inf", "setting n_episodes = 'inf'"),
        ("lr=nan", "lr is nan; at least 0 is needed"),
        ("forget=yes", "setting forget = 'yes'; a value like False is needed"),
        ("counts=0,x,2", r"setting counts = '0,x,2'; a value like \(0, 1, 2\) is needed"),
        ("counts=1,2", r"counts are \(1, 2\); 0 and some number above it are needed"),
        ("counts=0", r"counts are \(0,\)"),
        ("decays=2.0", r"decays are \(2.0,\); parts of the training, 0 to 1"),
        ("generator=magic", "generator is 'magic'; known: score_model, oracle, memory, flips"),
        ("per_epoch=0", "per_epoch is 0; at least 1 is needed"),
        ("seed=-1", "seed is -1; at least 0 is needed"),
        ("pool=5", "adapt_steps=0 start_time=1 is needed"),
    ],
)
def test_what_cannot_be_varied_is_explained(text, told):
    with pytest.raises(UserError, match=told):
        vary(STANDARD, text)


def test_settings_survive_json():
    import json

    told = TRIAL.settings()
    assert json.loads(json.dumps(told)) == told
    assert told["recipe"]["sampler_steps"] == 1


# ---- a run


def test_a_run_has_a_column_for_every_method_and_a_row_for_every_episode(result):
    assert list(result.auroc) == [*CONTROLS, "+1", "+1 at test only", *UNSUPPORTED]
    assert len(result.auroc) == 22
    assert result.auroc.stack().between(0, 1).all()
    assert set(result.classifiers) == {0, 1}


def test_a_finished_run_holds_its_results_and_no_scraps(result):
    names = {path.name for path in result.folder.iterdir()}
    weights = {"generator.safetensors", "plus_0.safetensors", "plus_1.safetensors"}
    assert names == {"run.json", "losses.csv", "auroc.csv"} | weights


def test_a_run_finds_itself_again_without_training_anything(result, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(joint, "meta_train", never)
    monkeypatch.setattr(train, "pretrained", never)
    again = experiment.run(IMAGES, TRIAL)
    assert again.folder == result.folder
    pd.testing.assert_frame_equal(again.auroc, result.auroc)
    assert same(again.source.state_dict(), result.source.state_dict())
    for n in (0, 1):
        assert same(again.classifiers[n].state_dict(), result.classifiers[n].state_dict())


def test_what_a_run_hands_over_is_what_it_measured(result):
    """Evaluated again from the kept weights, what Adam remembers included: the same numbers."""
    methods = [Method(1, result.classifiers[1]), Method(1, result.classifiers[0])]
    tasks = TRIAL.episodes(IMAGES, "test")
    told = np.concatenate(
        list(evaluate(methods, result.source, IMAGES, tasks, 22, weight=TRIAL.fit.weight))
    )
    np.testing.assert_array_equal(told, result.auroc[["+1", "+1 at test only"]])
    assert any(name.startswith("adam.") for name in result.source.state_dict())


def test_weights_are_kept_in_half_precision(result):
    for name, kinds in (("generator", {torch.half}), ("plus_1", {torch.half, torch.int64})):
        kept = load_file(result.folder / f"{name}.safetensors")
        assert {v.dtype for k, v in kept.items() if not k.startswith("adam.")} == kinds


def test_episodes_of_a_split_are_those_of_the_task_whatever_else_varies():
    other = vary(TRIAL, "generator=flips steps=9 kind=bdc guidance_scale=0")
    for split in ("train", "val", "test"):
        one, two = (t.episodes(IMAGES, split)[3] for t in (TRIAL, other))
        assert np.array_equal(one.query, two.query)
        rows = np.concatenate([one.support.ravel(), one.query])
        assert set(IMAGES.table["split"].iloc[rows]) == {split}
    moved = replace(TRIAL, seed=1)
    for split, same_for_all in (("train", False), ("val", False), ("test", True)):
        one, two = (t.episodes(IMAGES, split)[3] for t in (TRIAL, moved))
        assert np.array_equal(one.query, two.query) == same_for_all


def test_the_seed_of_a_trial_reaches_its_pretraining_and_its_classifiers():
    weights = []
    for seed in (0, 1):
        source, classifiers = experiment.start(IMAGES, replace(TRIAL, seed=seed))
        weights.append((source.state_dict(), classifiers[0].state_dict()))
    (one, first), (two, second) = weights
    assert not same(one, two)
    assert not same(first, second)


def test_a_trial_knows_the_score_model_that_it_begins_from(tmp_path):
    here = tmp_path / "model"
    models = [train.pretrained(IMAGES, steps=1, width=16, seed=seed)[1] for seed in (0, 1)]
    told, trial = [], replace(TRIAL, begin=str(here), n_episodes=2)
    for folder in models:
        shutil.copytree(folder, here, dirs_exist_ok=True)
        told.append(experiment.run(IMAGES, trial).folder)
        origin = store.card(told[-1])["settings"]["origin"]
        assert origin == store.contents(folder)
        assert experiment.load(told[-1], ("bright", "new"), "cpu")[0] == trial
    assert told[0] != told[1]


def test_runs_whose_test_episodes_were_dealt_in_another_way_are_not_found(result, monkeypatch):
    monkeypatch.setattr(experiment, "PROTOCOL", experiment.PROTOCOL - 1)
    assert experiment.run(IMAGES, TRIAL).folder != result.folder


def test_a_class_mean_is_the_answer_of_the_classifier_to_all_training_images(result):
    """Another way there: a support of every training image of the class."""
    found = experiment.without_support(IMAGES, TRIAL, result.classifiers[0])
    np.testing.assert_allclose(found, result.auroc[UNSUPPORTED])
    task = TRIAL.episodes(IMAGES, "test")[4]
    rows = [
        np.flatnonzero((IMAGES.table["split"] == "train") & (IMAGES.table["grade"] == name))
        for name in task.classes
    ]
    with torch.no_grad():
        embed = lambda positions: result.classifiers[0].embed(IMAGES.tensor(positions))
        logits = result.classifiers[0].logits(embed(task.query), torch.stack([*map(embed, rows)]))
    told = auroc(task.answers, logits.softmax(-1))
    assert told == pytest.approx(found["class mean"][4], abs=1e-6)


def test_what_needs_training_labels_of_the_test_s_classes_is_left_out_without_them(result):
    images = replace(IMAGES, table=IMAGES.table.copy())
    dark = (images.table["split"] == "train") & (images.table["grade"] == "dark")
    images.table.loc[dark, "grade"] = ""
    assert list(experiment.without_support(images, TRIAL, result.classifiers[0])) == []


def test_a_run_stopped_while_testing_goes_on_where_it_was(result, tmp_path, monkeypatch):
    """Stopped with the first twenty episodes of one table on the disk and those before whole."""
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    write, trained, evaluated = store.write_table, [], []

    def stopping(file, table):
        write(file, table)
        if file.name.startswith("shifts") and len(table) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_table", stopping)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(IMAGES, TRIAL)
    monkeypatch.setattr(store, "write_table", write)
    plain = joint.evaluate

    def counted(methods, source, images, tasks, n, **options):
        evaluated.append(n - options["first"])
        return plain(methods, source, images, tasks, n, **options)

    monkeypatch.setattr(experiment, "evaluate", counted)
    monkeypatch.setattr(joint, "episode", lambda *_: trained.append(1))
    again = experiment.run(IMAGES, TRIAL)
    assert trained == []
    assert evaluated == [0, 0, 0, 0, 0, 2, 22]
    assert (again.folder / "auroc.csv").read_bytes() == (result.folder / "auroc.csv").read_bytes()


def quick(text):
    return vary(replace(TRIAL, n_episodes=3, steps=1, per_epoch=1), text)


def test_a_fine_task_is_trained_on_the_finer_labels_and_has_no_memory():
    trial = replace(quick("nothing"), train_scheme="subtype", test_scheme="grade")
    found = experiment.run(IMAGES, trial)
    assert not any(name.startswith("memory") for name in found.auroc)
    labels = ("dark0", "dark1", "bright0", "bright1", "dark", "bright")
    assert found.source.model.labels == labels
    fresh, _ = experiment.start(IMAGES, trial)
    assert (fresh.model.network.classes.weight == 0).all()  # nothing is known of the test labels


@pytest.mark.parametrize("name", ["oracle", "flips"])
def test_a_control_can_take_the_place_of_the_generator_and_keeps_its_own_column(name):
    found = experiment.run(IMAGES, quick(f"generator={name}"))
    assert set(found.auroc) == {*CONTROLS, "+1", "+1 at test only", *UNSUPPORTED}
    # the baseline given the same images, whichever column it stands in
    same_images = found.auroc[f"{name} +1"] - found.auroc["+1 at test only"]
    assert (same_images.abs() < 1e-9).all()


def test_a_pool_is_kept_with_the_run():
    trial = quick("pool=5 adapt_steps=0")
    one, two = experiment.run(IMAGES, trial), experiment.run(IMAGES, trial)
    assert isinstance(two.source, Pool)
    assert torch.equal(one.source.images, two.source.images)
    assert one.source.images.shape == (2, 5, 1, 8, 8)


@pytest.mark.parametrize("text", ["adapt_steps=0", "n_spare=0"])
def test_other_recipes_run_as_well(text):
    found = experiment.run(IMAGES, quick(text))
    assert ("oracle +1" in found.auroc) == (text != "n_spare=0")
    again = experiment.run(IMAGES, quick(text))
    assert same(found.source.state_dict(), again.source.state_dict())


def test_episodes_that_cannot_be_had_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(train, "pretrained", None)
    images = replace(IMAGES, table=IMAGES.table.copy())
    images.table.loc[images.table["split"] == "test", "grade"] = ""
    with pytest.raises(UserError, match="can serve in split test"):
        experiment.run(images, TRIAL)
    with pytest.raises(UserError, match="no label scheme 'gleason'; known schemes: grade, sub"):
        experiment.run(IMAGES, replace(TRIAL, train_scheme="gleason"))
    with pytest.raises(UserError, match="kind is 'cnn'; known: bdc, mean, covariance"):
        experiment.run(IMAGES, replace(TRIAL, kind="cnn"))


def test_a_changed_file_of_a_finished_run_is_refused(tmp_path, result, monkeypatch):
    import shutil

    shutil.copytree(result.folder, tmp_path / result.folder.name)
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path))
    (tmp_path / result.folder.name / "auroc.csv").write_text("baseline\n1.0\n")
    with pytest.raises(UserError, match="is not the file that the run wrote"):
        experiment.run(IMAGES, TRIAL)


# ---- tables


def made_up(n=400, seed=0, **gains):
    """A result with columns whose mean gains over the baseline are known."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0.7, 0.05, n)
    columns = {"baseline": base}
    for name, gain in gains.items():
        noise = rng.normal(0, 0.02, n)
        columns[name.replace("_", " +")] = base + gain + noise - noise.mean()
    return pd.DataFrame(columns)


def test_the_table_gives_the_papers_form_and_intervals():
    told = [made_up(seed=seed, oracle_1=0.04) for seed in (0, 1)]
    rows = of_episodes(told, 5, ceiling=0.9)
    base, oracle = (np.stack([of[name] for of in told]) for name in ("baseline", "oracle +1"))
    assert list(rows.index) == ["baseline", "oracle +1"]
    row = rows.loc["oracle +1"]
    assert row["ten"] == pytest.approx(oracle[0, :10].mean())
    assert row["ten_sd"] == pytest.approx(np.std(oracle[0, :10]))  # of the population, as NumPy's
    whole, gain = over_patients(oracle, 5), over_patients(oracle - base, 5)
    assert tuple(row[["mean", "low", "high"]]) == whole[:3]
    assert tuple(row[["gain", "gain_low", "gain_high"]]) == gain[:3]
    assert row["gain"] == pytest.approx(0.04)
    assert row["share"] == pytest.approx((oracle.mean() - 0.5) / 0.4)
    assert rows.loc["baseline", ["gain", "gain_low", "gain_high"]].isna().all()
    assert "share" not in of_episodes(told, 5)


def test_one_group_of_patients_has_no_interval_and_one_training_that_of_the_groups_alone():
    values = made_up()["baseline"].to_numpy()
    assert np.isnan(over_patients(values, 1)[1:3]).all()
    means = values.reshape(-1, 8).mean(0)
    assert over_patients(values, 8)[:3] == pytest.approx(mean_interval(means)[:3])


def test_more_episodes_of_the_same_patients_and_equal_trainings_narrow_nothing():
    values = made_up(40)["baseline"].to_numpy()
    once, often = over_patients(values, 8), over_patients(np.tile(values, (1, 25)), 8)
    assert often == pytest.approx(once)
    thrice = over_patients(np.tile(values, (3, 1)), 8)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_a_method_that_equals_the_baseline_gains_nothing():
    told = made_up(flips_1=0.1)
    told["flips +1"] = told["baseline"]
    row = of_episodes([told], 5).loc["flips +1"]
    assert (row["gain"], row["gain_low"], row["gain_high"]) == (0, 0, 0)


def test_the_share_of_the_oracle_is_the_ratio_of_the_gains():
    told = made_up(oracle_2=0.05)
    told["+2"] = told["baseline"] + 0.4 * (told["oracle +2"] - told["baseline"])
    exact = share_of_oracle([told], 2, 20)
    assert tuple(exact)[:3] == pytest.approx((0.4, 0.4, 0.4))
    noise = np.random.default_rng(1).normal(0, 0.02, 400)
    told["+2"] += noise - noise.mean()
    noisy = share_of_oracle([told], 2, 20)
    assert noisy.value == pytest.approx(0.4)
    # by the delta method, with 0.4 of the oracle's own noise in common
    spread = over_patients(noise, 20)
    width = (spread.high - spread.low) / 0.05
    assert noisy.high - noisy.low == pytest.approx(width, rel=0.15)


def test_a_share_of_nothing_is_refused():
    told = made_up(oracle_2=0.05)
    with pytest.raises(UserError, match=r"baseline, \+2, oracle \+2 are needed"):
        share_of_oracle([told], 2, 5)
    told["+2"] = told["oracle +2"]
    told["oracle +2"] = told["baseline"]
    with pytest.raises(UserError, match="one that is surely above 0 is needed"):
        share_of_oracle([told], 2, 5)


def test_a_table_needs_no_more_than_the_columns():
    assert Fit() == STANDARD.fit
    assert len(of_episodes([made_up(n=12)], 2)) == 1
