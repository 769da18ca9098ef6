"""One set of MedIMeta into an image set: numbered images, tasks, splits and annotations."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from toy_tiles import prepared, refused, truncate, written

from data_prep.archives.medimeta import UNKNOWN
from hallulib.data import checks, imageset

h5py = pytest.importorskip("h5py", reason="h5py is not installed")

N, SIDE, SIZE = 36, 16, 8
NUMBERS = np.arange(N)
PATIENT = NUMBERS // 3
TASKS = {  # name -> target, classes, labels
    "Diagnosis": ("MULTICLASS_CLASSIFICATION", {0: "No", 1: "Yes", 2: "Null"}, NUMBERS % 3),
    "Image clarity": (
        "ORDINAL_REGRESSION",
        {10: "all lesions", 1: "vessels", 4: "some lesions"},
        np.array([1, 4, 10])[NUMBERS * 7 % 3],
    ),
    "findings": (
        "MULTILABEL_CLASSIFICATION",
        {0: "Mass", 1: "Edema"},
        np.stack([NUMBERS % 2, NUMBERS // 2 % 2], axis=1),
    ),
    "sex": ("BINARY_CLASSIFICATION", {0: "M", 1: "F"}, PATIENT % 2),
    "age": ("REGRESSION", {0: "years"}, 40.5 + PATIENT),
}
TURN = PATIENT % 4  # no split is a run of numbers
PARTS = {"train": NUMBERS[TURN < 2], "val": NUMBERS[TURN == 2], "test": NUMBERS[TURN == 3]}
ORIGINAL = {"train": NUMBERS[TURN < 3], "val": NUMBERS[:0], "test": NUMBERS[TURN == 3]}


def image_of(number: int, colour: bool = False) -> np.ndarray:
    shape = (SIDE, SIDE, 3) if colour else (SIDE, SIDE)
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


def name_of(number: int) -> str:
    return f"images/{number:06d}.tiff"


def annotations(group: str, shuffled: bool) -> str:
    columns = {"filepath": [name_of(number) for number in NUMBERS]}
    columns |= {f"tasks/{name}": labels.tolist() for name, (_, _, labels) in TASKS.items()}
    columns["original_filepath"] = [f"ZQJANSEN/{number}.dcm" for number in NUMBERS]
    columns |= {group: [f"ZQ{patient}" for patient in PATIENT]} if group else {}
    rows = [list(map(str, row)) for row in zip(*columns.values(), strict=True)]
    order = np.random.default_rng(0).permutation(N) if shuffled else NUMBERS
    lines = [list(columns), *(rows[number] for number in order)]
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)


def make(root: Path, colour=False, group="patient_id", shuffled=False) -> Path:
    """A set in the published layout, images both as an array and as pictures."""
    (root / "images").mkdir(parents=True)
    (root / "task_labels").mkdir()
    images = np.stack([image_of(number, colour) for number in NUMBERS])
    with h5py.File(root / "images.hdf5", "w") as held:
        held.create_dataset("images", data=images)
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / name_of(number))
    for name, (_, _, labels) in TASKS.items():
        np.save(root / "task_labels" / f"{name}.npy", labels)
    for folder, parts in (("splits", PARTS), ("original_splits", ORIGINAL)):
        (root / folder).mkdir()
        for split, numbers in parts.items():
            lines = list(map(name_of, numbers))
            if lines:  # the authors write no empty file
                (root / folder / f"{split}.txt").write_text(
                    "\n".join(lines[:: -1 if shuffled else 1])
                )
    (root / "annotations.csv").write_text(annotations(group, shuffled))
    (root / "info.yaml").write_text(info_of(colour))
    return root


def info_of(colour: bool) -> str:
    counts = {
        name: {split: len(n) for split, n in parts.items()}
        for name, parts in (("splits", PARTS), ("original_splits", ORIGINAL))
    }
    told = {
        "id": "toy",
        "name": "Toy set",
        "domain": "Chest X-ray",
        "input_size": [3 if colour else 1, SIDE, SIDE],
        "license": "Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)",
        "tasks": [
            {"task_name": name, "task_target": target, "labels": classes}
            for name, (target, classes, _) in TASKS.items()
        ],
        **{f"{name}_num_samples": numbers for name, numbers in counts.items()},
        "subject_overlaps": [],
        "domain_overlaps": ["fundus", "dr_uwf"],
    }
    text = yaml.safe_dump(told, sort_keys=False)
    # as the authors write them: plain words, and numbers with underscores
    return text.replace("'", "").replace("train: 18", "train: 1_8")


def prepare(root: Path, out: Path, *options: str) -> imageset.ImageSet:
    return prepared(out, "medimeta", root, None, f"--size={SIZE}", *options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("medimeta") / "toy", shuffled=True)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    return prepare(root, tmp_path_factory.mktemp("out") / "set")


def test_labels_splits_and_pixels_follow_the_number_of_the_image(whole):
    numbers = whole.table["item"].astype(int).to_numpy()
    assert sorted(numbers) == list(NUMBERS)
    for name in ("Diagnosis", "Image clarity", "sex"):
        _, classes, labels = TASKS[name]
        assert list(whole.table[name]) == [classes[labels[number]] for number in numbers]
    for place, name in TASKS["findings"][1].items():
        told = ["absent", "present"]
        expected = [told[TASKS["findings"][2][number, place]] for number in numbers]
        assert list(whole.table[f"findings: {name}"]) == expected
    for split, part in PARTS.items():
        assert set(numbers[whole.table["split"] == split]) == set(part)
    stored = np.stack([image_of(number)[None] for number in numbers])
    assert np.array_equal(whole.images, checks.area_average(stored, SIZE))


def test_classes_have_the_order_of_their_numbers_and_the_spelling_of_the_file(whole):
    assert whole.schemes == (
        *("Diagnosis", "Image clarity", "findings: Mass", "findings: Edema", "sex"),
    )
    assert whole.classes("Diagnosis") == ("No", "Yes", "Null")
    assert whole.classes("Image clarity") == ("vessels", "some lesions", "all lesions")
    assert whole.classes("findings: Mass") == ("absent", "present")


def test_patients_are_kept_together_and_nothing_names_them(whole):
    owners = PATIENT[whole.table["item"].astype(int)]
    pairs = set(zip(owners, whole.table["patient"], strict=True))
    assert len(pairs) == len(set(owners)) == whole.table["patient"].nunique()
    assert (whole.unit, whole.units) == ("patient", "12 patients")
    assert "ZQ" not in written(whole)


def test_the_card_tells_licence_origin_and_what_is_left_out(whole):
    assert "(CC BY-SA 4.0)" in whole.card["licence"]
    assert whole.card["origin"].startswith("MedIMeta toy ")
    assert "task 'age' left out: REGRESSION" in whole.card["warnings"]
    assert "published splits" in whole.card["processing"]["steps"]
    assert UNKNOWN not in whole.card["warnings"]


def test_the_card_names_the_sets_that_leave_with_this_one(root, whole, tmp_path):
    assert "is of the same domain as fundus, dr_uwf" in whole.card["warnings"]
    assert "same people" not in written(whole)  # an empty list says that there is none
    copy = shutil.copytree(root, tmp_path / "toy")
    edit(copy / "info.yaml", "subject_overlaps: []", "subject_overlaps: [skinl_derm]")
    other = prepare(copy, tmp_path / "set")
    assert "may show the same people as skinl_derm" in other.card["warnings"]


def test_several_sets_join_by_a_task_of_each(root, whole, tmp_path):
    coloured = make(tmp_path / "toy", colour=True, group="")
    other = prepare(coloured, tmp_path / "other", "--name=other")
    pairs = (f"{whole.path}=findings: Mass", f"{other.path}=Image clarity")
    joined = prepared(tmp_path / "all", "join", None, *pairs, f"--size={SIZE}")
    assert joined.classes("domain") == ("set", "other")
    grades = ("vessels", "some lesions", "all lesions")
    classes = ["set: absent", "set: present", *(f"other: {grade}" for grade in grades)]
    assert list(joined.classes("class")) == classes
    for one, task in ((whole, "findings: Mass"), (other, "Image clarity")):
        name = one.name
        there = (joined.table["domain"] == name).to_numpy()
        assert (joined.images[there] == one.images).all()  # grey is the same in three channels
        assert list(joined.table["class"][there]) == [f"{name}: {v}" for v in one.table[task]]
        assert list(joined.table["split"][there]) == list(one.table["split"])
    assert "set: is of the same domain as fundus, dr_uwf" in joined.card["warnings"]
    units = [joined.card["domains"][name]["unit"] for name in ("set", "other")]
    assert units == ["patient", "unknown"]


@pytest.mark.parametrize("change", ["order of lines", "pictures"])
def test_neither_the_order_of_lines_nor_the_kind_of_file_changes_a_byte(whole, tmp_path, change):
    root = make(tmp_path / "toy", shuffled=change == "pictures")
    if change == "pictures":
        (root / "images.hdf5").unlink()
    else:
        shutil.rmtree(root / "images")
    other = prepare(root, tmp_path / "set")
    for name in imageset.FILES:
        assert (other.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("pictures", [False, True])
def test_colour_keeps_its_channels(tmp_path, pictures):
    root = make(tmp_path / "toy", colour=True)
    if pictures:
        (root / "images.hdf5").unlink()
    other = prepare(root, tmp_path / "set")
    numbers = other.table["item"].astype(int)
    stored = np.stack([np.moveaxis(image_of(number, True), 2, 0) for number in numbers])
    assert np.array_equal(other.images, checks.area_average(stored, SIZE))


def test_splits_of_the_source_are_kept_without_taking_val_from_train(root, tmp_path):
    other = prepare(root, tmp_path / "set", "--splits=original")
    numbers = other.table["item"].astype(int)
    for split, part in ORIGINAL.items():
        assert set(numbers[other.table["split"] == split]) == set(part)
    assert "no image is in val: what needs it will stop" in other.card["warnings"]


def test_new_splits_are_by_patient(root, tmp_path):
    options = ("--fractions=train=.5,val=.25,test=.25", "--seed")
    one, two = (prepare(root, tmp_path / seed, *options, seed) for seed in "12")
    for other in (one, two):
        owners = PATIENT[other.table["item"].astype(int)]
        assert (other.table["split"].groupby(owners).nunique() == 1).all()
        assert set(other.table["split"]) == set(PARTS)
    assert list(one.table["split"]) != list(two.table["split"])
    assert "seed 1" in one.card["processing"]["steps"][0]


def test_unknown_patients_are_told_and_not_divided_unasked(tmp_path, capsys):
    root = make(tmp_path / "toy", group="")
    other = prepare(root, tmp_path / "set")
    assert other.unit == "unknown"
    assert UNKNOWN in other.card["warnings"]
    command = ("medimeta", root, None, f"--size={SIZE}", "--fractions=train=.5,val=.2,test=.3")
    told = refused(capsys, tmp_path / "new", *command)
    assert "annotations.csv: names no patients to divide by --fractions; --patient names" in told
    other = prepared(tmp_path / "new", *command, "--patient=none")
    assert set(other.table["split"]) == set(PARTS)
    assert UNKNOWN in other.card["warnings"]


def test_another_column_of_groups_is_asked_for(tmp_path, capsys):
    root = make(tmp_path / "toy", group="lesion_id")
    command = ("medimeta", root, None, f"--size={SIZE}")
    told = refused(capsys, tmp_path / "set", *command)
    assert "column 'lesion_id' is not used" in told
    assert "--patient 'lesion_id' keeps them together, --patient none says" in told
    other = prepared(tmp_path / "set", *command, "--patient=lesion_id", "--unit=lesion")
    assert other.units == "12 lesions"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def relabel(root: Path, task: str, labels) -> None:
    np.save(root / "task_labels" / f"{task}.npy", labels)


def changed(labels: np.ndarray, place, value) -> np.ndarray:
    labels = labels.copy()
    labels[place] = value
    return labels


def pickled(root: Path) -> None:
    np.save(root / "task_labels" / "sex.npy", np.array([{}] * N, object), allow_pickle=True)


def elsewhere(root: Path) -> None:
    (root / "images.hdf5").rename(root.parent / "other.hdf5")
    with h5py.File(root / "images.hdf5", "w") as held:
        held["images"] = h5py.ExternalLink(str(root.parent / "other.hdf5"), "images")


def store(root: Path, images) -> None:
    with h5py.File(root / "images.hdf5", "w") as held:
        held.create_dataset("images", data=images)


def without_array(root: Path, number: int, file: str = "") -> None:
    (root / "images.hdf5").unlink()
    (root / name_of(number)).rename(root / (file or "moved.tiff"))


DIAGNOSIS, FINDINGS = TASKS["Diagnosis"][2], TASKS["findings"][2]
BAD = {
    "no info": (
        lambda r: (r / "info.yaml").unlink(),
        "info.yaml: no such file; the folder of one MedIMeta set is needed",
    ),
    "info of another kind": (
        lambda r: (r / "info.yaml").write_text("- a\n- b"),
        "info.yaml: all of it is missing or wrong",
    ),
    "a name that is set twice": (
        lambda r: (r / "info.yaml").write_text((r / "info.yaml").read_text() + "\nid: other\n"),
        "id is set twice in the mapping of line 1",
    ),
    "info that is no YAML": (
        lambda r: (r / "info.yaml").write_text("id: [toy"),
        "info.yaml: not readable YAML",
    ),
    "info that would run code": (
        lambda r: edit(r / "info.yaml", "id: toy", "id: !!python/object/apply:os.getcwd []"),
        "info.yaml: id is missing or wrong",
    ),
    "no licence": (
        lambda r: edit(r / "info.yaml", "license:", "licence:"),
        "info.yaml: license is missing or wrong",
    ),
    "an overlap that is no list": (
        lambda r: edit(r / "info.yaml", "subject_overlaps: []", "subject_overlaps: derm"),
        "info.yaml: subject_overlaps is missing or wrong",
    ),
    "two channels": (
        lambda r: edit(r / "info.yaml", "- 1\n", "- 2\n"),
        "info.yaml: input_size.0 is missing or wrong",
    ),
    "a task that leads out of the folder": (
        lambda r: edit(r / "info.yaml", "task_name: sex", "task_name: ../sex"),
        "info.yaml: tasks.3.task_name is missing or wrong (Value error, '../sex' can name no",
    ),
    "a task with a name of the table": (
        lambda r: edit(r / "info.yaml", "task_name: sex", "task_name: split"),
        "'split' can name no file and column",
    ),
    "a task twice": (
        lambda r: edit(r / "info.yaml", "task_name: sex", "task_name: Diagnosis"),
        "info.yaml: tasks is missing or wrong (Value error, no task with classes, one without",
    ),
    "no task with classes": (
        lambda r: (r / "info.yaml").write_text(
            (r / "info.yaml")
            .read_text()
            .replace("CLASSIFICATION", "SEGMENTATION")
            .replace("ORDINAL_", "")
        ),
        "no task with classes",
    ),
    "a class that is another task": (
        lambda r: edit(r / "info.yaml", "task_name: sex", 'task_name: "findings: Mass"'),
        "no task with classes, one without them, or one there twice",
    ),
    "a task without classes": (
        lambda r: edit(r / "info.yaml", "    0: M\n    1: F\n", "    {}\n"),
        "no task with classes, one without them, or one there twice",
    ),
    "a class twice": (
        lambda r: edit(r / "info.yaml", "1: F", "1: M"),
        "tasks.3.labels is missing or wrong (Value error, a class is empty or there twice)",
    ),
    "no annotations": (
        lambda r: (r / "annotations.csv").unlink(),
        "annotations.csv: no such file",
    ),
    "no row": (
        lambda r: (r / "annotations.csv").write_text("filepath,patient_id\n"),
        "annotations.csv: has no row; at least one is needed",
    ),
    "no column of a task": (
        lambda r: edit(r / "annotations.csv", "tasks/sex", "sex"),
        "annotations.csv: no column 'tasks/sex'",
    ),
    "a row too few": (
        lambda r: edit(r / "annotations.csv", name_of(5), name_of(N)),
        f"annotations.csv: {name_of(N)!r} is one too many; images/000000.tiff to",
    ),
    "a row twice": (
        lambda r: edit(r / "annotations.csv", name_of(5), name_of(4)),
        f"annotations.csv: {name_of(4)!r} is one too many",
    ),
    "a path that leads out of the folder": (
        lambda r: edit(r / "annotations.csv", name_of(5), "images/../../000005.tiff"),
        "annotations.csv: 'images/../../000005.tiff' is one too many",
    ),
    "no labels": (
        lambda r: (r / "task_labels" / "sex.npy").unlink(),
        "sex.npy: No such file or directory; a readable file is needed",
    ),
    "cut labels": (
        lambda r: truncate(r / "task_labels" / "sex.npy"),
        "sex.npy: not a readable array",
    ),
    "pickled labels": (pickled, "sex.npy: not a readable array"),
    "a label too few": (
        lambda r: relabel(r, "Diagnosis", DIAGNOSIS[1:]),
        "Diagnosis.npy: has shape (35,); (36,) is needed",
    ),
    "labels of a class too few": (
        lambda r: relabel(r, "findings", FINDINGS[:, :1]),
        "findings.npy: has shape (36, 1); (36, 2) is needed",
    ),
    "a label out of range": (
        lambda r: relabel(r, "Diagnosis", changed(DIAGNOSIS, 7, 3)),
        "Diagnosis.npy: image 7 has label [3]; known: 0, 1, 2",
    ),
    "a label that is no number": (
        lambda r: relabel(r, "Diagnosis", changed(DIAGNOSIS.astype(float), 7, np.nan)),
        "Diagnosis.npy: image 7 has label [nan]; known: 0, 1, 2",
    ),
    "two of one finding": (
        lambda r: relabel(r, "findings", changed(FINDINGS, (7, 1), 2)),
        "findings.npy: image 7 has label [1, 2]; known: 0, 1",
    ),
    "labels in another order": (
        lambda r: relabel(r, "Diagnosis", DIAGNOSIS[::-1].copy()),
        "Diagnosis.npy: image 0 has label [2] but annotations.csv has '0'; both are needed as",
    ),
    "no splits": (
        lambda r: shutil.rmtree(r / "splits"),
        "splits/train.txt: has 0 images; 18 are needed by info.yaml",
    ),
    "a split too short": (
        lambda r: edit(r / "splits" / "val.txt", name_of(20), ""),
        "splits/val.txt: has 8 images; 9 are needed by info.yaml",
    ),
    "an image in two splits": (
        lambda r: edit(r / "splits" / "val.txt", name_of(20), name_of(3)),
        f"splits: {name_of(3)!r} is one too many",
    ),
    "a split of unknown images": (
        lambda r: edit(r / "splits" / "val.txt", name_of(20), "/etc/passwd"),
        "splits: '/etc/passwd' is one too many",
    ),
    "a patient in two splits": (
        lambda r: [
            edit(r / "splits" / "val.txt", name_of(18), name_of(17)),
            edit(r / "splits" / "train.txt", name_of(17), name_of(18)),
        ],
        "annotations.csv: patient ZQ5 is in train and val; a patient may be in one split only",
    ),
    "a cut array": (lambda r: truncate(r / "images.hdf5"), "images.hdf5: not a whole HDF5 file"),
    "an array that lies elsewhere": (elsewhere, "images.hdf5: no array 'images'"),
    "an image too few": (
        lambda r: store(r, np.zeros((N - 1, SIDE, SIDE), np.uint8)),
        "images.hdf5: array images has 35 images for 36 labels",
    ),
    "colour where grey is told": (
        lambda r: store(r, np.zeros((N, SIDE, SIDE, 3), np.uint8)),
        f"array images has shape (36, 16, 16, 3); (36, {SIDE}, {SIDE}) is needed",
    ),
    "no images": (
        lambda r: [(r / "images.hdf5").unlink(), shutil.rmtree(r / "images")],
        f"images (there is no images.hdf5): {name_of(0)!r} is missing",
    ),
    "a picture too few": (
        lambda r: without_array(r, 5),
        f"images (there is no images.hdf5): {name_of(5)!r} is missing",
    ),
    "a picture of another name": (
        lambda r: without_array(r, 5, name_of(N)),
        f"images (there is no images.hdf5): {name_of(N)!r} is one too many",
    ),
    "a picture of another size": (
        lambda r: [
            (r / "images.hdf5").unlink(),
            Image.new("L", (SIDE, SIDE + 1)).save(r / name_of(5)),
        ],
        f"000005.tiff: {SIDE + 1} x {SIDE} pixels; {SIDE} x {SIDE} are needed",
    ),
}


@pytest.mark.parametrize(("damage", "told"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path, capsys, damage, told):
    root = make(tmp_path / "toy")
    damage(root)
    assert told in refused(capsys, tmp_path / "set", "medimeta", root, None, f"--size={SIZE}")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (f"--size={SIDE + 1}", f"--size is {SIDE + 1}"),
        ("--patient=ward", "annotations.csv: no column 'ward'"),
        ("--patient=tasks/Diagnosis", "column tasks/Diagnosis finds one patient per class"),
    ],
)
def test_an_option_that_does_not_fit_the_set_is_told(root, tmp_path, capsys, option, told):
    command = ("medimeta", root, None, f"--size={SIZE}", option)
    assert told in refused(capsys, tmp_path / "set", *command)
