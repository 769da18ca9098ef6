"""The house: rooms, floors and arrows of the library, read from its imports, drawn and listed.

``python book/house.py FOLDER`` writes ``house.svg``, ``rooms.md`` and ``api.md``; the build of the
book does so for the pages "How the house is built" and "Reference of names".
"""

import ast
import html
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
# what stands higher may import what stands lower; rooms of one floor do not know each other
FLOORS = (
    ("oneshot", "likelihood", "augment"),
    ("diffusion", "evidence"),
    ("data", "storage"),
    ("shapes",),
)
BESIDE = "notebook"  # knows the book and what is kept; no other room knows it
MAY_KNOW = {BESIDE: {"storage", "shapes"}}
ROOMS = tuple(room for floor in FLOORS for room in floor) + (BESIDE,)


def room_of(module: str) -> str:
    """The room of a dotted module of the library; what lies at its top is the ground floor."""
    name = (module.split(".") + [""])[1]
    return name if name in ROOMS else "shapes"


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names of the library that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hallulib":
            inside = len(node.module.split(".")) > 1
            yield from [node.module] if inside else [f"hallulib.{n.name}" for n in node.names]
        elif isinstance(node, ast.Import):
            yield from (n.name for n in node.names if n.name.split(".")[0] == "hallulib")


def files() -> dict[str, Path]:
    """Dotted module -> file, for all of the library."""
    found = {}
    for path in sorted((ROOT / "hallulib").rglob("*.py")):
        if path.stem == "__main__":  # the door opens into every room
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    found = Counter()
    for module, path in files().items():
        for name in imported(ast.parse(path.read_text())):
            pair = room_of(module), room_of(name)
            found[pair] += pair[0] != pair[1]
    return +found


def faults() -> list[str]:
    """Arrows that no house may have: up, to a neighbour, or from anywhere to the book's room."""
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    return [
        f"{a} imports {b}"
        for a, b in sorted(arrows())
        if b not in MAY_KNOW.get(a, {b})
        or (a not in MAY_KNOW and (b == BESIDE or floor[b] <= floor[a]))
    ]


def chapters() -> dict[str, list[str]]:
    """Room -> the chapters that import from it."""
    found = {room: [] for room in ROOMS}
    for path in sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb")):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        code = "\n".join(line for c in cells for line in c.splitlines() if line[:1] != "%")
        for room in dict.fromkeys(map(room_of, imported(ast.parse(code)))):
            found[room].append(path.stem)
    return found


def sentence(module: str) -> str:
    """The first paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(files()[module].read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def public(path: Path) -> Iterator[tuple[str, str]]:
    """Signature and first line of what a module offers."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        told = (ast.get_docstring(node) or "").split("\n")[0]
        if isinstance(node, ast.FunctionDef):
            yield f"{node.name}({ast.unparse(node.args)})", told
        else:
            start = [n for n in node.body if getattr(n, "name", "") == "__init__"]
            given = ast.unparse(start[0].args).removeprefix("self").lstrip(", ") if start else ""
            yield f"class {node.name}" + (f"({given})" if given else ""), told


def picture() -> str:
    """The rooms on their floors and the arrows between them, as SVG."""
    count = Counter(room_of(module) for module in files())
    width, height, gap = 150, 62, 58
    place, boxes, lines = {}, [], []
    for row, rooms in enumerate(FLOORS):
        for column, room in enumerate(rooms):
            left = 290 + (column - (len(rooms) - 1) / 2) * (width + 30) - width / 2
            place[room] = (left, 12 + row * (height + gap))
    place[BESIDE] = (620, 12 + (height + gap))
    for room, (x, y) in place.items():
        told = f"{count[room]} file" + "s" * (count[room] != 1)
        boxes.append(
            f"<g><title>{html.escape(sentence(_face(room)))}</title>"
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#eef4fb"'
            ' stroke="#4472a8"/>'
            f'<text x="{x + width / 2}" y="{y + 28}" font-weight="bold">{room}</text>'
            f'<text x="{x + width / 2}" y="{y + 48}" font-size="13">{told}</text></g>'
        )
    for (a, b), n in sorted(arrows().items()):
        (x, y), (u, v) = place[a], place[b]
        lines.append(
            f'<line x1="{x + width / 2}" y1="{y + height}" x2="{u + width / 2}" y2="{v - 5}"'
            f' stroke-width="{1 + min(n, 12) / 5:.1f}"><title>{a} to {b}: {n}</title></line>'
        )
    floor = 24 + len(FLOORS) * (height + gap) - gap
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 {floor}" role="img"'
        ' font-family="sans-serif" font-size="16" text-anchor="middle" fill="#1b2a3a">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
        ' markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#8a97a6"/></marker></defs>'
        f'<g stroke="#8a97a6" marker-end="url(#tip)" fill="none">{"".join(lines)}</g>'
        f"{''.join(boxes)}</svg>\n"
    )


def _face(room: str) -> str:
    """The module whose docstring says what a room is for."""
    return f"hallulib.{room}"


def rooms_table() -> str:
    """One row per room, as Markdown."""
    used, held = chapters(), files()
    rows = ["| room | what it is for | files | chapters |", "|---|---|---|---|"]
    for room in ROOMS:
        own = [m.split(".")[-1] for m in held if m.startswith(f"hallulib.{room}.")]
        here = " ".join(f"[{name[:2]}]({name})" for name in used[room])
        rows.append(
            f"| `{room}` | {sentence(_face(room))} | {', '.join(f'`{m}`' for m in own)} | {here} |"
        )
    return "\n".join(rows) + "\n"


def api_page() -> str:
    """Every public name with its signature and first line, as Markdown."""
    parts = [
        "# Reference of names",
        "Every public function and class with its signature and first line;"
        " `help(name)` shows shapes, units, what is raised and the source.",
    ]
    for room in ROOMS:
        parts.append(f"## {room}\n\n{sentence(_face(room))}")
        for module, path in files().items():
            found = list(public(path)) if room_of(module) == room else []
            if found:
                parts.append(f"### {module}\n\n{sentence(module)}")
                parts += [f"```python\n{name}\n```\n{told}" for name, told in found]
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> None:
    """Write the picture and the two generated pages."""
    for name, text in (
        ("house.svg", picture()),
        ("rooms.md", rooms_table()),
        ("api.md", api_page()),
    ):
        (folder / name).write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
