"""BreakHis into an image set: the patient and both labels from the names of files."""

import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_tiles import glass, prepared, refused, save, tissue, truncate, written

from data_prep.archives.breakhis import SUBTYPES, list_images
from hallulib.data import checks

SLIDES = {  # as in the archive: slides of one biopsy, and one slide under two subtypes
    "adenosis": ["14-22549AB", "14-22549CD", "14-22549G", "14-29960CD"],
    "fibroadenoma": ["14-9133", "14-29960AB", "14-14134E"],
    "phyllodes_tumor": ["14-21998AB", "14-22704", "14-29315EF"],
    "tubular_adenoma": ["14-15275", "14-13200", "14-3411F"],
    "ductal_carcinoma": ["14-13412", "14-2523", "14-5287"],
    "lobular_carcinoma": ["14-13412", "14-15570", "14-15570C", "14-12204"],
    "mucinous_carcinoma": ["14-12773", "14-13418DE", "14-10147"],
    "papillary_carcinoma": ["14-9146", "15-190EF", "14-12465"],
}
N = 2  # images of each slide at each magnification


def file_of(root: Path, subtype: str, slide: str, magnification: str, i: int) -> Path:
    diagnosis, code, _ = SUBTYPES[subtype]
    start = f"SOB_{diagnosis[0].upper()}_{code}"
    name = f"{start}-{slide}-{magnification}-{i:03d}.png"
    below = f"histology_slides/breast/{diagnosis}/SOB/{subtype}/{start}_{slide}"
    return root / below / f"{magnification}X" / name


def make(root: Path, magnifications=("40", "200"), **kept) -> Path:
    for subtype, slides in SLIDES.items():
        for slide in slides:
            for magnification in magnifications:
                for i in range(1, N + 1):
                    # the same slide at the same place is the same image, whatever its folder
                    seed = zlib.crc32(f"{slide} {magnification} {i}".encode())
                    file = file_of(root, subtype, slide, magnification, i)
                    save(file, (glass if slide == "14-22704" else tissue)(seed, 23, 35))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("breakhis") / "BreaKHis_v1")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    return prepared(out, "breakhis", root, None, "--size=16", "--magnification=all")


@pytest.fixture(scope="module")
def rows(root, whole):
    """What the names of the files say, in the order of the set."""
    return list_images(root)[0].iloc[whole.table["item"].astype(int) - 1]


def test_labels_are_those_of_the_names(whole, rows):
    assert len(whole) == 2 * N * sum(map(len, SLIDES.values()))
    for name in ("diagnosis", "magnification"):
        assert list(whole.table[name]) == list(rows[name])
    assert whole.schemes == ("diagnosis", "subtype")
    assert whole.classes("diagnosis") == ("benign", "malignant")
    assert whole.classes("subtype") == tuple(SLIDES)
    doubtful = (rows["slide"] == "14-13412").to_numpy()
    assert doubtful.sum() == 4 * N
    assert set(whole.table["subtype"][doubtful]) == {""}
    assert list(whole.table["subtype"][~doubtful]) == list(rows["subtype"][~doubtful])
    told = "image of a slide filed under two subtypes: no subtype"
    assert whole.card["report"][told] == 4 * N
    assert whole.unit == "patient"


def test_slides_of_one_biopsy_are_one_patient_and_in_one_split(whole, rows):
    biopsies = [slide.rstrip("ABCDEFG") for slide in rows["slide"]]
    pairs = set(zip(biopsies, whole.table["patient"], strict=True))
    assert len(pairs) == len({b for b, _ in pairs}) == len({p for _, p in pairs}) == 21
    assert (whole.table.groupby("patient")["split"].nunique() == 1).all()
    counts = whole.table.groupby("split")["diagnosis"].nunique()
    assert counts.to_dict() == {"train": 2, "val": 2, "test": 2}
    assert "image with an exact copy in another split" not in whole.card["report"]
    assert whole.card["report"]["image that is an exact copy of another"] == 2 * N


def test_pixels_are_the_middle_of_the_files(whole, rows):
    for place in (0, 30, len(whole) - 1):
        stored = np.asarray(Image.open(rows["file"].iloc[place]))[:, 6:29]
        expected = checks.area_average(np.moveaxis(stored, 2, 0)[None], 16)[0]
        assert np.array_equal(whole.images[place], expected)


def test_one_magnification_is_that_part_of_the_whole(whole, root, tmp_path):
    command = ("breakhis", root, None, "--size=16", "--magnification=200")
    part = prepared(tmp_path / "set", *command)
    chosen = (whole.table["magnification"] == "200").to_numpy()
    assert np.array_equal(part.images, whole.images[chosen])
    columns = ["diagnosis", "subtype", "magnification"]
    found, expected = part.table[columns], whole.table[columns][chosen]
    assert found.values.tolist() == expected.values.tolist()
    assert any(told.startswith("200X holds") for told in part.card["warnings"])


def test_no_slide_is_named_and_blank_images_are_counted(whole):
    text = written(whole)
    assert [slide for slides in SLIDES.values() for slide in slides if slide[3:] in text] == []
    assert "SOB_" not in text
    assert whole.card["report"]["blank tile, white"] == 2 * N


def change(kind: str, root: Path) -> None:
    file = file_of(root, "adenosis", "14-22549AB", "40", 1)
    if kind == "a subtype missing":
        shutil.rmtree(file.parents[2])
    elif kind == "an empty subtype":
        shutil.rmtree(file.parents[2])
        file.parents[2].mkdir()
    elif kind == "another subtype":
        file.rename(file.with_name("SOB_B_F-14-22549AB-40-001.png"))
    elif kind == "another magnification":
        file.rename(file.with_name("SOB_B_A-14-22549AB-100-001.png"))
    elif kind == "no slide":
        file.rename(file.with_name("IMG_0001.png"))
    elif kind == "truncated":
        truncate(file)
    elif kind == "another folder":
        shutil.rmtree(root / "histology_slides")
    elif kind == "no folder":
        shutil.rmtree(root)


BAD = {
    "a subtype missing": "adenosis: no such folder; one for each of the 8 subtypes is needed",
    "an empty subtype": "adenosis: no image; folders SLIDE/40X and so on are needed in it",
    "another subtype": "SOB_B_F-14-22549AB-40-001.png: a name like SOB_B_A-14-22549AB-40-001.png",
    "another magnification": "AB-100-001.png: a name like SOB_B_A-14-22549AB-40-001.png, at the",
    "no slide": "IMG_0001.png: a name like SOB_B_A-14-22549AB-40-001.png",
    "truncated": "SOB_B_A-14-22549AB-40-001.png: not a whole image",
    "another folder": "no folder histology_slides/breast/benign in it; BreaKHis_v1 is needed",
    "no folder": "no such folder; BreaKHis_v1 is needed",
}


@pytest.mark.parametrize(("kind", "told"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, capsys, kind, told):
    root = make(tmp_path / "BreaKHis_v1", ["40"])
    change(kind, root)
    assert told in refused(capsys, tmp_path / "set", "breakhis", root, None, "--size=16")


def test_a_magnification_that_is_not_there_is_told(root, tmp_path, capsys):
    command = ("breakhis", root, None, "--magnification=400")
    assert "no image at 400X" in refused(capsys, tmp_path / "set", *command)
