"""Sphinx extension: every script and style that a page loads is served by the book itself."""

from pathlib import Path

import plotly

HERE = Path(__file__).parent
FILES = [
    HERE / "book.css",
    HERE / "explore.js",
    HERE / "vendor" / "tex-svg-full.js",
    Path(plotly.__file__).parent / "package_data" / "plotly.min.js",
]


def add_static_files(app, config):
    """Copy the files one by one: each script in a folder book/_static would be on every page."""
    config.html_static_path += map(str, FILES)
    app.add_css_file("book.css")


def add_plotly_where_used(app, pagename, templatename, context, doctree):
    """Load the 5 MB of plotly.js only on pages with a figure."""
    if "plotly-graph-div" in context.get("body", ""):
        app.add_js_file("plotly.min.js")
        app.add_js_file("explore.js")


def drop_buttons_that_lead_nowhere(app, config):
    """Launch buttons need the address of the repository, and leave no trace without it."""
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)


def setup(app):
    """Called by Sphinx."""
    app.connect("config-inited", add_static_files)
    app.connect("config-inited", drop_buttons_that_lead_nowhere)
    app.connect("html-page-context", add_plotly_where_used)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
