"""What the numbers of a picture mean, where Pillow alone would show others."""

import re

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hallulib import UserError

PHOTOMETRIC, COLOUR_MAP, SAMPLE_FORMAT, SUBSAMPLING = 262, 320, 339, 530  # tags of TIFF
SIGNED = 2  # in the tag SAMPLE_FORMAT; 1 is unsigned, 3 is float
OPAQUE = np.array(255, np.uint8)


def decode(image: Image.Image, grey: bool, where: str) -> tuple[np.ndarray, list[str]]:
    """Pixels of an image that is open and not loaded yet.

    Args:
        image: opened through a stream: what is opened by path Pillow may map into memory, and
            then it takes rows for columns where an orientation turns the picture.
        grey: turn colour into luminance.
        where: the file, for messages.

    Returns:
        (H, W) or (H, W, 3), upright, on black where it is transparent; uint8, or float64 if it is
        deeper or signed, greater where it is brighter. And notes.

    Raises:
        UserError: Pillow would cut its bits or guess its meaning, or nothing in it is opaque.
    """
    doubt = _doubt(image)
    if doubt:
        raise UserError(f"{where}: {doubt}")
    _mend(image)
    image.load()
    upright = ImageOps.exif_transpose(image)
    deep = _is_deep(image)
    pixels, alpha = _numbers(upright, _tags(image)) if deep else _flat(upright, grey)
    if not alpha.any():
        raise UserError(
            f"{where}: every pixel is transparent; save it without transparency or remove it"
        )
    return pixels, ["transparent pixels shown on black"] if alpha.min() < 255 else []


def _doubt(image: Image.Image) -> str:
    """Why the pixels would be others than those that are meant, and what is needed; or ""."""
    tags, bits = _tags(image), _bits(image)
    if bits > 8 and not _is_deep(image):
        return (
            f"{bits} bits per channel in colour or with transparency would be cut to 8; 8 bits,"
            " grey alone or a .npy file are needed"
        )
    if tags and PHOTOMETRIC not in tags:
        return "no tag 262, which tells whether 0 is black or white; save it with this tag"
    if image.mode == "P" and max(tags.get(COLOUR_MAP, [256])) < 256:
        return "colours of 8 bits where TIFF has 16, so all would be black; save it as PNG"
    if image.mode == "YCbCr" and tags.get(SUBSAMPLING) != (1, 1):
        return "unpacked YCbCr with fewer colours than pixels; save it as RGB"
    if image.mode == "CMYK" and not tags and "adobe" not in image.info:
        return "CMYK that does not tell whether 0 is full ink or none; save it as RGB"
    return ""


def _mend(image: Image.Image) -> None:
    """Corrects what Pillow believes of an image that is not loaded yet."""
    for place, tile in enumerate(image.tile):
        if tile.codec_name == "libtiff":  # it has turned the bytes of big-endian files already
            raw = re.sub("B([SF])$", r"N\1", tile.args[0])
            image.tile[place] = tile._replace(args=(raw, *tile.args[1:]))
        if tile.codec_name == "zip" and image.mode == "L" and "transparency" in image.info:
            # of 2 or 4 bits, while the pixels will be stretched to 8
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(tile.args, 1)


def _numbers(image: Image.Image, tags: dict) -> tuple[np.ndarray, np.ndarray]:
    """Grey numbers by their sign and polarity, float64, and alpha.

    Pillow turns grey of 8 bits or less where 0 is white, nothing else, and knows no signed 8 bits
    and no unsigned 32 bits.
    """
    stored = np.asarray(image)
    if image.mode == "L":
        stored = stored.view(np.int8)
    if image.mode == "I" and SIGNED not in tags.get(SAMPLE_FORMAT, (1,)):
        stored = stored.view(np.uint32)
    values = stored.astype(np.float64)
    values = -values if tags.get(PHOTOMETRIC) == 0 else values
    seen = values != image.info.get("transparency", np.nan)
    values[~seen] = values.min(where=seen, initial=np.inf)
    return values, seen * OPAQUE


def _flat(image: Image.Image, grey: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of 8 bits or less as uint8, and alpha."""
    image = image.convert("LA") if image.mode == "La" else image
    flat = "L" if grey or image.mode in ("1", "L", "LA") else "RGB"
    if not image.has_transparency_data:
        return np.array(image.convert(flat)), OPAQUE
    layer = image.convert("RGBA")
    shown = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)
    return np.array(shown.convert(flat)), np.asarray(layer.getchannel("A"))


def _tags(image: Image.Image) -> dict:
    return getattr(image, "tag_v2", {})


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F")) or SIGNED in _tags(image).get(SAMPLE_FORMAT, ())


def _bits(image: Image.Image) -> int:
    """Bits per channel of a file that is not loaded yet; what Pillow makes of it has 8 or less."""
    if image.format == "TIFF":
        return max(_tags(image).get(ExifTags.Base.BitsPerSample, (1,)))
    return 16 if image.format == "PNG" and ";16" in str(image.tile) else 8
