"""The functions of a notebook, without a kernel."""

import nbformat

from conftest import size_for_tests


def defined(notebook, **values):
    """What a notebook defines up to its last function, as a dictionary; its parameters are of test
    size, but for those given.
    """
    sources = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    last = max(i for i, source in enumerate(sources) if source.startswith("def "))
    exec(sources[0], space := {})
    space |= size_for_tests(notebook) | values
    for source in sources[1 : last + 1]:
        exec(source, space)
    return space
