"""PanNuke into an image set: folds of arrays, memory-mapped."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from toy_tiles import glass, prepared, refused, tissue, truncate

from data_prep import arrays, tiles
from data_prep.archives.pannuke import TISSUES
from hallulib.data import checks, imageset

NAMES = {1: ["Breast", "Colon", "Breast", "HeadNeck"], 2: ["Colon", "Breast"], 3: ["Bile-duct"]}


def make(root: Path, dtype=np.float64, folds=NAMES) -> Path:
    """The layout of the unpacked archives; the last image of a fold is white."""
    for fold, names in folds.items():
        images = np.stack([tissue(10 * fold + i, 256, 256) for i in range(len(names))])
        images[-1] = glass(fold, 256, 256)
        folder = root / f"Fold {fold}" / "images" / f"fold{fold}"
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", images.astype(dtype))
        np.save(folder / "types.npy", np.array(names))
        masks = root / f"Fold {fold}" / "masks" / f"fold{fold}"
        masks.mkdir(parents=True)
        np.save(masks / "masks.npy", np.zeros((1, 1)))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("pannuke"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("out") / "set", "pannuke", root, None, "--size=32")


def test_folds_become_splits_and_types_become_labels(whole):
    assert list(whole.table["tissue"]) == [name for names in NAMES.values() for name in names]
    assert list(whole.table["split"]) == ["train"] * 4 + ["val"] * 2 + ["test"]
    assert list(whole.table["item"]) == [
        f"fold{fold} {i}" for fold, names in NAMES.items() for i in range(len(names))
    ]
    assert list(whole.classes("tissue")) == TISSUES
    assert whole.unit == "unknown"
    assert whole.card["spacing_mm"] == [0.002, 0.002]


def test_pixels_are_those_of_the_arrays(whole, root):
    stored = [np.load(f) for f in sorted(root.glob("*/images/*/images.npy"))]
    planes = np.moveaxis(np.concatenate(stored).astype(np.uint8), 3, 1)
    assert np.array_equal(whole.images, checks.area_average(planes, 32))


def test_the_type_of_the_arrays_changes_nothing(whole, tmp_path):
    make(tmp_path / "in", np.uint8)
    other = prepared(tmp_path / "set", "pannuke", tmp_path / "in", None, "--size=32")
    for name in imageset.FILES:
        assert (other.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_order_of_the_folds_is_that_of_the_splits(root, tmp_path):
    other = prepared(tmp_path / "set", "pannuke", root, None, "--size=32", "--folds=3,1")
    assert list(other.table["split"]) == ["train"] + ["val"] * 4
    assert other.table["item"].iloc[0] == "fold3 0"


def test_without_labels_all_images_are_unlabelled_and_types_are_not_read(tmp_path, whole):
    make(tmp_path / "in")
    for file in tmp_path.glob("in/*/images/*/types.npy"):
        file.unlink()
    command = ("pannuke", tmp_path / "in", None, "--size=32", "--unlabelled", "--blank=drop")
    other = prepared(tmp_path / "set", *command)
    assert other.schemes == ()
    assert set(other.table["split"]) == {"unlabelled"}
    assert other.card["report"]["blank tile, white: left out"] == 3
    assert np.array_equal(other.images, whole.images[[0, 1, 2, 4]])


def test_the_report_says_what_is_not_known(whole):
    report, warnings = whole.card["report"], " ".join(whole.card["warnings"])
    assert "neither patients nor slides are published" in warnings
    assert "fold 1 holds 4 of 2656 images" in warnings
    assert report["blank tile, white"] == 3
    assert [n for name, n in report.items() if name.startswith("image without patient")] == [7]


def test_a_block_of_a_large_fold_is_all_that_is_in_memory(tmp_path):
    file, n = tmp_path / "images.npy", 700
    shape = (n, 256, 256, 3)
    np.lib.format.open_memmap(file, "w+", np.float64, shape)  # 1.1 GB of zeros, none on disk
    plan = {"patient": "p", "split": "train", "label": "x"}
    plan |= {"part": "fold1", "file": str(file), "array": ""}
    rows = arrays.pd.DataFrame([plan] * n)
    tracemalloc.start()
    blocks = list(arrays.blocks(rows, {"tissue": "label"}))
    study = arrays.read_block(blocks[-1], 64, tiles.Blanks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p for block in blocks for p, _ in block.rows] == list(range(n))
    assert len(study.images) == len(blocks[-1].rows) > 0
    assert peak < 2e8
    assert str(file) not in Path("/proc/self/maps").read_text()  # its pages would count, too


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    root = make(tmp_path / "in", folds={1: ["Breast"] * 30})  # two blocks
    command = ("pannuke", root, None, "--size=16", "--folds=1", "--unlabelled", "--name=set")
    out = tmp_path / "out" / "set"
    words = [str(out) if word is None else str(word) for word in command]
    run = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *words, "--workers=1"],
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    staged, end = out.with_name("set.partial"), time.monotonic() + 100
    while not list(staged.glob("*.npz")):
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    run.kill()
    run.wait()
    assert not out.exists()
    assert list(staged.glob("*.npz"))
    resumed, whole = prepared(out, *command), prepared(tmp_path / "whole", *command)
    assert os.listdir(out.parent) == ["set"]
    assert len(resumed) == 30
    for name in imageset.FILES:
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


def change(kind: str, root: Path) -> None:
    folder = root / "Fold 2" / "images" / "fold2"
    images, types = folder / "images.npy", folder / "types.npy"
    if kind == "no fold":
        images.unlink()
    elif kind == "two of a fold":
        (root / "again" / "fold2").mkdir(parents=True)
        (root / "again" / "fold2" / "images.npy").write_bytes(images.read_bytes())
    elif kind == "no types":
        types.unlink()
    elif kind == "pickled types":
        np.save(types, np.array(["Colon", "Breast"], object), allow_pickle=True)
    elif kind == "another number of types":
        np.save(types, np.array(["Colon"]))
    elif kind == "types of numbers":
        np.save(types, np.array([1, 2]))
    elif kind == "an unknown type":
        np.save(types, np.array(["Colon", "Brain"]))
    elif kind == "truncated":
        truncate(images)
    elif kind == "another shape":
        np.save(images, np.zeros((2, 128, 128, 3)))
    elif kind == "no channels":
        np.save(images, np.zeros((2, 256)))
    elif kind == "no image":
        np.save(images, np.zeros((0, 256, 256, 3)))
    elif kind == "0 to 1":
        np.save(images, np.stack([tissue(0, 256, 256), tissue(1, 256, 256)]) / 255)
    elif kind == "NaN":
        np.save(images, np.full((2, 256, 256, 3), np.nan))
    elif kind == "below 0":
        np.save(images, np.full((2, 256, 256, 3), -1))


BAD = {
    "no fold": "no folder fold2 with images.npy in it; one is needed, as in Fold 2/images/fold2",
    "two of a fold": "2 folders fold2 with images.npy in it; one is needed",
    "no types": "types.npy: not a readable array of texts",
    "pickled types": "types.npy: not a readable array of texts (Array can't be",
    "another number of types": "images.npy has 2 images for 1 labels; one each needed",
    "types of numbers": "types.npy: is int64 (2,); one text per image is needed",
    "an unknown type": "types.npy: has 'Brain'; known: Adrenal_gland, Bile-duct",
    "truncated": "images.npy: not a whole .npy file",
    "another shape": "images.npy has shape (2, 128, 128, 3); (2, 256, 256, 3) is needed",
    "no channels": "images.npy is float64 (2, 256); numbers (images, height, width[, 3])",
    "no image": "images.npy is float64 (0, 256, 256, 3); numbers (images, height, width[, 3])",
    "0 to 1": "images.npy has values from 0.1",
    "NaN": "images.npy has values from nan to nan in images 0 to 1; 0 to 255 are needed",
    "below 0": "images.npy has values from -1 to -1 in images 0 to 1; 0 to 255 are needed",
}


@pytest.mark.parametrize(("kind", "told"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, capsys, kind, told):
    root = make(tmp_path / "PanNuke", np.uint8)
    change(kind, root)
    found = refused(capsys, tmp_path / "set", "pannuke", root, None, "--size=32")
    assert told in found
    assert "fold2" in found


@pytest.mark.parametrize("folds", ["0", "1,1", "1,2,3,4", "x"])
def test_impossible_folds_exit_with_2(root, tmp_path, folds):
    with pytest.raises(SystemExit, match="2"):
        prepared(tmp_path / "set", "pannuke", root, None, f"--folds={folds}")
