"""Checkpoints: what is written is read back bit by bit, or refused in one sentence."""

import csv
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn
from toy_task import same

from hallulib import UserError
from hallulib.storage import checkpoint
from hallulib.storage.checkpoint import CHECKPOINT, LOG

SETTINGS = {"lr": 1e-3, "decays": (0.5, 0.8), "recipe": {"rank": 4}}


def tensors():
    rng = torch.Generator().manual_seed(0)
    return {
        "weights": torch.randn(2, 3, 4, 4, generator=rng).to(memory_format=torch.channels_last),
        "turned": torch.randn(3, 5, generator=rng).T,
        "steps": torch.tensor(7),
        "none": torch.full((2, 2), torch.nan),
        "exact": torch.tensor(0.1, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


def write(folder, step=3, settings=SETTINGS, given=None):
    log = {"loss": [0.1 * i for i in range(step)]}
    checkpoint.write(folder, tensors() if given is None else given, step, settings, log)


class Toy(checkpoint.Stateful):
    """A state of a single tensor."""

    def __init__(self):
        self.weight = torch.zeros(3)


def test_what_is_written_is_read_back_with_its_types_and_bits(tmp_path):
    write(tmp_path / "deep" / "run")
    found, step = checkpoint.read(tmp_path / "deep" / "run", SETTINGS)
    assert step == 3
    assert same(found, {k: v.contiguous() for k, v in tensors().items()})


def everything(seed):
    """Parts of every kind, one within the other."""
    rng = torch.Generator().manual_seed(seed)
    with_rng = {"rng": rng, "weights": torch.randn(3, generator=rng)}
    torch.manual_seed(seed)
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1 * (1 + seed))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "a": layer,
        "b.c": optimizer,
        "inner": with_rng | {"x": {"y": torch.ones(seed + 1)[:1]}},
    }


def test_parts_of_every_kind_come_back_from_named_tensors(tmp_path):
    kept = {k: v.clone() for k, v in checkpoint.pack(everything(1)).items()}
    write(tmp_path, given=kept)
    other = everything(2)
    assert not same(checkpoint.pack(other), kept)
    checkpoint.restore(other, checkpoint.read(tmp_path, SETTINGS)[0])
    assert same(checkpoint.pack(other), kept)
    assert other["b.c"].param_groups[0]["lr"] == 0.2
    assert torch.equal(
        torch.rand(2, generator=other["inner"]["rng"]),
        torch.rand(2, generator=everything(1)["inner"]["rng"]),
    )


@given(
    st.lists(st.lists(st.sampled_from("ab."), min_size=1, max_size=3).map("".join), unique=True)
)
def test_the_tensors_within_a_name_are_those_packed_there(names):
    """Also where one name begins with another."""
    parts = {name: {"x": torch.tensor(i), "y.z": torch.tensor(-i)} for i, name in enumerate(names)}
    packed = checkpoint.pack(parts)
    for name, part in parts.items():
        if not any(other.startswith(name + ".") for other in names):
            assert same(checkpoint.within(name, packed), part)


def test_the_log_has_one_line_per_step_and_no_rounding(tmp_path):
    write(tmp_path)
    with (tmp_path / LOG).open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "loss"]
    assert [(int(i), float(v)) for i, v in rows] == [(1, 0.0), (2, 0.1), (3, 0.2)]


def test_no_other_file_is_left_behind(tmp_path):
    write(tmp_path)
    write(tmp_path, step=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, LOG]
    assert checkpoint.read(tmp_path, SETTINGS)[1] == 5


@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_write_that_dies_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, dies_at):
    """Whichever rename was the last, the log never lacks steps that the checkpoint has."""
    write(tmp_path, step=3)
    replace, calls = os.replace, []

    def dying(*paths):
        calls.append(paths)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, step=6)
    monkeypatch.undo()
    found, step = checkpoint.read(tmp_path, SETTINGS)
    assert step == 3
    assert set(found) == set(tensors())
    assert len((tmp_path / LOG).read_text().splitlines()) - 1 >= step


def test_a_write_that_fails_leaves_nothing_of_its_own(tmp_path, monkeypatch):
    """Nor what safetensors writes beside its file."""
    write(tmp_path, step=3)

    def full(tensors, file, metadata):
        file.with_name(".tmp4j7vaG").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r": cannot write \(.*No space left .*\); a writable"):
        write(tmp_path, step=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, LOG]
    assert checkpoint.read(tmp_path, SETTINGS)[1] == 3


def test_nothing_is_found_where_nothing_was_written(tmp_path):
    assert checkpoint.read(tmp_path, SETTINGS) is None
    state = Toy()
    checkpoint.resume(state, tmp_path, SETTINGS)
    assert state.step == 0


def test_a_state_takes_on_its_checkpoint(tmp_path):
    write(tmp_path, given={"weight": torch.arange(3.0)})
    state = Toy()
    checkpoint.resume(state, tmp_path, SETTINGS)
    assert (state.step, state.weight.tolist()) == (3, [0.0, 1.0, 2.0])


def test_other_settings_are_refused_by_the_name_of_the_first(tmp_path):
    write(tmp_path)
    checkpoint.read(tmp_path, SETTINGS)  # a tuple is a list to JSON
    with pytest.raises(UserError, match=r"trained with lr = 0.001, not 0.01; give another folder"):
        checkpoint.read(tmp_path, SETTINGS | {"lr": 1e-2})
    with pytest.raises(UserError, match="with recipe = {'rank': 4}, not {'rank': 8}"):
        checkpoint.read(tmp_path, SETTINGS | {"recipe": {"rank": 8}})


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_damaged_file_is_refused(tmp_path, kept):
    write(tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is not a checkpoint of this model .*; delete it"):
        checkpoint.read(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "given", [{"other": torch.zeros(3)}, {"weight": torch.zeros(4)}], ids=["name", "shape"]
)
def test_tensors_of_another_model_are_refused(tmp_path, given):
    write(tmp_path, given=given)
    with pytest.raises(UserError, match="is not a checkpoint of this model"):
        checkpoint.resume(Toy(), tmp_path, SETTINGS)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / CHECKPOINT)
    with pytest.raises(UserError, match="is not a checkpoint of this model"):
        checkpoint.read(tmp_path, SETTINGS)


def test_an_optimiser_goes_on_where_it_was(tmp_path):
    """Channels last, so that the layout has to come back as well."""

    def network():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.PReLU(num_parameters=1), nn.Flatten(), nn.Linear(144, 1)
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = network()
    steps(model, optimizer, range(3))
    write(tmp_path, given={k: v.clone() for k, v in checkpoint.pack({"m": optimizer}).items()})
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    steps(model, optimizer, range(3, 6))

    again, other = network()
    again.load_state_dict(weights)
    found = checkpoint.read(tmp_path, SETTINGS)[0]
    checkpoint.restore({"m": other}, found)
    assert same({k: v.contiguous() for k, v in checkpoint.pack({"m": other}).items()}, found)
    for p, entries in other.state.items():
        assert entries["exp_avg"].stride() == p.stride()
    steps(again, other, range(3, 6))
    assert same(again.state_dict(), model.state_dict())


def test_an_optimiser_that_has_not_stepped_has_only_a_rate_to_remember():
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=0.5)
    kept = checkpoint.pack({"m": optimizer})
    assert set(kept) == {"m.lr"}
    other = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=0.1)
    checkpoint.restore({"m": other}, kept)
    assert (other.param_groups[0]["lr"], len(other.state)) == (0.5, 0)


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_a_loop_that_is_left_goes_on_where_its_last_checkpoint_was(tmp_path, stop):
    taken = []

    def start():
        step = lambda state: (taken.append(state.step), state.weight.add_(state.step + 1))
        return checkpoint.loop(Toy(), step, steps=10, every=4, folder=tmp_path, settings=SETTINGS)

    for _, state in zip(range(stop), start(), strict=False):
        assert state.step == len(taken)
    *_, state = start()
    assert taken == [*range(stop), *range(stop // 4 * 4, 10)]
    assert (state.step, state.weight.tolist()) == (10, [55.0] * 3)
    assert [s.step for s in start()] == [10]  # finished: yielded once, nothing done
    assert taken[-1] == 9


def test_what_a_loop_sees_before_a_checkpoint_may_stop_it_and_then_none_is_written(tmp_path):
    def look(state):
        if state.step > 4:
            raise UserError("lost")

    step = lambda state: state.weight.add_(1)
    loop = checkpoint.loop(
        Toy(), step, steps=10, every=2, look=look, folder=tmp_path, settings=SETTINGS
    )
    with pytest.raises(UserError, match="lost"):
        list(loop)
    assert checkpoint.read(tmp_path, SETTINGS)[1] == 4


def test_a_checkpoint_is_due_regularly_at_the_end_and_after_a_minute_of_work(monkeypatch):
    now, found = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def step(state):  # the first ones on a machine that is busy
        now[0] += 25.0 if state.step < 6 else 1.0

    look = lambda state: found.append(state.step)
    list(checkpoint.loop(Toy(), step, steps=23, every=10, look=look, folder=None, settings={}))
    assert found == [3, 6, 10, 20, 23]
