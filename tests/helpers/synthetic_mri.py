"""Small MRI volumes written as MetaImage, NIfTI and DICOM, for the tests of data_prep."""

from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import FileMetaDataset

TILT = 0.2  # rad about the left-right axis, as scanners do
DIRECTION = np.array(
    [[1, 0, 0], [0, np.cos(TILT), np.sin(TILT)], [0, -np.sin(TILT), np.cos(TILT)]]
)
SPACING = (1.0, 1.0, 3.0)
ORIGIN = (-20.0, -30.0, 10.0)


def image_of(array, spacing=SPACING, origin=ORIGIN, direction=DIRECTION):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(np.asarray(direction).ravel())
    return image


def write(path: Path, array, compressed=True, **place) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image_of(array, **place), str(path), useCompression=compressed)
    return path


def write_dicom(folder: Path, array, names=None, numbers=None, change=None, series="7") -> list:
    """One file per slice (rows, columns) of uint16 ``array``; ``change(k, dataset)`` alters it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k, pixels in enumerate(array):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        found = pydicom.Dataset()
        found.file_meta = meta
        found.Modality = "MR"
        found.SeriesDescription = "t2_tse_tra"
        found.SeriesNumber = series
        found.SeriesInstanceUID = f"1.2.3.{series}"
        found.InstanceNumber = int(numbers[k] if numbers else k + 1)
        found.ImagePositionPatient = list(ORIGIN + DIRECTION[:, 2] * SPACING[2] * k)
        found.ImageOrientationPatient = [*DIRECTION[:, 0], *DIRECTION[:, 1]]
        found.PixelSpacing = [SPACING[1], SPACING[0]]
        found.Rows, found.Columns = pixels.shape
        found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
        found.BitsAllocated, found.BitsStored, found.HighBit = 16, 16, 15
        found.PixelRepresentation = 0
        found.PixelData = pixels.astype("<u2").tobytes()
        if change:
            change(k, found)
        path = folder / (names[k] if names else f"1-{k + 1:02d}.dcm")
        pydicom.dcmwrite(path, found, enforce_file_format=True)
        files.append(path)
    return files


def truncate(path: Path, share: float) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path
