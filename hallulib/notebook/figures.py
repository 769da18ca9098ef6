"""One look for all figures, and one call for a figure that is live and in the published page."""

import ast
import inspect
import itertools
import json
import math
import textwrap
import uuid
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import plotly.io as pio
import torch
from IPython.display import Markdown, display
from PIL import Image
from plotly.io.base_renderers import PlotlyRenderer
from plotly.io.json import to_json_plotly

from hallulib import UserError
from hallulib.shapes import Images

# The modebar of Plotly offers to upload the figure: not with patients' images.
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False}
# Okabe and Ito's colours without the yellow that vanishes on white: told apart by all readers.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
INK, RULE = "#6F6F6F", "rgba(128, 128, 128, 0.3)"  # both read on white and on black


class BookRenderer(PlotlyRenderer):
    """A figure as JSON for live front ends and as HTML for the published page."""

    def to_mimebundle(self, fig_dict):
        """Both forms; the HTML asks no other host for plotly.js."""
        return super().to_mimebundle(fig_dict) | {"text/html": _html(fig_dict)}


def listing(*functions: Callable) -> None:
    """Show functions of the library as they stand there, without their docstrings."""
    for function in functions:
        code = textwrap.dedent(inspect.getsource(function))
        tree = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef))
        lines, first = code.splitlines(), tree.body[0]
        if ast.get_docstring(tree) is not None:
            del lines[first.lineno - 1 : first.end_lineno]
        place = function.__module__.replace(".", "/") + ".py"
        # apart, so that a phone can break the line
        told = [f"`{function.__qualname__}` in `{place}`:", "", "```python", *lines, "```"]
        display(Markdown("\n".join(told)))


def style() -> None:
    """Give all figures of this notebook one look; call it once, at the top of a chapter."""
    axis = {"gridcolor": RULE, "linecolor": INK, "zeroline": False, "automargin": True}
    pio.templates["book"] = go.layout.Template(
        layout={
            "colorway": COLOURS,
            "font": {"color": INK, "size": 14},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            # room for a title, and below it the legend
            "title": {"x": 0.01, "y": 0.98, "yanchor": "top", "font": {"size": 16}},
            "margin": {"l": 48, "r": 12, "t": 60, "b": 44},
            "height": 380,
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            # a finger that scrolls the page must not zoom the figure
            "dragmode": False,
        }
    )
    pio.templates.default = "book"
    pio.renderers["book"] = BookRenderer(config=CONFIG)
    pio.renderers.default = "book"


def images(
    x: Images,
    titles: Sequence[str] | None = None,
    *,
    rows: Sequence[str] | None = None,
    columns: int | None = None,
    cell: int | None = None,
) -> go.Figure:
    """A grid of images on one fixed scale: -1 black, 1 white, beyond that cut off.

    The images, grey or colour, are read row by row. There is a title for each column or for each
    image, and one label for each of the ``rows``. A row has so many ``columns``, by default at
    most 8; a ``cell`` is so many CSS pixels high, by default as large as fits a page, at most 160.
    """
    n, _, height, width = x.shape
    columns = min(columns or 8, n)
    cell = cell or min(160, round(640 / columns * height / width))
    captions = titles if titles is not None and len(titles) != columns else None
    gap = max(1, round(0.04 * width))  # pixels between two images
    below = gap if captions is None else math.ceil(24 / cell * height)
    # the lowest images have captions too
    mosaic = _mosaic(x, columns, gap, below)[: -below if captions is None else None, :-gap]
    full = mosaic.shape[:2]
    # a PNG, in a tenth of the space of the same numbers as JSON
    source = go.layout.Image(source=Image.fromarray(mosaic.numpy())).source
    figure = go.Figure(go.Image(source=source, hoverinfo="skip", zsmooth=False))
    centres = [i * (width + gap) + width / 2 for i in range(columns)]
    tops = range(0, full[0], height + below)
    middles = [top + height / 2 for top in tops]
    _axes(figure, full, (centres, titles if captions is None else None), (middles, rows))
    for (top, x_), caption in zip(itertools.product(tops, centres), captions or (), strict=False):
        place = {"x": x_, "y": top + height, "yanchor": "top", "yshift": 2}
        figure.add_annotation(text=caption, showarrow=False, **place)
    frame = 48 if titles else 24
    tall = round(cell / height * full[0]) + frame
    # the published page takes less height where it is narrow
    meta = {"height": tall, "frame": frame, "aspect": full[0] / full[1]}
    figure.update_layout(height=tall, meta=meta)
    return figure


def explore(view: Callable[..., go.Figure], /, **grid: Any) -> None:
    """Show ``view(**values)`` with one slider for each parameter, live and in the published page.

    In a notebook the sliders are widgets that call ``view`` with any number between the ends of
    the grid. In the published page they choose among the figures of all combinations, computed
    here; no kernel and no network are needed. The ``grid`` gives for each parameter its values,
    the first shown first, or ``(label, values)`` with a label for the reader that carries the
    unit: ``t=("time t", [0, 0.25, 0.5])``.
    """
    entries = {n: entry if isinstance(entry, tuple) else (n, entry) for n, entry in grid.items()}
    labels = {name: label for name, (label, _) in entries.items()}
    # NumPy and torch scalars become Python's, which JSON can hold
    values = {n: [v.item() if hasattr(v, "item") else v for v in e[1]] for n, e in entries.items()}
    figures = {}
    for numbered in itertools.product(*map(enumerate, values.values())):
        chosen = {name: value for name, (_, value) in zip(values, numbered, strict=True)}
        figures[",".join(str(i) for i, _ in numbered)] = view(**chosen).to_plotly_json()
    live = _live(view, labels, values, next(iter(figures.values())))
    published = {"text/html": _published(labels, values, figures)}
    display(live._repr_mimebundle_() | published, raw=True)


def _html(figure, **options):
    # no script of the figure's own: the page loads plotly.js once, from the book itself
    whole = {"include_plotlyjs": False, "full_html": False, "validate": False}
    return pio.to_html(figure, config=CONFIG, **whole, **options)


def _mosaic(x, columns, gap, below):
    """All images in one RGBA tensor (pixels, pixels, 4), see-through right of and below each."""
    levels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    tiles = torch.cat([levels.expand(-1, 3, -1, -1), torch.full_like(levels[:, :1], 255)], 1)
    padding = (0, gap, 0, below, 0, 0, 0, -len(x) % columns)
    rows = torch.nn.functional.pad(tiles, padding).unflatten(0, (-1, columns))
    return rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def _axes(figure, shape, columns, rows):
    height, width = shape
    plain = {"showgrid": False, "showline": False, "ticks": "", "constrain": "domain"}
    across = {"range": [-0.5, width - 0.5], "side": "top", "constraintoward": "center"}
    down = {"range": [height - 0.5, -0.5], "scaleanchor": "x", "constraintoward": "top"}
    for axis, (places, labels), look in [("xaxis", columns, across), ("yaxis", rows, down)]:
        told = {"tickvals": places, "ticktext": labels, "showticklabels": labels is not None}
        figure.layout[axis].update(told | plain | look)
    figure.update_layout(margin={"l": 12, "r": 12, "t": 12, "b": 12})


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _live(view, labels, values, first):
    """The sliders as widgets above an area that shows ``view`` of their values."""
    area = ipywidgets.Output()
    sliders = {name: _slider(labels[name], v) for name, v in values.items()}

    # Outputs are assigned, never captured (`with area:`, interact): nbclient may hang on those.
    def show(data):
        area.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def redraw(_):
        try:
            figure = view(**{name: slider.value for name, slider in sliders.items()})
        except UserError as error:
            return show({"text/plain": str(error)})
        show(PlotlyRenderer(config=CONFIG).to_mimebundle(figure.to_plotly_json()))

    show(PlotlyRenderer(config=CONFIG).to_mimebundle(first))
    for slider in sliders.values():
        slider.observe(redraw, "value")
    return ipywidgets.VBox([*sliders.values(), area])


def _slider(label, values):
    look = {
        "description": label,
        "continuous_update": False,
        "style": {"description_width": "initial"},
        "layout": ipywidgets.Layout(width="min(100%, 32rem)"),
    }
    kinds = {type(value) for value in values}
    if not kinds <= {int, float}:
        return ipywidgets.SelectionSlider(options=[(_text(v), v) for v in values], **look)
    look |= {"value": values[0], "min": min(values), "max": max(values)}
    if kinds == {int}:
        return ipywidgets.IntSlider(**look)
    step = (look["max"] - look["min"]) / 100 or 1.0
    return ipywidgets.FloatSlider(step=step, readout_format=".4g", **look)


def _published(labels, values, figures):
    """Range inputs and all figures; explore.js of the book connects them."""
    uid = "explore-" + uuid.uuid4().hex
    inputs = "".join(
        f"<label>{escape(labels[name])} "
        f"<input type='range' min='0' max='{len(v) - 1}' value='0' autocomplete='off'"
        f" aria-controls='{uid}' aria-valuetext='{escape(_text(v[0]))}'"
        f" data-values='{escape(json.dumps([_text(value) for value in v]))}'>"
        f" <output>{escape(_text(v[0]))}</output></label>"
        for name, v in values.items()
    )
    first = next(iter(figures.values()))
    # A layout that all figures share is stored once: it holds the whole template.
    stored = {
        key: {k: part for k, part in figure.items() if k == "data" or part != first[k]}
        for key, figure in figures.items()
    }
    script = f"explore('{uid}', {to_json_plotly(stored)});"
    return (
        f"<div class='explore' id='{uid}-controls' role='group' aria-label='Sliders'>"
        f"{inputs}</div>" + _html(first, div_id=uid, post_script=script)
    )
