"""NCT-CRC-HE-100K and CRC-VAL-HE-7K into an image set: folders of TIFF by tissue."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_tiles import glass, prepared, refused, save, tissue, truncate, written

from data_prep.archives.nct_crc import TISSUES
from hallulib.data import checks

LETTERS = "ABCDEFGHIJ"


def make(root: Path, n: int, mark: str = "") -> Path:
    """n tiles of each tissue; all of the background are white."""
    for number, name in enumerate(TISSUES):
        for i in range(n):
            tile = (glass if name == "BACK" else tissue)(1000 * len(mark) + 20 * number + i)
            save(root / name / f"{name}-{mark}AAAA{LETTERS[i] * 4}.tif", tile)
    (root / "ADI" / "Thumbs.db").write_text("")
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("crc")
    return make(root / "NCT-CRC-HE-100K", 10), make(root / "CRC-VAL-HE-7K", 2, "TCGA-")


@pytest.fixture(scope="module")
def whole(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    return prepared(out, "nct_crc", archive[0], None, "--test", archive[1], "--size=28")


def test_labels_are_folders_and_only_the_second_archive_is_test(whole):
    counts = whole.table.value_counts(["split", "tissue"]).unstack()
    assert list(whole.classes("tissue")) == list(TISSUES)
    assert {s: set(counts.loc[s]) for s in counts.index} == {"train": {9}, "val": {1}, "test": {2}}
    assert counts.shape == (3, 9)
    places = whole.table["item"].astype(int)
    assert set(whole.table["split"][places > 90]) == {"test"}
    assert set(whole.table["split"][places <= 90]) == {"train", "val"}


def test_pixels_are_those_of_the_tiles(whole, archive):
    files = [f for root in archive for t in TISSUES for f in sorted((root / t).glob("*.tif"))]
    for place in range(0, len(files), 7):
        stored = np.moveaxis(np.asarray(Image.open(files[place])), 2, 0)
        row = list(whole.table["item"]).index(str(place + 1))
        assert np.array_equal(whole.images[row], checks.area_average(stored[None], 28)[0])
    assert whole.unit == "unknown"
    assert whole.card["spacing_mm"] == [0.004, 0.004]  # 224 pixels of 0.5 um in 28


def test_the_report_says_that_patients_are_unknown_and_the_archive_incomplete(whole):
    report, warnings = whole.card["report"], " ".join(whole.card["warnings"])
    assert [n for told, n in report.items() if told.startswith("image without patient")] == [108]
    assert "patients are not published: train and val share patients" in warnings
    assert "the part for train and val holds 90 of 100000 images" in warnings
    assert "test holds 18 of 7180 images" in warnings
    assert report["file that is not an image left out"] == 2
    assert "AAAA" not in written(whole)


def test_blank_tiles_are_counted_and_left_out_only_if_asked(whole, archive, tmp_path, capsys):
    assert whole.card["report"]["blank tile, white"] == 12
    command = ("nct_crc", archive[0], None, "--size=28", "--blank")
    dropped = prepared(tmp_path / "dropped", *command, "drop")
    assert "warning  patients are not published" in capsys.readouterr().out
    assert dropped.card["report"]["blank tile, white: left out"] == 10
    assert "BACK" not in set(dropped.table["tissue"])
    ignored = prepared(tmp_path / "ignored", *command, "ignore")
    assert len(ignored) - len(dropped) == 10
    assert not [name for name in ignored.card["report"] if "blank" in name]
    stays = ignored.table["item"].isin(dropped.table["item"]).to_numpy()
    assert np.array_equal(ignored.images[stays], dropped.images)


def change(kind: str, root: Path) -> None:
    file = sorted((root / "LYM").iterdir())[1]
    if kind == "a class missing":
        shutil.rmtree(root / "MUC")
    elif kind == "another folder":
        (root / "ADI-part2").mkdir()
    elif kind == "an empty class":
        shutil.rmtree(root / "STR")
        (root / "STR").mkdir()
    elif kind == "a tile of another tissue":
        file.rename(root / "ADI" / file.name)
    elif kind == "truncated":
        truncate(file)
    elif kind == "another shape":
        save(file, tissue(0, 100, 224))
    elif kind == "grey":
        save(file, tissue(0)[..., 0])
    elif kind == "no folder":
        shutil.rmtree(root)


BAD = {
    "a class missing": "holds the folders ADI, BACK, DEB, LYM, MUS, NORM, STR, TUM; ADI, BACK,",
    "another folder": "holds the folders ADI, ADI-part2, BACK",
    "an empty class": "STR: no image: tiles named STR-XXXXXXXX.tif are needed there",
    "a tile of another tissue": "LYM-AAAABBBB.tif: tiles named ADI-XXXXXXXX.tif are needed there",
    "truncated": "LYM-AAAABBBB.tif: not a whole image",
    "another shape": "LYM-AAAABBBB.tif: 100 x 224 pixels; 224 x 224 are needed",
    "grey": "LYM-AAAABBBB.tif: grey among colour images",
    "no folder": "no such folder; NCT-CRC-HE-100K or CRC-VAL-HE-7K is needed",
}


@pytest.mark.parametrize(("kind", "told"), BAD.items(), ids=BAD)
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, capsys, kind, told):
    root = make(tmp_path / "NCT-CRC-HE-100K", 2)
    change(kind, root)
    assert told in refused(capsys, tmp_path / "set", "nct_crc", root, None, "--size=28")


def test_an_impossible_size_is_told(archive, tmp_path, capsys):
    told = refused(capsys, tmp_path / "set", "nct_crc", archive[1], None, "--size=225")
    assert "--size is 225" in told
