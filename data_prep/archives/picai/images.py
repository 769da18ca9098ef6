"""Where the T2W image of each PI-CAI study is: fold zips, folders of .mha files, DICOM series.

Only names and the few header tags of `dicom.HEADER_TAGS` are read here. A file belongs to the
study that its name (``PATIENT_STUDY_t2w.mha``) or, for DICOM, a folder above it tells:
``PATIENT_STUDY``, or ``ProstateX-NNNN`` by the mapping of the labels repository.
"""

import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.dicom import read_header, read_series
from data_prep.staging import File
from data_prep.volumes import Fault, Volume, read, read_file
from data_prep.voxels import LARGEST

T2W = re.compile(r"(\d+_\d+)_t2w\.mha")
STUDY = re.compile(r"\d+_\d+")
PROSTATEX = re.compile(r"prostatex-(\d{4})", re.IGNORECASE)
DATE = re.compile(r"\d\d-\d\d-\d{4}")
BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
BAD_ZIP += (OSError, EOFError, KeyError, ValueError, RuntimeError)  # and NotImplementedError
SECOND = "second T2W image of a study: left out"


@dataclass(frozen=True)
class Source:
    """Where one image is.

    Args:
        kind: ``mha``, ``zip`` or ``dicom``.
        files: one, or one per slice of a DICOM series.
        member: name inside the zip.
    """

    kind: str
    files: tuple[File, ...]
    member: str = ""

    def read(self) -> Volume:
        """The image; a member of a zip is read where it is, and written nowhere.

        Raises:
            Fault: it cannot be read.
        """
        paths = [Path(file.path) for file in self.files]
        if self.kind == "dicom":
            return read_series(paths, str(paths[0].parent))
        if self.kind == "mha":
            return read_file(paths[0])
        told = f"{self.member} in {paths[0]}"
        try:
            with zipfile.ZipFile(paths[0]) as archive, archive.open(self.member) as member:
                if archive.getinfo(self.member).file_size > 8 * LARGEST:
                    raise ValueError("impossible size")
                while member.read(2**20):  # to its end, where its checksum is compared
                    pass
                member.seek(0)
                return read(member, ".mha", told)
        except BAD_ZIP as error:
            raise _bad_zip(told, error) from error


@dataclass
class Images:
    """What was found.

    Args:
        of: study key -> its image.
        notes: what was left out by a rule.
        faults: what cannot be placed; the caller decides.
    """

    of: dict[str, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def find(root: Path, mapping: Mapping[str, str]) -> Images:
    """Lists the T2W image of every study under a folder.

    Of several T2W images of one study, a MetaImage is taken before DICOM, the first by path; of
    DICOM series, the one with most slices, then the finest pixels, then the first series number in
    order of text ("10" before "6").

    Args:
        root: the folder.
        mapping: ``ProstateX-NNNN_mm-dd-yyyy`` -> study key.

    Source:
        The order of DICOM series is that of the converter which made the PI-CAI images
        (github.com/DIAGNijmegen/picai_prep, ``resolve_duplicates``), where folders begin with the
        series number; so image and masks belong together.
    """
    images, ranked, series = Images(), [], {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".zip":
                ranked += _in_zip(path, images.notes)
            elif path.suffix == ".mha":
                ranked += _named(path.name, Source("mha", (File.of(path),)), images.notes)
            elif _is_dicom(path):
                _add_to_series(path, series)
            else:
                images.notes.append("file that is no image: left out")
        except Fault as fault:
            images.faults.append(fault)
    for found in series.values():
        try:
            ranked += _placed(found, mapping, images.notes)
        except Fault as fault:
            images.faults.append(fault)
    for key, _, source in sorted(ranked, key=lambda one: one[:2]):
        images.notes += [SECOND] if key in images.of else []
        images.of.setdefault(key, source)
    return images


def _named(name: str, source: Source, notes: list[str]) -> Iterator[tuple[str, tuple, Source]]:
    match = T2W.fullmatch(name)
    if match:
        yield match[1], (0, source.files[0].path, source.member), source
    else:
        notes.append("MetaImage that is not axial T2W: left out")


def _in_zip(path: Path, notes: list[str]) -> Iterator[tuple[str, tuple, Source]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except BAD_ZIP as error:
        raise _bad_zip(str(path), error) from error
    file = File.of(path)
    for name in names:
        if name.endswith(".mha"):
            yield from _named(name.rpartition("/")[2], Source("zip", (file,), name), notes)
        else:
            notes.append("file in a zip that is no MetaImage: left out")


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            marked = file.read(132)[128:] == b"DICM"
    except OSError as error:
        told = f"{path}: cannot be read ({error.strerror}); a readable file is needed"
        raise Fault(told, "unreadable file") from error
    if path.suffix == ".dcm" and not marked:
        raise Fault(f"{path}: is not a DICOM file; it is damaged", "unreadable DICOM file")
    return marked and path.name != "DICOMDIR"


def _add_to_series(path: Path, series: dict) -> None:
    header = read_header(path)
    uid = str(header.get("SeriesInstanceUID", ""))
    header, files = series.setdefault((path.parent, uid), (header, []))
    files.append(File.of(path))


def _placed(found, mapping: Mapping[str, str], notes: list[str]):
    """The study, rank and source of a series; nothing if it is not axial T2W or not in PI-CAI."""
    header, files = found
    folder = Path(files[0].path).parent
    text = f"{header.get('SeriesDescription', '')} {folder.name}".lower()
    axial, finest = _frame(header, folder)
    named = header.get("Modality") == "MR" and "t2" in text and "loc" not in text
    if named and (header.get("NumberOfFrames") or 1) > 1:
        raise Fault(
            f"{files[0].path}: holds {header.NumberOfFrames} frames; one file per slice is needed"
            " (emf2sf of dcm4che divides it), or the image as PATIENT_STUDY_t2w.mha",
            "DICOM file of several frames",
        )
    if not named or not axial:
        notes.append("DICOM series that is not axial T2W: left out")
        return
    key = _study_of(folder, mapping)
    if key == "":
        notes.append("ProstateX series that is not part of PI-CAI: left out")
        return
    rank = (1, -len(files), finest, str(header.get("SeriesNumber", "")), str(folder))
    yield key, rank, Source("dicom", tuple(files))


def _frame(header, folder: Path) -> tuple[bool, float]:
    """Whether slices are axial, and the larger pixel spacing."""
    try:
        directions = np.array(header.get("ImageOrientationPatient") or np.zeros(6), float)
        normal = np.abs(np.cross(*directions.reshape(2, 3)))
        spacing = np.array(header.get("PixelSpacing") or np.inf, float)
    except (TypeError, ValueError):  # its text may hold what a tag says
        told = f"{folder}: orientation or spacing cannot be read; DICOM with numbers is needed"
        raise Fault(told, "unreadable DICOM file") from None
    return bool(normal.any() and normal.argmax() == 2), float(spacing.max())


def _study_of(folder: Path, mapping: Mapping[str, str]) -> str:
    """Study key told by the folders above a series; "" for a ProstateX study outside PI-CAI."""
    names = folder.absolute().parts[::-1]
    for name in names:
        if STUDY.fullmatch(name):
            return name
        match = PROSTATEX.fullmatch(name)
        if match:
            dates = [date[0] for date in map(DATE.match, names) if date]
            return _mapped(f"ProstateX-{match[1]}", dates, mapping)
    raise Fault(
        f"{folder}: no folder above this series tells its study; one named PATIENT_STUDY or"
        " ProstateX-NNNN is needed",
        "DICOM series of unknown study",
    )


def _mapped(patient: str, dates: Sequence[str], mapping: Mapping[str, str]) -> str:
    if dates:
        return mapping.get(f"{patient}_{dates[0]}", "")
    keys = [key for name, key in mapping.items() if name.startswith(f"{patient}_")]
    if len(keys) > 1:
        raise Fault(
            f"{patient}: {len(keys)} studies and no folder tells the date; a folder named"
            " mm-dd-yyyy is needed",
            "DICOM series of unknown study",
        )
    return keys[0] if keys else ""


def _bad_zip(told: str, error: Exception) -> Fault:
    return Fault(
        f"{told}: cannot be read ({type(error).__name__}); a whole zip without password is needed",
        "unreadable zip",
    )
