r"""One-vs-rest AUC margin loss: scores that rank, with every class weighing the same.

The AUROC of class c is the chance that one of its images scores above another image. Its smooth
stand-in is the mean of :math:`(m - h_i + h_j)^2` over pairs of a positive i and a negative j.
Written as a saddle point it needs no pairs,

.. math::

    F_c = \mathrm{E}_+[(h - a)^2] + \mathrm{E}_-[(h - b)^2]
        + 2 \alpha\,(m + \mathrm{E}_-[h] - \mathrm{E}_+[h]) - \alpha^2,

minimal in the network, a and b, maximal in :math:`\alpha \ge 0`; then a and b are the means of
the two sides and :math:`\alpha = [m + \mathrm{E}_-[h] - \mathrm{E}_+[h]]_+`. The loss is the
mean of :math:`F_c` over classes, and LibAUC's PESG is the optimiser that descends and ascends.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hallulib import UserError
from hallulib.seeding import seeded

# all that an optimiser of this kind remembers of one parameter
MEMORIES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class AUCMarginLoss:
    """The loss with its own a, b and alpha, one of each per class.

    It is no module on purpose: inside the model its alpha would be one of the parameters that
    the optimiser lowers, and a second copy would be one that nothing moves.

    Args:
        n_classes: columns of the scores, at least 2.
        margin: how far positives should score above negatives, > 0, in the unit of the scores.

    Attributes:
        a: (n_classes,) running mean score of each class's own images.
        b: (n_classes,) running mean score of all other images.
        alpha: (n_classes,) what it is worth to widen the gap between them, >= 0.

    Raises:
        UserError: fewer than two classes, or a margin that is not positive.

    Source:
        Yuan et al. 2021, https://arxiv.org/abs/2012.03173, without the class prior (version 2 of
        LibAUC, whose multi-label loss on one-hot labels is the same up to rounding).
    """

    def __init__(self, n_classes: int, margin: float | int = 1.0):
        if n_classes < 2:
            raise UserError(f"n_classes is {n_classes}; at least 2 are needed to rank")
        _check_margin(margin)
        self.n_classes, self.margin = n_classes, float(margin)
        self.a, self.b, self.alpha = (torch.zeros(n_classes, requires_grad=True) for _ in range(3))

    def __call__(self, scores: Tensor, y: Tensor) -> Float[Tensor, ""]:
        """The loss of one batch; it may be negative before a, b and alpha have settled.

        Args:
            scores: (n, n_classes), any real numbers; for margin 1 of the order of 1.
            y: (n,) int64, the column of the true class. A class that is absent contributes
                nothing.

        Raises:
            UserError: shapes or labels do not fit, or all labels are the same.
        """
        scores, y = _checked(scores, y, self.n_classes)
        return _saddle(scores, y, self.margin, self.a, self.b, self.alpha)

    @torch.no_grad()
    def settle(self, scores: Tensor, y: Tensor) -> None:
        """Set a, b and alpha to their best values for these scores, before `optimizer`.

        From zero, alpha takes some 1 / (2 lr) steps to get near; until then the loss draws the
        scores together and hardly ranks them. At lr 1e-4 that is five thousand steps.

        Raises:
            UserError: shapes or labels do not fit, or all labels are the same.
        """
        found = _best(*_checked(scores, y, self.n_classes), self.margin)
        for own, value in zip((self.a, self.b, self.alpha), found, strict=True):
            own.copy_(value)


def at_optimum(scores: Tensor, y: Tensor, margin: float | int = 1.0) -> Float[Tensor, ""]:
    r"""The loss where a, b and alpha are best for these scores: what a batch is truly worth.

    .. math::

        \mathrm{Var}_+ + \mathrm{Var}_- + [m + \mathrm{E}_-[h] - \mathrm{E}_+[h]]_+^2,

    averaged over the classes present. Unclipped, it is the mean of :math:`(m - h_i + h_j)^2` over
    all pairs of a positive and a negative.

    Args:
        scores: (n, n_classes).
        y: (n,) int64, the column of the true class.
        margin: > 0.

    Raises:
        UserError: shapes or labels do not fit, or all labels are the same.

    Example:
        >>> at_optimum(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
        tensor(0.)
    """
    _check_margin(margin)
    scores, y = _checked(scores, y, scores.shape[-1])
    return _saddle(scores, y, margin, *_best(scores, y, margin))


def optimizer(
    model: nn.Module,
    loss: AUCMarginLoss,
    *,
    lr: float = 1e-4,
    weight_decay: float | int = 1e-2,
    mode: Literal["adam", "sgd"] = "adam",
    epoch_decay: float | int = 3e-3,
    momentum: float | int = 0.9,
) -> torch.optim.Optimizer:
    r"""LibAUC's PESG over a model and the loss: descends on weights, a and b, ascends on alpha.

    .. math::

        g &= \mathrm{clip}(\nabla F, \pm 1) + \gamma\,(v - v_\mathrm{ref}) + \lambda v,
        \qquad v = (w, a, b), \\
        \alpha &\leftarrow [\alpha + 2\,\mathrm{lr}\,(m + b - a - \alpha)]_+,

    and v moves along g, averaged over steps (``"sgd"``) or scaled as by Adam (``"adam"``, with
    both decays inside the gradient). ``update_regularizer(10)`` of the result divides lr by 10 and
    moves :math:`v_\mathrm{ref}` to the mean of v over the steps since the last time, at least one.

    Repaired here: PESG starts :math:`v_\mathrm{ref}` at random numbers, where its documentation
    says at :math:`v_0`, so that a pretrained network would be pulled to zero; it draws them
    from the global generator; and it expects a GPU wherever there is one. The loss is moved to
    the device of the model.

    Args:
        model: its parameters that require a gradient are trained, on one device.
        loss: the same object that is called in training.
        lr: 1e-4 suits ``"adam"``; ``"sgd"`` stands still there and needs 0.01 to 0.1.
        weight_decay: :math:`\lambda`, of a and b as well: a settles a little below its mean.
        mode: how v moves.
        epoch_decay: :math:`\gamma`, the pull to the last reference; 0 for none, and then there
            is no ``update_regularizer``.
        momentum: of ``"sgd"``: the share of the *new* direction, 0 for that one alone.

    Raises:
        UserError: the model has nothing to train.

    Source:
        Yuan et al. 2021, https://arxiv.org/abs/2012.03173, and libauc 2.0.1, optimizers/pesg.py.
    """
    from libauc.optimizers import PESG  # seconds to import

    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise UserError("the model has no parameter that requires a gradient")
    device = weights[0].device
    for own in (loss.a, loss.b, loss.alpha):
        own.data = own.data.to(device)
    options = dict(lr=lr, weight_decay=weight_decay, epoch_decay=epoch_decay, momentum=momentum)
    with seeded():  # its random reference is replaced below
        pesg = PESG(weights, loss_fn=loss, mode=mode, device=device, verbose=False, **options)
    for reference, value in zip(pesg.model_ref or (), pesg.params, strict=False):
        reference.copy_(value.detach())
    return pesg


def state_tensors(pesg: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that PESG and its loss are at this step, apart from the model's weights.

    Names are ``a``, ``b``, ``alpha``, ``lr``, ``steps``, ``T`` (steps since the last reference)
    and, for the i-th parameter, ``exp_avg.i``, ``model_ref.i`` and the like.
    """
    found = {name: getattr(pesg, name) for name in ("a", "b", "alpha")}
    found |= {name: torch.tensor(getattr(pesg, name)) for name in ("steps", "T")}
    found["lr"] = torch.tensor(pesg.param_groups[0]["lr"], dtype=torch.float64)
    for name in ("model_ref", "model_acc"):
        found |= {f"{name}.{i}": v for i, v in enumerate(getattr(pesg, name) or ())}
    for i, p in enumerate(pesg.params):
        found |= {f"{name}.{i}": torch.as_tensor(v) for name, v in pesg.state[p].items()}
    return {name: value.detach().clone() for name, value in found.items()}


def load_state_tensors(pesg: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take on a state that `state_tensors` gave; the model's weights are the caller's to load.

    The next steps then are, to the same bytes on a CPU, those of the run that was left.

    Raises:
        KeyError, RuntimeError: the tensors are of another model or other settings.
    """
    with torch.no_grad():
        for name in ("a", "b", "alpha"):
            getattr(pesg, name).copy_(tensors[name])
        for name in ("model_ref", "model_acc"):
            for i, value in enumerate(getattr(pesg, name) or ()):
                value.copy_(tensors[f"{name}.{i}"])
    pesg.steps, pesg.T = int(tensors["steps"]), int(tensors["T"])
    pesg.param_groups[0]["lr"] = float(tensors["lr"])
    for i, p in enumerate(pesg.params):
        moments = {k: tensors[f"{k}.{i}"] for k in MEMORIES if f"{k}.{i}" in tensors}
        # in the layout of the parameter, which decides the order of summation on some devices
        pesg.state[p] = {k: torch.empty_like(p.data).copy_(v) for k, v in moments.items()}
        if f"step.{i}" in tensors:
            pesg.state[p]["step"] = int(tensors[f"step.{i}"])


def _check_margin(margin: float | int) -> None:
    if not (math.isfinite(margin) and margin > 0):
        raise UserError(f"margin is {margin}; a finite number above 0 is needed")


def _checked(scores: Tensor, y: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Scores in at least single precision, and labels that fit them."""
    if y.ndim != 1 or not len(y) or scores.shape != (len(y), n_classes):
        raise UserError(
            f"scores of shape {tuple(scores.shape)} and labels of shape {tuple(y.shape)} found;"
            f" (n, {n_classes}) and (n,) are needed"
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"labels are {y.dtype}; the integer column of the true class is needed")
    low, high = torch.stack(torch.aminmax(y)).tolist()  # one wait for the device
    if low < 0 or high >= n_classes:
        raise UserError(f"labels {low} to {high} found; 0 to {n_classes - 1} are needed")
    if low == high:
        raise UserError(f"all labels are {low}: ranking needs at least two classes in a batch")
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), y


def _means(values: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each column over the rows of its class, and over all other rows."""
    positive = y[:, None] == torch.arange(values.shape[1], device=y.device)
    n = positive.sum(0)
    plus = values.where(positive, 0).sum(0) / n.clamp(min=1)
    return plus, values.where(~positive, 0).sum(0) / (len(y) - n)


def _best(scores: Tensor, y: Tensor, margin: float | int) -> tuple[Tensor, Tensor, Tensor]:
    """The a, b and alpha of the saddle."""
    plus, minus = _means(scores, y)
    return plus, minus, (margin + minus - plus).clamp(min=0)


def _saddle(
    scores: Tensor, y: Tensor, margin: float | int, a: Tensor, b: Tensor, alpha: Tensor
) -> Tensor:
    plus, minus = _means(scores, y)
    within = _means((scores - a) ** 2, y)[0] + _means((scores - b) ** 2, y)[1]
    return _over_present(within + 2 * alpha * (margin + minus - plus) - alpha**2, y)


def _over_present(values: Tensor, y: Tensor) -> Tensor:
    """Mean of one value per class over the classes that the labels hold."""
    present = (y[:, None] == torch.arange(len(values), device=y.device)).any(0)
    return values.where(present, 0).sum() / present.sum()
