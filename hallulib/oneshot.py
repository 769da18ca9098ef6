"""The one-shot experiment whole: joint training, controls and AUROC of every test episode.

One call goes from an image set to a table with one row per test episode and one column per
method, all methods on the same episodes. It is kept as a run: found again by its settings, resumed
where it was stopped, its weights and its table checked by checksum.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from hallulib import UserError, artifacts, disk, meta, parallel, prototypes, runs, train, unet
from hallulib.adaptation import relabelled
from hallulib.comparison import share_of_oracle, table
from hallulib.data import ImageSet
from hallulib.episodes import Episodes, TooFew
from hallulib.hallucinate import Hallucinator, Pool
from hallulib.integrity import UNITS
from hallulib.learner import Fit
from hallulib.meta import Method
from hallulib.prototypes import PrototypeClassifier
from hallulib.supports import CHANGES, Changed, ClassMemory, Oracle, Source
from hallulib.trial import GENERATORS, Result, Trial

__all__ = [
    "GENERATORS",
    "Result",
    "Trial",
    "check_served",
    "episodes",
    "run",
    "share_of_oracle",
    "start",
    "table",
]

SPLITS_OF = {"train": 1, "val": 2, "test": 3}  # each split has episodes of its own
TABLE, PART = "auroc.csv", ".part.csv"
Classifiers = Mapping[int, PrototypeClassifier]


def run(images: ImageSet, trial: Trial, *, from_scratch: bool = False) -> Result:
    """The experiment with these settings: found, or done now and resumed where it was stopped.

    Args:
        images: an open image set.
        trial: all settings.
        from_scratch: do it again even if it is there.

    Raises:
        UserError: the image set does not have what the episodes need, or a setting is impossible.
    """
    check_served(images, trial)  # what is missing is told before hours of training
    folder = artifacts.load_or_train(
        f"one-shot-{images.name}",
        lambda folder, **_: _do(images, trial, folder),
        together=True,
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        **trial.settings(),
    )
    source, classifiers = start(images, trial, pretrained=bool(trial.pool))
    _load(folder, source, classifiers)
    return Result(trial, folder, _read(folder / TABLE), source, classifiers)


def check_served(images: ImageSet, trial: Trial) -> None:
    """Refuses a trial whose episodes some split cannot serve, and says what it could serve.

    Raises:
        UserError: the image set does not have what the episodes need.
    """
    fault = _too_few(images, trial)
    if fault is None:
        return
    spares = [trial.n_spare] if trial.generator == "oracle" else range(trial.n_spare, -1, -1)
    tasks = itertools.product(range(trial.n_query, 0, -1), spares)
    less = (replace(trial, n_query=n_query, n_spare=n_spare) for n_query, n_spare in tasks)
    most = next((task for task in less if _too_few(images, task) is None), None)
    way = f"one query for each class is too many too: more {UNITS[images.unit][1]} of that class,"
    way += " or a larger share of them for that split, are needed"
    if most is not None:
        way = f"n_query={most.n_query} n_spare={most.n_spare} is the most that all splits can"
        way += " serve, and the parameter VARY of a chapter sets it"
    raise UserError(f"{fault}; {way}")


def _too_few(images: ImageSet, trial: Trial) -> TooFew | None:
    """What is wrong with the first split that cannot serve the episodes of a trial."""
    try:
        for split in SPLITS_OF:
            episodes(images, trial, split)
    except TooFew as fault:
        return fault
    return None


def _do(images: ImageSet, trial: Trial, folder: Path) -> None:
    """Train, keep the weights, and measure what is kept, in half precision."""
    source, classifiers = _train(images, trial, folder)
    if parallel.is_main():
        _save(folder, source, classifiers, images)
    parallel.wait()
    _load(folder, source, classifiers)
    todo = list(_todo(images, trial, source, classifiers))
    told = dict(desc="test episodes", disable=not parallel.is_main())
    bar = tqdm(total=len(todo) * trial.n_episodes, **told)
    parts = []
    for measurement in todo:
        parts.append(folder / f"{measurement.name}{PART}")
        for done in _measure(images, trial, measurement, parts[-1]):
            if parallel.is_main():
                _write(parts[-1], done)
            bar.update((len(parts) - 1) * trial.n_episodes + len(done) - bar.n)
    bar.close()
    if parallel.is_main():
        _write(folder / TABLE, pd.concat([_read(part) for part in parts], axis=1))
        for part in parts:
            disk.drop(part)


def episodes(images: ImageSet, trial: Trial, split: str) -> Episodes:
    """The episodes of a split: the same for every trial with the same task and seed.

    Args:
        images: an open image set.
        trial: says the label column, the size of the episodes and the seed.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        UserError: the split does not have what the episodes need.
    """
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


def start(
    images: ImageSet, trial: Trial, *, pretrained: bool = True
) -> tuple[Source, dict[int, PrototypeClassifier]]:
    """The generator and the classifiers of a trial before the joint training.

    Args:
        images: an open image set.
        trial: its settings.
        pretrained: begin with the pretrained score model, which is trained now if it is not
            there; without it the weights are random, to be replaced by those of a finished run.

    Raises:
        UserError: the image set has no such label column, or a setting is impossible.
    """
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
    return _source(images, trial, pretrained, device), classifiers


def _source(images: ImageSet, trial: Trial, pretrained: bool, device: str) -> Source:
    if trial.generator == "oracle":
        return Oracle(images)
    if trial.generator == "memory":
        return ClassMemory(images, trial.test_scheme)
    if trial.generator in CHANGES:
        return Changed(trial.generator)
    if pretrained:
        model, _ = train.pretrained(
            images,
            scheme=images.schemes[0],
            steps=trial.pretraining,
            width=trial.pretraining_width,
            device=device,
        )
    else:
        model = unet.build(
            size=images.size, channels=images.channels, width=trial.pretraining_width
        ).to(device)
    schemes = dict.fromkeys([trial.train_scheme, trial.test_scheme])
    labels = [label for scheme in schemes for label in images.classes(scheme)]
    forget = trial.forget or len(schemes) > 1  # the labels of the test are not known before it
    hallucinator = Hallucinator(relabelled(model, labels, forget), trial.recipe, seed=trial.seed)
    return Pool(hallucinator, trial.pool, seed=trial.seed) if trial.pool else hallucinator


def _train(images: ImageSet, trial: Trial, folder: Path) -> tuple[Source, Classifiers]:
    """The generator and the classifiers after the joint training, each with its best weights."""
    source, classifiers = start(images, trial)
    loop = meta.meta_train(
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
    )
    state = runs.finished(loop, trial.steps, f"joint training on {images.name}")
    for classifier, best in zip(classifiers.values(), state.best, strict=True):
        classifier.load_state_dict(best)
    return source, classifiers


class _Measurement(NamedTuple):
    """Columns of the table that share one source of extra supports."""

    name: str
    methods: dict[str, Method]
    source: Source
    fit: Fit
    permute: bool = False


def _todo(
    images: ImageSet, trial: Trial, source: Source, classifiers: Classifiers
) -> Iterator[_Measurement]:
    """The trial's own measurement, after those that it is compared with."""
    extra, baseline = [n for n in trial.counts if n], classifiers[0]
    plain = {"baseline": Method(0, baseline)}
    yield _Measurement("baseline", plain, Source(), trial.fit)
    shuffled = {"permuted labels": Method(0, baseline)}
    yield _Measurement("permuted labels", shuffled, Source(), trial.fit, permute=True)
    # real or changed images need no choice, and there may not be enough for one
    fit = replace(trial.fit, candidates=1)
    for name, control in _controls(images, trial):
        methods = {f"{name} +{n}": Method(n, baseline) for n in extra}
        yield _Measurement(name, methods, control, fit)
    own = {f"+{n}": Method(n, classifiers[n]) for n in extra}
    own |= {f"+{n} at test only": Method(n, baseline) for n in extra}
    yield _Measurement("generator", own, source, trial.fit)


def _controls(images: ImageSet, trial: Trial) -> Iterator[tuple[str, Source]]:
    """What a generator is compared with, given to the classifier of the baseline."""
    most = max(trial.counts)
    if trial.n_spare >= most:
        yield "oracle", Oracle(images)
    if trial.train_scheme == trial.test_scheme:
        memory = ClassMemory(images, trial.test_scheme)
        if min(map(len, memory.rows.values())) >= most:
            yield "memory", memory
    for change in ("flips", "shifts"):
        yield change, Changed(change)


def _measure(
    images: ImageSet, trial: Trial, measurement: _Measurement, part: Path
) -> Iterator[pd.DataFrame]:
    """AUROC of all episodes so far, after each few; first what an interrupted call measured."""
    names = list(measurement.methods)
    done = _read(part) if part.exists() else pd.DataFrame(columns=names, dtype=float)
    yield done
    for new in meta.evaluate(
        list(measurement.methods.values()),
        measurement.source,
        images,
        episodes(images, trial, "test"),
        trial.n_episodes,
        first=len(done),
        fit=measurement.fit,
        permute=measurement.permute,
        seed=trial.seed,
    ):
        done = pd.DataFrame(np.concatenate([done.to_numpy(), new]), columns=names)
        yield done


def _write(file: Path, table: pd.DataFrame) -> None:
    """Write a table beside its place and rename it into it."""
    with disk.whole(file) as partial:
        table.to_csv(partial, index=False)


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file)


def _save(folder: Path, source: Source, classifiers: Classifiers, images: ImageSet) -> None:
    """Weights in half precision: what is shipped must be small."""
    labels = source.model.labels if isinstance(source, Hallucinator) else ()
    # one entry: safetensors writes several in any order, and equal runs have equal bytes
    told = {"images": json.dumps({"channels": images.channels, "labels": labels})}
    parts = {"generator": _weights(source)}
    parts |= {f"plus_{n}": c.state_dict() for n, c in classifiers.items()}
    with disk.whole_files(folder) as partial:
        for name, tensors in parts.items():
            kept = {k: v.to(_precision(k, v)).contiguous() for k, v in tensors.items()}
            save_file(kept, partial / f"{name}.safetensors", told)


def _precision(name: str, tensor: Tensor) -> torch.dtype:
    if name.startswith("adam."):  # squares of gradients are too small for half precision
        return torch.bfloat16 if tensor.ndim else tensor.dtype
    return torch.half if tensor.is_floating_point() else tensor.dtype


def _weights(source: Source) -> dict[str, Tensor]:
    """All of a source that its test episodes need: what Adam remembers if they are learnt."""
    return {
        k: v
        for k, v in source.tensors().items()
        if not (source.per_class and k.startswith("adam."))
    }


def _load(folder: Path, source: Source, classifiers: Classifiers) -> None:
    saved = load_file(folder / "generator.safetensors")
    if saved:
        full = {k: v.float() if v.is_floating_point() else v for k, v in saved.items()}
        source.load_tensors(source.tensors() | full)
    for n, classifier in classifiers.items():
        tensors = load_file(folder / f"plus_{n}.safetensors")
        classifier.load_state_dict(tensors)
        classifier.eval()
