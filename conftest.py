"""Fixtures of all tests: chapters executed once at test size, the published book, a browser."""

import ast
import contextlib
import functools
import http.server
import re
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import papermill
import psutil
import pytest
import torch
from joblib import cpu_count

ROOT = Path(__file__).parent
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
# no first-run traffic to the makers of the browser: an outside request must be the page's own
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--disable-default-apps"]


LIMIT_OF_CHAPTERS = 3600  # seconds: the first test that needs them executes them all


def pytest_configure():
    # in the background Ctrl-C is ignored: SIGTERM ends the tests as it does, with their fixtures
    signal.signal(signal.SIGTERM, signal.default_int_handler)


LEFT = []  # what workers had started when they were cut short, and which has no parent then


def pytest_keyboard_interrupt():
    LEFT.extend(psutil.Process().children(recursive=True))


def pytest_unconfigure():
    for process in [*LEFT, *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def pytest_collection_modifyitems(items):
    for item in items:
        if "executed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(LIMIT_OF_CHAPTERS))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr == "not release":
        terminalreporter.line("make test RELEASE=1 runs the long tests of a release as well")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests that start processes wait for them."""
    return min(cpu_count() + 1, 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files side by side; those of the book by one worker, which executes the chapters once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "tests/book" if file.startswith("tests/book/") else file

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _no_runs_of_the_user(tmp_path_factory):
    """Tests neither find nor replace what was trained before, perhaps on other threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALLULIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(autouse=True)
def _names_in_examples(doctest_namespace):
    doctest_namespace.update(np=np, torch=torch)


def size_for_tests(chapter: Path) -> dict:
    """The values that the comments of the parameters cell give: ``NAME = 9  # ... (test: 2)``."""
    values = {}
    for name, entry in papermill.inspect_notebook(str(chapter)).items():
        found = re.search(r"\(test: (.+)\)\s*$", entry["help"])
        if found:
            values[name] = ast.literal_eval(found[1])
    return values


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """A function from the name of a chapter to its executed copy; each is executed once."""
    import build

    pages = tmp_path_factory.mktemp("chapters") / "book"
    build.collect(ROOT / "book", pages)

    @functools.cache
    def run(name: str) -> Path:
        chapter = ROOT / "book" / f"{name}.ipynb"
        build.execute(chapter, pages / chapter.name, size_for_tests(chapter))
        return pages / chapter.name

    return run


@pytest.fixture(scope="session")
def site(executed, tmp_path_factory):
    """The folder of the published book, made from the chapters at test size."""
    import build

    if not CHAPTERS:
        pytest.skip("book/ has no chapter yet")
    pages = [executed(name) for name in CHAPTERS]
    html = tmp_path_factory.mktemp("site") / "html"
    build.publish(pages[0].parent, html)
    return html


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address(site):
    """The address of the published book on this machine."""
    handler = functools.partial(_Silent, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip("browser tests need Chromium: none of " + ", ".join(names) + " is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()
