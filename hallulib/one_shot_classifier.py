r"""One-shot diagnosis as a scikit-learn estimator: a few images of each class, and more of them.

``fit`` is a test episode: the generator of a finished joint training learns the support and
hallucinates more of each class, and the prototypes

.. math:: p_k = \frac{\sum_i v_{ki} + w \sum_{j \le n} \hat v_{kj}}{m_k + n w}

answer for any number of queries.

Source:
    Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from sklearn.base import ClassifierMixin
from torch import Tensor

from hallulib import UserError, artifacts, prototypes, unet
from hallulib.adaptation import relabelled
from hallulib.calibration import finite, log_odds
from hallulib.episodes import Episode
from hallulib.hallucinate import Hallucinator
from hallulib.image_estimator import ImageEstimator
from hallulib.learner import surest
from hallulib.prototypes import PrototypeClassifier
from hallulib.settings import Count, of_kind
from hallulib.trial import Trial


class OneShotClassifier(ClassifierMixin, ImageEstimator):
    """Classify images from one or a few examples per class, with hallucinated ones beside them.

    Forms of images: see :class:`hallulib.image_estimator.ImageEstimator`, which also saves and
    loads; their side and channels must be those of the joint training.

    Args:
        pretrained: folder of a finished :func:`hallulib.oneshot.run`, or the name of one that
            ships with the library.
        n_hallucinated: images made for each class; 0 uses the support alone. A number that was
            trained for has a classifier of its own, others take that of the support alone.
        channels: of images that come as rows.
        device: a GPU if there is one.
        random_state: of all that is made, a whole number.

    Attributes:
        classes_: the labels, sorted.
        hallucinated_: (classes, n_hallucinated, channels, side, side), in [-1, 1].
        network_: the classifier that embeds images.
        prototypes_: (classes, d), one vector per class.

    Example:
        >>> from hallulib import data
        >>> x = data.open("phantom", 32).select("test", labelled="isup").tensor(range(8)).numpy()
        >>> some = OneShotClassifier(n_hallucinated=1).fit(x[:2], ["low", "high"])
        >>> some.predict_proba(x[2:]).shape, some.hallucinated_.shape
        ((6, 2), (2, 1, 1, 32, 32))
    """

    pretrained: of_kind(Path | str, "the folder of a run is needed")
    n_hallucinated: Count

    # no types of arguments here and below: in scikit-learn anything goes in, and fit refuses it
    def __init__(
        self,
        pretrained="one-shot-phantom",
        *,
        n_hallucinated=2,
        channels=1,
        device=None,
        random_state=0,
    ):
        self.pretrained = pretrained
        self.n_hallucinated = n_hallucinated
        self.channels = channels
        self.device = device
        self.random_state = random_state

    def fit(self, X, y) -> "OneShotClassifier":
        """Learn the support and make more of it.

        Classes that the generator knows by name keep what the joint training taught it of them.

        Args:
            X: the support, one image of each class at least.
            y: their labels, numbers or strings.

        Raises:
            UserError: the folder is no finished joint training of a score model, or the images
                are of another size.
            ValueError: scikit-learn's own checks of X and y.
        """
        x, position = self._first(X, y)
        names = tuple(map(str, self.classes_))
        trial, source, networks = _trained(Path(self.pretrained), names, self._on())
        if tuple(x.shape[1:]) != source.model.network.shape:
            raise UserError(
                f"images are {tuple(x.shape[1:])} (channels, height, width); {self.pretrained} "
                f"was trained on {source.model.network.shape}"
            )
        self.network_ = networks.get(self.n_hallucinated, networks[0])
        # classes with fewer images show some again, which then count nothing
        rows = [np.flatnonzero(position == c) for c in range(len(names))]
        most = max(map(len, rows))
        own = torch.tensor([[float(i < len(r)) for i in range(most)] for r in rows])
        support = x[np.stack([np.resize(r, most) for r in rows])].to(self._on())
        made = self._hallucinate(source, names, support, trial.fit.candidates)
        with torch.no_grad():
            vectors = [self.network_.embed(part.flatten(0, 1)) for part in (support, made)]
        real, new = (v.unflatten(0, (len(names), -1)) for v in vectors)
        if trial.fit.candidates > 1 and self.n_hallucinated:
            best = surest(self.network_, real, new, self.n_hallucinated)
            which = torch.arange(len(names), device=best.device)[:, None], best
            made, new = made[which], new[which]
        extra = own.new_full((len(names), self.n_hallucinated), float(trial.fit.weight))
        weights = torch.cat([own, extra], 1).to(real)
        self.prototypes_ = prototypes.prototypes(torch.cat([real, new], 1), weights).cpu()
        self.hallucinated_ = made.cpu().numpy()
        return self

    def _hallucinate(
        self, source: Hallucinator, names: tuple[str, ...], support: Tensor, candidates: int
    ) -> Tensor:
        """More images of each class, from the generator after it has learnt the support."""
        if not self.n_hallucinated:
            return support[:, :0]
        nothing = np.empty((len(names), 0), np.int64)
        episode = Episode(names, nothing, nothing[0], nothing[0], nothing)
        source.adapt(episode, support, self._seed)
        n = self.n_hallucinated * candidates
        return source.make(episode, support, n, self._seed)

    def predict_proba(self, X) -> np.ndarray:
        """Probability of each class, in the order of ``classes_``."""
        return self._logits(X).softmax(-1).numpy()

    def decision_function(self, X) -> np.ndarray:
        """Log-odds of each class against all others; with two classes, of the second alone."""
        odds = log_odds(self._logits(X).double()).numpy()
        return odds[:, 1] if len(self.classes_) == 2 else odds

    def predict(self, X) -> np.ndarray:
        """The class of highest probability."""
        best = self._logits(X).argmax(1).numpy()
        return self.classes_[best]

    @torch.no_grad()
    def _logits(self, X) -> Tensor:
        x, network = self._further(X), self.network_
        means = self.prototypes_[:, None].to(self._on())
        parts = [network.logits(network.embed(p.to(self._on())), means) for p in x.split(256)]
        return finite(torch.cat(parts).cpu())


def _trained(
    folder: Path, names: tuple[str, ...], device: str
) -> tuple[Trial, Hallucinator, dict[int, PrototypeClassifier]]:
    """What a joint training left, its generator ready for classes of these names.

    Raises:
        UserError: the folder is not one, or its supports came from no score model.
    """
    shipped = artifacts.SHIPPED / folder
    is_name = folder == Path(folder.name)  # a path that is wrong must not find another model
    folder = shipped if is_name and not folder.exists() and shipped.exists() else folder
    try:
        settings = json.loads((folder / artifacts.CARD).read_text())["settings"]
        artifacts.is_finished(folder, settings)  # its files are what the run wrote
        trial = Trial.of(settings)
        with safe_open(folder / "generator.safetensors", "pt") as file:
            told = json.loads(file.metadata()["images"])
            saved = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        channels, labels = told["channels"], tuple(told["labels"])
        if trial.generator != "score_model" or trial.pool:
            raise UserError(
                f"{folder} was trained with generator={trial.generator} pool={trial.pool}; "
                "generator=score_model pool=0 is needed"
            )
        model = unet.build(size=settings["size"], channels=channels, width=trial.pretraining_width)
        model = relabelled(model.to(device), names)
        source = Hallucinator(model, trial.recipe, seed=trial.seed)
        source.load_tensors(source.tensors() | _renamed(saved, source, labels, names))
        networks = {}
        for n in trial.counts:
            networks[n] = prototypes.build(
                trial.kind,
                channels=channels,
                width=trial.width,
                reduce_to=trial.reduce_to,
                metric=trial.metric,
            )
            networks[n].load_state_dict(load_file(folder / f"plus_{n}.safetensors"))
            networks[n].to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as fault:
        raise UserError(
            f"{folder} is not a finished joint training "
            f"({type(fault).__name__}: {str(fault).splitlines()[0]}); the folder of a "
            "hallulib.oneshot.run is needed"
        ) from fault
    return trial, source, networks


def _renamed(
    saved: dict[str, Tensor], source: Hallucinator, labels: tuple[str, ...], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """What a generator has learnt, its class vectors those of the new names.

    A name it knows keeps its vector and what Adam remembers of it; new ones start at zero, as does
    the null class, which is the last.
    """
    weight = source.model.network.classes.weight
    place = [p is weight for p in source.optimizer.param_groups[0]["params"]].index(True)
    own = {"model.network.classes.weight", f"adam.{place}.exp_avg", f"adam.{place}.exp_avg_sq"}
    renamed = dict(saved)
    for key in own & saved.keys():
        renamed[key] = saved[key].new_zeros(weight.shape)
        for i, name in enumerate(names):
            if name in labels:
                renamed[key][i] = saved[key][labels.index(name)]
    return renamed
