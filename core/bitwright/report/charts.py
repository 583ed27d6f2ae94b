"""Charts as inline SVG between HTML labels, so that they stretch with the page while text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 100.0


@dataclass(frozen=True)
class Axis:
    """Maps values to the height of a plot, 0 at the bottom to 100 at the top, with labelled ticks.

    Attributes:
        place: value → height.
        ticks: (value, text), rising.
        label: what the values are, with their unit.
    """

    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]
    label: str = ""


def linear_axis(low: float, high: float, unit: str = "", *, label: str = "") -> Axis:
    """A linear scale over [low, high] widened to round numbers, with about four ticks."""
    if high <= low:
        low, high = min(low, 0.0), max(high, low + 1.0, 0.0)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    start, stop = first * step, last * step
    return Axis(
        lambda v: HEIGHT * (v - start) / (stop - start),
        tuple((k * step, f"{k * step:.6g}{unit}") for k in range(first, last + 1)),
        label,
    )


def log_axis(values: Sequence[float], decades: int = 8, *, label: str = "") -> Axis:
    """A decadic scale over the positive values; what lies more than `decades` below the largest sits at the bottom."""
    positive = [v for v in values if v > 0] or [1.0]
    last = math.ceil(math.log10(max(positive)) + 1e-9)
    first = max(min(math.floor(math.log10(min(positive))), last - 1), last - decades)
    stride = max(1, round((last - first) / 4))
    return Axis(
        lambda v: HEIGHT * min(max((math.log10(v) - first) / (last - first), 0.0), 1.0) if v > 0 else 0.0,
        tuple((10.0**k, f"1e{k}" if abs(k) > 3 else f"{10.0**k:g}") for k in range(first, last + 1, stride)),
        label,
    )


def symlog_axis(values: Sequence[float], *, label: str = "") -> Axis:
    """A scale that is linear around zero and logarithmic outside, for ranges of very different widths."""
    largest = max((abs(v) for v in values), default=1.0) or 1.0
    knee = _percentile(sorted(abs(v) for v in values if v), 0.25) or largest

    def squeeze(v: float) -> float:
        return math.copysign(math.log1p(abs(v) / knee), v)

    smallest, biggest = min([*values, 0.0]), max([*values, 0.0])
    low, high = squeeze(smallest), squeeze(biggest)
    span = (high - low) or 1.0
    marks = sorted({_two_digits(v) for v in (smallest, smallest / 8, 0.0, biggest / 8, biggest)})
    spaced = [marks[0]]
    for mark in marks[1:]:
        if (squeeze(mark) - squeeze(spaced[-1])) / span > 0.08 or mark == 0.0:
            spaced.append(mark)
    return Axis(lambda v: HEIGHT * (squeeze(v) - low) / span, tuple((m, f"{m:g}") for m in spaced), label)


def bars(labels: Sequence[str], values: Sequence[float | None], axis: Axis, unit: str = "", *, across: str) -> str:
    """A column from the bottom for each value; nothing where there is none.

    Args:
        labels, values: of each column.
        axis: of the values.
        unit: behind a value, where one is pointed at.
        across: what the columns are, and in which order.
    """
    marks = []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        if value is None:
            marks.append(_hit(index, f"{label}: exact"))
            continue
        top = axis.place(value)
        title = f"{label}: {value:.4g}{unit}"
        marks.append(_column(index, 0.0, top, "first") + _hit(index, title))
    return _plot(axis, marks, len(labels), across)


def ranges(
    labels: Sequence[str],
    lows: Sequence[float],
    highs: Sequence[float],
    axis: Axis,
    middles: Sequence[float] | None = None,
    *,
    across: str,
) -> str:
    """A floating column from low to high for each label, with an optional mark between."""
    marks = []
    for index, (label, low, high) in enumerate(zip(labels, lows, highs, strict=True)):
        mark = _column(index, axis.place(low), axis.place(high), "first")
        title = f"{label}: {low:.4g} to {high:.4g}"
        if middles is not None:
            middle = axis.place(middles[index])
            mark += _column(index, middle - 0.8, middle + 0.8, "mark")
            title += f", median {middles[index]:.4g}"
        marks.append(mark + _hit(index, title))
    return _plot(axis, marks, len(labels), across)


def pairs(
    labels: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    axis: Axis,
    called: tuple[str, str] = ("before", "after"),
    *,
    across: str,
) -> str:
    """Two columns side by side for each label."""
    marks = []
    for index, (label, old, new) in enumerate(zip(labels, before, after, strict=True)):
        mark = _column(index, 0.0, axis.place(old), "second", left=0.08, width=0.4)
        mark += _column(index, 0.0, axis.place(new), "first", left=0.52, width=0.4)
        marks.append(mark + _hit(index, f"{label}: {old:.4g} {called[0]}, {new:.4g} {called[1]}"))
    return _plot(axis, marks, len(labels), across)


def _column(index: int, bottom: float, top: float, kind: str, *, left: float = 0.12, width: float = 0.76) -> str:
    low, high = sorted((bottom, top))
    height = max(high - low, 0.6)
    x, y = index + left, HEIGHT - low - height
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{width}" height="{height:.2f}"/>'


def _hit(index: int, title: str) -> str:
    """An invisible full-height column that carries the tooltip, so that small bars can be pointed at."""
    return f'<rect class="hit" x="{index}" y="0" width="1" height="{HEIGHT:g}"><title>{escape(title)}</title></rect>'


def _plot(axis: Axis, marks: Sequence[str], count: int, across: str) -> str:
    width = max(count, 8)
    lines = "".join(
        f'<line x1="0" x2="{width}" y1="{HEIGHT - axis.place(v):.2f}" y2="{HEIGHT - axis.place(v):.2f}"/>'
        for v, _ in axis.ticks
    )
    texts = "".join(f'<span style="bottom:{axis.place(v):.2f}%">{escape(text)}</span>' for v, text in _apart(axis))
    return (
        f"<p class=axis>{escape(axis.label)}</p>"
        f'<div class="plot"><div class="ticks" aria-hidden="true">{texts}</div>'
        f'<svg viewBox="0 0 {width} {HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="Chart of {count} values, described below">'
        f'<g class="grid">{lines}</g>{"".join(marks)}</svg></div>'
        f'<p class="axis across">{escape(across)}</p>'
    )


def _apart(axis: Axis) -> list[tuple[float, str]]:
    """The ticks whose labels don't overlap."""
    kept: list[tuple[float, str]] = []
    for tick in axis.ticks:
        if not kept or axis.place(tick[0]) - axis.place(kept[-1][0]) >= 9:
            kept.append(tick)
    return kept


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0
