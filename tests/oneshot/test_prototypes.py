"""Prototypes are means; similarities and probabilities obey their invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hallulib.oneshot.bdc import (
    BDC,
    KINDS,
    METRICS,
    Covariance,
    Mean,
    PrototypeClassifier,
    build,
    prototypes,
    similarity,
)

all_metrics = pytest.mark.parametrize("metric", list(METRICS))
all_kinds = pytest.mark.parametrize("kind", list(KINDS))
sizes = st.tuples(
    st.lists(st.integers(1, 3), max_size=2).map(tuple),  # episodes
    st.integers(1, 4),  # n_query
    st.integers(1, 4),  # n_way
    st.integers(1, 3),  # examples
    st.integers(1, 9),  # entries
    st.integers(0, 10**6),
)


def task(episodes=(2,), n_query=5, n_way=3, n=2, d=7, seed=0, dtype=torch.float64):
    """Queries, support and weights of random episodes."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*episodes, *shape, generator=rng, dtype=dtype)
    return draw(n_query, d), draw(n_way, n, d), draw(n_way, n).square() + 0.1


def classifier(metric="cosine", log_scale=None):
    model = PrototypeClassifier(nn.Identity(), nn.Flatten(), metric).double()
    if log_scale is not None:
        nn.init.constant_(model.log_scale, log_scale)
    return model


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_equal_weights_give_the_mean_whatever_their_size(size):
    _, support, weights = task(*size)
    torch.testing.assert_close(prototypes(support), support.mean(-2))
    for value in (1.0, 0.01, 300.0):
        equal = torch.full_like(weights, value)
        torch.testing.assert_close(prototypes(support, equal), support.mean(-2))


def test_a_weight_of_zero_leaves_an_example_out():
    _, support, weights = task(n=4)
    weights[..., 1] = 0
    kept = [0, 2, 3]
    expected = prototypes(support[..., kept, :], weights[..., kept])
    torch.testing.assert_close(prototypes(support, weights), expected)
    support[..., 1, :] = 1e6
    torch.testing.assert_close(prototypes(support, weights), expected)


def test_nothing_of_an_example_that_is_left_out_is_felt():
    found = prototypes(torch.tensor([[[1.0], [math.nan]]]), torch.tensor([[1.0, 0.0]]))
    assert found.tolist() == [[1.0]]


def test_an_integer_weight_is_so_many_copies():
    _, support, _ = task((), n_way=2, n=2)
    weights = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    copies = support[:, [0, 0, 0, 1]]
    torch.testing.assert_close(prototypes(support, weights), prototypes(copies))


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_a_prototype_lies_within_its_examples_and_moves_with_them(size):
    _, support, weights = task(*size)
    found = prototypes(support, weights)
    assert (found <= support.amax(-2) + 1e-12).all()
    assert (found >= support.amin(-2) - 1e-12).all()
    torch.testing.assert_close(prototypes(2 * support + 1, weights), 2 * found + 1)


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_similarities_are_those_of_torch(size):
    queries, support, _ = task(*size)
    means = prototypes(support)
    pairs = queries[..., :, None, :], means[..., None, :, :]
    expected = {
        "cosine": torch.cosine_similarity(*pairs, dim=-1),
        "inner": (pairs[0] * pairs[1]).sum(-1),
        "euclidean": -(torch.cdist(queries, means) ** 2),
    }
    assert set(expected) == set(METRICS)
    for metric, value in expected.items():
        torch.testing.assert_close(similarity(queries, means, metric), value)


def test_the_cosine_stays_in_its_range_and_ignores_lengths():
    queries, support, _ = task(n_query=200, n=1, dtype=torch.float32)
    means = prototypes(support)
    value = similarity(queries, means)
    assert value.abs().max() <= 1
    torch.testing.assert_close(similarity(1e3 * queries, 1e-2 * means), value)
    own = similarity(means, 5 * means).diagonal(dim1=-2, dim2=-1)
    assert (own <= 1).all()
    torch.testing.assert_close(own, torch.ones_like(own))


def test_a_zero_vector_has_cosine_zero_and_finite_gradients():
    queries = torch.zeros(2, 4, requires_grad=True)
    means = torch.stack([torch.zeros(4), torch.ones(4)]).requires_grad_()
    value = similarity(queries, means)
    value.sum().backward()
    assert (value == 0).all()
    assert queries.grad.isfinite().all()
    assert means.grad.isfinite().all()
    assert similarity(torch.full((1, 4), 1e-12), torch.ones(1, 4)) < 1e-3  # noise stays noise


def test_the_euclidean_similarity_keeps_its_digits_far_from_the_origin():
    queries, support, _ = task(n=1, dtype=torch.float32)
    means = prototypes(support)
    near, far = ((queries + c, means + c) for c in (0.0, 1000.0))
    exact = similarity(*(v.double() for v in far), "euclidean")
    torch.testing.assert_close(similarity(*far, "euclidean").double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(similarity(*near, "euclidean").double(), exact, rtol=1e-2, atol=0.1)
    assert (similarity(means, means, "euclidean") <= 0).all()


@all_metrics
def test_similarities_are_computed_in_float32_under_autocast(metric):
    queries, support, _ = task(d=100, dtype=torch.float32)
    means = prototypes(support)
    expected = similarity(queries, means, metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(queries, means, metric), expected)


@all_metrics
def test_similarities_have_exact_gradients(metric):
    queries, support, weights = task(n_query=2, d=4)
    values = tuple(v.requires_grad_() for v in (queries, support, weights))
    function = lambda q, s, w: similarity(q, prototypes(s, w), metric)
    assert torch.autograd.gradcheck(function, values)


@all_metrics
def test_episodes_in_one_batch_do_not_see_each_other(metric):
    queries, support, weights = task((2, 3))
    model = classifier(metric)
    together = model.logits(queries, support, weights).softmax(-1)
    assert together.shape == (2, 3, 5, 3)
    for i in range(2):
        for j in range(3):
            alone = model.logits(queries[i, j], support[i, j], weights[i, j]).softmax(-1)
            torch.testing.assert_close(together[i, j], alone)
    one = model.logits(queries[:1, :1], support[:1, :1], weights[:1, :1]).softmax(-1)
    assert one.shape == (1, 1, 5, 3)


@all_metrics
def test_permuting_classes_or_queries_permutes_logits(metric):
    queries, support, weights = task(n_way=4)
    model, order = classifier(metric), [2, 0, 3, 1]
    logits = model.logits(queries, support, weights)
    permuted = model.logits(queries, support[:, order], weights[:, order])
    torch.testing.assert_close(permuted, logits[..., order])
    permuted = model.logits(queries[:, order], support, weights)
    torch.testing.assert_close(permuted, logits[:, order])


@all_metrics
def test_the_order_of_examples_has_no_effect(metric):
    queries, support, weights = task(n=3)
    model, order = classifier(metric), [2, 0, 1]
    logits = model.logits(queries, support, weights)
    shuffled = model.logits(queries, support[..., order, :], weights[..., order])
    torch.testing.assert_close(shuffled, logits)


@all_metrics
def test_probabilities_are_the_softmax_of_scaled_similarities(metric):
    queries, support, _ = task()
    model = classifier(metric, math.log(3.0))
    value = similarity(queries, prototypes(support), metric)
    torch.testing.assert_close(model.logits(queries, support), 3 * value)
    probabilities = model.logits(queries, support).softmax(-1)
    torch.testing.assert_close(probabilities, (3 * value).softmax(-1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5).double())


def test_the_scale_starts_at_ten_for_the_cosine_and_at_one_otherwise():
    scales = {metric: classifier(metric).log_scale.exp().item() for metric in METRICS}
    assert scales == pytest.approx({"cosine": 10, "inner": 1, "euclidean": 1}, rel=1e-6)


def test_at_equal_norms_euclidean_and_inner_logits_are_one_classifier():
    """-|q - p|^2 = 2 q.p - |q|^2 - |p|^2, and what all classes share drops out of the softmax."""
    queries, support, _ = task(n=1)
    support = nn.functional.normalize(support, dim=-1)
    euclidean = classifier("euclidean").logits(queries, support).softmax(-1)
    inner = classifier("inner", math.log(2.0)).logits(queries, support).softmax(-1)
    torch.testing.assert_close(euclidean, inner)


@all_metrics
@all_kinds
def test_a_task_is_learned_with_finite_gradients(kind, metric):
    """Any answers can be learned by heart, also with a black image among the queries."""
    model = build(kind, width=8, reduce_to=6, metric=metric)
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images[3], answers = -1, torch.tensor([0, 1, 1, 0, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        vectors = model.embed(images)
        logits = model.logits(vectors[2:], vectors[:2, None])
        losses.append(nn.functional.cross_entropy(logits, answers))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert model.log_scale.grad.abs() > 0
    assert losses[-1] < losses[0]


@all_kinds
def test_images_become_vectors_of_the_kind(kind):
    model = build(kind, channels=3, width=8, reduce_to=6)
    layer, entries = {"bdc": (BDC, 21), "covariance": (Covariance, 21), "mean": (Mean, 64)}[kind]
    assert isinstance(model.embedding, layer)
    for batch in (1, 3):
        assert model.embed(torch.randn(batch, 3, 32, 32)).shape == (batch, entries)


def test_a_seed_gives_one_backbone_for_every_kind_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, *others = (build(kind, width=8, seed=3).backbone.state_dict() for kind in KINDS)
    assert torch.equal(torch.get_rng_state(), state)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    different = build(width=8, seed=4).backbone.state_dict()
    assert not torch.equal(first["conv1.weight"], different["conv1.weight"])
