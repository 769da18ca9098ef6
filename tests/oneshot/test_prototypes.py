"""Prototypes are means; similarities and probabilities obey their invariances."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hallulib import UserError
from hallulib.oneshot.bdc import (
    BDC,
    KINDS,
    Covariance,
    Mean,
    PrototypeClassifier,
    build,
    load,
    prototypes,
    save,
    similarity,
)

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


def classifier(log_scale=None):
    model = PrototypeClassifier(nn.Identity(), nn.Flatten()).double()
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
def test_similarities_are_the_cosines_of_torch(size):
    queries, support, _ = task(*size)
    means = prototypes(support)
    expected = torch.cosine_similarity(queries[..., :, None, :], means[..., None, :, :], dim=-1)
    torch.testing.assert_close(similarity(queries, means), expected)


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


def test_similarities_are_computed_in_float32_under_autocast():
    queries, support, _ = task(d=100, dtype=torch.float32)
    means = prototypes(support)
    expected = similarity(queries, means)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(queries, means), expected)


def test_similarities_have_exact_gradients():
    queries, support, weights = task(n_query=2, d=4)
    values = tuple(v.requires_grad_() for v in (queries, support, weights))
    function = lambda q, s, w: similarity(q, prototypes(s, w))
    assert torch.autograd.gradcheck(function, values)


def test_episodes_in_one_batch_do_not_see_each_other():
    queries, support, weights = task((2, 3))
    model = classifier()
    together = model.logits(queries, support, weights).softmax(-1)
    assert together.shape == (2, 3, 5, 3)
    for i in range(2):
        for j in range(3):
            alone = model.logits(queries[i, j], support[i, j], weights[i, j]).softmax(-1)
            torch.testing.assert_close(together[i, j], alone)
    one = model.logits(queries[:1, :1], support[:1, :1], weights[:1, :1]).softmax(-1)
    assert one.shape == (1, 1, 5, 3)


def test_permuting_classes_or_queries_permutes_logits():
    queries, support, weights = task(n_way=4)
    model, order = classifier(), [2, 0, 3, 1]
    logits = model.logits(queries, support, weights)
    permuted = model.logits(queries, support[:, order], weights[:, order])
    torch.testing.assert_close(permuted, logits[..., order])
    permuted = model.logits(queries[:, order], support, weights)
    torch.testing.assert_close(permuted, logits[:, order])


def test_the_order_of_examples_has_no_effect():
    queries, support, weights = task(n=3)
    model, order = classifier(), [2, 0, 1]
    logits = model.logits(queries, support, weights)
    shuffled = model.logits(queries, support[..., order, :], weights[..., order])
    torch.testing.assert_close(shuffled, logits)


def test_probabilities_are_the_softmax_of_scaled_similarities():
    queries, support, _ = task()
    model = classifier(math.log(3.0))
    value = similarity(queries, prototypes(support))
    torch.testing.assert_close(model.logits(queries, support), 3 * value)
    probabilities = model.logits(queries, support).softmax(-1)
    torch.testing.assert_close(probabilities, (3 * value).softmax(-1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5).double())
    assert classifier().log_scale.exp().item() == pytest.approx(10)


@all_kinds
def test_a_task_is_learned_with_finite_gradients(kind):
    """Any answers can be learned by heart, also with a black image among the queries."""
    model = build(kind, width=8, reduce_to=6)
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


def test_a_classifier_of_when_there_were_other_metrics_is_read_if_its_own_was_the_cosine(tmp_path):
    model, file = build(width=8), tmp_path / "classifier.json"
    save(model, tmp_path)
    assert "metric" not in json.loads(file.read_text())
    for metric in ("cosine", "euclidean"):
        file.write_text(json.dumps(model.settings | {"metric": metric}))
        if metric == "cosine":
            assert load(tmp_path).settings == model.settings
    with pytest.raises(UserError, match="otherwise than by the cosine; fit and save it again"):
        load(tmp_path)


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
