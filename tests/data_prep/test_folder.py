import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import toy_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import pictures, plan
from data_prep.__main__ import main
from hallulib import UserError
from hallulib.data import checks, imageset

RNG = np.random.default_rng(0)


def pixels(*shape, top=256, dtype=np.uint8):
    return RNG.integers(0, top, shape).astype(dtype)


def save(file: Path, image=None, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(16, 16) if image is None else image).save(file, **options)
    return file


@pytest.fixture
def classes(tmp_path) -> Path:
    """Ten images in each of two class folders, and three without label."""
    for name, n in (("sick", 10), ("well", 10), ("unlabelled", 3)):
        for i in range(n):
            save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def prepare(source: Path, *options, out: str = "set") -> int:
    return main(
        ["folder", str(source), str(source.parent / out), "--size=8", "--workers=1", *options]
    )


def refused(capsys, source: Path, *options) -> str:
    """The one sentence with which the command line refuses, leaving nothing behind."""
    before = sorted(os.listdir(source.parent))
    assert prepare(source, *options) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir(source.parent)) == before
    return told


def table(source: Path, *lines: str) -> str:
    file = source.parent / "table.csv"
    file.write_text("\n".join(lines) + "\n")
    return f"--csv={file}"


def test_folders_become_labels_and_every_split_has_every_class(classes, capsys):
    assert prepare(classes) == 0
    opened = imageset.open(classes.parent / "set")
    assert opened.classes("label") == ("sick", "well")
    counts = opened.table.value_counts(["split", "label"])
    assert counts["unlabelled", ""] == 3
    assert all(
        counts[split, c] >= 1 for split in ("train", "val", "test") for c in ("sick", "well")
    )
    assert "23  image without patient: counted as its own" in capsys.readouterr().out


def test_the_card_tells_the_seed_of_the_splits_and_the_same_one_makes_the_same_bytes(classes):
    for out, seed in (("one", 7), ("two", 7), ("other", 8)):
        assert prepare(classes, f"--seed={seed}", "--name=set", out=out) == 0
    one, two, other = (
        [(classes.parent / out / name).read_bytes() for name in imageset.FILES]
        for out in ("one", "two", "other")
    )
    assert one == two != other
    steps = imageset.open(classes.parent / "one").card["processing"]["steps"]
    assert "splits by seed 7" in " ".join(steps)


def test_pixels_are_those_of_the_files_in_sorted_order(classes):
    prepare(classes)
    opened = imageset.open(classes.parent / "set")
    files = sorted(classes.glob("*/*.png"))
    stored = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    assert np.array_equal(opened.images, checks.area_average(stored, 8))
    assert list(opened.table["item"]) == [str(i + 1) for i in range(len(files))]


def test_no_name_of_a_file_or_patient_reaches_the_set(tmp_path):
    save(tmp_path / "in" / "JaneDoe.png")
    save(tmp_path / "in" / "JohnRoe.png")
    lines = [
        "file,label,patient,birthday",
        "JaneDoe.png,a,MRN-4711,1950",
        "JohnRoe.png,b,MRN-1,1960",
    ]
    assert prepare(tmp_path / "in", table(tmp_path / "in", *lines)) == 0
    written = b"".join((tmp_path / "set" / f).read_bytes() for f in ("table.csv", "card.json"))
    for name in (b"Doe", b"Roe", b"MRN", b"4711", b"1950", str(tmp_path).encode()):
        assert name not in written
    assert (
        imageset.open(tmp_path / "set").card["report"]["column 'birthday' of the CSV left out"]
        == 1
    )


def test_train_and_test_folders_are_kept_and_val_is_taken_from_train(tmp_path):
    for split, n in (("train", 16), ("test", 4)):
        for name in ("sick", "well"):
            for i in range(n):
                save(tmp_path / "in" / split / name / f"{i}.png")
    assert prepare(tmp_path / "in") == 0
    counts = imageset.open(tmp_path / "set").table.value_counts(["split", "label"])
    assert [counts[split, "sick"] for split in ("train", "val", "test")] == [14, 2, 4]
    assert prepare(tmp_path / "in", "--fractions=train=1", out="kept") == 0
    assert set(imageset.open(tmp_path / "kept").table["split"]) == {"train", "test"}


@pytest.mark.parametrize("declared", [8, 12])
def test_images_declared_train_never_become_test(tmp_path, declared):
    for i in range(12):
        save(tmp_path / "in" / f"{i}.png")
    rows = [f"{i}.png,{'ab'[i % 2]},{'train' if i < declared else ''}" for i in range(12)]
    assert prepare(tmp_path / "in", table(tmp_path / "in", "file,label,split", *rows)) == 0
    found = imageset.open(tmp_path / "set").table["split"]
    assert set(found[:declared]) == {"train", "val"}
    assert ("test" in set(found[declared:])) == (declared < 12)


def test_a_csv_gives_labels_patients_and_splits(classes):
    rows = [
        f"sick/{i}.png,{('low', 'high')[i % 2]},p{i // 2},{'test' if i < 4 else ''}"
        for i in range(10)
    ]
    option = table(classes, "file,grade,patient,split", *rows)
    assert prepare(classes, option, "--label=grade", "--classes=low,high") == 0
    opened = imageset.open(classes.parent / "set")
    assert opened.classes("grade") == ("low", "high")
    assert list(opened.table["split"][:4]) == ["test"] * 4
    assert opened.table["patient"].nunique() == 5
    assert opened.card["report"]["image not in the CSV left out"] == 13


def test_published_splits_may_stand_in_a_column_of_any_name(classes, capsys):
    names = ("training", "valid", "Test")
    rows = [f"sick/{i}.png,{'ab'[i % 2]},{names[i // 3]},train" for i in range(9)]
    option = table(classes, "file,label,Subset,split", *rows)
    assert prepare(classes, option, "--split=subset") == 0
    opened = imageset.open(classes.parent / "set")
    assert list(opened.table["split"]) == ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    assert opened.card["report"]["column 'split' of the CSV left out"] == 1
    shutil.rmtree(classes.parent / "set")
    assert "no column 'fold' among" in refused(capsys, classes, option, "--split=fold")
    assert "--split x: names a column of --csv" in refused(capsys, classes, "--split=x")


@pytest.mark.parametrize("names", ["File,Grade,Patient,Split", "file, grade , patient, SPLIT"])
def test_names_of_columns_count_in_any_case_and_with_spaces_around(classes, names):
    rows = [f"sick/{i}.png,{'ab'[i % 2]},p{i // 2},{'test' if i < 4 else ''}" for i in range(10)]
    assert prepare(classes, table(classes, names, *rows), "--label=grade") == 0
    opened = imageset.open(classes.parent / "set")
    assert opened.table["patient"].nunique() == 5
    assert list(opened.table["split"][:4]) == ["test"] * 4
    assert not [note for note in opened.card["report"] if "column" in note]


def test_items_are_the_lines_where_the_rows_begin(classes):
    lines = ["", "file,label,note", "sick/0.png,a,", "", "", 'sick/1.png,b,"one', 'two"', ",,"]
    assert prepare(classes, table(classes, *lines, "sick/2.png,a")) == 0
    assert list(imageset.open(classes.parent / "set").table["item"]) == ["3", "6", "9"]


def test_unlabelled_images_of_labelled_patients_are_left_out_and_counted(classes):
    rows = ["sick/0.png,a,p1", "sick/1.png,,p1", "sick/2.png,b,p2", "sick/3.png,,p3"]
    assert prepare(classes, table(classes, "file,label,patient", *rows)) == 0
    opened = imageset.open(classes.parent / "set")
    assert len(opened) == 3
    assert opened.card["report"]["unlabelled image of a labelled patient left out"] == 1


def test_images_without_any_label_are_a_set_for_pretraining(tmp_path):
    save(tmp_path / "in" / "unlabelled" / "0.png")
    assert prepare(tmp_path / "in") == 0
    opened = imageset.open(tmp_path / "set")
    assert (opened.schemes, list(opened.table["split"])) == ((), ["unlabelled"])


def test_the_same_folder_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    for i in range(130):
        save(tmp_path / "in" / "ab"[i % 2] / f"{i}.png")
    assert prepare(tmp_path / "in") == 0
    assert prepare(tmp_path / "in", "--workers=2", "--name=set", out="other") == 0
    for name in imageset.FILES:
        written = [(tmp_path / out / name).read_bytes() for out in ("set", "other")]
        assert written[0] == written[1]


def test_colour_stays_colour_unless_grey_is_asked_for(tmp_path):
    for i in range(3):
        save(tmp_path / "in" / "a" / f"{i}.png", pixels(16, 16, 3))
    assert prepare(tmp_path / "in") == 0
    assert imageset.open(tmp_path / "set").channels == 3
    assert prepare(tmp_path / "in", "--grey", out="grey") == 0
    assert imageset.open(tmp_path / "grey").channels == 1


def test_copies_across_splits_are_reported(tmp_path):
    same = pixels(16, 16)
    for i in range(10):
        save(tmp_path / "in" / "a" / f"{i}.png", same)
    prepare(tmp_path / "in")
    report = imageset.open(tmp_path / "set").card["report"]
    assert report["image that is an exact copy of another"] == 9
    assert report["image with an exact copy in another split"] >= 3


def test_a_grey_picture_means_the_same_in_every_format(tmp_path):
    image = pixels(9, 7)
    for suffix in ("png", "bmp", "tif"):
        assert np.array_equal(pictures.read(save(tmp_path / f"x.{suffix}", image)), image)
    np.save(tmp_path / "x.npy", image)
    assert np.array_equal(pictures.read(tmp_path / "x.npy"), image)
    assert np.array_equal(
        pictures.read(save(tmp_path / "r.png", np.dstack([image] * 3)), True), image
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_images_keep_their_order_of_brightness(tmp_path, dtype):
    deep = pixels(20, 20, top=4000).astype(dtype)
    read = pictures.read(save(tmp_path / "x.tif", deep))
    assert np.array_equal(read, deep)
    eight, notes = pictures.to_bytes(read)
    order = np.argsort(deep, axis=None)
    assert (np.diff(eight.ravel()[order].astype(int)) >= 0).all()
    assert (eight.min(), eight.max(), len(notes)) == (0, 255, 1)


@pytest.mark.parametrize(
    ("name", "channels"), [("x.png", 2), ("x.png", 3), ("x.png", 4), ("x.tif", 3)]
)
@pytest.mark.parametrize("grey", [False, True])
def test_pixels_that_would_be_cut_to_8_bits_are_refused(tmp_path, name, channels, grey):
    deep = sitk.GetImageFromArray(pixels(16, 16, channels, top=4096, dtype=np.uint16), True)
    sitk.WriteImage(deep, tmp_path / name)
    told = f"{name}: 16 bits per channel in colour or with transparency would be cut to 8; 8 bits"
    with pytest.raises(UserError, match=told):
        pictures.read(tmp_path / name, grey)


def test_grey_of_an_array_is_that_of_a_picture_with_these_pixels(tmp_path):
    image = pixels(16, 16, 3, top=60)
    np.save(tmp_path / "x.npy", image)
    found = pictures.read(tmp_path / "x.npy", True)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pictures.read(save(tmp_path / "x.png", image), True))
    np.save(tmp_path / "deep.npy", image.astype(np.uint16))
    assert np.allclose(pictures.read(tmp_path / "deep.npy", True), found, atol=0.51)


def test_orientation_tags_are_obeyed(tmp_path):
    image = pixels(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(
        pictures.read(save(tmp_path / "x.png", image, exif=exif)), image[::-1, ::-1]
    )


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([(), (3,)]))
@settings(deadline=None)
def test_padding_keeps_every_pixel_and_cropping_adds_none(height, width, colour):
    image = pixels(height, width, *colour)
    square = lambda image, fit, side: pictures.to_square(image, fit)[0].average(side)
    padded = square(image, "pad", max(height, width))
    cropped = square(image, "crop", min(height, width))
    assert padded.shape[1:] == (max(height, width),) * 2
    assert cropped.shape[1:] == (min(height, width),) * 2
    top, left = (padded.shape[1] - height) // 2, (padded.shape[2] - width) // 2
    inside = np.moveaxis(padded[:, top : top + height, left : left + width], 0, 2)
    assert np.array_equal(inside, np.atleast_3d(image))
    white = np.full((height, width, *colour), 255, np.uint8)
    assert (square(white, "pad", max(height, width)) == 255).all()


BARCODES = ["TCGA-A2-A0CM-01Z-00-DX1", "TCGA-A2-A0CM-01Z-00-DX2", "TCGA-E2-A14N-01Z-00-DX1"]
TCGA = "--patient-pattern=TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}"


@pytest.fixture
def slides(tmp_path) -> Path:
    """Tiles in one folder per slide, as cut from TCGA; two slides are of one patient."""
    for code in BARCODES:
        for i in range(4):
            save(tmp_path / "in" / "tiles" / f"{code}.4D1F" / f"{i}_0.png", pixels(16, 16, 3))
    return tmp_path / "in"


@pytest.mark.parametrize("pattern", [TCGA, "--patient-pattern=tiles/(.{12})"])
def test_tiles_without_label_are_found_at_any_depth_and_patients_in_their_paths(slides, pattern):
    assert prepare(slides, "--unlabelled", pattern) == 0
    opened = imageset.open(slides.parent / "set")
    assert (len(opened), set(opened.table["split"]), opened.schemes) == (12, {"unlabelled"}, ())
    assert list(opened.table["patient"]) == ["p00001"] * 8 + ["p00002"] * 4
    assert not [told for told in opened.card["report"] if "without patient" in told]
    for name in ("table.csv", "card.json"):
        assert "A0CM" not in (slides.parent / "set" / name).read_text()
    assert prepare(slides, "--unlabelled", out="own") == 0
    assert imageset.open(slides.parent / "own").table["patient"].nunique() == 12


def test_patients_of_paths_keep_labelled_images_in_one_split(slides):
    for i, folder in enumerate(sorted((slides / "tiles").iterdir())):
        for file in list(folder.iterdir()):
            target = slides / ("low", "high")[i % 2] / f"{folder.name}_{file.name}"
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
    shutil.rmtree(slides / "tiles")
    assert prepare(slides, TCGA) == 0
    table = imageset.open(slides.parent / "set").table
    assert sorted(table["patient"].value_counts()) == [4, 8]
    assert (table.groupby("patient")["split"].nunique() == 1).all()


def test_a_path_without_patient_is_refused(slides, capsys):
    save(slides / "tiles" / "control" / "0_0.png", pixels(16, 16, 3))
    told = refused(capsys, slides, "--unlabelled", TCGA)
    assert "control/0_0.png: 'TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}' finds no patient in the path" in told


@pytest.mark.parametrize("options", [["--patient-pattern=("], ["--unlabelled", "--csv=x.csv"]])
def test_a_broken_pattern_and_labels_of_no_labels_exit_with_2(slides, options):
    with pytest.raises(SystemExit, match="2"):
        prepare(slides, *options)


def test_an_empty_folder_is_told(tmp_path, capsys):
    (tmp_path / "in" / "sick").mkdir(parents=True)
    (tmp_path / "in" / "sick" / "notes.txt").write_text("")
    assert "in: no image found; files of .bmp" in refused(capsys, tmp_path / "in")
    (tmp_path / "empty").mkdir()
    assert "empty: no image found" in refused(capsys, tmp_path / "empty")
    assert "nowhere: no such folder" in refused(capsys, tmp_path / "nowhere")


def broken(kind: str, classes: Path) -> None:
    file = classes / "sick" / "x.png"
    if kind == "truncated":
        whole = save(file, pixels(64, 64)).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        file.write_text("not an image")
    elif kind == "nan":
        np.save(file.with_suffix(".npy"), np.full((16, 16), np.nan))
    elif kind == "pickle":
        np.save(file.with_suffix(".npy"), np.array([{}], object), allow_pickle=True)
    elif kind == "colour":
        save(file, pixels(16, 16, 3))
    elif kind == "small":
        save(file, pixels(4, 9))
    elif kind == "frames":
        save(file.with_suffix(".tif"), save_all=True, append_images=[Image.new("L", (16, 16))])
    elif kind == "stack":
        np.save(file.with_suffix(".npy"), pixels(2, 16, 16))


@pytest.mark.parametrize(
    ("kind", "told", "options"),
    [
        ("truncated", "x.png: not a whole image", ()),
        ("text", "x.png: not a whole image", ()),
        ("nan", "x.npy: pixels are NaN or infinite", ()),
        ("pickle", "x.npy: not a whole image", ()),
        ("colour", "x.png: colour among grey images; all must be alike, and --grey", ()),
        ("small", "x.png: 4 pixels wide and --size is 8", ("--fit=crop",)),
        ("frames", "2 images in one file", ()),
        ("stack", "x.npy: shape (2, 16, 16)", ()),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_left(classes, capsys, kind, told, options):
    broken(kind, classes)
    assert told in refused(capsys, classes, *options)


def test_a_decompression_bomb_is_refused(classes, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert "9.png: more than 200 pixels" in refused(capsys, classes)  # the last of all


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["file,grade", "sick/0.png,a"], "table.csv: no column 'label' among"),
        (["file,label", "../x.png,a"], "line 2 has file '../x.png'; a path below"),
        (["file,label", "/etc/x.png,a"], "line 2 has file '/etc/x.png'; a path below"),
        (["file,label", "sick/99.png,a"], "line 2 has file 'sick/99.png', which is not in"),
        (["file,label", "sick/0.dcm,a"], "one of .bmp"),
        (["file,label", "sick/0.png,a", "sick/0.png,b"], "line 3 lists sick/0.png again"),
        (["file,label,split", "sick/0.png,a,later"], "row 2 has split 'later'; known: unlabelled"),
        (["file,label,split", "sick/0.png,,train"], "row 2 has split 'train' and label ''"),
        (
            ["file,label,patient,split", "sick/0.png,a,P9,train", "sick/1.png,a,P9,test"],
            "table.csv: patient P9 is in train and test; a patient may be in one split only",
        ),
        (["file,label", 'sick/0.png,"a'], "table.csv: not a readable CSV"),
        (["file,label", "sick/0.png,a,"], "not a readable CSV (3 cells in line 2 for 2 names);"),
        (["file,label", "sick/0.png,a", "", "sick/1.png,b", "../x.png,a"], "line 5 has file"),
        (["", "file,label", "", "sick/0.png,a,,"], "4 cells in line 4 for 2 names"),
        (["file,label,patient,Patient", "sick/0.png,a,,P"], "2 columns 'patient' among"),
        (["file,label,label", "sick/0.png,a,b"], "2 columns 'label' among"),
        (["file,label"], "table.csv: no image found"),
        ([""], "table.csv: no column 'label' among []; --label names the label column"),
    ],
)
def test_a_fault_in_the_csv_names_its_line(classes, capsys, lines, told):
    assert told in refused(capsys, classes, table(classes, *lines))


def test_an_unknown_label_lists_the_known_ones(classes, capsys):
    told = refused(capsys, classes, "--classes=sick,dead")
    assert "label 'well'; known: sick, dead" in told


def test_images_in_unexpected_places_are_not_guessed(classes, capsys):
    loose = save(classes / "loose.png")
    assert "loose.png: an image outside a class folder" in refused(capsys, classes)
    loose.unlink()
    deep = save(classes / "centre 1" / "sick" / "0.png")
    assert "sick: a folder in a class folder" in refused(capsys, classes)
    shutil.rmtree(deep.parents[1])
    save(classes / "train" / "sick" / "0.png")
    assert "sick: a class beside train, val or test" in refused(capsys, classes)


NO_SEEDS = ["-1", "2.5", "1e3", "nan", "None", "True", "", str(2**32)]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--label=patient", "'patient' cannot name a label: file, patient, split, item are"),
        ("--label= Item", "' Item' cannot name a label"),
        ("--label=", "'' cannot name a label"),
        ("--classes=a,b,b", "'a,b,b' is not like a,b,c, each value once"),
        ("--classes=a,,b", "'a,,b' is not like a,b,c"),
        ("--size=0", "'0' is not a whole number of pixels above 0"),
        *((f"--seed={n}", f"'{n}' is not a whole number from 0 to 2**32 - 1") for n in NO_SEEDS),
    ],
)
def test_options_that_no_set_could_have_are_refused_before_reading(classes, capsys, option, told):
    (classes / "sick" / "0.png").write_text("no image")
    with pytest.raises(SystemExit, match="2"):
        prepare(classes, option)
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "option", ["--fractions=train=.5", "--spacing=0", "--fractions=x", "--fit=x"]
)
def test_impossible_options_exit_with_2(classes, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare(classes, option)


def test_label_values_are_ordered_by_number_if_they_are_numbers():
    assert plan.order(["10", "9", "", "9"]) == ["9", "10"]
    assert plan.order(["b", "a", "1"]) == ["1", "a", "b"]


def test_the_order_of_labels_does_not_depend_on_the_seed_of_hashes():
    ones = sorted(f"{'0' * n}1" for n in range(20))  # no two sets have them in one order
    assert plan.order([*ones, "0.5", "2"]) == ["0.5", *ones, "2"]
    assert plan.order([*ones, "nan"]) == [*ones, "nan"]


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_a_settled_plan_never_has_a_patient_in_two_splits(draw):
    n = draw.draw(st.integers(1, 30))
    column = lambda *values: draw.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    rows = {"patient": column("", "a", "b", "c", "d"), "label": column("", "x", "y")}
    rows["split"] = column("", "", "train", "test")
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    try:
        settled, _ = plan.settle(pd.DataFrame(rows, dtype=str), shares, 0, "here")
    except UserError:
        return  # two splits for one patient were drawn, or a split without a label
    assert (settled.groupby("patient")["split"].nunique() == 1).all()
    declared = pd.Series(rows["split"])[settled.index]
    assert set(settled.loc[declared == "train", "split"]) <= {"train", "val"}
    assert set(settled.loc[declared == "test", "split"]) <= {"test"}
    assert ((settled["label"] == "") == (settled["split"] == "unlabelled")).all()
    assert set(settled["split"]) <= {"train", "val", "test", "unlabelled"}


def test_links_that_lead_in_circles_are_followed_once(tmp_path):
    for n in range(3):
        toy_tiles.save(tmp_path / "in" / "slide" / f"{n}.png", toy_tiles.tissue(n, 16, 16))
    for name in ("one", "two", "three"):  # 3 ** 40 folders otherwise
        (tmp_path / "in" / "slide" / name).symlink_to(tmp_path / "in", target_is_directory=True)
    command = ["folder", tmp_path / "in", None, "--unlabelled", "--size=8"]
    assert len(toy_tiles.prepared(tmp_path / "set", *command)) == 3
