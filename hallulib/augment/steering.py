r"""A classifier of noisy images, made from a score model, that steers an unconditional one.

Sampling from :math:`p(x \mid y) \propto p(x)\,p(y \mid x)` needs :math:`\nabla \log p(y \mid x_t)`
at every noise level, so the classifier must know what a class looks like under noise. A score
model already does: `NoisyClassifier` reads the encoder half of a pretrained one and adds a linear
layer, which a few labelled images can train.

Source: Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, section 4 and
appendix H (training on noised images), https://arxiv.org/abs/2105.05233; in latent space: Ye et
al., *Synthetic Augmentation with Large-scale Unconditional Pre-training*, 2023, whose released
code trains on clean latents only.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from hallulib.diffusion.sample import draw
from hallulib.diffusion.score import EpsFn, ScoreModel, classifier_guided, stratified_times
from hallulib.diffusion.sde import per_image
from hallulib.shapes import Images, Labels, PerImage, Times, seeded


class NoisyClassifier(nn.Module):
    """Class probabilities of noisy images or latents at any noise level.

    The encoder of ``model`` is copied, which need not know the classes; ``seed`` is of the layer
    that is added.
    """

    def __init__(self, model: ScoreModel, classes: int, seed: int = 0):
        super().__init__()
        self.sde = model.sde
        unet = copy.deepcopy(model.network.unet)
        self.time = nn.Sequential(unet.time_proj, unet.time_embedding)
        self.first, self.down, self.middle = unet.conv_in, unet.down_blocks, unet.mid_block
        self.requires_grad_(True)
        widths = unet.config.block_out_channels
        features = sum(widths) + widths[-1]
        with seeded(seed):
            head = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, classes))
        self.head = head.to(next(unet.parameters()).device)

    def features(self, x_t: Images, t: Times) -> Float[Tensor, "batch features"]:
        """Means over positions of what the encoder finds at each of its resolutions."""
        time = self.time(999 * t)
        x = self.first(x_t * per_image(self.sde.angle(t)[2], x_t))
        pooled = []
        for block in self.down:
            x = block(x, time)[0]
            pooled.append(x.mean((2, 3)))
        return torch.cat([*pooled, self.middle(x, time).mean((2, 3))], 1)

    def forward(self, x_t: Images, t: Times) -> Float[Tensor, "batch classes"]:
        """Logarithms of the class probabilities of noisy images, in nats."""
        return self.head(self.features(x_t, t)).log_softmax(1)

    def log_prob(self, y: Labels) -> Callable[[Images, Times], PerImage]:
        """``log p(y | x_t)`` as a function of ``(x_t, t)``, for one class per image."""
        return lambda x_t, t: self(x_t, t).gather(1, y[:, None])[:, 0]


def train(
    classifier: NoisyClassifier,
    x: Images,
    y: Labels,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 5e-4,
    noised: bool = True,
    seed: int = 0,
) -> NoisyClassifier:
    """The classifier, trained on noised images, every class drawn equally often.

    The rate falls from ``lr`` to 0 along a cosine. Without ``noised`` it repeats the fault of the
    published code, which trains on clean images and asks at all times.
    """
    classifier.train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator(x.device).manual_seed(seed)
    weights = 1 / torch.bincount(y)[y].double()
    for _ in tqdm(range(steps), desc="noise-aware classifier"):
        rows = torch.multinomial(weights, batch_size, replacement=True, generator=rng)
        t = stratified_times(batch_size, classifier.sde.t_train, rng)
        t = t if noised else torch.full_like(t, classifier.sde.t_train)
        eps = torch.randn((batch_size, *x.shape[1:]), generator=rng, device=x.device)
        loss = F.nll_loss(classifier(classifier.sde.diffuse(x[rows], t, eps), t), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def steered(
    model: ScoreModel,
    classifier: NoisyClassifier,
    y: Labels,
    *,
    gradient_scale: float | int = 1.0,
    **settings,
) -> Images:
    """Samples of an unconditional model, steered to the class wanted of each, see `draw`.

    A ``gradient_scale`` of 0 leaves them unconditional, 1 is Bayes' rule, above it they are
    exaggerated; the paper takes 10.
    """

    def steer(eps: EpsFn, rows: Labels) -> EpsFn:
        wanted = classifier.log_prob(y.to(rows.device)[rows])
        return classifier_guided(model.sde, eps, wanted, gradient_scale)

    return draw(model, torch.full_like(y, model.null), steer=steer, **settings)
