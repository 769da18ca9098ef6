import ast
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import build
import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image
from tiny_chapter import CHECK, write_chapter

from conftest import CHAPTERS, ROOT, size_for_tests
from hallulib import UserError
from hallulib.notebook import parameters
from hallulib.notebook.ledger import FIELD
from hallulib.storage import store

BOOK = ROOT / "book"
each_chapter = pytest.mark.parametrize("name", CHAPTERS)
HIDDEN = {"hide-input", "remove-input", "hide-cell", "remove-cell"}
# what only the publisher of the book renders: {cite:p}`key`, ```{math}
ROLE = re.compile(r"\{[a-z][\w:.-]*\}`|^\s*(?:`{3,}|:{3,})\s*\{", re.MULTILINE)

FOLDED = re.compile(r"\n\n<details>\n<summary>Answer</summary>\n\n(?s:.+)\n\n</details>$")


def cells(name, kind):
    return [c for c in nbformat.read(BOOK / f"{name}.ipynb", 4).cells if c.cell_type == kind]


def tagged(name, tag):
    return [c for c in cells(name, "code") if tag in c.metadata.get("tags", [])]


# --- the chapters -----------------------------------------------------------------------------


@pytest.mark.chapter
@each_chapter
def test_a_chapter_runs_at_its_test_size(name, executed):
    notebook = nbformat.read(executed(name), 4)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source)
    assert "widgets" not in notebook.metadata


@pytest.mark.chapter
@each_chapter
def test_numbers_of_test_size_stay_out_of_the_runs_of_the_user(name, executed):
    executed(name)
    assert any((store.runs_folder() / "results" / name).glob("*.json"))
    assert not store.runs_folder().is_relative_to(ROOT)


@each_chapter
def test_a_chapter_has_at_most_eight_parameters_each_with_its_meaning(name):
    (cell,) = tagged(name, "parameters")
    names = [ast.unparse(a.targets[0]) for a in ast.parse(cell.source).body]
    assert 1 <= len(names) <= 8
    assert all(re.fullmatch("[A-Z][A-Z0-9_]*", n) for n in names)
    assert all(re.search(r"  # \w.+$", line) for line in cell.source.splitlines())
    assert set(size_for_tests(BOOK / f"{name}.ipynb")) & set(names)


@each_chapter
def test_a_chapter_checks_exactly_its_parameters(name):
    calls = [c.source for c in cells(name, "code") if "parameters.check(" in c.source]
    assert len(calls) == 1
    words = {
        word.arg
        for call in ast.walk(ast.parse(calls[0]))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parameters.check"
        for word in call.keywords
    }
    assert words == set(parameters.own_values(BOOK / f"{name}.ipynb"))


def exercises(name):
    texts = [c.source for c in cells(name, "markdown")]
    return [text for text in texts if re.match(r"\*\*(Predict|Change|Build)\.\*\*", text)]


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name != "00_start"])
def test_a_chapter_follows_the_pattern_of_the_book(name):
    texts = [c.source for c in cells(name, "markdown")]
    code = "\n".join(c.source for c in cells(name, "code"))
    assert re.match("# .+", texts[0])
    assert all(f"**{word}" in texts[1] for word in ("You will", "Before", "Cost"))
    assert "figures.style()" in code
    assert "explore(" in code
    assert len(exercises(name)) >= 3
    assert any(text.startswith("## What to remember") for text in texts)


def said(name):
    """The texts that the cells of a chapter say."""
    for cell in cells(name, "code"):
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "ledger.say":
                yield from (n.value for n in ast.walk(call) if isinstance(n, ast.Constant))


@each_chapter
def test_a_chapter_needs_no_publisher_to_be_read(name):
    texts = [c.source for c in cells(name, "markdown")]
    for text in [*texts, *(text for text in said(name) if isinstance(text, str))]:
        assert not ROLE.search(text), ROLE.search(text)
    assert "myst_nb" not in "\n".join(c.source for c in cells(name, "code"))


@each_chapter
def test_a_chapter_hides_in_a_notebook_what_its_page_hides(name):
    for cell in cells(name, "code"):
        hidden = bool(HIDDEN & set(cell.metadata.get("tags", [])))
        assert hidden == cell.metadata.get("jupyter", {}).get("source_hidden", False), cell.id
    for text in exercises(name):  # empty lines: without them no Markdown is rendered between
        assert FOLDED.search(text), text


@pytest.mark.chapter
@each_chapter
def test_every_number_of_a_chapter_is_said(name, executed):
    shown = [
        output.data["text/markdown"]
        for cell in nbformat.read(executed(name), 4).cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert shown
    # a listing of the library has the braces of its own code
    told = "\n".join(text for text in shown if "```python" not in text)
    assert not FIELD.search(told), FIELD.search(told)
    assert not ROLE.search(told), ROLE.search(told)


@pytest.mark.parametrize("name", ["03_pretraining", "04_sampling"])
def test_a_chapter_asks_for_weights_that_ship(name):
    asked = parameters.own_values(BOOK / f"{name}.ipynb")
    folder = ROOT / "hallulib" / "weights" / f"score-{asked['DATASET']}"
    trained = json.loads((folder / store.CARD).read_text())["settings"]
    assert {key: asked[key.upper()] for key in ("size", "steps", "width", "seed")} == {
        key: trained.get(key, 0) for key in ("size", "steps", "width", "seed")
    }


@each_chapter
def test_papermill_needs_no_option_to_run_a_chapter(name):
    kernel = nbformat.read(BOOK / f"{name}.ipynb", 4).metadata.kernelspec
    assert (kernel.name, kernel.language) == ("python3", "python")


@pytest.mark.parametrize("file", sorted((BOOK / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_named_parameter_sets_fit_the_chapters(file):
    if not CHAPTERS:
        pytest.skip("book/ has no chapter yet")
    assert any(build.choose(file, [], BOOK).values())


def chapter_on_own_images(tmp_path, monkeypatch, **parameters):
    """Runs chapter 13 in this process; what it knows, and the sentence that it stopped with."""
    monkeypatch.setenv("HALLULIB_RUNS", str(tmp_path / "runs"))
    first, *others = [cell.source for cell in cells("13_your_data", "code")]
    exec(first, space := {})
    space |= size_for_tests(BOOK / "13_your_data.ipynb") | {"FOLDER": str(tmp_path / "own")}
    with pytest.raises(UserError) as stop:
        exec("\n".join(others), space | parameters)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def pictures_of(tmp_path, patients, images, colour=False):
    """Two classes; every patient has as many pictures."""
    for name, patient, n in itertools.product(("sick", "well"), range(patients), range(images)):
        file = tmp_path / "own" / name / f"{name}{patient}_{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (32, 32, 3) if colour else (32, 32)
        Image.fromarray(np.full(shape, 9 * patient + n, np.uint8)).save(file)


@pytest.mark.parametrize(
    ("patients", "images", "advice"),
    [
        (4, 1, "one query for each class is too many too: more patients of that class, or a"),
        (20, 1, "n_query=1 n_spare=0 is the most that all splits can serve, and the parameter VA"),
        (20, 3, "n_query=3 n_spare=0 is the most that all splits can serve, and the parameter VA"),
    ],
)
def test_too_few_patients_stop_the_chapter_on_own_images_with_what_can_be_asked(
    tmp_path, monkeypatch, patients, images, advice
):
    pictures_of(tmp_path, patients, images)
    told = chapter_on_own_images(tmp_path, monkeypatch)
    assert "own: 0 of the 2 classes of scheme label can serve in split" in told
    assert advice in told
    assert not list((tmp_path / "runs").glob("score-*"))  # nothing was trained


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--fractions train=.5,val=.3", "is not like train=.7,val=.1,test=.2, sum 1"),
        ("--patient-pattern '[a-z'", "is no regular expression"),
        ("--such", "unrecognized arguments: --such"),
        (
            r"--patient-pattern=(\w+\d+)_\d --classes=sick,ill",
            "has label 'well'; known: sick, ill",
        ),
        (r"--patient-pattern=\d$ --grey", "finds no patient in the path of"),
    ],
)
def test_options_of_the_command_reach_it_and_what_is_wrong_is_one_sentence(
    tmp_path, monkeypatch, options, expected
):
    pictures_of(tmp_path, 2, 2, colour=True)
    assert expected in chapter_on_own_images(tmp_path, monkeypatch, OPTIONS=options)


def test_the_page_of_the_papers_names_modules_that_exist():
    page = (BOOK / "papers.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    named = re.findall(r"`([\w.]+)`", " ".join(row[4] for row in rows if len(row) == 6))
    assert len(named) > 40
    for name in set(named):
        path = name if name.startswith("data_prep.") else f"hallulib.{name}"
        in_book = (BOOK / f"{name}.ipynb").exists()
        place = ROOT / path.replace(".", "/")
        assert in_book or place.with_suffix(".py").exists() or place.is_dir(), name


# --- the machine that runs them ---------------------------------------------------------------


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of two quick chapters, read when it is whole; the first leaves a mark each time."""
    monkeypatch.setattr(build, "PREVIEW", math.inf)
    source = tmp_path / "source"
    source.mkdir()
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write(f'{{STEPS}} ')"
    write_chapter(source / "01_one.ipynb", CHECK, mark)
    write_chapter(source / "02_two.ipynb", CHECK, "assert STEPS != 13")
    (source / "intro.md").write_text("# Tiny\n\nNothing.\n")
    (source / "_toc.yml").write_text('format: jb-book\nroot: intro\nchapters:\n- glob: "0*"\n')
    for name in ("logo.svg", "favicon.svg", "references.bib"):
        shutil.copy(BOOK / name, source)
    return source


@pytest.fixture
def unpublished(monkeypatch):
    """Builds that end before the pages, which take longer than these chapters."""
    monkeypatch.setattr(build, "publish", lambda pages, html: None)


def run(book, *options):
    return build.main([*options, "--source", str(book), "--target", str(book.parent / "out")])


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_fewer_workers_than_one_are_refused(book, capsys, workers):
    assert run(book, "--workers", workers) == 2
    assert capsys.readouterr().err == f"--workers is {workers}; at least 1 is needed\n"


def ran(book):
    file = book.parent / "ran"
    return file.read_text().split() if file.exists() else []


def test_the_first_page_can_be_read_while_the_last_chapter_is_computed(book, monkeypatch):
    """The last chapter waits until it has seen both, and fails if they do not come."""
    monkeypatch.setattr(build, "PREVIEW", 0)
    html, told = book.parent / "out" / "html", "<p>This chapter is being computed"
    waits = f"""
import pathlib, time
pages = [pathlib.Path({str(html)!r}) / f"{{name}}.html" for name in ("01_one", "02_two")]
end = time.monotonic() + 100
while not all(page.exists() for page in pages):
    assert time.monotonic() < end
    time.sleep(0.2)
assert {told!r} in pages[1].read_text()
assert {told!r} not in pages[0].read_text()
"""
    write_chapter(book / "02_two.ipynb", CHECK, waits)
    assert run(book, "--workers", "2") == 0
    assert told not in (html / "02_two.html").read_text()


@pytest.mark.usefixtures("unpublished")
def test_a_second_build_executes_only_what_changed(book, capsys):
    assert run(book) == 0
    assert run(book) == 0
    assert ran(book) == ["5"]
    assert capsys.readouterr().out.count("unchanged") == 2
    assert run(book, "-p", "STEPS", "7") == 0
    assert ran(book) == ["5", "7"]


def test_finished_chapters_survive_a_later_one_that_fails(book, capsys):
    assert run(book, "-p", "STEPS", "13") == 1
    assert "AssertionError" in capsys.readouterr().err
    assert run(book, "-p", "STEPS", "13") == 1
    assert ran(book) == ["13"]


def test_a_user_error_stops_the_build_with_one_sentence(book, capsys):
    write_chapter(
        book / "01_one.ipynb", "from hallulib import UserError\nraise UserError('no such folder')"
    )
    assert run(book) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "01_one: no such folder"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("STPES: 3", "unknown parameter STPES; did you mean STEPS? known: STEPS, SCHEME, RATE"),
        ("STEPS: 0", "01_one: parameter STEPS = 0 must be a whole number from 1 to 10000"),
        ("STEPS: '20'", "01_one: parameter STEPS = '20' must be a whole number from 1 to 10000"),
        (
            "02_two: {RATE: -1}",
            "02_two: parameter RATE = -1 must be a finite number of at least 0.0",
        ),
        ("02_two: {STPES: 1}", "unknown parameter STPES; did you mean STEPS?"),
        ("03_three: {STEPS: 1}", "has settings for 03_three; the chapters are 01_one, 02_two"),
        ("- STEPS", "must hold lines NAME: value, found list"),
        ("STEPS: [", "cannot read the parameters in"),
    ],
)
def test_a_wrong_parameter_file_stops_before_anything_runs(book, capsys, text, sentence):
    file = book.parent / "wrong.yaml"
    file.write_text(text)
    assert run(book, "--params", str(file)) == 2
    printed = capsys.readouterr().err.strip()
    assert sentence in printed
    assert "\n" not in printed
    assert not (book.parent / "out").exists()


def test_a_value_on_the_command_line_that_is_no_yaml_is_told(book, capsys):
    assert run(book, "-p", "STEPS", "[") == 2
    assert "cannot read the parameters in -p STEPS" in capsys.readouterr().err


def test_a_parameter_file_that_does_not_exist_is_named(book, capsys):
    assert run(book, "--params", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_setting_for_one_chapter_wins_over_the_one_for_all(book):
    file = book.parent / "set.yaml"
    file.write_text("02_two: {STEPS: 9}\nSTEPS: 8\nRATE: 1e-3\n")
    chosen = build.choose(file, [["SCHEME", "grade2"]], book)
    shared = {"RATE": 0.001, "SCHEME": "grade2"}
    assert chosen == {"01_one": {"STEPS": 8} | shared, "02_two": {"STEPS": 9} | shared}


def test_the_outcome_depends_on_cells_parameters_library_and_data(book, tmp_path, monkeypatch):
    chapter = book / "01_one.ipynb"
    before = build.fingerprint(chapter, {"DATASET": str(tmp_path)})
    assert before == build.fingerprint(chapter, {"DATASET": str(tmp_path)})
    assert before != build.fingerprint(chapter, {"DATASET": "phantom"})
    (tmp_path / "card.json").write_text("{}")
    assert before != (card := build.fingerprint(chapter, {"DATASET": str(tmp_path)}))
    for folder in ("hallulib", "data_prep"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path / "root")
    assert card != build.fingerprint(chapter, {"DATASET": str(tmp_path)})
    own = tmp_path / "own"
    own.mkdir()
    before = build.fingerprint(chapter, {"FOLDER": str(own)})
    (own / "a.png").write_text("a picture")
    assert before != build.fingerprint(chapter, {"FOLDER": str(own)})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (own / "high").symlink_to(elsewhere)
    before = build.fingerprint(chapter, {"FOLDER": str(own)})
    (elsewhere / "b.png").write_text("a picture in a folder that is a link")
    assert before != build.fingerprint(chapter, {"FOLDER": str(own)})
    monkeypatch.setenv("HOME", str(tmp_path))
    before = build.fingerprint(chapter, {"DATASET": "~"})
    (tmp_path / "card.json").write_text("{} ")
    assert before != build.fingerprint(chapter, {"DATASET": "~"})
    before = build.fingerprint(chapter, {"RESULTS": str(own)})
    write_chapter(chapter, "1  # grid.load")
    loads = build.fingerprint(chapter, {"RESULTS": str(own)})
    (own / "cell.json").write_text("{}")
    assert before != loads != build.fingerprint(chapter, {"RESULTS": str(own)})
    write_chapter(chapter, "1")
    assert card != build.fingerprint(chapter, {"DATASET": str(tmp_path)})


LINKS = {  # link in the folder -> where it leads, from the folder
    "itself": ("loop", "."),
    "the folder around": ("deep/loop", ".."),
    "its neighbour and back": ("deep/to_other", "../other"),
    "the parent": ("up", ".."),
    "the copy": ("copy", "../out/book"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("links", [*([name] for name in LINKS), list(LINKS)], ids=str)
def test_links_that_lead_back_are_not_followed(book, links):
    for place in ("deep", "other"):
        (book / place).mkdir()
        (book / place / "page.md").write_text(place)
    (book / "other" / "back").symlink_to("../deep")
    for name in links:
        (book / LINKS[name][0]).symlink_to(LINKS[name][1])
    assert build.fingerprint(book / "01_one.ipynb", {"FOLDER": str(book)})
    target, copies = book.parent / "out" / "book", []
    for _ in range(2):
        build.collect(book, target)
        copies.append({str(file.relative_to(target)) for file in target.rglob("*")})
    assert copies[0] == copies[1] >= {"deep/page.md", "other/page.md", "other/back/page.md"}


def test_a_warning_keeps_the_published_book_as_it_was(book, capsys):
    for chapter in build.chapters(book):
        chapter.unlink()
    (book / "_toc.yml").write_text("format: jb-book\nroot: intro\n")
    assert run(book) == 0
    (book / "intro.md").write_text("# Tiny\n\n{doc}`missing`\n")
    for _ in range(2):  # a page that was not changed since warns again
        assert run(book) == 2
        assert "missing" in capsys.readouterr().err
    assert "Nothing." in (book.parent / "out" / "html" / "intro.html").read_text()


def test_a_book_that_is_replaced_is_never_there_in_part(tmp_path, monkeypatch):
    html, new = tmp_path / "html", tmp_path / "site" / "_build" / "html"

    def sphinx(*_, **__):
        new.mkdir(parents=True)
        (new / "index.html").write_text("new")
        return subprocess.CompletedProcess([], 0)

    def stopped(folder, **_):
        for file in Path(folder).glob("index.html"):
            file.unlink()
            raise KeyboardInterrupt

    html.mkdir()
    (html / "index.html").write_text("old")
    monkeypatch.setattr(build.subprocess, "run", sphinx)
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            build.publish(tmp_path / "book", html)
    assert not html.exists() or (html / "index.html").exists()
    build.publish(tmp_path / "book", html)
    assert (html / "index.html").read_text() == "new"
    assert not (tmp_path / "site" / "replaced").exists()


def test_a_place_that_cannot_be_written_is_told_in_one_sentence(book, capsys):
    (book.parent / "out").write_text("a file in the way")
    assert run(book) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert "out/book: cannot write (" in told[0]
    assert (book.parent / "out").read_text() == "a file in the way"


def test_removed_chapters_leave_the_book(book):
    pages = book.parent / "pages"
    build.collect(book, pages)
    (pages / "09_old.ipynb").write_text("{}")
    build.collect(book, pages)
    assert not (pages / "09_old.ipynb").exists()


def test_an_executed_copy_appears_only_when_it_is_complete(book, tmp_path):
    out = tmp_path / "pages" / "02_two.ipynb"
    with pytest.raises(papermill.PapermillExecutionError):
        build.execute(book / "02_two.ipynb", out, {"STEPS": 13})
    assert not out.exists()
