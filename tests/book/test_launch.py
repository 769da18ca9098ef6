"""Buttons that open a chapter elsewhere: there once the repository has an address, else not."""

import re
import shutil

import build
import nbformat
import pytest
import yaml

from conftest import ROOT

ADDRESS = "https://github.com/someone/project"


def publish(root, address):
    """A page of the book's own configuration, with an address of the repository."""
    pages = root / "pages"
    pages.mkdir()
    new = nbformat.v4
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new.new_markdown_cell("# Tiny"), new.new_code_cell("1 + 1")]
    nbformat.write(
        new.new_notebook(cells=cells, metadata={"kernelspec": kernel}), pages / "01_one.ipynb"
    )
    (pages / "_toc.yml").write_text("format: jb-book\nroot: 01_one\n")
    for name in ("logo.svg", "favicon.svg", "references.bib"):
        shutil.copy(ROOT / "book" / name, pages)
    shutil.copytree(ROOT / "book" / "_ext", root / "book" / "_ext")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["url"] == ""  # where the project will be is not known
    config["repository"]["url"] = address
    (root / "_config.yml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ROOT", root)
        build.publish(pages, root / "html")
    return root / "html" / "01_one.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("launch"), ADDRESS)


def test_the_buttons_open_the_notebook_of_the_page(page):
    assert set(re.findall(r'<a href="(https?://[^"]*)"', page.read_text())) == {
        "https://mybinder.org/v2/gh/someone/project/main?urlpath=lab/tree/book/01_one.ipynb",
        "https://colab.research.google.com/github/someone/project/blob/main/book/01_one.ipynb",
    }


@pytest.mark.browser
def test_a_page_with_buttons_asks_no_other_host(page, browser):
    tab, asked = browser.new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri(), wait_until="networkidle")
    assert tab.locator("a[href*='mybinder']").count() == 1
    assert any("logo_binder" in url for url in asked)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_without_an_address_there_are_no_buttons(tmp_path):
    text = publish(tmp_path, "").read_text()
    assert "mybinder" not in text
    assert "colab" not in text
