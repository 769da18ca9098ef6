"""What the cells of a notebook leave behind, without a kernel."""

import nbformat

from conftest import size_for_tests


def executed(notebook, n_cells=None, **values):
    """The names that its first code cells define, or all; its parameters are of test size, but for
    those given.
    """
    sources = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    exec(sources[0], space := {})
    space |= size_for_tests(notebook) | values
    for source in sources[1:n_cells]:
        exec(source, space)
    return space


def defined(notebook, **values):
    """What a notebook defines up to its last function."""
    sources = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    last = max(i for i, source in enumerate(sources) if source.startswith("def "))
    return executed(notebook, last + 1, **values)
