r"""Does training on selected synthetic images help where labels are few? The whole experiment.

An autoencoder and an unconditional score model of its latents learn from images without labels.
In every fold a small share of the training images gets its labels back; a noise-aware classifier
of their latents steers the score model to the classes, the samples are decoded and judged, and a
ResNet-18 is trained for the same number of steps on

==============  ===========================================================================
real            the labelled images as they are
classical       shifted, mirrored and changed in contrast
unselected      classical, and synthetic images drawn at random from all that were made
selected        classical, and as many admitted by :mod:`hallulib.augment.selection`
==============  ===========================================================================

Source:
    Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hallulib import UserError
from hallulib.augment.estimator import Pretrained, Trial, changed, judged, per_class, pretrained
from hallulib.augment.selection import copy_threshold, take
from hallulib.data.imageset import ImageSet, choose
from hallulib.evidence.metrics import read_scores
from hallulib.evidence.resnet import read, train_resnet
from hallulib.shapes import AnyImages, Images, Labels
from hallulib.storage import disk, store

ARMS = ("real", "classical", "unselected", "selected")
SCORES, VERDICTS, SYNTHETIC = "scores.csv", "verdicts.csv", "synthetic.safetensors"


def run(
    images: ImageSet, trial: Trial, *, from_scratch: bool = False
) -> tuple[pd.DataFrame, list[Path]]:
    """Scores of every arm in every fold, found by the settings or measured now.

    Each fold is a run of its own: an interrupted experiment goes on with the fold it was in.

    Args:
        images: an open image set with the splits train, val and test of the scheme.
        trial: the settings.
        from_scratch: measure even if such runs are there.

    Returns:
        One row per fold and test image: ``fold``, ``patient``, ``label`` (index of the class),
        and for each arm and class ``<arm> <class>``, the probability; and the folders of the
        folds, with ``verdicts.csv`` (one row per synthetic image) and the images beside it.

    Raises:
        UserError: a split is empty, fewer than two classes, a class with fewer than two images,
            or no synthetic image was admitted.
    """
    prior = pretrained(images, trial, from_scratch)
    scores, folders = [], []

    def measure(folder: Path, fold: int, **_) -> None:
        _measure(images, trial, prior, trial.seed + fold, folder)

    for fold in range(trial.folds):
        folder = store.load_or_train(
            f"augmented-{images.name}",
            measure,
            defaults=Trial,
            from_scratch=from_scratch,
            latents=store.contents(prior.folders[1]),
            data=images.identity,
            fold=fold,
            **{k: v for k, v in asdict(trial).items() if k != "folds"},
        )
        scores.append(read_scores(folder / SCORES).assign(fold=fold))
        folders.append(folder)
    return pd.concat(scores, ignore_index=True), folders


def _measure(images: ImageSet, trial: Trial, prior: Pretrained, seed: int, folder: Path) -> None:
    known, test, held_out = (
        images.select(split, labelled=trial.scheme) for split in ("train", "test", "val")
    )
    names, y, y_test = _classes(known, test, trial.scheme)
    rows = choose(y, 0, seed, trial.share)
    x, y = known.tensor(rows), y[rows]
    distance = copy_threshold(x, held_out.tensor())
    networks, made, verdicts = _arms(prior, trial, x, y, distance, seed)

    asked = np.sort(np.random.default_rng(0).permutation(len(test))[: trial.n_test])
    x_test = test.tensor(asked)
    scores = pd.DataFrame({"patient": test.table["patient"].iloc[asked].to_numpy()})
    scores["label"] = y_test[asked].numpy()
    for arm in ARMS:
        for name, column in zip(names, read(networks[arm], x_test)[1].T, strict=True):
            scores[f"{arm} {name}"] = column
    pixels = {"real": _bytes(x), "labels": y, "synthetic": _bytes(made)}
    with disk.whole_files(folder) as new:
        save_file(pixels, new / SYNTHETIC)
        verdicts.to_csv(new / VERDICTS, index=False)
        scores.to_csv(new / SCORES, index=False)


def _classes(known: ImageSet, test: ImageSet, scheme: str) -> tuple[list[str], Tensor, Tensor]:
    """Classes with training images, and the position among them of every label, or -1."""
    names = [c for c in known.classes(scheme) if c in set(known.table[scheme])]
    position = {name: i for i, name in enumerate(names)}
    y, y_test = (
        torch.tensor([position.get(c, -1) for c in part.table[scheme]]) for part in (known, test)
    )
    rarest = int(torch.bincount(y).min())
    if len(names) < 2 or rarest < 2:
        raise UserError(
            f"{known.name}: {len(names)} classes of {scheme} in the split train, the rarest with "
            f"{rarest} images; at least 2 classes with 2 images each are needed"
        )
    return names, y, y_test


def _arms(
    prior: Pretrained, trial: Trial, x: Images, y: Labels, copy_distance: float, seed: int
) -> tuple[dict[str, nn.Module], AnyImages, pd.DataFrame]:
    """A network for each arm, the synthetic images, and which of them two arms learnt from."""
    fit = partial(train_resnet, steps=trial.resnet_steps, width=trial.resnet_width, seed=seed)
    networks = {"real": fit(x, y, change=None, told="real")}
    networks["classical"], made, verdicts = judged(prior, trial, x, y, copy_distance, seed)
    n = per_class(trial.ratio, len(x), int(y.max()) + 1)
    verdicts["selected"] = take(verdicts, n)
    verdicts["unselected"] = _at_random(verdicts, seed)
    wanted = torch.tensor(verdicts["wanted"].to_numpy())
    for arm in ("selected", "unselected"):
        learnt = torch.tensor(verdicts[arm].to_numpy())
        both = torch.cat([x, made[learnt]]), torch.cat([y, wanted[learnt]])
        networks[arm] = fit(*both, change=changed, told=arm)
    return networks, made, verdicts


def _at_random(verdicts: pd.DataFrame, seed: int) -> np.ndarray:
    """As many of each class as were selected, whatever was said of them."""
    rng, taken = np.random.default_rng(seed), np.zeros(len(verdicts), dtype=bool)
    for _, of_class in verdicts.groupby("wanted"):
        taken[rng.permutation(of_class.index.to_numpy())[: of_class["selected"].sum()]] = True
    return taken


def read_fold(folder: Path) -> tuple[Images, Labels, AnyImages, pd.DataFrame]:
    """Labelled images of a fold and their classes, its synthetic images and their verdicts."""
    pixels = load_file(folder / SYNTHETIC)
    real, made = (pixels[k].float() / 127.5 - 1 for k in ("real", "synthetic"))
    return real, pixels["labels"], made, pd.read_csv(folder / VERDICTS)


def _bytes(x: AnyImages) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)
