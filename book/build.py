"""Execute the chapters and publish the book in _build/html; `make book` calls this.

A chapter is executed again only if something it depends on has changed: its own cells, its
parameters, the data set they name, the library, the installed versions. So an interrupted
build goes on where it was, and a repeated one only publishes. Without a GPU chapters run side by
side, on as many threads as that leaves each of them. Pages appear while others are computed.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import house
import nbformat
import papermill
import psutil
import torch
from joblib import cpu_count

from hallulib import UserError
from hallulib.__main__ import run
from hallulib.notebook import grid, parameters
from hallulib.notebook.parameters import chapters
from hallulib.storage import disk

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
PREVIEW = 60  # seconds from one look at the pages so far to the next, at least


def fingerprint(chapter: Path, chosen: dict) -> str:
    """A hash of all that the outcome of a chapter depends on."""
    digest = hashlib.sha256(chapter.read_bytes())
    digest.update(json.dumps(chosen, sort_keys=True, default=str).encode() + sys.version.encode())
    code = {ROOT / "requirements.lock", *(ROOT / "hallulib").rglob("*")}
    if "data_prep" in chapter.read_text():
        code |= set((ROOT / "data_prep").rglob("*.py"))
    if "grid.load" in chapter.read_text():
        code |= _files(ROOT / chosen.get("RESULTS", "book/results"))
    # card.json holds the checksums of the other files of an image set
    code.add(ROOT / Path(str(chosen.get("DATASET", ""))).expanduser() / "card.json")
    # pictures of the reader's own have no card yet
    code |= _files(ROOT / chosen["FOLDER"]) if "FOLDER" in chosen else set()
    for file in sorted(code):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> set[Path]:
    """All files in a folder, those of folders that are links too."""
    found = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if _leads_back(place):
            folders.clear()
        else:
            found |= {Path(place) / name for name in names}
    return found


def _leads_back(place: str) -> bool:
    """Whether a folder is, by a link, one of those that it lies in."""
    return os.path.realpath(place) in map(os.path.realpath, Path(place).absolute().parents)


def execute(chapter: Path, out: Path, chosen: dict, title: str | None = None) -> None:
    """Execute one chapter with papermill; ``out`` appears only when it is complete.

    Raises:
        UserError: if the chapter stopped with one; its sentence, after the chapter's name. Or
            if ``out`` cannot be written.
        papermill.PapermillExecutionError: if it failed otherwise.
    """
    mark = fingerprint(chapter, chosen)  # before: the library may be edited while this runs
    running, start = out.parent.parent / "running" / chapter.name, time.monotonic()
    with disk.writing(out):
        running.parent.mkdir(parents=True, exist_ok=True)
        notebook = grid.execute(
            chapter,
            running,
            chosen,
            progress_bar={"desc": title or chapter.stem},
            stderr_file=sys.stderr,
        )
        # widgets of a stopped kernel: the page would ask another host for their scripts
        notebook.metadata.pop("widgets", None)
        notebook.metadata["fingerprint"] = mark
        notebook.metadata["seconds"] = round(time.monotonic() - start, 1)  # the doctor tells them
        nbformat.write(notebook, running)
        os.replace(running, out)


def is_current(chapter: Path, out: Path, chosen: dict) -> bool:
    """Whether ``out`` is this chapter, executed with these parameters by this library."""
    if not out.exists():
        return False
    return nbformat.read(out, 4).metadata.get("fingerprint") == fingerprint(chapter, chosen)


def collect(source: Path, target: Path) -> None:
    """Copy pages, references, pictures beside the executed chapters; write what is generated."""
    folders = "_ext", "params", "grids", "results", "__pycache__"
    unwanted = shutil.ignore_patterns("*.ipynb", "*.py", *folders, ".*")

    def skip(place: str, names: list[str]) -> Collection[str]:
        back = _leads_back(place) or Path(place).resolve() == target.resolve()
        return names if back else unwanted(place, names)

    with disk.writing(target):
        shutil.copytree(source, target, ignore=skip, dirs_exist_ok=True)
        kept = {path.name for path in chapters(source)}
        for old in chapters(target):
            if old.name not in kept:
                old.unlink()
        house.write(target)


def preview(pages: Path, every: list[Path], html: Path) -> None:
    """Publish the pages so far; a chapter that is not there yet says so."""
    so_far = pages.parent / "preview" / pages.name
    shutil.rmtree(so_far, ignore_errors=True)
    shutil.copytree(pages, so_far)
    for chapter in every:
        if not (so_far / chapter.name).exists():
            title = nbformat.read(chapter, 4).cells[0].source.splitlines()[0]
            told = f"{title}\n\nThis chapter is being computed: load the page again later.\n"
            (so_far / chapter.name).with_suffix(".md").write_text(told)
    with contextlib.suppress(UserError):  # the whole book will tell
        publish(so_far, html, whole=False)


def publish(pages: Path, html: Path, whole: bool = True) -> None:
    """Turn executed chapters into HTML; of the whole book every warning is an error.

    Raises:
        UserError: if there was one, and the folder ``html`` is then as it was before; or it
            cannot be written.
    """
    site = pages.parent / "site"
    # the program of this environment, which need not be the first on the PATH
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", str(pages), "--all"]
    command += ["--config", str(ROOT / "_config.yml"), "--path-output", str(site)]
    strict = ["-W", "--keep-going", "-n"] if whole else []
    done = subprocess.run([*command, *strict, "-q"], capture_output=True, text=True)
    if done.returncode:
        if whole:
            print(done.stdout[-4000:] + done.stderr[-4000:], file=sys.stderr)
        raise UserError(f"the book in {pages} was not published: see the warnings above")
    replaced = site / "replaced"
    with disk.writing(html):
        shutil.rmtree(replaced, ignore_errors=True)
        html.parent.mkdir(parents=True, exist_ok=True)
        if html.exists():  # moved, then removed: a request to end may come at any time
            os.replace(html, replaced)
        os.replace(site / "_build" / "html", html)
        shutil.rmtree(replaced, ignore_errors=True)


def build(source: Path, target: Path, chosen: dict[str, dict], workers: int = 1) -> None:
    """Bring the executed chapters (``target/book``) and the pages (``target/html``) up to date.

    If a chapter fails, those that run beside it are finished and no other is begun. Where no book
    was published before, the pages so far can be read while others are computed.
    """
    pages, every, html = target / "book", chapters(source), target / "html"
    collect(source, pages)

    def one(chapter: Path) -> None:
        settings, out = chosen[chapter.stem], pages / chapter.name
        title = f"{chapter.stem} ({every.index(chapter) + 1} of {len(every)})"
        if is_current(chapter, out, settings):
            print(f"{title}: unchanged", flush=True)
            return
        print(f"{title}: executing {settings or 'with its own parameters'}", flush=True)
        execute(chapter, out, settings, title)

    with ThreadPoolExecutor(workers) as pool:
        try:
            shown = math.inf if html.exists() else -math.inf
            jobs = [pool.submit(one, chapter) for chapter in every]
            for job in as_completed(jobs):
                job.result()
                if time.monotonic() - shown > PREVIEW and not all(job.done() for job in jobs):
                    preview(pages, every, html)
                    shown = time.monotonic()
        except BaseException as stop:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(stop, Exception):  # a request to end
                for kernel in psutil.Process().children(recursive=True):
                    kernel.kill()
            raise
    print("publishing", flush=True)
    publish(pages, html)


def side_by_side(workers: int | None) -> int:
    """How many chapters to run at once, each on its share of the threads of this machine."""
    if workers is None:
        workers = 1 if torch.cuda.is_available() else min(cpu_count(), 4)
    if workers < 1:
        raise UserError(f"--workers is {workers}; at least 1 is needed")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // workers)))
    return workers


def choose(file: Path | None, pairs: list, source: Path) -> dict[str, dict]:
    """The parameters chosen for each chapter, checked before anything runs.

    Args:
        file: YAML with ``NAME: value`` for all chapters that have NAME, and under the name of a
            chapter a mapping for that chapter alone.
        pairs: ``[name, text]`` from the command line; they win over the file.
        source: folder of the chapters.

    Raises:
        UserError: if a name is a parameter of no chapter, or a value is impossible.
    """
    given = parameters.read_yaml(file) if file else {}
    given |= {name: parameters.parse_yaml(text, f"-p {name}") for name, text in pairs}
    alone = {name: value for name, value in given.items() if isinstance(value, dict)}
    shared = {name: value for name, value in given.items() if name not in alone}
    own = {chapter: parameters.own_values(chapter) for chapter in chapters(source)}
    stems = [chapter.stem for chapter in own]
    for name in alone.keys() - set(stems):
        raise UserError(f"{file} has settings for {name}; the chapters are {', '.join(stems)}")
    anywhere = dict.fromkeys(name for values in own.values() for name in values)
    for known, names in [(anywhere, shared), *((own[c], alone.get(c.stem, ())) for c in own)]:
        for name in names:
            if name not in known:
                raise UserError(parameters.unknown(str(name), known))
    chosen = {}
    for chapter, values in own.items():
        common = {name: value for name, value in shared.items() if name in values}
        chosen[chapter.stem] = common | alone.get(chapter.stem, {})
        parameters.check_before(chapter.stem, parameters.declared(chapter), chosen[chapter.stem])
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a chapter failed, or as `hallulib.__main__.run`."""
    parser = argparse.ArgumentParser(description="Execute the chapters and publish the book.")
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML: NAME: value")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="chapters side by side (default: 1 on a GPU, else a core each, at most 4)",
    )
    parser.add_argument("--source", type=Path, default=ROOT / "book", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, default=BUILD, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run(lambda: _bring_up(**vars(options)))


def _bring_up(
    params: Path | None, pairs: list, workers: int | None, source: Path, target: Path
) -> int:
    start = time.monotonic()
    source, target = source.resolve(), target.resolve()
    chosen = choose(params, pairs, source)
    os.chdir(ROOT)  # as papermill does for each chapter, but for the whole process
    try:
        build(source, target, chosen, side_by_side(workers))
    except papermill.PapermillExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    page = target / "html" / "index.html"
    print(f"the book is {page} ({time.monotonic() - start:.0f} s); make serve shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
