"""Volumes keep their place in space, whatever the format, order or storage."""

import pickle

import numpy as np
import pytest
from synthetic_mri import DIRECTION, ORIGIN, SPACING, truncate, write, write_dicom

from data_prep.crop import Window, centre_of, ends, to_bytes
from data_prep.dicom import read_header, read_series
from data_prep.volumes import Fault, on_grid, read_file

SHAPE = (7, 12, 10)


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def same(a, b):
    assert np.array_equal(a.pixels, b.pixels)
    assert np.allclose(a.origin, b.origin, atol=1e-3)
    assert np.allclose(a.steps, b.steps, atol=1e-5)


@pytest.mark.parametrize("name", ["x.mha", "x.nii.gz", "x.nii"])
@pytest.mark.parametrize("compressed", [True, False])
def test_every_format_gives_the_same_volume(tmp_path, array, name, compressed):
    dicom = read_series(write_dicom(tmp_path / "d", array), "series")
    same(read_file(write(tmp_path / name, array, compressed)), dicom)
    assert np.allclose(dicom.spacing, SPACING[::-1])


def test_slices_are_ordered_by_position_not_by_name_or_instance_number(tmp_path, array):
    rng = np.random.default_rng(1)
    straight = read_series(write_dicom(tmp_path / "a", array), "series")
    names = [f"{n}.dcm" for n in rng.permutation(len(array))]
    numbers = rng.permutation(len(array)) + 1
    mixed = write_dicom(tmp_path / "b", array, names, numbers.tolist())
    same(read_series(sorted(mixed), "series"), straight)
    same(read_series(sorted(mixed)[::-1], "series"), straight)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_direction_of_storage_does_not_matter(tmp_path, array, axis):
    direction, origin, along = DIRECTION.copy(), np.array(ORIGIN), 2 - axis
    origin = origin + direction[:, along] * SPACING[along] * (SHAPE[axis] - 1)
    direction[:, along] *= -1
    place = {"origin": tuple(origin), "direction": direction}
    turned = write(tmp_path / "turned.mha", np.flip(array, axis), **place)
    same(read_file(turned), read_file(write(tmp_path / "straight.mha", array)))


def test_a_sagittal_volume_is_refused(tmp_path, array):
    direction = np.roll(np.eye(3), 1, axis=1)
    with pytest.raises(Fault, match="axial"):
        read_file(write(tmp_path / "x.mha", array, direction=direction))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("name", ["x.mha", "x.nii.gz", "x.nii"])
def test_a_truncated_file_is_refused_in_one_sentence(
    tmp_path, array, name, compressed, share, capfd
):
    path = truncate(write(tmp_path / name, array, compressed), share)
    with pytest.raises(Fault, match=f"{name}: is truncated"):
        read_file(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.99])
def test_a_truncated_dicom_file_is_refused_in_one_sentence(tmp_path, array, share, capfd):
    files = write_dicom(tmp_path, array)
    truncate(files[3], share)
    with pytest.raises(Fault, match="1-04.dcm: cannot be read as DICOM"):
        read_series(files, "series")
    assert capfd.readouterr() == ("", "")


def test_a_header_that_points_to_another_file_is_refused(tmp_path, array):
    path = write(tmp_path / "x.mha", array, compressed=False)
    path.write_bytes(path.read_bytes().replace(b"= LOCAL", b"= y.raw"))
    with pytest.raises(Fault):
        read_file(path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path):
    path = tmp_path / "x.nii.gz"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(Fault, match="LFS pointer"):
        read_file(path)


def test_a_missing_slice_is_noticed(tmp_path, array):
    files = write_dicom(tmp_path, array)
    with pytest.raises(Fault, match="as if one were missing"):
        read_series(files[:5] + files[6:], "series")


def test_two_slices_at_one_place_are_refused(tmp_path, array):
    files = write_dicom(tmp_path / "a", array) + write_dicom(tmp_path / "b", array)[:1]
    with pytest.raises(Fault, match="same position"):
        read_series(files, "series")


@pytest.mark.parametrize(
    ("tag", "value", "told"),
    [
        ("PixelSpacing", [0.9, 0.9], "differ in shape, spacing or direction"),
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0], "differ in shape, spacing or direction"),
        ("PhotometricInterpretation", "MONOCHROME1", "single MONOCHROME2 slices are needed"),
        ("PresentationLUTShape", "INVERSE", "single MONOCHROME2 slices are needed"),
    ],
)
def test_a_slice_that_differs_is_refused(tmp_path, array, tag, value, told):
    change = lambda k, found: setattr(found, tag, value) if k == 2 else None
    with pytest.raises(Fault, match=told):
        read_series(write_dicom(tmp_path, array, change=change), "series")


def test_rescaling_is_applied(tmp_path, array):
    def change(k, found):
        found.RescaleSlope, found.RescaleIntercept = "2", "-5"

    plain = read_series(write_dicom(tmp_path / "a", array), "series").pixels
    scaled = read_series(write_dicom(tmp_path / "b", array, change=change), "series").pixels
    assert np.array_equal(scaled, 2 * plain - 5)


def test_messages_about_a_bad_tag_do_not_quote_it(tmp_path, array, capfd):
    def change(k, found):
        for tag in ("ImagePositionPatient", "SeriesNumber", "PixelSpacing", "RescaleSlope"):
            found.add_new(tag, "LO", "JANSEN")

    files = write_dicom(tmp_path, array, change=change)
    read_header(files[0])
    with pytest.raises(Fault) as caught:
        read_series(files, "series")
    assert "JANSEN" not in str(caught.getrepr(chain=True, style="value")) + caught.value.kind
    assert capfd.readouterr() == ("", "")


def test_a_fault_survives_its_way_from_a_worker():
    fault = pickle.loads(pickle.dumps(Fault("what was found; what is needed", "kind")))  # noqa: S301
    assert (str(fault), fault.kind) == ("what was found; what is needed", "kind")


# ------------------------------------------------------------------------------ masks and crops


def test_a_mask_off_by_the_archives_rounding_is_used_as_it_is(tmp_path, array):
    turn = np.array([[1, 2e-4, 0], [-2e-4, 1, 0], [0, 0, 1]])
    mask = read_file(write(tmp_path / "m.nii.gz", array, direction=turn @ DIRECTION))
    assert np.array_equal(on_grid(mask, read_file(write(tmp_path / "i.mha", array)), "m"), array)


def test_a_coarser_mask_of_the_same_field_takes_the_nearest_voxels(tmp_path):
    fine = np.zeros((7, 24, 20), np.uint8)
    coarse = np.zeros((7, 12, 10), np.uint8)
    coarse[3, 4:6, 2:5] = 1
    fine[3, 8:12, 4:10] = 1
    half = tuple(ORIGIN - DIRECTION @ np.array([0.25, 0.25, 0]))
    image = read_file(write(tmp_path / "i.mha", fine, spacing=(0.5, 0.5, 3.0), origin=half))
    mask = read_file(write(tmp_path / "m.nii.gz", coarse))
    assert np.array_equal(on_grid(mask, image, "m"), fine)


@pytest.mark.parametrize(
    "place",
    [
        {"origin": (-20.0, -30.0, 13.0)},
        {"origin": (-18.0, -30.0, 10.0)},
        {"spacing": (1.0, 1.2, 3.0)},
        {"direction": np.eye(3)},
    ],
)
def test_a_mask_of_other_geometry_is_refused(tmp_path, array, place):
    mask = read_file(write(tmp_path / "m.nii.gz", array, **place))
    with pytest.raises(Fault, match="the mask: its grid .* mm off the image's"):
        on_grid(mask, read_file(write(tmp_path / "i.mha", array)), "the mask")


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8, 1.7])
def test_a_pixel_of_the_crop_shows_its_own_place(target):
    rows, columns = np.mgrid[:60, :50] * np.array([0.5, 0.6])[:, None, None]  # mm
    window = Window(np.array([30.0, 24.5]), np.array([0.5, 0.6]), target, 8)
    crop = window.cut((rows + 10 * columns)[None])[0]
    place = (np.arange(8) - 3.5) * target
    # exact where pixels get smaller; a wider tent is off by up to 3 % of a pixel
    tolerance = 1e-9 if target <= 0.5 else 0.03 * 11 * target
    assert np.allclose(crop, (15 + place)[:, None] + 10 * (14.7 + place), atol=tolerance)


def test_a_coarser_crop_does_not_alias():
    stripes = np.tile([0.0, 1.0], 64)[None, None].repeat(128, axis=1)
    window = Window(np.array([63.5, 63.5]), np.array([0.5, 0.5]), 1.0, 32)
    assert np.allclose(window.cut(stripes), 0.5, atol=1e-9)


def test_beyond_the_image_its_edge_is_repeated():
    x = np.arange(16.0).reshape(1, 4, 4)
    window = Window(np.array([1.5, 1.5]), np.array([1.0, 1.0]), 1.0, 8)
    assert np.array_equal(window.cut(x), np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="edge"))
    assert window.reaches_beyond((4, 4))
    assert not Window(np.array([3.5, 3.5]), np.array([1.0, 1.0]), 1.0, 8).reaches_beyond((8, 8))


def test_a_stray_voxel_does_not_move_the_crop():
    mask = np.zeros((5, 100, 100), bool)
    mask[1:4, 40:61, 30:51] = True
    clean = centre_of(mask)
    mask[0, 99, 99] = True
    assert np.allclose(clean, [50, 40])
    assert np.allclose(centre_of(mask), clean, atol=0.5)


def test_grey_values_beyond_black_and_white_are_clipped():
    assert to_bytes(np.array([-1.0, 0, 0.5, 1, 9]), 0, 1).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("share", [0.0001, 0.004, 0.3])
@pytest.mark.parametrize("turned", [False, True])
def test_a_few_bright_or_dark_pixels_are_no_constant_image(share, turned):
    x = np.full(10_000, 40.0)
    x[: round(share * x.size)] = 3000.0
    x = 3040 - x if turned else x
    black, white = ends(x)
    assert (black, white) == (40.0, 3000.0)
    assert set(to_bytes(x, black, white)) == {0, 255}


def test_a_constant_image_has_no_contrast():
    assert ends(np.full(9, 7)) == (7.0, 7.0)
