"""What techniques that solve one linear layer after another share: which layers, and what the results become."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.errors import InputError
from bitwright.graph import Op, OpId
from bitwright.technique import Context, LayerResult, Outcome, Report
from bitwright_techniques.bias_edits import bias_changes
from bitwright_techniques.weight_grid import is_block_of_floats

_WIDEST = 16
"""A 32-bit grid is finer than float32 weights: nothing is left to choose."""


def select_layers(
    ctx: Context[Any],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    skip_frozen: bool = False,
    floats: bool = False,
) -> tuple[list[OpId], dict[OpId, str]]:
    """Linear ops whose weight has an integer grid of its own, in topological order.

    Args:
        ctx: the technique's context.
        include, exclude: names or glob patterns of ops; nothing included means all.
        skip_frozen: leave out weights whose encoding is frozen.
        floats: take weights in blocks of floats.

    Returns:
        Names of the ops, and of the linear ops left out with the reason in words.

    Raises:
        InputError: a pattern matches no linear op.
    """
    ops = ctx.graph.linear_ops
    for pattern in (*include, *exclude):
        if not any(fnmatch.fnmatchcase(op.id, pattern) for op in ops):
            some = ", ".join(op.id for op in ops[:5]) or "none"
            raise InputError(f"{pattern!r} matches no linear layer of the model; its layers are called {some}, …")

    def listed(op: Op, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(op.id, p) for p in patterns)

    chosen: list[OpId] = []
    skipped: dict[OpId, str] = {}
    for op in ops:
        encoding = ctx.encodings.get(op.weight or "")
        reason = None
        if (include and not listed(op, include)) or listed(op, exclude):
            reason = "excluded"
        elif encoding is None:
            reason = "weight stays in float"
        elif encoding.float_format is not None and not (floats and is_block_of_floats(encoding)):
            reason = f"weight has the float format {encoding.float_format}"
        elif encoding.bits > _WIDEST:
            reason = f"{encoding.bits}-bit grid"
        elif len(ctx.graph.users(op.weight or "")) > 1:
            reason = "weight is shared with another op"
        elif skip_frozen and encoding.frozen:
            reason = f"encoding is frozen ({encoding.held_by or encoding.source or 'loaded'})"
        if reason is None:
            chosen.append(op.id)
        else:
            skipped[op.id] = reason
    return chosen, skipped


def outcome_of(ctx: Context[Any], results: Mapping[OpId, LayerResult], report: Report, *, weights: bool) -> Outcome:
    """Results of a walk as an outcome: frozen encodings, biases, and with `weights` the weights themselves.

    Layers that the walk has left keep their float weight, and the range that they had.
    """
    results = {op: r for op, r in results.items() if not r.left}
    ids = {op: ctx.graph.op(op).weight or "" for op in results}
    params, edits = bias_changes(ctx.graph, {op: r.bias for op, r in results.items() if r.bias is not None})
    if weights:
        params |= {ids[op]: r.weight for op, r in results.items()}
    encodings = {ids[op]: r.encoding for op, r in results.items()}
    return Outcome(params=params, encodings=encodings, edits=edits, report=report)


def rounding_report(
    results: Mapping[OpId, LayerResult], skipped: Mapping[OpId, str], extra: Sequence[str] = ()
) -> Report:
    """Report of a technique that rounds weights: relative output errors of each layer, and what was left out.

    Args:
        results: with figures `before`, `nearest`, `after`, `seconds`, and those in `extra`, of which the report has
            the mean.
        skipped: reasons, by op.
        extra: names of further figures.
    """
    results, skipped, told = _split(results, skipped)
    shown = ("before", "nearest", "after", *extra, "seconds")
    columns = ("layer", "error before", "error nearest", "error after", *extra, "seconds")
    rows = [(op, *(r.figures.get(c, float("nan")) for c in shown)) for op, r in results.items()]
    rows += [(op, *[reason] + [""] * (len(columns) - 2)) for op, reason in skipped.items()]
    if not results:
        return Report(f"no layer to round{told}", {}, columns, tuple(rows))

    def total(key: str) -> float:
        return float(sum(r.figures.get(key, 0.0) for r in results.values()))

    share = 100 * (1 - total("after") / total("before")) if total("before") > 0 else 0.0
    figures = {
        "layers": float(len(results)),
        **{name: total(name) / len(results) for name in extra},
        "seconds": total("seconds"),
    }
    summary = f"{len(results)} layers rounded; output error {share:.0f} % below nearest rounding{told}"
    return Report(summary, figures, columns, tuple(rows))


def search_report(
    results: Mapping[OpId, LayerResult], skipped: Mapping[OpId, str], what: str, by: str = "", note: str = ""
) -> Report:
    """Report of a technique that chooses the scales of weights: errors of each layer, and what was left out.

    Args:
        results: with figures `before`, `after`, `seconds`.
        skipped: reasons, by op.
        what: what is searched: "weight scale".
        by: by which error, if that has to be told: "output error".
        note: what the summary ends with, such as which weights are frozen, and by whom.
    """
    results, skipped, told = _split(results, skipped)
    shown, columns = ("before", "after", "seconds"), ("layer", "error before", "error after", "seconds")
    rows = [(op, *(r.figures.get(c, float("nan")) for c in shown)) for op, r in results.items()]
    rows += [(op, reason, "", "") for op, reason in skipped.items()]
    figures = {"layers": float(len(results)), "seconds": sum(r.figures.get("seconds", 0.0) for r in results.values())}
    summary = f"{len(results)} {what}s searched" + (f" by {by}" if by else "") if results else f"no {what} to search"
    return Report(summary + told + (f"; {note}" if note else ""), figures, columns, tuple(rows))


def _split(
    results: Mapping[OpId, LayerResult], skipped: Mapping[OpId, str]
) -> tuple[Mapping[OpId, LayerResult], Mapping[OpId, str], str]:
    """Solved layers, those left out with what the walk has left, and what a summary adds about the latter."""
    left = {op: r.left for op, r in results.items() if r.left}
    told = f"; left at nearest: {', '.join(left)}" if left else ""
    return {op: r for op, r in results.items() if not r.left}, {**left, **skipped}, told
