"""One mammogram: shown as a viewer shows it, and nothing of it but the breast."""

import io

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless
from synthetic_mammogram import BORN, CODE, NAME, SHAPE, dataset, film, save, truncate, write
from synthetic_mammogram import negative as write_negative

from data_prep import mammogram
from data_prep.volumes import Fault

SIZE = 32


def square(pixels, size=SIZE) -> np.ndarray:
    return mammogram.to_square(pixels.astype(np.float32), size, "film")[0]


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Alike but for the rounding of percentiles."""
    return bool(np.abs(a.astype(int) - b).max() <= 1)


# ------------------------------------------------------------------------------- the breast


def test_the_chest_wall_is_at_the_left_and_the_rest_is_black():
    shown = square(film())
    assert (shown.dtype, shown.shape) == (np.uint8, (SIZE, SIZE))
    assert (shown[4:-4, 0] > 0).all()  # the breast begins at the left side
    assert not shown[:, -8:].any()  # padded at right only
    assert shown[SIZE // 2, 0] > 0
    assert not shown[0, 12:].any()
    assert shown.max() > 150


def test_a_breast_wider_than_tall_lies_in_the_middle():
    shown = square(film(shape=(56, 96)), 28)
    assert shown[:, -1].any()
    assert shown[14, 0] > 0
    filled = np.flatnonzero(shown.any(axis=1))
    assert filled[0] > 2
    assert abs(filled[0] - (27 - filled[-1])) <= 1


@given(
    seed=st.integers(0, 99),
    right=st.booleans(),
    label=st.sampled_from(["", "R CC", "DOE"]),
)
@settings(max_examples=25, deadline=None)
def test_neither_side_nor_burnt_in_label_changes_a_pixel(seed, right, label):
    assert np.array_equal(square(film(seed, right=right, label=label)), square(film(seed)))


@pytest.mark.parametrize("edge", [1, 2])
def test_a_bright_frame_of_the_film_is_not_the_breast(edge):
    # where it touches the breast it stays, so not all is the same
    plain, framed = square(film()), square(film(edge=edge))
    assert ((framed > 0) == (plain > 0)).mean() > 0.95
    assert not framed[:, -8:].any()


@given(st.integers(0, 99), st.sampled_from([(64, 96), (96, 64), (80, 80), (70, 50)]))
@settings(max_examples=20, deadline=None)
def test_a_mirror_image_gives_the_same(seed, shape):
    pixels = film(seed, shape=shape)
    assert np.array_equal(square(pixels, 16), square(pixels[:, ::-1], 16))


@given(st.integers(0, 99), st.floats(0.1, 3), st.floats(-500, 500))
@settings(max_examples=20, deadline=None)
def test_brightness_and_contrast_of_the_film_do_not_matter(seed, slope, shift):
    pixels = film(seed)
    assert near(square(pixels), square(pixels * slope + shift))


def test_the_breast_is_found_alike_in_large_and_small_images():
    large = film(shape=(1440, 960)).astype(np.float32)
    mask, (rows, columns), _ = mammogram.breast(large, "film")
    assert mask.shape == (rows.stop - rows.start, columns.stop - columns.start)
    step = -(-1440 // mammogram.COARSE)
    assert abs((rows.stop - rows.start) - 0.7 * 1440) <= 2 * step
    assert abs(columns.stop - 0.6 * 960) <= 2 * step
    true = (large[rows, columns] > 300) == mask
    assert true.mean() > 0.98


def test_a_large_piece_beside_the_breast_is_counted_and_black():
    pixels = film(label="DOE")
    _, notes = mammogram.to_square(pixels.astype(np.float32), SIZE, "film")
    _, plain = mammogram.to_square(film().astype(np.float32), SIZE, "film")
    assert plain == []
    pixels[2:14, -16:-2] = 65_000  # thicker than any letter
    _, notes = mammogram.to_square(pixels.astype(np.float32), SIZE, "film")
    assert notes == ["bright pieces beside the breast: set to black"]


def test_a_label_in_the_box_of_the_breast_is_black_and_a_dark_hole_in_it_is_not():
    pixels, plain = film(), square(film())
    pixels[16:18, 30:36] = 65_000  # right of the breast's top, left of its widest place
    assert np.array_equal(square(pixels), plain)
    pixels[44:50, 8:16] = 1_000  # darker than the threshold
    mask, _, _ = mammogram.breast(pixels.astype(np.float32), "film")
    whole, _, _ = mammogram.breast(film().astype(np.float32), "film")
    assert np.array_equal(mask, whole)


def test_what_hangs_on_the_breast_by_a_thin_bridge_is_black():
    pixels = film()
    pixels[2:14, -16:-2] = 65_000
    pixels[8, 4:-10] = 65_000  # a scratch from the label above the breast
    pixels[8:30, 4] = 65_000
    shown = square(pixels)
    assert not shown[:, -8:].any()
    assert ((shown > 0) == (square(film()) > 0)).mean() > 0.9


def test_a_breast_away_from_both_sides_is_counted():
    pixels = np.pad(film(), ((0, 0), (20, 0)), constant_values=300)
    _, notes = mammogram.to_square(pixels.astype(np.float32), SIZE, "film")
    assert notes == ["breast that reaches neither side of the image"]


@given(st.lists(st.integers(0, 255), min_size=2, max_size=40).filter(lambda x: len(set(x)) > 1))
@settings(max_examples=50, deadline=None)
def test_no_threshold_separates_better_than_that_of_otsu(values):
    x = np.array(values, float)

    def between(t):
        low, high = x[x < t], x[x >= t]
        if not len(low) or not len(high):
            return 0.0
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(between(t) for t in np.unique(x))
    assert between(mammogram.otsu(x)) >= 0.95 * best  # its histogram has 256 bins


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.full(SHAPE, 7), "no breast found"),
        (np.where(film() > 300, 500, 0), "no contrast"),
        (film(shape=(30, 20)), "breast smaller than --size"),
        (np.pad(np.full((4, 4), 900), 50), "no breast found"),
    ],
)
def test_an_image_without_a_usable_breast_is_a_fault(pixels, kind):
    with pytest.raises(Fault) as caught:
        square(pixels)
    assert caught.value.kind == kind


# --------------------------------------------------------------------------- as it is displayed


def test_a_negative_is_inverted_once_however_it_says_so(tmp_path):
    pixels = film()
    plain, none = mammogram.read(write(tmp_path / "plain.dcm", pixels), SIZE)
    files = [
        write_negative(tmp_path / "1.dcm", pixels),
        write_negative(tmp_path / "2.dcm", pixels, PresentationLUTShape="INVERSE"),
        write(tmp_path / "3.dcm", 65_535 - pixels, PresentationLUTShape="INVERSE"),
    ]
    assert none == []
    for file in files:
        shown, notes = mammogram.read(file, SIZE)
        assert near(shown, plain)
        assert notes == ["image stored as negative: inverted"]


def window(x, centre, width, function):
    """The formulas of the standard, PS3.3 C.11.2, onto 0 to 65535."""
    if function == "SIGMOID":
        return 65_535 / (1 + np.exp(-4 * (x - centre) / width))
    if function == "LINEAR":
        share = (x - (centre - 0.5)) / (width - 1) + 0.5
    else:
        share = (x - centre) / width + 0.5
    return np.clip(share, 0, 1) * 65_535


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_first_window_is_applied_by_its_function(tmp_path, function):
    pixels = film(shape=(300, 200))  # more than one band of rows
    tags = {"WindowCenter": [30_000, 9], "WindowWidth": [20_000, 9], "VOILUTFunction": function}
    shown, notes = mammogram.displayed(write(tmp_path / "a.dcm", pixels, **tags))
    expected = window(pixels.astype(float), 30_000, 20_000, function)
    assert np.allclose(shown, expected, atol=0.5)
    assert notes == ["image with several windows: the first taken"]


def test_rescale_comes_before_the_window_and_empty_tags_do_not_count(tmp_path):
    pixels = film()
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100}
    shown, _ = mammogram.displayed(write(tmp_path / "a.dcm", pixels, **tags))
    assert np.array_equal(shown, pixels.astype(np.float32) * 2 - 100)
    empty = {"WindowCenter": None, "WindowWidth": None, "RescaleSlope": None}
    empty |= {"RescaleIntercept": None, "PresentationLUTShape": ""}
    shown, notes = mammogram.displayed(write(tmp_path / "b.dcm", pixels, **empty))
    assert np.array_equal(shown, pixels)
    assert notes == []
    tags = {"WindowCenter": 30_000, "WindowWidth": 20_000, "VOILUTFunction": ""}
    shown, _ = mammogram.displayed(write(tmp_path / "c.dcm", pixels, **tags))
    assert np.allclose(shown, window(pixels.astype(float), 30_000, 20_000, "LINEAR"), atol=0.5)


def test_a_lookup_table_is_applied_instead_of_a_window(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.LUTData = np.array([0, 10, 20, 1000], "<u2").tobytes()
    pixels = (film() // 20_000).astype(np.uint16)
    found = dataset(pixels, WindowCenter=1, WindowWidth=1)
    found.VOILUTSequence = [table]
    shown, _ = mammogram.displayed(save(tmp_path / "a.dcm", found))
    assert np.array_equal(shown, np.array([0, 10, 20, 1000])[pixels])


def jpeg_2000(found: pydicom.Dataset, pixels: np.ndarray) -> pydicom.Dataset:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    found.PixelData = encapsulate([stream.getvalue()])
    found.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return found


def test_lossless_compression_changes_nothing(tmp_path):
    pixels = film()
    run_lengths = dataset(pixels)
    run_lengths.compress(RLELossless)
    for found in (run_lengths, jpeg_2000(dataset(pixels), pixels)):
        shown, _ = mammogram.displayed(save(tmp_path / "a.dcm", found))
        assert np.array_equal(shown, pixels)


# -------------------------------------------------------------------------------------- faults


def truncated(folder):
    return truncate(write(folder / "a.dcm", film()))


def cut_in_the_header(folder):
    return truncate(write(folder / "a.dcm", film()), 0.02)


def text(folder):
    (folder / "a.dcm").write_text(NAME)
    return folder / "a.dcm"


def impossible_window(folder):
    return write(folder / "a.dcm", film(), WindowCenter=5, WindowWidth=0)


def undecodable(folder):
    found = dataset(film())
    found.PixelData = encapsulate([b"\xff\xd8 no JPEG"])
    found.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    return save(folder / "a.dcm", found)


def damaged_stream(folder):
    found = jpeg_2000(dataset(film()), film())
    found.PixelData = encapsulate([found.PixelData[60:700]])
    return save(folder / "a.dcm", found)


def colour(folder):
    found = dataset(film(), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    found.PlanarConfiguration = 0
    return save(folder / "a.dcm", found)


def several_frames(folder):
    return write(folder / "a.dcm", film(), NumberOfFrames=2)


def bomb(folder):
    found = dataset(film())
    found.Rows = found.Columns = 60_000
    return save(folder / "a.dcm", found)


FAULTS = {
    truncated: "unreadable DICOM file",
    cut_in_the_header: "unreadable DICOM file",
    text: "unreadable DICOM file",
    impossible_window: "unreadable DICOM file",
    damaged_stream: "unreadable DICOM file",
    undecodable: "compression that cannot be decoded",
    colour: "not one grey image",
    several_frames: "not one grey image",
    bomb: "image of impossible size",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_bad_file_is_a_fault_in_one_sentence_that_quotes_no_tag(tmp_path, spoil, capfd):
    with pytest.raises(Fault) as caught:
        mammogram.read(spoil(tmp_path), SIZE)
    told = str(caught.value)
    assert caught.value.kind == FAULTS[spoil]
    assert told.startswith(str(tmp_path / "a.dcm"))
    assert "\n" not in told
    said = told + "".join(capfd.readouterr())
    assert not any(word in said for word in (NAME, CODE, BORN))
