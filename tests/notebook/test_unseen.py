"""Classes never seen: the notebook of one held-out domain, on windows and tissue as drawn."""

import json
import sys

import numpy as np
import pytest
import torch
import toy_set
from notebook_names import executed
from safetensors.torch import save_file

from conftest import ROOT, size_for_tests
from data_prep.__main__ import main
from data_prep.drawn import histology, prostate
from hallulib import UserError
from hallulib.evidence import metrics
from hallulib.notebook import grid, parameters

NOTEBOOK = ROOT / "book" / "grids" / "unseen.ipynb"
SMALL = dict(n_unlabelled=24, n_train=144, n_val=48, n_test=96)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The embedded sets, fewer images of each, as two domains."""
    home = tmp_path_factory.mktemp("unseen")
    columns = {"lesions": "grade2", "histology": "tissue"}
    draws = {"lesions": prostate.lesions, "histology": histology.histology}
    for name, column in columns.items():
        images, table, card = draws[name](size=32, **SMALL)
        rows = table[["patient", "split", column]].assign(item=table.index.astype(str))
        values = card["labels"][column]["values"]
        about = {"name": name, "labels": {"grade": {"values": values}}}
        toy_set.write(home / name, images, list(rows.itertuples(index=False)), **about)
    pairs = [f"{home / name}=grade" for name in columns]
    assert main(["join", str(home / "all"), *pairs, "--size=32"]) == 0
    return home / "all"


@pytest.fixture(scope="module")
def space(joined):
    return executed(NOTEBOOK, META=str(joined))


def test_every_method_answers_every_episode(space):
    auroc = space["auroc"]
    assert len(auroc) == size_for_tests(NOTEBOOK)["N_EPISODES"]
    assert auroc.stack().between(0, 1).all()
    embeddings = ["pixels", "filter bank", "ResNet mean", "ResNet BDC"]
    kinds = ["", ", centred", ", oracle +2", ", class mean"]
    assert {f"{name}{kind}" for name in embeddings for kind in kinds} <= set(auroc)
    kinds = ["calibrated", "changed +2", "edited 0.1 +2", "read +2", "learnt +4", "diffused"]
    assert {f"filter bank, {kind}" for kind in kinds} <= set(auroc)
    assert set(space["series"]) == {*auroc, "alone"}
    assert space["reference"] in space["alone"]
    assert auroc[space["alone"]].mean().max() == auroc[space["reference"]].mean()


def test_the_numbers_of_the_groups_are_those_of_the_episodes(space):
    for name in space["auroc"]:
        values = space["series"][name]
        assert len(values) == space["tasks"].groups
        of_episodes = space["auroc"][name].dropna()
        told = metrics.over_patients(of_episodes, len(values)).value
        assert np.mean(values) == pytest.approx(told, abs=1e-4)


def test_nothing_of_the_held_out_domain_is_learnt_from(space):
    table, test = space["images"].table, space["test"]
    assert set(table["set"][space["known"]]) == {"histology"}
    assert set(space["base"]) <= set(space["known"])
    assert set(table["set"][space["asked"]]) == {"lesions"}
    assert (space["images"].images[space["asked"]] == test.images).all()
    assert not (table["class"][space["asked"]] == "").any()
    assert set(table["set"].iloc[space["seen_rows"]]) == {"histology"}
    assert set(space["training_tasks"]) == {"histology"}


def test_vectors_that_tell_the_classes_apart_are_read_without_error_by_all(space):
    y, rng = space["y_test"], torch.Generator().manual_seed(0)
    clear = torch.eye(4)[y] * 9 + torch.rand(len(y), 4, generator=rng)
    elsewhere = torch.rand(len(space["base"]), 4, generator=rng)
    answers = (
        space["nearest"](clear, space["support"]),
        space["calibrated"](clear, elsewhere),
        space["with_neighbours"](clear),
        space["class_mean"](clear),
        space["supervised"](clear),
    )
    for scores in answers:
        space["keep"]("clear", scores)
        assert space["measured"].pop("clear").min() == 1


def test_what_tells_patients_and_not_classes_helps_neither_neighbours_nor_templates(space):
    of_patient = torch.eye(int(space["who"].max()) + 1)[space["who"]]
    for answer in (space["with_neighbours"], space["class_mean"]):
        space["keep"]("of patients", answer(of_patient))
        assert space["measured"].pop("of patients") == pytest.approx(0.5)


def test_copies_of_the_support_change_nothing_and_spare_images_are_the_oracle(space):
    copies = space["x_shown"][:, None].expand(-1, 2, -1, -1, -1)
    space["with_made"]("copied", copies, (2,))
    spare = space["test"].tensor(space["spare"].flatten().numpy())
    spare = spare.unflatten(0, space["spare"].shape)
    space["with_made"]("spare", spare, (2,), of_episodes=True)
    measured = space["measured"]  # vectors of stored files are rounded to half precision
    assert measured.pop("filter bank, copied +2") == pytest.approx(
        measured["filter bank"], abs=0.02
    )
    oracle = measured["filter bank, oracle +2"]
    assert measured.pop("filter bank, spare +2") == pytest.approx(oracle, abs=0.02)


def test_a_sum_of_scores_knows_no_scale_and_no_level(space):
    a, b = torch.randn(2, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    level = torch.arange(30.0).view(6, 5, 1)  # of a query, the same for all classes
    expected = space["summed"]([a, b])
    assert torch.allclose(space["summed"]([7 * a + level, b]), expected, atol=1e-5)


def test_prototypes_go_from_a_support_to_its_class(space):
    """Of classes without spread the support is the class; of spread without classes, nothing."""
    y, rng = space["y_base"], torch.Generator().manual_seed(0)
    of_class = torch.randn(int(y.max()) + 1, 8, generator=rng)
    seen = torch.randn(40, 3, 8, generator=rng)
    pure, noise = of_class[y], torch.randn(len(y), 8, generator=rng)
    kept, _, model = space["learnt_from"](pure)
    lost = space["learnt_from"](noise)[0]
    axes = torch.linalg.svd(of_class - of_class.mean(0))[2][: len(of_class) - 1]
    between = seen @ axes.T @ axes  # what differs between the classes of the training
    assert torch.nn.functional.cosine_similarity(between @ kept, between, dim=-1).mean() > 0.9
    assert (seen @ lost).norm() < 0.3 * seen.norm()
    regressed, diffused = space["prototypes"](seen, kept, 1e-6, model)
    assert torch.allclose(diffused, regressed[..., None, :].expand_as(diffused), atol=1e-4)


def test_the_gaussian_of_a_class_is_that_of_its_vectors(space):
    base = torch.randn(len(space["base"]), 3, generator=torch.Generator().manual_seed(0))
    means, covariances = space["gaussians"](base)
    for c, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        own = base[space["y_base"] == c].numpy()
        assert mean.numpy() == pytest.approx(own.mean(0), abs=1e-5)
        assert covariance.numpy() == pytest.approx(np.cov(own.T), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"HELD_OUT": "liver"}, "no domain 'liver'; known domains: lesions, histology"),
        ({"TOGETHER": "histology,brain"}, "no domain 'brain'; known domains: lesions, histology"),
        ({"TOGETHER": "lesions,histology"}, "no domain is left for training; fewer held out"),
        ({"ENCODER": "net"}, "ENCODER = net needs timm, which make env installs; none leaves it"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_in_one_sentence(joined, monkeypatch, given, told):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as stop:
        executed(NOTEBOOK, 5, META=str(joined), **given)["photographs"]()
    assert told in str(stop.value)
    assert "\n" not in str(stop.value)


def test_an_encoder_of_timm_reads_its_weights_from_a_file(joined, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    network = timm.create_model("test_resnet")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    given = {"ENCODER": "test_resnet", "WEIGHTS": str(tmp_path / "weights.safetensors")}
    given["META"] = str(joined)
    name, embed, settings = executed(NOTEBOOK, 5, **given)["photographs"]()
    assert (name, len(settings["weights"])) == ("test_resnet", 64)
    network.reset_classifier(0)
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    assert embed(grey).shape == (2, network.num_features)
    assert torch.equal(embed(grey), embed(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(UserError, match="WEIGHTS = none: no such file; it or download is needed"):
        executed(NOTEBOOK, 5, **given | {"WEIGHTS": "none"})["photographs"]()


@pytest.mark.chapter
def test_a_cell_of_the_grid_runs_and_leaves_its_numbers(joined, tmp_path):
    given = parameters.own_values(NOTEBOOK) | size_for_tests(NOTEBOOK)
    given |= {"META": str(joined), "HELD_OUT": "histology"}
    cell = grid.run_cell(NOTEBOOK, given, tmp_path / "cell.json")
    assert cell["error"] is None
    assert json.loads((tmp_path / "cell.json").read_text())["series"] == cell["series"]
    assert cell["measured"]["n_way"]["value"] == 4
