"""Files that users write: a value is what it looks like, or is refused in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from hallulib import UserError
from hallulib.notebook import parameters

MEANINGS = {
    "0": 0,
    "-7": -7,
    "+7": 7,
    "100_000": 100_000,
    "1e-3": 0.001,
    "1E5": 1e5,
    "1.": 1.0,
    ".5": 0.5,
    "-1_000.25": -1000.25,
    "0.5": 0.5,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
}
NAMES = """010 00 -010 00.5 01e2 0x1F 0o17 0b11 1:04 1:04:30 190:20:30.15 yes No on OFF y n
    2020-02-02 2020-02-02T10:00:00 1__0 _1 1_ 1e 1e5.0 .inf .nan nan = << P0001 gs>isup""".split()
NOTHING = ["*a", "!!python/name:os.getcwd", "[" * 9999, "a: 1\n--- \nb: 2", "{[1]: 2}"]


@pytest.mark.parametrize("text", MEANINGS)
def test_a_value_is_what_it_looks_like(text):
    value = parameters.parse_yaml(f"{{NAME: {text}}}", "here")["NAME"]
    assert (value, type(value)) == (MEANINGS[text], type(MEANINGS[text]))


@pytest.mark.parametrize("text", NAMES)
def test_what_could_mean_several_things_is_text(text):
    assert parameters.parse_yaml(f"[{text!r}]", "here") == [text]
    assert parameters.parse_yaml(f"NAME: {text}", "here") == {"NAME": text}


@given(st.text("0123456789._:eE+-xobinfa", min_size=1))
def test_a_number_is_the_one_that_python_reads_and_all_else_is_the_text(text):
    try:
        value = parameters.parse_yaml(text, "here")
    except UserError:
        return  # punctuation of YAML
    if isinstance(value, int | float):
        assert value == type(value)(text)
    elif isinstance(value, str):
        assert value == text


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_what_python_writes_is_read_as_the_same_value(value):
    found = parameters.parse_yaml(repr(value), "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", NOTHING)
def test_what_stands_for_something_else_is_refused_in_one_sentence(text):
    with pytest.raises(UserError, match="cannot read the parameters in here: .+") as told:
        parameters.parse_yaml(text, "here")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("STEPS: 1\nRATE: 2\nSTEPS: 3", "STEPS", 3),
        ("STEPS: 1\n'STEPS': 1", "STEPS", 2),
        ("{A: 1,\n A: 2}", "A", 2),
        ("02_two: {A: 1}\n02_two: {B: 1}", "02_two", 2),
        ("cells:\n- {A: 1}\n- {B: 1, B: 2}", "B", 3),
        ("grid:\n  A: [1]\n  A: [2]", "A", 3),
        ("1: a\n1.0: b", "1.0", 2),
        ("? ~\n: 1\nnull: 2", "None", 3),
    ],
)
def test_a_name_that_is_set_twice_is_refused_with_its_line(text, name, line):
    with pytest.raises(UserError, match=f"{name} is set again in line {line}; one value is need"):
        parameters.parse_yaml(text, "here")


@pytest.mark.parametrize("file", sorted((ROOT / "book").glob("*/*.yaml")), ids=lambda f: f.name)
def test_the_files_of_the_book_are_read(file):
    assert parameters.read_yaml(file)
