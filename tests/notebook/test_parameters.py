import math
import re
import subprocess
import sys
from pathlib import Path

import build
import nbformat
import papermill
import pytest

from conftest import ROOT, size_for_tests
from hallulib import UserError
from hallulib import __main__ as cli
from hallulib.notebook import parameters
from hallulib.notebook.parameters import check

BOOK = ROOT / "book"


def refused(value, rule):
    with pytest.raises(UserError, match=r"parameter NAME = .* must be .*") as error:
        check({"NAME": value}, NAME=rule)
    assert repr(value) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (1, (1, 9)),
        (9, (1, 9)),
        (10**9, (1, None)),
        (1, (0.0, 1.0)),
        (0.5, (0.0, 1.0)),
        (1e-4, (0.0, None)),
        ("phantom", str),
        (False, bool),
    ],
)
def test_a_value_within_its_rule_passes(value, rule):
    check({"NAME": value}, NAME=rule)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0, (1, 9)),
        (10, (1, 9)),
        (2000.0, (1, 9000)),  # a float where whole numbers count
        (True, (0, 1)),  # True is an int in Python
        ("2000", (1, 9000)),  # YAML and -r give text
        (None, (1, 9)),
        (float("nan"), (0.0, 1.0)),
        (float("inf"), (0.0, None)),
        (10**400, (0.0, 1.0)),  # beyond all floats
        ("0.5", (0.0, 1.0)),
        (2024, str),
        ("  ", str),
        (1, bool),
        ("no", bool),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(value, rule):
    assert "\n" not in refused(value, rule)


def test_the_sentence_tells_the_allowed_values():
    assert refused(0, (1, 9)).endswith("a whole number from 1 to 9")
    assert refused(-1.0, (0.0, None)).endswith("a finite number of at least 0.0")


def test_a_misspelt_name_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r"unknown parameter STPES; did you mean STEPS\? known: "):
        check({"STEPS": 1, "STPES": 2}, STEPS=(1, 9))
    with pytest.raises(UserError, match="unknown parameter QQQ; known: STEPS"):
        check({"STEPS": 1, "QQQ": 2}, STEPS=(1, 9))


def test_a_name_injected_in_small_letters_is_unknown_too():
    cells = ["STEPS = 1", "# Parameters\nsteps = 2\n"]
    with pytest.raises(UserError, match=r"unknown parameter steps; did you mean STEPS\?"):
        check({"STEPS": 1, "steps": 2, "In": cells}, STEPS=(1, 9))


def test_imported_classes_and_small_names_are_no_parameters():
    check({"STEPS": 1, "VPSDE": Path, "In": ["x = 1"], "x": 1, "_A": 2}, STEPS=(1, 9))


@pytest.mark.parametrize("rule", [3, "isup", int, (1, 2, 3)])
def test_an_author_who_writes_no_rule_is_told(rule):
    with pytest.raises((TypeError, ValueError)):
        check({"NAME": 1}, NAME=rule)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    chapter = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
        cells=[
            nbformat.v4.new_code_cell("STEPS = 5  # steps", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "from hallulib.notebook import parameters\n"
                "parameters.check(globals(), STEPS=(1, 10_000))"
            ),
            nbformat.v4.new_code_cell("print('ran', STEPS)"),
        ],
    )
    path = tmp_path_factory.mktemp("notebook") / "chapter.ipynb"
    nbformat.write(chapter, path)
    return path


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"STPES": 7}, "unknown parameter STPES; did you mean STEPS? known: STEPS"),
        ({"steps": 7}, "unknown parameter steps; did you mean STEPS? known: STEPS"),
        ({"STEPS": 0}, "parameter STEPS = 0 must be a whole number from 1 to 10000"),
    ],
)
def test_papermill_stops_with_the_sentence_alone(notebook, tmp_path, given, sentence):
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(notebook, tmp_path / "out.ipynb", given, progress_bar=False)
    assert (error.value.ename, error.value.evalue) == ("UserError", sentence)
    assert error.value.traceback == [f"UserError: {sentence}"]


def test_the_papermill_command_runs_a_chapter_with_another_value(notebook, tmp_path):
    command = [Path(sys.executable).parent / "papermill", notebook, tmp_path / "out.ipynb"]
    done = subprocess.run([*command, "-p", "STEPS", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search("ran 2000", (tmp_path / "out.ipynb").read_text())


@pytest.mark.parametrize("place", ["book", "book/grids"])
def test_paths_start_at_the_root_of_the_project_where_jupyterlab_starts_a_kernel(
    monkeypatch, place
):
    monkeypatch.chdir(parameters.ROOT / place)
    check({"STEPS": 1}, STEPS=(1, 2))
    assert Path.cwd() == parameters.ROOT


def test_a_kernel_elsewhere_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check({"STEPS": 1}, STEPS=(1, 2))
    assert Path.cwd() == tmp_path


ODD = ["2", None, True, 2.5, math.nan, math.inf, -1, 2**32, 10**30, [], "", " "]
EACH = [
    (notebook, name)
    for notebook in [*parameters.chapters(BOOK), *sorted((BOOK / "grids").glob("*.ipynb"))]
    for name in parameters.own_values(notebook)
]
each_parameter = pytest.mark.parametrize(
    ("notebook", "name"), EACH, ids=[f"{notebook.stem}-{name}" for notebook, name in EACH]
)


def suits(value, name, own):
    """Whether a value is of the kind of the chapter's own, and no seed that a library refuses."""
    if name == "SEED":
        return type(value) is int and 0 <= value < 2**32
    if isinstance(own, str):
        return isinstance(value, str) and value.strip() != ""
    if isinstance(own, float):
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is type(own) and (isinstance(own, bool) or value >= 0)


def told(rules, name, value):
    """The sentence that refuses a value before a chapter runs, or nothing."""
    try:
        parameters.check_before("here", rules, {name: value})
    except UserError as error:
        return str(error)


@each_parameter
def test_a_value_of_another_kind_is_refused_by_name_before_a_chapter_runs(notebook, name):
    rules, own = parameters.declared(notebook), parameters.own_values(notebook)[name]
    for value in ODD:
        sentence = told(rules, name, value)
        assert sentence or suits(value, name, own), value
        assert not sentence or sentence.startswith(f"here: parameter {name} = {value!r} must be ")
        assert "\n" not in (sentence or "")


@each_parameter
def test_the_values_of_its_kind_that_people_give_are_taken(notebook, name):
    rules, own = parameters.declared(notebook), parameters.own_values(notebook)[name]
    seeds = [0, 1, 2**31, 2**32 - 1] if name == "SEED" else []
    likely = [*seeds, own, size_for_tests(notebook).get(name, own)]
    for value in likely + [not own] * isinstance(own, bool) + ["x"] * isinstance(own, str):
        parameters.check_before("here", rules, {name: value})


@pytest.mark.parametrize("value", [-1, 2**32, "yes", "1:04", "1e-3", "010", "2.5", "~", "true"])
def test_no_book_is_begun_with_a_seed_that_is_none(value, tmp_path, capsys):
    assert build.main(["-p", "SEED", str(value), "--target", str(tmp_path / "out")]) == 2
    sentence = r"00_start: parameter SEED = .* must be a whole number from 0 to 4294967295\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", -1), ("seed", 2**32), ("steps", 0), ("batch-size", 0), ("width", 0), ("width", -8)],
)
def test_a_training_of_the_command_line_is_refused_likewise(option, value, capsys):
    assert cli.main(["train", "phantom", f"--{option}", str(value)]) == 2
    sentence = f"{option.replace('-', '_')} is {value}; .* is needed.*\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)
