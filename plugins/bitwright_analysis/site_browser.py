"""One site at a time: its histogram on its grid, and the range of each channel; two over each other for a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright_analysis.plots import FIRST, INK, MARK, SECOND, blank, legend_above

CHANNELS = 1024
"""Channels that are drawn one by one; more are drawn in equal runs, each with its widest range."""

Shown = Mapping[str, Any]
"""A site as the browser's script wants it: see `shown`."""


def shown(
    *,
    first: float,
    width: float,
    counts: Sequence[int],
    low: Sequence[float],
    high: Sequence[float],
    unit: str,
    note: str,
    grid: tuple[float, float, int] | None = None,
    inner: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """What is drawn of one site.

    Args:
        first, width, counts: the histogram.
        low, high: range of each channel; empty where there are none.
        unit: of the histogram's axis.
        note: a line of text.
        grid: (first, step, codes) on the histogram's axis.
        inner: a narrower range within each channel's, such as mean ± deviation.
    """
    total = max(sum(counts), 1)
    lows, highs = _joined(low, min), _joined(high, max)
    a, b = (lows, highs) if inner is None else (_joined(inner[0], min), _joined(inner[1], max))
    lines, ends = [], []
    if grid is not None:
        start, step, codes = grid
        ends = [start - step / 2, start + (codes - 0.5) * step]
        if codes <= 256:
            lines = [_short(start + k * step) for k in range(codes)]
    return {
        "left": [_short(first + k * width) for k in range(len(counts))],
        "right": [_short(first + (k + 1) * width) for k in range(len(counts))],
        "share": [_short(c / total) for c in counts],
        "low": [_short(v) for v in lows],
        "high": [_short(v) for v in highs],
        "a": [_short(v) for v in a],
        "b": [_short(v) for v in b],
        "grid": lines,
        "ends": [_short(v) for v in ends],
        "unit": unit,
        "note": note,
    }


def _joined(values: Sequence[float], pick: Any) -> list[float]:
    run = -(-len(values) // CHANNELS) if values else 1
    return [pick(values[k : k + run]) for k in range(0, len(values), run)]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def browser(sites: Mapping[str, Sequence[Shown]], series: Sequence[str] = ("values",), *, title: str = "Site") -> Any:
    """A selector with the plots of the site that is chosen.

    Args:
        sites: by name; for each, one `shown` for each of `series`.
        series: what is drawn over each other: ("before", "after"), or one thing.
        title: of the selector.
    """
    from bokeh.layouts import column
    from bokeh.models import ColumnDataSource, CustomJS
    from bokeh.models.widgets import Div, Select

    colours = (FIRST,) if len(series) == 1 else (SECOND, FIRST)
    names = list(sites)
    chosen = sites[names[0]]
    histogram = blank(
        [("from", "@left{0.0000}"), ("to", "@right{0.0000}"), ("share", "@share{0.00 %}")], y_axis_label="share"
    )
    channels = blank(
        [("channel", "@x"), ("smallest", "@low{0.0000}"), ("largest", "@high{0.0000}")],
        y_axis_label="range of each channel",
    )
    channels.xaxis.axis_label = "channel"
    bars, ranges = [], []
    for index, (name, colour) in enumerate(zip(series, colours, strict=True)):
        bar, span = (ColumnDataSource(part) for part in _columns(chosen[index], index, len(series)))
        style = {"legend_label": name} if len(series) > 1 else {}
        histogram.quad(
            left="left",
            right="right",
            bottom=0,
            top="share",
            source=bar,
            color=colour,
            alpha=0.55 if len(series) > 1 else 0.85,
            **style,
        )
        channels.segment("at", "low", "at", "high", source=span, color=colour, line_width=1, **style)
        channels.vbar(
            "at", bottom="a", top="b", width=0.8 / len(series), source=span, color=colour, alpha=0.75, **style
        )
        bars.append(bar)
        ranges.append(span)
    grid = ColumnDataSource({"x": list(chosen[-1]["grid"])})
    ends = ColumnDataSource({"x": list(chosen[-1]["ends"])})
    histogram.ray("x", 0, length=9, length_units="screen", angle=1.5707963, source=grid, color=MARK, line_width=1)
    histogram.vspan("x", source=ends, color=MARK, line_dash="dashed", line_width=1.5)
    histogram.xaxis.axis_label = chosen[-1]["unit"]
    if len(series) > 1:
        legend_above(histogram)
        legend_above(channels)
    note = Div(text="", sizing_mode="stretch_width", styles={"color": INK, "overflow-wrap": "anywhere"})
    select = Select(
        title=title,
        value=names[0],
        options=list[Any](names),
        sizing_mode="stretch_width",
        name="site",
        stylesheets=[_SELECTOR],
    )
    update = CustomJS(
        args={
            "sites": {n: [dict(s) for s in parts] for n, parts in sites.items()},
            "bars": bars,
            "ranges": ranges,
            "grid": grid,
            "ends": ends,
            "note": note,
            "axis": histogram.xaxis[0],
        },
        code=_SWITCH,
    )
    select.js_on_change("value", update)
    # Text and not markup: names are the user's.
    note.text = _escaped(" · ".join(s["note"] for s in chosen if s["note"]))
    return column(select, note, histogram, channels, sizing_mode="stretch_width")


def _columns(part: Shown, index: int, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    numbers = list(range(len(part["low"])))
    offset = (index - (count - 1) / 2) * 0.4
    bars = {k: list(part[k]) for k in ("left", "right", "share")}
    spans = {"x": numbers, "at": [n + offset for n in numbers], **{k: list(part[k]) for k in ("low", "high", "a", "b")}}
    return bars, spans


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)


_SELECTOR = ".bk-input,.bk-input option{background-color:var(--card);color:var(--ink);border-color:var(--line)}"
"""Bokeh's own ground stays white on a dark page, whose text is light."""

_SWITCH = """
const parts = sites[cb_obj.value];
const escape = (s) => s.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
parts.forEach((part, index) => {
  bars[index].data = {left: part.left, right: part.right, share: part.share};
  const offset = (index - (parts.length - 1) / 2) * 0.4;
  const x = part.low.map((_, i) => i);
  ranges[index].data = {x: x, at: x.map((v) => v + offset), low: part.low, high: part.high, a: part.a, b: part.b};
});
const last = parts[parts.length - 1];
grid.data = {x: last.grid};
ends.data = {x: last.ends};
axis.axis_label = last.unit;
note.text = escape(parts.map((p) => p.note).filter((n) => n).join(" · "));
"""
