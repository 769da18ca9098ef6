"""Whole files of every format that is read, what reads them, and what can happen to any file."""

import contextlib
import csv
import io
import os
import resource
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import synthetic_mammogram
import synthetic_mri
import torch
from toy_set import write as write_set
from toy_tiles import save, tissue

from data_prep import mammogram
from data_prep.__main__ import main
from data_prep.archives.picai import images
from data_prep.archives.picai.labels import MARKSHEET, read_marksheet
from data_prep.dicom import read_header, read_series
from data_prep.tables import read_table
from data_prep.volumes import read_file
from hallulib import UserError
from hallulib.augment import autoencoder
from hallulib.data import imageset
from hallulib.diffusion import unet
from hallulib.notebook import parameters
from hallulib.storage import checkpoint, store

CASE = "große Ж\u202e 1"  # the folder of every fault: names may hold spaces and any letter
SETTINGS = {"steps": 3}
ROOM = 2**29  # bytes that reading a small file may take hold of


@dataclass(frozen=True)
class Format:
    """How a whole file is made in an empty folder, and what reads it.

    ``cut``: a piece of it is refused; texts may be whole before their end. ``alone``: without it
    there is nothing to read, so its absence is refused.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    cut: bool = True
    alone: bool = True


def command(out: Path, *words) -> None:
    """Runs data_prep in this process; its one sentence is raised, what was read may stay."""
    before = set(os.listdir(out.parent))
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        status = main([*map(str, words), str(out), "--size=8", "--workers=1"])
    lines = [line for line in told.getvalue().splitlines() if line and "item" not in line]
    if status:
        assert status == 2
        assert len(lines) == 1, lines
        assert said.getvalue() == ""
        assert set(os.listdir(out.parent)) - before <= {f"{out.name}.partial"}
        raise UserError(lines[0])
    imageset.open(out)


@contextlib.contextmanager
def bounded(room: int = ROOM) -> Iterator[None]:
    """Lets this process take hold of so many more bytes, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ------------------------------------------------------------------------------- whole files


def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, (4, 9, 8)).astype(np.uint16)


def film(folder: Path) -> Path:
    return synthetic_mammogram.write(folder / "film.dcm", synthetic_mammogram.film())


def series(folder: Path) -> Path:
    return synthetic_mri.write_dicom(folder / "series", volume())[1]


def read_slices(path: Path):
    read_header(path)
    return read_series(sorted(path.parent.iterdir()), str(path))


def arrays(path: Path, **changes) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 9)).astype(np.uint8)
    held = {"images": images, "label": np.arange(12) % 2, "names": np.array(["low", "high"])}
    np.savez_compressed(path, **held | changes)
    return path


def read_npz(path: Path) -> None:
    command(path.parent / "set", "npz", path, "--names=names")


def pictures(folder: Path) -> Path:
    for n in range(6):
        file = save(folder / "in" / "ab"[n % 2] / f"{n}.png", tissue(n, 40, 40))
    return file


def table(folder: Path) -> Path:
    pictures(folder)
    lines = ["file,label,patient", *(f"{'ab'[n % 2]}/{n}.png,{n % 2},p{n}" for n in range(6))]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def read_pictures(path: Path) -> None:
    root = next(folder for folder in path.absolute().parents if folder.name == "in")
    command(root.parent / "set", "folder", root)


def read_csv(path: Path) -> None:
    command(path.parent / "set", "folder", path.parent / "in", f"--csv={path}")


def zipped(folder: Path) -> Path:
    inner = synthetic_mri.write(folder / "10000_1000000_t2w.mha", volume())
    with zipfile.ZipFile(folder / "fold.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, f"10000/{inner.name}")
    inner.unlink()
    return folder / "fold.zip"


def read_zip(path: Path) -> list:
    found = images.find(path.parent, {})
    if found.faults:
        raise found.faults[0]
    return [source.read() for source in found.of.values()]


def marksheet(folder: Path) -> Path:
    (folder / MARKSHEET).parent.mkdir(parents=True)
    names = "patient_id study_id lesion_GS lesion_ISUP case_ISUP case_csPCa".split()
    with (folder / MARKSHEET).open("w", newline="") as file:
        csv.writer(file).writerows([names, [10000, 1000000, "3+4,N/A", "2", 2, "YES"]])
    return folder / MARKSHEET


def meta(folder: Path) -> Path:
    (folder / "meta.csv").write_text("wsi,coord\nslide 1,3\nslide 2,4\n")
    return folder / "meta.csv"


def yaml(folder: Path) -> Path:
    (folder / "set.yaml").write_text("STEPS: 20\nRATE: 1e-3\n02_two: {SCHEME: isup}\n")
    return folder / "set.yaml"


def model(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        saved = unet.build(size=8, labels=["low", "high"], width=8)
        unet.save(saved, folder / "model")
        return folder / "model" / name

    return make


def read_model(path: Path):
    return unet.load(next(f for f in path.absolute().parents if f.name == "model"))


def latents(folder: Path) -> Path:
    autoencoder.save(autoencoder.build(size=8, channels=1, width=8), folder / "model")
    return folder / "model" / "config.json"


def run(folder: Path) -> Path:
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "weights").write_text("weights")
    store.finish(folder / "run", SETTINGS, 1.0)
    return folder / "run" / store.CARD


def resumable(folder: Path) -> Path:
    checkpoint.write(folder / "run", {"weight": torch.ones(4)}, 1, SETTINGS, {"loss": [0.5]})
    return folder / "run" / checkpoint.CHECKPOINT


def image_set(name: str) -> Callable[[Path], Path]:
    return lambda folder: write_set(folder / "toy") / name


def volume_file(name: str, compressed: bool) -> Format:
    return Format(lambda f: synthetic_mri.write(f / name, volume(), compressed), read_file)


open_set = lambda path: imageset.open(path.parent)
FORMATS = {
    "film": Format(film, lambda path: mammogram.read(path, 8)),
    "series": Format(series, read_slices),
    "mha": volume_file("x.mha", False),
    "mha, packed": volume_file("x.mha", True),
    "nii": volume_file("x.nii", False),
    "nii.gz": volume_file("x.nii.gz", True),
    "npz": Format(lambda folder: arrays(folder / "x.npz"), read_npz),
    "picture": Format(pictures, read_pictures, alone=False),
    "csv": Format(table, read_csv, cut=False),
    "zip": Format(zipped, read_zip, alone=False),
    "marksheet": Format(marksheet, lambda path: read_marksheet(path.parents[1]), cut=False),
    "table": Format(meta, lambda path: read_table(path, ["wsi", "coord"]), cut=False),
    "yaml": Format(yaml, parameters.read_yaml, cut=False),
    "weights": Format(model(f"unet/{unet.WEIGHTS}"), read_model),
    "config": Format(model("unet/config.json"), read_model),
    "classes": Format(model(unet.CLASSES), read_model),
    "sidecar": Format(model(unet.SIDECAR), read_model),
    "autoencoder": Format(latents, lambda path: autoencoder.load(path.parent)),
    "run": Format(run, lambda path: store.is_finished(path.parent, SETTINGS), alone=False),
    "checkpoint": Format(
        resumable, lambda path: checkpoint.read(path.parent, SETTINGS), alone=False
    ),
    "images": Format(image_set("images.npy"), open_set),
    "rows": Format(image_set("table.csv"), open_set),
    "card": Format(image_set("card.json"), open_set),
}


# ------------------------------------------------------------------- what befalls any of them


class Bomb:
    """What a pickle would run: it leaves a file in the folder of the test."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def linked(path: Path) -> None:
    """The file itself is out of the tree, as git-annex and shared disks have it."""
    case = next(folder for folder in path.parents if folder.name == CASE)
    outside = case.with_name("outside") / path.name
    outside.parent.mkdir()
    path.rename(outside)
    path.symlink_to(outside)


def flip(path: Path, share: float, bit: int = 7) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


REFUSED, WORKS, EITHER = "refused", "works", "either"
CUT, ABSENT = "refused if binary", "refused if alone"
ANY = {  # of any file: what is done to it, and what must come of it
    "empty": (lambda path: path.write_bytes(b""), REFUSED),
    "a directory": (directory, ABSENT),
    "a dangling link": (dangling, ABSENT),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), REFUSED),
    "a letter": (lambda path: path.write_text("Dear colleague"), REFUSED),
    "not Unicode": (lambda path: path.write_bytes(b"\xff\xfe\xfa\x80" * 50), REFUSED),
    "a third": (lambda path: cut(path, 1 / 3), CUT),
    "most": (lambda path: cut(path, 0.9), CUT),
    "a flip at the start": (lambda path: flip(path, 0), EITHER),
    "a flip before the middle": (lambda path: flip(path, 0.4, 3), EITHER),
    "a flip at the end": (lambda path: flip(path, 1, 6), EITHER),
    "more at the end": (lambda path: path.write_bytes(path.read_bytes() + b"\n{}"), EITHER),
    "a link": (linked, WORKS),
    "whole": (lambda path: None, WORKS),
}
