"""MetaImage and NIfTI: read as ITK reads them, and refused where a file shows its damage."""

import io
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from damaged_volumes import nifti, text
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from synthetic_mri import image_of, write

from data_prep.volumes import Fault, Volume, read, read_file, turned

FORMATS = [("x.mha", False), ("x.mha", True), ("x.nii", False), ("x.nii.gz", True)]
UNKNOWABLE = (b"Offset", b"ElementSpacing")  # any digits of these may be right


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).integers(0, 4000, (4, 9, 8)).astype(np.uint16)


def as_itk_reads(path) -> Volume:
    image = sitk.ReadImage(str(path))
    steps = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()).T[::-1]
    return turned(Volume(sitk.GetArrayFromImage(image), np.array(image.GetOrigin()), steps), "x")


def off(found: Volume, whole: Volume) -> float:
    """How far the corners of two grids lie apart at most, in voxels."""
    moved = np.vstack([found.steps - whole.steps, found.origin - whole.origin])
    return ([*whole.pixels.shape, 1] @ np.abs(moved @ np.linalg.inv(whole.steps))).max()


def in_field(content: bytes, bit: int) -> bytes:
    """The key of the line of text that holds a bit."""
    return content[: bit // 8].rpartition(b"\n")[2].partition(b"=")[0].strip()


@pytest.mark.parametrize(("name", "packed"), FORMATS)
def test_a_flipped_bit_is_refused_or_changes_nothing_that_a_file_can_tell(
    tmp_path, array, name, packed
):
    path = write(tmp_path / name, array, packed)
    content, whole = path.read_bytes(), read_file(path)
    voxels = len(content) if packed else len(content) - array.nbytes
    for bit in [*range(8 * voxels), *range(8 * voxels, 8 * len(content), 17)]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = read(io.BytesIO(flipped), path.suffix, "x")
        except Fault:
            continue
        assert found.pixels.shape == whole.pixels.shape
        changed = (found.pixels != whole.pixels).sum()
        assert changed == (bit >= 8 * voxels), f"bit {bit} changed {changed} voxels"
        assert off(found, whole) <= 0.5 or in_field(content, bit) in UNKNOWABLE, f"bit {bit}"


KINDS = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


@given(
    st.sampled_from(KINDS),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(*[st.floats(0.2, 5)] * 3),
    st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.sampled_from(FORMATS),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_what_is_read_is_what_itk_reads(
    tmp_path_factory, kind, shape, spacing, turn, flips, format_
):
    array = np.random.default_rng(0).normal(0, 50, shape).astype(np.int8).astype(kind)
    direction = Rotation.from_rotvec(turn).as_matrix() * flips
    image = image_of(array, spacing, (-20.1, 30.2, 7.3), direction)
    path = tmp_path_factory.mktemp("itk") / format_[0]
    sitk.WriteImage(image, str(path), useCompression=format_[1])
    found, expected = read_file(path), as_itk_reads(path)
    assert found.pixels.dtype == expected.pixels.dtype == np.dtype(kind)
    assert np.array_equal(found.pixels, expected.pixels)
    assert np.allclose(found.origin, expected.origin, rtol=0, atol=1e-9)
    assert np.allclose(found.steps, expected.steps, rtol=0, atol=1e-9)


def only(code: int):
    """One of the two forms of the place: 1, the quaternion, or 2, the matrix."""
    return nifti(252, "<2h", code == 1, code == 2)


def as_big_endian(path) -> None:
    content = bytearray(path.read_bytes())
    if path.suffix == ".mha":
        content = content.replace(b"OrderMSB = False", b"OrderMSB = True")
    else:
        fields = {0: "i", 40: "8h", 70: "2h", 76: "8f", 108: "3f", 252: "2h6f", 280: "12f"}
        for place, form in fields.items():
            struct.pack_into(
                f">{form}", content, place, *struct.unpack_from(f"<{form}", content, place)
            )
    start = len(content) - 2 * 4 * 9 * 8
    content[start:] = np.frombuffer(content[start:], "<u2").astype(">u2").tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.mha", as_big_endian),
        ("x.mha", text(b"Offset =", b"Position =")),
        ("x.mha", text(b"TransformMatrix =", b"Rotation =")),
        ("x.mha", text(b"NDims", b"0010|0010 = A^B\nHeaderSize = 0\nNDims")),
        ("x.nii", as_big_endian),
        ("x.nii", only(1)),
        ("x.nii", only(2)),
        ("x.nii", nifti(252, "<2h", 2, 4)),
        ("x.nii", nifti(40, "<h", 5)),  # further dimensions of one
        ("x.nii", nifti(112, "<2f", 0, 7)),  # no slope: not to be scaled
        ("x.nii", nifti(123, "<B", 0)),
    ],
)
def test_another_way_to_write_the_same_volume_changes_nothing(tmp_path, array, name, change):
    path = write(tmp_path / name, array, compressed=False)
    whole = read_file(path)
    change(path)
    found = read_file(path)
    assert np.array_equal(found.pixels, array)
    assert found.pixels.dtype == np.uint16
    assert off(found, whole) < 1e-5


def test_a_length_in_metres_becomes_millimetres(tmp_path, array):
    path = write(tmp_path / "x.nii", array)
    whole = read_file(path)
    nifti(76, "<4f", 1, 0.001, 0.001, 0.003)(path)
    nifti(252, "<2h", 1, 0)(path)
    nifti(268, "<3f", *np.array([20, 30, 10]) / 1000)(path)
    nifti(123, "<B", 1)(path)
    assert off(read_file(path), whole) < 1e-5


def test_a_message_quotes_nothing_of_the_header(tmp_path, array):
    path = write(tmp_path / "x.mha", array)
    text(b"ElementSpacing = 1 1 3\n", b"ElementSpacing = 1 1 3*PatientName = JANSEN\n")(path)
    with pytest.raises(Fault, match="no 3 numbers as ElementSpacing") as caught:
        read_file(path)
    assert "JANSEN" not in str(caught.value)
