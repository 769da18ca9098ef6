r"""The best that any classifier can do where classes are normal densities of known parameters.

An embedded image set draws every image from a few parameters. Transformed and standardised, they
are independent and normal, with unit variance, around the mean of their class c,

.. math:: z_j \mid c \sim \mathcal N(\delta_j(c), 1), \qquad
          p(c \mid z) = \frac{p(c) \prod_j \mathcal N(z_j; \delta_j(c), 1)}
                             {\sum_{c'} p(c') \prod_j \mathcal N(z_j; \delta_j(c'), 1)}.

An image depends on its class only through them, so no classifier of a single image can expect to
rank or to guess better than this posterior does (Neyman-Pearson; data processing).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import norm, rankdata

from hallulib import UserError

# scheme: the class of each of the finest classes, and what each class means, in order
Schemes = Mapping[str, tuple[Sequence[str], Mapping[str, str]]]


class Estimate(float):
    """A number computed by simulation, which carries its error.

    Attributes:
        standard_error: of the simulation; the number itself depends on no data.
    """

    standard_error: float


def membership(schemes: Schemes, scheme: str, name: str) -> Float[np.ndarray, "fine classes"]:
    """Which class of a scheme each of the finest classes belongs to, 0 or 1.

    Args:
        schemes: of an embedded set.
        scheme: one of them.
        name: of the set, for the message.

    Raises:
        UserError: if the scheme is unknown.
    """
    if scheme not in schemes:
        raise UserError(f"The {name} has no label scheme {scheme!r}; known: {', '.join(schemes)}.")
    classes, meaning = schemes[scheme]
    return np.array([[float(c == known) for known in meaning] for c in classes])


def true_parameters(
    table: pd.DataFrame, names: Sequence[str], rows: str
) -> Float[np.ndarray, "images parameters"]:
    """The parameters that images were drawn from, as their table has them.

    Args:
        table: of an embedded set.
        names: the columns.
        rows: those that have parameters, in words for the message.

    Raises:
        UserError: if a column is missing or empty in some rows.
    """
    missing = [name for name in names if name not in table]
    if missing or (table[list(names)] == "").any(axis=None):
        raise UserError(
            f"The table lacks {', '.join(missing) or 'parameters in some rows'}; the exact "
            f"posterior needs {rows} (select(labelled=...))."
        )
    return table[list(names)].to_numpy().astype(float)


def posterior(
    z: Float[np.ndarray, "images parameters"],
    shift: Float[np.ndarray, "fine parameters"],
    frequency: Float[np.ndarray, " fine"],
    member: Float[np.ndarray, "fine classes"],
    seen: Float[np.ndarray, " parameters"] | float = np.inf,
) -> Float[np.ndarray, "images classes"]:
    """Bayes' rule.

    Args:
        z: standardised parameters.
        shift: their mean in each of the finest classes.
        frequency: of those, summing to 1.
        member: of `membership`.
        seen: the largest that each can be told to be; of a larger one only that is known.
    """
    larger = z[:, None] > seen
    terms = np.where(larger, norm.logsf(seen - shift), norm.logpdf(z[:, None] - shift))
    log_joint = np.log(frequency) + terms.sum(-1)
    joint = np.exp(log_joint - log_joint.max(1, keepdims=True))
    return joint @ member / joint.sum(1, keepdims=True)


def simulated(
    measure: Callable[[np.ndarray, np.ndarray], float],
    shift: Float[np.ndarray, "fine parameters"],
    frequency: Float[np.ndarray, " fine"],
    member: Float[np.ndarray, "fine classes"],
    seed: int,
    seen: Float[np.ndarray, " parameters"] | float = np.inf,
) -> Estimate:
    """What a measure of the exact posterior is on average, over 20 simulations of 10,000 images.

    Args:
        measure: of `member`'s rows (0 or 1) and probabilities, both (images, classes).
        shift: as for `posterior`.
        frequency: likewise.
        member: likewise.
        seed: of the simulations.
        seen: as for `posterior`.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(20):
        fine = rng.choice(len(frequency), 10_000, p=frequency)
        z = shift[fine] + rng.standard_normal((len(fine), shift.shape[1]))
        values.append(measure(member[fine], posterior(z, shift, frequency, member, seen)))
    best = Estimate(np.mean(values))
    best.standard_error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return best


def macro_auroc(hit: np.ndarray, probability: np.ndarray) -> float:
    """Mean over the classes of the AUROC of one against the rest, without ties."""
    ranks, m = rankdata(probability, axis=0), hit.sum(0)
    auroc = ((ranks * hit).sum(0) - m * (m + 1) / 2) / (m * (len(hit) - m))
    return auroc.mean()


def accuracy(hit: np.ndarray, probability: np.ndarray) -> float:
    """Share of images whose most probable class is the true one."""
    return hit[np.arange(len(hit)), probability.argmax(1)].mean()
