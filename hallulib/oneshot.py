"""The one-shot experiment whole: joint training, controls and AUROC of every test episode.

One call goes from an image set to a table with one row per test episode and one column per
method, all methods on the same episodes. It is kept as a run: found again by its settings, resumed
where it was stopped, its weights and its table checked by checksum.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from hallulib import UserError, artifacts, meta, metrics, prototypes, train
from hallulib.data import ImageSet
from hallulib.episodes import Episodes
from hallulib.hallucinate import Hallucinator, Pool, Recipe, relabelled
from hallulib.meta import Fit, Method
from hallulib.prototypes import PrototypeClassifier
from hallulib.supports import CHANGES, Changed, ClassMemory, Oracle, Source

SPLITS_OF = {"train": 1, "val": 2, "test": 3}  # each split has episodes of its own
GENERATORS = ("score_model", "oracle", "memory", *CHANGES)
TABLE, PART = "auroc.csv", ".part.csv"


@dataclass(frozen=True)
class Trial:
    """All settings of the experiment but the images, so that two runs with equal ones are equal.

    Attributes:
        train_scheme: label column of the training episodes.
        test_scheme: of the validation and test episodes; the same is the paper's *coarse* task,
            a coarser one (train on Gleason scores, test on ISUP grades) its *fine* task.
        n_way, k_shot, n_query: of every episode; fewer ways than classes draws classes.
        n_spare: real images kept aside for the oracle.
        counts: numbers of extra supports; each has a classifier trained with as many, and 0
            is the baseline.
        generator: where extra supports come from: ``"score_model"``, or one of the controls.
        pretraining: steps of the score model's pretraining.
        pretraining_width: of its network.
        forget: forget the class vectors of the pretraining, as if it had seen no labels.
        pool: images per class that are made once and drawn from, where the recipe allows; 0
            makes the supports of every episode anew.
        kind, metric, width, reduce_to: of the classifiers, see :func:`hallulib.prototypes.build`.
        steps: training episodes.
        decays: parts of them after which the learning rate is divided by 10.
        per_epoch: episodes between two validations.
        n_validation: validation episodes.
        n_episodes: test episodes.
        seed: of everything.
        recipe: how supports are hallucinated.
        fit: how classifiers learn.
    """

    train_scheme: str
    test_scheme: str
    n_way: int = 4
    k_shot: int = 1
    n_query: int = 5
    n_spare: int = 2
    counts: tuple[int, ...] = (0, 1, 2)
    generator: str = "score_model"
    pretraining: int = 4000
    pretraining_width: int = 24
    forget: bool = False
    pool: int = 0
    kind: str = "bdc"
    metric: str = "cosine"
    width: int = 12
    reduce_to: int = 64
    steps: int = 300
    decays: tuple[float, ...] = (0.6, 0.85)
    per_epoch: int = 50
    n_validation: int = 20
    n_episodes: int = 1000
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self):
        if self.generator not in GENERATORS:
            raise UserError(f"generator is {self.generator!r}; known: {', '.join(GENERATORS)}")
        if 0 not in self.counts or max(self.counts) < 1 or min(self.counts) < 0:
            raise UserError(f"counts are {self.counts}; 0 and some number above it are needed")

    def settings(self) -> dict:
        """All of it as what JSON can hold."""
        return asdict(self) | {"counts": list(self.counts), "decays": list(self.decays)}


def vary(trial: Trial, changes: Mapping[str, object] | str) -> Trial:
    """The same trial with other values of some settings, of its recipe and its fit too.

    Args:
        trial: the standard one.
        changes: name -> value, or a text such as ``"guidance_scale=4 loss=cross_entropy"``;
            ``"nothing"`` changes nothing.

    Raises:
        UserError: an unknown name, or a value of the wrong kind.

    Example:
        >>> vary(Trial("isup", "isup"), "guidance_scale=4 loss=cross_entropy").fit.loss
        'cross_entropy'
    """
    if isinstance(changes, str):
        words = [] if changes == "nothing" else changes.split()
        pairs = [re.fullmatch(r"(\w+)=(\S+)", word) for word in words]
        if not all(pairs):
            raise UserError(
                f"settings to vary are {changes!r}; 'name=value name=value' or 'nothing' is needed"
            )
        changes = {pair[1]: pair[2] for pair in pairs}
    parts = {"": trial, "recipe": trial.recipe, "fit": trial.fit}
    known = {f.name: part for part, held in parts.items() for f in dataclasses.fields(held)}
    for name, value in changes.items():
        if name not in known or name in parts:
            names = ", ".join(sorted(set(known) - set(parts)))
            raise UserError(f"no setting {name!r} to vary; known: {names}")
        held = parts[known[name]]
        new = _like(name, value, getattr(held, name))
        parts[known[name]] = dataclasses.replace(held, **{name: new})
    return dataclasses.replace(parts[""], recipe=parts["recipe"], fit=parts["fit"])


def _like(name: str, value: object, old: object) -> object:
    """A value, or its text, as the kind of thing that the setting holds."""
    text = str(value)
    try:
        if isinstance(old, bool):
            return {"True": True, "False": False}[text]
        if isinstance(old, tuple):
            return tuple(type(old[0])(part) for part in re.findall(r"[\d.]+", text))
        return (
            type(old)(float(text)) if isinstance(old, int) and "." not in text else type(old)(text)
        )
    except (ValueError, KeyError):
        raise UserError(f"setting {name} = {text!r}; a value like {old!r} is needed") from None


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        trial: its settings.
        folder: with ``run.json``, ``losses.csv``, ``auroc.csv`` and the weights.
        auroc: one row per test episode, one column per method; ``"baseline"`` is one.
        source: the generator as trained.
        classifiers: number of extra supports -> classifier.
    """

    trial: Trial
    folder: Path
    auroc: pd.DataFrame
    source: Source
    classifiers: dict[int, PrototypeClassifier]


def run(images: ImageSet, trial: Trial, *, from_scratch: bool = False) -> Result:
    """The experiment with these settings: found, or done now and resumed where it was stopped.

    Raises:
        UserError: the image set does not have what the episodes need, or a setting is impossible.
    """

    def do(folder: Path, **_) -> None:
        source, classifiers = _train(images, trial, folder)
        _save(folder, source, classifiers)
        # what is measured is what is kept, in half precision
        _load(folder, source, classifiers)
        for name, table in _test(images, trial, source, classifiers, folder):
            table.to_csv(folder / f"{name}.partial.csv", index=False)
        parts = sorted(folder.glob("*.partial.csv"))
        pd.concat([pd.read_csv(part) for part in parts], axis=1).to_csv(
            folder / TABLE, index=False
        )
        for part in parts:
            part.unlink()

    folder = artifacts.load_or_train(
        f"one-shot-{images.name}",
        do,
        from_scratch=from_scratch,
        data=images.card.get("sha256") or images.card["origin"],
        size=images.size,
        **trial.settings(),
    )
    source, classifiers = start(images, trial)
    _load(folder, source, classifiers)
    return Result(trial, folder, pd.read_csv(folder / TABLE), source, classifiers)


def episodes(images: ImageSet, trial: Trial, split: str) -> Episodes:
    """The episodes of a split: the same for every trial with the same task and seed."""
    scheme = trial.train_scheme if split == "train" else trial.test_scheme
    return Episodes(
        images,
        scheme,
        split=split,
        n_way=trial.n_way,
        k_shot=trial.k_shot,
        n_query=trial.n_query,
        n_spare=trial.n_spare,
        seed=10 * trial.seed + SPLITS_OF[split],
    )


def start(images: ImageSet, trial: Trial) -> tuple[Source, dict[int, PrototypeClassifier]]:
    """The pretrained generator and the fresh classifiers of a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifiers = {
        n: prototypes.build(
            trial.kind,
            channels=images.channels,
            width=trial.width,
            reduce_to=trial.reduce_to,
            metric=trial.metric,
            seed=trial.seed,
        ).to(device)
        for n in trial.counts
    }
    return _source(images, trial), classifiers


def _source(images: ImageSet, trial: Trial) -> Source:
    if trial.generator == "oracle":
        return Oracle(images)
    if trial.generator == "memory":
        return ClassMemory(images, trial.test_scheme)
    if trial.generator in CHANGES:
        return Changed(trial.generator)
    model, _ = train.pretrained(
        images,
        scheme=images.schemes[0],
        steps=trial.pretraining,
        width=trial.pretraining_width,
    )
    schemes = dict.fromkeys([trial.train_scheme, trial.test_scheme])
    labels = [label for scheme in schemes for label in images.classes(scheme)]
    forget = trial.forget or len(schemes) > 1  # the labels of the test are not known before it
    hallucinator = Hallucinator(relabelled(model, labels, forget), trial.recipe, seed=trial.seed)
    return Pool(hallucinator, trial.pool, seed=trial.seed) if trial.pool else hallucinator


def _train(images, trial, folder):
    """The generator and the classifiers after the joint training, each with its best weights."""
    source, classifiers = start(images, trial)
    bar = tqdm(total=trial.steps, desc=f"joint training on {images.name}")
    for state in meta.meta_train(
        source,
        classifiers,
        images,
        episodes(images, trial, "train"),
        steps=trial.steps,
        fit=trial.fit,
        validation=episodes(images, trial, "val"),
        n_validation=trial.n_validation,
        per_epoch=trial.per_epoch,
        decays=trial.decays,
        seed=trial.seed,
        folder=folder,
        settings=trial.settings(),
    ):
        bar.update(state.step - bar.n)
    bar.close()
    for classifier, best in zip(classifiers.values(), state.best, strict=True):
        classifier.load_state_dict(best)
    return source, classifiers


def _test(images, trial, source, classifiers, folder) -> Iterator[tuple[str, pd.DataFrame]]:
    """Tables of AUROC, after each few episodes; each source of supports has a table."""
    extra = [n for n in trial.counts if n]
    baseline = classifiers[0]
    own = {f"+{n}": Method(n, classifiers[n]) for n in extra}
    own |= {f"+{n} at test only": Method(n, baseline) for n in extra}
    todo = [("baseline", {"baseline": Method(0, baseline)}, Source(), False)]
    todo += [("permuted labels", {"permuted labels": Method(0, baseline)}, Source(), True)]
    for name, control in _controls(images, trial):
        todo += [(name, {f"{name} +{n}": Method(n, baseline) for n in extra}, control, False)]
    todo += [(trial.generator, own, source, False)]
    tasks = episodes(images, trial, "test")
    bar = tqdm(total=len(todo) * trial.n_episodes, desc="test episodes")
    for name, methods, maker, permute in todo:
        file = folder / f"{name}{PART}"
        done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=list(methods))
        bar.update(len(done))
        if len(done):
            yield name, done  # what an earlier, interrupted call measured
        parts = meta.evaluate(
            list(methods.values()),
            maker,
            images,
            tasks,
            trial.n_episodes,
            first=len(done),
            fit=trial.fit,
            permute=permute,
            seed=trial.seed,
        )
        for part in parts:
            new = pd.DataFrame(part, columns=list(methods))
            done = pd.concat([done, new], ignore_index=True) if len(done) else new
            bar.update(len(part))
            yield name, done
    bar.close()


def _write(file: Path, table: pd.DataFrame) -> None:
    """Write a table beside its place and rename it into it."""
    partial = file.with_name(file.name + ".partial")
    table.to_csv(partial, index=False)
    os.replace(partial, file)


def _controls(images: ImageSet, trial: Trial) -> Iterator[tuple[str, Source]]:
    """What a generator is compared with, given to the classifier of the baseline."""
    if trial.n_spare >= max(trial.counts):
        yield "oracle", Oracle(images)
    if trial.train_scheme == trial.test_scheme:
        yield "memory", ClassMemory(images, trial.test_scheme)
    for change in ("flips", "shifts"):
        yield change, Changed(change)


def _save(folder: Path, source: Source, classifiers: dict[int, PrototypeClassifier]) -> None:
    """Weights in half precision: what is shipped must be small."""
    parts = {"generator": _weights(source)}
    parts |= {f"plus_{n}": c.state_dict() for n, c in classifiers.items()}
    for name, tensors in parts.items():
        kept = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in kept.items()}, folder / f"{name}.safetensors")


def _weights(source: Source) -> dict[str, torch.Tensor]:
    return {k: v for k, v in source.tensors().items() if not k.startswith("adam.")}


def _load(folder: Path, source: Source, classifiers: dict[int, PrototypeClassifier]) -> None:
    saved = {k: v.float() for k, v in load_file(folder / "generator.safetensors").items()}
    if saved:
        source.load_tensors(source.tensors() | saved)
    for n, classifier in classifiers.items():
        tensors = load_file(folder / f"plus_{n}.safetensors")
        classifier.load_state_dict(tensors)
        classifier.eval()


def table(result: Result, ceiling: float | None = None) -> pd.DataFrame:
    """Each method's AUROC in the paper's form and with honest intervals.

    Args:
        result: of a run.
        ceiling: best possible AUROC of the task, if it is known.

    Returns:
        One row per method: mean and standard deviation of the first ten episodes, as the paper
        reports; mean over all with its 95 % interval; mean paired difference to the baseline
        with its interval; episodes that would show this difference in four of five studies;
        share of the way from chance (0.5) to the ceiling.
    """
    rows = {}
    baseline = result.auroc["baseline"]
    for name, values in result.auroc.items():
        ten, mean = values[:10], metrics.mean_interval(values)
        row = {"ten": ten.mean(), "ten_sd": ten.std(ddof=0)}
        row |= {"mean": mean.value, "low": mean.low, "high": mean.high, "episodes": mean.n}
        if name != "baseline":
            gain, spread = metrics.paired_difference(values, baseline), (values - baseline).std()
            row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            if gain.value and spread > 0:
                row["needed"] = metrics.episodes_needed(gain.value, float(spread))
        if ceiling is not None:
            row["share"] = (mean.value - 0.5) / (ceiling - 0.5)
        rows[name] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def share_of_oracle(result: Result, n: int, seed: int = 0) -> metrics.Interval:
    """Gain of n hallucinated supports as a share of the gain of n real ones, bootstrapped.

    Args:
        result: of a run with an oracle.
        n: extra supports per class.
        seed: of the resamples of episodes.

    Raises:
        UserError: the run has no such column.
    """
    needed = ["baseline", f"+{n}", f"oracle +{n}"]
    missing = [name for name in needed if name not in result.auroc]
    if missing:
        raise UserError(f"the run in {result.folder} has no method {missing[0]!r}")

    def share(base: np.ndarray, made: np.ndarray, real: np.ndarray) -> float:
        if real.mean() == base.mean():
            raise UserError("the oracle gains nothing")
        return float((made - base).mean() / (real - base).mean())

    return metrics.bootstrap(share, *(result.auroc[name].to_numpy() for name in needed), seed=seed)
