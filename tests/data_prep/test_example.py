"""The drawn folder of pictures: read as anybody's, and no copy of the embedded set."""

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import parser
from data_prep.archives import folder
from data_prep.drawn import example, prostate
from hallulib import data


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    where = tmp_path_factory.mktemp("pictures") / "example"
    example.write(where, n_labelled=60, n_unlabelled=20)
    return where


def test_the_pictures_become_an_image_set_whose_labels_and_patients_are_those_drawn(pictures):
    arguments = [str(pictures), str(pictures.parent / "set"), "--size=64", "--workers=1"]
    arguments.append("--patient-pattern=([^/_]+)_[^/]*$")
    report = folder.run(parser("folder").parse_args(["folder", *arguments]))
    found = data.open(pictures.parent / "set")
    counts = dict(n_unlabelled=20, n_train=60, n_val=0, n_test=0)
    drawn, table, _ = prostate.lesions(64, seed=1, separation=example.SEPARATION, **counts)
    assert report.images == len(found) == len(table) == 80
    assert not report.counts
    place = {image.tobytes(): i for i, image in enumerate(drawn)}
    own = table.iloc[[place[image.tobytes()] for image in found.images]]
    assert found.table["label"].tolist() == own["grade2"].tolist()
    assert ((found.table["split"] == "unlabelled") == (found.table["label"] == "")).all()
    pairs = set(zip(found.table["patient"], own["patient"], strict=True))
    assert len(pairs) == found.table["patient"].nunique() == own["patient"].nunique()


def test_none_of_the_pictures_is_one_that_the_shipped_model_learnt(pictures):
    learnt = {image.tobytes() for image in prostate.lesions(64, n_test=0)[0]}
    own = {np.asarray(Image.open(file)).tobytes() for file in pictures.rglob("*.png")}
    assert len(own) == 80
    assert not own & learnt
