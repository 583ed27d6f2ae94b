"""QDQ models: the float graph with QuantizeLinear/DequantizeLinear pairs that integer runtimes turn into integer ops.

Every site that the plan quantizes gets exactly one pair: activations Q and DQ, parameters an initializer of
integers and a DQ. The dequantized tensor takes the site's own name (that of a model input: `<input>_dequantized`),
around it lie `<tensor>_float`, `<tensor>_quantized`, `<tensor>_scale` and `<tensor>_zero_point`.

Storage: the narrowest ONNX integer type that holds the codes (4, 8, 16 bits, int32 for biases). An activation grid
smaller than its type (3, 5, 6, 7 or 9 to 15 bits, strict grids) gets a Clip beside its Q, since Q saturates at the
type's ends only. float16 and bfloat16 sites are casts there and back; fp8 has Q and DQ of its own. A range at run time
is DynamicQuantizeLinear and DequantizeLinear where ONNX has it (uint8, one range for the tensor), which ONNX Runtime
multiplies in integers, and otherwise the grid's formula in standard ops.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.backend import Bundle
from bitwright.calibration import bias_encoding, guarded
from bitwright.graph import Graph, ParamId, preserves_grid
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Derived, OwnForms, Plan, SiteId, SiteKind
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.export.byte_blocks import turn_byte_blocks
from bitwright_onnx.export.float_biases import split_large_biases
from bitwright_onnx.export.float_weights import guard_float_weights
from bitwright_onnx.export.qdq_writer import PairWriter, canonical_values
from bitwright_onnx.export.storage import opset_for, storage_type
from bitwright_onnx.graph.opset import MINIMUM_OPSET, opset_of, raise_opset
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.simulate.session import has_quantize_linear

NAMES = "bitwright.names"
"""Metadata key of a QDQ file: JSON of site → dequantized tensor, where they differ."""
FORMS = "bitwright.forms"
"""The same, of dequantized tensor → site, for further forms of a bias that ops of several scales share."""
RUNTIME_DOMAIN = "com.microsoft"
"""ONNX Runtime's own QuantizeLinear and DequantizeLinear, which don't depend on the model's opset."""


@dataclass(frozen=True)
class QdqReport:
    """What was written.

    Attributes:
        path: the file.
        names: site → its dequantized tensor, where it isn't the site's own name.
        raised: weights whose scales were raised so that their int32 biases fit, with the channels.
        skipped: quantized sites without a pair, with the reason.
    """

    path: Path
    names: Mapping[SiteId, str] = field(default_factory=dict)
    raised: Mapping[ParamId, tuple[int, ...]] = field(default_factory=dict)
    skipped: Mapping[SiteId, str] = field(default_factory=dict)

    def bundle(self, names: Mapping[SiteId, str] | None = None) -> Bundle:
        """As `Backend.export` returns it; `names` are what the ONNX model calls a backend's own sites, if otherwise."""
        theirs = {site: self.names.get(name, name) for site, name in (names or {}).items()}
        return Bundle({"qdq": self.path}, {**self.names, **theirs})


def write_qdq(
    model: ir.Model,
    graph: Graph,
    plan: Plan,
    encodings: Mapping[SiteId, Encoding],
    path: str | Path,
    *,
    packed: bool = True,
) -> QdqReport:
    """Write a QDQ model, atomically.

    Args:
        model: the float model, with the weights that are to be quantized; never changed.
        graph: its canonical graph.
        plan: the sites.
        encodings: of every site with a specification; shared ones may be left out, biases follow from the others.
        path: the file to write.
        packed: keep codes of up to 4 bits in ONNX's 4-bit types (opset 21). ONNX Runtime has integer kernels for
            those in matrix products only; without, they are kept as 8-bit codes of the same values, which its
            convolutions take too.

    Raises:
        EncodingError: an encoding that ONNX has no ops for (the message names the site).
        ModelError: the model's opset can't be raised to what the encodings need.
        InputError: the file can't be written.
    """
    built, report = build_qdq(model, graph, plan, encodings, packed=packed)
    written = save_model(built, path)
    return QdqReport(written, report.names, report.raised, report.skipped)


def build_qdq(
    model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding], *, packed: bool = True
) -> tuple[ir.Model, QdqReport]:
    """The QDQ model in memory; arguments and errors as `write_qdq`."""
    table, raised = _table(model, graph, plan, encodings)
    kinds = {s: storage_type(e, computed=_is_computed(plan, graph, s), packed=packed) for s, e in table.items()}
    opset = max((opset_for(e, kinds[s]) for s, e in table.items()), default=MINIMUM_OPSET)
    work = raise_opset(model, opset)
    if work is model:
        work = model.clone()
        work.graph.meta.update(model.graph.meta)
    writer = PairWriter(work, graph)
    skipped: dict[SiteId, str] = {}
    # Biases that share no grid aren't quantized sites: they are stored for each of their ops, or for none.
    for site in plan:
        if isinstance(plan[site].decision, OwnForms) and site in writer.values:
            groups = _bias_groups(graph, plan, site, table)
            if len(groups) == len(graph.users(site)):
                writer.parameter(site, next(iter(groups.values())), ir.DataType.INT32, groups)
    for site in plan.quantized:
        if site not in table:
            skipped[site] = "it has no encoding"
        elif site not in writer.values:
            skipped[site] = "the model has no such tensor"
        elif _is_computed(plan, graph, site):
            writer.activation(site, table[site], kinds[site])
        elif site not in graph.params:
            skipped[site] = "no op of the ONNX model reads it as a parameter; it stays in float"
        else:
            writer.parameter(site, table[site], kinds[site], _bias_groups(graph, plan, site, table))
    # What ONNX Runtime wants spelled otherwise, once all pairs are there.
    turn_byte_blocks(work.graph, writer.fresh)
    split_large_biases(work, writer.initializer, writer.fresh)
    guard_float_weights(work, writer.fresh)
    _runnable_pairs(work)
    work.metadata_props[NAMES] = json.dumps(writer.names)
    if writer.forms:
        work.metadata_props[FORMS] = json.dumps(writer.forms)
    return work, QdqReport(Path(), writer.names, raised, skipped)


def _is_computed(plan: Plan, graph: Graph, site: SiteId) -> bool:
    """Whether a site's codes are computed; what another framework computes from parameters alone is stored here."""
    return plan[site].kind is SiteKind.ACTIVATION and site not in graph.params


def _runnable_pairs(model: ir.Model) -> None:
    """Take Q and DQ from ONNX Runtime's own domain where it doesn't have them in the model's opset yet."""
    if has_quantize_linear(opset_of(model)):
        return
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = RUNTIME_DOMAIN
            model.opset_imports[RUNTIME_DOMAIN] = 1


def _table(
    model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding]
) -> tuple[dict[SiteId, Encoding], dict[ParamId, tuple[int, ...]]]:
    """One encoding for each quantized site, with weight scales that leave room for the biases."""
    own = EncodingTable({s: e for s, e in encodings.items() if s in plan and plan.root(s) == s})
    values = values_of(model.graph)
    # What no op reads (of a layer whose result isn't used) isn't in the file, and needs no room.
    biases = {s: canonical_values(values[s], graph.params[s]) if s in values else np.zeros(1, np.float32) for s in plan
              if isinstance(plan[s].decision, Derived | OwnForms)}  # fmt: skip
    safe = guarded(plan, own, biases)
    raised = {
        s: tuple(int(c) for c in np.flatnonzero(safe[s].scale != own[s].scale)) for s in safe if safe[s] is not own[s]
    }
    table: dict[SiteId, Encoding] = {}
    for site in plan.quantized:
        encoding = safe.get(plan.root(site))
        if encoding is not None and not isinstance(plan[plan.root(site)].decision, Derived):
            table[site] = encoding
    for site in plan.quantized:
        decision = plan[plan.root(site)].decision
        if isinstance(decision, Derived) and all(s in table for s in decision.sites):
            bias = bias_encoding(*(table[s] for s in decision.sites))
            if bias is not None:
                table[site] = bias
    return table, raised


def _bias_groups(graph: Graph, plan: Plan, site: SiteId, table: Mapping[SiteId, Encoding]) -> dict[str, Encoding]:
    """Ops that share a bias but not its scale, each with the grid of its own accumulator.

    An integer kernel takes s_input·s_weight for granted, so one dequantized bias can't serve two scales.
    """
    found: dict[str, Encoding] = {}
    if not isinstance(plan[plan.root(site)].decision, Derived | OwnForms):
        return found
    for op in graph.users(site):
        weight, source = table.get(op.weight or ""), _carried(graph, op.data_inputs[:1], table)
        if weight is not None and source is not None:
            own = bias_encoding(source, weight)
            if own is not None and (site not in table or not own.equals(table[site])):
                found[op.id] = own
    return found


def _carried(graph: Graph, tensors: Sequence[str], table: Mapping[SiteId, Encoding]) -> Encoding | None:
    """The grid of an operand's values: its own, or that of what ops between (transposes, zero pads) only move."""
    while tensors and tensors[0] not in table:
        op = graph.producer(tensors[0])
        tensors = op.data_inputs[:1] if op is not None and preserves_grid(op) else ()
    return table[tensors[0]] if tensors else None
