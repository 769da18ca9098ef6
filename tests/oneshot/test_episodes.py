"""An episode keeps patients apart, whatever the table; episode i is the same however one asks."""

from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_prep.drawn import prostate as drawn
from hallulib import UserError
from hallulib.data.imageset import ImageSet
from hallulib.oneshot.episodes import Episodes

CLASSES = ("x", "y", "z")


@pytest.fixture(scope="module")
def prostate():
    """The phantom without its benign slices: the test split has 27, 13, 6 and 8 patients."""
    images, table, card = drawn.prostate(16, n_unlabelled=0)
    return ImageSet(images, table, card)


def image_set(rows):
    """A set from (patient, split, class) of each image; "" is no class."""
    table = pd.DataFrame(rows, columns=["patient", "split", "grade"])
    card = {"name": "toy", "labels": {"grade": {"values": list(CLASSES)}}}
    return ImageSet(np.zeros((len(table), 1, 4, 4), np.uint8), table, card)


def of_one_class_each(**sizes):
    """Patients of one class each: ``x=[3, 1]`` is two patients of class x, 3 images and 1."""
    rows = [
        (f"{name}{i}", "test", name)
        for name, images in sizes.items()
        for i, n in enumerate(images)
        for _ in range(n)
    ]
    return image_set(rows)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def check_apart(episode, owner):
    """No owner has two of the three parts."""
    parts = [set(owner[rows].flat) for rows in (episode.support, episode.query, episode.spare)]
    for one, other in combinations(parts, 2):
        assert not one & other


def check(images, scheme, episode, *, split, n_way, k_shot, n_spare, n_queries):
    """The rules that hold with and without shared patients."""
    table = images.table
    assert len(set(episode.classes)) == n_way
    assert list(episode.classes) == sorted(episode.classes, key=images.classes(scheme).index)
    assert episode.support.shape == (n_way, k_shot)
    assert episode.spare.shape == (n_way, n_spare)
    assert len(episode.query) == len(episode.answers) == n_queries
    names = np.array(episode.classes)
    for rows, told in (
        (episode.support, names[:, None]),
        (episode.spare, names[:, None]),
        (episode.query, names[episode.answers]),
    ):
        assert rows.dtype == np.int64
        assert (table["split"].to_numpy()[rows] == split).all()
        assert (table[scheme].to_numpy()[rows] == told).all()
    check_apart(episode, np.arange(len(images)))
    assert len(set(episode.support.flat)) == n_way * k_shot
    assert len(set(episode.query)) == n_queries


def check_patients(images, episode):
    patient = images.table["patient"].to_numpy()
    check_apart(episode, patient)
    for rows in episode.support:
        assert len(set(patient[rows])) == len(rows)


def random_set(n_patients, share_of_mixed, seed):
    """Patients of 1 to 7 images: all of one class, or each of its own or of none."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n_patients):
        size, split = rng.integers(1, 8), rng.choice(["test", "test", "test", "train"])
        several = rng.random() < share_of_mixed
        labels = rng.choice(["", *CLASSES], size) if several else [rng.choice(CLASSES)] * size
        rows += [(f"p{i}", str(split), str(label)) for label in labels]
    return image_set(rows)


@given(
    st.builds(random_set, st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32)),
    st.integers(2, 3),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 2**40),
)
@settings(max_examples=300, deadline=None)
def test_every_table_is_refused_or_gives_episodes_that_keep_all_rules(
    images, n_way, k_shot, n_query, n_spare, share, index
):
    options = dict(n_way=n_way, k_shot=k_shot, n_query=n_query, n_spare=n_spare)
    options |= dict(share_patients=share)
    try:
        episodes = Episodes(images, "grade", split="test", **options)
    except UserError:
        return
    assert sorted(episodes.classes + episodes.left_out) == list(CLASSES)
    for episode in (*episodes.take(3), episodes[index]):
        numbers = dict(n_way=n_way, k_shot=k_shot, n_spare=n_spare, n_queries=n_way * n_query)
        check(images, "grade", episode, split="test", **numbers)
        assert set(episode.classes) <= set(episodes.classes)
        counts = np.bincount(episode.answers, minlength=n_way)
        assert (counts == n_query).all()
        if not share:
            check_patients(images, episode)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("isup", dict(n_query=10, n_spare=8)),
        ("isup", dict(n_query=10, k_shot=1)),
        ("isup", dict(n_query=5, k_shot=2, n_spare=8)),
        ("grade2", dict(n_query=10, k_shot=5, n_spare=4)),
    ],
)
def test_the_phantom_s_test_split_serves(prostate, scheme, options):
    episodes = Episodes(prostate, scheme, split="test", **options)
    assert episodes.left_out == ()
    n_way = len(prostate.classes(scheme))
    numbers = dict(k_shot=1, n_spare=0) | {
        k: v for k, v in options.items() if k in "k_shot n_spare"
    }
    for episode in episodes.take(50):
        n_queries = n_way * options["n_query"]
        check(prostate, scheme, episode, split="test", n_way=n_way, n_queries=n_queries, **numbers)
        check_patients(prostate, episode)


def test_episodes_do_not_depend_on_the_order_in_which_they_are_asked_for(prostate):
    make = lambda seed=3: Episodes(prostate, "isup", split="train", n_spare=2, seed=seed)
    in_order, backwards = make(), make()
    first = list(in_order.take(8))
    last_first = [backwards[i] for i in reversed(range(8))][::-1]
    assert all(same(a, b) for a, b in zip(first, last_first, strict=True))
    assert all(same(a, make()[i]) for i, a in enumerate(first))


def test_episodes_and_seeds_differ(prostate):
    queries = {
        tuple(Episodes(prostate, "isup", split="train", seed=seed)[i].query)
        for seed in range(5)
        for i in range(20)
    }
    assert len(queries) == 100


def test_spare_images_change_no_support(prostate):
    without, with_spare = (Episodes(prostate, "isup", split="test", n_spare=n) for n in (0, 4))
    for one, other in zip(without.take(20), with_spare.take(20), strict=True):
        assert np.array_equal(one.support, other.support)


def test_rows_of_other_splits_change_no_episode_but_positions_follow_them(prostate):
    alone = prostate.select(split="test")
    offset = int(np.flatnonzero(prostate.table["split"] == "test")[0])
    whole, part = (Episodes(s, "isup", split="test", n_spare=1) for s in (prostate, alone))
    for one, other in zip(whole.take(10), part.take(10), strict=True):
        assert np.array_equal(one.query, other.query + offset)
        assert np.array_equal(one.support, other.support + offset)


def test_a_patient_with_many_slices_is_support_no_more_often_than_others():
    images = of_one_class_each(x=[1, 1, 40, 2, 6], y=[5, 5, 5])
    patient = images.table["patient"].to_numpy()
    episodes = Episodes(images, "grade", split="test", n_way=2, n_query=2)
    drawn = Counter(patient[e.support[0, 0]] for e in episodes.take(1000))
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3
    assert len(drawn) == 5


def test_every_image_is_asked_about_as_often_as_any_other_of_its_size_of_patient():
    images = of_one_class_each(x=[4] * 5, y=[4] * 5)
    episodes = Episodes(images, "grade", split="test", n_way=2, n_query=3)
    asked = Counter(int(row) for e in episodes.take(1500) for row in e.query)
    assert len(asked) == 40
    assert stats.chisquare(list(asked.values())).pvalue > 1e-3


def test_spare_images_come_from_as_many_patients_as_half_of_the_others_allow():
    images = of_one_class_each(x=[3] * 9, y=[2, 2, 2])
    patient = images.table["patient"].to_numpy()
    episodes = Episodes(images, "grade", split="test", n_way=2, n_query=2, n_spare=6)
    for episode in episodes.take(30):
        x, y = (patient[rows] for rows in episode.spare)
        assert len(set(x)) == 4  # of 8 others
        assert max(Counter(x).values()) == 2
        assert len(set(y)) == 1  # of 2 others
        assert len(set(episode.spare[0])) == 6
        assert set(Counter(episode.spare[1].tolist()).values()) == {3}  # 2 images, 6 places


def test_spare_patients_leave_the_queries_their_images():
    images = of_one_class_each(x=[2] * 7, y=[2] * 7)
    patient = images.table["patient"].to_numpy()
    for n_query, spare_patients in ((6, 3), (8, 2), (10, 1)):
        episodes = Episodes(images, "grade", split="test", n_way=2, n_query=n_query, n_spare=3)
        for rows in episodes[0].spare:
            assert len(set(patient[rows])) == spare_patients
    with pytest.raises(UserError, match="10 images are sure to remain for 11 queries"):
        Episodes(images, "grade", split="test", n_way=2, n_query=11, n_spare=3)


def test_shared_patients_leak_and_separate_ones_do_not(prostate):
    patient = prostate.table["patient"].to_numpy()

    def leaks(**options):
        episodes = Episodes(prostate, "isup", split="test", n_query=10, **options)
        return np.mean(
            [bool({*patient[e.support.flat]} & {*patient[e.query]}) for e in episodes.take(50)]
        )

    assert leaks() == 0
    assert leaks(share_patients=True) > 0.5


def test_classes_with_too_few_patients_are_left_out_where_others_suffice(prostate):
    episodes = Episodes(prostate, "gs", split="test", n_way=4)
    assert episodes.left_out == ("3+5", "5+3", "5+4", "5+5")  # 1, 1, 2 and 1 patients
    assert episodes.classes == ("3+4", "4+3", "4+4", "4+5") == episodes[0].classes
    drawn = Counter(
        c for e in Episodes(prostate, "gs", split="train", n_way=4).take(600) for c in e.classes
    )
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3
    assert len(drawn) == 8


def test_a_full_episode_names_all_classes_in_the_order_of_the_card(prostate):
    assert Episodes(prostate, "gs", split="train")[4].classes == prostate.classes("gs")


def test_what_remains_at_worst_is_exact_where_patients_have_one_class():
    sizes = dict(x=[5, 3, 2, 1], y=[9, 9, 9, 9])  # support and spare may be the 5 and the 3
    for k_shot, n_spare, left in ((1, 0, 6), (1, 1, 3), (2, 1, 1)):
        options = dict(split="test", n_way=2, k_shot=k_shot, n_spare=n_spare)
        Episodes(of_one_class_each(**sizes), "grade", n_query=left, **options)
        with pytest.raises(UserError, match=f"{left} images are sure to remain for {left + 1} "):
            Episodes(of_one_class_each(**sizes), "grade", n_query=left + 1, **options)


def test_patients_of_several_classes_may_be_taken_by_another_class():
    """Three patients with both classes: x takes one, y another, the third is asked about."""
    rows = [(p, "test", c) for p in "abc" for c in "xy"]
    episodes = Episodes(image_set(rows), "grade", split="test", n_way=2, n_query=1)
    for episode in episodes.take(30):
        check_patients(image_set(rows), episode)
    with pytest.raises(UserError, match="class 'x' has 2 images of 2 patients"):
        Episodes(image_set(rows[:4]), "grade", split="test", n_way=2, n_query=1)


@pytest.mark.parametrize(
    ("unit", "whose"),
    [("field", " of 2 fields"), ("near-copies", " of 2 groups of near copies"), ("unknown", "")],
)
def test_what_is_missing_is_counted_in_the_unit_of_the_set(unit, whose):
    few = image_set([(p, "test", c) for p in "ab" for c in "xy"])
    few.card["unit"] = unit
    with pytest.raises(UserError, match=f"class 'x' has 2 images{whose}; with 1 set aside"):
        Episodes(few, "grade", split="test", n_way=2, n_query=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scheme="grade9"), "no label scheme 'grade9'; known schemes: isup, gs, grade2"),
        (dict(split="tset"), "0 of the 4 classes of scheme isup can serve in split tset"),
        (dict(n_way=5), "n_way is 5; scheme isup has 4 classes"),
        (dict(k_shot=6), "3 of the 4 classes .* class '4' has 21 images of 6 patients"),
        (dict(n_query=60), "1 of the 4 classes .* n_way is 4: class '3' has 55 images"),
        (dict(scheme="gs"), "4 of the 8 classes .* class '3.5' has 5 images of 1 patient;"),
        (dict(scheme="gs", n_way=5), "4 of the 8 classes of scheme gs can serve in split test"),
        (dict(split="unlabelled"), "class '2' has 0 images of 0 patients"),
        (dict(n_query=30, share_patients=True), "class '4' has 21 images; with 1 set aside"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(prostate, options, message):
    options = dict(scheme="isup", split="test") | options
    with pytest.raises(UserError, match=message) as told:
        Episodes(prostate, **options)
    assert "\n" not in str(told.value)


# ---- groups of patients


@pytest.mark.parametrize("scheme", ["isup", "grade2"])
def test_groups_share_no_patient_and_episodes_take_turns(prostate, scheme):
    episodes = Episodes(prostate, scheme, split="train", n_spare=2, groups=4)
    assert episodes.groups == 4
    patients, of_group = prostate.table["patient"].to_numpy(), [set() for _ in range(4)]
    for i, task in enumerate(episodes.take(80)):
        check_apart(task, patients)
        for rows in (task.support, task.spare, task.query):
            of_group[i % 4] |= set(patients[rows.ravel()])
    assert not any(a & b for a, b in combinations(of_group, 2))


def test_groups_are_alike_in_classes(prostate):
    episodes = Episodes(prostate, "isup", split="train", groups=4)
    for name in episodes.classes:
        sizes = [
            len(np.unique(c.patients)) for deal in episodes._deals for c in deal if c.name == name
        ]
        assert max(sizes) - min(sizes) <= 2  # patients of several classes count for the rarest


def test_one_group_is_no_group(prostate):
    plain, one = (Episodes(prostate, "isup", split="train", **k) for k in ({}, {"groups": 1}))
    assert all(same(plain[i], one[i]) for i in range(5))


def test_there_are_as_many_groups_as_the_rarest_class_can_serve(prostate):
    """Of eight patients of ISUP 5 and six of ISUP 4 in the test split, ten groups are not made."""
    few = Episodes(prostate, "isup", split="test", groups=10)
    assert 1 <= few.groups < 6
    assert few.classes == Episodes(prostate, "isup", split="test").classes


def test_permuted_patients_keep_their_images_and_swap_their_labels(prostate):
    plain = Episodes(prostate, "isup", split="train", groups=3)
    swapped = plain.permuted(0)
    patients, truth = prostate.table["patient"].to_numpy(), prostate.labels("isup").numpy()
    kept, seen = [], {}
    for task in swapped.take(60):
        assert len(np.unique(task.query)) == len(task.query)
        assert not set(patients[task.support.ravel()]) & set(patients[task.query])
        kept += (truth[task.query] == task.answers).tolist()
        for row, answer in zip(task.query.tolist(), task.answers.tolist(), strict=True):
            assert seen.setdefault(row, answer) == answer  # one label throughout
    assert np.mean(kept) < 0.6  # four classes, of which one prevails
    other = plain.permuted(1)
    assert not all(same(swapped[i], other[i]) for i in range(5))
    again = plain.permuted(0)
    assert all(same(swapped[i], again[i]) for i in range(5))


def test_permuting_leaves_as_many_patients_to_each_class():
    toy = of_one_class_each(x=[2] * 9, y=[2] * 5)
    (found,) = Episodes(toy, "grade", split="test", n_way=2, n_query=2).permuted(3)._deals
    assert [len(np.unique(c.patients)) for c in found] == [9, 5, 0]
    assert [len(c.rows) for c in found] == [18, 10, 0]
