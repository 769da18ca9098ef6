"""A classifier that knows noise steers samples to its classes; at scale 0 it leaves them alone."""

import pytest
import torch

from hallulib.augment import steering
from hallulib.augment.steering import NoisyClassifier, steered
from hallulib.diffusion import unet
from hallulib.diffusion.sample import draw
from hallulib.diffusion.train import pretrain


def squares(n=64, seed=0):
    """Dark and bright images of 8 x 8 in noise, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.15 * torch.randn((n, 1, 8, 8), generator=rng) + (y - 0.5).view(-1, 1, 1, 1)
    return x.clamp(-1, 1), y


@pytest.fixture(scope="module")
def model():
    """Unconditional, trained for long enough to make dark and bright images."""
    x, _ = squares()
    fresh = unet.build(size=8, width=16)
    for state in pretrain(fresh, x, steps=250, batch_size=16, lr=2e-3, warmup=20):
        trained = state.ema
    return trained


def classifier(model, steps=120, **settings):
    told = dict(steps=steps, batch_size=32, lr=2e-3, **settings)
    return steering.train(NoisyClassifier(model, 2), *squares(), **told)


@pytest.fixture(scope="module")
def judge(model):
    return classifier(model)


def test_its_features_are_those_of_the_encoder_it_was_made_from(model):
    x, t = squares()[0], torch.rand(64)
    seen = []
    handles = [
        block.register_forward_hook(lambda *found: seen.append(found[2]))
        for block in (*model.network.unet.down_blocks, model.network.unet.mid_block)
    ]
    model.velocity(x, t)
    for handle in handles:
        handle.remove()
    maps = [found[0] if isinstance(found, tuple) else found for found in seen]
    expected = torch.cat([m.mean((2, 3)) for m in maps], 1)
    torch.testing.assert_close(NoisyClassifier(model, 2).features(x, t), expected)


def test_probabilities_sum_to_one_and_one_column_is_the_log_prob(judge):
    x, y = squares()
    t = torch.full((64,), 0.3)
    log_p = judge(x, t)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(64))
    torch.testing.assert_close(judge.log_prob(y)(x, t), log_p[torch.arange(64), y])


def test_scale_0_is_the_unconditional_model(model, judge):
    y = torch.arange(6) % 2
    told = dict(steps=5, seed=4, batch_size=4)
    plain = draw(model, torch.full_like(y, model.null), **told)
    assert torch.equal(steered(model, judge, y, gradient_scale=0, **told), plain)
    assert not torch.equal(steered(model, judge, y, gradient_scale=1, **told), plain)


def test_more_guidance_finds_more_of_the_wanted_class(model, judge):
    """Judged by brightness, which the classifier has no part in."""
    y = torch.arange(120) % 2
    agreement = []
    for scale in (0, 1, 4):
        made = steered(model, judge, y, gradient_scale=scale, steps=10, seed=1)
        agreement.append(((made.mean((1, 2, 3)) > 0).long() == y).double().mean().item())
    assert 0.35 < agreement[0] < 0.65
    assert agreement[2] > 0.9
    assert agreement[0] + 0.1 < agreement[1] <= agreement[2] + 0.05


def test_unconditional_samples_are_those_of_both_classes(model, judge):
    """At scale 0 the wanted class has no say: brightness has the law it has without a wish."""
    made = [
        steered(model, judge, torch.full((150,), c), gradient_scale=0, steps=10, seed=seed)
        for c, seed in ((0, 1), (1, 2))
    ]
    bright = torch.stack([m.mean((1, 2, 3)) > 0 for m in made]).double().mean(1)
    assert (bright[0] - bright[1]).abs() < 4 * (0.5 / 150) ** 0.5


def test_one_that_never_saw_noise_knows_less_about_it(model, judge):
    """The fault of the published code: trained on clean images, asked at all times."""
    blind = classifier(model, noised=False)
    x, y = squares(600, seed=1)
    times = (0.01, 0.4, 0.5, 0.6)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def recognised(one, time):
        t = torch.full((len(x),), time)
        return float((one(one.sde.diffuse(x, t, eps), t).argmax(1) == y).double().mean())

    knows, guesses = ([recognised(one, t) for t in times] for one in (judge, blind))
    assert min(knows[0], guesses[0]) > 0.95
    assert sum(knows[1:]) > sum(guesses[1:]) + 0.1


def test_encoder_and_head_learn_and_the_score_model_stays(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = NoisyClassifier(model, 2).state_dict()
    after = classifier(model, steps=2).state_dict()
    changed = {k.split(".")[0] for k, v in after.items() if not torch.equal(v, start[k])}
    assert {"down", "head"} <= changed
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
