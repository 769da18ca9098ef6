"""Execute the chapters and publish the book in _build/html; `make book` calls this.

A chapter is executed again only if something it depends on has changed: its own cells, its
parameters, the data set they name, the library, the installed versions. So an interrupted
build goes on where it was, and a repeated one only publishes.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml

from hallulib import UserError, parameters

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
TIMEOUT = 12 * 3600  # seconds for one cell: a training run on a real data set is one cell


def chapters(source: Path) -> list[Path]:
    """The notebooks of the book, in reading order."""
    return sorted(source.glob("[0-9][0-9]_*.ipynb"))


def defaults(chapter: Path) -> dict[str, str]:
    """Name and text of the values in the chapter's parameters cell."""
    found = papermill.inspect_notebook(str(chapter))
    return {name: entry["default"] for name, entry in found.items()}


def read_parameters(file: Path | None, pairs: list, source: Path) -> dict[str, dict]:
    """The parameters of each chapter, checked before anything runs.

    Args:
        file: YAML with ``NAME: value`` for all chapters that have NAME, and under the name of a
            chapter a mapping for that chapter alone.
        pairs: ``[name, text]`` from the command line; they win over the file.
        source: folder of the chapters.

    Raises:
        UserError: if a name is a parameter of no chapter, or a value is impossible.
    """
    given = _read_yaml(file) if file else {}
    given |= {name: yaml.safe_load(text) for name, text in pairs}
    known = {chapter.stem: list(defaults(chapter)) for chapter in chapters(source)}
    chosen = {chapter: {} for chapter in known}
    for name, value in sorted(given.items(), key=lambda item: isinstance(item[1], dict)):
        targets = [name] if isinstance(value, dict) else list(known)
        entries = value if isinstance(value, dict) else {name: value}
        if not set(targets) <= set(known):
            raise UserError(f"{file} has settings for {name}; the chapters are {', '.join(known)}")
        for entry, setting in entries.items():
            takers = [chapter for chapter in targets if entry in known[chapter]]
            if not takers:
                names = dict.fromkeys(n for chapter in targets for n in known[chapter])
                raise UserError(parameters.unknown(str(entry), list(names)))
            for chapter in takers:
                chosen[chapter][entry] = _number(setting)
    for chapter in chapters(source):
        _check(chapter, chosen[chapter.stem])
    return chosen


def _read_yaml(file):
    try:
        given = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the parameters in {file}: {reason}") from error
    if not isinstance(given, dict):
        raise UserError(f"{file} must hold lines NAME: value, found {type(given).__name__}")
    return given


def _number(value):
    # YAML 1.1 reads 1e-3 as text because it has no point
    exponent = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if exponent else value


def _check(chapter, chosen):
    """Apply the rules of the chapter's own call of parameters.check, as far as they are plain."""
    rules = declared(chapter)
    named = {name: rules[name] for name in chosen if name in rules}
    try:
        parameters.check({name: chosen[name] for name in named}, **named)
    except UserError as error:
        raise UserError(f"{chapter.stem}: {error}") from None


def declared(chapter: Path) -> dict[str, object]:
    """The rules in the chapter's call of ``parameters.check`` that are plain expressions."""
    sources = [c.source for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]
    rules = {}
    for source in sources:
        if "parameters.check(" not in source:
            continue
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "parameters.check":
                rules |= {word.arg: _plain(word.value) for word in call.keywords}
    return {name: rule for name, rule in rules.items() if rule is not None}


def _plain(expression):
    if isinstance(expression, ast.Name):
        return {"str": str, "bool": bool}.get(expression.id)
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def fingerprint(chapter: Path, chosen: dict) -> str:
    """A hash of all that the outcome of a chapter depends on."""
    digest = hashlib.sha256(chapter.read_bytes())
    digest.update(json.dumps(chosen, sort_keys=True, default=str).encode() + sys.version.encode())
    code = {ROOT / "requirements.lock", *(ROOT / "hallulib").rglob("*")}
    if "data_prep" in chapter.read_text():
        code |= set((ROOT / "data_prep").rglob("*.py"))
    # card.json holds the checksums of the other files of an image set
    code.add(ROOT / str(chosen.get("DATASET", "")) / "card.json")
    for file in sorted(code):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()


def execute(chapter: Path, out: Path, chosen: dict, title: str | None = None) -> None:
    """Execute one chapter with papermill; ``out`` appears only when it is complete.

    Raises:
        UserError: if the chapter stopped with one; its sentence, after the chapter's name.
        papermill.PapermillExecutionError: if it failed otherwise.
    """
    mark = fingerprint(chapter, chosen)  # before: the library may be edited while this runs
    running = out.parent.parent / "running" / chapter.name
    running.parent.mkdir(parents=True, exist_ok=True)
    try:
        notebook = papermill.execute_notebook(
            chapter,
            running,
            chosen,
            kernel_name="python3",
            cwd=ROOT,
            execution_timeout=TIMEOUT,
            progress_bar={"desc": title or chapter.stem},
            stderr_file=sys.stderr,
            # the kernel warns at each start that it talks to us over TCP on this machine
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "UserError":
            raise UserError(f"{chapter.stem}: {error.evalue}") from None
        raise
    # widgets of a stopped kernel: the page would ask another host for their scripts
    notebook.metadata.pop("widgets", None)
    notebook.metadata["fingerprint"] = mark
    nbformat.write(notebook, running)
    os.replace(running, out)


def is_current(chapter: Path, out: Path, chosen: dict) -> bool:
    """Whether ``out`` is this chapter, executed with these parameters by this library."""
    if not out.exists():
        return False
    return nbformat.read(out, 4).metadata.get("fingerprint") == fingerprint(chapter, chosen)


def collect(source: Path, target: Path) -> None:
    """Copy the pages, the references and the pictures beside the executed chapters."""
    skip = shutil.ignore_patterns("*.ipynb", "*.py", "_ext", "params", "__pycache__", ".*")
    shutil.copytree(source, target, ignore=skip, dirs_exist_ok=True)
    kept = {path.name for path in chapters(source)}
    for old in chapters(target):
        if old.name not in kept:
            old.unlink()


def publish(pages: Path, html: Path) -> None:
    """Turn executed chapters into HTML; every warning is an error.

    Raises:
        UserError: if there was one; the folder ``html`` is then as it was before.
    """
    site = pages.parent / "site"
    # the program of this environment, which need not be the first on the PATH
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", str(pages), "--all"]
    command += ["--config", str(ROOT / "_config.yml"), "--path-output", str(site)]
    done = subprocess.run(
        [*command, "-W", "--keep-going", "-n", "-q"], capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:], file=sys.stderr)
        raise UserError(f"the book in {pages} was not published: see the warnings above")
    shutil.rmtree(html, ignore_errors=True)
    html.parent.mkdir(parents=True, exist_ok=True)
    os.replace(site / "_build" / "html", html)


def build(source: Path, target: Path, chosen: dict[str, dict]) -> None:
    """Bring the executed chapters (``target/book``) and the pages (``target/html``) up to date."""
    pages, todo = target / "book", chapters(source)
    collect(source, pages)
    for number, chapter in enumerate(todo, 1):
        settings, out = chosen[chapter.stem], pages / chapter.name
        title = f"{chapter.stem} ({number} of {len(todo)})"
        if is_current(chapter, out, settings):
            print(f"{title}: unchanged", flush=True)
            continue
        print(f"{title}: executing {settings or 'with its own parameters'}", flush=True)
        execute(chapter, out, settings, title)
    print("publishing", flush=True)
    publish(pages, target / "html")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one sentence about what the user can mend."""
    parser = argparse.ArgumentParser(description="Execute the chapters and publish the book.")
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML: NAME: value")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs"
    )
    parser.add_argument("--source", type=Path, default=ROOT / "book", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, default=BUILD, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        chosen = read_parameters(options.params, options.pairs, options.source)
        build(options.source, options.target, chosen)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except papermill.PapermillExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished chapters are kept, the next run goes on", file=sys.stderr)
        return 130
    page = options.target / "html" / "index.html"
    print(f"the book is {page} ({time.monotonic() - start:.0f} s); make serve shows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
