"""The loss is the pairwise one at its saddle, and LibAUC's optimiser, repaired, finds it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from hallulib.evidence.metrics import auroc
from hallulib.oneshot import joint
from hallulib.oneshot.joint import AUCMarginLoss, PESGState, pesg


@pytest.fixture
def batch():
    """Scores and labels of four classes, one of them rare."""
    rng = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 9 + [1] * 6 + [2] * 4 + [3] * 1)
    return torch.randn(20, 4, generator=rng, dtype=torch.float64), y


def pairwise(scores, y, margin):
    """The definition: every positive against every negative, class by class."""
    classes = [c for c in range(scores.shape[1]) if (y == c).any()]
    gaps = [scores[y == c, c][:, None] - scores[y != c, c] for c in classes]
    return torch.stack([((margin - gap) ** 2).mean() for gap in gaps]).mean()


def at_optimum(scores, y, margin=1.0):
    """The loss where a, b and alpha are best for these scores."""
    loss = AUCMarginLoss(scores.shape[1], margin)
    loss.settle(scores, y)
    return loss(scores, y).detach()


def random_saddle(loss):
    for own in (loss.a, loss.b, loss.alpha):
        own.data = torch.rand(own.shape, generator=torch.Generator().manual_seed(1))
    return loss


def toy(n, seed):
    """Four overlapping Gaussian classes in eight dimensions, 45/30/15/10 percent."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor([0.45, 0.3, 0.15, 0.1]), n, True, generator=rng)
    means = 0.7 * torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    return means[y] + torch.randn(n, 8, generator=rng), y


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)


def perceptron():
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4)
    return torch.nn.Sequential(*layers)


def trained(model, *, steps, settled=False, **options):
    """Macro AUROC on new data before and after training, and the loss object."""
    (x, y), (x_new, y_new) = toy(400, 0), toy(2000, 1)
    loss = AUCMarginLoss(4)
    if settled:
        loss.settle(model(x), y)
    optimizer = pesg(model, loss, **options)
    before = auroc(y_new, model(x_new))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return before, auroc(y_new, model(x_new)), loss


def test_at_its_saddle_the_loss_is_the_mean_over_all_pairs(batch):
    scores, y = batch
    loss = AUCMarginLoss(4, margin=4.0)  # wide enough that nothing is clipped
    loss.settle(scores, y)
    assert loss(scores, y).item() == pytest.approx(pairwise(scores, y, 4.0).item(), rel=1e-6)


def test_at_its_saddle_the_loss_is_flat_in_a_and_b_and_alpha(batch):
    loss = AUCMarginLoss(4, margin=4.0)
    loss.settle(*batch)
    loss(*batch).backward()
    for own in (loss.a, loss.b, loss.alpha):
        assert own.grad.abs().max() < 1e-6


def test_the_saddle_is_a_minimum_in_a_and_b_and_a_maximum_in_alpha(batch):
    loss = AUCMarginLoss(4, margin=4.0)
    loss.settle(*batch)
    best = loss(*batch).item()
    for own, sign in ((loss.a, 1), (loss.b, 1), (loss.alpha, -1)):
        for step in (-0.1, 0.1):
            own.data += step
            assert sign * (loss(*batch).item() - best) == pytest.approx(0.01, rel=1e-4)
            own.data -= step


def test_the_settled_loss_has_the_gradient_of_the_pairs(batch):
    scores, y = batch[0].requires_grad_(), batch[1]
    loss = AUCMarginLoss(4, margin=4.0)
    loss.settle(scores, y)
    values = pairwise(scores, y, 4.0), loss(scores, y)
    pairs, settled = (torch.autograd.grad(value, scores)[0] for value in values)
    assert torch.allclose(pairs, settled, atol=1e-6)


def test_scores_further_apart_than_the_margin_cost_only_their_spread():
    y = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([[5.0, -5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, 5.0]])
    assert at_optimum(scores, y) == 0
    scores[0, 0] = 7.0  # variance of 5 and 7, in one class of two
    assert at_optimum(scores, y) == 0.5


def test_the_margin_acts(batch):
    values = [random_saddle(AUCMarginLoss(4, m))(*batch).item() for m in (0.5, 1, 2)]
    assert len(set(values)) == 3
    assert len({at_optimum(*batch, m).item() for m in (0.5, 1, 2)}) == 3


@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
def test_values_and_gradients_equal_libauc_s_multi_label_loss_on_one_hot_labels(batch, margin):
    from libauc.losses import MultiLabelAUCMLoss

    ours = random_saddle(AUCMarginLoss(4, margin))
    theirs = MultiLabelAUCMLoss(margin, version="v2", num_labels=4, device=torch.device("cpu"))
    random_saddle(theirs)
    for own in (theirs.a, theirs.b, theirs.alpha):
        own.requires_grad_()
    scores, y = batch[0].requires_grad_(), batch[1]
    values = ours(scores, y), theirs(scores, torch.nn.functional.one_hot(y))
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    ours_grad, theirs_grad = (
        torch.autograd.grad(value, (scores, loss.a, loss.b, loss.alpha))
        for value, loss in zip(values, (ours, theirs), strict=True)
    )
    for one, other in zip(ours_grad, theirs_grad, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_every_image_of_every_class_gets_a_gradient_in_every_column(batch):
    scores, y = batch[0].requires_grad_(), batch[1]
    random_saddle(AUCMarginLoss(4))(scores, y).backward()
    assert (scores.grad != 0).all()


def test_a_class_weighs_the_same_however_often_its_images_are_repeated(batch):
    scores, y = batch[0][:, :2], (batch[1] == 3).long()
    rows = torch.tensor([*range(20), *[19] * 50])  # the only image of class 1, 51 times
    loss = random_saddle(AUCMarginLoss(2))
    assert loss(scores[rows], y[rows]).item() == pytest.approx(loss(scores, y).item())
    assert at_optimum(scores[rows], y[rows]).item() == pytest.approx(at_optimum(scores, y).item())


def test_an_absent_class_contributes_nothing(batch):
    scores, y = batch[0].requires_grad_(), batch[1].clone()
    y[y == 2] = 0
    loss = random_saddle(AUCMarginLoss(4))
    value = loss(scores, y)
    value.backward()
    assert torch.isfinite(value)
    for grad in (scores.grad, loss.a.grad, loss.b.grad, loss.alpha.grad):
        assert torch.isfinite(grad).all()
        assert (grad[..., 2] == 0).all()
    moved = scores.detach().clone()
    moved[:, 2] += 100
    assert loss(moved, y).item() == value.item()
    assert at_optimum(scores, y, 4.0).item() == pytest.approx(pairwise(scores, y, 4.0).item())


def test_half_precision_scores_are_averaged_in_single_precision(batch):
    scores, y = batch[0].bfloat16(), batch[1]
    value = at_optimum(scores, y)
    assert value.dtype == torch.float32
    assert value == at_optimum(scores.float(), y)


def test_at_fixed_scores_a_and_b_and_alpha_reach_their_closed_forms(batch, monkeypatch):
    monkeypatch.setattr(joint, "PULL", 1e-9)
    scores, y = batch[0].float(), batch[1]
    loss = AUCMarginLoss(4, margin=2.0)
    optimizer = pesg(linear(), loss, lr=0.05, weight_decay=0)
    for _ in range(600):
        optimizer.zero_grad()
        loss(scores, y).backward()
        optimizer.step()
    best = AUCMarginLoss(4, margin=2.0)
    best.settle(scores, y)
    for name in ("a", "b", "alpha"):
        assert torch.allclose(getattr(loss, name), getattr(best, name), atol=2e-3)


def test_alpha_ascends_from_zero_and_never_falls_below_it(batch):
    scores, y = batch[0].float(), batch[1]
    loss = AUCMarginLoss(4)
    optimizer = pesg(linear(), loss, lr=0.1)
    rising = []
    for apart in (0.0, 50.0):  # first mixed, then with positives far above negatives
        raised = scores + apart * torch.nn.functional.one_hot(y)
        for _ in range(100):
            loss(raised, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            rising.append(loss.alpha.detach().clone())
    alphas = torch.stack(rising)
    assert (alphas[:5].diff(dim=0) > 0).all()
    assert (alphas >= 0).all()
    assert (alphas[-1] == 0).all()


def test_a_step_is_the_documented_one_with_the_reference_at_the_start(monkeypatch):
    """Adam with both decays in the gradient on the weights, a and b; alpha ascends by itself."""
    monkeypatch.setattr(joint, "PULL", 0.5)
    model, loss, (x, y) = linear(), AUCMarginLoss(4), toy(50, 2)
    optimizer = pesg(model, loss, lr=0.01, weight_decay=0.01)
    variables = [*model.parameters(), loss.a, loss.b]
    start = [v.detach().clone() for v in variables]
    mine, alpha = [v.clone().requires_grad_() for v in start], torch.zeros(4)
    adam = torch.optim.Adam(mine, lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        for v, w, w_0 in zip(variables, mine, start, strict=True):
            w.grad = v.grad.clamp(-1, 1) + 0.5 * (w.detach() - w_0) + 0.01 * w.detach()
        optimizer.step()
        adam.step()
        alpha = (alpha + 0.02 * (1 + mine[3].detach() - mine[2].detach() - alpha)).clamp(min=0)
        for v, w in zip([*variables, loss.alpha], [*mine, alpha], strict=True):
            assert torch.allclose(v, w, atol=1e-6)


def test_without_a_gradient_a_pretrained_network_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(joint, "PULL", 0.5)
    model, loss, (x, y) = linear(), AUCMarginLoss(4), toy(50, 2)
    before = model.weight.detach().clone()
    optimizer = pesg(model, loss, lr=0.1, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        loss(0 * model(x) + torch.randn(50, 4), y).backward()
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_making_the_optimiser_leaves_the_global_generator_alone():
    model, state = linear(), torch.get_rng_state()
    pesg(model, AUCMarginLoss(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_stage_divides_the_rate_and_moves_the_reference_to_the_mean(capsys):
    model, loss, (x, y) = linear(), AUCMarginLoss(4), toy(50, 2)
    optimizer, path = pesg(model, loss, lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        path.append(model.weight.detach().clone())
    optimizer.update_regularizer(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert torch.allclose(optimizer.model_ref[0], torch.stack(path).mean(0))
    assert capsys.readouterr().out == ""


def test_training_raises_the_auroc_well_above_the_untrained():
    before, after, loss = trained(linear(), steps=150, lr=1e-2)
    assert before < 0.6
    assert after > 0.9
    assert (loss.alpha > 0).all()


def test_a_settled_start_ranks_long_before_a_start_from_zero():
    _, from_zero, _ = trained(perceptron(), steps=100)
    _, settled, _ = trained(perceptron(), steps=100, settled=True)
    assert settled > from_zero + 0.1


def test_a_run_that_is_resumed_ends_in_the_same_bytes():
    x, y = toy(50, 2)

    def new():
        model, loss = perceptron(), AUCMarginLoss(4)
        return model, loss, pesg(model, loss, lr=0.01)

    def run(model, loss, optimizer, stages):
        for steps in stages:
            for _ in range(steps):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
            optimizer.update_regularizer(2)

    first = new()
    run(*first, [3, 4])
    weights = {k: v.clone() for k, v in first[0].state_dict().items()}
    written = save(PESGState(first[2]).state_dict())
    run(*first, [2, 3])
    resumed = new()
    resumed[0].load_state_dict(weights)
    PESGState(resumed[2]).load_state_dict(load(written))
    run(*resumed, [2, 3])
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name])
    ends = PESGState(first[2]).state_dict(), PESGState(resumed[2]).state_dict()
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert resumed[1].alpha is resumed[2].alpha
    assert np.isfinite(resumed[1].alpha.detach().numpy()).all()


def test_the_state_of_another_model_is_not_taken_on():
    tensors = PESGState(pesg(linear(), AUCMarginLoss(4))).state_dict()
    with pytest.raises((KeyError, RuntimeError)):
        PESGState(pesg(perceptron(), AUCMarginLoss(4))).load_state_dict(tensors)
