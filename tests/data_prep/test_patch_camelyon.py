"""PatchCamelyon into an image set: HDF5, and the slides of its tables."""

from pathlib import Path

import numpy as np
import pytest
from toy_tiles import glass, prepared, refused, tissue, truncate, written

from data_prep import arrays
from data_prep.archives.patch_camelyon import SPLITS
from hallulib import UserError
from hallulib.data import checks, imageset

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

COUNTS = {"train": 40, "valid": 12, "test": 10}
SIZE = 24


def tile_of(name: str, i: int) -> np.ndarray:
    return (tissue if i else glass)(1000 * len(name) + i, 96, 96)


def path_of(root: Path, name: str, what: str) -> Path:
    return root / f"camelyonpatch_level_2_split_{name}_{what}"


def slide_of(name: str, i: int) -> str:
    return f"camelyon16_{name}_tumor_{i // 5:03d}"


def store(file: Path, name: str, array, **options) -> None:
    with h5py.File(file, "w") as held:
        held.create_dataset(name, data=array, **options)


def make(root: Path, tables=True, **options) -> Path:
    root.mkdir()
    for name, n in COUNTS.items():
        x = np.stack([tile_of(name, i) for i in range(n)])
        store(path_of(root, name, "x.h5"), "x", x, **options)
        labels = (np.arange(n) % 2).astype(np.uint8).reshape(n, 1, 1, 1)
        store(path_of(root, name, "y.h5"), "y", labels)
        lines = [f"{i},100,200,{bool(i % 2)},{bool(i % 2)},{slide_of(name, i)}" for i in range(n)]
        if tables:
            text = "\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *lines])
            path_of(root, name, "meta.csv").write_text(text + "\n")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("pcam") / "in")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    return prepared(out, "patch_camelyon", root, None, f"--size={SIZE}")


def test_labels_splits_and_pixels_are_those_of_the_files(whole):
    table = whole.table
    counts = {split: COUNTS[name] for name, split in SPLITS.items()}
    assert table["split"].value_counts().to_dict() == counts
    items = [item.split() for item in table["item"]]
    assert [SPLITS[name] for name, _ in items] == list(table["split"])
    assert list(table["tissue"]) == [("normal", "tumor")[int(i) % 2] for _, i in items]
    stored = np.stack([np.moveaxis(tile_of(name, int(i)), 2, 0) for name, i in items])
    assert np.array_equal(whole.images, checks.area_average(stored, SIZE))


def test_a_slide_is_a_patient_and_is_not_named(whole):
    slides = [slide_of(*(item.split()[0], int(item.split()[1]))) for item in whole.table["item"]]
    pairs = set(zip(slides, whole.table["patient"], strict=True))
    assert len(pairs) == len(set(slides)) == whole.table["patient"].nunique() == 13
    assert "camelyon16" not in written(whole).replace("CAMELYON16", "")
    assert not [name for name in whole.card["report"] if name.startswith("image without patient")]
    assert whole.unit == "slide"


@pytest.mark.parametrize("options", [dict(chunks=(7, 96, 48, 3), compression="gzip")])
def test_chunks_and_compression_change_nothing(whole, tmp_path, options):
    root = make(tmp_path / "in", **options)
    other = prepared(tmp_path / "set", "patch_camelyon", root, None, f"--size={SIZE}")
    for name in imageset.FILES:
        assert (other.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_without_tables_the_report_says_that_slides_are_unknown(tmp_path):
    root = make(tmp_path / "in", tables=False)
    other = prepared(tmp_path / "set", "patch_camelyon", root, None, f"--size={SIZE}")
    assert other.unit == "unknown"
    warnings = " ".join(other.card["warnings"])
    for name, n in COUNTS.items():
        assert f"no table names slides of {name}: they may be in other splits too" in warnings
        assert f"{name} holds {n} of " in warnings
    assert sum(n for told, n in other.card["report"].items() if "without patient" in told) == 62


def test_blank_tiles_are_counted_and_left_out_if_asked(whole, root, tmp_path):
    assert whole.card["report"]["blank tile, white"] == 3
    command = ("patch_camelyon", root, None, f"--size={SIZE}", "--blank=drop")
    other = prepared(tmp_path / "set", *command)
    stays = [not item.endswith(" 0") for item in whole.table["item"]]
    assert np.array_equal(other.images, whole.images[stays])


def change(kind: str, root: Path) -> None:
    x, y, meta = (path_of(root, "valid", what) for what in ("x.h5", "y.h5", "meta.csv"))
    n = COUNTS["valid"]
    if kind == "no file":
        x.unlink()
    elif kind == "still packed":
        y.rename(y.with_name(y.name + ".gz"))
    elif kind == "truncated":
        truncate(x)
    elif kind == "not HDF5":
        y.write_text("<html>quota exceeded</html>")
    elif kind == "another key":
        store(x, "images", np.zeros((n, 96, 96, 3), np.uint8))
    elif kind == "another number of labels":
        store(y, "y", np.zeros((n - 1, 1, 1, 1), np.uint8))
    elif kind == "another number of rows":
        meta.write_text("\n".join(meta.read_text().splitlines()[:-1]))
    elif kind == "no slides":
        meta.write_text(meta.read_text().replace("wsi", "slide"))
    elif kind == "another shape":
        store(x, "x", np.zeros((n, 48, 48, 3), np.uint8))
    elif kind == "many labels":
        store(y, "y", np.zeros((n, 2), np.uint8))
    elif kind == "an unknown label":
        store(y, "y", np.arange(n).reshape(n, 1, 1, 1))
    elif kind == "a slide in two splits":
        meta.write_text(meta.read_text().replace("_valid_", "_train_"))


BAD = {
    "no file": "valid_x.h5: no such file; all splits are needed, x and y of each",
    "still packed": "camelyonpatch_level_2_split_valid_y.h5.gz is there, which gunzip unpacks",
    "truncated": "valid_x.h5: not a whole HDF5 file",
    "not HDF5": "valid_y.h5: not a whole HDF5 file",
    "another key": "valid_x.h5: no array 'x'; it holds images",
    "another number of labels": "valid_x.h5: array x has 12 images for 11 labels; one each needed",
    "another number of rows": "valid_meta.csv: 11 rows for 12 labels; one each needed",
    "no slides": "valid_meta.csv: no column 'wsi'",
    "another shape": "array x has shape (12, 48, 48, 3); (12, 96, 96, 3) is needed",
    "many labels": "valid_y.h5: array y is uint8 (12, 2); one whole number per image is needed",
    "an unknown label": "valid_y.h5: array y has 2; 0 (normal) and 1 (tumor) are known",
    "a slide in two splits": "camelyon16_train_tumor_000 is in train and val; a slide may be in",
}


@pytest.mark.parametrize(("kind", "told"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, capsys, kind, told):
    root = make(tmp_path / "pcam")
    change(kind, root)
    assert told in refused(capsys, tmp_path / "set", "patch_camelyon", root, None)


def test_an_array_that_lies_in_another_file_is_refused(tmp_path):
    store(tmp_path / "other.h5", "x", np.zeros((2, 96, 96, 3), np.uint8))
    (tmp_path / "private").write_bytes(bytes(2 * 96 * 96 * 3))
    with h5py.File(tmp_path / "x.h5", "w") as held:
        held["linked"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        raw = [(str(tmp_path / "private"), 0, h5py.h5f.UNLIMITED)]
        held.create_dataset("raw", (2, 96, 96, 3), "u1", external=raw)
        layout = h5py.VirtualLayout((2, 96, 96, 3), "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (2, 96, 96, 3))
        held.create_virtual_dataset("virtual", layout)
    for name in ("linked", "raw", "virtual"):
        with pytest.raises(UserError, match=r"x\.h5: (no array|array)"):
            arrays.dataset(str(tmp_path / "x.h5"), name)
