"""Runs are found by their settings and trusted by their checksum."""

import json
import time
from dataclasses import asdict, dataclass, make_dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib import UserError, augment, data
from hallulib.augment import autoencoder
from hallulib.diffusion import train
from hallulib.oneshot import experiment as oneshot
from hallulib.storage import store


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    return tmp_path / "runs"


class Training:
    calls = 0

    def __call__(self, folder, **settings):
        self.calls += 1
        (folder / "checkpoint.safetensors").write_text("state")
        (folder / "unet").mkdir(exist_ok=True)
        (folder / "unet" / "weights").write_text(str(settings))


def test_equal_settings_train_once_and_other_settings_again():
    training = Training()
    first = store.load_or_train("net", training, steps=3, lr=0.1)
    assert store.load_or_train("net", training, lr=0.1, steps=3) == first
    assert training.calls == 1
    assert store.load_or_train("net", training, steps=4, lr=0.1) != first
    assert training.calls == 2


def test_a_finished_run_has_a_card_and_no_checkpoint():
    folder = store.load_or_train("net", Training(), steps=3)
    card = json.loads((folder / "run.json").read_text())
    assert card["settings"] == {"steps": 3}
    assert card["differing"] == ["steps"]
    assert list(card["sha256"]) == ["unet/weights"]
    assert not (folder / "checkpoint.safetensors").exists()


def test_an_interrupted_run_is_resumed_in_its_folder():
    def interrupted(folder, **settings):
        (folder / "checkpoint.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.load_or_train("net", interrupted, steps=3)
    seen = []
    store.load_or_train(
        "net",
        lambda folder, **s: seen.append((folder / "checkpoint.safetensors").read_text()),
        steps=3,
    )
    assert seen == ["half"]


def test_what_a_run_killed_as_it_wrote_left_is_no_part_of_its_result():
    training = Training()

    def left(folder, **settings):
        training(folder, **settings)
        (folder / "run.json.partial").write_text("{")
        (folder / ".partial").mkdir()
        (folder / ".partial" / ".tmp4j7vaG").write_text("half")

    folder = store.load_or_train("net", left, steps=3)
    assert store.load_or_train("net", left, steps=3) == folder
    assert training.calls == 1
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", "unet"]


def test_a_run_killed_between_its_card_and_its_end_leaves_no_checkpoint():
    seen = []

    def train(folder, **settings):
        seen.append((folder / "checkpoint.safetensors").exists())

    for from_scratch in (False, False, True):
        folder = store.load_or_train("net", train, from_scratch=from_scratch, steps=3)
        assert not (folder / "checkpoint.safetensors").exists()
        (folder / "checkpoint.safetensors").write_text("the last step")
    assert seen == [False, False]


def test_two_processes_that_need_one_model_train_it_once():
    training = Training()

    def slow(folder, **settings):
        time.sleep(0.3)
        training(folder, **settings)

    with ThreadPool(2) as pool:  # a lock of the file system holds threads apart as processes
        found = pool.map(lambda _: store.load_or_train("net", slow, steps=3), range(2))
    assert found[0] == found[1]
    assert training.calls == 1


def test_from_scratch_trains_again():
    training = Training()
    store.load_or_train("net", training, steps=3)
    store.load_or_train("net", training, from_scratch=True, steps=3)
    assert training.calls == 2


def test_shipped_weights_are_used_where_their_settings_match(runs):
    training = Training()
    shipped = store.ship(store.load_or_train("net", training, steps=3), "net")
    for file in sorted(runs.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert store.load_or_train("net", training, steps=3) == shipped
    assert store.load_or_train("net", training, steps=2) != shipped
    assert training.calls == 2


# ---- found by what differs from the defaults


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: str = "plain"


@dataclass(frozen=True)
class Outer:
    scheme: str
    steps: int = 3
    counts: tuple = (0, 1)
    inner: Inner = Inner()


INNER = st.builds(Inner, st.sampled_from([0.5, 1.0]), st.sampled_from(["plain", "other"]))
COUNTS = st.lists(st.integers(0, 2), max_size=2).map(tuple)
OUTER = st.builds(Outer, st.sampled_from("ab"), st.integers(1, 4), COUNTS, INNER)


@settings(deadline=None, derandomize=True)
@given(one=OUTER, other=OUTER)
def test_settings_differ_from_the_defaults_alike_if_and_only_if_they_are_equal(one, other):
    told = [store.differing(asdict(s), store.defaults_of(Outer)) for s in (one, other)]
    assert (told[0] == told[1]) == (one == other)
    assert told[0] == json.loads(json.dumps(told[0]))
    standard = store.differing(asdict(Outer("a")), store.defaults_of(Outer))
    assert standard == {"scheme": "a"}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(asked=OUTER, new=st.integers())
def test_a_setting_with_a_default_comes_and_goes_and_orphans_no_run(tmp_path_factory, asked, new):
    """Tomorrow there is one more setting, at its default; and the other way round."""
    folder, today = tmp_path_factory.mktemp("run"), store.defaults_of(Outer)
    tomorrow = store.defaults_of(
        make_dataclass("Outer", [("more", int, new)], bases=(Outer,), frozen=True)
    )
    store.finish(folder, asdict(asked), 1.0, today)
    assert store.is_finished(folder, asdict(asked) | {"more": new}, tomorrow)
    assert not store.is_finished(folder, asdict(asked) | {"more": new + 1}, tomorrow)
    store.finish(folder, asdict(asked) | {"more": new}, 1.0, tomorrow)
    assert store.is_finished(folder, asdict(asked), today)
    store.finish(folder, asdict(asked) | {"more": new + 1}, 1.0, tomorrow)
    assert not store.is_finished(folder, asdict(asked), today)


def test_a_run_trained_with_a_default_is_found_by_who_names_it():
    training = Training()
    plain = store.load_or_train("net", training, defaults=Outer, scheme="a")
    assert store.load_or_train("net", training, defaults=Outer, scheme="a", steps=3) == plain
    assert store.load_or_train("net", training, defaults=Outer, scheme="a", steps=4) != plain
    assert training.calls == 2


def test_a_run_of_another_format_is_found_and_what_is_damaged_there_is_passed(runs, monkeypatch):
    training, asked = Training(), asdict(Outer("a")) | {"data": "toy"}
    (runs / "net-0123456789ab").mkdir(parents=True)
    (runs / "net-0123456789ab" / "run.json").write_text("damaged")
    old = store.load_or_train("net", training, defaults=Outer, **asked)
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert store.load_or_train("net", training, defaults=Outer, **asked) == old
    assert training.calls == 1
    store.load_or_train("net", training, defaults=Outer, **(asked | {"data": "other"}))
    assert training.calls == 2


def test_a_name_cannot_leave_the_folder_of_the_runs(runs):
    folder = store.load_or_train("../../net of/mine", Training(), steps=3)
    assert folder.parent == runs


def test_a_wrong_checksum_is_refused():
    folder = store.load_or_train("net", Training(), steps=3)
    (folder / "unet" / "weights").write_text("tampered")
    with pytest.raises(UserError, match=r"unet/weights is missing or is not the file"):
        store.load_or_train("net", Training(), steps=3)


# ---- what ships


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setattr(store, "SHIPPED", Path(store.__file__).parents[1] / "weights")
    return store.SHIPPED


def test_chapters_find_the_weights_that_ship(runs, shipped, monkeypatch):
    """As chapters 03, 07 and 09 ask for them, chapter 07 with classes held out."""
    images = data.open("lesions", 32)
    told = dict(steps=4000, width=24, scheme="isup")
    monkeypatch.setattr(train, "pretrain", None)  # so that nothing is trained instead
    assert train.pretrained(images, **told)[1] == shipped / "score-lesions"
    unseen = images.hold_out("isup", ["4", "5"])
    found = oneshot.run(unseen, oneshot.Trial("isup", "isup", n_way=2, pretraining=2000))
    assert found.folder == shipped / "one-shot-lesions"
    assert not runs.exists()


def test_the_networks_of_the_drawn_tissue_that_ship_are_found(runs, shipped, monkeypatch):
    """As chapter 12 asks for them."""
    monkeypatch.setattr(autoencoder, "train", None)  # so that nothing is trained instead
    monkeypatch.setattr(train, "pretrain", None)
    trial = augment.Trial("tissue", share=0.1, encoding=2500, factor=2, pretraining=10000)
    found = augment.pretrained(data.open("histology", 32), trial)
    names = "autoencoder", "latent-score"
    assert found.folders == tuple(shipped / f"{name}-histology" for name in names)
    assert not runs.exists()
