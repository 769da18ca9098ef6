"""A MedMNIST collection, with the splits its authors made. https://medmnist.com."""

import argparse
import difflib
import hashlib
from pathlib import Path

import pandas as pd

from data_prep import arrays, tiles
from data_prep.archives import npz
from data_prep.plan import add_output, read_labels, settle
from data_prep.writer import Report
from hallulib import UserError

HELP = """
Without --file, the archive is downloaded to ~/.medmnist once; its MD5 is compared with the one the
medmnist package knows. The smallest published size that reaches --size is used.

  python -m data_prep medmnist breastmnist sets/breast --size 64
  python -m data_prep medmnist pathmnist sets/path --file pathmnist_64.npz
"""
FLAGS = {28: "", 64: "_64", 128: "_128", 224: "_224"}  # published side in pixels -> its suffix
UNKNOWN = "patients are not published; the authors' splits are kept"
WARNINGS = {
    "pathmnist": f"{UNKNOWN}: val shares patients with train, only test is from other patients"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog = HELP
    parser.add_argument("collection", metavar="NAME", help="for example pathmnist, breastmnist")
    add_output(parser)
    parser.add_argument("--file", type=Path, help="the .npz, if it is on disk already")
    tiles.add_arguments(parser, "ignore")


def run(args: argparse.Namespace) -> Report:
    """Makes the image set.

    Raises:
        UserError: an unknown or unsuitable collection, no network, a wrong checksum; see also
            `data_prep.writer.prepare`.
    """
    info = _info(args.collection)
    size = min((s for s in FLAGS if s >= args.size), default=0)
    if not size:
        raise UserError(f"--size is {args.size}; 1 to {max(FLAGS)} pixels are needed")
    flag = FLAGS[size]
    md5 = info[f"MD5{flag}"]
    file = args.file or _download(f"{args.collection}{flag}.npz", info[f"url{flag}"], md5)
    _check_sum(file, info, size)
    plan = _plan(file, info)
    plan["label"], values, _ = read_labels(plan["label"], list(info["label"].values()), str(file))
    plan, notes = settle(plan, {"train": 1.0}, 0, str(file))
    args.origin, args.licence, args.spacing = f"MedMNIST {args.collection}", info["license"], None
    args.name = args.name or args.collection
    args.warning = [WARNINGS.get(args.collection, UNKNOWN)]
    labels = {"label": {"values": values, "meaning": {v: v for v in values}}}
    card = npz.card_of(args, labels, "unknown")
    card["origin"] += f", {info['url' + flag]}, MD5 {md5}"
    plan = plan.reset_index(level="array").assign(file=str(file))
    return npz.write(args, plan.assign(part=plan["array"]), {"label": "label"}, card, notes)


def _info(name: str) -> dict:
    from medmnist import INFO

    if name not in INFO:
        near = difflib.get_close_matches(name, INFO, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no MedMNIST collection {name!r}; {hint}known: {', '.join(INFO)}")
    info = INFO[name]
    if "3d" in name:
        raise UserError(
            f"{name}: images have three dimensions; a collection of 2-D images is needed"
        )
    if info["task"].startswith("multi-label"):
        raise UserError(f"{name}: several labels per image; a collection with one is needed")
    return info


def _download(name: str, url: str, md5: str) -> Path:
    from medmnist.info import DEFAULT_ROOT
    from torchvision.datasets.utils import download_url

    try:
        Path(DEFAULT_ROOT).mkdir(parents=True, exist_ok=True)
        download_url(url, DEFAULT_ROOT, name, md5)  # what the medmnist package does, without
    except (OSError, RuntimeError) as error:  # reading the whole file into memory afterwards
        raise UserError(
            f"{name}: cannot be downloaded ({error}); fetch {url} on another machine and pass it"
            " as --file"
        ) from error
    return Path(DEFAULT_ROOT) / name


def _check_sum(file: Path, info: dict, size: int) -> None:
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); give another --file"
        ) from error
    known = {info.get(f"MD5{flag}"): side for side, flag in FLAGS.items()}
    if known.get(found, size) != size:
        raise UserError(
            f"{file}: is the published file of {known[found]} pixels; --size {known[found]}, or"
            f" the published file of {size} pixels, is needed"
        )
    if found not in known:
        raise UserError(
            f"{file}: MD5 is {found} but {info[f'MD5{FLAGS[size]}']} is that of the published file"
            f" of {size} pixels, so this is another file, made anew or damaged; the published one"
            " is needed"
        )


def _plan(file: Path, info: dict) -> pd.DataFrame:
    """The three published splits, one after the other; index = (array, position)."""
    parts = {}
    for split in ("train", "val", "test"):
        numbers = npz._column(file, f"{split}_labels")
        labels = [info["label"].get(number, number) for number in numbers]
        arrays.check(file, f"{split}_images", len(labels))
        plan = {"label": labels, "split": split, "patient": ""}
        parts[f"{split}_images"] = pd.DataFrame(plan, dtype=str)
    return pd.concat(parts, names=["array"])
