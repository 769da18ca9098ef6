r"""The moved density in closed form: a Gaussian in place of the network.

Were images Gaussian with covariance :math:`\Sigma`, known from images without labels, then
:func:`hallulib.adaptation.shifted` would give, at noise level s and with equal priors,

.. math:: \log p_s(x \mid c) = -\tfrac12 (x - m_c)^\top (\Sigma + s^2 I)^{-1} (x - m_c) + C ,

Fisher's linear discriminant, and only the means :math:`m_c` are left to learn from labels. A mean
of few images is wrong most in fine detail, where images vary least; s decides how much of that
counts. It is what a network must beat to be worth its training.

Source:
    Fisher 1936, doi 10.1111/j.1469-1809.1936.tb02137.x; few labels: Ng & Jordan 2001.
"""

import torch
from jaxtyping import Float
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from hallulib import UserError
from hallulib.shapes import Images, Labels

New = Float[Tensor, "new channels height width"]
LEVELS = tuple(0.1 * 2**i for i in range(8))  # of s, to 12.8: from pixels' noise to whole layout
# where no label can be held out: layout alone; the best of `LEVELS` on labelled validation images
# of a set of brain MRI, so on that set a choice that one label per class could not have made
ALONE = 6.4


class MovedGaussian:
    """Log-densities of classes that differ in their means alone.

    Args:
        images: all training images, with a label or without; at least two.

    Raises:
        UserError: fewer than two images.

    Example:
        >>> x, y = torch.randn(40, 1, 4, 4), torch.arange(40) % 2
        >>> MovedGaussian(x).log_ratio(x, y, x[:3], s=1.0).shape
        torch.Size([3, 2])
    """

    def __init__(self, images: Images):
        if len(images) < 2:
            raise UserError(f"{len(images)} images found; a covariance needs at least 2")
        x = images.flatten(1).double()
        _, spread, self.axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        self.variances = spread.square() / (len(x) - 1)

    def log_ratio(self, x: Images, y: Labels, new: New, s: float) -> Float[Tensor, "new classes"]:
        """Log-density of each class for new images, in nats, up to what classes have in common.

        Args:
            x: labelled images.
            y: their classes, 0 to k - 1, none of them empty.
            new: images to tell apart.
            s: noise level, in units of pixels.
        """
        means = torch.stack([x[y == c].flatten(1).double().mean(0) for c in y.unique()])
        offset = new.flatten(1).double()[:, None] - means
        along = (offset @ self.axes.T).square()
        # pixels outside the axes, if images are fewer than pixels, have no variance but the noise
        rest = offset.square().sum(2) - along.sum(2)
        return -0.5 * ((along / (self.variances + s**2)).sum(2) + rest / s**2)

    def noise_level(self, x: Images, y: Labels, folds: int = 5, seed: int = 0) -> float:
        """The level of `LEVELS` that makes the labels of held-out images most likely.

        Args:
            x: labelled images.
            y: their classes.
            folds: at most; a class with one image leaves none to hold out, and `ALONE` is taken.
            seed: of the folds.
        """
        folds = min(folds, int(torch.bincount(y).min()))
        if folds < 2:
            return ALONE
        split = StratifiedKFold(folds, shuffle=True, random_state=seed)
        parts = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in split.split(y, y)]

        def log_loss(s: float) -> Float[Tensor, ""]:
            told = [self.log_ratio(x[a], y[a], x[b], s).log_softmax(1) for a, b in parts]
            held_out = torch.cat([y[b] for _, b in parts])
            return -torch.cat(told).gather(1, held_out[:, None]).mean()

        return min(LEVELS, key=log_loss)
