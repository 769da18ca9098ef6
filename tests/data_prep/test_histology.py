"""The histology set: what is true of every data set it draws, and of the ceiling it promises."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import kstest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.drawn import histology
from hallulib import UserError
from hallulib.data import imageset
from hallulib.evidence.quality import features

FEW = {"n_unlabelled": 96, "n_train": 384, "n_val": 0, "n_test": 144}


@pytest.fixture(scope="module")
def small():
    return histology.histology(32, **FEW)


@pytest.fixture(scope="module")
def opened():
    """The default set, its pixels left blank."""
    with pytest.MonkeyPatch.context() as patch:
        blank = lambda tiles, seeds, size: np.zeros((len(seeds), 3, size, size), np.uint8)
        patch.setattr(histology, "render", blank)
        return imageset.open("histology", 16)


@pytest.fixture(scope="module")
def full(opened):
    return opened.images, opened.table, opened.card


@pytest.fixture(scope="module")
def described(small):
    """Features, class (-1 where unlabelled) and table."""
    images, table, card = small
    image_set = imageset.ImageSet(images, table, card)
    return features(image_set.tensor()).numpy(), image_set.labels("tissue").numpy(), table


def linear(x, y, x_test):
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(x, y).predict(x_test)


def simulated_tiles(n, seed):
    """Tiles written from the docstring's table alone, without the module's numbers."""
    rows = [line.split() for line in histology.__doc__.splitlines()]
    rows = {row[0]: row[1:] for row in rows if len(row) == 8}
    number = {k: np.array(rows[k], float) for k in ("median", "spread", *histology.TISSUE)}
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    z = np.stack([number[c] for c in histology.TISSUE])[y] + rng.standard_normal((n, 7))
    share = np.isin(rows["class"], ["gland_share", "lumen", "disorder", "infiltrate"])
    theta = number["median"] / (1 - share * number["median"]) * np.exp(number["spread"] * z)
    theta = np.where(share, theta / (1 + theta), theta)
    return pd.DataFrame(theta.astype(str), columns=rows["class"]), y


def test_the_set_is_found_by_name_in_colour(opened):
    assert (opened.name, opened.channels, opened.size) == ("histology", 3, 16)
    assert (len(opened), opened.schemes) == (4_272, ("tissue", "diagnosis"))
    assert opened.tensor([0, 1]).shape == (2, 3, 16, 16)


def test_no_patient_is_in_two_splits_or_sites_and_ids_are_in_order(full):
    _, table, card = full
    assert (table.groupby("patient")[["split", "site"]].nunique() == 1).all(axis=None)
    assert table["patient"].is_monotonic_increasing
    assert not table.duplicated(["patient", "tile"]).any()
    assert table["split"].value_counts().to_dict() == card["counts"]
    assert table.groupby("split")["patient"].nunique().to_dict() == {
        "unlabelled": 200,
        "train": 84,
        "val": 20,
        "test": 52,
    }


def test_the_labelled_site_is_not_among_the_unlabelled_ones(full):
    _, table, _ = full
    sites = table.groupby("split")["site"].unique().map(sorted).to_dict()
    assert sites.pop("unlabelled") == ["A", "B", "C", "D"]
    assert list(sites.values()) == [["E"]] * 3
    assert table["site"].value_counts()[list("ABCD")].tolist() == [600] * 4


def test_unlabelled_tiles_tell_neither_label_nor_parameters(full):
    _, table, _ = full
    unlabelled = table["split"] == "unlabelled"
    told = [*histology.SCHEMES, *histology.PARAMETERS]
    assert (table.loc[unlabelled, told] == "").all(axis=None)
    assert (table.loc[~unlabelled, told] != "").all(axis=None)


def test_classes_are_equally_frequent_and_agree_with_each_other(full):
    _, table, card = full
    labelled = table[table["tissue"] != ""]
    counts = labelled.groupby("split")["tissue"].value_counts().unstack()
    assert (counts.nunique(axis=1) == 1).all()
    assert ((labelled["diagnosis"] == "malignant") == (labelled["tissue"] == "tumour")).all()
    for scheme, meaning in card["labels"].items():
        assert set(labelled[scheme]) == set(meaning["values"]) == set(meaning["meaning"])


def test_the_table_is_text_and_the_card_is_json(full):
    _, table, card = full
    assert all(isinstance(value, str) for value in table.to_numpy().ravel())
    assert json.loads(json.dumps(card)) == card
    assert card["spacing_mm"] == [0.007, 0.007]
    assert list(card["labels"]) == ["tissue", "diagnosis"] == list(table.columns[2:4])


def test_one_seed_gives_the_same_bytes_and_another_does_not():
    n = {"n_unlabelled": 24, "n_train": 12, "n_val": 0, "n_test": 12}
    images, table, _ = histology.histology(**n)
    again, same, _ = histology.histology(**n)
    other, others, _ = histology.histology(seed=1, **n)
    assert np.array_equal(images, again)
    assert table.equals(same)
    assert (images != other).mean() > 0.9
    assert (table["nucleus_um"] != others["nucleus_um"])[24:].mean() > 0.9


def test_a_tile_does_not_depend_on_how_many_others_are_drawn(small):
    images, table, _ = small
    fewer, rows, _ = histology.histology(32, n_unlabelled=13, n_train=17, n_val=0, n_test=5)
    kept = np.r_[0:13, 96:113, 480:485]
    assert np.array_equal(fewer, images[kept])
    assert rows.drop(columns="patient").equals(
        table.iloc[kept].drop(columns="patient").reset_index(drop=True)
    )


def test_no_tile_is_drawn_twice(small):
    images = small[0].reshape(len(small[0]), -1)
    assert len(np.unique(images, axis=0)) == len(images)


@pytest.mark.parametrize("size", [16, 50, 96])
def test_any_size_can_be_drawn(size):
    images, table, card = histology.histology(size, n_unlabelled=3, n_train=3, n_val=1, n_test=1)
    assert images.shape == (8, 3, size, size)
    assert len(table) == 8
    assert card["spacing_mm"] == [0.112 / size] * 2


def test_parameters_follow_the_stated_densities_tile_by_tile():
    theta, tissues = [], []
    for number in range(400):
        slide = histology._slide(0, "train", number, 12)
        theta.append(slide["theta"][7])
        tissues.append(slide["tissue"][7])
    u = histology._unbounded(np.array(theta))
    z = (u - histology._unbounded(histology.MEDIAN)) / histology.SPREAD - histology.SHIFT[tissues]
    for column in z.T:
        assert kstest(column, "norm").pvalue > 1e-3


def test_tiles_of_a_patient_are_alike():
    slides = [histology._slide(0, "train", number, 12) for number in range(200)]
    u = histology._unbounded(np.array([s["theta"] for s in slides]))
    z = u / histology.SPREAD - histology.SHIFT[np.array([s["tissue"] for s in slides])]
    within = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(z[:, 0].T, z[:, 5].T, strict=True)])
    assert abs(within - histology.PATIENT_SHARE) < 0.1
    assert all((s["tiles"]["eosin"] == s["tiles"]["eosin"][0]).all() for s in slides)


def test_a_nearest_neighbour_finds_the_patient_more_often_than_by_chance(described):
    x, y, table = described
    z, patient = StandardScaler().fit_transform(x[y >= 0]), table["patient"][y >= 0].to_numpy()
    distance = cdist(z, z)
    np.fill_diagonal(distance, np.inf)
    assert (patient[distance.argmin(1)] == patient).mean() > 5 * 12 / len(patient)


def test_sites_are_stained_cut_and_lit_as_stated():
    def look(site):
        slides = [
            histology._slide(0, "unlabelled", 4 * n + "ABCD".index(site), 1) for n in range(25)
        ]
        return np.mean([list(slide["tiles"].values()) for slide in slides], 0)[-7:, 0]

    site = {name: look(name) for name in "ABCD"}
    for name, seen in site.items():
        stated = np.array(histology.SITES[name][0])
        assert np.allclose(seen, stated, rtol=4 * 0.36 / 5)  # the standard error of a mean of 25
    assert len({tuple(stated) for stated, _ in histology.SITES.values()}) == 5


def test_a_classifier_learns_the_tissue_but_not_permuted_labels(described):
    x, y, table = described
    train, test = ((table["split"] == s).to_numpy() for s in ("train", "test"))
    reached = (linear(x[train], y[train], x[test]) == y[test]).mean()
    patients = np.random.default_rng(0).permutation(y[train].reshape(-1, 12)).reshape(-1)
    lost = (linear(x[train], patients, x[test]) == y[test]).mean()
    assert 0.65 < reached < 0.95
    assert lost < 0.4


@pytest.mark.parametrize("scheme", ["tissue", "diagnosis"])
def test_the_posterior_sums_to_one_and_knows_the_order_of_the_card(full, scheme):
    _, table, card = full
    rows = table[table["tissue"] != ""]
    probability = histology.posterior(rows, scheme)
    assert np.allclose(probability.sum(1), 1)
    truth = rows[scheme].map(card["labels"][scheme]["values"].index).to_numpy()
    assert (probability.argmax(1) == truth).mean() > 0.9


def test_the_posterior_is_calibrated_and_its_accuracy_the_promised_one():
    table, y = simulated_tiles(20_000, seed=3)
    probability = histology.posterior(table, "tissue")
    right = probability.argmax(1) == y
    assert abs(right.mean() - probability.max(1).mean()) < 0.006
    best = histology.best_accuracy("tissue")
    assert abs(right.mean() - best) < 0.006
    assert 0 < best.standard_error < 0.001
    malignant = histology.posterior(table, "diagnosis")[:, 1]
    assert np.allclose(malignant, probability[:, 3])
    assert histology.best_accuracy("diagnosis") > best


def test_impossible_wishes_are_one_sentence(small):
    with pytest.raises(UserError, match="size 8, .* at least 16"):
        histology.histology(size=8)
    with pytest.raises(UserError, match="nothing negative"):
        histology.histology(n_test=-1)
    with pytest.raises(UserError, match="no label scheme 'isup'; known: tissue, diagnosis"):
        histology.best_accuracy("isup")
    with pytest.raises(UserError, match="needs labelled rows of the histology set"):
        histology.posterior(small[1], "tissue")


def test_an_empty_data_set_is_possible():
    images, table, _ = histology.histology(n_unlabelled=0, n_train=0, n_val=0, n_test=0)
    assert images.shape == (0, 3, 64, 64)
    assert list(table.columns[:2]) == ["patient", "split"]
