import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import environment
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from hallulib import artifacts

ROOT = Path(__file__).parents[1]
CODE = sorted(p for d in ("hallulib", "data_prep", "book") for p in (ROOT / d).rglob("*.py"))
NOTEBOOKS = sorted(p for d in ("book", "book/grids") for p in (ROOT / d).glob("*.ipynb"))
# Of these, a module imports only what stands before it.
ORDER = """__init__ shapes parameters memory phantom tissue data sde score unet sample classmodel
    flow likelihood levels bound calibration metrics gaussian parallel artifacts runs train
    autoencoder encoding steering selection few_labels augment estimators figures notebooks
    grid""".split()
TOP = set(
    """.ci .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE
    Makefile README.md _config.yml book conftest.py data_prep environment.yml hallulib
    pyproject.toml requirements.in requirements.lock tests""".split()
)


def test_tests_leave_the_runs_of_the_user_alone():
    assert artifacts.runs_folder().resolve() != ROOT / "runs"


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


def imports(module: Path) -> set[str]:
    """The modules of the library that one of them imports."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hallulib":
            found |= {a.name for a in node.names if (module.parent / f"{a.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "hallulib."}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    plain = {name.removeprefix("hallulib.") for name in found}
    return {name for name in plain if (module.parent / f"{name}.py").exists()}


def test_the_imports_of_the_library_go_one_way():
    graph = {path.stem: imports(path) for path in (ROOT / "hallulib").glob("*.py")}
    assert graph["train"] >= {"data", "runs", "score"}  # the reading of imports works
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises at a circle
    rank = {name: i for i, name in enumerate(ORDER)}
    for module, needed in graph.items():
        for name in needed & set(rank):
            assert rank[name] < rank.get(module, len(rank)), f"{module} imports {name}"


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
