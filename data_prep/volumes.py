r"""Volumes with their place in space, in one order: feet to head, front to back.

A voxel with index :math:`i` = (slice, row, column) has its centre at

.. math:: p = o + \sum_k i_k s_k

in millimetres, with x to the patient's left, y to the back and z to the head. Slices are put in
order by position and every axis is turned to the direction that its step :math:`s_k` mostly has,
so nothing depends on how files are named, numbered or stored.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_prep.staging import Fault

LARGEST = 2**29  # bytes of voxels; the largest T2W volumes have about 2**26
BITS = {2: 8, 4: 16, 8: 32, 16: 32, 64: 64, 256: 8, 512: 16, 768: 32, 1024: 64, 1280: 64}  # NIfTI
BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}


@dataclass(frozen=True)
class Volume:
    """Voxels and their place.

    Args:
        pixels: (slices, rows, columns), feet to head, front to back, patient's right to left.
        origin: (3,) centre of the first voxel, mm.
        steps: (3, 3) ``steps[k]`` leads to the next voxel along axis k, mm.
    """

    pixels: np.ndarray
    origin: np.ndarray
    steps: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Distance between slices, rows and columns, mm (3,)."""
        return np.linalg.norm(self.steps, axis=1)


def read_file(path: Path, told: str | None = None) -> Volume:
    """Reads a MetaImage (.mha) or NIfTI (.nii, .nii.gz) file of one axial volume.

    Args:
        path: the file; its name tells the format.
        told: how messages call it; its path by default.

    Raises:
        Fault: truncated, damaged, not one grey volume, or not axial.
    """
    told = told or str(path)
    _check_whole(path, told)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise Fault(
            f"{told}: cannot be read as an image; it is damaged", "damaged file"
        ) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        found = (
            f"{image.GetDimension()} dimensions, {image.GetNumberOfComponentsPerPixel()} channels"
        )
        raise Fault(f"{told}: has {found}; a grey volume is needed", "not a grey volume")
    steps = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()).T[::-1]
    volume = Volume(sitk.GetArrayFromImage(image), np.array(image.GetOrigin()), steps)
    return turned(volume, told)


def turned(volume: Volume, told: str) -> Volume:
    """The same voxels with slices to the head, rows to the back and columns to the left.

    Raises:
        Fault: the slices are not axial.
    """
    pixels, origin, steps = volume.pixels, volume.origin.astype(float), volume.steps.astype(float)
    good = np.isfinite(steps).all() and np.isfinite(origin).all()
    if not good or list(np.abs(steps).argmax(axis=1)) != [2, 1, 0]:
        raise Fault(f"{told}: is not an axial volume; axial slices are needed", "not axial")
    for axis in range(3):
        if steps[axis, 2 - axis] < 0:
            origin = origin + (pixels.shape[axis] - 1) * steps[axis]
            steps[axis] *= -1
            pixels = np.flip(pixels, axis)
    return Volume(pixels, origin, steps)


def on_grid(mask: Volume, image: Volume, told: str) -> np.ndarray:
    """The mask at the voxels of the image: the nearest one of the mask in space.

    The two must cover the same box: no corner may be off by more than half a voxel of the coarser
    grid along any axis. On equal grids that is the mask itself.

    Returns:
        The mask's values in the shape of the image.

    Raises:
        Fault: the boxes differ.
    """
    ends = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in mask.pixels.shape]), -1).reshape(-1, 3)
    to_image = np.linalg.inv(image.steps)
    placed = (mask.origin + ends @ mask.steps - image.origin) @ to_image
    wanted = (ends + 0.5) / mask.pixels.shape * image.pixels.shape - 0.5
    off = np.abs(placed - wanted) * image.spacing
    if (off > np.maximum(mask.spacing, image.spacing) / 2).any():
        raise Fault(
            f"{told}: its grid ({_grid(mask)}) lies up to {off.max():.1f} mm off the image's"
            f" ({_grid(image)}); a mask of the same field of view is needed",
            "mask of other geometry",
        )
    to_mask = np.linalg.inv(mask.steps)
    return ndimage.affine_transform(
        mask.pixels,
        (image.steps @ to_mask).T,
        (image.origin - mask.origin) @ to_mask,
        image.pixels.shape,
        order=0,
        mode="nearest",
    )


def _check_whole(path: Path, told: str) -> None:
    """Refuses a truncated file; ITK reads a truncated NIfTI file as zeros without a word."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"version https://git-lfs"):
                raise Fault(
                    f"{told}: is a Git LFS pointer; get the file itself", "Git LFS pointer"
                )
            if path.suffix == ".mha":
                whole = _is_whole_mha(file)
            else:
                whole = _is_whole_nifti(gzip.open(file) if path.suffix == ".gz" else file)
    except (OSError, EOFError, ValueError, KeyError, struct.error, zlib.error) as error:
        raise Fault(
            f"{told}: is truncated or damaged ({type(error).__name__}); the whole file is needed",
            "truncated or damaged file",
        ) from error
    if not whole:
        raise Fault(f"{told}: is truncated; the whole file is needed", "truncated or damaged file")


def _is_whole_nifti(file: IO[bytes]) -> bool:
    header = file.read(348)
    order = "<" if header[:4] == struct.pack("<i", 348) else ">"
    (length,) = struct.unpack_from(order + "i", header)
    n, *shape = struct.unpack_from(order + "8h", header, 40)
    kind, bits = struct.unpack_from(order + "2h", header, 70)
    (start,) = struct.unpack_from(order + "f", header, 108)
    # any other mark leaves the voxels to another file
    if (
        length != 348
        or not 1 <= n <= 7
        or header[344:348] != b"n+1\0"
        or not 348 <= start <= LARGEST
    ):
        raise ValueError("not NIfTI-1")
    if BITS.get(kind) != bits:
        raise ValueError("no grey values")
    needed = start + _size(shape[:n], bits // 8)
    found = len(header)
    while found < needed and (block := file.read(2**20)):  # a small file may unpack to terabytes
        found += len(block)
    return found >= needed


def _is_whole_mha(file: IO[bytes]) -> bool:
    header = {}
    while "ElementDataFile" not in header:
        key, mark, value = file.readline(4096).decode("latin-1").partition("=")
        key = key.strip()
        # ITK would take a colon for the mark, and the first of two equal keys
        if not mark or ":" in key or key in header:
            raise ValueError("not MetaImage")
        header[key] = value.strip()
    if header["ElementDataFile"] != "LOCAL":  # a header may name any file of the machine
        raise ValueError("data elsewhere")
    shape = [int(n) for n in header["DimSize"].split()]
    if len(shape) != int(header["NDims"]):
        raise ValueError("other dimensions")
    channels = int(header.get("ElementNumberOfChannels", 1))
    kind = header["ElementType"].removeprefix("MET_")
    size = _size([*shape, channels], BYTES[kind if kind in BYTES else kind.removeprefix("U")])
    if header.get("CompressedData", "").lower() == "true":
        size = int(header.get("CompressedDataSize", 0))
    start = file.tell()
    return file.seek(0, 2) - start >= size


def _size(shape: Sequence[int], each: int) -> int:
    """Bytes that a header declares; ITK takes hold of them before it reads any."""
    size = math.prod(shape) * each
    if min(shape) < 1 or size > LARGEST:
        raise ValueError("impossible size")
    return size


def _grid(volume: Volume) -> str:
    shape = " x ".join(str(n) for n in volume.pixels.shape[::-1])
    return f"{shape} voxels of {' x '.join(f'{s:.2f}' for s in volume.spacing[::-1])} mm"
