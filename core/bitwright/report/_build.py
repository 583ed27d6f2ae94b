"""Builds a report from the state of a simulation, and writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np

from bitwright.errors import InputError
from bitwright.files import write_text
from bitwright.graph import Graph, OpKind, Tensor
from bitwright.grids import Blockwise, Dynamic, Encoding, PerChannel, PerTensor, QuantSpec, fixed_layout, to_groups
from bitwright.placement import Derived, Float, Fused, OwnForms, SharedWith, Site, SiteKind
from bitwright.plugins import registry
from bitwright.report._model import (
    Accuracy,
    BundleRecord,
    Calibration,
    Cell,
    LayerRow,
    MetricRecord,
    ModelInfo,
    RunReport,
    SiteRow,
    StepRecord,
)
from bitwright.runs import of_file, versions
from bitwright.state import SimState
from bitwright.technique import Report

ON_GRID_DB = 120.0
"""A rounding error this far below the weights is float32 noise: the weights lie on their grid already."""
_PART = 2**18
"""Values of a weight whose rounding error is summed at once."""


def build_report(
    state: SimState,
    *,
    name: str,
    source: str,
    calibration: Calibration | None = None,
    accuracy: Accuracy | None = None,
    seconds: Mapping[str, float] | None = None,
    files: Mapping[str, str] | None = None,
    record: BundleRecord | None = None,
    names: Mapping[str, str] | None = None,
) -> RunReport:
    """The report of a calibrated simulation.

    Args:
        state: of the simulation (`QuantSim.state`), after its last technique and calibration.
        name: stem of the exported files.
        source: the model's file name, or its type.
        calibration, accuracy, seconds, files: what the caller knows about the run.
        record: of the exported files.
        names: site → its name in them, where it isn't the site's own.
    """
    modules = (
        registry.default_registry().backend_info(state.backend.name).modules if _registered(state.backend.name) else ()
    )
    table = state.table
    settings = [dict(step.settings) for step in state.encodings.provenance]
    settings += [{}] * (len(state.reports) - len(settings))
    return RunReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        name=name,
        model=_model(state, source, table),
        target=state.target.name,
        target_config=json.loads(state.target.to_json()),
        weights=state.weights,
        activations=state.activations,
        overrides={name: _plain(value) for name, value in state.overrides.items()},
        notes=tuple(state.plan.notes),
        seed=state.seed,
        calibration=calibration,
        steps=tuple(_step(t, s, r) for (t, r), s in zip(state.reports, settings, strict=False)),
        sites=tuple(
            _site(site, state.graph, table.get(site.id), (names or {}).get(site.id, "")) for site in state.plan.values()
        ),
        layers=tuple(_layers(state)),
        accuracy=accuracy,
        seconds={k: round(v, 3) for k, v in (seconds or {}).items()},
        versions=versions(modules),
        files=dict(files or {}),
        record=record,
    )


def write_report(report: RunReport, directory: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html`, each atomically.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    from bitwright.report._page import render
    from bitwright.report._seal import PAGE, REPORT

    directory = Path(directory)
    json_file = write_text(directory / REPORT, dumped(report))
    return json_file, write_text(directory / PAGE, render(report))


def complete_report(
    directory: str | Path,
    name: str,
    *,
    source: str,
    calibration: Calibration | None = None,
    accuracy: Accuracy | None = None,
    metrics: Sequence[MetricRecord] = (),
    seconds: Mapping[str, float] | None = None,
) -> tuple[Path, Path]:
    """Add to an export's report what only the caller knows of the run, and write it again, with its page.

    Args:
        directory, name: of the export.
        source: the model's file name, or its type.
        calibration, accuracy, seconds: as `build_report`.
        metrics: of the simulation, on the data that they were asked for.

    Raises:
        InputError: the export's report isn't there, or a file can't be written.
    """
    from bitwright.report._seal import read_report

    found = read_report(Path(directory), name)
    if found.report is None or found.damage:
        raise InputError(found.damage or f"{directory} holds no report of {name!r}; export it again")
    report = found.report
    return write_report(
        report.model_copy(
            update={
                "model": report.model.model_copy(update={"source": source}),
                "calibration": calibration,
                "accuracy": accuracy,
                "metrics": tuple(metrics),
                "seconds": {k: round(v, 3) for k, v in (seconds or {}).items()},
            }
        ),
        directory,
    )


def dumped(report: RunReport) -> str:
    """The text of `report.json`; that of an export is sealed."""
    from bitwright.report._seal import seal

    if report.record is not None:
        report = report.model_copy(update={"seal": seal(json.loads(report.model_dump_json()))})
    return report.model_dump_json(indent=1) + "\n"


def _plain(value: object) -> object:
    """A setting as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _registered(backend: str) -> bool:
    return backend in registry.default_registry().backends()


def _model(state: SimState, source: str, table: Mapping[str, Encoding]) -> ModelInfo:
    graph = state.graph
    counts = {p: math.prod(param.shape) for p, param in graph.params.items()}
    quantized = sum(_stored_bytes(count, table.get(p)) for p, count in counts.items())
    original = state.source.resolve() if state.source is not None and state.source.is_file() else None
    return ModelInfo(
        source=source,
        path=None if original is None else str(original),
        sha256=None if original is None else of_file(original),
        backend=state.backend.name,
        ops=len(graph),
        opaque_ops=sum(op.kind is OpKind.OPAQUE for op in graph),
        unknown=tuple(f"{op.id} ({op.native or op.type})" for op in graph.unknown_ops),
        parameters=sum(counts.values()),
        float_bytes=4 * sum(counts.values()),
        quantized_bytes=quantized,
        inputs={t: _shape(graph.tensors.get(t)) for t in graph.inputs},
        outputs={t: _shape(graph.tensors.get(t)) for t in graph.outputs},
    )


def _stored_bytes(count: int, encoding: Encoding | None) -> int:
    if encoding is None:
        return 4 * count
    scales = 0 if encoding.bits == 32 else 4 * encoding.scale.size
    return math.ceil(count * encoding.bits / 8) + scales


def _shape(tensor: Tensor | None) -> str:
    if tensor is None or tensor.shape is None:
        return "unknown shape"
    return f"{tensor.dtype} {' × '.join('?' if d is None else str(d) for d in tensor.shape) or 'scalar'}"


def _step(technique: str, settings: Mapping[str, Any], report: Report) -> StepRecord:
    return StepRecord(
        technique=technique,
        settings={k: _plain(v) for k, v in settings.items()},
        summary=report.summary,
        figures={k: finite(v) for k, v in report.figures.items()},
        columns=report.columns,
        rows=tuple(tuple(cell(value) for value in row) for row in report.rows),
    )


def cell(value: object) -> Cell:
    """A table value as JSON can hold it."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return finite(value)
    return None if value is None else str(value)


def finite(value: SupportsFloat) -> float | None:
    """A float, or None for NaN and infinities."""
    return float(value) if math.isfinite(float(value)) else None


def _site(site: Site, graph: Graph, encoding: Encoding | None, name: str) -> SiteRow:
    decision, detail, follows = _decision(site, encoding)
    if site.op is None:
        op = "model input" if site.kind is SiteKind.ACTIVATION else ""
    else:
        op = f"{site.op} ({graph.op(site.op).type})"
    kind = site.kind.value if site.role is None else site.role.value
    shown = name if name != site.id else ""
    row = SiteRow(site=site.id, kind=kind, op=op, decision=decision, detail=detail, name=shown, follows=follows)
    if encoding is None:
        return row
    from bitwright.report._seal import digest

    single = encoding.scale.ndim == 0
    return row.model_copy(
        update={
            "low": float(encoding.minimum.min()) if encoding.is_fixed else None,
            "high": float(encoding.maximum.max()) if encoding.is_fixed else None,
            "scale_smallest": float(encoding.scale.min()) if encoding.scale.size else None,
            "scale_largest": float(encoding.scale.max()) if encoding.scale.size else None,
            "zero_point": int(encoding.zero_point) if single else None,
            "source": encoding.source + (", frozen" if encoding.frozen else ", kept" if encoding.kept else ""),
            "digest": digest(encoding),
        }
    )


def _decision(site: Site, encoding: Encoding | None) -> tuple[str, str, tuple[str, ...]]:
    match site.decision:
        case QuantSpec() as spec:
            return "quantized", describe(encoding if encoding is not None else spec), ()
        case SharedWith(other):
            return "shared", f"with {other}", (other,)
        case Derived(sites, rule):
            return "derived", f"{rule}, from {' and '.join(sites)}", sites
        case OwnForms(reason, uses):
            return "float", reason, tuple(s for use in uses for s in use)
        case Fused(reason, into):
            return "fused", reason, (into,)
        case Float(reason):
            return "float", reason, ()


def describe(grid: QuantSpec | Encoding) -> str:
    """A grid in words: ``"int4 symmetric, blocks of 32"``, ``"uint8 asymmetric"``."""
    if grid.float_format is not None and not isinstance(grid.granularity, Blockwise):
        return grid.float_format
    if isinstance(grid.granularity, Blockwise) and grid.float_format is not None:
        scales = "" if grid.scale_type is None else f", {grid.scale_type} scales"
        return f"{grid.float_format}, blocks of {grid.granularity.block_size}{scales}"
    text = f"{'' if grid.signed else 'u'}int{grid.bits} {'symmetric' if grid.symmetric else 'asymmetric'}"
    text += ", strict" if grid.strict else ""
    match grid.granularity:
        case PerTensor():
            return text
        case PerChannel():
            return f"{text}, per channel"
        case Blockwise(block_size=size, decompressed_bits=wide):
            return f"{text}, blocks of {size}" + (f" in int{wide}" if wide else "")
        case Dynamic(per_token=rows):
            return f"{text}, {'per token' if rows else 'per tensor'} at run time"


def _layers(state: SimState) -> list[LayerRow]:
    rows = []
    for op in state.graph.linear_ops:
        weight = op.weight
        if weight is None or weight not in state.plan:
            continue
        encoding = state.encodings.get(state.plan.root(weight))
        if encoding is None:
            continue
        values = state.params[weight]
        layout = fixed_layout(encoding.granularity)
        axis = layout.axis if not isinstance(layout, PerTensor) else 0
        groups = to_groups(values, PerChannel(axis))
        ranges = np.maximum(np.abs(groups.max(axis=-1)), np.abs(groups.min(axis=-1)))
        rows.append(
            LayerRow(
                op=op.id,
                type=op.type,
                weight=weight,
                shape=tuple(values.shape),
                quantizer=describe(encoding),
                range_smallest=float(ranges.min()),
                range_median=float(np.median(ranges)),
                range_largest=float(ranges.max()),
                sqnr_db=_sqnr(values, encoding.fake_quantize(values)),
                layer=state.graph.layer_name(op.id),
            )
        )
    return rows


def _parts(values: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    flat = values.reshape(-1)
    return (flat[start : start + _PART] for start in range(0, flat.size, _PART))


def _sqnr(signal: np.ndarray[Any, Any], noisy: np.ndarray[Any, Any]) -> float | None:
    """10·log10(Σ signal² / Σ noise²); None where the noise is nothing but float32 rounding, or there is no signal."""
    power = noise = 0.0
    # A network's largest weight is summed in parts: in float64 it is twice as large.
    for x, y in zip(_parts(signal), _parts(noisy), strict=True):
        reference = x.astype(np.float64)
        power += float(np.square(reference).sum())
        noise += float(np.square(np.subtract(y, reference, out=reference), out=reference).sum())
    if noise == 0 or power == 0 or (decibels := 10 * math.log10(power / noise)) > ON_GRID_DB:
        return None
    return decibels
