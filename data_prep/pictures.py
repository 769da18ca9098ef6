"""One image file to one square uint8 image, or one clear sentence."""

import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data_prep import crop
from hallulib import UserError
from hallulib.integrity import map_array

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".npy"}
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # whatever the name: others run programs, as PostScript


def read(file: Path, grey: bool = False) -> np.ndarray:
    """Pixels of a PNG, JPEG, TIFF, BMP or .npy file.

    Args:
        file: upright after its EXIF orientation; transparency is dropped.
        grey: turn colour into luminance.

    Returns:
        (H, W) or (H, W, 3), uint8 as stored, or float64 for deeper images.

    Raises:
        UserError: unreadable, truncated, too large, several images in one, not finite, or deeper
            than 8 bits in colour or with transparency, which Pillow would cut.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = _array(file) if file.suffix.lower() == ".npy" else _picture(file, grey)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{file}: more than {Image.MAX_IMAGE_PIXELS} pixels; cut it into smaller images"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file makes Pillow throw nearly anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a whole image ({told}); replace or remove it") from error
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise UserError(
            f"{file}: shape {pixels.shape}; (height, width) or (height, width, 3) needed"
        )
    if not np.isfinite(pixels).all():
        raise UserError(f"{file}: pixels are NaN or infinite; every pixel must be a finite number")
    return _luminance(pixels) if grey and pixels.ndim == 3 else pixels


def to_bytes(pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Deeper images from their 0.5th..99.5th percentile to 0..255; uint8 as it is.

    Returns:
        uint8 of the same shape, and notes.
    """
    if pixels.dtype == np.uint8:
        return pixels, []
    black, white = crop.ends(pixels)
    if black == white:
        return np.zeros(pixels.shape, np.uint8), ["constant image set to black"]
    return crop.to_bytes(pixels, black, white), ["image deeper than 8 bits, scaled by percentiles"]


def to_square(pixels: np.ndarray, fit: str) -> tuple[np.ndarray, list[str]]:
    """Makes (H, W, ...) square around its centre.

    Args:
        pixels: uint8.
        fit: ``"pad"`` to the longer side with the median of the border, so that the background
            goes on, black or white; ``"crop"`` to the shorter.

    Returns:
        The square, and notes.
    """
    height, width = pixels.shape[:2]
    if height == width:
        return pixels, []
    side = min(height, width) if fit == "crop" else max(height, width)
    top, left = abs(height - side) // 2, abs(width - side) // 2
    if fit == "crop":
        return pixels[top : top + side, left : left + side], ["image cropped to a square"]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    square = np.empty((side, side, *pixels.shape[2:]), np.uint8)
    square[...] = np.rint(np.median(border, axis=0))
    square[top : top + height, left : left + width] = pixels
    return square, ["image padded to a square"]


def _array(file: Path) -> np.ndarray:
    pixels = map_array(file)
    if pixels.size > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"type {pixels.dtype}, numbers needed")
    return np.array(pixels, np.uint8 if pixels.dtype == np.uint8 else np.float64)


def _luminance(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) as (H, W) by ITU-R 601; uint8 as a picture of these pixels would be."""
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))
    return pixels @ np.array([0.299, 0.587, 0.114])


def _picture(file: Path, grey: bool) -> np.ndarray:
    with Image.open(file, formats=FORMATS) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{image.n_frames} images in one file, one needed")
        deep = image.mode.startswith(("I", "F"))
        if not deep and _bits(image) > 8:
            raise UserError(
                f"{file}: {_bits(image)} bits per channel in colour or with transparency would be"
                " cut to 8; 8 bits, grey alone or a .npy file are needed"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if deep:
            return np.asarray(image).astype(np.float64)
        flat = "L" if grey or image.mode in ("1", "L", "LA") else "RGB"
        return np.array(image.convert(flat))


def _bits(image: Image.Image) -> int:
    """Bits per channel of a file that is not loaded yet; what Pillow makes of it has 8 or less."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
    return 16 if image.format == "PNG" and ";16" in str(image.tile) else 8
