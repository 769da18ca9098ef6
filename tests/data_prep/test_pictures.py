"""A picture means the same in every encoding, or is refused; squares that are never built."""

import struct
import tracemalloc
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import files, pictures, tiles
from data_prep.staging import File
from hallulib import UserError
from hallulib.data.checks import area_average

ORIENTATION, PHOTOMETRIC, COLOUR_MAP, SUBSAMPLING = 274, 262, 320, 530
UPRIGHT = {  # EXIF 2.3: where row 0 and column 0 of the stored picture belong
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.swapaxes(x[::-1], 0, 1),
    7: lambda x: np.swapaxes(x[::-1, ::-1], 0, 1),
    8: lambda x: np.swapaxes(x, 0, 1)[::-1],
}
LAYOUTS = [
    {},
    {"rowsperstrip": 4},
    {"tile": (16, 16)},
    {"compression": "zlib"},
    {"compression": "zlib", "tile": (16, 16)},
    {"compression": "zlib", "predictor": True},
]


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def scene() -> np.ndarray:
    """Every level from 0 to 255; percentiles 0.5 and 99.5 are 0 and 255."""
    levels = np.concatenate([np.zeros(40), np.arange(256), np.full(40, 255)])
    return np.random.default_rng(1).permutation(levels).astype(np.uint8).reshape(16, 21)


def levels(file: Path) -> np.ndarray:
    return pictures.to_bytes(pictures.read(file))[0]


def told(file: Path) -> list[str]:
    notes = []
    pictures.read(file, notes=notes)
    return notes


# --------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_is_upright_in_every_depth_layout_and_orientation(tmp_path, layout, order):
    grey = noise(21, 34)
    kinds = [grey, grey.astype(np.int8), grey.astype(np.uint16) * 257, noise(21, 34, 3)]
    kinds += [grey.astype(dtype) * 7 - 900 for dtype in (np.int16, np.int32, np.float32)]
    kinds += [np.dstack([noise(21, 34, 3), np.full_like(grey, 255)])]
    for pixels, (tag, upright) in product(kinds, UPRIGHT.items()):
        options = {"photometric": "rgb" if pixels.ndim == 3 else "minisblack", "byteorder": order}
        options |= {"extrasamples": ["unassalpha"]} if pixels.shape[2:] == (4,) else {}
        if pixels.dtype.kind == "f" and "predictor" in layout:
            continue  # its predictor needs a package more to write
        extra = [(ORIENTATION, 3, 1, tag, True)]
        tifffile.imwrite(tmp_path / "x.tif", pixels, extratags=extra, **options, **layout)
        found = pictures.read(tmp_path / "x.tif")
        assert np.array_equal(found, upright(pixels[..., :3] if pixels.ndim == 3 else pixels))


@pytest.mark.parametrize("packing", [None, "tiff_lzw", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "I;16B", "I", "F", "P", "RGB", "CMYK"])
def test_a_tiff_of_pillow_is_upright_in_every_mode_and_orientation(tmp_path, mode, packing):
    if mode.startswith(("I", "F")):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[mode]
        stored = (noise(21, 34).astype(float) * 9).astype(dtype)
        image = Image.frombytes(mode, (34, 21), stored.tobytes())
    else:
        image = Image.fromarray(np.dstack([noise(21, 34, 3), np.full((21, 34), 255, np.uint8)]))
        image = image.quantize(16) if mode == "P" else image.convert(mode)
        stored = np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))
    for tag, upright in UPRIGHT.items():
        image.save(tmp_path / "x.tif", compression=packing, tiffinfo={ORIENTATION: tag})
        assert np.array_equal(pictures.read(tmp_path / "x.tif"), upright(stored))


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *product(["png"], ["1", "L", "I;16", "LA", "P", "RGB", "RGBA"]),
        ("jpg", "L"),
        ("jpg", "RGB"),
    ],
)
def test_the_orientation_of_a_camera_is_obeyed(tmp_path, suffix, mode):
    image = Image.fromarray(noise(24, 40).astype(np.uint16) * 9)
    image = image if mode == "I;16" else Image.fromarray(noise(24, 40, 3)).convert(mode)
    image.save(tmp_path / f"plain.{suffix}")
    plain = pictures.read(tmp_path / f"plain.{suffix}")
    for tag, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[ORIENTATION] = tag
        image.save(tmp_path / f"x.{suffix}", exif=exif)
        assert np.array_equal(pictures.read(tmp_path / f"x.{suffix}"), upright(plain))


# --------------------------------------------------------------------------- polarity and sign


@pytest.mark.parametrize("layout", [{}, {"compression": "zlib"}], ids=str)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "u4", "i1", "i2", "i4", "f4"])
def test_one_picture_is_the_same_in_every_encoding_or_is_refused(
    tmp_path, dtype, photometric, order, layout
):
    white = photometric == "miniswhite"
    shown = scene() if dtype != "?" else (scene() > 127) * np.uint8(255)
    share = (255.0 - shown if white else shown) / 255
    bounds = np.iinfo(dtype) if dtype[0] in "ui" else None
    span = float(bounds.max) - bounds.min if bounds else 1
    stored = np.rint(share * span) + bounds.min if bounds else share
    tifffile.imwrite(
        tmp_path / "x.tif",
        stored.astype(dtype),
        photometric=photometric,
        byteorder=order,
        **layout,
    )
    unknown = dtype == "u4" and order == ">" or white and dtype in ("u4", "i1", "i2", "i4")
    if unknown or (dtype, order, white) == ("u2", ">", True):
        with pytest.raises(UserError, match="not a whole image of a kind that is read; replace"):
            pictures.read(tmp_path / "x.tif")
    else:
        assert np.array_equal(levels(tmp_path / "x.tif"), shown)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_grey_of_few_bits_and_of_twelve_keeps_its_polarity(tmp_path, bits, white):
    top = 2**bits - 1
    share = np.rint(scene()[:, :16] / 255 * top)
    stored = (top - share if white else share).astype(">u2")
    digits = np.unpackbits(stored.view("u1").reshape(16, 16, 2), axis=2)[..., 16 - bits :]
    packed = np.packbits(digits.reshape(16, -1), axis=1)
    kind = "miniswhite" if white else "minisblack"
    tifffile.imwrite(tmp_path / "x.tif", packed, photometric=kind, metadata=None)
    for number, kind, old, new in ((256, 4, 2 * bits, 16), (258, 3, 8, bits)):
        entry = tag(number, kind) + struct.pack("<IH", 1, old)
        patched(tmp_path / "x.tif", entry, entry[:8] + struct.pack("<H", new))
    if bits == 12 and white:
        with pytest.raises(UserError, match="not a whole image of a kind that is read"):
            pictures.read(tmp_path / "x.tif")
    else:
        expected = pictures.to_bytes(share)[0] if bits == 12 else np.rint(share / top * 255)
        assert np.array_equal(levels(tmp_path / "x.tif"), expected)


def patched(file: Path, old: bytes, new: bytes) -> Path:
    before = file.read_bytes()
    assert before.count(old) == 1
    file.write_bytes(before.replace(old, new))
    return file


def save(file: Path, image: Image.Image, **options) -> Path:
    image.save(file, **options)
    return file


def tag(number: int, kind: int = 3) -> bytes:
    return struct.pack("<HH", number, kind)


def test_a_meaning_that_would_be_guessed_is_refused(tmp_path):
    grey, colour = Image.fromarray(noise(16, 16)), Image.fromarray(noise(16, 16, 3))
    whole = save(tmp_path / "ycc.tif", colour.convert("YCbCr"))
    assert pictures.read(whole).shape == (16, 16, 3)
    one = tag(SUBSAMPLING) + struct.pack("<IHH", 2, 1, 1)
    dim = Image.fromarray(noise(16, 16) % 4)
    dim.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0, 0, 0, 250])
    maps = (np.arange(768) % 256).astype(np.uint16).reshape(3, 256)
    tifffile.imwrite(tmp_path / "p.tif", noise(16, 16), photometric="palette", colormap=maps)
    cases = {
        "no tag 262": patched(save(tmp_path / "x.tif", grey), tag(PHOTOMETRIC), tag(65000)),
        "unpacked YCbCr": patched(whole, one, one[:8] + struct.pack("<HH", 2, 2)),
        "CMYK that does not tell": patched(
            save(tmp_path / "x.jpg", colour.convert("CMYK")), b"Adobe", b"Other"
        ),
        "colours of 8 bits where TIFF has 16": tmp_path / "p.tif",
    }
    for expected, file in cases.items():
        with pytest.raises(UserError, match=f"{file.name}: {expected}.*; save it"):
            pictures.read(file)
    assert pictures.read(save(tmp_path / "cmyk.jpg", colour.convert("CMYK"))).shape[2:] == (3,)
    assert pictures.read(save(tmp_path / "dim.tif", dim)).max() == 250


# --------------------------------------------------------------------------------- transparency


def png(pixels: np.ndarray, bits: int, kind: int, **chunks: bytes) -> bytes:
    """A PNG of any depth; ``kind`` 0 is grey, 2 colour, 3 palette, 4 and 6 with alpha."""
    digits = np.unpackbits(pixels.astype(">u2").reshape(len(pixels), -1, 1).view("u1"), axis=2)
    rows = np.packbits(digits[..., 16 - bits :].reshape(len(pixels), -1), axis=1)
    head = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = {"IHDR": head} | chunks | {"IDAT": data, "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n.encode() + d + struct.pack(">I", zlib.crc32(n.encode() + d))
        for n, d in parts.items()
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_black_in_every_depth(tmp_path, bits):
    top = 2**bits - 1
    stored = np.rint(scene() / 255 * top).astype(int)
    (tmp_path / "x.png").write_bytes(png(stored, bits, 0, tRNS=struct.pack(">H", top)))
    (tmp_path / "plain.png").write_bytes(png(np.where(stored == top, 0, stored), bits, 0))
    assert np.array_equal(levels(tmp_path / "x.png"), levels(tmp_path / "plain.png"))
    assert told(tmp_path / "x.png") == ["transparent pixels shown on black"]
    (tmp_path / "no.png").write_bytes(png(stored * 0 + top, bits, 0, tRNS=struct.pack(">H", 0)))
    assert told(tmp_path / "no.png") == []


def layered(file: Path, mode: str, colour: np.ndarray, alpha: np.ndarray) -> Path:
    """A picture with alpha, in one of the ways in which there are such pictures."""
    if mode == "P":
        chunks = {"PLTE": colour.reshape(-1, 3).tobytes(), "tRNS": alpha.tobytes()}
        file.write_bytes(png(np.arange(alpha.size).reshape(alpha.shape), 8, 3, **chunks))
    elif file.suffix == ".bmp":
        size, masks = (alpha.shape[1], -len(alpha)), (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
        head = struct.pack("<IiiHHIIIIII4I", 108, *size, 1, 32, 3, 0, 0, 0, 0, 0, *masks)
        start = struct.pack("<2sIII", b"BM", 122 + 4 * alpha.size, 0, 122)
        file.write_bytes(start + head.ljust(108, b"\0") + np.dstack([colour, alpha]).tobytes())
    elif mode in ("LA", "RGBA"):
        plane = colour if mode == "RGBA" else colour[..., 0]
        Image.fromarray(np.dstack([plane, alpha])).save(file)
    else:
        associated = np.rint(colour * (alpha[..., None] / 255)).astype(np.uint8)
        stored = np.dstack([associated[..., 0] if mode == "La" else associated, alpha])
        kind = "minisblack" if mode == "La" else "rgb"
        tifffile.imwrite(file, stored, photometric=kind, extrasamples=["assocalpha"])
    return file


KINDS = [*product(["x.png", "x.tif"], ["LA", "RGBA"]), ("x.png", "P"), ("x.bmp", "RGBA")]


@pytest.mark.parametrize(("name", "mode"), [*KINDS, ("x.tif", "La"), ("x.tif", "RGBa")])
@pytest.mark.parametrize("grey", [False, True])
def test_what_is_transparent_shows_black_and_nothing_hidden(tmp_path, name, mode, grey):
    colour = noise(8, 9, 1 if mode in ("LA", "La") else 3) | np.zeros((1, 1, 3), np.uint8)
    opaque = np.full((8, 9), 255, np.uint8)
    found = {}
    for case, hidden in (("one", 200), ("other", 90)):
        alpha = opaque.copy()
        alpha[:3], alpha[3] = 0, 128
        under = colour.copy()
        under[:3] = hidden
        file = layered(tmp_path / name, mode, under, alpha)
        found[case] = pictures.read(file, grey).astype(int)
        assert told(file) == ["transparent pixels shown on black"]
    whole_file = layered(tmp_path / name, mode, colour, opaque)
    whole = pictures.read(whole_file, grey)
    assert told(whole_file) == []
    plain = colour[..., 0] if whole.ndim == 2 and mode in ("LA", "La") else colour
    if whole.ndim == plain.ndim:
        assert np.array_equal(whole, plain)
    assert np.array_equal(found["one"], found["other"])
    assert (found["one"][:3] == 0).all()
    assert np.abs(found["one"][3] - whole[3] * (128 / 255)).max() < 1.6
    assert np.array_equal(found["one"][4:], whole[4:])


def test_a_picture_that_is_transparent_everywhere_is_refused(tmp_path):
    file = layered(tmp_path / "x.bmp", "RGBA", noise(8, 9, 3), np.zeros((8, 9), np.uint8))
    with pytest.raises(UserError, match=r"x\.bmp: every pixel is transparent; save it without"):
        pictures.read(file)


# ------------------------------------------------------------------- several pictures in a file


def test_of_a_phone_picture_the_first_is_taken_and_this_is_told(tmp_path):
    pair = [Image.fromarray(noise(24, 40, 3)), Image.fromarray(noise(8, 8, 3))]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pair[0].save(tmp_path / "one.jpg", exif=exif)
    options = {"format": "MPO", "save_all": True, "append_images": pair[1:], "exif": exif}
    pair[0].save(tmp_path / "two.jpg", **options)
    one, two = (pictures.read(tmp_path / name) for name in ("one.jpg", "two.jpg"))
    assert np.array_equal(one, two)
    assert one.shape == (40, 24, 3)
    assert told(tmp_path / "one.jpg") == []
    assert told(tmp_path / "two.jpg") == ["first of several pictures in a JPEG taken"]


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
def test_pages_and_frames_are_refused_with_what_to_do(tmp_path, name):
    first, *others = (Image.fromarray(noise(8, 8) // n) for n in (1, 2, 3))
    first.save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(UserError, match="3 images in one file; save each in its own"):
        pictures.read(tmp_path / name)


# ------------------------------------------------------------------------------------- arrays


HELD = {"npy": "u2 >u2 i2 i4 i8 f2 f4 f8", "tif": "u2 >u2 i2 i4 f4", "png": "u2"}


@pytest.mark.parametrize(("suffix", "dtype"), [(s, d) for s in HELD for d in HELD[s].split()])
def test_deep_numbers_mean_the_same_at_any_scale_and_few_bright_ones_stay(tmp_path, suffix, dtype):
    few = np.zeros((40, 50), int)
    few[3, 4:9] = 4  # of 2000 pixels: neither percentile sees them
    for factor, shift in ((1, 0), (25, 3), (1 / 256, -1)):
        if factor < 1 and "f" not in dtype:
            continue
        for shown, expected in ((scene(), scene()), (few, few // 4 * 255)):
            stored = (shown * float(factor) + shift).astype(dtype)
            file = tmp_path / f"x.{suffix}"
            if suffix == "npy":
                np.save(file, stored)
            elif suffix == "tif":
                tifffile.imwrite(file, stored, photometric="minisblack")
            else:
                Image.fromarray(stored).save(file)
            assert np.abs(levels(file).astype(int) - expected).max() <= (dtype == "f2")


def test_a_mask_of_true_and_false_is_white_and_black_and_one_of_0_and_1_is_told(tmp_path):
    mask = scene() > 127
    np.save(tmp_path / "x.npy", mask)
    Image.fromarray(mask).save(tmp_path / "x.png")
    for name in ("x.npy", "x.png"):
        assert np.array_equal(levels(tmp_path / name), mask * 255)
    shown, notes = pictures.to_bytes(mask.astype(np.uint8))
    assert np.array_equal(shown, mask)
    assert notes == ["8-bit image with values up to 1 only: nearly black"]
    assert pictures.to_bytes(mask.astype(np.uint8) * 2)[1] == []


# ------------------------------------------------------------------------------------- squares


def built(pixels: np.ndarray, square: pictures.Square) -> np.ndarray:
    """The square itself, (C, side, side)."""
    height, width = pixels.shape[:2]
    top, left = (square.side - height) // 2, (square.side - width) // 2
    whole = np.empty((square.side, square.side, *pixels.shape[2:]), np.uint8)
    whole[...] = square.colour
    whole[top : top + height, left : left + width] = pixels
    return np.moveaxis(np.atleast_3d(whole), 2, 0)


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (3,)]))
@settings(deadline=None)
def test_a_square_that_is_never_built_has_the_average_of_the_built_one(draw, height, width, more):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, *more), np.uint8)
    square, _ = pictures.to_square(pixels, "pad")
    size = draw.draw(st.integers(1, square.side))
    assert np.array_equal(square.average(size), area_average(built(pixels, square), size))


@pytest.mark.parametrize("shape", [(1300, 900, 3), (900, 1300), (1100, 1100, 3), (1, 4000)])
def test_large_pictures_are_averaged_in_blocks_to_the_same_bytes(shape):
    square, _ = pictures.to_square(noise(*shape), "pad")
    assert np.array_equal(square.average(37), area_average(built(noise(*shape), square), 37))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255), st.floats(0, 0.99))
@settings(deadline=None)
def test_the_padding_of_a_tile_counts_as_if_it_were_built(height, width, level, share):
    pixels = np.random.default_rng(height).integers(level, 256, (height, width, 3), np.uint8)
    square, _ = pictures.to_square(pixels, "pad")
    whole = np.moveaxis(built(pixels, square), 0, 2)
    assert tiles.kind(pixels, share, square.around, square.colour) == tiles.kind(whole, share)


@pytest.mark.parametrize("shape", [(40, 12000, 3), (12000, 40), (1, 400_000)])
def test_memory_is_bounded_by_the_pixels_and_not_by_the_square(tmp_path, shape):
    Image.fromarray(noise(*shape)).save(tmp_path / "x.png", compress_level=1)
    block = files.Block("block", (File.of(tmp_path / "x.png"),), ((),))
    how = files.Reading(64, channels=3 if shape[2:] else 1, blanks=tiles.Blanks("report"))
    tracemalloc.start()
    read = files.read_block(block, how)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.images[0].shape == (how.channels, 64, 64)
    assert peak < 2**25 + 16 * np.prod(shape)
