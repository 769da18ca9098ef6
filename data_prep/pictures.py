"""One image file to one square uint8 image, or one clear sentence."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep import crop, decoding
from hallulib import UserError
from hallulib.data.checks import map_array

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".npy"}
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # whatever the name: others run programs, as PostScript


def read(file: Path, grey: bool = False, notes: list[str] | None = None) -> np.ndarray:
    """Pixels of a PNG, JPEG, TIFF, BMP or .npy file.

    Args:
        file: upright after its EXIF orientation; black lies under what is transparent, and of
            several pictures in a JPEG, as phones write them, the first is taken.
        grey: turn colour into luminance.
        notes: what was odd is added here.

    Returns:
        (H, W) or (H, W, 3), uint8 as stored, or float64 for what is deeper or signed, greater
        where it is brighter.

    Raises:
        UserError: unreadable, truncated, too large, several images in one, not finite, wholly
            transparent, deeper than 8 bits in colour or with transparency, which Pillow would
            cut, or of a meaning that the file does not tell.
    """
    odd = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if file.suffix.lower() == ".npy":
                pixels = _array(file)
            else:
                pixels, odd = _picture(file, grey)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{file}: more than {Image.MAX_IMAGE_PIXELS} pixels; cut it into smaller images"
        ) from error
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{file}: not a whole image of a kind that is read; replace or remove it, or save it"
            " as 8-bit PNG or as .npy"
        ) from error
    except Exception as error:  # a damaged file makes Pillow throw nearly anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a whole image ({told}); replace or remove it") from error
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise UserError(
            f"{file}: shape {pixels.shape}; (height, width) or (height, width, 3) needed"
        )
    if not np.isfinite(pixels).all():
        raise UserError(f"{file}: pixels are NaN or infinite; every pixel must be a finite number")
    if notes is not None:
        notes += odd
    return luminance(pixels) if grey and pixels.ndim == 3 else pixels


def to_bytes(pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Deeper or signed images from their 0.5th..99.5th percentile to 0..255; uint8 as it is.

    Returns:
        uint8 of the same shape, and notes.
    """
    if pixels.dtype == np.uint8:
        told = "8-bit image with values up to 1 only: nearly black"
        return pixels, [told] if pixels.max() == 1 else []
    black, white = crop.ends(pixels)
    if black == white:
        return np.zeros(pixels.shape, np.uint8), ["constant image set to black"]
    told = "image deeper than 8 bits or signed, scaled by percentiles"
    return crop.to_bytes(pixels, black, white), [told]


@dataclass(frozen=True)
class Square:
    """A picture in the middle of a square of one colour, which is never built.

    Args:
        pixels: uint8 (H, W) or (H, W, C).
        side: of the square, at least H and W.
        colour: uint8 () or (C,), around the picture.
    """

    pixels: np.ndarray
    side: int
    colour: np.ndarray

    @property
    def around(self) -> int:
        """How many pixels lie around the picture."""
        height, width = self.pixels.shape[:2]
        return self.side**2 - height * width

    def average(self, size: int) -> np.ndarray:
        """The square made smaller, to the byte as `hallulib.data.checks.area_average` would.

        Averaged along the longer axis first, so that memory is bounded by the pixels of the
        picture, however long it is.

        Args:
            size: at most the side.

        Returns:
            uint8 (C, size, size).
        """
        x = np.atleast_3d(self.pixels)
        wide = x.shape[1] > x.shape[0]
        x = x.swapaxes(0, 1) if wide else x
        step = max(1, 2**20 // x[:, :1].size)  # bounds the copy in int64 to 8 MB, or one line
        reduced = [
            self._sums(x[:, start : start + step].astype(np.int64) - self.colour, size)
            for start in range(0, x.shape[1], step)
        ]
        sums = self._sums(np.concatenate(reduced, axis=1).swapaxes(0, 1), size)
        sums = sums.transpose(2, 0, 1) if wide else sums.T
        sums = sums + self.colour.astype(np.int64).reshape(-1, 1, 1) * self.side**2
        return np.rint(sums / self.side**2).astype(np.uint8, order="C")

    def _sums(self, x: np.ndarray, size: int) -> np.ndarray:
        """Sums of x (length, ...) over each of the new pixels along the side, times size, exact.

        They are differences of the integral of x up to the edges of the new pixels.
        """
        first = (self.side - len(x)) // 2
        edges = np.arange(size + 1) * self.side - first * size
        whole, part = np.divmod(np.clip(edges, 0, len(x) * size), size)
        integral = np.concatenate([np.zeros_like(x[:1]), np.cumsum(x, axis=0)])
        next_pixel = x[np.minimum(whole, len(x) - 1)]  # with part 0 at the end
        part = part.reshape(-1, *[1] * (x.ndim - 1))
        return np.diff(size * integral[whole] + part * next_pixel, axis=0)


def to_square(pixels: np.ndarray, fit: str) -> tuple[Square, list[str]]:
    """Makes (H, W, ...) square around its centre.

    Args:
        pixels: uint8.
        fit: ``"pad"`` to the longer side with the median of the border, so that the background
            goes on, black or white; ``"crop"`` to the shorter.

    Returns:
        The square, and notes.
    """
    height, width = pixels.shape[:2]
    side = min(height, width) if fit == "crop" else max(height, width)
    notes = []
    if height != width:
        notes = [f"image {'cropped' if fit == 'crop' else 'padded'} to a square"]
    top, left = max(0, height - side) // 2, max(0, width - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return Square(pixels, side, np.rint(np.median(border, axis=0)).astype(np.uint8)), notes


def _array(file: Path) -> np.ndarray:
    pixels = map_array(file)
    if pixels.size > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if pixels.dtype == bool:  # a mask: white where it is true, as in pictures of 1 bit
        return pixels * np.uint8(255)
    if pixels.dtype.kind not in "uif":
        raise ValueError(f"type {pixels.dtype}, numbers needed")
    return np.array(pixels, np.uint8 if pixels.dtype == np.uint8 else np.float64)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) as (H, W) by ITU-R 601; uint8 as a picture of these pixels would be."""
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))
    return pixels @ np.array([0.299, 0.587, 0.114])


def _picture(file: Path, grey: bool) -> tuple[np.ndarray, list[str]]:
    with file.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
        several = getattr(image, "n_frames", 1)
        if several > 1 and image.format != "MPO":  # the others show the same once more
            raise UserError(f"{file}: {several} images in one file; save each in its own")
        pixels, notes = decoding.decode(image, grey, str(file))
    return pixels, notes + ["first of several pictures in a JPEG taken"] * (several > 1)
