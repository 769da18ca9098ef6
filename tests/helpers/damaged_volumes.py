"""What can be wrong in DICOM, MetaImage and NIfTI files: name -> what is done, what must come."""

import gzip
import struct
import zlib
from pathlib import Path

import pydicom
from faults import EITHER, REFUSED


def text(old: bytes, new: bytes):
    """Puts one text in the place of another, of any length."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return change


def bytes_at(place: int, new: bytes):
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place : place + len(new)] = new
        path.write_bytes(content)

    return change


def instead(content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(content)


def tags(**values):
    """DICOM tags; None removes one."""

    def change(path: Path) -> None:
        found = pydicom.dcmread(path)
        for name, value in values.items():
            if value is None:
                del found[name]
            else:
                found[name] = pydicom.DataElement(
                    found[name].tag if name in found else pydicom.datadict.tag_for_keyword(name),
                    pydicom.datadict.dictionary_VR(name),
                    value,
                    validation_mode=pydicom.config.IGNORE,
                )
        pydicom.dcmwrite(path, found)

    return change


def packed_as(syntax: str, pixels: bytes):
    def change(path: Path) -> None:
        found = pydicom.dcmread(path)
        found.file_meta.TransferSyntaxUID = syntax
        found.PixelData = pydicom.encaps.encapsulate([pixels])
        found["PixelData"].is_undefined_length = True
        pydicom.dcmwrite(path, found)

    return change


def zeros(wbits: int, start: bytes = b"") -> bytes:
    """A gigabyte of them, packed after a start."""
    packer = zlib.compressobj(1, wbits=wbits)
    head = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + 64 * block


def deflated_bomb(path: Path) -> None:
    """A kilobyte for each megabyte that it unpacks to."""
    whole = path.read_bytes()
    start = whole.index(b"1.2.840.10008.1.2.1\0") + 20
    head = whole[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    head = head.replace(b"UI\x14\x00", b"UI\x16\x00")
    path.write_bytes(head + zeros(-15))


def nested(path: Path) -> None:
    """Sequences in sequences; pydicom could read but never write them."""
    whole = path.read_bytes()
    place = whole.rindex(b"\xe0\x7f\x10\x00OW")
    begin = b"\x28\x00\x10\x30SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + b"\xff" * 4
    end = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    path.write_bytes(whole[:place] + begin * 5000 + end * 5000 + whole[place:])


DICOM = {
    "vast": (tags(Rows=65535, Columns=65535), REFUSED),
    "frames without end": (tags(NumberOfFrames="999999999"), REFUSED),
    "no frame": (tags(NumberOfFrames="-1"), REFUSED),
    "no rows": (tags(Rows=0), REFUSED),
    "no pixels": (tags(PixelData=None), REFUSED),
    "colour": (tags(SamplesPerPixel=3), REFUSED),
    "bits": (tags(BitsAllocated=13), REFUSED),
    "slope": (tags(RescaleSlope="nan", RescaleIntercept="0"), REFUSED),
    "unpacks to a gigabyte": (deflated_bomb, REFUSED),
    "no JPEG": (packed_as("1.2.840.10008.1.2.4.90", b"\0\0\0\x0cjP  "), REFUSED),
    "no run lengths": (
        packed_as("1.2.840.10008.1.2.5", struct.pack("<16I", 1, 64, *[0] * 14)),
        REFUSED,
    ),
    "no known packing": (packed_as("1.2.3.4", b"????"), REFUSED),
    "no mark": (bytes_at(128, b"ABCD"), REFUSED),
    "a length of megabytes": (text(b"OW\0\0", b"OW\0\0\xfe\xff\xff\x0f"), EITHER),
}
FILM = DICOM | {
    "window of no width": (tags(WindowCenter="5", WindowWidth="0"), REFUSED),
    "window of infinite width": (tags(WindowCenter="5", WindowWidth="inf"), REFUSED),
    "two shapes": (tags(PresentationLUTShape=["INVERSE", "IDENTITY"]), REFUSED),
    "deep": (nested, REFUSED),
}
SLICE = DICOM | {
    "nowhere": (tags(ImagePositionPatient=["nan", "0", "0"]), REFUSED),
    "no place": (tags(ImagePositionPatient=None), REFUSED),
    "elsewhere": (tags(ImagePositionPatient=["0", "0", "9999"]), REFUSED),
    "no direction": (tags(ImageOrientationPatient=["0"] * 6), REFUSED),
    "another direction": (tags(ImageOrientationPatient=["1", "0", "0", "0", "0", "1"]), REFUSED),
    "no spacing": (tags(PixelSpacing=["0", "0"]), REFUSED),
    "another number": (tags(PixelSpacing=["1"]), REFUSED),
}
MHA = {
    "a terabyte": (text(b"DimSize = 8 9 4", b"DimSize = 10000 10000 10000"), REFUSED),
    "a negative size": (text(b"DimSize = 8 9 4", b"DimSize = -8 -9 4"), REFUSED),
    "no size": (text(b"DimSize = 8 9 4", b"DimSize = 0 9 4"), REFUSED),
    "a size in words": (text(b"DimSize = 8 9 4", b"DimSize = a b c"), REFUSED),
    "two sizes": (text(b"DimSize =", b"DimSize = 9999 9999 9999\nDimSize ="), REFUSED),
    "four dimensions": (text(b"NDims = 3", b"NDims = 4"), REFUSED),
    "another file": (text(b"= LOCAL", b"= /etc/passwd"), REFUSED),
    "another file by a colon": (
        text(b"ElementDataFile =", b"ElementDataFile : /etc/passwd =\nElementDataFile ="),
        REFUSED,
    ),
    "a list of files": (text(b"= LOCAL", b"= LIST"), REFUSED),
    "unknown voxels": (text(b"MET_USHORT", b"MET_OTHER"), REFUSED),
    "colours": (text(b"NDims", b"ElementNumberOfChannels = 3\nNDims"), REFUSED),
    "no spacing": (text(b"ElementSpacing = 1 1 3", b"ElementSpacing = 0 0 0"), REFUSED),
    "spacing of NaN": (text(b"ElementSpacing = 1 1 3", b"ElementSpacing = nan 1 3"), REFUSED),
    "no direction": (text(b"TransformMatrix = 1", b"TransformMatrix = 0"), REFUSED),
    "spacing finer than any": (
        text(b"ElementSpacing = 1 1 3", b"ElementSpacing = 1e-6 1 3"),
        REFUSED,
    ),
    "negative spacing": (text(b"ElementSpacing = 1 1 3", b"ElementSpacing = 1 1 -3"), REFUSED),
    "no field of spacing": (text(b"ElementSpacing", b"ElementSize"), REFUSED),
    "place of infinity": (text(b"Offset = -20", b"Offset = inf"), REFUSED),
    "two places": (text(b"Offset =", b"Position = 1 2 3\nOffset ="), REFUSED),
    "no field of direction": (text(b"TransformMatrix", b"TransformMatriy"), REFUSED),
    "a longer direction": (text(b"TransformMatrix = 1", b"TransformMatrix = 2"), REFUSED),
    "a skewed direction": (text(b"TransformMatrix = 1 0", b"TransformMatrix = 1 0.01"), REFUSED),
    "a header before the voxels": (text(b"NDims", b"HeaderSize = 6\nNDims"), REFUSED),
    "a header of any size": (text(b"NDims", b"HeaderSize = -1\nNDims"), REFUSED),
    "inches": (text(b"NDims", b"DistanceUnits = in\nNDims"), REFUSED),
    "grey levels turned round": (
        text(b"NDims", b"ElementToIntensityFunctionSlope = -1\nNDims"),
        REFUSED,
    ),
    "voxels in words": (text(b"BinaryData = True", b"BinaryData = False"), REFUSED),
    "an order of bytes that is none": (text(b"OrderMSB = False", b"OrderMSB = Fals"), REFUSED),
    "two orders of bytes": (text(b"NDims", b"ElementByteOrderMSB = True\nNDims"), REFUSED),
    "packed, it says": (text(b"CompressedData = False", b"CompressedData = True"), REFUSED),
    "fewer slices": (text(b"DimSize = 8 9 4", b"DimSize = 8 9 3"), REFUSED),
    "fewer bits": (text(b"MET_USHORT", b"MET_UCHAR"), REFUSED),
    "a pattern of files": (text(b"= LOCAL", b"= x%03d.raw 1 4 1"), REFUSED),
    "no end of the header": (instead(b"A = b\n" * 10**5), REFUSED),
    "one line": (instead(b"A" * 10**6), REFUSED),
}


def nifti(place: int, form: str, *values):
    """A field of the header, packed again where the file was."""

    def change(path: Path) -> None:
        unpacked = path.suffix != ".gz"
        content = bytearray(path.read_bytes() if unpacked else gzip.decompress(path.read_bytes()))
        struct.pack_into(form, content, place, *values)
        path.write_bytes(content if unpacked else gzip.compress(content))

    return change


def unpacks_without_end(path: Path) -> None:
    path.write_bytes(zeros(31, gzip.decompress(path.read_bytes())))


def mha_without_end(path: Path) -> None:
    head, mark, packed = path.read_bytes().partition(b"LOCAL\n")
    head = b"\n".join(line for line in head.split(b"\n") if b"DataSize" not in line)
    path.write_bytes(head + mark + zeros(15, zlib.decompress(packed)))


def flipped_voxels(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


PACKED = {
    **{
        name: MHA[name] for name in ("a terabyte", "a negative size", "fewer slices", "fewer bits")
    },
    "not packed, it says": (text(b"CompressedData = True", b"CompressedData = False"), REFUSED),
    "another packed size": (text(b"DataSize = ", b"DataSize = 1"), REFUSED),
    "a flipped bit of its voxels": (flipped_voxels, REFUSED),
    "no checksum": (lambda path: path.write_bytes(path.read_bytes()[:-4]), REFUSED),
    "another volume behind": (lambda path: path.write_bytes(path.read_bytes() * 2), REFUSED),
    "unpacks to a gigabyte": (mha_without_end, REFUSED),
}


NIFTI = {
    "a terabyte": (nifti(40, "<8h", 3, 32767, 32767, 1000, 1, 1, 1, 1), REFUSED),
    "a terabyte of no bits": (nifti(40, "<8h22xh", 3, *[32767] * 3, *[1] * 4, 0), REFUSED),
    "a negative size": (nifti(40, "<8h", 3, -8, -9, 4, 1, 1, 1, 1), REFUSED),
    "no dimension": (nifti(40, "<h", 0), REFUSED),
    "nine dimensions": (nifti(40, "<h", 9), REFUSED),
    "four dimensions": (nifti(40, "<8h", 4, 8, 9, 2, 2, 1, 1, 1), REFUSED),
    "colours": (nifti(70, "<2h", 128, 24), REFUSED),
    "fewer bits than its type": (nifti(72, "<h", 8), REFUSED),
    "voxels in another file": (nifti(344, "<4s", b"ni1"), REFUSED),
    "no start": (nifti(108, "<f", float("nan")), REFUSED),
    "a start without end": (nifti(108, "<f", float("inf")), REFUSED),
    "a start before the file": (nifti(108, "<f", -1e9), REFUSED),
    "no spacing": (nifti(76, "<8f", *[0.0] * 8), REFUSED),
    "negative spacing": (nifti(84, "<f", -1), REFUSED),
    "spacing of infinity": (nifti(84, "<f", float("inf")), REFUSED),
    "place of NaN": (nifti(256, "<6f", *[float("nan")] * 6), REFUSED),
    "no place": (nifti(252, "<2h", 0, 0), REFUSED),
    "two places": (nifti(268, "<f", 5.0), REFUSED),
    "two directions": (nifti(76, "<f", -1.0), REFUSED),
    "a place by a skewed matrix alone": (nifti(252, "<2h24x2f", 0, 1, 1.0, 0.1), REFUSED),
    "a quaternion longer than one": (nifti(256, "<f", 1.5), REFUSED),
    "a slope of NaN": (nifti(112, "<f", float("nan")), REFUSED),
    "a slope of infinity": (nifti(112, "<f", float("inf")), REFUSED),
    "grey levels turned round": (nifti(112, "<f", -1.0), REFUSED),
    "a unit of no length": (nifti(123, "<B", 7), REFUSED),
    "fewer slices": (nifti(46, "<h", 3), REFUSED),
    "a start between bytes": (nifti(108, "<f", 352.5), REFUSED),
    "a later start": (nifti(108, "<f", 354.0), REFUSED),
}

DAMAGE = {
    "film": FILM,
    "series": SLICE,
    "mha": MHA,
    "mha, packed": PACKED,
    "nii": NIFTI,
    "nii.gz": {name: NIFTI[name] for name in ("a terabyte", "a terabyte of no bits")}
    | {"unpacks to a gigabyte": (unpacks_without_end, REFUSED)},
}
