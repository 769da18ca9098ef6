r"""Does training on selected synthetic images help where labels are few? The whole experiment.

An autoencoder and an unconditional score model of its latents learn from images without labels.
In every fold a small share of the training images gets its labels back; a noise-aware classifier
of their latents steers the score model to the classes, the samples are decoded and judged, and a
ResNet-18 is trained for the same number of steps on

==============  ===========================================================================
real            the labelled images as they are
classical       shifted, mirrored and changed in contrast
unselected      classical, and synthetic images drawn at random from all that were made
selected        classical, and as many admitted by :mod:`hallulib.selection`
==============  ===========================================================================

Source:
    Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from hallulib import (
    UserError,
    artifacts,
    disk,
    encoding,
    runs,
    sample,
    steering,
    train,
    unet,
)
from hallulib.adaptation import relabelled
from hallulib.autoencoder import Autoencoder
from hallulib.backbone import read, train_resnet
from hallulib.data import ImageSet
from hallulib.few_labels import choose, read_scores
from hallulib.quality import AnyImages
from hallulib.sample import SAMPLERS
from hallulib.score import ScoreModel
from hallulib.selection import FeatureSpace, copy_threshold, take
from hallulib.settings import (
    Above0,
    Amount,
    Positive,
    Seed,
    Several,
    ShareAbove0,
    ShareBelow1,
    Width,
    check,
    one_of,
)
from hallulib.shapes import Images, Labels
from hallulib.supports import augmented

ARMS = ("real", "classical", "unselected", "selected")
STEERS = ("classifier", "free")
SCORES, VERDICTS, SYNTHETIC = "scores.csv", "verdicts.csv", "synthetic.safetensors"


@dataclass(frozen=True)
class Trial:
    """All settings of the experiment but the images.

    Attributes:
        scheme: label column.
        share: of the labels of the split ``train`` that are kept in a fold, above 0 to 1.
        folds: draws of those labels, each with networks of its own.
        encoding: steps of the autoencoder.
        encoder_width: of its first block.
        factor: pixels along each side of a position of its latents: 4 as in the paper suits 64
            pixels and more; of 32 pixels it leaves too little for nuclei to be told apart.
        pretraining: steps of the score model of its latents.
        width: of that score model.
        steering: steps with the labels, of the classifier or of the score model itself.
        steer: ``"classifier"`` guidance of the unconditional model, or ``"free"``: the score
            model goes on with the labels and guides itself.
        gradient_scale: of the classifier's gradient; the paper takes 10.
        guidance_scale: of the guidance without a classifier.
        sampler, sampler_steps: see :func:`hallulib.sample.draw`.
        ratio: synthetic images learnt from, for each labelled real one.
        candidates: synthetic images made for each one that is learnt from.
        confidence: see :mod:`hallulib.selection`.
        resnet_steps: of every ResNet-18.
        resnet_width: of its first block.
        n_test: test images, at most; classes keep their shares.
        seed: of everything random; fold i adds i.

    Raises:
        UserError: an impossible number or name.
    """

    scheme: str
    share: ShareAbove0 = 0.05
    folds: Positive = 5
    encoding: Positive = 1500
    encoder_width: Width = 32
    factor: Positive = 4
    pretraining: Positive = 3000
    width: Width = 32
    steering: Positive = 300
    steer: one_of(STEERS) = "classifier"
    gradient_scale: Amount = 2.0
    guidance_scale: Amount = 2.0
    sampler: one_of(SAMPLERS) = "dpm_solver"
    sampler_steps: Positive = 20
    ratio: Above0 = 1.0
    candidates: Positive = 4
    confidence: ShareBelow1 = 0.5
    resnet_steps: Positive = 300
    resnet_width: Positive = 16
    n_test: Several = 600
    seed: Seed = 0

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Pretrained:
    """What was learnt without labels.

    Attributes:
        autoencoder: between images and latents.
        model: the unconditional score model of the latents.
        folders: of the two runs, where they are runs.
    """

    autoencoder: Autoencoder
    model: ScoreModel
    folders: tuple[Path, ...]


def pretrained(images: ImageSet, trial: Trial, from_scratch: bool = False) -> Pretrained:
    """The autoencoder and the score model of its latents, found by their settings or trained now.

    Both learn from the images without labels alone (from ``train`` where there are none).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told = dict(steps=trial.encoding, width=trial.encoder_width, seed=trial.seed)
    told |= dict(factor=trial.factor)
    encoder, first = encoding.pretrained(images, from_scratch=from_scratch, **told)
    settings = dict(steps=trial.pretraining, batch_size=64, lr=4e-4, seed=trial.seed)

    def start(folder: Path) -> Iterator[train.State]:
        latents = encoder.encode(encoding.unlabelled(images).to(device))
        channels, side, _ = encoder.shape
        model = unet.build(size=side, channels=channels, width=trial.width, seed=trial.seed)
        return train.pretrain(model.to(device), latents, folder=folder, **settings)

    folder = runs.kept(
        f"latent-score-{images.name}",
        start,
        lambda state, folder: unet.save(state.ema, folder),
        told="training on latents",
        from_scratch=from_scratch,
        latents=artifacts.contents(first),
        width=trial.width,
        **settings,
    )
    return Pretrained(encoder, unet.load(folder).to(device), (first, folder))


def synthesise(
    found: Pretrained, trial: Trial, x: Images, y: Labels, names: list[str], n: int, seed: int
) -> tuple[AnyImages, Int[Tensor, " _made"]]:
    """Synthetic images of every class, equally many, from what was learnt without labels.

    Args:
        found: the pretrained models, on the device to work on.
        trial: how to steer and to sample.
        x: the labelled images.
        y: their classes, 0 to k - 1.
        names: of the classes.
        n: images wanted of each class.
        seed: of training and noise.

    Returns:
        Images in [-1, 1] and the class each was made for.
    """
    device = next(found.model.parameters()).device
    latents, labels = found.autoencoder.encode(x.to(device)), y.to(device)
    wanted = torch.arange(len(names), device=device).repeat_interleave(n)
    told = dict(sampler=trial.sampler, steps=trial.sampler_steps, clip=False, seed=seed)
    if trial.steer == "classifier":
        judge = steering.NoisyClassifier(found.model, names, seed=seed)
        loop = steering.train(judge, latents, labels, steps=trial.steering, seed=seed)
        for _ in tqdm(loop, total=trial.steering, desc="noise-aware classifier"):
            pass
        made = steering.steered(
            found.model, judge, wanted, gradient_scale=trial.gradient_scale, **told
        )
    else:
        weights = 1 / torch.bincount(labels)[labels].double()
        loop = train.pretrain(
            relabelled(found.model, names).to(device),
            latents,
            labels,
            weights=weights,
            steps=trial.steering,
            batch_size=64,
            lr=4e-4,
            warmup=trial.steering // 10,
            seed=seed,
        )
        model = runs.finished(loop, trial.steering, "class-conditional").ema
        made = sample.draw(model, wanted, guidance_scale=trial.guidance_scale, **told)
    return found.autoencoder.decode(made).cpu(), wanted.cpu()


def per_class(ratio: float | int, n: int, classes: int) -> int:
    """Synthetic images learnt from of each class, for n labelled ones of all; at least one."""
    return max(1, math.ceil(round(ratio * n) / classes))


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
    for fold in range(trial.folds):

        def measure(folder: Path, fold: int = fold, **_) -> None:
            _measure(images, trial, prior, trial.seed + fold, folder)

        folder = artifacts.load_or_train(
            f"augmented-{images.name}",
            measure,
            from_scratch=from_scratch,
            latents=artifacts.contents(prior.folders[1]),
            data=images.identity,
            fold=fold,
            **{k: v for k, v in asdict(trial).items() if k != "folds"},
        )
        scores.append(read_scores(folder / SCORES).assign(fold=fold))
        folders.append(folder)
    return pd.concat(scores, ignore_index=True), folders


def _measure(images: ImageSet, trial: Trial, prior: Pretrained, seed: int, folder: Path) -> None:
    known = images.select("train", labelled=trial.scheme)
    test = images.select("test", labelled=trial.scheme)
    held_out = images.select("val", labelled=trial.scheme)
    names = [c for c in images.classes(trial.scheme) if c in set(known.table[trial.scheme])]
    position = {images.classes(trial.scheme).index(c): i for i, c in enumerate(names)}
    y, y_test = (_renumbered(part.labels(trial.scheme), position) for part in (known, test))
    if len(names) < 2:
        raise UserError(
            f"{images.name}: {len(names)} classes of {trial.scheme} in the split train; at least "
            "2 are needed"
        )
    rare = int(torch.bincount(y).min())
    if rare < 2:
        raise UserError(
            f"{images.name}: a class of {trial.scheme} has {rare} image in the split train; at "
            "least 2 are needed"
        )
    rows = choose(y, 0, seed, trial.share)
    x, y = known.tensor(rows), y[rows]
    asked = np.sort(np.random.default_rng(0).permutation(len(test))[: trial.n_test])
    x_test = test.tensor(asked)

    fit = partial(
        train_resnet, steps=trial.resnet_steps, width=trial.resnet_width, seed=seed, batch_size=32
    )
    networks = {"real": fit(x, y, change=None, told="real")}
    networks["classical"] = fit(x, y, change=changed, told="classical")
    n = per_class(trial.ratio, len(x), len(names))
    made, wanted = synthesise(prior, trial, x, y, names, n * trial.candidates, seed)
    space = FeatureSpace.fit(networks["classical"], x, y, copy_threshold(x, held_out.tensor()))
    verdicts = space.judge(made, wanted, trial.confidence)
    chosen = {"selected": take(verdicts, n, names)}
    chosen["unselected"] = _at_random(wanted, chosen["selected"], seed)
    for arm, kept in chosen.items():
        both = torch.cat([x, made[kept]]), torch.cat([y, wanted[kept]])
        networks[arm] = fit(*both, change=changed, told=arm)

    told = pd.DataFrame({"patient": test.table["patient"].iloc[asked].to_numpy()})
    told["label"] = y_test[asked].numpy()
    for arm in ARMS:
        for name, column in zip(names, read(networks[arm], x_test)[1].T, strict=True):
            told[f"{arm} {name}"] = column
    verdicts["selected"], verdicts["unselected"] = chosen["selected"], chosen["unselected"]
    pixels = {"real": _bytes(x), "labels": y, "synthetic": _bytes(made)}
    with disk.whole_files(folder) as new:
        save_file(pixels, new / SYNTHETIC)
        verdicts.to_csv(new / VERDICTS, index=False)
        told.to_csv(new / SCORES, index=False)


def read_fold(folder: Path) -> tuple[Images, Labels, AnyImages, pd.DataFrame]:
    """Labelled images of a fold and their classes, its synthetic images and their verdicts."""
    pixels = load_file(folder / SYNTHETIC)
    real, made = (pixels[k].float() / 127.5 - 1 for k in ("real", "synthetic"))
    return real, pixels["labels"], made, pd.read_csv(folder / VERDICTS)


def _bytes(x: AnyImages) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def _renumbered(y: Labels, position: dict[int, int]) -> Labels:
    return torch.tensor([position.get(c, -1) for c in y.tolist()])


def changed(x: Images, rng: torch.Generator) -> Images:
    """Shifted, mirrored and of other contrast: what the arm ``classical`` learns from."""
    return augmented(x, x[:, None], rng)


def _at_random(wanted: Labels, selected: np.ndarray, seed: int) -> np.ndarray:
    """As many of each class as were selected, whatever was said of them."""
    rng, kept = np.random.default_rng(seed), np.zeros(len(wanted), dtype=bool)
    for c in range(int(wanted.max()) + 1):
        of_class = (wanted == c).numpy()
        kept[rng.permutation(np.flatnonzero(of_class))[: (of_class & selected).sum()]] = True
    return kept
