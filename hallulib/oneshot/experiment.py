"""The one-shot experiment whole: joint training, controls and AUROC of every test episode.

One call goes from an image set to a table with one row per test episode and one column per
method, all methods on the same episodes. It is kept as a run: found again by its settings, resumed
where it was stopped, its weights and its table checked by checksum.
"""

import contextlib
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hallulib import UserError
from hallulib.data.checks import UNITS
from hallulib.data.imageset import ImageSet
from hallulib.diffusion import train, unet
from hallulib.diffusion.unet import relabelled
from hallulib.evidence.metrics import auroc
from hallulib.evidence.resnet import read, train_resnet
from hallulib.oneshot import bdc, hallucinate, joint
from hallulib.oneshot.bdc import PrototypeClassifier
from hallulib.oneshot.episodes import Episodes, TooFew
from hallulib.oneshot.hallucinate import Hallucinator, Pool, Recipe, Source
from hallulib.oneshot.joint import Fit, Method, Tasks, evaluate
from hallulib.shapes import Images
from hallulib.storage import disk, parallel, store
from hallulib.storage.settings import Count, Positive, Seed, Several, Width, check, one_of, vary

GENERATORS = ("score_model", *hallucinate.CONTROLS)
SPLITS_OF = {"train": 1, "val": 2, "test": 3}  # each split has episodes of its own
TABLE, PART, GENERATOR = "auroc.csv", ".part.csv", "generator.safetensors"
PERMUTED = "permuted patients"  # the control whose test patients swap their labels
PERMUTATIONS = 20  # of them
OF_RUN = ("data", "size", "protocol", "origin")  # settings of a run that are none of its trial
PROTOCOL = 4  # raised where a trial starts, is trained or is measured in another way
Classifiers = dict[int, PrototypeClassifier]  # by the number of extra supports
Measurement = tuple[dict[str, Method], Source, Tasks]  # the columns that share a source


@dataclass(frozen=True)
class Trial:
    """All settings of the experiment but the images, so that two runs with equal ones are equal.

    An unknown name or an impossible number raises a `UserError`.

    Attributes:
        train_scheme: label column of the training episodes.
        test_scheme: of the validation and test episodes; the same is the paper's *coarse* task, a
            coarser one (train on Gleason scores, test on ISUP grades) its *fine* task.
        n_way, k_shot, n_query: of every episode; fewer ways than classes draws classes.
        groups: of test patients, within which test episodes are dealt; at most so many.
        n_spare: real images kept aside for the oracle.
        counts: numbers of extra supports, each with a classifier trained so; 0 is the baseline.
        generator: where extra supports come from: ``"score_model"``, or one of the controls.
        pretraining, pretraining_width: steps and network width of the score model's pretraining.
        begin: the score model that the pretraining starts from, see
            `hallulib.diffusion.train.pretrained`; ``"nothing"`` is random weights.
        forget: forget the class vectors of the pretraining, as if it had seen no labels.
        pool: images per class, made once and drawn from where the recipe allows; 0 makes the
            supports of every episode anew.
        kind, width, reduce_to: of the classifiers, see `hallulib.oneshot.bdc.build`.
        supervised: steps on the labels of ``train_scheme``, a linear layer on the embedding, with
            which they start, as Xie et al. 2022 pretrain theirs; 0 starts from random weights.
        steps, n_validation, n_episodes: training, validation and test episodes.
        decays: parts of the steps after which the learning rate is divided by 10.
        per_epoch: training episodes between two validations.
        seed: of everything but the test episodes, which are the same for all seeds.
        recipe, fit: how supports are hallucinated, and how classifiers learn.
    """

    train_scheme: str
    test_scheme: str
    n_way: Several = 4
    k_shot: Positive = 1
    n_query: Positive = 5
    n_spare: Count = 2
    groups: Positive = 10
    counts: tuple[int, ...] = (0, 1, 2)
    generator: Annotated[str, one_of(GENERATORS)] = "score_model"
    pretraining: Count = 4000
    pretraining_width: Width = 24
    begin: str = "nothing"
    forget: bool = False
    pool: Count = 0
    kind: Annotated[str, one_of(bdc.KINDS)] = "bdc"
    width: Positive = 12
    reduce_to: Positive = 64
    supervised: Count = 500
    steps: Count = 200
    decays: tuple[float, ...] = (0.6, 0.85)
    per_epoch: Positive = 50
    n_validation: Count = 20
    n_episodes: Several = 400
    seed: Seed = 0
    recipe: Recipe = Recipe()
    fit: Fit = Fit()

    def __post_init__(self):
        check(self)
        if 0 not in self.counts or max(self.counts) < 1 or min(self.counts) < 0:
            raise UserError(f"counts are {self.counts}; 0 and some number above it are needed")
        if not all(0 <= part <= 1 for part in self.decays):
            raise UserError(f"decays are {self.decays}; parts of the training, 0 to 1, are needed")
        steps, start = self.recipe.adapt_steps, self.recipe.start_time
        if self.pool and self.generator == "score_model" and (steps or start < 1):
            raise UserError(
                f"a pool of images found with adapt_steps={steps} start_time={start}; its images"
                " are to depend on nothing but the class: adapt_steps=0 start_time=1 is needed"
            )

    def episodes(self, images: ImageSet, split: str) -> Episodes:
        """The episodes of a split, the same for every trial with the same task and seed; a
        `UserError` if the split does not have what they need.
        """
        scheme = self.train_scheme if split == "train" else self.test_scheme
        deal = {name: getattr(self, name) for name in ("n_way", "k_shot", "n_query", "n_spare")}
        if split == "test":
            return Episodes(images, scheme, split=split, groups=self.groups, **deal)
        seed = 10 * self.seed + SPLITS_OF[split]
        return Episodes(images, scheme, split=split, seed=seed, **deal)

    def settings(self) -> dict:
        """All of it as what JSON can hold, and what it begins from, as it is now."""
        listed: dict[str, Any] = {"counts": list(self.counts), "decays": list(self.decays)}
        if self.begin != "nothing":
            listed["origin"] = store.contents(store.trained(self.begin))
        return asdict(self) | listed | {"protocol": PROTOCOL}

    @classmethod
    def of(cls, told: dict[str, object]) -> "Trial":
        """The trial of a run that was told these settings and else the defaults; a `UserError` if
        a setting is unknown, or a value impossible.
        """
        own = {k: v for k, v in told.items() if k.split(".")[0] not in OF_RUN}
        return vary(cls("", ""), own)


@dataclass(frozen=True)
class Result:
    """What a run of a ``trial`` left.

    The ``folder`` has ``run.json``, ``losses.csv``, ``auroc.csv`` and the weights in half
    precision; ``auroc`` has one row per test episode and one column per method, of which
    ``"baseline"`` is one. ``source`` is the generator as it was measured, ``classifiers`` are by
    number of extra supports.
    """

    trial: Trial
    folder: Path
    auroc: pd.DataFrame
    source: Source
    classifiers: Classifiers


def run(images: ImageSet, trial: Trial, *, from_scratch: bool = False) -> Result:
    """The experiment with these settings: found, or done now and resumed where it was stopped.

    Raises:
        UserError: the image set does not have what the episodes need.
    """
    check_served(images, trial)  # what is missing is told before hours of training
    folder = store.load_or_train(
        f"one-shot-{images.name}",
        lambda folder, **_: _do(images, trial, folder),
        defaults=Trial,
        together=True,
        from_scratch=from_scratch,
        data=images.identity,
        size=images.size,
        **trial.settings(),
    )
    source, classifiers = start(images, trial, pretrained=bool(trial.pool))
    _load(folder, source, classifiers)
    return Result(trial, folder, pd.read_csv(folder / TABLE), source, classifiers)


def check_served(images: ImageSet, trial: Trial) -> None:
    """Raises a `UserError`, which says what could be served, if a split cannot serve a trial."""
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
            trial.episodes(images, split)
    except TooFew as fault:
        return fault
    return None


def _do(images: ImageSet, trial: Trial, folder: Path) -> None:
    """Train, keep the weights, and measure what is kept, in half precision."""
    source, classifiers = start(images, trial)
    if trial.supervised:
        backbone, embedding, _ = _supervised(images, trial, trial.train_scheme).children()
        for classifier in classifiers.values():
            classifier.backbone.load_state_dict(backbone.state_dict())
            classifier.embedding.load_state_dict(embedding.state_dict())
    own = ("steps", "fit", "n_validation", "per_epoch", "decays", "seed")
    loop = joint.meta_train(
        source,
        classifiers,
        images,
        trial.episodes(images, "train"),
        validation=trial.episodes(images, "val"),
        folder=folder,
        settings=trial.settings(),
        **{name: getattr(trial, name) for name in own},
    )
    state = store.finished(loop, trial.steps, f"joint training on {images.name}")
    for classifier, best in zip(classifiers.values(), state.best, strict=True):
        classifier.load_state_dict(best)
    if parallel.is_main():
        _save(folder, source, classifiers, images)
    parallel.wait()
    _load(folder, source, classifiers)
    _measure(images, trial, folder, _todo(images, trial, source, classifiers))


def start(
    images: ImageSet, trial: Trial, *, pretrained: bool = True
) -> tuple[Source, Classifiers]:
    """The generator and the classifiers of a trial before the joint training. A score model is the
    ``pretrained`` one, which is trained now if it is not there, or has random weights, to be
    replaced by those of a finished run.

    Raises:
        UserError: the image set has no such label column, or a setting is impossible.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifiers = _fresh(trial, images.channels, device)
    if trial.generator in hallucinate.CONTROLS:
        return hallucinate.control(trial.generator, images, trial.test_scheme), classifiers
    steps, width = trial.pretraining, trial.pretraining_width
    if pretrained:
        scheme = images.schemes[0]
        own: dict[str, Any] = dict(begin=trial.begin, seed=trial.seed, device=device)
        model, _ = train.pretrained(images, scheme=scheme, steps=steps, width=width, **own)
    else:
        model = unet.build(size=images.size, channels=images.channels, width=width).to(device)
    schemes = dict.fromkeys([trial.train_scheme, trial.test_scheme])
    labels = [label for scheme in schemes for label in images.classes(scheme)]
    forget = trial.forget or len(schemes) > 1  # the labels of the test are not known before it
    source = Hallucinator(relabelled(model, labels, forget), trial.recipe)
    return (Pool(source, trial.pool, seed=trial.seed) if trial.pool else source), classifiers


def _fresh(trial: Trial, channels: int, device: str) -> Classifiers:
    """A classifier for each number of extra supports, all of the same initial weights."""
    own = {k: getattr(trial, k) for k in ("kind", "width", "reduce_to", "seed")}
    return {n: bdc.build(channels=channels, **own).to(device) for n in trial.counts}


def _todo(
    images: ImageSet, trial: Trial, source: Source, classifiers: Classifiers
) -> dict[str, Measurement]:
    """The trial's own measurement, after those that it is compared with."""
    extra, baseline = [n for n in trial.counts if n], classifiers[0]
    scheme, most = trial.test_scheme, max(extra)
    memory = min(map(len, hallucinate.ClassMemory(images, scheme).rows.values()))
    remembers = memory >= most and trial.train_scheme == scheme
    can_serve = {"oracle": trial.n_spare >= most, "memory": remembers}
    tasks, alone = trial.episodes(images, "test"), Method(0, baseline)
    todo: dict[str, Measurement] = {"baseline": ({"baseline": alone}, Source(), tasks)}
    with contextlib.suppress(TooFew):
        draws, each = [tasks.permuted(i) for i in range(PERMUTATIONS)], trial.n_episodes
        dealt = [draws[i * PERMUTATIONS // each][i] for i in range(each)]
        todo[PERMUTED] = {PERMUTED: alone}, Source(), dealt
    for name in ("oracle", "memory", "flips", "shifts"):
        if can_serve.get(name, True):
            methods = {f"{name} +{n}": Method(n, baseline) for n in extra}
            todo[name] = methods, hallucinate.control(name, images, scheme), tasks
    own = {f"+{n}": Method(n, classifiers[n]) for n in extra}
    own |= {f"+{n} at test only": Method(n, baseline) for n in extra}
    return todo | {"generator": (own, source, tasks)}


def without_support(
    images: ImageSet, trial: Trial, classifier: PrototypeClassifier
) -> pd.DataFrame:
    """AUROC of the test episodes by methods that never look at their support.

    Where training images have labels of the test's classes, a template of each class may be all
    that a generator brings: ``"class mean"`` compares queries with the mean training vector of
    each class, ``"supervised"`` is a ResNet-18 that learns from these labels, as the start of
    the ``classifier`` did. One row per episode; no column where a class has no such label.
    """
    tasks = [*trial.episodes(images, "test").take(trial.n_episodes)]
    labels, names = images.labels(trial.test_scheme), images.classes(trial.test_scheme)
    split = images.table["split"].where(labels.numpy() >= 0)
    known, asked = (np.flatnonzero(split == name) for name in ("train", "test"))
    x, y, queries = images.tensor(known), labels[known], images.tensor(asked)
    place = np.array([[names.index(name) for name in task.classes] for task in tasks])
    if not np.isin(place, y).all():
        return pd.DataFrame(index=range(len(tasks)))
    network = _supervised(images, trial, trial.test_scheme)
    with torch.no_grad():
        of_known, of_asked = (_embedded(classifier, part) for part in (x, queries))
        means = torch.stack([of_known[y == c].mean(0) for c in range(len(names))])
        scores = {"class mean": classifier.logits(of_asked, means.nan_to_num()[:, None]).cpu()}
    scores["supervised"] = torch.as_tensor(read(network, queries)[1]).log()
    rows = np.searchsorted(asked, np.stack([task.query for task in tasks]))
    answers = np.stack([task.answers for task in tasks])
    dealt = {name: of[rows[..., None], place[:, None]] for name, of in scores.items()}
    return pd.DataFrame({name: auroc(answers, of.softmax(-1)) for name, of in dealt.items()})


def _supervised(images: ImageSet, trial: Trial, scheme: str) -> nn.Sequential:
    """A ResNet-18 with the trial's embedding that learnt the labels of the training images."""
    known, steps = images.select("train", labelled=scheme), trial.supervised or trial.steps
    x, y, width = known.tensor(), known.labels(scheme), trial.width
    pooling = _fresh(trial, images.channels, "cpu")[0].embedding
    how: dict[str, Any] = dict(steps=max(1, steps), seed=trial.seed)
    return train_resnet(x, y, width=width, pooling=pooling, **how)


def _embedded(classifier: PrototypeClassifier, x: Images) -> Tensor:
    device = classifier.log_scale.device
    return torch.cat([classifier.embed(part.to(device)) for part in x.split(256)])


def _measure(images: ImageSet, trial: Trial, folder: Path, todo: dict[str, Measurement]) -> None:
    """Write the AUROC of all episodes after each few, on from what an interrupted call wrote."""
    parts = {k: folder / f"{k}{PART}" for k in todo}
    total, hidden = len(todo) * trial.n_episodes, not parallel.is_main()
    bar = tqdm(total=total, desc="test episodes", disable=hidden)
    for name, (methods, source, tasks) in todo.items():
        part, columns = parts[name], list(methods)
        done = pd.read_csv(part) if part.exists() else pd.DataFrame(columns=columns, dtype=float)
        bar.update(len(done))
        for new in evaluate(
            list(methods.values()),
            source,
            images,
            tasks,
            trial.n_episodes,
            first=len(done),
            weight=trial.fit.weight,
            seed=trial.seed,
        ):
            done = pd.DataFrame(np.concatenate([done.to_numpy(), new]), columns=columns)
            bar.update(len(new))
            if parallel.is_main():
                store.write_table(part, done)
    bar.close()
    if parallel.is_main():
        baseline = todo["baseline"][0]["baseline"].classifier
        measured = [*map(pd.read_csv, parts.values()), without_support(images, trial, baseline)]
        store.write_table(folder / TABLE, pd.concat(measured, axis=1))
        for part in parts.values():
            disk.drop(part)


def _save(folder: Path, source: Source, classifiers: Classifiers, images: ImageSet) -> None:
    """Weights in half precision: what is shipped must be small."""
    labels = source.model.labels if isinstance(source, Hallucinator) else ()
    # one entry: safetensors writes several in any order, and equal runs have equal bytes
    metadata = {"images": json.dumps({"channels": images.channels, "labels": labels})}
    # what Adam remembers matters where test episodes are learnt
    forgotten = "adam." if source.per_class else ()
    state = source.state_dict()
    parts = {"generator": {k: v for k, v in state.items() if not k.startswith(forgotten)}}
    parts |= {f"plus_{n}": c.state_dict() for n, c in classifiers.items()}
    with disk.whole_files(folder) as partial:
        for name, tensors in parts.items():
            halved = {k: _halved(k, v).contiguous() for k, v in tensors.items()}
            save_file(halved, partial / f"{name}.safetensors", metadata)


def _halved(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or name.endswith(".step"):  # counts, rates
        return tensor
    # squares of gradients are too small for half precision
    return tensor.bfloat16() if name.startswith("adam.") else tensor.half()


def load(
    folder: Path, names: tuple[str, ...], device: str
) -> tuple[Trial, Hallucinator, Classifiers]:
    """What a joint training left, its generator ready for classes of these names; those it knows
    keep what the joint training taught it of them.

    Raises:
        UserError: no folder of a finished `run`, or supports that came from no score model.
    """
    if not all((folder / file).exists() for file in (store.CARD, GENERATOR)):
        raise UserError(
            f"{folder} is not a finished joint training; the folder of a "
            "hallulib.oneshot.experiment.run is needed"
        )
    card = store.card(folder)  # whose files have their checksums
    settings = store.told(card, store.defaults_of(Trial))
    trial = Trial.of(settings)
    if trial.generator != "score_model" or trial.pool:
        raise UserError(
            f"{folder} was trained with generator={trial.generator} pool={trial.pool}; "
            "generator=score_model pool=0 is needed"
        )
    with safe_open(folder / GENERATOR, "pt") as file:
        trained_on = json.loads(file.metadata()["images"])
    channels, width = trained_on["channels"], trial.pretraining_width
    model = unet.build(size=settings["size"], channels=channels, width=width).to(device)
    source = Hallucinator(relabelled(model, names), trial.recipe)
    classifiers = _fresh(trial, channels, device)
    _load(folder, source, classifiers, trained_on["labels"])
    return trial, source, classifiers


def _load(
    folder: Path, source: Source, classifiers: Classifiers, labels: list[str] | None = None
) -> None:
    """Give a source and classifiers their weights; labels: of the source, where it has others."""
    saved, halves = load_file(folder / GENERATOR), (torch.half, torch.bfloat16)
    learnt = {k: v.float() if v.dtype in halves else v for k, v in saved.items()}
    if labels is not None and isinstance(source, Hallucinator):
        _rename(learnt, source, labels)
    source.load_state_dict(source.state_dict() | learnt)
    for n, classifier in classifiers.items():
        classifier.load_state_dict(load_file(folder / f"plus_{n}.safetensors"))
        classifier.eval()


def _rename(learnt: dict[str, Tensor], source: Hallucinator, labels: list[str]) -> None:
    """Class vectors, and Adam's memory of them, for a source's labels: new ones start at zero."""
    weight = source.model.get_parameter("network.classes.weight")
    place = [p is weight for p in source.optimizer.param_groups[0]["params"]].index(True)
    of_classes = {"model.network.classes.weight"}
    of_classes |= {f"adam.{place}.exp_avg", f"adam.{place}.exp_avg_sq"}
    rows = {i: labels.index(name) for i, name in enumerate(source.model.labels) if name in labels}
    for key in of_classes & learnt.keys():
        old, learnt[key] = learnt[key], learnt[key].new_zeros(weight.shape)
        learnt[key][list(rows)] = old[list(rows.values())]
