"""Sources of supports: real, remembered or changed images, each what its name says."""

import numpy as np
import pytest
import torch
from toy_task import IMAGES, image_set, tasks

from hallulib import UserError
from hallulib.data.changes import CHANGES
from hallulib.oneshot.hallucinate import Changed, ClassMemory, Oracle, Source
from hallulib.oneshot.joint import pictures

TASKS = tasks("test", k_shot=2)
EPISODE = TASKS[0]
SUPPORT = pictures(IMAGES, EPISODE, torch.device("cpu"))[0]
SOURCES = {name: Changed(name) for name in CHANGES}
SOURCES |= {"oracle": Oracle(IMAGES), "memory": ClassMemory(IMAGES, "grade")}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))


@every_source
def test_the_first_images_do_not_depend_on_how_many_are_asked_for(source):
    more = source.make(EPISODE, SUPPORT, 2, 7)
    assert more.shape == SUPPORT.shape
    assert torch.equal(source.make(EPISODE, SUPPORT, 1, 7), more[:, :1])


@every_source
def test_images_depend_on_the_seed_alone(source):
    before, support = torch.get_rng_state(), SUPPORT.clone()
    first, again = (source.make(EPISODE, SUPPORT, 2, 7) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(SUPPORT, support)  # the support itself is left alone


@every_source
def test_images_are_finite_and_in_range(source):
    for seed in range(20):
        made = source.make(EPISODE, SUPPORT, 2, seed)
        assert made.abs().max() <= 1
        assert made.dtype == torch.float32


@every_source
def test_a_source_that_learns_nothing_has_nothing_to_keep(source):
    assert torch.isnan(source.adapt(EPISODE, SUPPORT, 0))
    with source.undone():
        assert source.state_dict() == {}
    source.load_state_dict({})


def test_a_bare_source_makes_nothing():
    with pytest.raises(NotImplementedError):
        Source().make(EPISODE, SUPPORT, 1, 0)


def test_the_oracle_gives_the_spare_images_of_the_episode():
    made = SOURCES["oracle"].make(EPISODE, SUPPORT, 2, 0)
    for c in range(2):
        assert torch.equal(made[c], IMAGES.tensor(EPISODE.spare[c]))


def test_an_oracle_without_enough_spare_images_says_so():
    with pytest.raises(UserError, match="needs 3 spare images per class; the episode has 2"):
        SOURCES["oracle"].make(EPISODE, SUPPORT, 3, 0)


def rows_of(images):
    """Which images of the set these are."""
    everything = IMAGES.tensor().flatten(1)
    return [int((everything == x.flatten()).all(1).nonzero()) for x in images.flatten(0, 1)]


def test_the_memory_gives_training_images_of_the_class_each_once():
    made = SOURCES["memory"].make(EPISODE, SUPPORT, 24, 3)  # all there are
    table = IMAGES.table
    for name, images in zip(EPISODE.classes, made, strict=True):
        rows = rows_of(images[None])
        wanted = (table["grade"] == name) & (table["split"] == "train")
        assert sorted(rows) == np.flatnonzero(wanted).tolist()


def test_a_memory_with_too_few_training_images_names_the_class():
    with pytest.raises(UserError, match=r"class 'dark' needs 25 .* split train; there are 24"):
        SOURCES["memory"].make(EPISODE, SUPPORT, 25, 0)


def test_classes_of_several_episodes_can_be_made_in_one_call():
    """What ``per_class`` promises: row c depends on row c of the support alone."""
    for name, source in SOURCES.items():
        if name in ("oracle", "memory"):  # the memory draws, one row after another
            continue
        other = SUPPORT.clone()
        other[1] = 0.25
        one, two = (source.make(EPISODE, x, 2, 5) for x in (SUPPORT, other))
        assert torch.equal(one[0], two[0]), name


def test_flipping_twice_gives_the_support_back():
    flips = Changed("flips")
    once = flips.make(EPISODE, SUPPORT, 2, 0)
    assert not torch.equal(once, SUPPORT)
    assert torch.equal(flips.make(EPISODE, once, 2, 0), SUPPORT)


def test_copies_go_round_the_support():
    made = Changed("flips").make(EPISODE, SUPPORT, 5, 0).flip(-1)
    assert torch.equal(made, SUPPORT[:, [0, 1, 0, 1, 0]])


def test_a_shift_moves_the_inside_and_keeps_its_values():
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 1, 8, 8).repeat(2, 2, 1, 1, 1)
    seen = set()
    for seed in range(40):
        made = Changed("shifts").make(EPISODE, ramp, 1, seed)
        assert torch.isin(made, ramp).all()
        inner = made[0, 0, 0, 1:-1, 1:-1]
        matches = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if torch.equal(inner, ramp[0, 0, 0, i : i + 6, j : j + 6])
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 9  # a tenth of eight pixels, rounded up to one, each way


def test_augmentation_changes_the_contrast_of_a_constant_image_within_its_limits():
    grey = torch.full((2, 1, 1, 8, 8), 0.5)
    values = torch.stack([Changed("augmentation").make(EPISODE, grey, 1, s) for s in range(60)])
    flat = values.flatten(3).flatten(0, 2)
    assert torch.allclose(flat.amax(1), flat.amin(1))
    assert flat.min() >= 0.8 * 0.5 - 0.1
    assert flat.max() <= 1.2 * 0.5 + 0.1
    assert flat[:, 0].std() > 0.03


def test_the_memory_knows_only_the_split_train():
    images = image_set(patients=6)
    images.table.loc[images.table["split"] == "train", "grade"] = ""
    with pytest.raises(UserError, match="there are 0"):
        ClassMemory(images, "grade").make(EPISODE, SUPPORT, 1, 0)
