"""One look for all figures, and one call for a figure that is live and in the published page."""

import ast
import base64
import inspect
import io
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

    Args:
        x: grey or colour images in [-1, 1], read row by row.
        titles: one for each column, or one for each image.
        rows: one label for each row.
        columns: images in a row; by default at most 8.
        cell: height of an image in CSS pixels; by default as large as fits a page, at most 160.

    Example:
        >>> figure = images(torch.zeros(4, 1, 8, 8), titles=["a", "b"], columns=2)
        >>> figure.layout.xaxis.ticktext
        ('a', 'b')
    """
    n, _, height, width = x.shape
    columns = min(columns or 8, n)
    cell = cell or min(160, round(640 / columns * height / width))
    captions = titles if titles is not None and len(titles) != columns else None
    gap = max(1, round(0.04 * width))  # pixels between two images
    line = height + (gap if captions is None else math.ceil(24 / cell * height))
    mosaic = _mosaic(x, columns, line, width + gap, captions is not None)
    figure = go.Figure(go.Image(source=_png(mosaic), hoverinfo="skip", zsmooth=False))
    centres = [(i + 0.5) * width + i * gap for i in range(columns)]
    middles = [height / 2 + i * line for i in range(math.ceil(n / columns))]
    _axes(figure, mosaic.shape, (centres, titles if captions is None else None), (middles, rows))
    for i, caption in enumerate(captions or ()):
        x_, y_ = centres[i % columns], i // columns * line + height
        figure.add_annotation(x=x_, y=y_, text=caption, showarrow=False, yanchor="top", yshift=2)
    frame = 48 if titles else 24
    full = round(cell / height * mosaic.shape[0]) + frame
    # the published page takes less height where it is narrow
    meta = {"height": full, "frame": frame, "aspect": mosaic.shape[0] / mosaic.shape[1]}
    figure.update_layout(height=full, meta=meta)
    return figure


def explore(view: Callable[..., go.Figure], /, **grid: Any) -> None:
    """Show ``view(**values)`` with one slider for each parameter, live and in the published page.

    In a notebook the sliders are widgets that call ``view`` with any number between the ends of
    the grid. In the published page they choose among the figures computed here, one for each
    combination of the grid's values; no kernel and no network are needed.

    Args:
        view: draws the figure for one value of each parameter.
        **grid: for each parameter its values, the first shown first, or ``(label, values)`` with
            a label for the reader that carries the unit: ``t=("time t", [0, 0.25, 0.5])``.
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


def _mosaic(x, columns, line, step, captions):
    """All images in one RGBA array (pixels, pixels, 4), see-through between the images."""
    levels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    n, _, height, width = x.shape
    n_rows = math.ceil(n / columns)
    solid = torch.cat([levels.expand(n, 3, -1, -1), torch.full_like(levels[:, :1], 255)], 1)
    below, beside, missing = line - height, step - width, n_rows * columns - n
    tiles = torch.nn.functional.pad(solid, (0, beside, 0, below, 0, 0, 0, missing))
    tiles = tiles.unflatten(0, (n_rows, columns)).permute(0, 3, 1, 4, 2)
    mosaic = tiles.reshape(n_rows * line, columns * step, 4)
    # the lowest images have captions too
    return mosaic[: len(mosaic) - (0 if captions else below), : columns * step - beside].numpy()


def _png(pixels):
    """A PNG holds images in a tenth of the space of the same numbers as JSON."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _axes(figure, shape, columns, rows):
    height, width, _ = shape
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
    low, high = min(values), max(values)
    if kinds == {int}:
        return ipywidgets.IntSlider(values[0], low, high, **look)
    step = (high - low) / 100 or 1.0
    look |= {"min": low, "max": high, "step": step, "readout_format": ".4g"}
    return ipywidgets.FloatSlider(values[0], **look)


def _published(labels, values, figures):
    """Range inputs and all figures; explore.js of the book connects them."""
    uid = "explore-" + uuid.uuid4().hex
    inputs = "".join(
        f"<label>{escape(labels[name])} "
        f"<input type='range' min='0' max='{len(v) - 1}' value='0' autocomplete='off'"
        f" aria-controls='{uid}' aria-valuetext='{escape(_text(v[0]), quote=True)}'"
        f" data-values='{escape(json.dumps([_text(value) for value in v]), quote=True)}'>"
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
