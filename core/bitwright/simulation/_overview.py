"""What `print(sim)` and notebooks show: what is quantized to which types and ranges, how far it is, what comes next."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from bitwright.graph import Op, batch_norm_fold
from bitwright.grids import Encoding
from bitwright.placement import Derived, Float, Fused, SharedWith, SiteId
from bitwright.report import plan_widths
from bitwright.simulation._training import is_untaken
from bitwright.state import SimState
from bitwright.tables import Table, Value

SHOWN = 40
"""Rows of ops on a terminal; `print(sim.plan)` has all sites."""


@dataclass(frozen=True)
class Overview:
    """A simulation in words and one table.

    Attributes:
        title: model and target.
        lines: what is quantized, how far it is, what was applied.
        table: a row an op, with the types and ranges of its weight and output.
        next: what to call next.
    """

    title: str
    lines: tuple[str, ...]
    table: Table
    next: str

    def __str__(self) -> str:
        rows = self.table.rows
        left = len(rows) - SHOWN
        table = str(Table(self.table.columns, rows[:SHOWN] if left > 0 else rows))
        more = f"\n… and {left} more: print(sim.plan) has every site" if left > 0 else ""
        return "\n".join((self.title, *self.lines, "", table + more, "", f"next: {self.next}"))

    def html(self) -> str:
        """The same for a notebook, all rows."""
        told = "<br>".join(map(escape, self.lines))
        return (
            f"<div><strong>{escape(self.title)}</strong><br>{told}{self.table.html()}"
            f"<em>next: {escape(self.next)}</em></div>"
        )


def title(state: SimState) -> str:
    """Model and target in a few words."""
    backend = state.backend.name
    model = f"{state.source.name} ({backend})" if state.source is not None else f"a {backend} model"
    return f"QuantSim of {model} for target {state.target.name}"


def overview(state: SimState) -> Overview:
    """What is to be said of a state."""
    plan = state.plan
    fused = sum(isinstance(site.decision, Fused) for site in plan.values())
    floats = sum(isinstance(site.decision, Float) for site in plan.values()) - fused
    missing = _missing(state)
    wanted = len(plan.activations) + len(plan.parameters)
    others = len(plan.quantized) - wanted
    follow = f" ({others} of them by the encodings of others)" if others else ""
    held = sum(e.frozen or e.kept for e in state.encodings.values())
    lines = [
        f"{plan_widths(plan)}; {len(plan.quantized)} of {len(plan)} sites quantized{follow}, "
        + (f"{fused} fused into others, " if fused else "")
        + f"{floats} stay in float",
        f"calibrated, {wanted} encodings" + (f", {held} of them frozen or kept at later calibrations" if held else "")
        if not missing
        else f"{len(missing)} of {wanted} encodings are missing, {missing[0]!r} first",
    ]
    if state.reports:
        lines.append("applied: " + ", ".join(name for name, _ in state.reports))
    untaken, trained = is_untaken(state), "training" in state.changed_by
    if untaken:
        lines.append("the model of trainable() was trained, and not taken over yet")
    elif trained:
        lines.append("trained")
    steps = "take(), or drop_training()" if untaken else _next(state, bool(missing), trained)
    return Overview(title(state), tuple(lines), _table(state), steps)


def _missing(state: SimState) -> list[SiteId]:
    return [s for s in (*state.plan.activations, *state.plan.parameters) if s not in state.encodings]


def _next(state: SimState, missing: bool, trained: bool) -> str:
    if state.training is not None and not trained:
        return "train the model of trainable(), then take()"
    folds = sum(batch_norm_fold(state.graph, op) is not None for op in state.graph)
    norms = f"{folds} batch norm{'s' if folds > 1 else ''}"
    if missing:
        first = f"apply('fold_batch_norm'), as targets multiply with folded weights ({norms}), then " if folds else ""
        return f"{first}calibrate(data); techniques such as apply('adaround', data) go before it"
    compare = "compare predict(data) with predict(data, simulated=False), then export(folder)"
    if not folds:
        return compare
    if trained:
        return f"apply('fold_batch_norm_to_scale'), which keeps the trained grids ({norms} unfolded); then {compare}"
    return f"{norms} unfolded: apply('fold_batch_norm') and calibrate(data) again, or train with them; then {compare}"


def _table(state: SimState) -> Table:
    rows: list[tuple[Value, ...]] = [
        (tensor, "input", "", "", *_shown(state, tensor)) for tensor in state.graph.inputs if tensor in state.plan
    ]
    for op in state.graph:
        row = _row(state, op)
        if row is not None:
            rows.append(row)
    return Table(("op", "type", "weight", "range", "output", "range", ""), tuple(rows))


def _row(state: SimState, op: Op) -> tuple[Value, ...] | None:
    weight = next((p for p in (op.weight, *op.params.values()) if p is not None and p in state.plan), None)
    output = next((t for t in op.outputs if t in state.plan), None)
    if weight is None and output is None:
        return None
    of_weight = ("", "", "") if weight is None else _shown(state, weight)
    of_output = ("", "", "") if output is None else _shown(state, output)
    state_of = ", ".join(dict.fromkeys(filter(None, (of_weight[2], of_output[2]))))
    return (op.id, op.type, *of_weight[:2], *of_output[:2], state_of)


def _shown(state: SimState, site: SiteId) -> tuple[str, str, str]:
    """Type, range, and who holds the encoding."""
    row, decision = state.plan.row(site), state.plan[site].decision
    root = state.plan.root(site)
    if isinstance(end := state.plan[root].decision, Fused):
        return "fused", f"into {end.into}", ""
    if isinstance(end, Float):
        return "float", "", ""
    if isinstance(decision, Derived):
        return "int32", "", ""
    encoding = state.encodings.get(root)
    held = "" if encoding is None else "frozen" if encoding.frozen else "kept" if encoding.kept else ""
    told = row.bits + (f" {row.granularity}" if row.granularity not in ("", "per tensor") else "")
    shared = f"with {root}" if isinstance(decision, SharedWith) else _range(encoding)
    return told, shared, held


def _range(encoding: Encoding | None) -> str:
    if encoding is None:
        return "not yet"
    if not encoding.is_fixed:
        return ""
    return f"{float(encoding.minimum.min()):.4g} … {float(encoding.maximum.max()):.4g}"
