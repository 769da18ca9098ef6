"""One film in every encoding of DICOM: the same image or a refusal; nothing wraps or inverts."""

import io
import struct
from itertools import product

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, RLELossless
from scipy import ndimage
from synthetic_mammogram import dataset, film, save
from synthetic_mri import write_dicom

from data_prep import grey, mammogram
from data_prep.dicom import read_series
from data_prep.volumes import Fault

SIZE = 32
PADDED = "image with pixel padding: background"
STRIP = "saturated strip along an edge: cut off"
quick = settings(max_examples=60, deadline=None)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Alike but for the rounding of percentiles."""
    return bool(np.abs(a.astype(int) - b).max() <= 1)


def square(shown: np.ndarray) -> np.ndarray:
    return made(shown)[0]


def made(shown: np.ndarray) -> tuple[np.ndarray, list[str]]:
    return mammogram.to_square(shown.astype(np.float32), SIZE, "film")


def packed(found: pydicom.Dataset, way: str) -> pydicom.Dataset:
    """The dataset with its little-endian words stored in another way."""
    words = np.frombuffer(found.PixelData, f"<u{found.BitsAllocated // 8}")
    words = words.reshape(found.Rows, found.Columns)
    if way == "run lengths":
        found.compress(RLELossless)
    elif way == "big endian":
        found.PixelData = words.astype(words.dtype.newbyteorder(">")).tobytes()
        found.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    elif way.startswith("JPEG 2000"):
        stream, signed = io.BytesIO(), bool(found.PixelRepresentation) and "signed" in way
        options = {"irreversible": False, "no_jp2": True, "signed": signed}
        Image.fromarray(words).save(stream, "JPEG2000", **options)
        found.PixelData = encapsulate([stream.getvalue()])
        found.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return found


def encoded(values: np.ndarray, bits: int, way="native", **tags) -> pydicom.Dataset:
    """A file of these values with so many bits; signed, if any is negative."""
    size = 1 if bits <= 8 else 2
    depth = {"BitsAllocated": 8 * size, "BitsStored": bits, "HighBit": bits - 1}
    sign = {"PixelRepresentation": int((values < 0).any())}
    found = dataset(values, **depth | sign | tags)
    found.PixelData = values.astype(f"<u{size}").tobytes()
    found["PixelData"].VR = "OB" if size == 1 else "OW"
    return packed(found, way)


# ---------------------------------------------------------------------------- display and polarity

LINEAR, EXACT, SIGMOID, TABLE = "LINEAR", "LINEAR_EXACT", "SIGMOID", "table"


def window(x, centre, width, function):
    """The formulas of the standard, PS3.3 C.11.2, from 0 to 1."""
    if function == SIGMOID:
        return 1 / (1 + np.exp(-4 * (x - centre) / width))
    if function == LINEAR:
        centre, width = centre - 0.5, width - 1
    return np.clip((x - centre) / width + 0.5, 0, 1)


def viewed(x, top, view):
    """What a viewer shows of values from 0 to ``top``."""
    if view == TABLE:
        return np.round(peak(top) * np.sqrt(np.arange(top + 1) / top))[x]
    return x if view is None else window(x, *span(top), view)


def peak(top):
    """Of the lookup table: entries of 8 bits for more values than that, or of 16."""
    return 255 if top < 65_535 else 60_000


def span(top):
    """Centre and width of the window: the darkest and the brightest tissue is clipped."""
    return round(0.6 * top), round(0.5 * top)


def view_tags(top, view, scale, negative):
    """The same view for values that are ``scale`` as large, and that run downwards or not."""
    if view is None:
        return {}
    if view == TABLE:
        entries = viewed(np.arange(top + 1), top, TABLE).astype("<u2")
        item = pydicom.Dataset()
        item.LUTDescriptor = [(top + 1) % 2**16, 0, 8 if peak(top) == 255 else 16]
        item.LUTData = (peak(top) - entries[::-1] if negative else entries).tobytes()
        return {"VOILUTSequence": [item]}
    centre, width = span(top)
    off, less = (0.5, 1) if view == LINEAR else (0, 0)
    centre, width = centre - off, width - less
    centre = top - centre if negative else centre
    numbers = {"WindowCenter": centre * scale + off, "WindowWidth": width * scale + less}
    return {name: f"{n:.10g}" for name, n in numbers.items()} | {"VOILUTFunction": view}


def stored_as(x, top, slope, offset):
    """Values that slope and intercept turn to ``x`` times the size of the slope; the tags."""
    scale = abs(slope)
    values, shift = (x, offset) if slope > 0 else (top - x, offset - top)
    tags = {"RescaleSlope": f"{slope:.10g}", "RescaleIntercept": f"{shift * slope:.10g}"}
    return values - offset, {} if (slope, offset) == (1, 0) else tags, scale


WAYS = ["native", "run lengths", "big endian", "JPEG 2000, signed", "JPEG 2000, unsigned"]
DEPTHS = [(8, False), (12, False), (16, False), (8, True), (12, True), (16, True)]
SLOPES = [1, -1, 1e-3, -1e-3]
NEGATIVES = [{}, {"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bits", "signed"), DEPTHS)
def test_a_film_is_the_same_image_in_every_encoding(tmp_path, way, bits, signed):
    top = 2**bits - 1
    x = film().astype(int) >> (16 - bits)
    truth = {view: made(viewed(x, top, view)) for view in (None, LINEAR, EXACT, SIGMOID, TABLE)}
    every = product(SLOPES, truth, NEGATIVES)
    few = product([1, -1e-3], [None, LINEAR], NEGATIVES[:2])  # how it is packed comes before
    for slope, view, negative in every if way == "native" else [*few, (-1, TABLE, {})]:
        if view == TABLE and abs(slope) < 1:
            continue  # its entries are for whole numbers
        shown = top - x if negative else x
        values, tags, scale = stored_as(shown, top, slope, 2 ** (bits - 1) if signed else 0)
        tags |= view_tags(top, view, scale, bool(negative)) | negative
        found = encoded(values, bits, "native", PixelRepresentation=int(signed), **tags)
        if way == "big endian" and view == TABLE:
            item = found.VOILUTSequence[0]
            item.LUTData = np.frombuffer(item.LUTData, "<u2").astype(">u2").tobytes()
        read, notes = mammogram.read(save(tmp_path / "a.dcm", packed(found, way)), SIZE)
        shown, odd = truth[view]
        assert same(read, shown), (slope, view, negative)
        assert notes == ["image stored as negative: inverted"] * bool(negative) + odd


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bits", "signed"), DEPTHS)
@pytest.mark.parametrize("slope", [-1, 1e-3])
def test_a_series_has_the_same_values_in_every_encoding(tmp_path, way, bits, signed, slope):
    x = np.random.default_rng(0).integers(0, 2**bits, (3, 12, 10))
    values, tags, scale = stored_as(x, 2**bits - 1, slope, 2 ** (bits - 1) if signed else 0)

    def change(k, found):
        found.update(encoded(values[k], bits, way, PixelRepresentation=int(signed), **tags))
        found.file_meta.TransferSyntaxUID = syntax

    syntax = encoded(values[0], bits, way).file_meta.TransferSyntaxUID
    read = read_series(write_dicom(tmp_path, x, change=change), "series").pixels
    assert np.allclose(read, x * scale, rtol=1e-5, atol=2**bits * scale * 1e-6)


@pytest.mark.parametrize(("step", "first"), [(10, -5), (16_000, -5_000)])
def test_a_table_of_lookups_may_begin_below_zero_and_end_before_the_values(tmp_path, step, first):
    x = film().astype(int) // 20_000 * step - 10
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [11, first, 16], np.arange(50, 61, dtype="<u2").tobytes()
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        found = encoded(x, 16, **{name: [item]})
        shown, _ = mammogram.displayed(save(tmp_path / "a.dcm", found))
        assert np.array_equal(shown, np.clip(x - first, 0, 10) + 50)


IMPOSSIBLE = {
    "no width": {"WindowCenter": 5, "WindowWidth": 0},
    "a negative width": {"WindowCenter": 5, "WindowWidth": -3, "VOILUTFunction": "SIGMOID"},
    "too narrow for its function": {"WindowCenter": 5, "WindowWidth": 0.5},
    "an unknown function": {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
    "no centre": {"WindowWidth": 9},
    "a centre alone": {"WindowCenter": 9},
    "a slope of zero": {"RescaleSlope": 0, "RescaleIntercept": 1},
    "a slope lost beside its intercept": {"RescaleSlope": "1e-9", "RescaleIntercept": 1000},
    "a slope below all numbers": {"RescaleSlope": "1e-46", "RescaleIntercept": 0},
}


@pytest.mark.parametrize("tags", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_displayed_is_refused_with_what_is_needed(tmp_path, tags):
    with pytest.raises(Fault, match=r"a\.dcm: .*(window|rescaling).* needed") as caught:
        mammogram.read(save(tmp_path / "a.dcm", dataset(film(), **tags)), SIZE)
    assert "cannot be read as DICOM" not in str(caught.value)


@pytest.mark.parametrize("entries", [3, 5, 0])
def test_a_lookup_table_of_another_length_than_it_says_is_refused(tmp_path, entries):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [entries, 0, 16], np.arange(4, dtype="<u2").tobytes()
    found = dataset(film(), VOILUTSequence=[item])
    with pytest.raises(Fault, match="entries and has 4"):
        mammogram.read(save(tmp_path / "a.dcm", found), SIZE)


# ------------------------------------------------------------------------ bits that are not stored


@given(
    seed=st.integers(0, 99),
    bits=st.integers(1, 15),
    lowest=st.integers(0, 15),
    signed=st.booleans(),
    filled=st.sampled_from(["nothing", "sign", "overlay", "noise"]),
    way=st.sampled_from(WAYS[:3]),
)
@quick
def test_stored_values_are_read_or_refused_and_never_wrap(
    tmp_path_factory, seed, bits, lowest, signed, filled, way
):
    lowest = min(lowest, 16 - bits)
    rng = np.random.default_rng(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    values = rng.integers(low, high, (6, 5))
    words = (values & (2**bits - 1)) << lowest
    outside = [bit for bit in range(1, 16) if not lowest <= bit < lowest + bits]
    tags = {}
    if filled == "sign":
        words = values << lowest
    elif outside and filled in ("overlay", "noise"):
        words |= rng.integers(0, 2, words.shape) << outside[-1]
        words[0, 0] |= 1 << outside[-1]
        if filled == "overlay":
            tags = {0x6002_0102: outside[-1]}
    found = encoded(words & 0xFFFF, 16, way, PixelRepresentation=int(signed))
    found.BitsStored, found.HighBit = bits, lowest + bits - 1
    for tag, value in tags.items():
        found.add_new(tag, "US", value)
    file = save(tmp_path_factory.mktemp("bits") / "a.dcm", found)
    try:
        read, _, notes = grey.stored(pydicom.dcmread(file), "film")
    except Fault as fault:
        kind = fault.kind
    else:
        kind = "HighBit" if notes else ""
        # noise may look like a sign, or like values at the lowest bits
        assert kind or np.array_equal(read, values)
    assert kind == "" or filled == "noise"
    assert kind or filled != "noise" or signed or not outside


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tagged", [True, False])
def test_the_bits_of_an_overlay_are_no_grey_values(tmp_path, way, tagged):
    x = film().astype(int) >> 4
    words = x.copy()
    words[40:44] |= 1 << 13
    overlay = encoded(words, 16, way)
    overlay.BitsStored, overlay.HighBit = 12, 11
    file = save(tmp_path / "a.dcm", overlay)
    if tagged:
        overlay.add_new(0x6000_0102, "US", 13)
        shown, _ = mammogram.displayed(save(file, overlay))
        assert np.array_equal(shown, x)
    else:
        with pytest.raises(Fault, match="beyond the 12 of BitsStored"):
            mammogram.read(file, SIZE)


def test_values_at_the_left_of_their_words_are_read_by_the_high_bit(tmp_path):
    x = film().astype(int) >> 4
    found = encoded(x << 4, 16)
    found.BitsStored = 12  # up to bit 15
    shown, notes = mammogram.displayed(save(tmp_path / "a.dcm", found))
    assert np.array_equal(shown, x)
    assert notes == []


def test_a_high_bit_that_contradicts_the_pixels_is_noted(tmp_path):
    x = film().astype(int) >> 4
    shown, notes = mammogram.displayed(save(tmp_path / "a.dcm", encoded(x, 12, HighBit=15)))
    assert np.array_equal(shown, x)
    assert notes == ["HighBit that does not fit the pixels"]


def test_slices_beyond_their_bits_are_refused_too(tmp_path):
    def change(k, found):
        found.BitsStored, found.HighBit = 10, 9

    array = np.full((3, 6, 5), 1100, np.uint16)
    with pytest.raises(Fault, match="beyond the 10 of BitsStored"):
        read_series(write_dicom(tmp_path, array, change=change), "series")


# ----------------------------------------------------------------------------- what is no image

WIDE = (300, 240)
BAND = np.zeros(WIDE, bool)
BAND[:, 190:] = True
AIR = ~ndimage.binary_dilation(film(shape=WIDE) > 300, iterations=8)
HOLE = np.zeros(WIDE, bool)
HOLE[130:170, 40:80] = True


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("slope", [1, -1])
@pytest.mark.parametrize(("offset", "value"), [(0, 0), (0, 4095), (2048, -2048), (2048, 2047)])
@pytest.mark.parametrize("where", ["band", "air"])
def test_padding_is_background_however_it_is_stored(
    tmp_path, negative, slope, offset, value, where
):
    x = film(shape=WIDE).astype(int) >> 4
    values, tags, _ = stored_as(4095 - x if negative else x, 4095, slope, offset)
    values = np.clip(values, 1 - offset, 4094 - offset)
    values[BAND if where == "band" else AIR] = value
    tags |= {"PhotometricInterpretation": "MONOCHROME1"} if negative else {}
    found = encoded(values, 12, PixelPaddingValue=value, **tags)
    read, notes = mammogram.read(save(tmp_path / "a.dcm", found), SIZE)
    assert same(read, square(x))
    assert PADDED in notes


def test_a_breast_is_found_also_where_all_air_is_padding(tmp_path):
    rows, columns = np.mgrid[: WIDE[0], : WIDE[1]]
    r = np.hypot((rows - 150) / 115, columns / 165)
    x = np.where(r < 1, 2100 - 1600 * r, 60).astype(int)
    plain = square(x)
    x[r >= 1] = 4095
    read, notes = mammogram.read(
        save(tmp_path / "a.dcm", encoded(x, 12, PixelPaddingValue=4095)), SIZE
    )
    assert notes == [PADDED]
    assert np.corrcoef(read.ravel(), plain.ravel())[0, 1] > 0.99  # its rim may be lost


def test_padding_far_below_the_image_does_not_hide_the_air(tmp_path):
    x = film(shape=WIDE).astype(int) >> 4
    plain = square(x)
    x[BAND] = -32_768
    found = encoded(x, 16, PixelPaddingValue=-32_768)
    read, notes = mammogram.read(save(tmp_path / "a.dcm", found), SIZE)
    assert same(read, plain)
    assert notes == [PADDED]


@pytest.mark.parametrize("signed", [False, True])
def test_padding_may_lie_beyond_the_bits_and_between_two_values(tmp_path, signed):
    x = film(shape=WIDE).astype(int) >> 4
    for ends in ([63_536], [63_536, 63_539], [63_539, 63_536]):
        values = x.copy() - 2048 * signed
        values[BAND] = np.random.default_rng(0).integers(min(ends), max(ends) + 1, BAND.sum())
        found = encoded(values, 12, PixelPaddingValue=ends[0])
        found.PixelRepresentation = int(signed)
        if signed:
            found.PixelPaddingValue -= 2**16
        if len(ends) > 1:
            found.PixelPaddingRangeLimit = ends[1] - 2**16 * signed
        read, notes = mammogram.read(save(tmp_path / "a.dcm", found), SIZE)
        assert same(read, square(x))
        assert notes == [PADDED]


def test_padding_within_the_breast_is_black_and_sets_no_contrast(tmp_path):
    x = film(shape=WIDE).astype(int) >> 4
    plain = square(x)
    x[HOLE] = 4095
    read, notes = mammogram.read(
        save(tmp_path / "a.dcm", encoded(x, 12, PixelPaddingValue=4095)), SIZE
    )
    assert notes == [PADDED]
    rows, columns = slice(13, 18), slice(6, 11)
    assert not read[rows, columns][1:-1, 1:-1].any()
    read[rows.start - 2 : rows.stop + 2, columns.start - 2 : columns.stop + 2] = 0
    plain[rows.start - 2 : rows.stop + 2, columns.start - 2 : columns.stop + 2] = 0
    assert np.abs(read.astype(int) - plain).max() <= 3


def test_an_image_of_nothing_but_padding_is_refused(tmp_path):
    found = encoded(np.full(WIDE, 7), 12, PixelPaddingValue=7)
    with pytest.raises(Fault, match="all pixels are padding"):
        mammogram.read(save(tmp_path / "a.dcm", found), SIZE)


def test_padding_of_a_slice_is_as_dark_as_its_darkest_pixel(tmp_path):
    def change(k, found):
        found.PixelPaddingValue, found.RescaleSlope, found.RescaleIntercept = 4000, 2, -100

    array = np.random.default_rng(0).integers(100, 900, (3, 6, 5)).astype(np.uint16)
    padded = array.copy()
    padded[:, :2] = 4000
    read = read_series(write_dicom(tmp_path, padded, change=change), "series").pixels
    assert np.array_equal(read[:, 2:], array[:, 2:] * 2.0 - 100)
    for pixels in read:
        assert (pixels[:2] == pixels[2:].min()).all()


@pytest.mark.parametrize("lines", [1, 3])
@pytest.mark.parametrize("edge", ["left", "right", "top", "bottom"])
@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 2048, "WindowWidth": 3000}])
def test_a_thin_saturated_strip_at_an_edge_changes_nothing(tmp_path, lines, edge, tags):
    x = film(shape=WIDE).astype(int) >> 4
    inner, strip = {
        "left": (np.s_[:, lines:], np.s_[:, :lines]),
        "right": (np.s_[:, :-lines], np.s_[:, -lines:]),
        "top": (np.s_[lines:], np.s_[:lines]),
        "bottom": (np.s_[:-lines], np.s_[-lines:]),
    }[edge]
    plain, none = mammogram.read(save(tmp_path / "a.dcm", encoded(x[inner], 12, **tags)), SIZE)
    assert none == []
    x[strip] = 4095
    read, notes = mammogram.read(save(tmp_path / "b.dcm", encoded(x, 12, **tags)), SIZE)
    assert notes == [STRIP]
    assert np.array_equal(read, plain)


def test_saturated_tissue_at_the_chest_wall_is_no_strip():
    x = np.minimum(film(shape=WIDE), 30_000)
    rows, columns = np.mgrid[: WIDE[0], : WIDE[1]]
    for lost in (300 * columns, 100 * np.abs(rows - 150) + 300 * columns):
        shown = np.minimum(40_000, 42_000 - lost).astype(np.float32)
        assert mammogram.to_square(shown, SIZE, "film")[1] == []
    assert mammogram.to_square(x.astype(np.float32), SIZE, "film")[1] == []
    saturated = np.random.default_rng(0).random(WIDE) < 0.99 - 0.02 * columns
    shown = np.where(saturated, 40_000, 20_000 - 60 * columns).astype(np.float32)
    assert STRIP not in mammogram.to_square(shown, SIZE, "film")[1]


def test_a_blank_breast_has_no_contrast_whatever_its_outline():
    blank = np.where(film(shape=(1440, 960)) > 300, 500, 0)
    with pytest.raises(Fault, match="no contrast"):
        square(blank)


# ---------------------------------------------------------------------------------- damaged files

STRUCTURE = ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"]
STRUCTURE += ["BitsAllocated", "BitsStored", "HighBit", "PixelData"]


@pytest.mark.parametrize("name", STRUCTURE)
@pytest.mark.parametrize("bits", [12, 16])
def test_no_flipped_bit_of_what_gives_pixels_their_shape_changes_a_pixel(tmp_path, name, bits):
    found = encoded(film(shape=(60, 40)).astype(int) >> (16 - bits), bits, NumberOfFrames=1)
    file = save(tmp_path / "a.dcm", found)
    truth, whole = mammogram.displayed(file)[0], file.read_bytes()
    tag = pydicom.datadict.tag_for_keyword(name)
    start = whole.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF))
    length = 12 if name == "PixelData" else 8 + len(str(found[name].value).encode()) // 2 * 2 + 2
    for bit in range(8 * start, 8 * (start + min(length, 24))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            shown, _ = mammogram.displayed(file)
        except Fault:
            continue
        assert np.array_equal(shown, truth), bit - 8 * start


def saying(**tags):
    """Changes slices so that they say this."""
    told = pydicom.Dataset()
    for name, value in tags.items():
        setattr(told, name, value)
    return lambda k, found: found.update(told)


def test_no_flipped_bit_before_the_pixels_of_a_slice_changes_the_series(tmp_path):
    """What one slice says is compared with the others; its pixels have no checksum."""
    array = np.random.default_rng(0).integers(0, 2**16, (3, 6, 5)).astype(np.uint16)
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-10", "PixelPaddingValue": 7}
    files = write_dicom(tmp_path, array, change=saying(PixelPaddingRangeLimit=9, **tags))
    whole, content = read_series(files, "series"), files[1].read_bytes()
    start = content.index(b"\x20\x00\x32\x00DS")  # the position; before it are names alone
    accepted = 0
    for bit in range(8 * start, 8 * (len(content) - array[1].nbytes)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        files[1].write_bytes(damaged)
        try:
            found = read_series(files, "series")
        except Fault:
            continue
        accepted += 1
        assert np.array_equal(found.pixels, whole.pixels), bit - 8 * start
        assert np.allclose(found.origin, whole.origin, atol=0.1)
        assert np.allclose(found.steps, whole.steps, atol=0.1)
    assert accepted  # as digits far behind the point are


@pytest.mark.parametrize("tags", [{"RescaleSlope": 2}, {"PixelPaddingValue": 9}])
def test_slices_may_not_differ_in_what_their_values_mean(tmp_path, tags):
    files = write_dicom(tmp_path / "all", np.ones((3, 6, 5), np.uint16), change=saying(**tags))
    plain = write_dicom(tmp_path / "none", np.ones((3, 6, 5), np.uint16))
    read_series(files, "series")
    with pytest.raises(Fault, match="slices differ in sign, padding or rescaling"):
        read_series([files[0], plain[1], files[2]], "series")


def test_run_lengths_that_do_not_add_up_are_refused(tmp_path):
    found = encoded(np.where(film() > 300, 2000, 0), 12, "run lengths")
    file = save(tmp_path / "a.dcm", found)
    assert mammogram.displayed(file)[0].max() == 2000
    whole = file.read_bytes()
    place = whole.index(b"\xfe\xff\x00\xe0", whole.index(b"\xe0\x7f\x10\x00") + 20) + 8 + 64
    for bit in range(7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit  # the length of the first run
        file.write_bytes(damaged)
        with pytest.raises(Fault):
            mammogram.displayed(file)
