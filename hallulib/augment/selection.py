r"""Which synthetic images may be learnt from: near their class, confident, and no copies.

A network trained on the real labelled images alone gives each image a feature vector
:math:`f(x)`, normalised to length 1, and each class a centroid. A synthetic image of class c is
admitted if

1. the nearest centroid is that of c,
2. the network gives c a probability of at least ``confidence``, and
3. no training image is nearer, pixel by pixel, than other patients' images are.

Source: Ye et al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023,
section 2.3. Their released code computes the centroids with the synthetic images among the real
ones; here no synthetic image has a say in what is admitted.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import nn

from hallulib import UserError
from hallulib.evidence.quality import nearest
from hallulib.evidence.resnet import read
from hallulib.shapes import AnyImages, Images, Labels

ADMITTED = "admitted"


@dataclass(frozen=True)
class FeatureSpace:
    """What a network of :func:`hallulib.evidence.resnet.train_resnet` makes of an image.

    ``centroids`` are the mean normalised features of each class, ``images`` the real ones, which
    must not be copied; nearer to one than ``copy_distance`` (root mean square, see
    `copy_threshold`) is a copy.
    """

    network: nn.Module
    centroids: Float[np.ndarray, "classes features"]
    images: AnyImages
    copy_distance: float

    @classmethod
    def fit(
        cls, network: nn.Module, images: Images, y: Labels, copy_distance: float
    ) -> "FeatureSpace":
        """Centroids of the images ``network`` was trained on, of classes 0 to k - 1."""
        f = normalised(read(network, images)[0])
        centroids = np.stack([f[(y == c).numpy()].mean(0) for c in range(int(y.max()) + 1)])
        return cls(network, centroids, images, copy_distance)

    def judge(
        self, samples: Images, wanted: Labels, confidence: float | int = 0.5
    ) -> pd.DataFrame:
        """What speaks for and against each synthetic image, in one row.

        Its columns are the class ``wanted``, ``nearest`` centroid, ``distance`` to the wanted one
        (mean square over features), ``probability`` of the wanted class, ``copy_of`` (the nearest
        training image), ``copy_distance`` and ``verdict``, `ADMITTED` or what is wrong.
        """
        pooled, probabilities = read(self.network, samples)
        gaps = normalised(pooled)[:, None] - self.centroids
        distance, rows = np.square(gaps).mean(2), np.arange(len(samples))
        own, copies = wanted.numpy(), nearest(self.images, samples)
        table = pd.DataFrame({"wanted": own, "nearest": distance.argmin(1)})
        table["distance"], table["probability"] = distance[rows, own], probabilities[rows, own]
        table["copy_of"], table["copy_distance"] = copies.index.numpy(), copies.distance.numpy()
        faults = {
            "copy": table["copy_distance"] < self.copy_distance,
            "other class nearer": table["nearest"] != table["wanted"],
            "not confident": table["probability"] < confidence,
        }
        table["verdict"] = np.select(list(faults.values()), list(faults), ADMITTED)
        return table


def copy_threshold(images: Images, others: AnyImages, quantile: float = 0.01) -> float:
    """How near to one of ``images`` only that share of real images of other patients is."""
    return float(torch.quantile(nearest(images, others).distance, quantile))


def normalised(
    features: Float[np.ndarray, "batch features"],
) -> Float[np.ndarray, "batch features"]:
    """Features of length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-10)


def take(verdicts: pd.DataFrame, per_class: int) -> Bool[np.ndarray, " samples"]:
    """The admitted samples nearest to their centroids, at most so many of each class.

    If no sample of any class was admitted, it is a `UserError`.
    """
    passed = verdicts[verdicts["verdict"] == ADMITTED]
    if not len(passed):
        counts = verdicts["verdict"].value_counts()
        why = ", ".join(f"{n} {reason}" for reason, n in counts.items())
        raise UserError(
            f"none of {len(verdicts)} synthetic images was admitted ({why}); a lower "
            "confidence, a larger gradient scale or more training is needed"
        )
    rows = passed.sort_values("distance").groupby("wanted").head(per_class).index
    return np.isin(np.arange(len(verdicts)), rows)
