import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import environment
import house
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from hallulib.storage import store

ROOT = Path(__file__).parents[2]
CODE = sorted(p for d in ("hallulib", "data_prep", "book") for p in (ROOT / d).rglob("*.py"))
NOTEBOOKS = sorted(p for d in ("book", "book/grids") for p in (ROOT / d).glob("*.ipynb"))
TOP = set(
    """.ci .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE
    Makefile README.md _config.yml book conftest.py data_prep environment.yml hallulib
    pyproject.toml requirements.in requirements.lock tests""".split()
)


def test_tests_leave_the_runs_of_the_user_alone():
    assert store.runs_folder().resolve() != ROOT / "runs"


def lock() -> dict[str, str]:
    pins = map(Requirement, environment.pins((ROOT / "requirements.lock").read_text()))
    # the version for Python 3.11, where Pythons differ
    held = [pin for pin in pins if not pin.marker or pin.marker.evaluate({"extra": ""})]
    return {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in held}


def sources(path: Path) -> list[str]:
    if path.suffix == ".py":
        return [path.read_text()]
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def trees():
    for path in [*CODE, *NOTEBOOKS]:
        for source in sources(path):
            code = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
            yield path, ast.parse(code)


def test_every_line_of_the_lock_has_a_hash_and_none_names_a_host():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text)
    entries = re.split(r"\n(?=[A-Za-z0-9])", text[re.search(r"^[a-z]", text, re.M).start() :])
    assert len(entries) > 100
    assert [e.splitlines()[0] for e in entries if "--hash=sha256:" not in e] == []


def test_the_lock_holds_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [line.split("#")[0].strip() for line in (ROOT / "requirements.in").open()]
    for line in [*project["dependencies"], *filter(None, asked)]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(lock()[wanted.name.lower()]), line


def test_conda_users_and_binder_get_the_versions_of_the_lock():
    text = (ROOT / "environment.yml").read_text()
    assert text == environment.environment((ROOT / "requirements.lock").read_text())
    parsed = yaml.safe_load(text)
    assert set(parsed) == {"name", "channels", "dependencies"}
    python, pip, packages = parsed["dependencies"]
    assert (python, pip, packages["pip"][-1]) == ("python=3.11", "pip", "-e .")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + python.removeprefix("python=")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook):
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_rooms_import_from_lower_floors_alone():
    """Over all files, those in folders too; see the page "How the house is built"."""
    assert house.arrows()["oneshot", "diffusion"] > 3  # the reading of imports works
    assert house.faults() == []


def test_an_arrow_that_runs_up_sideways_or_to_the_machine_of_the_book_is_found(monkeypatch):
    wrong = [("diffusion", "oneshot"), ("augment", "likelihood"), ("data", "notebook")]
    wrong += [("notebook", "data"), ("shapes", "storage"), ("evidence", "diffusion")]
    right = [("augment", "evidence"), ("oneshot", "shapes"), ("notebook", "storage")]
    monkeypatch.setattr(house, "arrows", lambda: dict.fromkeys(wrong + right, 1))
    assert house.faults() == [f"{a} imports {b}" for a, b in sorted(wrong)]


def test_no_file_of_the_library_needs_itself():
    held = house.files()
    graph = {}
    for module, path in held.items():
        names = set(house.imported(ast.parse(path.read_text())))
        graph[module] = {name for name in names if name in held and held[name].stem != "__init__"}
    assert len(graph) > 40
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises at a circle


def test_the_library_knows_neither_the_archives_nor_what_draws_the_embedded_sets():
    for path, tree in trees():
        if path.is_relative_to(ROOT / "hallulib"):
            imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in imports if isinstance(n, ast.ImportFrom)}
            assert not {name.split(".")[0] for name in names} & {"data_prep", "book"}, path


def test_the_house_stays_small():
    files = list((ROOT / "hallulib").rglob("*.py"))
    assert len(files) <= 48
    assert sum(len(file.read_text().splitlines()) for file in files) <= 8_500
    assert sum(map(lines_of_code, files)) <= 5_000


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank nor comment nor text."""
    source = path.read_text()
    rows = {i for i, row in enumerate(source.splitlines(), 1) if row.strip()}
    rows -= {i for i in rows if source.splitlines()[i - 1].lstrip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            rows -= set(range(node.lineno, node.end_lineno + 1))
    return len(rows)


def test_importing_the_package_loads_no_heavy_library():
    check = (
        "import sys, hallulib; print(*sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_nothing_that_can_run_code_is_read_from_a_file():
    unsafe = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    running = """eval exec torch.load torch.hub.load yaml.load yaml.full_load yaml.unsafe_load
        pd.read_pickle os.system os.popen shutil.unpack_archive""".split()
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                if names == ["joblib", "cpu_count"]:
                    continue  # the cores that are ours, containers included: no pickle in that
                assert not unsafe & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in running, path
                # a member of an archive is only ever written under a name of ours
                assert called.rpartition(".")[2] not in {"extract", "extractall"}, path
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("shell", "False") == "False", path
                assert given.get("trust_remote_code", "False") == "False", path
                if called in ("np.load", "np.lib.format.read_array"):
                    assert "allow_pickle" in given, path
                assert given.get("allow_pickle", "False") == "False", path
                if called == "Image.open":  # others than these run programs
                    assert given["formats"] == "FORMATS", path
                if called.endswith(".from_pretrained"):
                    assert "use_safetensors" in given, path


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: cannot tell which files belong to the project")
    return done.stdout.splitlines()


def test_the_top_level_holds_only_its_fixed_entries():
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_code_and_notebooks_keep_the_style():
    ruff = Path(sys.executable).parent / "ruff"
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([ruff, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
