r"""A classifier that learns from episodes with n extra supports per class.

Its prototypes are means of real and extra supports, the latter with weight w,

.. math:: p_k = \frac{\sum_{i \le k_\text{shot}} v_{ki} + w \sum_{j \le n} \hat v_{kj}}
          {k_\text{shot} + n w},

and each step lowers the loss of the queries of one episode.

Source:
    Pachetti & Colantonio, *Hallucinating for Diagnosing*, 2024.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hallulib import aucm, checkpoint
from hallulib.prototypes import PrototypeClassifier
from hallulib.settings import Above0, Amount, Positive, check, one_of
from hallulib.shapes import Images, Labels
from hallulib.supports import Shots


@dataclass(frozen=True)
class Fit:
    """How classifiers learn.

    Attributes:
        loss: ``"aucm"``, the AUC margin loss with LibAUC's PESG, or ``"cross_entropy"`` with Adam.
        lr: the paper's 1e-4 is for a pretrained backbone; from scratch it moves little.
        weight_decay: the paper's.
        mode: of PESG, ``"adam"`` or ``"sgd"``; the latter stands still at the paper's lr.
        inner: a, b and alpha of that loss are solved ``"exact"`` for each episode, or left to
            PESG, ``"running"``, which at small learning rates takes thousands of episodes.
        margin: of that loss, on probabilities.
        weight: of a hallucinated image in a prototype, where a real one has 1.
        candidates: images made for each one kept; those that the real support alone takes most
            surely for their class are kept. 1 keeps all.

    Raises:
        UserError: an unknown name or an impossible number.
    """

    loss: one_of(("aucm", "cross_entropy")) = "aucm"
    lr: Amount = 1e-3
    weight_decay: Amount = 1e-2
    mode: one_of(("adam", "sgd")) = "adam"
    inner: one_of(("exact", "running")) = "exact"
    margin: Above0 = 1.0
    weight: Amount = 1.0
    candidates: Positive = 1

    def __post_init__(self):
        check(self)


class Learner:
    """A classifier with the number of extra supports it works with, its loss and its optimiser.

    Args:
        classifier: trained in place.
        n: extra supports per class.
        n_way: classes per episode.
        fit: how it learns.
    """

    def __init__(self, classifier: PrototypeClassifier, n: int, n_way: int, fit: Fit):
        self.classifier, self.n, self.fit = classifier, n, fit
        rates = {"lr": fit.lr, "weight_decay": fit.weight_decay}
        if fit.loss == "aucm":
            self.margin_loss = aucm.AUCMarginLoss(n_way, fit.margin)
            self.optimizer = aucm.optimizer(classifier, self.margin_loss, mode=fit.mode, **rates)
        else:
            self.optimizer = torch.optim.Adam(classifier.parameters(), **rates)

    def step(
        self, support: Shots, extra: Shots, query: Images, answers: Labels
    ) -> Float[Tensor, ""]:
        """One step on one episode, all of whose images go through the network as one batch.

        Args:
            support: real images of each class.
            extra: ``n * candidates`` further images of each class.
            query: images to classify.
            answers: position of the class of each query.

        Returns:
            The loss before the step.
        """
        self.classifier.train()
        batch = torch.cat([support.flatten(0, 1), extra.flatten(0, 1), query])
        sizes = [support.shape[:2], extra.shape[:2], query.shape[:1]]
        parts = self.classifier.embed(batch).split([size.numel() for size in sizes])
        real, made, asked = (p.unflatten(0, size) for p, size in zip(parts, sizes, strict=True))
        logits = predict(self.classifier, real, made, asked, self.n, self.fit.weight)
        loss = self._loss(logits, answers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _loss(self, logits: Float[Tensor, "batch n_way"], answers: Labels) -> Float[Tensor, ""]:
        if self.fit.loss == "cross_entropy":
            return nn.functional.cross_entropy(logits, answers)
        scores = logits.softmax(-1)
        if self.fit.inner == "exact":
            self.margin_loss.settle(scores, answers)
        return self.margin_loss(scores, answers)

    def decay(self) -> None:
        """Divide the learning rate by 10; PESG takes a new reference as well."""
        if self.fit.loss == "aucm":
            self.optimizer.update_regularizer(10)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] /= 10

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes."""
        aucm_used = self.fit.loss == "aucm"
        memory = aucm.state_tensors if aucm_used else checkpoint.moments
        found = checkpoint.named("classifier", self.classifier.state_dict())
        return found | checkpoint.named("optimizer", memory(self.optimizer))

    def load_tensors(self, tensors: dict[str, Tensor], decays: int) -> None:
        """Take on what ``tensors`` wrote after so many calls of ``decay``.

        Raises:
            KeyError, RuntimeError: the tensors are of another classifier or other settings.
        """
        self.classifier.load_state_dict(checkpoint.part("classifier", tensors))
        memory = checkpoint.part("optimizer", tensors)
        if self.fit.loss == "aucm":
            aucm.load_state_tensors(self.optimizer, memory)
        else:
            checkpoint.load_moments(self.optimizer, memory)
            for _ in range(decays):
                self.decay()


def predict(
    classifier: PrototypeClassifier,
    real: Float[Tensor, "*episodes n_way k_shot d"],
    made: Float[Tensor, "*episodes n_way m d"],
    query: Float[Tensor, "*episodes n_query d"],
    n: int,
    weight: float | int = 1.0,
) -> Float[Tensor, "*episodes n_query n_way"]:
    """Logits of queries from real supports and the best ``n`` of the ``m`` made ones.

    Best are those that the prototypes of the real support alone give to their class with the
    highest probability.

    Args:
        classifier: as trained.
        real: vectors of the real support.
        made: vectors of the candidates.
        query: vectors of the queries.
        n: made supports that are kept, at most m.
        weight: of each of them, where a real one has 1; 0 leaves them out.

    Returns:
        One logit per query and class; their softmax is the chance of each class.
    """
    if n < made.shape[-2]:
        best = surest(classifier, real, made, n)
        made = made.gather(-2, best[..., None].expand(*best.shape, made.shape[-1]))
    vectors = torch.cat([real, made], -2)
    weights = torch.ones(vectors.shape[:-1], device=vectors.device)
    weights[..., real.shape[-2] :] = weight
    return classifier.logits(query, vectors, weights)


@torch.no_grad()
def surest(
    classifier: PrototypeClassifier,
    real: Float[Tensor, "*episodes n_way k_shot d"],
    made: Float[Tensor, "*episodes n_way m d"],
    n: int,
) -> Int[Tensor, "*episodes n_way {n}"]:
    """Which ``n`` made supports of each class the real ones give to it with most certainty."""
    sure = classifier.logits(made.flatten(-3, -2), real).softmax(-1)
    sure = sure.unflatten(-2, made.shape[-3:-1])  # ... class, candidate, probability of
    return torch.diagonal(sure, dim1=-3, dim2=-1).mT.topk(n, -1).indices
