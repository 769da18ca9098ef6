"""Patients are dealt whole, in the shares that are asked for."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.splitting import split_patients
from hallulib import UserError

COHORTS = st.lists(
    st.tuples(st.integers(0, 30).map(lambda i: f"p{i}"), st.sampled_from("abc")), min_size=1
)
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@given(COHORTS, st.integers(0, 9))
@settings(deadline=None)
def test_a_division_gives_each_patient_one_split_whatever_the_order(cohort, seed):
    patients, labels = zip(*cohort, strict=True)
    split = split_patients(patients, labels, SHARES, seed)
    assert set(split) == set(patients)
    assert set(split.values()) <= set(SHARES)
    again = split_patients(patients[::-1], labels[::-1], SHARES, seed)
    assert again == split


@given(st.lists(st.integers(1, 9), min_size=3, max_size=40), st.integers(0, 9))
@settings(deadline=None)
def test_shares_of_images_are_met_within_the_largest_patients(weights, seed):
    patients = [f"p{i}" for i, n in enumerate(weights) for _ in range(n)]
    split = split_patients(patients, ["a"] * len(patients), SHARES, seed)
    images = Counter(split[p] for p in patients)
    for name, share in SHARES.items():
        assert images[name] > 0
        assert abs(images[name] - share * len(patients)) <= 2 * max(weights)


def test_every_class_with_enough_patients_is_in_every_split():
    patients = [f"p{i}" for i in range(100)]
    labels = ["rare"] * 3 + ["common"] * 97
    split = split_patients(patients, labels, SHARES, seed=0)
    assert {split[p] for p in patients[:3]} == set(SHARES)
    assert Counter(split.values())["train"] == pytest.approx(60, abs=2)


def test_a_share_of_nothing_gets_nobody_and_seeds_differ():
    patients = [f"p{i}" for i in range(50)]
    shares = {"train": 0.5, "val": 0.0, "test": 0.5}
    one, two = (split_patients(patients, ["a"] * 50, shares, seed) for seed in (0, 1))
    assert set(one.values()) == {"train", "test"}
    assert one != two


@pytest.mark.parametrize("shares", [{"train": 0.5}, {"dev": 1.0}, {"train": 1.5, "val": -0.5}, {}])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(UserError, match="fractions"):
        split_patients(["p"], ["a"], shares, seed=0)
