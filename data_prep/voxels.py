r"""MetaImage (.mha) and NIfTI-1 files: the voxels of one grey volume and their place.

What is read is what was checked. Each field that decides voxels or place must be there, once, and
possible; the voxels must be as many bytes as it declares, up to the end of the file, so that the
checksum of a packed stream is always reached. No file can tell a changed digit of an offset, nor a
changed voxel that is not packed.

Source:
    itk.org/Wiki/ITK/MetaIO/Documentation and nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h.
"""

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import numpy as np
from scipy.spatial.transform import Rotation

LARGEST = 2**27  # voxels; the largest T2W volumes have about 2**25
MHA = {"CHAR": "i1", "SHORT": "i2", "INT": "i4", "LONG": "i4", "LONG_LONG": "i8"}
MHA |= {f"U{name}": kind.replace("i", "u") for name, kind in MHA.items()}
MHA |= {"FLOAT": "f4", "DOUBLE": "f8"}
NIFTI = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}
NIFTI |= {256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
ONLY = {  # fields that may be absent; any other value makes it another image
    "BinaryData": "True",
    "DistanceUnits": "mm",
    "ElementNumberOfChannels": "1",
    "ElementToIntensityFunctionOffset": "0",
    "ElementToIntensityFunctionSlope": "1",
    "HeaderSize": "0",
}
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metres, mm, micrometres
ORTHONORMAL = 1e-3  # directions may be off by this, as rounding leaves them
VAST = 2.0**40  # no size and no length is
BLOCK = 2**20

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


class NotGrey(ValueError):
    """A whole file, but not of one grey volume as it was stored."""


def read_mha(file: IO[bytes]) -> Parts:
    """Reads a MetaImage with its voxels in the same file.

    Returns:
        pixels (slices, rows, columns), origin (3,) and steps (3, 3) as in `volumes.Volume`, in the
        order of the file.

    Raises:
        NotGrey: other dimensions, channels or units.
        ValueError: damaged; the text quotes nothing of the file.
    """
    header = _fields(file)
    shape = [int(n) for n in _numbers(header, len(_one(header, "DimSize").split()), "DimSize")]
    if len(shape) != 3 or _one(header, "NDims") != "3":
        raise NotGrey("other dimensions than three")
    for name, value in ONLY.items():
        if header.get(name, value) != value:
            raise NotGrey(f"{name} that is not {value}")
    order = _one(header, "BinaryDataByteOrderMSB", "ElementByteOrderMSB")
    order = ">" if _true(order, "byte order") else "<"
    kind = MHA.get(_one(header, "ElementType").removeprefix("MET_"))
    size = _size(shape, kind)
    packed = _true(_one(header, "CompressedData"), "CompressedData")
    voxels = _unpacked(file, size, header) if packed else _taken(file, size)
    spacing = _numbers(header, 3, "ElementSpacing")
    directions = _numbers(header, 9, "TransformMatrix", "Rotation", "Orientation").reshape(3, 3)
    origin = _numbers(header, 3, "Offset", "Position", "Origin")
    return _pixels(file, voxels, order + kind, shape), origin, _steps(directions, spacing)


def read_nifti(file: IO[bytes]) -> Parts:
    """Reads a NIfTI-1 file with its voxels in the same file.

    Returns:
        See `read_mha`; NIfTI's x and y, to the right and to the front, are turned round.

    Raises:
        NotGrey: other dimensions, colours or voxels that are to be scaled.
        ValueError: damaged, or its two forms of the place disagree.
        struct.error: no whole header.
    """
    header = file.read(348)
    order = "<" if header[:4] == struct.pack("<i", 348) else ">"

    def field(place: int, form: str) -> tuple:
        return struct.unpack_from(order + form, header, place)

    n, *shape = field(40, "8h")
    (kind, bits), (start, slope, shift) = field(70, "2h"), field(108, "3f")
    # any other mark leaves the voxels to another file
    if field(0, "i") != (348,) or header[344:] != b"n+1\0" or not 1 <= n <= 7:
        raise ValueError("no header of NIfTI-1")
    if not 348 <= start <= 2**24 or start % 1:
        raise ValueError("no start of the voxels")
    if n < 3 or any(more != 1 for more in shape[3:n]):
        raise NotGrey(f"dimensions {shape[:n]}")
    if slope != 0 and (slope, shift) != (1, 0):  # NaN is none of them
        raise NotGrey("voxels that are to be scaled")
    size = _size(shape[:3], NIFTI.get(kind))
    if bits != 8 * np.dtype(NIFTI[kind]).itemsize:
        raise ValueError("other bits than its type")
    origin, steps = _nifti_place(field, shape[:3])
    _taken(file, int(start) - 348)
    return _pixels(file, _taken(file, size), order + NIFTI[kind], shape[:3]), origin, steps


def _fields(file: IO[bytes]) -> dict[str, str]:
    """The header of a MetaImage, each key once."""
    header = {}
    while "ElementDataFile" not in header:
        key, mark, value = file.readline(4096).decode("latin-1").partition("=")
        key = key.strip()
        # other readers take a colon for the mark, and the first of two equal keys
        if not mark or ":" in key or key in header:
            raise ValueError("no header of a MetaImage")
        header[key] = value.strip()
    if header["ElementDataFile"] != "LOCAL":  # a header may name any file of the machine
        raise ValueError("voxels elsewhere")
    return header


def _one(header: Mapping[str, str], *names: str) -> str:
    """The value of a field that has several names."""
    found = [header[name] for name in names if name in header]
    if len(found) != 1:
        raise ValueError(f"{len(found)} fields {names[0]}")
    return found[0]


def _numbers(header: Mapping[str, str], n: int, *names: str) -> np.ndarray:
    try:
        found = np.array([float(word) for word in _one(header, *names).split()])
    except ValueError:  # its text may hold what the file says
        found = np.array([np.nan])
    if len(found) != n or not (np.abs(found) < VAST).all():
        raise ValueError(f"no {n} numbers as {names[0]}")
    return found


def _true(value: str, name: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name} neither true nor false")
    return value.lower() == "true"


def _size(shape: Sequence[int], kind: str | None) -> int:
    """Bytes of the voxels that a header declares."""
    if kind is None:
        raise NotGrey("no type of grey values")
    if min(shape) < 1 or math.prod(shape) > LARGEST:
        raise ValueError("impossible size")
    return math.prod(shape) * np.dtype(kind).itemsize


def _taken(file: IO[bytes], n: int) -> bytearray:
    """So many bytes; memory grows with what is there, not with what is declared."""
    found = bytearray()
    while len(found) < n and (block := file.read(min(BLOCK, n - len(found)))):
        found += block
    if len(found) < n:
        raise ValueError("too few voxels")
    return found


def _unpacked(file: IO[bytes], size: int, header: Mapping[str, str]) -> bytearray:
    """The voxels of a packed MetaImage; zlib compares their checksum at the end of the stream."""
    unpack, found, packed = zlib.decompressobj(wbits=47), bytearray(), 0  # zlib's or gzip's frame
    while not unpack.eof and len(found) <= size:
        block = unpack.unconsumed_tail or file.read(BLOCK)
        if not block:
            raise ValueError("too few voxels")
        packed += 0 if unpack.unconsumed_tail else len(block)
        found += unpack.decompress(block, size + 1 - len(found))
    if len(found) != size or unpack.unused_data:
        raise ValueError("other voxels than it declares")
    if "CompressedDataSize" in header and packed != _numbers(header, 1, "CompressedDataSize"):
        raise ValueError("packed voxels of another size")
    return found


def _pixels(file: IO[bytes], voxels: bytearray, kind: str, shape: Sequence[int]) -> np.ndarray:
    """The voxels as an array, once the file is at its end."""
    if file.read(1):
        raise ValueError("more than the voxels it declares")
    pixels = np.frombuffer(voxels, kind).reshape(shape[::-1])
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _nifti_place(field: Callable[[int, str], tuple], shape: Sequence[int]) -> tuple:
    """Origin and steps; of two forms ITK's: the sform if it tells the scanner's place."""
    (turn, *spacing), (units,) = field(76, "4f"), field(123, "B")
    if units & 7 not in MM:
        raise NotGrey(f"lengths of unit {units & 7}")
    q_known, s_known, *turned = field(252, "2h3f")
    spacing, forms = np.reshape(spacing, (3, 1)), []
    if not ((spacing > 0) & (spacing < VAST)).all():  # NaN is not either
        raise ValueError("no spacing")
    if s_known > 0:
        forms.append(np.reshape(field(280, "12f"), (3, 4)).T)
    if q_known > 0:
        directions = _rotation(np.array(turned)) * [1, 1, -1 if turn < 0 else 1]
        forms.append(np.vstack([directions.T * spacing, field(268, "3f")]))
    if not (forms and (np.abs(forms) < VAST).all()):
        raise ValueError("no place in space")
    off = (forms[0] - forms[-1]) @ np.linalg.pinv(forms[-1][:3])
    if ([*shape, 1] @ np.abs(off) > 0.5).any():
        raise ValueError("qform and sform that differ by half a voxel")
    *steps, origin = forms[0 if s_known == 1 else -1] * [-1, -1, 1] * MM[units & 7]
    directions = steps / (spacing * MM[units & 7])
    steps = _steps(directions, spacing * MM[units & 7])
    return origin, steps / np.linalg.norm(directions, axis=1)[::-1, None]


def _rotation(turned: np.ndarray) -> np.ndarray:
    """The matrix of a quaternion of which NIfTI keeps three of four numbers."""
    rest = 1 - turned @ turned
    if not rest >= -ORTHONORMAL:  # NaN is not either
        raise ValueError("a quaternion longer than 1")
    rest = math.sqrt(rest) if rest >= 1e-7 else 0.0  # what is less is rounding
    return Rotation.from_quat([*turned, rest]).as_matrix()


def _steps(directions: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Steps along slices, rows and columns from the directions of columns, rows and slices."""
    off = np.abs(directions @ directions.T - np.eye(3)).max()
    if not (off <= ORTHONORMAL and (spacing > 0).all()):
        raise ValueError("directions that are not orthonormal, or no spacing")
    return (directions * np.reshape(spacing, (3, 1)))[::-1]
