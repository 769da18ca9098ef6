r"""Volumes with their place in space, in one order: feet to head, front to back.

A voxel with index :math:`i` = (slice, row, column) has its centre at

.. math:: p = o + \sum_k i_k s_k

in millimetres, with x to the patient's left, y to the back and z to the head. Slices are put in
order by position and every axis is turned to the direction that its step :math:`s_k` mostly has,
so nothing depends on how files are named, numbered or stored.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from scipy import ndimage

from data_prep.staging import Fault
from data_prep.voxels import NotGrey, read_mha, read_nifti

FINEST, COARSEST = 0.01, 100.0  # mm between voxels; MRI has 0.2 to 10


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


def read_file(path: Path) -> Volume:
    """Reads a MetaImage (.mha) or NIfTI (.nii, .nii.gz) file of one axial volume.

    Args:
        path: the file; its name tells the format.

    Raises:
        Fault: see `read`.
    """
    try:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                told = f"{path}: is a Git LFS pointer; get the file itself"
                raise Fault(told, "Git LFS pointer")
            file.seek(0)
            return read(file, path.suffix, str(path))
    except OSError as error:
        raise _damaged(str(path), type(error).__name__) from error


def read(file: IO[bytes], suffix: str, told: str) -> Volume:
    """Reads one axial volume of an open file, to its end.

    Args:
        file: at its start.
        suffix: ``.mha``, ``.nii`` or ``.gz``.
        told: how messages call it.

    Raises:
        Fault: truncated, damaged, not one grey volume, or not axial.
    """
    try:
        if suffix == ".mha":
            parts = read_mha(file)
        else:
            parts = read_nifti(gzip.open(file) if suffix == ".gz" else file)
    except NotGrey as error:
        sentence = f"{told}: has {error}; one grey volume, stored as it is, is needed"
        raise Fault(sentence, "not a grey volume") from error
    except ValueError as error:
        raise _damaged(told, str(error)) from error
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise _damaged(told, type(error).__name__) from error
    return turned(Volume(*parts), told)


def turned(volume: Volume, told: str) -> Volume:
    """The same voxels with slices to the head, rows to the back and columns to the left.

    Raises:
        Fault: the slices are not axial, or their spacing is none of MRI.
    """
    pixels, origin, steps = volume.pixels, volume.origin.astype(float), volume.steps.astype(float)
    good = np.isfinite(steps).all() and np.isfinite(origin).all()
    if not good or list(np.abs(steps).argmax(axis=1)) != [2, 1, 0]:
        raise Fault(f"{told}: is not an axial volume; axial slices are needed", "not axial")
    if volume.spacing.min() < FINEST or volume.spacing.max() > COARSEST:
        raise Fault(
            f"{told}: its grid ({_grid(volume)}) is none of MRI; voxels of {FINEST:g} to"
            f" {COARSEST:g} mm are needed",
            "impossible spacing",
        )
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


def _damaged(told: str, why: str) -> Fault:
    return Fault(
        f"{told}: is truncated or damaged ({why}); the whole file is needed",
        "truncated or damaged file",
    )


def _grid(volume: Volume) -> str:
    shape = " x ".join(str(n) for n in volume.pixels.shape[::-1])
    return f"{shape} voxels of {' x '.join(f'{s:.2f}' for s in volume.spacing[::-1])} mm"
