"""A chapter of a few lines."""

import nbformat

CHECK = """\
from hallulib.notebook import parameters
parameters.check(globals(), STEPS=(1, 10_000), SCHEME=str, RATE=(0.0, None))"""


def write_chapter(path, *code):
    """Write a notebook with three parameters and a cell for each piece of code."""
    new = nbformat.v4
    head = """STEPS = 5  # steps (test: 2)
SCHEME = "isup"  # labels (test: "isup")
RATE = 0.1  # per step (test: 0.1)"""
    parameters = new.new_code_cell(head, metadata={"tags": ["parameters"]})
    cells = [new.new_markdown_cell("# Tiny"), parameters]
    cells += [new.new_code_cell(source) for source in code]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
