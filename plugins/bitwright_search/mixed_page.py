"""The front and the assignment of `mixed_precision` as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from bitwright.report import Cell, charts, parts
from bitwright_search.auto_page import duration
from bitwright_search.figures import STYLE, Spot, front, legend
from bitwright_search.mixed_result import FrontPoint, MixedPrecisionResult, Sensitivity
from bitwright_search.scores import Scale


def render(result: MixedPrecisionResult, title: str) -> str:
    """The whole page."""
    sections = [_overview(result), _measured(result), _predicted(result), _sensitivity(result), _assignment(result)]
    if result.notes:
        sections.append(parts.section("Notes", "".join(f"<p>{escape(note)}</p>" for note in result.notes)))
    subtitle = f"mixed precision for {result.target}, by {_unit(result)}, {result.solver} solver"
    return parts.page(title, subtitle, [s for s in sections if s], head=STYLE)


def _unit(result: MixedPrecisionResult) -> str:
    return result.cost_kind.replace("_", " ")


def verdict(result: MixedPrecisionResult) -> str:
    """The whole search in a sentence or two."""
    told = f"The chosen network takes {result.relative_cost:.1%} of the most precise one's {_unit(result)}"
    if result.score is None or result.float_score is None:
        return f"{told}; its accuracy wasn't measured."
    scale, drop = Scale(result.metric), result.float_score - result.score
    change = f"loses {scale.drop(drop, result.margin)} of" if drop > 0 else "keeps"
    told += f" and {change} float's {result.metric}, {scale.text(result.float_score)}"
    if result.met:
        return f"{told}."
    allowed = "" if result.allowed_drop is None else f", {scale.drop(result.allowed_drop)} allowed"
    return f"{told}{allowed}: the goal isn't met."


def _overview(result: MixedPrecisionResult) -> str:
    scale = Scale(result.metric)
    tiles = [
        parts.tile("Cost", f"{result.relative_cost:.1%}", "of the most precise candidate everywhere"),
        parts.tile(_unit(result).capitalize(), _amount(result.cost), f"from {_amount(result.reference_cost)}"),
    ]
    if result.score is not None and result.float_score is not None:
        drop = result.float_score - result.score
        goal = "" if result.allowed_drop is None else f", allowed {scale.drop(result.allowed_drop)}"
        tiles += [
            parts.tile("Float", scale.text(result.float_score), f"{result.metric} of the model given"),
            parts.tile("Mixed", scale.text(result.score), f"drop {scale.drop(drop, result.margin)}{goal}"),
        ]
    if result.predicted_kl is not None:
        tiles.append(parts.tile("Predicted", f"{result.predicted_kl:.4g}", "nats from float, by gradients"))
    tiles += [
        parts.tile(name, str(count), "group" if count == 1 else "groups") for name, count in _counts(result).items()
    ]
    tiles.append(parts.tile("Time", duration(result.seconds), "earlier processes included"))
    told = f"<p class=verdict>{escape(verdict(result))}</p>"
    return f'<section>{told}<div class="tiles">{"".join(tiles)}</div></section>'


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
    scale = Scale(result.metric)

    def spot(p: FrontPoint, score: float) -> Spot:
        kind = "mark" if p.assignment == result.assignment else "first"
        return Spot(100 * p.relative_cost, scale.place(score), f"{p.relative_cost:.1%}: {scale.text(score)}", kind)

    levels = [] if result.float_score is None else [result.float_score]
    key = [("mark", "chosen"), ("first", "evaluated"), ("second", f"best {result.metric} for the cost")]
    if result.float_score is not None:
        key.append(("line", f"float {scale.text(result.float_score)}"))
        if result.allowed_drop is not None:
            levels.append(result.float_score - result.allowed_drop)
            key.append(("line", f"allowed {scale.text(levels[-1])}"))
    plot = front(
        [spot(p, p.score) for p in shown if p.score is not None],
        labels=(_cost(result), scale.label),
        levels=[scale.place(v) for v in levels],
        trace=[(100 * p.relative_cost, scale.place(p.score)) for p in result.measured if p.score is not None],
    )
    return parts.section(f"Cost and {result.metric}", parts.figure(plot, legend(key)))


def _cost(result: MixedPrecisionResult) -> str:
    return f"{_unit(result)}, % of the most precise candidate everywhere"


def _evaluated(result: MixedPrecisionResult) -> list[FrontPoint]:
    seen = {tuple(p.assignment.items()): p for p in (*result.front, *result.measured)}
    return list(seen.values())


def _predicted(result: MixedPrecisionResult) -> str:
    nats = result.predicted_kl is not None
    found = [(p, p.predicted_kl if nats else p.predicted_sqnr_db) for p in result.front]
    shown = [(p, value) for p, value in found if value is not None]
    if len(shown) < 2:
        return ""
    what = "predicted divergence, nats" if nats else "predicted SQNR at the outputs, dB"

    def spot(p: FrontPoint, value: float) -> Spot:
        told = f"{value:.4g} nats" if nats else f"{value:.1f} dB"
        kind = "mark" if p.assignment == result.assignment else "first"
        return Spot(100 * p.relative_cost, value, f"{p.relative_cost:.1%}: {told}", kind)

    scale = Scale(result.metric)
    trace = [(100 * p.relative_cost, value) for p, value in shown]
    plot = front([spot(p, value) for p, value in shown], labels=(_cost(result), what), trace=trace)
    caption = legend([("mark", "chosen"), ("first", "solved")])
    columns = ("Cost", "Share %", "Predicted divergence" if nats else "Predicted SQNR dB", scale.label, "Groups")
    rows = [
        (p.cost, 100 * p.relative_cost, value, None if p.score is None else scale.place(p.score),
         ", ".join(f"{n} at {c}" for c, n in p.counts.items()))
        for p, value in found
    ]  # fmt: skip
    table = parts.fold(f"{len(rows)} assignments", parts.table(columns, rows))
    return parts.section("The front", parts.figure(plot, caption) + table)


def _alone(s: Sensitivity) -> float | None:
    return s.sqnr_db if s.kl is None else s.kl


def _sensitivity(result: MixedPrecisionResult) -> str:
    nats = result.predicted_kl is not None
    unit, label = (" nats", "divergence, nats") if nats else (" dB", "SQNR at the outputs, dB")
    pieces = []
    for candidate in dict.fromkeys(s.candidate for s in result.sensitivities):
        found = [s for s in result.sensitivities if s.candidate == candidate]
        values = [_alone(s) for s in found]
        known = [v for v in values if v is not None]
        if not known:
            continue
        axis = charts.linear_axis(min(0.0, *known), max(known), unit, label=label)
        names = [result.sim.graph.layer_name(s.group) for s in found]
        plot = charts.bars(names, values, axis, unit, across="groups, from input to output")
        pieces.append(parts.figure(plot, f"Each group alone at {escape(candidate)}."))
    told = (
        "Divergence from float with one group quantized alone, as gradients predict it: high bars are sensitive."
        if nats
        else "SQNR at the network's outputs with one group quantized alone: low bars are sensitive."
    )
    note = f"<p class=note>{told}</p>"
    return parts.section("Sensitivity", note + "".join(pieces)) if pieces else ""


def _assignment(result: MixedPrecisionResult) -> str:
    by_group: dict[str, dict[str, tuple[float | None, float]]] = {}
    for s in result.sensitivities:
        by_group.setdefault(s.group, {})[s.candidate] = (_alone(s), s.cost)
    rows: list[tuple[Cell, ...]] = []
    for group, candidate in result.assignment.items():
        value, cost = by_group.get(group, {}).get(candidate, (None, 0.0))
        rows.append((result.sim.graph.layer_name(group), group, candidate, value, cost))
    alone = "Nats alone" if result.predicted_kl is not None else "SQNR alone dB"
    return parts.section("The assignment", parts.table(("Layer", "Group", "Types", alone, "Cost"), rows))
