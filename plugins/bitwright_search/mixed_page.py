"""The front and the assignment of `mixed_precision` as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from bitwright.report import Cell, charts, parts
from bitwright_search.auto_page import duration, number
from bitwright_search.figures import STYLE, Spot, front, legend
from bitwright_search.mixed_result import FrontPoint, MixedPrecisionResult


def render(result: MixedPrecisionResult, title: str) -> str:
    """The whole page."""
    sections = [_overview(result), _measured(result), _predicted(result), _sensitivity(result), _assignment(result)]
    if result.notes:
        sections.append(parts.section("Notes", "".join(f"<p>{escape(note)}</p>" for note in result.notes)))
    subtitle = f"mixed precision for {result.target}, by {_unit(result)}, {result.solver} solver"
    return parts.page(title, subtitle, [s for s in sections if s], head=STYLE)


def _unit(result: MixedPrecisionResult) -> str:
    return result.cost_kind.replace("_", " ")


def _overview(result: MixedPrecisionResult) -> str:
    tiles = [
        parts.tile("Cost", f"{result.relative_cost:.1%}", "of the most precise candidate everywhere"),
        parts.tile(_unit(result).capitalize(), _amount(result.cost), f"from {_amount(result.reference_cost)}"),
    ]
    if result.score is not None and result.float_score is not None:
        drop = result.float_score - result.score
        goal = "" if result.allowed_drop is None else f", allowed {number(result.allowed_drop)}"
        tiles += [
            parts.tile("Float", number(result.float_score), "score of the model given"),
            parts.tile("Mixed", number(result.score), f"drop {number(drop)}{goal}"),
        ]
    tiles += [
        parts.tile(name, str(count), "group" if count == 1 else "groups") for name, count in _counts(result).items()
    ]
    tiles.append(parts.tile("Time", duration(result.seconds), "earlier processes included"))
    return f'<section><div class="tiles">{"".join(tiles)}</div></section>'


def _amount(value: float) -> str:
    """Three digits with a unit prefix."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""), (1e-3, " m"), (1e-6, " µ")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _counts(result: MixedPrecisionResult) -> dict[str, int]:
    chosen = list(result.assignment.values())
    return {c: chosen.count(c) for c in dict.fromkeys(chosen)}


def _measured(result: MixedPrecisionResult) -> str:
    shown = [p for p in _evaluated(result) if p.score is not None]
    if not shown:
        return ""
    spots = [
        Spot(100 * p.relative_cost, p.score or 0.0, f"{p.relative_cost:.1%}: {number(p.score or 0.0)}",
             "mark" if p.assignment == result.assignment else "first")
        for p in shown
    ]  # fmt: skip
    levels = [result.float_score] if result.float_score is not None else []
    key = [("mark", "chosen"), ("first", "evaluated"), ("second", "best score for the cost")]
    if result.float_score is not None:
        key.append(("line", f"float {number(result.float_score)}"))
        if result.allowed_drop is not None:
            levels.append(result.float_score - result.allowed_drop)
            key.append(("line", f"allowed {number(result.float_score - result.allowed_drop)}"))
    trace = [(100 * p.relative_cost, p.score or 0.0) for p in result.measured]
    plot = front(spots, levels=levels, trace=trace)
    caption = f"Score over cost in % of the reference's {escape(_unit(result))}. {legend(key)}"
    return parts.section("Cost and score", parts.figure(plot, caption))


def _evaluated(result: MixedPrecisionResult) -> list[FrontPoint]:
    seen = {tuple(p.assignment.items()): p for p in (*result.front, *result.measured)}
    return list(seen.values())


def _predicted(result: MixedPrecisionResult) -> str:
    shown = [(p, p.predicted_sqnr_db) for p in result.front if p.predicted_sqnr_db is not None]
    if len(shown) < 2:
        return ""
    spots = [
        Spot(100 * p.relative_cost, sqnr, f"{p.relative_cost:.1%}: {sqnr:.1f} dB",
             "mark" if p.assignment == result.assignment else "first")
        for p, sqnr in shown
    ]  # fmt: skip
    plot = front(spots, trace=[(100 * p.relative_cost, sqnr) for p, sqnr in shown])
    caption = f"Predicted SQNR at the outputs (dB) over cost in %. {legend([('mark', 'chosen'), ('first', 'solved')])}"
    columns = ("Cost", "Share %", "Predicted SQNR dB", "Score", "Groups")
    rows = [
        (p.cost, 100 * p.relative_cost, p.predicted_sqnr_db, p.score,
         ", ".join(f"{n} at {c}" for c, n in p.counts.items()))
        for p in result.front
    ]  # fmt: skip
    table = parts.fold(f"{len(rows)} assignments", parts.table(columns, rows))
    return parts.section("The front", parts.figure(plot, caption) + table)


def _sensitivity(result: MixedPrecisionResult) -> str:
    pieces = []
    for candidate in dict.fromkeys(s.candidate for s in result.sensitivities):
        found = [s for s in result.sensitivities if s.candidate == candidate]
        values = [s.sqnr_db for s in found]
        known = [v for v in values if v is not None]
        if not known:
            continue
        axis = charts.linear_axis(min(0.0, *known), max(known), " dB")
        plot = charts.bars([s.group for s in found], values, axis, " dB")
        pieces.append(parts.figure(plot, f"{escape(candidate)}, group by group in the order of the network"))
    note = "<p class=note>SQNR at the network's outputs with one group quantized alone: low bars are sensitive.</p>"
    return parts.section("Sensitivity", note + "".join(pieces)) if pieces else ""


def _assignment(result: MixedPrecisionResult) -> str:
    by_group: dict[str, dict[str, tuple[float | None, float]]] = {}
    for s in result.sensitivities:
        by_group.setdefault(s.group, {})[s.candidate] = (s.sqnr_db, s.cost)
    rows: list[tuple[Cell, ...]] = []
    for group, candidate in result.assignment.items():
        sqnr, cost = by_group.get(group, {}).get(candidate, (None, 0.0))
        rows.append((group, candidate, sqnr, cost))
    return parts.section("The assignment", parts.table(("Group", "Types", "SQNR alone dB", "Cost"), rows))
