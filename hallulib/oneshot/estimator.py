r"""One-shot diagnosis as a scikit-learn estimator: a few images of each class, and more of them.

``fit`` is a test episode: the generator of a finished joint training learns the support and
hallucinates more of each class, and the prototypes

.. math:: p_k = \frac{\sum_i v_{ki} + w \sum_{j \le n} \hat v_{kj}}{m_k + n w}

answer for any number of queries.

Source: Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from hallulib.evidence.calibration import ImageClassifier, LogDensities, finite
from hallulib.oneshot import bdc, experiment
from hallulib.oneshot.episodes import unasked
from hallulib.storage import store
from hallulib.storage.estimator import must_suit
from hallulib.storage.settings import Count, needed


@dataclass(eq=False, repr=False, kw_only=True)
class OneShotClassifier(ImageClassifier):
    """Classify images from one or a few examples per class, with hallucinated ones beside them.

    Forms of images, ``channels``, ``device`` and ``random_state``: see
    :class:`hallulib.storage.estimator.ImageEstimator`, which also saves and loads. Images must
    have the side and channels of the joint training.

    Args:
        pretrained: folder of a finished :func:`hallulib.oneshot.experiment.run`, or the name of
            one that ships with the library.
        n_hallucinated: images made for each class; 0 uses the support alone. A number that was
            trained for has a classifier of its own, others take that of the support alone.

    Attributes:
        classes_: the labels, sorted.
        hallucinated_: (classes, n_hallucinated, channels, side, side), in [-1, 1].
        network_: the classifier that embeds images.
        prototypes_: (classes, d), one vector per class.

    Example:
        >>> from hallulib import data
        >>> x = data.open("lesions", 32).select("test", labelled="isup").tensor(range(8)).numpy()
        >>> some = OneShotClassifier(n_hallucinated=1).fit(x[:2], ["low", "high"])
        >>> some.predict_proba(x[2:]).shape, some.hallucinated_.shape
        ((6, 2), (2, 1, 1, 32, 32))
    """

    keeps = {"network_": (bdc.save, bdc.load)}
    pretrained: Annotated[Path | str, needed("the folder of a run is needed")] = field(
        default="one-shot-lesions", kw_only=False
    )
    n_hallucinated: Count = 2

    def fit(self, X, y) -> "OneShotClassifier":
        """Learn the support, one image of each class at least, and make more of it. Classes that
        the generator knows by name keep what the joint training taught it of them.

        Raises:
            UserError: no finished joint training of a score model, or images of another size.
            ValueError: scikit-learn's own checks of X and y.
        """
        x, position = self._first(X, y)
        names = tuple(map(str, self.classes_))
        trial, source, networks = experiment.load(self._folder(), names, self._on())
        must_suit(x, source.model.network.shape, f"{self.pretrained} was trained on")
        self.network_ = networks.get(self.n_hallucinated, networks[0])
        # classes with fewer images show some again, which then count nothing
        rows = [np.flatnonzero(position == c) for c in range(len(names))]
        most = max(map(len, rows))
        own = torch.tensor([[float(i < len(r)) for i in range(most)] for r in rows])
        support = x[np.stack([np.resize(r, most) for r in rows])].to(self._on())
        made = support[:, :0]
        if self.n_hallucinated:
            episode = unasked(names)
            source.adapt(episode, support, self._seed)
            made = source.make(episode, support, self.n_hallucinated, self._seed)
        with torch.no_grad():
            vectors = [self.network_.embed(part.flatten(0, 1)) for part in (support, made)]
        real, new = (v.unflatten(0, (len(names), -1)) for v in vectors)
        extra = own.new_full((len(names), self.n_hallucinated), float(trial.fit.weight))
        weights = torch.cat([own, extra], 1).to(real)
        self.prototypes_ = bdc.prototypes(torch.cat([real, new], 1), weights).cpu()
        self.hallucinated_ = made.cpu().numpy()
        return self

    def _folder(self) -> Path:
        """The run that is asked for: a folder, or a name among those that ship."""
        folder = Path(self.pretrained)
        shipped = store.SHIPPED / folder
        is_name = folder == Path(folder.name)  # a path that is wrong must not find another model
        return shipped if is_name and not folder.exists() and shipped.exists() else folder

    @torch.no_grad()
    def _log_posterior(self, X) -> LogDensities:
        x, network = self._further(X), self.network_
        means = self.prototypes_[:, None].to(self._on())
        parts = [network.logits(network.embed(p.to(self._on())), means) for p in x.split(256)]
        return finite(torch.cat(parts).cpu())
