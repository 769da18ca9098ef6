"""A generator that learns from episodes: what it may change, what is undone, what it makes."""

import numpy as np
import pytest
import torch
from toy_task import GRADES, IMAGES, hallucinator, same, score_model, tasks

from hallulib import UserError
from hallulib.diffusion.score import denoising_loss
from hallulib.diffusion.unet import relabelled
from hallulib.oneshot.episodes import Episode
from hallulib.oneshot.hallucinate import Hallucinator, Pool, Recipe
from hallulib.oneshot.joint import pictures

EPISODE = tasks()[0]
SUPPORT, _ = pictures(IMAGES, EPISODE, torch.device("cpu"))
X_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.2, 0.5, 0.9])


def copies(tensors):
    return {k: v.clone() for k, v in tensors.items()}


def learn(source, steps=1):
    for seed in range(steps):
        source.adapt(EPISODE, SUPPORT, seed)


def loss_on_support(source):
    """Denoising loss of the support under its labels, over fixed times and noise."""
    rng = torch.Generator().manual_seed(9)
    x_0 = SUPPORT.flatten(0, 1).repeat(32, 1, 1, 1)
    t, eps = torch.rand(len(x_0), generator=rng), torch.randn(x_0.shape, generator=rng)
    with torch.no_grad():
        y = torch.arange(2).repeat(32)
        return denoising_loss(source.model, x_0, t, eps, y).mean().item()


def test_a_relabelled_copy_keeps_known_vectors_and_starts_new_ones_at_the_null_class():
    model = score_model()
    before, random = copies(model.state_dict()), torch.get_rng_state()
    copy = relabelled(model, ["new", "bright", "dark"])
    vectors, known = copy.network.classes.weight, model.network.classes.weight
    assert torch.equal(vectors[[1, 2]], known[[1, 0]])
    assert (vectors[[0, 3]] == 0).all()
    with torch.no_grad():
        for label, y in (("bright", 1), ("dark", 0), ("new", model.null)):
            told = copy(X_T, T, copy.index([label] * 3))
            torch.testing.assert_close(told, model(X_T, T, torch.full((3,), y)))
        copy.network.classes.weight.fill_(9.0)
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_forgetful_copy_denoises_every_label_as_the_null_class():
    model = score_model()
    copy = relabelled(model, list(GRADES), forget=True)
    assert (copy.network.classes.weight == 0).all()
    assert relabelled(score_model(()), ["a"]).labels == ("a",)  # a model without labels


def test_all_weights_learn_even_of_a_frozen_model():
    source = Hallucinator(score_model().requires_grad_(False), Recipe(p_uncond=0.0, lr=1e-2))
    before = copies(source.model.state_dict())
    learn(source, steps=2)
    moved = {k for k, v in source.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k, _ in source.model.named_parameters()}
    assert (source.model.network.classes.weight[-1] == 0).all()  # the null class stays zero


@pytest.mark.parametrize("trained", [0, 2])
def test_what_is_learnt_inside_is_undone_to_the_byte_after_an_exception_too(trained):
    source = hallucinator(adapt_steps=2, lr=1e-2)
    learn(source, trained)
    before = copies(source.state_dict())
    assert trained == 0 or any(name.startswith("adam.") for name in before)
    with source.undone():
        learn(source, 2)
        assert not same(source.state_dict(), before)
    assert same(source.state_dict(), before)

    def failing():
        with source.undone():
            learn(source)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert same(source.state_dict(), before)


def test_after_an_undone_episode_training_goes_on_as_if_it_had_not_been():
    one, two = (hallucinator(lr=1e-2) for _ in range(2))
    for source in (one, two):
        learn(source)
    with one.undone():
        learn(one, 3)
    for source in (one, two):
        source.adapt(EPISODE, SUPPORT, 77)
    assert same(one.state_dict(), two.state_dict())


def test_learning_a_support_lowers_its_denoising_loss():
    source = hallucinator(adapt_steps=15, copies=8, lr=1e-2, p_uncond=0.0)
    before = loss_on_support(source)
    source.adapt(EPISODE, SUPPORT, 0)
    assert loss_on_support(source) < before


def test_classes_that_the_model_does_not_know_are_refused():
    strange = EPISODE._replace(classes=("striped", "spotted"))
    with pytest.raises(UserError, match="does not know the label 'spotted'; it knows dark, br"):
        hallucinator().make(strange, SUPPORT, 1, 0)
    with pytest.raises(UserError, match="does not know the label"):
        hallucinator().adapt(strange, SUPPORT, 0)


@pytest.mark.parametrize(
    "recipe",
    [{}, {"start_time": 0.5}, {"sampler": "heun"}],
    ids=["noise", "image", "heun"],
)
def test_the_first_images_do_not_depend_on_how_many_are_asked_for(recipe):
    source = hallucinator(**recipe)
    more = source.make(EPISODE, SUPPORT, 3, 7)
    assert more.shape == (2, 3, 1, 8, 8)
    assert more.abs().max() <= 1 + 1e-5
    assert not more.requires_grad
    for n in (1, 2):
        torch.testing.assert_close(source.make(EPISODE, SUPPORT, n, 7), more[:, :n])
    assert not torch.equal(source.make(EPISODE, SUPPORT, 1, 8), more[:, :1])


def test_an_early_start_stays_near_the_support_and_a_start_at_1_ignores_it():
    other = -SUPPORT

    def distance(start_time):
        source = hallucinator(start_time=start_time)
        return (source.make(EPISODE, SUPPORT, 1, 0) - SUPPORT).square().mean().sqrt().item()

    assert distance(0.01) < 0.1
    assert distance(0.01) < min(distance(0.2), distance(1.0))
    whole = hallucinator()
    assert torch.equal(whole.make(EPISODE, SUPPORT, 1, 0), whole.make(EPISODE, other, 1, 0))


def test_an_early_start_goes_round_the_support():
    episode = tasks(k_shot=2)[0]
    support, _ = pictures(IMAGES, episode, torch.device("cpu"))
    made = hallucinator(start_time=0.005).make(episode, support, 3, 0)
    assert (made - support[:, [0, 1, 0]]).abs().mean() < 0.05


def test_making_changes_nothing():
    source = hallucinator()
    learn(source)
    before, random = copies(source.state_dict()), torch.get_rng_state()
    source.make(EPISODE, SUPPORT, 1, 0)
    assert same(source.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_same_seed_learns_the_same_bytes():
    one, two, other = (hallucinator() for _ in range(3))
    one.adapt(EPISODE, SUPPORT, 3)
    two.adapt(EPISODE, SUPPORT, 3)
    other.adapt(EPISODE, SUPPORT, 4)
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())


def test_without_steps_nothing_is_learnt():
    source = hallucinator(adapt_steps=0)
    before = copies(source.state_dict())
    assert torch.isnan(source.adapt(EPISODE, SUPPORT, 0))
    assert same(source.state_dict(), before)
    assert source.per_class


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sampler": "ddim"}, "sampler is 'ddim'; known: ancestral"),
        ({"lr": float("nan")}, "lr is nan; at least 0"),
        ({"guidance_scale": -1}, "guidance_scale is -1; at least 0"),
        ({"p_uncond": 1.5}, "p_uncond is 1.5; 0 to 1 is needed"),
        ({"start_time": 0}, "start_time is 0; above 0 to 1 is needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_recipes_are_explained(options, told):
    with pytest.raises(UserError, match=told):
        Recipe(**options)


POOLED = {"adapt_steps": 0}


def test_a_pool_draws_without_replacement():
    pool = Pool(hallucinator(**POOLED), 6)
    made = pool.make(EPISODE, SUPPORT, 6, 0)
    for c in range(2):
        assert len(made[c].flatten(1).unique(dim=0)) == 6
        everything = pool.images[c].flatten(1)
        assert torch.equal(made[c].flatten(1).unique(dim=0), everything.unique(dim=0))


def test_images_of_a_pool_do_not_depend_on_the_episode():
    one, two = (Pool(hallucinator(**POOLED), 4, seed=3) for _ in range(2))
    first = one.make(EPISODE, SUPPORT, 2, 5)
    other = two.make(tasks()[8], -SUPPORT, 2, 5)
    assert torch.equal(first, other)
    assert torch.equal(first[:, :1], one.make(EPISODE, SUPPORT, 1, 5))
    turned = EPISODE._replace(classes=EPISODE.classes[::-1])
    both = torch.cat([one.make(turned, SUPPORT, 4, 0)[0], one.make(EPISODE, SUPPORT, 4, 0)[1]])
    assert len(both.flatten(1).unique(dim=0)) == 4  # the same class, whatever its position


def test_a_pool_keeps_its_images_and_nothing_else():
    pool = Pool(hallucinator(**POOLED), 4)
    assert pool.state_dict() == {}
    made = pool.make(EPISODE, SUPPORT, 2, 5)
    assert set(pool.state_dict()) == {"images"}
    other = Pool(Hallucinator(score_model(seed=8), Recipe(**POOLED)), 4)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.make(EPISODE, SUPPORT, 2, 5), made)


def test_a_pool_that_is_too_small_says_so():
    with pytest.raises(UserError, match="5 images per class asked of a pool of 4"):
        Pool(hallucinator(**POOLED), 4).make(EPISODE, SUPPORT, 5, 0)


def test_a_pool_of_an_unknown_class_is_refused():
    nothing = np.empty((1, 0), np.int64)
    strange = Episode(("grey",), nothing, nothing[0], nothing[0], nothing)
    with pytest.raises(UserError, match="does not know the label 'grey'"):
        Pool(hallucinator(**POOLED), 4).make(strange, SUPPORT[:1], 1, 0)
