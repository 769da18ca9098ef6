"""Small mammograms written as DICOM, for the tests of data_prep."""

from pathlib import Path

import numpy as np
import pydicom
from PIL import Image, ImageDraw
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

NAME, BORN, CODE = "DOE^JANE", "19510704", "ID-4711"  # planted; none may be written anywhere
SHAPE = (96, 64)


def film(seed=0, *, shape=SHAPE, right=False, label="", edge=0) -> np.ndarray:
    """A half ellipse of tissue at one side, uint16; a text in the far corner; a bright frame."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    breast = ((rows - 0.5) / 0.35) ** 2 + (columns / 0.6) ** 2 < 1
    texture = np.random.default_rng(seed).integers(20_000, 60_000, shape)
    pixels = np.where(breast, texture, 300)
    if right:
        pixels = pixels[:, ::-1].copy()
    if label:
        text = Image.new("L", shape[::-1])
        place = (1 if right else shape[1] - 8 * len(label), 1)
        ImageDraw.Draw(text).text(place, label, fill=255)
        pixels[np.array(text) > 128] = 65_000
    if edge:
        frame = np.ones(shape, bool)
        frame[edge:-edge, edge:-edge] = False
        pixels[frame] = 65_000
    return pixels.astype(np.uint16)


def dataset(pixels: np.ndarray, **tags) -> pydicom.Dataset:
    """A mammogram that says who the patient is; ``tags`` are added, None removes one."""
    found = pydicom.Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    found.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    found.PatientName, found.PatientID, found.PatientBirthDate = NAME, CODE, BORN
    found.InstitutionName, found.StudyDate, found.Modality = NAME, BORN, "MG"
    found.ImageComments = NAME
    found.Rows, found.Columns = pixels.shape
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
    found.PixelRepresentation = 0
    found.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def write(path: Path, pixels: np.ndarray, **tags) -> Path:
    return save(path, dataset(pixels, **tags))


def save(path: Path, found: pydicom.Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, found, enforce_file_format=True)
    return path


def negative(path: Path, pixels: np.ndarray, **tags) -> Path:
    """The same picture, stored as MONOCHROME1."""
    return write(path, 65_535 - pixels, PhotometricInterpretation="MONOCHROME1", **tags)


def truncate(path: Path, share: float = 0.6) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def planted(folder: Path, words) -> list[str]:
    """The words that occur in any file of a folder, or in a name."""
    text = b"".join(f.read_bytes() + f.name.encode() for f in folder.rglob("*") if f.is_file())
    return [word for word in words if word.encode() in text]
