"""What can be scored class by class, and the checks that come before it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hallulib import UserError
from hallulib.score import ScoreModel
from hallulib.sde import SDE
from hallulib.shapes import Images, Labels, Times

GREY_STEP = 1 / 127.5  # distance of neighbouring grey levels in [-1, 1]
PerClass = Float[Tensor, "batch classes"]


@runtime_checkable
class ClassModel(Protocol):
    """What scores classes: a `ScoreModel`, or a `mixture.ClassMixture`, which is exact."""

    sde: SDE
    labels: tuple[str, ...]

    def __call__(self, x_t: Images, t: Times, y: Labels) -> Images:
        """The noise in ``x_t`` if it is of class ``y``."""


def classes_of(model: ClassModel, classes: Sequence[str] | None) -> Labels:
    """Class indices to score.

    Raises:
        UserError: a model without classes, no class, or a label it was not trained with.
    """
    if not model.labels:
        raise UserError(
            "the score model was trained without labels; a likelihood per class needs a model "
            "with labels"
        )
    wanted = model.labels if classes is None else tuple(classes)
    unknown = [c for c in wanted if c not in model.labels]
    if unknown or not wanted:
        fault = f"does not know the label {unknown[0]!r}" if unknown else "was asked for no class"
        raise UserError(f"the score model {fault}; it knows {', '.join(model.labels)}")
    return torch.tensor([model.labels.index(c) for c in wanted])


def check_images(model: ClassModel, x: Images) -> Images:
    """The images, if the model can score them, in the type of its weights if it has any.

    Raises:
        UserError: a value that is not a number, and for a `ScoreModel` images outside of
            [-1, 1] (one grey step more is allowed, for `dequantise`) or of another shape than
            its own.
    """
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise UserError(f"image {bad} holds a value that is no finite number; all must be finite")
    if isinstance(model, ScoreModel):
        shape = getattr(model.network, "shape", x.shape[1:])
        if tuple(x.shape[1:]) != tuple(shape):
            raise UserError(
                f"images have (channels, height, width) {tuple(x.shape[1:])}; the score model "
                f"was trained on {tuple(shape)}"
            )
        if len(x) and x.abs().max() > 1 + GREY_STEP:
            raise UserError(
                f"images reach from {x.min():.4g} to {x.max():.4g}; values in [-1, 1] are needed"
            )
        x = x.to(next(model.parameters()).dtype)
    return x


def parts(n: int, batch: int, device: torch.device) -> tuple[Int[Tensor, " _part"], ...]:
    """The positions 0 to n - 1, at most ``batch`` at once.

    Raises:
        UserError: a batch of no row.
    """
    if batch < 1:
        raise UserError(f"batch is {batch}; at least 1 is needed")
    return torch.arange(n, device=device).split(batch)
