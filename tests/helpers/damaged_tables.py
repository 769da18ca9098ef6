"""What can be wrong in .npz, pictures, CSV, zips and YAML: name -> what is done, what comes."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from damaged_volumes import instead, text
from faults import EITHER, REFUSED, WORKS, Bomb, arrays
from PIL import Image


def held(**changes):
    return lambda path: arrays(path, **changes)


def member(name: str, content: bytes):
    """Puts other bytes in the place of an array; the zip around it is whole."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path) as whole:
            kept = {n: whole.read(n) for n in whole.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as changed:
            for n, old in (kept | {name: content}).items():
                changed.writestr(n, old)

    return change


def header(told: str, version: bytes = b"\1\0") -> bytes:
    """An .npy that only declares something."""
    text = told.encode() + b" " * (-(len(told) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text


def shaped(shape: str, kind: str = "|u1") -> bytes:
    return header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}")


VAST = shaped("(1000000000000,)")
DEEP = header("{'descr': " + "-" * 900 + "1, 'fortran_order': False, 'shape': (1,), }")
NPY = {
    "a terabyte": (shaped("(10000, 10000, 10000)"), REFUSED),
    "more than numbers can count": (shaped(f"({2**70}, 9, 9)"), REFUSED),
    "a negative size": (shaped("(12, -9, -9)"), REFUSED),
    "no shape": (shaped("None"), REFUSED),
    "words": (shaped("(12, 9, 9)", "<U4"), REFUSED),
    "objects": (shaped("(12, 9, 9)", "|O"), REFUSED),
    "code": (header("__import__('os').abort()"), REFUSED),
    "deep": (DEEP, REFUSED),
    "a version of later": (header("{}", b"\7\0"), REFUSED),
    "no end of its line": (b"\x93NUMPY\1\0\xff\xff{'descr': '|u1'", REFUSED),
}
LABELS = {"a terabyte of labels": VAST, "labels of another version": header("{}", b"\3\0")}
NPZ = (
    {f"images: {name}": (member("images.npy", b), told) for name, (b, told) in NPY.items()}
    | {name: (member("label.npy", content), REFUSED) for name, content in LABELS.items()}
    | {
        "labels that unpack to gigabytes": (
            member("label.npy", shaped(f"({2**28 + 1},)") + bytes(2**28 + 1)),
            REFUSED,
        ),
        "images that unpack to gigabytes": (
            member("images.npy", shaped("(12, 20000, 20000)") + bytes(2**28)),
            REFUSED,
        ),
        "labels that are objects": (held(label=np.array([Bomb()] * 12)), REFUSED),
        "labels of bytes that are no text": (held(label=np.array([b"\xff"] * 12)), REFUSED),
        "labels of NaN": (held(label=np.full(12, np.nan)), REFUSED),
        "labels too few": (held(label=np.zeros(11, int)), REFUSED),
        "labels without name": (held(label=np.full(12, 7)), REFUSED),
        "one name for two labels": (held(names=np.array(["low", "low"])), REFUSED),
        "a name of nothing": (held(names=np.array(["low", ""])), REFUSED),
        "names without number": (held(names=np.array("low")), REFUSED),
        "names in a square": (held(names=np.array([["a", "b"], ["c", "d"]])), REFUSED),
        "names of any letters": (held(names=np.array(["<i>low", "höher\u202e"])), WORKS),
        "floats": (held(images=np.zeros((12, 9, 9))), REFUSED),
        "not square": (held(images=np.zeros((12, 9, 7), np.uint8)), REFUSED),
        "too small": (held(images=np.zeros((12, 7, 7), np.uint8)), REFUSED),
        "no image": (held(images=np.zeros((0, 9, 9), np.uint8), label=np.zeros(0)), REFUSED),
        "columns first": (held(images=np.asfortranarray(np.zeros((12, 9, 9), "u1"))), REFUSED),
        "a member above the folder": (member("../../evil.npy", VAST), WORKS),
        "a member anywhere": (member("/tmp/evil.npy", VAST), WORKS),
    }
)


def drawn(name: str, size=(9, 9)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, name)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    sum_ = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + sum_


def png(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def beside(name: str | bytes, content: bytes):
    """Another file in the folder of the whole one."""
    return lambda path: Path(
        os.fsdecode(os.path.join(os.fsencode(path.parent), os.fsencode(name)))
    ).write_bytes(content)


def class_of(content):
    """Another class, whose files or folder ``content(folder, whole class)`` makes."""
    return lambda path: content(path.parent.with_name("z"), path.parent)


def another_format(folder: Path, _) -> None:
    folder.mkdir()
    (folder / "0.webp").write_bytes(drawn("WEBP"))


def loops(path: Path) -> None:
    for name in ("one", "two", "three"):
        (path.parent / name).symlink_to(path.parent, target_is_directory=True)


PICTURE = {
    f"array: {name}": (beside("7.npy", content), told) for name, (content, told) in NPY.items()
} | {
    "a terabyte": (instead(png(2**20, 2**20)), REFUSED),
    "a picture of gigabytes": (instead(png(30_000, 30_000)), REFUSED),
    "PostScript": (instead(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), REFUSED),
    "a GIF": (instead(drawn("GIF")), REFUSED),
    "grey among colour": (instead(drawn("PNG", (40, 40))), REFUSED),
    "too small": (instead(drawn("PNG", (4, 4))), REFUSED),
    "text without end": (
        instead(png(9, 9)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 1))),
        REFUSED,
    ),
    "a folder that holds itself": (loops, REFUSED),
    "a class of another format": (class_of(another_format), REFUSED),
    "a class without image": (class_of(lambda folder, _: folder.mkdir()), REFUSED),
    "a class of links to another": (class_of(Path.symlink_to), REFUSED),
    "a further link": (lambda path: path.with_name("9.png").symlink_to(path), WORKS),
    "a link to nowhere": (lambda path: path.with_name("9.png").symlink_to("nowhere"), REFUSED),
    "a name that is no Unicode": (beside(b"\xff.txt", b""), WORKS),
    "a picture whose name is no Unicode": (
        lambda path: path.rename(path.parent / os.fsdecode(b"\xff.png")),
        WORKS,
    ),
    "a class whose name is no Unicode": (
        lambda path: path.parent.rename(str(path.parent) + os.fsdecode(b"\xff")),
        REFUSED,
    ),
    "a class of any letters": (lambda path: path.parent.rename(f"{path.parent} <b> Ж"), WORKS),
}


def line(told: str):
    return lambda path: path.write_text(path.read_text() + told + "\n")


CSV = {
    "a path above": (line("../a/0.png,0,p"), REFUSED),
    "a path above, deeper": (line("a/../../in/a/0.png,0,p"), REFUSED),
    "a path above as Windows has it": (line("..\\a\\0.png,0,p"), REFUSED),
    "a path from the root": (line("/etc/passwd.png,0,p"), REFUSED),
    "no path": (line(",0,p"), REFUSED),
    "a file twice": (line("a/0.png,0,p0"), REFUSED),
    "a file that is no picture": (line("a/0.txt,0,p"), REFUSED),
    "a folder": (line("a,0,p"), REFUSED),
    "a name of NUL": (line("a/\0.png,0,p"), REFUSED),
    "a very long name": (line("a/" + "x" * 5000 + ".png,0,p"), REFUSED),
    "a longer row": (line("a/0.png,0,p,1,2,3"), REFUSED),
    "a quote without end": (line('"a/0.png,0,p'), REFUSED),
    "no column of files": (text(b"file,", b"name,"), REFUSED),
    "no column of labels": (text(b"label", b"grade"), REFUSED),
    "Latin letters": (instead("file,label\na/0.png,ä\n".encode("latin-1")), REFUSED),
    "wide letters": (lambda p: p.write_text(p.read_text(), "utf-16"), WORKS),
    "semicolons": (lambda p: p.write_text(p.read_text().replace(",", ";")), WORKS),
    "tabs": (lambda p: p.write_text(p.read_text().replace(",", "\t")), WORKS),
    "paths of Windows": (lambda p: p.write_text(p.read_text().replace("/", "\\")), WORKS),
    "a file under another path": (line("./a/0.png,0,p0"), REFUSED),
    "patients under another name": (
        instead("file,label,PatientID\na/0.png,0,p\na/2.png,0,p\n"),
        REFUSED,
    ),
    "a mark at the start": (lambda path: path.write_text("\ufeff" + path.read_text()), WORKS),
    "spaces": (lambda path: path.write_text(path.read_text().replace(",", " , ")), EITHER),
    "other ends of lines": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n")),
        WORKS,
    ),
    "a patient in two splits": (
        instead("file,label,patient,split\na/0.png,0,p,train\na/2.png,0,p,test\n"),
        REFUSED,
    ),
    "a split of nowhere": (instead("file,label,split\na/0.png,0,later\n"), REFUSED),
}
ROW = b"10000,1000000,"
MARKSHEET = {
    "a short row": (text(b'"3+4,N/A",2,2,YES', b'"3+4'), REFUSED),
    "half a row": (text(b',"3+4,N/A",2,2,YES', b""), REFUSED),
    "a patient above the folder": (text(ROW, b"../../10000,1000000,"), REFUSED),
    "a study above the folder": (text(ROW, b"10000,../1,"), REFUSED),
    "a study twice": (line("10000,1000000,3+4,2,2,YES"), REFUSED),
    "a grade of words": (text(b"2,2,YES", b"two,2,YES"), REFUSED),
    "a grade that contradicts": (text(b"2,2,YES", b"2,5,YES"), REFUSED),
    "no column": (text(b"case_ISUP", b"grade"), REFUSED),
    "a field without end": (line("9" * 200_000), REFUSED),
}
TABLE = {
    "no column": (text(b"wsi", b"slide"), REFUSED),
    "a column twice": (text(b"coord", b"WSI"), REFUSED),
    "longer rows": (text(b"slide 1,3", b"slide 1,3,4,5"), REFUSED),
    "names only": (instead("wsi,coord\n"), REFUSED),
    "a mark at the start": (lambda path: path.write_text("\ufeff" + path.read_text()), WORKS),
}


def unpacked(name: str, content: bytes, size: int | None = None, locked: bool = False):
    """A member of a zip; ``size``: what it claims to be."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path) as whole:
            image = whole.read(whole.namelist()[0])
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content or image)
            archive.filelist[0].file_size = size or archive.filelist[0].file_size
            archive.filelist[0].flag_bits |= locked

    return change


T2W = "10000/10000_1000000_t2w.mha"
ZIP = {
    "a member above the folder": (unpacked(f"../../../{T2W}", b""), WORKS),
    "a member from the root": (unpacked(f"/etc/{T2W}", b""), WORKS),
    "a member of terabytes": (unpacked(T2W, b"", size=2**40), REFUSED),
    "a locked member": (unpacked(T2W, b"", locked=True), REFUSED),
    "a member before the file": (lambda path: path.write_bytes(path.read_bytes()[8:]), REFUSED),
    "a member that is no image": (unpacked(T2W, b"Dear colleague"), REFUSED),
}
LAUGHS = "A: &a [x, x]\n" + "".join(
    f"B{n}: &b{n} [*{'a' if n == 0 else f'b{n - 1}'}, *{'a' if n == 0 else f'b{n - 1}'}]\n"
    for n in range(60)
)
YAML = {
    "a call": (instead("STEPS: !!python/object/apply:os.abort []"), REFUSED),
    "a class": (instead("STEPS: !!python/name:os.abort"), REFUSED),
    "a new module": (instead("STEPS: !!python/module:antigravity"), REFUSED),
    "aliases of aliases": (instead(LAUGHS), REFUSED),
    "itself": (instead("STEPS: &a [*a]"), REFUSED),
    "deep": (instead("STEPS: " + "[" * 20_000), REFUSED),
    "no date": (instead("STEPS: 2024-99-99"), WORKS),
    "no number": (instead("STEPS: !!int words"), REFUSED),
    "no time": (instead("STEPS: !!timestamp words"), REFUSED),
    "no truth": (instead("STEPS: !!bool words"), REFUSED),
    "a number without end": (instead("STEPS: " + "9" * 10_000), REFUSED),
    "a name that is a list": (instead("[1, 2]: 3"), REFUSED),
    "a list": (instead("- STEPS"), REFUSED),
    "two documents": (instead("STEPS: 1\n---\nSTEPS: 2"), REFUSED),
    "a tab": (instead("STEPS:\n\t- 1"), REFUSED),
    "any letters": (instead("STEPS: große Ж"), WORKS),
}
DAMAGE = {
    "npz": NPZ,
    "picture": PICTURE,
    "csv": CSV,
    "marksheet": MARKSHEET,
    "table": TABLE,
    "zip": ZIP,
    "yaml": YAML,
}
