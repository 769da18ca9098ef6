"""Nobody's name leaves a DICOM file: not in a set, not in what is said, not in a chapter."""

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pydicom
import pytest
import synthetic_mammogram
import synthetic_mri
import test_cbis_ddsm
import test_inbreast
import test_picai
import test_vindr
from pydicom.datadict import DicomDictionary, dictionary_keyword, dictionary_VR

from conftest import ROOT, size_for_tests
from data_prep import dicom, grey
from data_prep.__main__ import main
from hallulib.data import imageset
from hallulib.notebook import grid

NAME, UID, DATE = "ZQJANSEN", "1.2.987654321.4711", "19301231"
PLANTED = dict.fromkeys("LO SH PN LT ST UT UC AE CS".split(), NAME) | {"UI": UID, "DA": DATE}
SECRETS = [NAME, NAME.lower(), UID, "987654321", DATE, "PIETERSEN"]
# what decides how pixels are read or which series is taken stays as it is
KEPT = {*grey.SHOWN_TAGS, *dicom.IMAGE_TAGS, "Modality", "SpecificCharacterSet"}


def identifiers() -> pydicom.Dataset:
    """Every tag of the standard that holds a text, a private one, and some in sequences."""
    found = pydicom.Dataset()
    for tag in DicomDictionary:
        vr = dictionary_VR(tag)
        if tag >> 16 > 2 and vr in PLANTED and dictionary_keyword(tag) not in KEPT:
            found.add_new(tag, vr, PLANTED[vr])
    found.SeriesDescription = f"t2_tse_tra {NAME}"
    found.private_block(0x0013, NAME, create=True).add_new(0x10, "LO", NAME)
    inner, outer = pydicom.Dataset(), pydicom.Dataset()
    inner.PatientName, inner.PatientComments = f"{NAME}^PIETERSEN", NAME
    outer.ReferencedStudySequence = [inner]
    found.ReferencedStudySequence = found.RequestAttributesSequence = [outer]
    return found


def plant(root: Path) -> list[Path]:
    """Plants identifiers in all DICOM files; returns them."""
    files = [file for file in sorted(root.rglob("*")) if file.suffix in (".dcm", ".dicom")]
    told = identifiers()
    for file in files:
        found = pydicom.dcmread(file)
        found.update(told)
        pydicom.dcmwrite(file, found)
        assert NAME.encode() in file.read_bytes()
    return files


def picai(root: Path) -> list:
    studies = {key: test_picai.STUDIES[key] for key in ("10000_1000000", "10003_1000003")}
    for key in studies:
        series = root / "images" / key / f"{NAME}^PIETERSEN"
        synthetic_mri.write_dicom(series, test_picai.image_of(key))
    labels = test_picai.make_labels(root / "labels", studies)
    return ["picai", root / "images", labels, None, *test_picai.SMALL]


def cbis_ddsm(root: Path) -> list:
    images = test_cbis_ddsm.make_images(root / "images")
    for folder in sorted(images.glob("*/*-DDSM-*")):
        folder.rename(folder.with_name(NAME))
    tables = test_cbis_ddsm.make_tables(root / "tables", test_cbis_ddsm.ROWS)
    return ["cbis_ddsm", images, tables, None, "--size=16", "--workers=1"]


def inbreast(root: Path) -> list:
    folder = test_inbreast.make(root / NAME)
    synthetic_mammogram.write(folder / "AllDICOMs" / f"{NAME}.dcm", synthetic_mammogram.film())
    return ["inbreast", folder, None, "--size=16", "--workers=1"]


def vindr(root: Path) -> list:
    folder = test_vindr.make(root / NAME)
    synthetic_mammogram.write(folder / "images" / NAME / "1.dicom", synthetic_mammogram.film())
    options = ["--size=16", "--workers=1", "--fractions=train=.7,val=.3"]
    return ["vindr", folder, None, *options]


def status(command: list, out: Path) -> int:
    return main([str(out) if word is None else str(word) for word in command])


def leaks(*content: bytes | str) -> list[str]:
    """The secrets in some content, as it is written or in UTF-16."""
    whole = b"\n".join(c if isinstance(c, bytes) else c.encode() for c in content)
    ways = ("utf-8", "utf-16-le", "utf-16-be")
    return [secret for secret in SECRETS if any(secret.encode(way) in whole for way in ways)]


def written(folder: Path) -> list[bytes]:
    return [file.name.encode() + file.read_bytes() for file in folder.iterdir()]


@pytest.mark.parametrize("make", [picai, cbis_ddsm, inbreast, vindr])
def test_no_identifier_is_written_or_said(tmp_path, capfd, make):
    command = make(tmp_path / "in")
    files = plant(tmp_path / "in")
    assert status(command, tmp_path / "set") == 0
    said = "".join(capfd.readouterr())
    assert leaks(*written(tmp_path / "set"), said) == []
    assert leaks(files[0].read_bytes()) == [NAME, UID, "987654321", DATE, "PIETERSEN"]
    # of a file that cannot be read, its path is told and nothing that it holds
    for file in files:
        synthetic_mri.truncate(file, 0.9)
    assert status(command, tmp_path / "other") == 2
    said = "".join(capfd.readouterr())
    told = [file for file in files if str(file.parent) in said]
    assert told != []
    for file in told:
        said = said.replace(str(file), "").replace(str(file.parent), "")
    assert leaks(said) == []
    assert not (tmp_path / "other").exists()


def burnt(pixels: np.ndarray) -> np.ndarray:
    """The same with bright bars, as letters are, in all corners away from the breast."""
    pixels = pixels.copy()
    for rows in (slice(1, 4), slice(-4, -1)):
        pixels[..., rows, -14:-2] = 65_000
    return pixels


def test_burnt_in_letters_leave_no_pixel_of_a_mammogram(tmp_path, monkeypatch):
    made = []
    for name, change in {"plain": lambda x: x, "burnt": burnt}.items():
        film = lambda seed, c=change, **_: c(synthetic_mammogram.film(seed))
        monkeypatch.setattr(test_inbreast, "film", film)
        folder = test_inbreast.make(tmp_path / name / "in")
        command = ["inbreast", folder, None, "--size=16", "--workers=1"]
        assert status(command, tmp_path / name / "set") == 0
        made.append((tmp_path / name / "set" / "images.npy").read_bytes())
    assert made[0] == made[1]


def test_burnt_in_letters_beside_the_gland_leave_no_pixel_of_a_slice(tmp_path, monkeypatch):
    """MRI has none as a rule; the crop takes what is beside it, and the gland sets the greys."""
    made, image_of = [], test_picai.image_of
    for name, change in {"plain": lambda x: x, "burnt": burnt}.items():
        monkeypatch.setattr(test_picai, "image_of", lambda key, c=change: c(image_of(key)))
        assert status(picai(tmp_path / name), tmp_path / name / "set") == 0
        made.append((tmp_path / name / "set" / "images.npy").read_bytes())
    assert made[0] == made[1]


# ------------------------------------------------------------------------- what a chapter shows

HOSTILE = {
    "benign": "<script>alert(1)</script>",
    "malignant": '<img src=x onerror="alert(1)">',
}


def rename(folder: Path) -> None:
    """Gives classes and patients of a set names that a page would run."""
    table = pd.read_csv(folder / "table.csv", dtype=str, keep_default_na=False)
    table["diagnosis"] = table["diagnosis"].replace(HOSTILE)
    table["patient"] = "<b onclick='alert(1)'>" + table["patient"]
    table.to_csv(folder / "table.csv", index=False, lineterminator="\n")
    card = json.loads((folder / "card.json").read_text())
    card["labels"]["diagnosis"] = {"values": list(HOSTILE.values()), "meaning": {}}
    card["name"] = "phantom"  # the name alone must not pass a set off as the embedded one
    card["origin"] = card["licence"] = HOSTILE["benign"]
    card["sha256"]["table.csv"] = hashlib.sha256((folder / "table.csv").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))


class Alive(HTMLParser):
    """What of the names above a browser would run."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.script = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.script = tag == "script"
        self.found += [value for name, value in attributes if name in ("onclick", "onerror")]

    def handle_data(self, told):
        if self.script and told.strip() == "alert(1)":
            self.found.append(told)


def test_the_parser_sees_what_a_browser_would_run():
    for name in (*HOSTILE.values(), "<b onclick='alert(1)'>p"):
        assert Alive(f"<p>{name}</p>").found == ["alert(1)"]


@pytest.mark.chapter
def test_a_chapter_shows_names_as_text_and_no_identifier(tmp_path, monkeypatch):
    from nbconvert import HTMLExporter

    command = vindr(tmp_path / "in")
    plant(tmp_path / "in")
    assert status(command, tmp_path / "set") == 0
    rename(tmp_path / "set")
    assert len(imageset.open(tmp_path / "set")) == 4 * test_vindr.EXAMS
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    chapter, out = ROOT / "book" / "01_images.ipynb", tmp_path / "out.ipynb"
    values = size_for_tests(chapter) | {"DATASET": str(tmp_path / "set")}
    notebook = grid.execute(chapter, out, values)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert leaks(out.read_text(), page) == []
    shown = [
        output.data[kind]
        for cell in nbformat.read(out, 4).cells
        for output in cell.get("outputs", [])
        for kind in ("text/html", "text/markdown")
        if kind in output.get("data", {})
    ]
    assert any("&lt;script&gt;" in page for page in shown)
    assert [Alive(shown_page).found for shown_page in shown if Alive(shown_page).found] == []
    assert Alive(page).found == []
