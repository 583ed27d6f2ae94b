"""Two plots for the searches' pages: scores as rows of dots between reference lines, and a front of cost and score.

HTML and SVG alone, so that they print, open offline and fit a phone; the SVG stretches and its strokes don't.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from bitwright.report import HEIGHT, Axis, linear_axis

STYLE = f"<style>{resources.files('bitwright_search').joinpath('figures.css').read_text(encoding='utf-8')}</style>"
"""What the plots need beside the report's own style."""


@dataclass(frozen=True)
class Dot:
    """One row: a label, a value, how it reads, and how it is drawn ("first", "second" or "mark")."""

    label: str
    value: float
    shown: str
    kind: str = "second"


@dataclass(frozen=True)
class Rule:
    """A line through all rows at a value."""

    label: str
    value: float
    solid: bool = False


def dots(rows: Sequence[Dot], rules: Sequence[Rule], *, label: str) -> str:
    """A row for each value on one common axis, whose label says what they are."""
    values = [r.value for r in rows] + [r.value for r in rules]
    axis = linear_axis(min(values), max(values))
    lines = "".join(
        f'<i class="rule{" solid" if r.solid else ""}" style="left:{axis.place(r.value):.2f}%" '
        f'title="{escape(r.label)}"></i>'
        for r in rules
    )
    cells = [
        f'<span class=label>{escape(r.label)}</span><span class=lane>{lines}<i class="dot {r.kind}" '
        f'style="left:{axis.place(r.value):.2f}%" title="{escape(r.label)}: {escape(r.shown)}"></i></span>'
        f"<span class=value>{escape(r.shown)}</span>"
        for r in rows
    ]
    return (
        f'<div class="dots" role="img" aria-label="{escape(label)} of {len(rows)} stages, told in the table below">'
        f"{''.join(cells)}<span></span>{_ticks(axis, 'scale')}<span></span>"
        f"<span></span><span class=axis>{escape(label)}</span><span></span></div>"
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """What the marks mean: (kind, text); kind "line" and "line solid" are rules, others dots."""
    return '<span class="legend">' + "".join(
        f'<span><i class="{escape(kind if kind.startswith("line") else "dot " + kind)}"></i>{escape(text)}</span>'
        for kind, text in entries
    ) + "</span>"  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A point of a front."""

    x: float
    y: float
    title: str
    kind: str = "second"


def front(
    spots: Sequence[Spot],
    *,
    labels: tuple[str, str],
    levels: Sequence[float] = (),
    trace: Sequence[tuple[float, float]] = (),
) -> str:
    """Points over two linear axes, with horizontal lines at `levels` and a line through `trace`.

    Args:
        spots: the points.
        labels: what lies across and what upwards, with units.
        levels: heights.
        trace: points of a line, from left to right.
    """
    xs = [s.x for s in spots] + [x for x, _ in trace]
    ys = [s.y for s in spots] + [y for _, y in trace] + list(levels)
    across, up = linear_axis(min(xs), max(xs)), linear_axis(min(ys), max(ys))

    def at(x: float, y: float) -> str:
        return f"{across.place(x):.2f} {HEIGHT - up.place(y):.2f}"

    grid = "".join(
        f'<line x1="0" x2="100" y1="{HEIGHT - up.place(v):.2f}" y2="{HEIGHT - up.place(v):.2f}"/>' for v, _ in up.ticks
    )
    parts = [f'<path class="level" d="M{at(across.ticks[0][0], v)}H100"/>' for v in levels]
    if len(trace) > 1:
        parts.append(f'<path class="trace" d="M{"L".join(at(x, y) for x, y in trace)}"/>')
    # A line of no length with round ends is a circle that stays one when the plot is stretched.
    parts += [
        f'<path class="spot {s.kind}" d="M{at(s.x, s.y)}h0.001"><title>{escape(s.title)}</title></path>' for s in spots
    ]
    texts = "".join(f'<span style="bottom:{up.place(v):.2f}%">{escape(t)}</span>' for v, t in up.ticks)
    return (
        f"<p class=axis>{escape(labels[1])}</p>"
        f'<div class="front"><div class="plot"><div class="ticks" aria-hidden="true">{texts}</div>'
        f'<svg viewBox="0 0 100 {HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(labels[1])} over {escape(labels[0])}"><g class="grid">{grid}</g>'
        f"{''.join(parts)}</svg></div>{_ticks(across, 'below')}</div>"
        f'<p class="axis across">{escape(labels[0])}</p>'
    )


def _ticks(axis: Axis, kind: str) -> str:
    """The ticks below a plot; at most five, so that they don't collide on a phone."""
    stride = -(-len(axis.ticks) // 5)
    shown = [t for i, t in enumerate(axis.ticks) if (len(axis.ticks) - 1 - i) % stride == 0]
    spans = "".join(f'<span style="left:{axis.place(v):.2f}%">{escape(t)}</span>' for v, t in shown)
    return f'<span class="{kind}" aria-hidden="true">{spans}</span>'
