import base64
import io
import json
import re

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from PIL import Image

from hallulib import UserError
from hallulib.notebook import figures


@pytest.fixture(autouse=True)
def _style():
    template, renderer = pio.templates.default, pio.renderers.default
    figures.style()
    yield
    pio.templates.default, pio.renderers.default = template, renderer


def pixels(figure):
    """The RGBA picture in a figure of images."""
    (trace,) = figure.data
    png = base64.b64decode(trace.source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture
def shown(monkeypatch):
    """What explore displays: the list of its bundles."""
    bundles = []
    monkeypatch.setattr(figures, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture
def widgets(monkeypatch):
    """The live box of each figure that explore shows."""
    boxes, make = [], ipywidgets.VBox
    monkeypatch.setattr(
        figures.ipywidgets, "VBox", lambda *a, **k: boxes.append(make(*a, **k)) or boxes[-1]
    )
    return boxes


def line(rate=1.0, shift=0):
    return go.Figure(go.Scatter(x=[0, 1], y=[shift, rate + shift]), {"title": f"rate {rate:g}"})


def test_grey_levels_are_on_one_fixed_scale_whatever_the_images_hold():
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0, -5.0]).reshape(5, 1, 1, 1).expand(5, 1, 8, 8)
    row = pixels(figures.images(x, columns=5))[0]
    visible = row[row[:, 3] == 255][:, 0]
    assert visible.reshape(5, 8)[:, 0].tolist() == [0, 128, 255, 255, 0]


def test_the_gap_between_images_is_see_through_on_any_page_colour():
    picture = pixels(figures.images(torch.ones(4, 1, 25, 25), columns=2))
    assert picture.shape == (51, 51, 4)
    assert (picture[25, :, 3] == 0).all()
    assert (picture[:, 25, 3] == 0).all()
    assert (picture[..., 3] == 255).sum() == 4 * 25 * 25


def test_colour_images_keep_their_channels():
    x = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert pixels(figures.images(x))[0, 0].tolist() == [255, 0, 128, 255]


def test_images_are_read_row_by_row_and_an_unfinished_row_stays_empty():
    x = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    picture = pixels(figures.images(x, columns=2))
    assert [picture[0, 0, 0], picture[0, -1, 0], picture[-1, 0, 0]] == [0, 128, 255]
    assert picture[-1, -1, 3] == 0


def test_titles_name_columns_or_single_images_and_rows_have_labels():
    x = torch.zeros(4, 1, 8, 8)
    named = figures.images(x, titles=["a", "b"], rows=["r", "s"], columns=2).layout
    assert (named.xaxis.ticktext, named.yaxis.ticktext) == (("a", "b"), ("r", "s"))
    single = figures.images(x, titles=list("abcd"), columns=2).layout
    assert [note.text for note in single.annotations] == list("abcd")


def test_pixels_are_square():
    layout = figures.images(torch.zeros(2, 1, 8, 16)).layout
    assert layout.yaxis.scaleanchor == "x"
    assert layout.xaxis.range[1] - layout.xaxis.range[0] == 16 * 2 + 1


def test_the_published_form_has_a_figure_for_each_combination(shown):
    figures.explore(line, rate=("rate (1 / time)", [1.0, 2.0]), shift=[0, 1, 2])
    html = shown[0]["text/html"]
    stored = json.loads(re.search(r"explore\('[^']+', (\{.*\})\);", html)[1])
    assert sorted(stored) == [f"{i},{j}" for i in range(2) for j in range(3)]
    assert stored["1,2"]["data"][0]["y"] == [2, 4.0]


def test_the_sliders_are_labelled_and_tell_their_values(shown):
    figures.explore(line, rate=("rate <1 / time>", np.array([0.5, 2.0])))
    html = shown[0]["text/html"]
    assert "<label>rate &lt;1 / time&gt; <input type='range' min='0' max='1'" in html
    assert "aria-valuetext='0.5'" in html
    assert "<output>0.5</output>" in html


def test_no_form_of_a_figure_asks_another_host(shown):
    figures.explore(line, shift=[0, 1])
    bundle = figures.BookRenderer().to_mimebundle(line().to_plotly_json())
    for html in (shown[0]["text/html"], bundle["text/html"]):
        assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org)", html)


def test_live_sliders_recompute_at_values_that_are_in_no_grid(shown, widgets):
    figures.explore(line, rate=[1.0, 4.0], shift=[0, 10])
    rate, shift, area = widgets[0].children
    rate.value, shift.value = 2.5, 7
    drawn = area.outputs[0]["data"]["application/vnd.plotly.v1+json"]
    assert list(drawn["data"][0]["y"]) == [7, 9.5]


def test_values_that_are_no_numbers_are_chosen_from_a_list(shown, widgets):
    figures.explore(lambda scheme: line().update_layout(title=scheme), scheme=["isup", "grade2"])
    slider, area = widgets[0].children
    slider.value = "grade2"
    drawn = area.outputs[0]["data"]["application/vnd.plotly.v1+json"]
    assert drawn["layout"]["title"]["text"] == "grade2"


def test_a_view_that_refuses_a_value_says_so_below_the_slider(shown, widgets):
    def view(rate):
        if rate == 3:
            raise UserError("no model for rate 3")
        return line(rate)

    figures.explore(view, rate=[1, 4])
    slider, area = widgets[0].children
    slider.value = 3
    assert area.outputs[0]["data"] == {"text/plain": "no model for rate 3"}


def test_the_live_and_the_published_form_travel_in_one_bundle(shown):
    figures.explore(line, shift=[0, 1])
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(shown[0])


def test_a_figure_that_shares_its_layout_stores_it_once(shown):
    figures.explore(lambda y: go.Figure(go.Scatter(y=[y])), y=list(range(5)))
    assert shown[0]["text/html"].count('"colorway"') == 1
