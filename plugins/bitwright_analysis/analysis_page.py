"""`analysis.html`: one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from bitwright.report import Cell, parts
from bitwright_analysis import plots
from bitwright_analysis.records import Analysis, Distribution, Sensitivity
from bitwright_analysis.site_browser import browser, shown

NOISE = "SQNR"
STYLE = "<style>.wrap td{white-space:normal;min-width:9em}.wrap td:nth-child(n+4){min-width:18em}</style>"


def render(analysis: Analysis) -> str:
    """The whole page."""
    models = _models(analysis)
    head, script, drawn = plots.embedded(models)
    sections = [
        _overview(analysis),
        _advice(analysis),
        _sensitivities(analysis, drawn),
        _layers(analysis, drawn),
        _browser("Weights and parameters", drawn.get("parameters"), _WEIGHTS),
        _browser("Activations", drawn.get("activations"), _ACTIVATIONS),
        _imbalance(analysis, drawn),
        _accumulators(analysis, drawn),
        _hints(analysis),
        _ranges(analysis),
        _about(analysis),
    ]
    title = f"{analysis.name} on {analysis.target}: where quantization hurts"
    created = analysis.created.replace("T", " ").replace("+00:00", " UTC")
    recipe = " → ".join(analysis.recipe) or "no technique"
    return parts.page(
        title, " · ".join(filter(None, (analysis.widths, recipe, created))), [*sections, script], head=head + STYLE
    )


def _models(analysis: Analysis) -> dict[str, Any]:
    models: dict[str, Any] = {}
    sites = _in_order(analysis)
    names, kinds, details = [s.unit for s in sites], [s.kind for s in sites], [_detail(s, analysis) for s in sites]
    if any(s.alone is not None for s in sites):
        shares = [100 * s.share for s in sites]
        models["alone"] = plots.columns_by_kind(names, kinds, shares, details, label="share of the harm, %", value="%")
    if any(s.without is not None for s in sites):
        unit = "dB" if analysis.measure == NOISE else analysis.measure
        gains = [_gain(s, analysis) for s in sites]
        models["without"] = plots.columns_by_kind(names, kinds, gains, details, label=f"gain, {unit}", value=unit)
    if analysis.layers:
        models["layers"] = plots.line(
            [e.tensor for e in analysis.layers],
            [e.sqnr_db for e in analysis.layers],
            label="SQNR, dB",
            value="SQNR, dB",
            details=[f"{analysis.layer_name(e.op)} ({e.type})" for e in analysis.layers],
        )
    pairs = [i for i in analysis.imbalance if i.precision is not None]
    if pairs:
        models["imbalance"] = plots.two_columns(
            [f"{analysis.layer_name(i.op)} → {analysis.layer_name(i.follower)}" for i in pairs],
            [i.precision for i in pairs],
            [i.equalized for i in pairs],
            labels=("now", "equalized"),
            axis="range in use",
        )
    if analysis.accumulators:
        rows = analysis.accumulators
        models["accumulators"] = plots.bits_needed(
            [analysis.layer_name(r.op) for r in rows],
            [r.bits for r in rows],
            [r.any_weights for r in rows],
            [r.inputs for r in rows],
        )
    for name, found in (("parameters", analysis.parameters), ("activations", analysis.activations)):
        if found:
            models[name] = browser(
                {d.site: [_shown(d)] for d in found}, title="Weight" if name == "parameters" else "Tensor"
            )
    return models


def _in_order(analysis: Analysis) -> list[Sensitivity]:
    """Sites in the order of the network (that of ranges), layers left out."""
    order = {d.site: i for i, d in enumerate((*analysis.activations, *analysis.parameters))}
    layers = {e.op: i for i, e in enumerate(analysis.layers)}
    sites = [s for s in analysis.sensitivities if s.kind != "layer"]
    return sorted(sites, key=lambda s: (layers.get(s.op, -1), order.get(s.unit, 0)))


def _detail(s: Sensitivity, analysis: Analysis) -> str:
    text = f"{s.kind}, {s.bits}" + (f", {analysis.layer_name(s.op)} ({s.type})" if s.op else ", model input")
    unit = " dB" if analysis.measure == NOISE else ""
    return text + (f"; alone {s.alone:.4g}{unit}" if s.alone is not None else "")


def _gain(s: Sensitivity, analysis: Analysis) -> float | None:
    """What leaving a site in float gives, in the measure's own unit; None where that can't be said (no noise left)."""
    if analysis.measure != NOISE:
        return s.gain
    if s.without is None or s.gain is None:
        return None
    left = 10 ** (-s.without / 10)
    return 10 * math.log10(max(left + s.gain, 1e-30) / left)


def _shown(d: Distribution) -> dict[str, Any]:
    grid = None
    if d.grid_first is not None and d.grid_step is not None and d.grid_codes is not None:
        grid = (d.grid_first, d.grid_step, d.grid_codes)
    note = f"{d.grid}; values {d.low:.4g} to {d.high:.4g}, 99.9 % within ±{d.typical:.4g}"
    if d.grid_low is not None and d.grid_high is not None:
        note += f"; grid {d.grid_low:.4g} to {d.grid_high:.4g}, {d.clipped:.2%} clipped"
    return shown(
        first=d.first,
        width=d.width,
        counts=d.counts,
        low=d.channel_low,
        high=d.channel_high,
        unit="value" if d.unit == "value" else "steps of each channel's grid",
        note=note,
        grid=grid,
    )


# -- sections


def _overview(analysis: Analysis) -> str:
    tiles = []
    for o in analysis.overall:
        if o.score is not None:
            value = f"{o.score:.2%}" if analysis.measure == "top-1" or 0 <= o.score <= 1 else f"{o.score:.4g}"
            below = "" if o.setting == "float" else "outputs equal" if o.sqnr_db is None else f"SQNR {o.sqnr_db:.1f} dB"
        elif o.setting == "float":
            continue
        else:
            value, below = ("equal" if o.sqnr_db is None else f"{o.sqnr_db:.1f} dB"), "output SQNR"
        tiles.append(parts.tile(o.setting[0].upper() + o.setting[1:], value, below))
    told = f"<p class=verdict>{escape(analysis.verdict)}</p>" if analysis.verdict else ""
    return f'<section>{told}<div class="tiles">{"".join(tiles)}</div></section>'


def _advice(analysis: Analysis) -> str:
    if not analysis.advice:
        return ""
    return parts.section("What to do", parts.numbered(a.text for a in analysis.advice))


def _sensitivities(analysis: Analysis, drawn: dict[str, str]) -> str:
    if not analysis.sensitivities:
        return ""
    unit = "of the noise power at the output" if analysis.measure == NOISE else f"of what is lost in {analysis.measure}"
    content = ""
    if "alone" in drawn:
        caption = f"One site quantized, all else in float: its share {escape(unit)}. High is bad."
        content += parts.figure(drawn["alone"], caption)
    if "without" in drawn:
        content += parts.figure(
            drawn["without"], "All quantized but one site: what leaving it in float gives. High is bad."
        )
    columns = ("Site or layer", "Kind", "Op", "Grid", "Alone", "All but it", "Harm", "Share of harm")
    rows = [
        (
            analysis.layer_name(s.unit) if s.kind == "layer" else s.unit,
            s.kind,
            f"{analysis.layer_name(s.op)} ({s.type})" if s.op else "model input",
            s.bits,
            s.alone,
            s.without,
            s.harm,
            None if s.kind == "layer" else s.share,
        )
        for s in analysis.sensitivities
    ]
    return parts.section("Sensitivity", content + parts.table(columns, rows))


def _layers(analysis: Analysis, drawn: dict[str, str]) -> str:
    if not analysis.layers:
        return ""
    columns = ("Tensor", "Op", "Type", "SQNR dB", "Inputs dB", "Lost dB", "MSE", "Largest error", "Constant offset")
    rows = [
        (e.tensor, analysis.layer_name(e.op), e.type, e.sqnr_db, e.input_db, e.lost_db, e.mse, e.max_error, e.shift)
        for e in analysis.layers
    ]
    caption = "Each op's output in the quantized network against the float one. A gap: no error."
    return parts.section(
        "Layer by layer",
        parts.figure(drawn["layers"], caption) + parts.fold(f"{len(rows)} tensors", parts.table(columns, rows)),
    )


_WEIGHTS = (
    "Histogram of all values, and the range of each output channel. Marks at the bottom are the grid's codes, dashed "
    "lines its ends. Where channels have scales of their own, values are in steps of their channel's grid."
)
_ACTIVATIONS = "Values in the float network. Marks at the bottom are the grid's codes, dashed lines its ends."


def _browser(title: str, element: str | None, caption: str) -> str:
    return "" if element is None else parts.section(title, parts.figure(element, caption))


def _imbalance(analysis: Analysis, drawn: dict[str, str]) -> str:
    if not analysis.imbalance:
        return ""
    content = ""
    if "imbalance" in drawn:
        content = parts.figure(
            drawn["imbalance"],
            "How much of their ranges the channels of a layer and its follower use on average, now and "
            "after cross_layer_equalization; 1 is all.",
        )
    columns = (
        "Layer",
        "Widest over median channel",
        "Followed by",
        "In use",
        "Equalized",
        "Depthwise",
        "Scale a channel",
    )
    rows = [
        (
            analysis.layer_name(i.op),
            i.ratio,
            analysis.layer_name(i.follower),
            i.precision,
            i.equalized,
            i.depthwise,
            i.per_channel,
        )
        for i in analysis.imbalance
    ]
    return parts.section(
        "Imbalance between channels", content + parts.fold(f"{len(rows)} layers", parts.table(columns, rows))
    )


def _accumulators(analysis: Analysis, drawn: dict[str, str]) -> str:
    if not analysis.accumulators:
        return ""
    columns = ("Layer", "Type", "Products", "Lowest sum", "Highest sum", "Bits", "Bits for any weights", "Of int32")
    rows = [
        (analysis.layer_name(r.op), r.type, r.inputs, r.low, r.high, r.bits, r.any_weights, r.int32)
        for r in analysis.accumulators
    ]
    caption = "Signed bits that the worst input would need in each layer's accumulator."
    content = parts.figure(drawn["accumulators"], caption)
    return parts.section("Accumulators", content + parts.fold(f"{len(rows)} layers", parts.table(columns, rows)))


def _hints(analysis: Analysis) -> str:
    if not analysis.hints:
        return ""
    columns = ("Op", "Rule", "Level", "What", "Way out")
    rows = [(analysis.layer_name(h.where), h.rule, h.level, h.what, h.remedy) for h in analysis.hints]
    return parts.section("Architecture", f'<div class="wrap">{parts.table(columns, rows)}</div>')


def _ranges(analysis: Analysis) -> str:
    columns = ("Site", "Kind", "Op", "Grid", "Low", "High", "99.9 %", "Grid low", "Grid high", "Step", "Clipped")
    rows: Iterable[tuple[Cell, ...]] = [
        (
            d.site,
            d.kind,
            analysis.layer_name(d.op),
            d.grid,
            d.low,
            d.high,
            d.typical,
            d.grid_low,
            d.grid_high,
            d.step_largest,
            d.clipped,
        )
        for d in (*analysis.activations, *analysis.parameters)
    ]
    return parts.section("Ranges", parts.table(columns, rows))


def _about(analysis: Analysis) -> str:
    known = {
        "Target": analysis.target,
        "Samples": "unknown" if analysis.samples is None else str(analysis.samples),
        "Samples for sensitivities": "unknown" if analysis.sweep_samples is None else str(analysis.sweep_samples),
        "Sensitivities by": analysis.measure,
    } | {f"Time: {stage}": f"{value:.1f} s" for stage, value in analysis.seconds.items()}
    return parts.section("About", parts.fold(f"{len(known)} settings and times", parts.facts(known)))
