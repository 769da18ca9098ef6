"""The phantom: what is true of every data set it draws, and of the ceiling it promises."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.drawn import anatomy, law, prostate
from hallulib import UserError
from hallulib.evidence.quality import features


@pytest.fixture(scope="module")
def paper():
    """The full data set at the size of the book's CPU default."""
    return prostate.prostate(size=32)


@pytest.fixture(scope="module")
def small():
    return prostate.prostate(n_unlabelled=120, n_train=60, n_val=0, n_test=20)


def parameters(table):
    return table[list(prostate.PARAMETERS)].astype(float).to_numpy()


def macro_auroc(y, probability):
    hit = y[:, None] == np.arange(probability.shape[1])
    return np.mean([roc_auc_score(h, p) for h, p in zip(hit.T, probability.T, strict=True)])


def simulated_lesions(n, seed):
    """Lesions written from the docstring's table alone, without the module's numbers."""
    rows = [line.split() for line in prostate.__doc__.splitlines()]
    by_name = {row[0]: row[1:] for row in rows if row}
    scores = [name for name in by_name if len(name) == 3 and name[1] == "+"]
    frequency = [float(by_name[s][1]) for s in scores]
    shift = np.array([by_name[s][2:] for s in scores], float)
    median, spread = np.array([by_name["median"], by_name["spread"]], float)
    middle = np.log(median)
    middle[1] -= np.log1p(-median[1])
    rng = np.random.default_rng(seed)
    score = rng.choice(len(scores), n, p=frequency)
    u = middle + spread * (shift[score] + rng.standard_normal((n, 4)))
    theta = np.exp(u)
    theta[:, 1] = 1 / (1 + np.exp(-u[:, 1]))
    table = pd.DataFrame(theta.astype(str), columns=prostate.PARAMETERS)
    isup = np.array([int(by_name[s][0]) for s in scores])[score]
    return table, isup


def test_the_counts_are_the_papers(paper):
    images, table, card = paper
    counts = {"unlabelled": 11_202, "train": 1_611, "val": 200, "test": 238}
    assert images.shape == (13_251, 1, 32, 32)
    assert images.dtype == np.uint8
    assert table["split"].value_counts().to_dict() == counts == card["counts"]


def test_no_patient_is_in_two_splits_and_ids_are_in_order(paper):
    _, table, _ = paper
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    assert table["patient"].is_monotonic_increasing
    assert table["patient"].iloc[0] == "P00001"
    assert not table.duplicated(["patient", "slice"]).any()


def test_every_isup_has_four_patients_in_every_split(paper):
    _, table, _ = paper
    labelled = table[table["isup"] != ""]
    patients = labelled.groupby(["split", "isup"])["patient"].nunique().unstack()
    assert patients.shape == (3, 4)
    assert patients.to_numpy().min() >= 4


def test_class_shares_are_the_stated_ones(paper):
    _, table, _ = paper
    first = table[table["split"] == "train"].drop_duplicates("patient")
    share = first["gs"].value_counts(normalize=True)
    assert np.allclose(share[list(prostate.GS)], prostate.FREQUENCY, atol=0.005)


def test_labels_agree_with_each_other_and_are_empty_where_benign(paper):
    _, table, card = paper
    benign = table["split"] == "unlabelled"
    truth = ["isup", "gs", "grade2", *prostate.PARAMETERS, "x_mm", "y_mm"]
    assert (table.loc[benign, truth] == "").all(axis=None)
    assert (table.loc[~benign, truth] != "").all(axis=None)
    isup = {"3+4": "2", "4+3": "3", "4+4": "4", "3+5": "4", "5+3": "4"} | dict.fromkeys(
        ("4+5", "5+4", "5+5"), "5"
    )
    cancer = table[~benign]
    assert (cancer["isup"] == cancer["gs"].map(isup)).all()
    assert (cancer["grade2"] == np.where(cancer["isup"] == "2", "low", "high")).all()
    assert (cancer.groupby("patient")["gs"].nunique() == 1).all()
    for scheme, meaning in card["labels"].items():
        assert set(cancer[scheme]) <= set(meaning["values"]) == set(meaning["meaning"])


def test_the_table_is_text_and_the_card_is_json(small):
    _, table, card = small
    assert all(isinstance(value, str) for value in table.to_numpy().ravel())
    assert json.loads(json.dumps(card)) == card
    assert card["spacing_mm"] == [1.0, 1.0]
    assert list(card["labels"]) == ["isup", "gs", "grade2"] == list(table.columns[2:5])


def test_one_seed_gives_the_same_bytes_and_another_does_not(small):
    images, table, _ = small
    again, same, _ = prostate.prostate(n_unlabelled=120, n_train=60, n_val=0, n_test=20)
    other, _, _ = prostate.prostate(seed=1, n_unlabelled=120, n_train=60, n_val=0, n_test=20)
    assert np.array_equal(images, again)
    assert table.equals(same)
    assert (images != other).mean() > 0.9


def test_a_slice_does_not_depend_on_how_many_others_are_drawn(small):
    images, table, _ = small
    fewer, rows, _ = prostate.prostate(n_unlabelled=31, n_train=23, n_val=0, n_test=7)
    kept = np.r_[0:31, 120:143, 180:187]
    assert np.array_equal(fewer, images[kept])
    assert rows.drop(columns="patient").equals(
        table.iloc[kept].drop(columns="patient").reset_index(drop=True)
    )


def test_pixels_do_not_depend_on_the_block_they_are_drawn_in(small):
    view = prostate.VIEWS["phantom"]
    together = anatomy.render(prostate._patients(0, "unlabelled", 120, view), 64)
    assert np.array_equal(together, small[0][:120, 0])


@pytest.mark.parametrize("size", [16, 50, 96])
def test_any_size_can_be_drawn(size):
    images, table, card = prostate.prostate(size, n_unlabelled=3, n_train=3, n_val=1, n_test=1)
    assert images.shape == (8, 1, size, size)
    assert len(table) == 8
    assert card["spacing_mm"] == [64 / size] * 2
    assert images.std() > 20


@pytest.mark.parametrize(("size", "least"), [(128, 0.96), (32, 0.96)])
def test_every_size_shows_the_same_anatomy(small, size, least):
    other = prostate.prostate(size, n_unlabelled=120, n_train=60, n_val=0, n_test=20)[0]
    low, high = sorted((small[0][:, 0].astype(float), other[:, 0].astype(float)), key=np.size)
    side, factor = low.shape[-1], high.shape[-1] // low.shape[-1]
    mean = high.reshape(-1, side, factor, side, factor).mean((2, 4))
    alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(low, mean, strict=True)]
    assert min(alike) > least
    assert abs((low - mean).mean()) < 1


def test_a_nearest_neighbour_finds_the_patient(paper):
    images, table, _ = paper
    chosen = (table["split"] == "train").to_numpy()
    x = images[chosen].reshape(chosen.sum(), -1).astype(np.float32)
    patient = table.loc[chosen, "patient"].to_numpy()
    distance = (x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    assert (patient[distance.argmin(1)] == patient).mean() > 0.9


def test_the_lesion_darkens_its_place_and_nothing_else(monkeypatch):
    n = {"n_unlabelled": 0, "n_train": 150, "n_val": 0, "n_test": 0}
    images, table, _ = prostate.prostate(**n)
    draw = prostate._lesion

    def absent(*args):
        lesion = draw(*args)
        lesion[:, 0] = 0
        return lesion

    monkeypatch.setattr(prostate, "_lesion", absent)
    healthy, _, _ = prostate.prostate(**n)
    axis = np.arange(64) - 31.5
    x, y, diameter = table[["x_mm", "y_mm", "size_mm"]].astype(float).to_numpy().T
    centre = (slice(None), None, None)
    radius = np.hypot(axis - x[centre], axis[:, None] - y[centre])
    change = images[:, 0].astype(float) - healthy[:, 0]
    heart, far = radius < 0.3 * diameter[centre], radius > 0.9 * diameter[centre] + 8
    mean = np.array([c[h].mean() for c, h in zip(change, heart, strict=True)])
    assert (mean < -10).mean() > 0.95
    assert np.abs(change[far]).max() <= 3


def test_parameters_follow_the_stated_densities_slice_by_slice():
    rng = np.random.default_rng(0)
    z, level, anatomy = np.array([-6.0, 9.0]), np.array([-0.3, 0.4]), np.zeros(24)
    for score in (0, 5):
        shift = prostate.SHIFT[score]
        rows = np.stack([prostate._lesion(rng, shift, z, level, anatomy) for _ in range(2_000)])
        u = np.log(rows[..., :4])
        u[..., 1] -= np.log1p(-rows[..., 1])
        standard = (u - prostate.CENTRE) / prostate.SPREAD - prostate.SHIFT[score]
        for column in standard.reshape(2_000, -1).T:
            assert kstest(column, "norm").pvalue > 1e-3
        within = np.corrcoef(standard[:, 0, 0], standard[:, 1, 0])[0, 1]
        assert within > 1 - 2 * prostate.SLICE_SHARE  # slices of a patient differ mildly


@pytest.mark.parametrize("scheme", ["isup", "gs", "grade2"])
def test_the_posterior_sums_to_one_in_the_order_of_the_card(paper, scheme):
    _, table, card = paper
    rows = table[table["isup"] != ""]
    probability = prostate.posterior(rows, scheme)
    assert probability.shape == (len(rows), len(card["labels"][scheme]["values"]))
    assert np.allclose(probability.sum(1), 1)
    truth = rows[scheme].map(card["labels"][scheme]["values"].index).to_numpy()
    assert probability[np.arange(len(rows)), truth].mean() > probability.mean() * 1.3


def test_the_posterior_is_calibrated():
    table, isup = simulated_lesions(50_000, seed=3)
    probability = prostate.posterior(table, "isup")
    for k, group in enumerate((2, 3, 4, 5)):
        bins = np.digitize(probability[:, k], np.linspace(0, 1, 11)[1:-1])
        for b in range(10):
            p, hit = probability[bins == b, k], isup[bins == b] == group
            if len(p) > 200:
                error = np.sqrt((p * (1 - p)).sum()) / len(p)
                assert abs(hit.mean() - p.mean()) < 4.5 * error


def test_coarser_schemes_are_sums_of_finer_ones(paper):
    _, table, _ = paper
    rows = table[table["split"] == "test"]
    gs, isup, grade = (prostate.posterior(rows, s) for s in ("gs", "isup", "grade2"))
    assert np.allclose(isup[:, 2], gs[:, 2:5].sum(1))
    assert np.allclose(grade[:, 1], isup[:, 1:].sum(1))


@pytest.mark.parametrize("scheme", ["isup", "grade2"])
def test_the_best_auroc_is_that_of_an_independent_simulation(scheme):
    table, isup = simulated_lesions(100_000, seed=11)
    y = isup - 2 if scheme == "isup" else (isup > 2).astype(int)
    best = prostate.best_auroc(scheme)
    assert abs(macro_auroc(y, prostate.posterior(table, scheme)) - best) < 0.006
    assert 0 < best.standard_error < 0.002
    assert prostate.best_auroc(scheme) == best
    assert abs(prostate.best_auroc(scheme, seed=1) - best) < 5 * best.standard_error


@pytest.mark.parametrize("scheme", ["isup", "grade2", "gs"])
def test_classes_overlap_as_in_medicine(scheme):
    assert 0.8 < prostate.best_auroc(scheme) < 0.88


def test_a_classifier_of_the_true_parameters_does_not_beat_the_ceiling():
    table, isup = simulated_lesions(40_000, seed=5)
    theta = parameters(table)
    model = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    model.fit(theta[:30_000], isup[:30_000])
    reached = macro_auroc(isup[30_000:] - 2, model.predict_proba(theta[30_000:]))
    same_rows = macro_auroc(isup[30_000:] - 2, prostate.posterior(table[30_000:], "isup"))
    assert reached < same_rows
    assert same_rows - reached < 0.03


def test_the_test_split_can_be_told_its_own_ceiling(paper):
    _, table, card = paper
    rows = table[table["split"] == "test"]
    y = rows["isup"].map(card["labels"]["isup"]["values"].index).to_numpy()
    assert (
        abs(macro_auroc(y, prostate.posterior(rows, "isup")) - prostate.best_auroc("isup")) < 0.08
    )


def test_impossible_wishes_are_one_sentence(small):
    with pytest.raises(UserError, match="phantom .*size 8, .* at least 16"):
        prostate.prostate(size=8)
    with pytest.raises(UserError, match="nothing negative"):
        prostate.prostate(n_test=-1)
    with pytest.raises(UserError, match="a window and a separation above 0"):
        prostate.lesions(window_mm=0)
    with pytest.raises(UserError, match="no label scheme 'pirads'; known: isup, gs, grade2"):
        prostate.best_auroc("pirads")
    with pytest.raises(UserError, match="rows of the phantom that have a lesion"):
        prostate.posterior(small[1], "isup")
    with pytest.raises(UserError, match="lacks size_mm, contrast, edge_mm, texture"):
        prostate.posterior(small[1][["patient"]], "isup")


@pytest.fixture(scope="module")
def lesions():
    return prostate.lesions(n_unlabelled=400)


def test_a_window_shows_its_lesion_as_the_whole_slice_does():
    n = dict(n_unlabelled=0, n_train=40, n_val=0, n_test=0)
    whole, table, _ = prostate.prostate(256, **n)
    windows, same, _ = prostate.lesions(64, window_mm=16.0, separation=1.0, **n)
    assert table.equals(same)
    x, y = table[["x_mm", "y_mm"]].astype(float).to_numpy().T
    left, top = (np.rint((v + 32) * 4 - 32).astype(int) for v in (x, y))  # 4 pixels per mm
    for slice_, window, i, j in zip(whole[:, 0], windows[:, 0], left, top, strict=True):
        cut = slice_[j : j + 64, i : i + 64].astype(float)
        assert np.corrcoef(cut.ravel(), window.ravel().astype(float))[0, 1] > 0.85


def test_windows_of_benign_glands_lie_at_random_points_within():
    patients = prostate._patients(0, "unlabelled", 4_000, prostate.VIEWS["lesions"])
    centre, level = (np.concatenate([p[key] for p in patients]) for key in ("centre", "level"))
    anatomy_ = np.repeat([p["anatomy"] for p in patients], [len(p["z"]) for p in patients], 0)
    a, b = np.array([anatomy.half_axes(u, v) for u, v in zip(level, anatomy_, strict=True)]).T
    u, v = centre[:, 0] / a, (centre[:, 1] + 2) / b
    assert np.hypot(u, v).max() <= 0.85
    # uniform on the disc: the square of the radius and the angle are uniform
    assert kstest((u**2 + v**2) / 0.85**2, "uniform").pvalue > 1e-3
    assert kstest(np.arctan2(u, v) / (2 * np.pi) + 0.5, "uniform").pvalue > 1e-3


def test_the_paper_s_test_split_is_the_first_of_the_larger_one(lesions):
    images, table, card = lesions
    published, rows, its = prostate.lesions_238(n_unlabelled=400)
    assert its["counts"] == card["counts"] | {"test": 238}
    assert np.array_equal(published, images[: len(published)])
    assert rows.equals(table[: len(rows)])
    assert its["identity"] != card["identity"]
    tested = table[table["split"] == "test"]
    assert len(tested) == 2_400
    assert tested["patient"].nunique() >= 500


def test_runs_tell_sets_of_other_counts_or_laws_apart():
    small = dict(size=16, n_unlabelled=0, n_train=1, n_val=0)
    asked = [dict(n_test=1), dict(n_test=2), dict(n_test=1, separation=2.0)]
    told = [prostate.lesions(**small, **other)[2]["identity"] for other in asked]
    told += [prostate.prostate(**small, n_test=n)[2]["identity"] for n in (1, 2)]
    assert len(set(told)) == 5


def test_nothing_but_the_lesion_gives_the_class_away(lesions):
    """A linear model of the pixels outside of it is at chance, over patients of the test."""
    images, table, _ = lesions
    x = images[:, 0].astype(float)
    axis = np.abs(np.arange(32) - 15.5) * 0.5
    far = np.hypot(axis, axis[:, None]) > 10.5  # corners: few lesions reach there
    small = (table["size_mm"].replace("", "99").astype(float) < 13).to_numpy()
    known = {s: (table["split"] == s).to_numpy() & small for s in ("train", "test")}
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3))
    model.fit(x[known["train"]][:, far], table["grade2"][known["train"]])
    p = model.predict_proba(x[known["test"]][:, far])[:, 0]
    rows = table[known["test"]].assign(p=p)
    mean = rows.groupby("patient").agg(p=("p", "mean"), y=("grade2", "first"))
    auroc = roc_auc_score(mean["y"] == model.classes_[0], mean["p"])
    n = mean["y"].value_counts()
    assert abs(auroc - 0.5) < 3 * np.sqrt(n.sum() / (12 * n.prod()))


@pytest.mark.parametrize("scheme", ["isup", "grade2", "gs"])
def test_what_a_window_shows_can_be_learnt_and_is_no_giveaway(lesions, scheme):
    images, table, card = lesions
    view, names = prostate.VIEWS["lesions"], card["labels"][scheme]["values"]
    tested = table[table["split"] == "test"]
    y = tested[scheme].map(names.index).to_numpy()
    exact = macro_auroc(y, prostate.posterior(tested, scheme, **view))
    assert 0.80 < prostate.best_auroc(scheme, **view) < 0.92
    assert abs(exact - prostate.best_auroc(scheme, **view)) < 0.02
    f = features(torch.from_numpy(images) / 127.5 - 1).numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=400))
    known = (table["split"] == "train").to_numpy()
    model.fit(f[known], table[scheme][known].map(names.index))
    reached = macro_auroc(y, model.predict_proba(f[(table["split"] == "test").to_numpy()]))
    assert 0.68 < reached < exact


def test_a_size_that_a_window_cannot_show_is_only_known_to_be_large():
    """Bayes' rule by counting: among lesions too large to see the end of, how many are of each."""
    rng, seen = np.random.default_rng(0), np.array([0.5, np.inf])
    shift, share = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([0.7, 0.3])
    y = rng.choice(2, 400_000, p=share)
    z = shift[y] + rng.standard_normal((len(y), 2))
    p = law.posterior(z, shift, share, np.eye(2), seen)
    large = z[:, 0] > 0.5
    np.testing.assert_allclose(p[large], np.broadcast_to(p[large][0], p[large].shape))
    assert abs(p[large][0, 1] - y[large].mean()) < 0.005
    np.testing.assert_allclose(p[~large], law.posterior(z, shift, share, np.eye(2))[~large])


def test_an_empty_data_set_is_possible():
    images, table, _ = prostate.prostate(n_unlabelled=0, n_train=0, n_val=0, n_test=0)
    assert images.shape == (0, 1, 64, 64)
    assert list(table.columns[:2]) == ["patient", "split"]


DRAW = """
import hashlib
from data_prep.drawn import prostate
told = prostate.prostate(16, n_unlabelled=0, n_train=600, n_val=60, n_test=60)[1].to_csv()
print(hashlib.sha256(told.encode()).hexdigest())
"""


def test_patients_and_grades_are_the_same_on_every_processor():
    """Sums of shares tie now and then, and kernels of matrix products round differently."""
    kernels = ("Haswell", "SkylakeX", "Prescott")  # of OpenBLAS; others ignore the name
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRAW],
            env=os.environ | {"OPENBLAS_CORETYPE": kernel},
            stdout=subprocess.PIPE,
            text=True,
        )
        for kernel in kernels
    ]
    told = {process.communicate()[0] for process in started}
    assert len(told) == 1
    assert len(told.pop().strip()) == 64
