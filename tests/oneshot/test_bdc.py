"""BDC matrices are distance covariances, whatever the order of channels or positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hallulib.oneshot.bdc import BDC, Covariance, Mean, bdc_matrix, reduction, to_vector

sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 10), st.integers(0, 10**6))


def features(batch=3, channels=8, positions=6, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, positions, generator=rng, dtype=dtype)


def by_definition(x, scale=1.0, eps=1e-5):
    """The equation of the module, entry by entry."""
    d = np.array([[np.sqrt(scale * ((a - b) ** 2).sum() + eps) for b in x] for a in x])
    return d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + d.mean()


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_it_is_its_definition(size):
    x = features(*size)
    expected = np.stack([by_definition(one.numpy(), 0.3, 1e-3) for one in x])
    np.testing.assert_allclose(bdc_matrix(x, 0.3, 1e-3), expected, atol=1e-9)


@pytest.mark.parametrize("positions", [1, 4, 16])
def test_the_mean_of_products_is_the_distance_covariance_of_an_independent_package(positions):
    import dcor  # here: its first import on a machine compiles for half a minute

    x, y = features(2, 20, positions)
    y = x.square() + 0.5 * y
    covariance = dcor.distance_covariance_sqr(x.numpy(), y.numpy(), method="naive")
    correlation = dcor.distance_correlation_sqr(x.numpy(), y.numpy(), method="naive")
    a, b = bdc_matrix(x, eps=0), bdc_matrix(y, eps=0)
    assert (a * b).mean().item() == pytest.approx(covariance, rel=1e-9)
    cosine = torch.cosine_similarity(to_vector(a), to_vector(b), dim=0)
    assert cosine.item() == pytest.approx(correlation, rel=1e-9)


def test_two_channels_give_half_their_distance():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    a = bdc_matrix(x, scale=4.0, eps=0)
    torch.testing.assert_close(a, 5 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())


def test_equidistant_channels_give_the_centring_matrix():
    """Unit vectors are sqrt(2) apart: J A J of that is sqrt(2) times (1/c - identity)."""
    a = bdc_matrix(torch.eye(5, dtype=torch.float64), eps=0)
    torch.testing.assert_close(a, 2**0.5 * (0.2 - torch.eye(5, dtype=torch.float64)))


def test_independent_maps_have_no_distance_covariance_where_dependent_ones_have():
    """A square is uncorrelated with its root, yet not independent of it."""
    x, noise = features(2, 2000, 1)
    a, b, c = (bdc_matrix(v, eps=0) for v in (x, x.square(), noise))
    independent, dependent = (a * c).mean(), (a * b).mean()
    assert torch.corrcoef(torch.stack([x, x.square()])[..., 0])[0, 1].abs() < 0.1
    assert dependent > 20 * independent > 0


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_it_is_symmetric_with_rows_that_sum_to_zero_and_no_positive_eigenvalue(size):
    a = bdc_matrix(features(*size))
    torch.testing.assert_close(a, a.mT)
    torch.testing.assert_close(a.sum(-1), torch.zeros_like(a[..., 0]), rtol=0, atol=1e-9)
    # distances are of negative type, and eps leaves them so
    assert torch.linalg.eigvalsh(a).max() < 1e-9


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_positions_may_be_permuted_rotated_and_shifted(size):
    x = features(*size)
    m, expected = x.shape[-1], bdc_matrix(x)
    rng = torch.Generator().manual_seed(size[-1])
    rotation, _ = torch.linalg.qr(torch.randn(m, m, generator=rng, dtype=torch.float64))
    shift = torch.randn(m, generator=rng, dtype=torch.float64)
    for other in (x[..., torch.randperm(m, generator=rng)], x @ rotation, x + shift):
        torch.testing.assert_close(bdc_matrix(other), expected)


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_permuting_channels_permutes_rows_and_columns(size):
    x = features(*size)
    order = torch.randperm(x.shape[-2], generator=torch.Generator().manual_seed(0))
    expected = bdc_matrix(x)[..., order, :][..., order]
    torch.testing.assert_close(bdc_matrix(x[..., order, :]), expected)


def test_scale_is_a_factor_of_the_squared_distance():
    x = features()
    torch.testing.assert_close(bdc_matrix(x, 9.0, eps=0), 3 * bdc_matrix(x, eps=0))
    torch.testing.assert_close(bdc_matrix(x, torch.tensor(9.0)), bdc_matrix(3 * x))


def test_a_batch_gives_what_its_members_give_and_a_batch_of_one_keeps_its_axis():
    x = features(6)
    one_by_one = torch.stack([bdc_matrix(one) for one in x])
    torch.testing.assert_close(bdc_matrix(x), one_by_one)
    torch.testing.assert_close(bdc_matrix(x.view(2, 3, 8, 6)), one_by_one.view(2, 3, 8, 8))
    assert bdc_matrix(x[:1]).shape == (1, 8, 8)
    assert to_vector(bdc_matrix(x[:1])).shape == (1, 36)
    assert bdc_matrix(x[:0]).shape == (0, 8, 8)


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_inner_product_of_vectors_is_the_trace_of_the_product_of_matrices(size):
    a, b = bdc_matrix(features(*size)), bdc_matrix(features(*size).flip(0) ** 3)
    u, v = to_vector(a), to_vector(b)
    trace = (a @ b).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close((u * v).sum(-1), trace)
    torch.testing.assert_close((u - v).norm(dim=-1), torch.linalg.matrix_norm(a - b))


def test_the_vector_is_the_upper_triangle_row_by_row():
    symmetric = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    expected = torch.tensor([1, 2 * 2**0.5, 3 * 2**0.5, 4, 5 * 2**0.5, 6])
    torch.testing.assert_close(to_vector(symmetric), expected)


def test_gradients_of_features_and_scale_are_exact_also_twice():
    x, scale = features(2, 5, 4).requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    vector = lambda x, scale: to_vector(bdc_matrix(x, scale))
    assert torch.autograd.gradcheck(vector, (x, scale))
    assert torch.autograd.gradgradcheck(vector, (x[:1], scale))


def test_without_eps_gradients_are_exact_for_channels_that_differ():
    x = features(1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bdc_matrix(x, eps=0), (x,))


@pytest.mark.parametrize("maps", ["zeros", "constant", "twins"])
def test_equal_channels_have_finite_gradients(maps):
    x = {
        "zeros": torch.zeros(2, 6, 9),
        "constant": torch.full((2, 6, 9), 0.7),
        "twins": features(2, 3, 9, dtype=torch.float32).repeat(1, 2, 1),
    }[maps].requires_grad_()
    scale = torch.tensor(0.1, requires_grad=True)
    a = bdc_matrix(x, scale)
    weight = features(2, 6, 6, dtype=torch.float32)
    gradients = torch.autograd.grad((a * weight).sum(), [x, scale])
    assert a.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0].abs().max() < 100


def test_half_precision_features_are_computed_in_float32():
    x = features(2, 64, 16).relu()
    half = x.bfloat16()
    a = bdc_matrix(half, 1 / 32)
    exact = bdc_matrix(half.double(), 1 / 32)
    assert a.dtype == torch.float32
    assert (a - exact).norm() / exact.norm() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bdc_matrix(half, 1 / 32), a)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_a_common_offset_of_the_channels_costs_no_precision(offset):
    """|x_i|^2 + |x_j|^2 - 2 x_i x_j loses all digits of distances that are small beside |x|."""
    x = (features(2, 64, 16, dtype=torch.float32) + offset).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    a, exact = bdc_matrix(x), bdc_matrix(exact_x)
    weight = features(2, 64, 64)
    g = torch.autograd.grad((a * weight.float()).sum(), x)[0]
    exact_g = torch.autograd.grad((exact * weight).sum(), exact_x)[0]
    assert (a - exact).norm() / exact.norm() < 2e-6
    assert (g - exact_g).norm() / exact_g.norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_matrix():
    x = features(2, 64, 16, dtype=torch.float32)
    torch.testing.assert_close(bdc_matrix(x.cuda()).cpu(), bdc_matrix(x), rtol=1e-4, atol=1e-4)


def test_the_layer_starts_at_the_published_temperature_for_maps_of_any_size():
    layer = BDC(8)
    for height, width in ((4, 4), (2, 7), (1, 1)):
        maps = torch.randn(3, 8, height, width)
        matrix = bdc_matrix(maps.flatten(2), 1 / (2 * height * width))
        torch.testing.assert_close(layer(maps), to_vector(matrix))
    assert layer(torch.randn(1, 8, 4, 4)).shape == (1, 36)


def test_the_scale_of_the_layer_is_learned():
    maps = torch.randn(2, 8, 4, 4)
    layer = BDC(8, reduce_to=4)
    layer(maps).sum().backward()
    assert layer.log_scale.grad is not None
    assert layer.reduce[0].weight.grad.abs().sum() > 0
    layer = BDC(8)
    nn.init.constant_(layer.log_scale, np.log(4.0))
    expected = to_vector(bdc_matrix(maps.flatten(2), 4 / 32))
    torch.testing.assert_close(layer(maps), expected)


def test_channels_are_reduced_only_where_asked():
    assert isinstance(reduction(16, None), nn.Identity)
    assert isinstance(reduction(16, 16), nn.Identity)
    maps = torch.randn(8, 16, 3, 3)
    reduced = reduction(16, 4)(maps)
    assert reduced.shape == (8, 4, 3, 3)
    assert (reduced >= 0).all()
    assert not any(name.endswith("0.bias") for name, _ in reduction(16, 4).named_parameters())
    assert BDC(16, reduce_to=4)(maps).shape == Covariance(16, reduce_to=4)(maps).shape == (8, 10)


def test_the_covariance_is_that_of_the_channels_over_positions():
    maps = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    expected = torch.stack([torch.cov(one.flatten(1), correction=0) for one in maps])
    torch.testing.assert_close(Covariance(5)(maps), to_vector(expected))


def test_embeddings_of_half_precision_maps_are_float32():
    maps = torch.randn(2, 5, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (BDC(5), Covariance(5), Mean()):
            exact = layer.double()(maps.double())
            vector = layer.float()(maps)
            assert vector.dtype == torch.float32
            torch.testing.assert_close(vector.double(), exact, rtol=1e-5, atol=1e-5)
