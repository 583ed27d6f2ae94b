"""One HTML file that needs nothing else: styles, script and charts are inside; every value is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bitwright.report import charts
from bitwright.report._model import Cell, LayerRow, RunReport, SiteRow, StepRecord
from bitwright.report._widths import widths
from bitwright.report.parts import facts, figure, fold, page, section, table, text, tile
from bitwright.tables import size

LAYERS = "layers, from input to output"
"""What stands below a chart of layers."""


def render(report: RunReport) -> str:
    """The whole page."""
    sections = [
        _overview(report),
        *(_step(number, _in_own_names(step, report)) for number, step in enumerate(report.steps, 1)),
        _weights(report.layers),
        _activations(report.sites),
        _sites(report.sites),
        _about(report),
    ]
    return page(f"{report.name} on {report.target}", _subtitle(report), sections)


def _subtitle(report: RunReport) -> str:
    steps = " → ".join(step.technique for step in report.steps) or "no technique"
    when = report.created.replace("T", " ").replace("+00:00", " UTC")
    return f"{report.model.source} · {run_widths(report)} · {steps} · {when}"


def run_widths(report: RunReport) -> str:
    """The types of a run's weights and activations."""
    return widths((s.kind, s.detail.split(" ")[0].rstrip(",")) for s in report.sites if s.decision == "quantized")


# -- sections


def _overview(report: RunReport) -> str:
    tiles = []
    if report.accuracy:
        points = 100 * (report.accuracy.simulated - report.accuracy.float_model)
        tiles += [
            tile("Float top-1", f"{report.accuracy.float_model:.2%}", f"{report.accuracy.samples} samples"),
            tile("Simulated top-1", f"{report.accuracy.simulated:.2%}", f"{points:+.2f} points"),
        ]
        if report.accuracy.agreement is not None:
            tiles.append(tile("Same class", f"{report.accuracy.agreement:.2%}", "simulation and float"))
    for metric in report.metrics:
        beside = f"float {metric.float_model:.4g}, " if metric.float_model is not None else "from float, "
        tiles.append(tile(metric.metric, f"{metric.simulated:.4g}", f"{beside}{metric.count} positions"))
    model = report.model
    follow = sum(map(report.count, ("shared", "derived", "fused")))
    tiles += [
        tile("Parameters", size(model.quantized_bytes), f"from {size(model.float_bytes)}"),
        tile("Quantized", f"{report.count('quantized')}", f"of {len(report.sites)} sites"),
        tile("Shared, derived, fused", f"{follow}", "follow another site"),
        tile("Float", f"{report.count('float')}", "sites, reasons below" if report.count("float") else "sites"),
    ]
    note = ""
    if model.opaque_ops:
        told = f"{model.opaque_ops} of {model.ops} operations are of unknown types and run in float"
        named = ", ".join(model.unknown)
        note = f"<p class=note>{escape(told + (f'; those that compute floats: {named}' if named else ''))}.</p>"
    if report.notes:
        lines = "".join(f"<p class=note>{escape(told)}</p>" for told in report.notes)
        note += fold(f"Notes of the plan ({len(report.notes)})", lines)
    told = f"<p class=verdict>{escape(verdict(report))}</p>"
    return f'<section>{told}<div class="tiles">{"".join(tiles)}</div>{note}</section>'


def verdict(report: RunReport) -> str:
    """The whole run in a sentence or two."""
    told = []
    if (found := report.accuracy) is not None:
        points = 100 * (found.simulated - found.float_model)
        change = "keeps" if abs(points) < 0.005 else f"{'loses' if points < 0 else 'gains'} {abs(points):.2f} points of"
        told.append(f"The simulation {change} the float model's top-1 accuracy, {found.float_model:.2%}.")
    record = report.record
    if record is not None and record.compared:
        told.append(f"The quantized model computes what was simulated in all {record.compared} tensors compared.")
    for format, reason in record.missing.items() if record is not None else ():
        told.append(f"There is no {format}: {reason}.")
    if record is None or not (record.compared or record.missing):
        told.append("No quantized model was compared with the simulation.")
    return " ".join(told)


def _in_own_names(step: StepRecord, report: RunReport) -> StepRecord:
    """A table of layers with the names that the model's author gave them."""
    if step.columns[:1] != ("layer",):
        return step
    own = {row.op: row.layer or row.op for row in report.layers}
    return step.model_copy(update={"rows": tuple((own.get(str(op), op), *rest) for op, *rest in step.rows)})


def _step(number: int, step: StepRecord) -> str:
    parts = [f"<p>{escape(step.summary)}</p>"]
    # Counters that stayed at zero say nothing; report.json has them.
    if told := {k: text(v) for k, v in step.figures.items() if v != 0}:
        parts.append(facts(told))
    parts.append(_step_chart(step))
    if step.settings:
        parts.append(fold(f"{len(step.settings)} settings", facts({k: text(v) for k, v in step.settings.items()})))
    if step.rows:
        parts.append(fold(f"{len(step.rows)} rows", table(step.columns, step.rows)))
    return section(f"Step {number}: {step.technique}", "".join(parts))


def _step_chart(step: StepRecord) -> str:
    """A chart of the table where it has a figure before and after, or a loss, for each row."""
    found = {column.lower(): index for index, column in enumerate(step.columns)}
    before = next((i for name, i in found.items() if "before" in name), None)
    after = next((i for name, i in found.items() if "after" in name), None)
    loss = next((i for name, i in found.items() if "loss" in name), None)
    label = [str(row[0]) for row in step.rows if row]
    if before is not None and after is not None:
        old, new = _numbers(step.rows, before), _numbers(step.rows, after)
        if old and new and min(*old, *new) >= 0:
            axis = charts.log_axis([*old, *new], label=f"{step.columns[before]}, {step.columns[after]}; logarithmic")
            plot = charts.pairs(label, old, new, axis, across=step.columns[0])
            key = f"{escape(step.columns[before])} (grey) and {escape(step.columns[after])} (blue)."
            return figure(plot, key)
    elif loss is not None and (values := _numbers(step.rows, loss)) and min(values) >= 0:
        axis = charts.log_axis(values, label=f"{step.columns[loss]}, logarithmic")
        plot = charts.bars(label, [*values], axis, across=step.columns[0])
        return figure(plot, f"{escape(step.columns[loss])} of each row.")
    return ""


def _numbers(rows: Sequence[Sequence[Cell]], column: int) -> list[float]:
    """The column's values; empty unless every one is a number."""
    values = [row[column] for row in rows]
    return [float(v) for v in values if isinstance(v, int | float)] if all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ) else []  # fmt: skip


def _weights(layers: Sequence[LayerRow]) -> str:
    if not layers:
        return ""
    labels = [row.layer or row.op for row in layers]
    parts = []
    if any(row.sqnr_db is not None for row in layers):
        values = [row.sqnr_db for row in layers]
        shown = [v for v in values if v is not None]
        axis = charts.linear_axis(min(0.0, *shown), max(shown), " dB", label="signal to rounding noise, dB")
        caption = "Rounding of each weight, higher is better. A gap: the weights lie on their grid already."
        heights = [max(v, 0.0) if v is not None else None for v in values]
        parts.append(figure(charts.bars(labels, heights, axis, " dB", across=LAYERS), caption))
    low, high = [row.range_smallest for row in layers], [row.range_largest for row in layers]
    axis = charts.log_axis([*low, *high], label="largest magnitude in a channel, logarithmic")
    plot = charts.ranges(labels, low, high, axis, [row.range_median for row in layers], across=LAYERS)
    parts.append(figure(plot, "Ranges of each weight's channels: from the smallest to the largest, and the median."))
    columns = ("Layer", "Op", "Type", "Shape", "Quantizer", "Smallest", "Median", "Largest channel", "SQNR dB")
    rows = [
        (r.layer or r.op, r.op, r.type, " × ".join(map(str, r.shape)), r.quantizer, r.range_smallest, r.range_median,
         r.range_largest, "exact" if r.sqnr_db is None else r.sqnr_db)
        for r in layers
    ]  # fmt: skip
    parts.append(fold(f"{len(layers)} layers", table(columns, rows)))
    return section("Weights", "".join(parts))


def _activations(sites: Sequence[SiteRow]) -> str:
    shown = [s for s in sites if s.kind == "activation" and s.decision == "quantized" and s.low is not None]
    if not shown:
        return ""
    lows, highs = [float(s.low or 0) for s in shown], [float(s.high or 0) for s in shown]
    axis = charts.symlog_axis([*lows, *highs], label="ends of the grid, logarithmic away from 0")
    plot = charts.ranges([s.site for s in shown], lows, highs, axis, across="activations, from input to output")
    return section("Activations", figure(plot, "Range of each activation's grid."))


def _sites(sites: Sequence[SiteRow]) -> str:
    columns = ("Site", "Kind", "Op", "Decision", "Detail", "Low", "High", "Scale", "Zero point", "Source")
    rows = [
        (s.site, s.kind, s.op, s.decision, s.detail, s.low, s.high, _scale(s), s.zero_point, s.source) for s in sites
    ]
    return section("Every site", table(columns, rows))


def _scale(site: SiteRow) -> Cell:
    if site.scale_smallest == site.scale_largest:
        return site.scale_smallest
    return f"{text(site.scale_smallest)} … {text(site.scale_largest)}"


def _about(report: RunReport) -> str:
    known = {
        "Target": report.target,
        "Weights": report.weights or "the target's",
        "Activations": report.activations or "the target's",
        "Seed": str(report.seed),
    }
    if report.calibration:
        data = report.calibration
        batches = f", batches of {data.batch_size}" if data.batch_size else ""
        known["Calibration"] = f"{data.samples} samples of {data.source}{batches}, {data.scheme}"
        if data.images is not None:
            known["Images"] = str(data.images)
        known["Data fingerprint"] = data.fingerprint
    known |= {f"Input {name}": shape for name, shape in report.model.inputs.items()}
    known |= {f"Output {name}": shape for name, shape in report.model.outputs.items()}
    known |= {f"Time: {stage}": f"{value:.1f} s" for stage, value in report.seconds.items()}
    known |= {f"File: {purpose}": file for purpose, file in report.files.items()}
    known |= report.versions
    return section("About this run", fold(f"{len(known)} settings, times and files", facts(known)))
