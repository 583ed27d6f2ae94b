"""Interactive plots, by Bokeh: hover names everything, drag zooms. Imported only when a page is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.errors import MissingExtraError

FIRST, SECOND, MARK, INK, GRID = "#3d7cc2", "#a0a6ad", "#e8962e", "#7d838b", "rgba(128,128,128,0.22)"
KINDS = {"weight": "#3d7cc2", "parameter": "#7f5fb5", "activation": "#e8962e", "layer": "#4f9d69"}
HEIGHT = 280


def require_bokeh() -> None:
    """Say what to install where Bokeh isn't.

    Raises:
        MissingExtraError: it isn't.
    """
    from importlib.util import find_spec

    if find_spec("bokeh") is None:
        raise MissingExtraError('pages need Bokeh: pip install "bitwright[report]"')


def embedded(models: Mapping[str, Any]) -> tuple[str, str, dict[str, str]]:
    """(head, script, element of each plot) for a page that opens offline: Bokeh's own scripts are inside."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, parts = components(dict(models), wrap_script=True)
    # Only what is used: the whole of Bokeh is three times as large.
    resources = Resources(mode="inline", components=["bokeh", "bokeh-widgets"])
    return resources.render(), script, parts


def blank(tooltips: Sequence[tuple[str, str]], **options: Any) -> Any:
    """An empty plot that stretches with the page and is legible on light and dark ground."""
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    plot = figure(
        height=options.pop("height", HEIGHT),
        sizing_mode="stretch_width",
        tools="pan,box_zoom,reset,save",
        toolbar_location="above",
        min_width=200,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.add_tools(HoverTool(tooltips=list(tooltips), mode="mouse"))
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_color = axis.major_tick_line_color = GRID
        axis.minor_tick_line_color = None
    for grid in (*plot.xgrid, *plot.ygrid):
        grid.grid_line_color = GRID
    return plot


def columns_by_kind(
    names: Sequence[str],
    kinds: Sequence[str],
    values: Sequence[float | None],
    details: Sequence[str],
    *,
    label: str,
    value: str,
) -> Any:
    """A column for each name in order, coloured by kind; None has no column."""
    from bokeh.models import ColumnDataSource

    plot = blank([("", "@name"), ("", "@detail"), (value, "@value{0.0[00]}")], y_axis_label=label)
    for kind in dict.fromkeys(kinds):
        rows = [
            (i, n, v, d)
            for i, (n, k, v, d) in enumerate(zip(names, kinds, values, details, strict=True))
            if k == kind and v is not None
        ]
        source = ColumnDataSource(
            {
                "x": [r[0] for r in rows],
                "name": [r[1] for r in rows],
                "value": [r[2] for r in rows],
                "detail": [r[3] for r in rows],
            }
        )
        colour = KINDS.get(kind, FIRST)
        plot.vbar("x", top="value", width=0.8, source=source, color=colour, legend_label=kind)
    _order(plot, len(names))
    legend_above(plot)
    return plot


def two_columns(
    names: Sequence[str],
    first: Sequence[float | None],
    second: Sequence[float | None],
    *,
    labels: tuple[str, str],
    axis: str,
) -> Any:
    """Two columns side by side for each name."""
    from bokeh.models import ColumnDataSource

    plot = blank([("", "@name"), (labels[0], "@a{0.0[00]}"), (labels[1], "@b{0.0[00]}")], y_axis_label=axis)
    nan = float("nan")
    source = ColumnDataSource(
        {
            "l": [i - 0.2 for i in range(len(names))],
            "r": [i + 0.2 for i in range(len(names))],
            "name": list(names),
            "a": [nan if v is None else v for v in first],
            "b": [nan if v is None else v for v in second],
        }
    )
    plot.vbar("l", top="a", width=0.38, source=source, color=SECOND, legend_label=labels[0])
    plot.vbar("r", top="b", width=0.38, source=source, color=FIRST, legend_label=labels[1])
    _order(plot, len(names))
    legend_above(plot)
    return plot


def line(
    names: Sequence[str], values: Sequence[float | None], *, label: str, value: str, details: Sequence[str]
) -> Any:
    """A line through the network, with a point for each name."""
    from bokeh.models import ColumnDataSource

    plot = blank([("", "@name"), ("", "@detail"), (value, "@value{0.0[0]}")], y_axis_label=label)
    source = ColumnDataSource(
        {
            "x": list(range(len(names))),
            "name": list(names),
            "detail": list(details),
            "value": [float("nan") if v is None else v for v in values],
        }
    )
    plot.line("x", "value", source=source, color=FIRST, line_width=1.5)
    plot.scatter("x", "value", source=source, color=FIRST, size=7)
    _order(plot, len(names))
    return plot


def bits_needed(names: Sequence[str], bits: Sequence[int], any_weights: Sequence[int], products: Sequence[int]) -> Any:
    """Accumulator widths, with lines at those that hardware has."""
    from bokeh.models.annotations import Span
    from bokeh.models.sources import ColumnDataSource

    plot = blank(
        [("", "@name"), ("bits needed", "@bits"), ("for any weights", "@any"), ("products", "@k")], y_axis_label="bits"
    )
    source = ColumnDataSource(
        {
            "x": list(range(len(names))),
            "name": list(names),
            "bits": list(bits),
            "any": list(any_weights),
            "k": list(products),
        }
    )
    plot.vbar("x", top="bits", width=0.8, source=source, color=FIRST, legend_label="these weights")
    plot.scatter(
        "x", "any", source=source, color=MARK, marker="dash", size=12, line_width=2, legend_label="any weights"
    )
    for width in (16, 24, 32):
        if width <= max([*any_weights, 16]) + 8:
            plot.add_layout(Span(location=width, dimension="width", line_color=INK, line_dash="dashed", line_width=1))
    _order(plot, len(names))
    legend_above(plot)
    return plot


def _order(plot: Any, count: int) -> None:
    """Names would not fit under an axis; the hover has them."""
    from bokeh.models import Range1d

    plot.x_range = Range1d(start=-0.6, end=max(count, 6) - 0.4)
    plot.xaxis.axis_label = "in the order of the network"
    plot.xaxis.major_label_text_font_size = "0pt"
    plot.xgrid.grid_line_color = None


def legend_above(plot: Any) -> None:
    """Put the legend over the plot; a click hides a series."""
    legend = plot.legend[0] if plot.legend else None
    if legend is not None:
        legend.orientation = "horizontal"
        legend.background_fill_alpha = legend.border_line_alpha = 0
        legend.label_text_color = INK
        legend.padding = legend.margin = 0
        legend.click_policy = "hide"
        plot.add_layout(legend, "above")
