"""Windows around the lesions of PI-CAI: where they lie, what they show, and what is refused."""

import numpy as np
import pytest
from synthetic_mri import write
from test_picai import (
    GLAND,
    LESION,
    REAL,
    SHAPE,
    STUDIES,
    image_of,
    make_images,
    make_labels,
    real,
)

from data_prep.__main__ import main
from data_prep.archives.picai import WINDOW_MM, list_cases
from data_prep.archives.picai.labels import GLANDS, LESIONS
from data_prep.archives.picai.study import Settings, largest_lesion, read_case
from data_prep.crop import Window
from data_prep.drawn import prostate
from hallulib.data import imageset

KEY = "10004_1000004"  # of case_ISUP 4
WINDOWS = Settings(size=32, spacing=0.5, windows=True)


def read(folder, mask, pixels, settings=WINDOWS, spacing=1.0):
    """One study with this lesion mask, its gland the whole image."""
    place = {"spacing": (spacing, spacing, 3.0)}
    labels = make_labels(folder / "labels", {KEY: STUDIES[KEY]})
    write(labels / LESIONS["expert"] / f"{KEY}.nii.gz", mask, **place)
    for name in GLANDS.values():
        write(labels / name / f"{KEY}.nii.gz", np.ones_like(mask), **place)
    write(folder / "images" / f"{KEY}_t2w.mha", pixels, **place)
    return read_case(list_cases(folder / "images", labels)[0][0], settings)


def blob(rng, shape, spacing, margin):
    """Two overlapping ellipses, at least ``margin`` mm from the border."""
    grid = np.moveaxis(np.indices(shape), 0, 2) * spacing
    first = rng.uniform(margin, np.array(shape) * spacing - margin)
    mask = np.zeros(shape, bool)
    for middle in (first, first + rng.uniform(-2, 2, 2)):
        mask |= (((grid - middle) / rng.uniform(1.5, 4, 2)) ** 2).sum(axis=2) <= 1
    return mask


@pytest.mark.parametrize("spacing", [0.3, 0.45, 0.8])
def test_the_centroid_of_the_lesion_is_the_middle_of_the_window(tmp_path, spacing):
    rng = np.random.default_rng(round(100 * spacing))
    mask = np.stack([blob(rng, (80, 90), spacing, 11) for _ in range(10)])
    study = read(
        tmp_path, 4 * mask.astype(np.uint8), 100 + 900 * mask.astype(np.uint16), spacing=spacing
    )
    assert len(study.images) == len(mask)
    for image in study.images:
        assert (image.shape, image.dtype) == ((1, 32, 32), np.uint8)
        light = image[0] / image.sum(dtype=float)
        centroid = [(light * place).sum() for place in np.indices((32, 32))]
        assert np.allclose(centroid, 15.5, atol=0.5)
    assert not any("border" in note for note in study.notes)


def test_of_several_lesions_the_largest_of_the_highest_grade_is_shown(tmp_path):
    mask = np.zeros(SHAPE, np.uint8)
    mask[3, 10:22, 10:22] = 2  # larger, and milder
    mask[3, 28:31, 28:31] = 4
    mask[3, [31, 32], [31, 32]] = 4  # joined by its corner
    mask[3, 10:13, 28:31] = 4
    study = read(tmp_path, mask, image_of(KEY))
    assert [row["isup"] for row in study.rows] == [4]
    assert (study.rows[0]["row"], study.rows[0]["column"]) == ("29.45", "29.45")
    assert largest_lesion(mask[3]).sum() == 11


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("middle", slice(24, 56), slice(24, 56)),
        ("front right", slice(0, 32), slice(0, 32)),
        ("back", slice(48, 80), slice(24, 56)),
        ("left", slice(24, 56), slice(48, 80)),
    ],
)
def test_a_window_is_a_part_of_the_finely_resampled_slice(tmp_path, corner, rows, columns):
    places = {"middle": (17, 17), "front right": (0, 2), "back": (34, 17), "left": (17, 33)}
    row, column = places[corner]
    mask, pixels = np.zeros(SHAPE, np.uint8), image_of(KEY)
    mask[4, row : row + 6, column : column + 6] = 4
    (window,) = read(tmp_path / "w", mask, pixels).images
    # the whole slice at the same grey levels: its gland is all of it
    (whole,) = read(tmp_path / "s", mask, pixels, Settings(size=80, spacing=0.5)).images
    assert np.array_equal(window[0], whole[0, rows, columns])


def test_a_window_at_the_border_is_moved_inwards_and_counted(tmp_path):
    mask, pixels = np.zeros(SHAPE, np.uint8), np.full(SHAPE, 100, np.uint16)
    mask[4, :3, :5] = 4
    pixels[4, :3, :5] = 1000
    study = read(tmp_path, mask, pixels)
    assert study.notes.count("window at the border of the slice: moved inwards") == 1
    (row,), (image,) = study.rows, study.images
    assert (row["row"], row["column"]) == ("7.50", "7.50")
    # nothing is repeated: the lesion is as large as it is, 3 x 5 mm in pixels of 0.5 mm
    assert np.count_nonzero(image[0, :, 0] > 127) == 6
    assert np.count_nonzero(image[0, 0] > 127) == 10


def test_a_study_without_gland_has_the_grey_levels_of_its_image(tmp_path):
    labels = make_labels(tmp_path / "labels", {KEY: STUDIES[KEY]})
    for name in GLANDS.values():
        (labels / name / f"{KEY}.nii.gz").unlink()
    write(tmp_path / "images" / f"{KEY}_t2w.mha", image_of(KEY))
    study = read_case(list_cases(tmp_path / "images", labels)[0][0], WINDOWS)
    assert "study without gland: grey levels of the image" in study.notes
    assert len(study.images) == 2


# ------------------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    return make_images(folder / "images"), make_labels(folder / "labels")


def run(archive, out, *more):
    return main(["picai", *map(str, archive), str(out), "--window", "lesion", *more])


@pytest.fixture(scope="module")
def prepared(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    assert run(archive, out, "--workers", "1") == 0
    return imageset.open(out)


def test_the_window_is_that_of_the_drawn_set_and_on_the_card(prepared):
    assert prostate.VIEWS["lesions"]["window_mm"] == WINDOW_MM == 16
    assert prepared.images.shape[1:] == (1, 32, 32)
    assert prepared.card["spacing_mm"] == [0.5, 0.5]
    assert any(step.startswith("window 16 mm ") for step in prepared.card["processing"]["steps"])
    lesions = prepared.table[prepared.table["isup"] != ""]
    middle = [f"{(s.start + s.stop - 1) / 2:.2f}" for s in LESION]
    assert (lesions[["row", "column"]] == middle).all(axis=None)


def test_windows_without_lesion_lie_at_random_in_the_gland(prepared):
    rows = prepared.table[prepared.table["split"] == "unlabelled"]
    places = rows[["row", "column"]].astype(float).to_numpy()
    gland = np.zeros(SHAPE, bool)
    gland[GLAND] = True
    assert gland[(rows["slice"].astype(int), *places.round().astype(int).T)].all()
    assert len(np.unique(places, axis=0)) == len(rows) == 12
    assert (places.std(axis=0) > 2).all()  # in mm, of a gland of 16 x 20
    assert (places % 1).std() > 0.2  # between voxels, as centroids are


def test_windows_without_lesion_show_their_places(prepared):
    for key in ("10000_1000000", "10001_1000001"):
        pixels, study = image_of(key), key.partition("_")[2]
        black, white = np.percentile(pixels[GLAND], [0.5, 99.5])
        for i in np.flatnonzero(prepared.table["study"] == study):
            row = prepared.table.iloc[i]
            centre = row[["row", "column"]].to_numpy(float)
            crop = Window(centre, np.ones(2), 0.5, 32).cut(pixels[[int(row["slice"])]])
            expected = ((crop - black) / (white - black)).clip(0, 1) * 255
            assert np.abs(prepared.images[i] - expected).max() < 3  # places have two digits


def test_windows_do_not_depend_on_workers_nor_on_other_studies(archive, prepared, tmp_path):
    assert run(archive, tmp_path / "two", "--workers", "2", "--name", "set") == 0
    for name in imageset.FILES:
        assert (tmp_path / "two" / name).read_bytes() == (prepared.path / name).read_bytes()
    images = make_images(tmp_path / "images", ["10001_1000001"])
    assert run((images, archive[1]), tmp_path / "one", "--workers", "1") == 0
    mine = prepared.images[prepared.table["study"] == "1000001"]
    assert np.array_equal(imageset.open(tmp_path / "one").images, mine)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--window-mm", "40.1"], "a window of 40.1 mm is larger than the slice of 40 x 40 mm"),
        (["--window-mm", "0"], "size 32 and window 0 mm are given"),
        (["--window-mm", "-16"], "size 32 and window -16 mm are given"),
        (["--window-mm", "nan"], "size 32 and window nan mm are given"),
        (["--window-mm", "inf"], "size 32 and window inf mm are given"),
        (["--size", "7"], "size 7 and window 16 mm are given"),
        (["--size", "2000"], "size 2000 and window 16 mm are given"),
        (["--spacing", "1"], "--spacing is given with --window"),
    ],
)
def test_impossible_windows_are_refused_in_one_sentence(archive, tmp_path, capfd, options, told):
    assert run(archive, tmp_path / "set", "--workers", "1", *options) == 2
    out, err = capfd.readouterr()
    assert told in err
    assert out == ""
    assert not (tmp_path / "set").exists()


def test_the_side_of_a_window_is_refused_without_one(archive, tmp_path, capfd):
    assert main(["picai", *map(str, archive), str(tmp_path / "set"), "--window-mm", "16"]) == 2
    assert "--window-mm is given without --window" in capfd.readouterr().err


def test_a_window_may_be_as_large_as_the_slice(archive, tmp_path):
    assert run(archive, tmp_path / "set", "--workers", "1", "--window-mm", "40") == 0
    assert set(imageset.open(tmp_path / "set").table["row"]) == {"19.50"}


@real
def test_the_real_lesion_is_in_the_middle_of_its_window():
    cases, _ = list_cases(REAL / "dicom", REAL / "picai_labels")
    (case,) = [case for case in cases if case.key == "11373_1001396"]
    study = read_case(case, WINDOWS)
    assert [row["slice"] for row in study.rows] == [8, 9]
    assert all(image.shape == (1, 32, 32) and image.std() > 10 for image in study.images)
