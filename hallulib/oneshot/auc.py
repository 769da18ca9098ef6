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

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hallulib.oneshot.prototypes import at_least_float32
from hallulib.shapes import Labels, seeded

Scores = Float[Tensor, "batch n_classes"]
PerClass = Float[Tensor, " n_classes"]
PULL = 3e-3  # gamma below: the pull to the last reference, LibAUC's epoch_decay
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # what it remembers of one parameter


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

    Source:
        Yuan et al. 2021, https://arxiv.org/abs/2012.03173, without the class prior (version 2 of
        LibAUC, whose multi-label loss on one-hot labels is the same up to rounding).
    """

    def __init__(self, n_classes: int, margin: float | int = 1.0):
        self.margin = float(margin)
        self.a, self.b, self.alpha = (torch.zeros(n_classes, requires_grad=True) for _ in range(3))

    def __call__(self, scores: Scores, y: Labels) -> Float[Tensor, ""]:
        """The loss of one batch; it may be negative before a, b and alpha have settled.

        Args:
            scores: any real numbers; for margin 1 of the order of 1.
            y: the column of the true class, two different ones at least. A class that is absent
                contributes nothing.
        """
        scores = at_least_float32(scores)
        plus, minus = _means(scores, y)
        within = _means((scores - self.a) ** 2, y)[0] + _means((scores - self.b) ** 2, y)[1]
        of_class = within + 2 * self.alpha * (self.margin + minus - plus) - self.alpha**2
        present = _positive(y, len(of_class)).any(0)
        return of_class.where(present, 0).sum() / present.sum()

    @torch.no_grad()
    def settle(self, scores: Scores, y: Labels) -> None:
        """Set a, b and alpha to their best values for these scores, before `optimizer`.

        From zero, alpha takes some 1 / (2 lr) steps to get near; until then the loss draws the
        scores together and hardly ranks them. At lr 1e-4 that is five thousand steps.
        """
        plus, minus = _means(at_least_float32(scores), y)
        self.a.copy_(plus)
        self.b.copy_(minus)
        self.alpha.copy_((self.margin + minus - plus).clamp(min=0))


def optimizer(
    model: nn.Module,
    loss: AUCMarginLoss,
    *,
    lr: float = 1e-4,
    weight_decay: float | int = 1e-2,
    mode: Literal["adam", "sgd"] = "adam",
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

    Source:
        Yuan et al. 2021, https://arxiv.org/abs/2012.03173, and libauc 2.0.1, optimizers/pesg.py.
    """
    from libauc.optimizers import PESG  # seconds to import

    weights = [p for p in model.parameters() if p.requires_grad]
    device = weights[0].device
    for own in (loss.a, loss.b, loss.alpha):
        own.data = own.data.to(device)
    options = dict(lr=lr, weight_decay=weight_decay, epoch_decay=PULL, device=device)
    with seeded():  # its random reference is replaced below
        pesg = PESG(weights, loss_fn=loss, mode=mode, verbose=False, **options)
    for reference, value in zip(pesg.model_ref, pesg.params, strict=True):
        reference.copy_(value.detach())
    return pesg


class Memory:
    """All that PESG and its loss are at a step, apart from the model's weights.

    Names are ``a``, ``b``, ``alpha``, ``lr``, ``steps``, ``T`` (steps since the last reference)
    and, for the i-th parameter, ``exp_avg.i``, ``model_ref.i`` and the like.

    Args:
        pesg: what `optimizer` gave.
    """

    def __init__(self, pesg: torch.optim.Optimizer):
        self.pesg = pesg

    def _in_place(self) -> dict[str, Tensor]:
        """What is there from the first step on."""
        pesg = self.pesg
        tensors = {name: getattr(pesg, name).detach() for name in ("a", "b", "alpha")}
        for name in ("model_ref", "model_acc"):
            tensors |= {f"{name}.{i}": v for i, v in enumerate(getattr(pesg, name))}
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of it all."""
        pesg = self.pesg
        tensors = self._in_place() | {n: torch.tensor(getattr(pesg, n)) for n in ("steps", "T")}
        tensors["lr"] = torch.tensor(pesg.param_groups[0]["lr"], dtype=torch.float64)
        for i, p in enumerate(pesg.params):
            tensors |= {f"{name}.{i}": torch.as_tensor(v) for name, v in pesg.state[p].items()}
        return {name: value.detach().clone() for name, value in tensors.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take on what `state_dict` gave.

        The next steps then are, to the same bytes on a CPU, those of the run that was left.

        Raises:
            KeyError, RuntimeError: the tensors are of another model or other settings.
        """
        pesg = self.pesg
        for name, own in self._in_place().items():
            own.copy_(tensors[name])
        pesg.steps, pesg.T = int(tensors["steps"]), int(tensors["T"])
        pesg.param_groups[0]["lr"] = float(tensors["lr"])
        for i, p in enumerate(pesg.params):
            moments = {k: tensors[f"{k}.{i}"] for k in MOMENTS if f"{k}.{i}" in tensors}
            # in the layout of the parameter, which decides the order of summation on some devices
            pesg.state[p] = {k: torch.empty_like(p.data).copy_(v) for k, v in moments.items()}
            if f"step.{i}" in tensors:
                pesg.state[p]["step"] = int(tensors[f"step.{i}"])


def _positive(y: Labels, n_classes: int) -> Bool[Tensor, "batch n_classes"]:
    return y[:, None] == torch.arange(n_classes, device=y.device)


def _means(values: Scores, y: Labels) -> tuple[PerClass, PerClass]:
    """Mean of each column over the rows of its class, and over all other rows."""
    positive = _positive(y, values.shape[1])
    n = positive.sum(0)
    plus = values.where(positive, 0).sum(0) / n.clamp(min=1)
    return plus, values.where(~positive, 0).sum(0) / (len(y) - n)
