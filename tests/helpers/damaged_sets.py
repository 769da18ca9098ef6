"""What can be wrong in image sets and saved models: name -> what is done, what must come."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from damaged_tables import NPY
from damaged_volumes import instead, text
from faults import REFUSED, SETTINGS, WORKS, Bomb, resumable
from safetensors.torch import load_file, save_file

DEEP = "[" * 50_000


def entry(*keys_and_value):
    """Sets an entry of a JSON file."""
    *keys, last, value = keys_and_value

    def change(path: Path) -> None:
        content = inner = json.loads(path.read_text())
        for key in keys:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(content))

    return change


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def narrow(found: dict) -> dict:
    return {k: v[..., :1].contiguous() if v.ndim else v for k, v in found.items()}


def tensors(change):
    return lambda path: save_file(change(load_file(path)), path)


def claims(size: int, told: bytes = b"{}"):
    return instead(struct.pack("<Q", size) + told)


def index_of_others(path: Path) -> None:
    """Weights in several files, one of which would be unpickled."""
    names = list(load_file(path))
    path.unlink()
    pickled(path.with_name("other.bin"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "other.bin")}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


def beyond(told: int):
    entry_ = {"x": {"dtype": "F32", "shape": [told], "data_offsets": [0, 4 * told]}}
    content = json.dumps(entry_).encode()
    return claims(len(content), content + bytes(8))


SAFETENSORS = {
    "a pickle": (pickled, REFUSED),
    "a pickle of torch": (lambda path: torch.save({"x": torch.ones(1)}, path), REFUSED),
    "a header of exabytes": (claims(2**60), REFUSED),
    "a header of megabytes": (claims(2**26), REFUSED),
    "a header that is no JSON": (claims(8, b"Dear all"), REFUSED),
    "a terabyte": (beyond(2**38), REFUSED),
    "a negative size": (beyond(-1), REFUSED),
    "other names": (tensors(lambda found: {f"x.{k}": v for k, v in found.items()}), REFUSED),
    "other shapes": (
        tensors(
            lambda found: {k: v[..., :1].contiguous() if v.ndim else v for k, v in found.items()}
        ),
        REFUSED,
    ),
    "one tensor only": (tensors(lambda found: {"x": torch.ones(1)}), REFUSED),
}
CONFIG = {
    "a list": (instead("[]"), REFUSED),
    "deep": (instead(DEEP), REFUSED),
    "layers without end": (entry("layers_per_block", 10**9), REFUSED),
    "layers in words": (entry("layers_per_block", "many"), REFUSED),
    "channels without end": (entry("block_out_channels", [2**24, 2**24]), REFUSED),
    "no channels": (entry("block_out_channels", []), REFUSED),
    "unknown blocks": (entry("down_block_types", ["os.system"]), REFUSED),
    "an unknown nonlinearity": (entry("act_fn", "os.system"), REFUSED),
}
SIDECAR = {
    "a list": (instead("[]"), REFUSED),
    "deep": (instead(DEEP), REFUSED),
    "an unknown diffusion": (entry("sde", "name", "os.system"), REFUSED),
    "a diffusion of words": (entry("sde", "VPSDE"), REFUSED),
    "an unknown rate": (entry("sde", "__class__", 1), REFUSED),
    "labels in one word": (entry("labels", 7), REFUSED),
    "too many labels": (entry("labels", ["a", "b", "c"]), REFUSED),
}
RUN = {
    "a list": (instead("[]"), REFUSED),
    "deep": (instead(DEEP), REFUSED),
    "no sums": (entry("sha256", None), REFUSED),
    "another sum": (entry("sha256", "weights", "0" * 64), REFUSED),
    "a file above the folder": (entry("sha256", "../../../../etc/passwd", "0" * 64), REFUSED),
    "a file that is a folder": (entry("sha256", ".", "0" * 64), REFUSED),
}


def told(**metadata):
    return lambda path: save_file({"weight": torch.ones(4)}, path, metadata)


CHECKPOINT = {name: SAFETENSORS[name] for name in list(SAFETENSORS)[:7]} | {
    "no settings": (told(step="1"), REFUSED),
    "settings in a list": (told(step="1", settings="[]"), REFUSED),
    "deep settings": (told(step="1", settings=DEEP), REFUSED),
    "a step of words": (told(step="one", settings=json.dumps(SETTINGS)), REFUSED),
    "other settings": (told(step="1", settings='{"steps": 4}'), REFUSED),
    "whole once more": (lambda path: resumable(path.parents[1]), WORKS),
}


def an_archive(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), images=np.zeros((5, 1, 12, 12), np.uint8))
    path.with_suffix(".npz").rename(path)


def same_folder_elsewhere(path: Path) -> None:
    shutil.copytree(path.parent, path.parents[1] / "copy")
    shutil.rmtree(path.parent)
    path.parent.symlink_to(path.parents[1] / "copy", target_is_directory=True)


IMAGES = {name: (instead(content), expected) for name, (content, expected) in NPY.items()} | {
    "an archive": (an_archive, REFUSED),
    "a pickle": (pickled, REFUSED),
    "a linked set": (same_folder_elsewhere, WORKS),
}
ROWS = {
    "a short row": (text(b"p3,test,high,3", b"p3"), REFUSED),
    "a longer row": (text(b"p3,test,high,3", b"p3,test,high,3,4,5"), REFUSED),
    "a column twice": (text(b"item", b"grade"), REFUSED),
    "a patient in two splits": (text(b"p3,test", b"p1,test"), REFUSED),
    "an unknown split": (text(b"test", b"Test"), REFUSED),
    "a quote without end": (text(b"p3,test", b'"p3,test'), REFUSED),
    "another note": (text(b"high,3", b"high,9"), REFUSED),
}
CARD = {
    "a list": (instead("[]"), REFUSED),
    "deep": (instead(DEEP), REFUSED),
    "a name of numbers": (entry("name", 7), REFUSED),
    "an origin of lists": (entry("origin", ["here"]), REFUSED),
    "counts in a list": (entry("counts", [5, 4]), REFUSED),
    "sums in a list": (entry("sha256", ["0" * 64]), REFUSED),
    "labels in a list": (entry("labels", ["grade"]), REFUSED),
    "no label": (entry("labels", "grade", {"values": []}), REFUSED),
    "an empty label": (entry("labels", "grade", {"values": ["low", ""]}), REFUSED),
    "a label twice": (entry("labels", "grade", {"values": ["low", "low"]}), REFUSED),
    "a scheme named patient": (entry("labels", "patient", {"values": ["p1"]}), REFUSED),
    "processing in one word": (entry("processing", "none"), REFUSED),
    "steps in one word": (entry("processing", "steps", 7), REFUSED),
    "spacing in words": (entry("spacing_mm", "0.5"), REFUSED),
    "spacing beyond floats": (entry("spacing_mm", [10**400, 1]), REFUSED),
    "spacing of nothing": (entry("spacing_mm", [0, 0]), REFUSED),
    "another sum": (entry("sha256", "images.npy", "0" * 64), REFUSED),
    "any letters": (entry("name", "<i>große Ж\u202e"), WORKS),
}
DAMAGE = {
    "weights": SAFETENSORS | {"other files": (index_of_others, REFUSED)},
    "classes": {
        name: SAFETENSORS[name]
        for name in ("a pickle", "a terabyte", "other shapes", "other names")
    },
    "config": CONFIG,
    "autoencoder": CONFIG,
    "sidecar": SIDECAR,
    "run": RUN,
    "checkpoint": CHECKPOINT,
    "images": IMAGES,
    "rows": ROWS,
    "card": CARD,
}
