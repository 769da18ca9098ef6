import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.arrays import Stream
from hallulib.data import checks, imageset

BRAIN = Path(__file__).parents[3] / "shared" / "data" / "brain_mri" / "brain_mri_64.npz"
RNG = np.random.default_rng(0)


def images(n: int, side: int = 12, *colour: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, side, side, *colour)).astype(np.uint8)


def run(capsys, *arguments, status: int = 0) -> str:
    """The report, or the one sentence on stderr."""
    assert main([str(a) for a in arguments]) == status
    told = capsys.readouterr()
    return told.out if status == 0 else told.err.splitlines()[-1]


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Sixty images of twenty patients; the last five patients are for testing."""
    patient = np.arange(60) // 3
    return {
        "images": images(60),
        "label": patient % 2,
        "names": np.array(["well", "sick"]),
        "patient": patient,
        "test": patient >= 15,
        "keep": np.arange(60) != 7,
    }


OPTIONS = ["--names=names", "--patient=patient", "--test=test", "--keep=keep", "--size=12"]


def test_arrays_become_an_image_set_with_patients_kept_together(tmp_path, arrays, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", *OPTIONS)
    opened = imageset.open(tmp_path / "set")
    assert np.array_equal(opened.images, arrays["images"][arrays["keep"], None])
    items = opened.table["item"].astype(int)
    assert (opened.table["split"] == "test").tolist() == arrays["test"][items].tolist()
    assert set(opened.table["split"]) == {"train", "val", "test"}
    assert opened.classes("label") == ("well", "sick")
    assert opened.labels("label").tolist() == arrays["label"][items].tolist()


def test_neighbouring_numbers_can_be_joined_to_one_group(tmp_path, arrays, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    command = ["npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12"]
    run(capsys, *command, "--patient=patient//4", "--unit=group")
    table = imageset.open(tmp_path / "set").table
    group = arrays["patient"][table["item"].astype(int)] // 4
    assert len(table.groupby([group, "patient"])) == table["patient"].nunique() == 5
    told = run(capsys, *command, "--overwrite", "--patient=patient//few", status=2)
    assert "a.npz: --patient 'patient//few' does not divide whole numbers" in told


def test_images_can_be_left_out_by_what_they_are_and_tested_by_a_value(tmp_path, arrays, capsys):
    arrays |= {"organ": arrays["patient"] % 3, "part": np.where(arrays["test"], "test", "other")}
    np.savez(tmp_path / "a.npz", **arrays)
    command = ["npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12"]
    command += ["--patient=patient"]
    told = run(capsys, *command, "--keep=organ!=2", "--test=part=test")
    opened = imageset.open(tmp_path / "set")
    items = opened.table["item"].astype(int)
    assert items.tolist() == np.flatnonzero(arrays["organ"] != 2).tolist()
    assert (opened.table["split"] == "test").tolist() == arrays["test"][items].tolist()
    assert f"{(arrays['organ'] == 2).sum()}  image left out by organ!=2" in told
    told = run(capsys, *command, "--overwrite", "--keep=organ!=9", status=2)
    assert "a.npz: organ is nowhere '9'; --keep leaves nothing out" in told
    told = run(capsys, *command, "--overwrite", "--test=part=tset", status=2)
    assert "a.npz: part is nowhere 'tset'; --test names no image" in told


def test_images_can_have_further_labels(tmp_path, arrays, capsys):
    arrays |= {"zone": np.arange(60) % 3, "zones": np.array(["PZ", "TZ", "AS"])}
    arrays["grade"] = np.where(np.arange(60) % 4, "low", "high")
    np.savez(tmp_path / "a.npz", **arrays)
    command = ["npz", tmp_path / "a.npz", tmp_path / "set", *OPTIONS]
    run(capsys, *command, "--also=zone=zones", "--also=grade")
    opened = imageset.open(tmp_path / "set")
    items = opened.table["item"].astype(int)
    assert opened.schemes == ("label", "zone", "grade")
    assert opened.classes("zone") == ("PZ", "TZ", "AS")
    assert opened.labels("zone").tolist() == arrays["zone"][items].tolist()
    assert opened.table["grade"].tolist() == arrays["grade"][items].tolist()
    for wrong, sentence in (
        ("--also=label", "--also label: this label is taken already"),
        ("--also=place", "no array 'place'"),
        ("--also=names", "array names is too short; one entry per image needed"),
        ("--also=grade=zones", "grade has 'high'; known are 0 to 2"),
    ):
        assert sentence in run(capsys, *command, "--overwrite", wrong, status=2)


def test_images_can_be_kept_by_a_limit(tmp_path, arrays, capsys):
    arrays["white"] = np.linspace(0, 1, 60).astype(np.float32)
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12", "--keep")
    told = run(capsys, *command, "white <= .5")
    opened = imageset.open(tmp_path / "set")
    assert np.array_equal(opened.images, arrays["images"][arrays["white"] <= 0.5, None])
    assert "30  image left out by white <= .5" in told
    out = tmp_path / "other"
    told = run(capsys, *command[:2], out, *command[3:], "white<=half", status=2)
    assert "a.npz: --keep 'white<=half' does not compare numbers" in told
    told = run(capsys, *command[:2], out, *command[3:], "grey<=.5", status=2)
    assert "no array 'grey'" in told


def test_published_splits_are_kept_by_their_names(tmp_path, arrays, capsys):
    arrays["split"] = np.repeat(["Training", "valid", "test"], 20)
    arrays["patient"] = np.arange(60) // 2
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12")
    run(capsys, *command, "--split=split", "--patient=patient")
    table = imageset.open(tmp_path / "set").table
    assert table["split"].tolist() == np.repeat(["train", "val", "test"], 20).tolist()
    told = run(capsys, *command[:2], tmp_path / "other", *command[3:], "--test=split", status=2)
    assert "array split is not true or false; a boolean array is needed (names of splits" in told


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_what_is_true_may_be_a_one(tmp_path, arrays, capsys, dtype):
    arrays |= {name: arrays[name].astype(dtype) for name in ("keep", "test")}
    np.savez(tmp_path / "a.npz", **arrays)
    run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", *OPTIONS)
    table = imageset.open(tmp_path / "set").table
    items = table["item"].astype(int)
    assert 7 not in set(items)
    assert ((table["split"] == "test") == arrays["test"][items].astype(bool)).all()


@pytest.mark.parametrize(
    ("options", "told", "unit"),
    [
        (["--patient=patient", "--unit=field"], "60 images of 20 fields", "field"),
        (["--patient=patient"], "60 images of 20 patients", "patient"),
        (
            ["--patient=patient", "--unit=near-copies"],
            "20 groups of near copies",
            "near-copies",
        ),
        (["--patient=none"], "60 images of unknown patients", "unknown"),
    ],
)
def test_report_and_card_say_what_the_images_are_grouped_by(
    tmp_path, arrays, capsys, options, told, unit
):
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12")
    assert told in run(capsys, *command, *options)
    opened = imageset.open(tmp_path / "set")
    assert opened.unit == opened.card["unit"] == unit
    assert told.endswith(opened.units)


@pytest.mark.parametrize("name", ["patient", "patient_id", "PatientID", "lesion_id", "case"])
@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_an_array_that_groups_images_is_asked_for(tmp_path, arrays, capsys, name, shape):
    arrays[name] = arrays.pop("patient").reshape(shape)
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=12")
    told = run(capsys, *command, status=2)
    assert f"a.npz: array {name!r} is not used, and images that share it may fall into" in told
    assert f"--patient {name!r} keeps them together, --patient none says" in told
    run(capsys, *command, f"--patient={name}")
    table = imageset.open(tmp_path / "set").table
    owner = table["item"].astype(int) // 3
    assert (table["split"].groupby(owner).nunique() == 1).all()
    assert table["patient"].nunique() == 20
    run(capsys, *command, "--patient=none", "--overwrite")
    assert imageset.open(tmp_path / "set").table["patient"].nunique() == 60


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"case": np.arange(20)}, []),  # of another length
        ({"case": np.zeros((60, 2))}, []),
        ({"case": np.arange(60)}, []),  # groups nothing
        ({"case": np.arange(60) // 2}, ["--keep=even"]),  # nor what is kept
        ({"case": np.arange(60) % 2}, ["--label=case"]),
        ({"patient_age": np.arange(60) // 2}, []),
    ],
)
def test_an_array_that_groups_nothing_is_not_asked_for(tmp_path, arrays, capsys, more, options):
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays | more, even=np.arange(60) % 2 == 0)
    run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", "--size=12", *options)


@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ("patient", "every image has a patient of its own: if --patient patient counts files"),
        ("slide", "if --patient patient counts files, slides may cross splits"),
        ("near-copies", ""),  # as it should be where one of each is kept
    ],
)
def test_images_that_all_have_a_group_of_their_own_are_told(tmp_path, arrays, capsys, unit, told):
    arrays |= {"keep": np.arange(60) % 3 == 0}
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", *OPTIONS[:2], *OPTIONS[3:])
    report = run(capsys, *command, f"--unit={unit}")
    warnings = imageset.open(tmp_path / "set").card["warnings"]
    assert told in report
    assert bool(warnings) == bool(told)


def test_a_unit_that_nothing_names_is_asked_about(tmp_path, arrays, capsys):
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--unit=slide")
    assert "nothing tells the slide of an image" in run(capsys, *command, status=2)


def test_arrays_without_labels_are_a_pool(tmp_path, arrays, capsys):
    np.savez(tmp_path / "a.npz", images=arrays["images"], field=arrays["patient"])
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--size=12")
    assert "no array 'label'; it holds images, field" in run(capsys, *command, status=2)
    told = run(capsys, *command, "--unlabelled", "--patient=field", "--unit=field")
    opened = imageset.open(tmp_path / "set")
    assert (opened.schemes, set(opened.table["split"])) == ((), {"unlabelled"})
    assert np.array_equal(opened.images, arrays["images"][:, None])
    assert "60 images of 20 fields" in told
    assert "warning" not in told


@pytest.mark.parametrize(
    ("codes", "options"),
    [
        (np.where(np.arange(60) % 4, np.arange(60) % 2, np.nan), []),
        (np.where(np.arange(60) % 4, np.arange(60) % 2, -1), ["--missing=-1"]),
        (np.where(np.arange(60) % 4, np.arange(60) % 2, 255), ["--missing=255"]),
        (np.where(np.arange(60) % 4, (np.arange(60) % 2).astype(str), ""), []),
        (np.where(np.arange(60) % 4, (np.arange(60) % 2).astype(str), "NA"), []),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_images_of_missing_labels_are_unlabelled(tmp_path, arrays, capsys, codes, options, named):
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays | {"label": codes})
    names = ["--names=names"] if named else []
    run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", "--size=12", *names, *options)
    opened = imageset.open(tmp_path / "set")
    items = opened.table["item"].astype(int)
    assert ((opened.table["split"] == "unlabelled") == (items % 4 == 0)).all()
    known = (items % 4 > 0).to_numpy()
    assert np.array_equal(opened.labels("label").numpy()[known], (items % 2)[known])
    assert len(opened.classes("label")) == 2


def test_only_images_that_are_used_are_counted(tmp_path, arrays, capsys):
    codes = np.where(np.arange(60) < 8, np.nan, np.arange(60) % 2)  # the last of them is left out
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays | {"label": codes})
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--size=12", "--keep=keep")
    told = run(capsys, *command)
    assert "7  label 'nan' taken as unlabelled" in told
    assert "7  unlabelled" in told


def test_labels_that_are_all_missing_are_asked_about(tmp_path, arrays, capsys):
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays | {"label": np.full(60, np.nan)})
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--size=12")
    assert "no image has a label in label; or is it --unl" in run(capsys, *command, status=2)


def test_blank_tiles_are_left_out_if_asked(tmp_path, arrays, capsys):
    arrays["images"][::4] = 250
    del arrays["patient"]
    np.savez(tmp_path / "a.npz", **arrays)
    command = ("npz", tmp_path / "a.npz", tmp_path / "set", "--names=names", "--size=6")
    assert "15  blank tile, white: left out" in run(capsys, *command, "--blank=drop")
    places = imageset.open(tmp_path / "set").table["item"].astype(int)
    assert sorted(places) == [i for i in range(60) if i % 4]


def test_a_label_with_the_name_of_another_column_is_refused(tmp_path, arrays, capsys):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SystemExit, match="2"):
        main(["npz", str(tmp_path / "a.npz"), str(tmp_path / "set"), "--label=patient"])
    assert "'patient' cannot name a label" in capsys.readouterr().err


def test_colour_arrays_keep_their_channels(tmp_path, arrays, capsys):
    arrays["images"] = images(60, 12, 3)
    del arrays["patient"]
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", "--size=6", "--names=names")
    expected = checks.area_average(np.moveaxis(arrays["images"], 3, 1), 6)
    assert np.array_equal(imageset.open(tmp_path / "set").images, expected)


def test_a_stream_reads_what_numpy_reads_in_any_order(tmp_path):
    whole = images(700, 5)
    np.savez_compressed(tmp_path / "a.npz", x=whole)
    stream = Stream(str(tmp_path / "a.npz"), "x")
    for start, stop in ((0, 3), (3, 4), (600, 700), (10, 300), (0, 700)):
        assert np.array_equal(stream.read(start, stop), whole[start:stop])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(images=np.zeros((60, 12, 12), np.float32)), "array images is float32 (60, 12, 12)"),
        (dict(images=np.zeros((60, 12, 10), np.uint8)), "square images are needed"),
        (dict(images=np.zeros((60, 8, 8), np.uint8)), "images 8 pixels wide and --size is 12"),
        (dict(images=np.zeros((70, 12, 12), np.uint8)), "has 70 images for 60 labels"),
        (
            dict(images=np.zeros((50, 12, 12), np.uint8)),
            "array images has 50 images for 60 labels",
        ),
        (dict(label=np.full(60, 2)), "label has '2'; known are 0 to 1"),
        (dict(label=np.array([{}] * 60, object)), "not a readable .npz"),
        (dict(patient=np.zeros(59)), "array patient has shape (59,)"),
        (dict(patient=np.full(60, np.nan)), "array patient has NaN"),
        (dict(patient=np.zeros(60, int)), "--patient patient finds one patient in all 59 images"),
        (dict(patient=np.arange(60) % 5), "patient 0 is in train and test"),
        (dict(patient=np.arange(60) // 3 % 2), "finds one patient per class, such as '0' for"),
        (dict(test=np.arange(60)), "array test is not true or false"),
        (dict(label=np.full(60, np.inf)), "array label has NaN or infinity"),
        (dict(label=np.arange(60) % 3 - 1), "label has '-1'; known are 0 to 1"),
        (dict(patient=np.arange(60) - 1), "patient '-1' may mean that it is not known"),
    ],
)
def test_a_bad_array_is_named_and_nothing_is_left(tmp_path, arrays, capsys, change, told):
    np.savez(tmp_path / "a.npz", **(arrays | change))
    assert told in run(capsys, "npz", tmp_path / "a.npz", tmp_path / "set", *OPTIONS, status=2)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_missing_or_damaged_file_is_named(tmp_path, arrays, capsys):
    file, out = tmp_path / "a.npz", tmp_path / "set"
    assert "a.npz: not a readable .npz" in run(capsys, "npz", file, out, status=2)
    np.savez(file, **arrays)
    assert "no array 'grade'; it holds images" in run(
        capsys, "npz", file, out, "--label=grade", status=2
    )
    content = bytearray(file.read_bytes())
    content[1000] ^= 1  # inside the images
    file.write_bytes(content)
    assert "a.npz: array images is damaged" in run(
        capsys, "npz", file, out, "--names=names", "--size=12", status=2
    )
    file.write_bytes(content[:2000])
    assert "a.npz: not a readable .npz" in run(capsys, "npz", file, out, status=2)
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A collection of the shape of MedMNIST's, known to the package by its MD5."""
    medmnist = pytest.importorskip("medmnist", reason="medmnist is not installed")
    parts = {}
    for split, n in (("train", 300), ("val", 20), ("test", 30)):
        parts[f"{split}_images"] = images(n, 28)
        parts[f"{split}_labels"] = (np.arange(n) % 2)[:, None].astype(np.uint8)
    np.savez_compressed(tmp_path / "toymnist.npz", **parts)
    md5 = hashlib.md5((tmp_path / "toymnist.npz").read_bytes()).hexdigest()
    info = {
        "MD5": md5,
        "url": "http://localhost:9/toymnist.npz",
        "MD5_64": "0" * 32,
        "url_64": "http://localhost:9/toymnist_64.npz",
        "task": "binary-class",
        "label": {"0": "malignant", "1": "benign"},
        "license": "CC BY 4.0",
    }
    monkeypatch.setitem(medmnist.INFO, "toymnist", info)
    return tmp_path / "toymnist.npz"


def test_a_collection_keeps_its_splits_labels_and_licence(toy, capsys):
    out = toy.parent / "set"
    run(capsys, "medmnist", "toymnist", out, "--file", toy, "--size=14")
    opened = imageset.open(out)
    assert opened.table["split"].value_counts().to_dict() == {"train": 300, "val": 20, "test": 30}
    assert opened.classes("label") == ("malignant", "benign")
    assert opened.card["licence"] == "CC BY 4.0"
    assert "patients are not published" in opened.card["warnings"][0]
    stored = np.load(toy)["val_images"][:, None]
    assert np.array_equal(opened.select("val").images, checks.area_average(stored, 14))


def test_pathmnist_is_nine_tissues_and_the_report_says_that_val_shares_patients(
    tmp_path, capsys, monkeypatch
):
    medmnist = pytest.importorskip("medmnist", reason="medmnist is not installed")
    parts, file = {}, tmp_path / "pathmnist.npz"
    for split, n in (("train", 27), ("val", 9), ("test", 18)):
        parts[f"{split}_images"] = images(n, 28, 3)
        parts[f"{split}_labels"] = (np.arange(n) % 9)[:, None].astype(np.uint8)
    np.savez_compressed(file, **parts)
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.INFO, "pathmnist", medmnist.INFO["pathmnist"] | {"MD5": md5})
    command = ("medmnist", "pathmnist", tmp_path / "set", "--file", file, "--size=28")
    told = run(capsys, *command)
    opened = imageset.open(tmp_path / "set")
    for split in ("train", "val", "test"):
        part = opened.select(split)
        assert np.array_equal(part.images, np.moveaxis(parts[f"{split}_images"], 3, 1))
        assert part.labels("label").tolist() == parts[f"{split}_labels"][:, 0].tolist()
    assert len(opened.classes("label")) == 9
    assert "54 images of unknown patients" in told
    assert "54  image without patient: counted as its own, so leaks between splits cannot" in told
    assert "warning  patients are not published" in told
    assert "val shares patients with train, only test is from other patients" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["toymnist", "--size=64"], "is the published file of 28 pixels; --size 28, or the publ"),
        (["toymnist", "--size=300"], "--size is 300; 1 to 224 pixels"),
        (["breastmnits"], "no MedMNIST collection 'breastmnits'; did you mean breastmnist?"),
        (["chestmnist"], "chestmnist: several labels per image"),
        (["organmnist3d"], "organmnist3d: images have three dimensions"),
    ],
)
def test_an_unsuitable_collection_is_told(toy, capsys, arguments, told):
    name, *options = arguments
    out = toy.parent / "set"
    assert told in run(capsys, "medmnist", name, out, "--file", toy, *options, status=2)
    assert os.listdir(toy.parent) == ["toymnist.npz"]


def test_a_wrong_checksum_names_file_and_sum(toy, capsys):
    toy.write_bytes(toy.read_bytes() + b" ")
    out = toy.parent / "set"
    for size in (28, 64):
        told = run(capsys, "medmnist", "toymnist", out, "--file", toy, f"--size={size}", status=2)
        assert "toymnist.npz: MD5 is" in told
        assert f"is that of the published file of {size} pixels, so this is another file" in told
    assert not out.exists()


def test_without_a_network_the_file_to_fetch_is_told(toy, capsys, monkeypatch):
    from medmnist import info

    monkeypatch.setattr(info, "DEFAULT_ROOT", str(toy.parent / "cache"))
    told = run(capsys, "medmnist", "toymnist", toy.parent / "set", "--size=28", status=2)
    assert "cannot be downloaded" in told
    assert "http://localhost:9/toymnist.npz" in told
    assert "--file" in told


@pytest.mark.skipif(not BRAIN.exists(), reason="needs the brain MRI extract beside the repository")
def test_brain_mri_has_no_group_in_two_splits_and_no_copy_across_them(tmp_path, capsys):
    options = "--names=class_names --keep=keep --test=is_test_clean --patient=group_near".split()
    run(capsys, "npz", BRAIN, tmp_path / "set", "--fractions=train=.85,val=.15", *options)
    opened = imageset.open(tmp_path / "set")
    assert len(opened) == 3708
    assert opened.table["split"].value_counts().to_dict() == {
        "train": 1930,
        "test": 1438,
        "val": 340,
    }
    assert (opened.table.groupby("patient")["split"].nunique() == 1).all()
    assert "image with an exact copy in another split" not in opened.card["report"]
