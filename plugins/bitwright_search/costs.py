"""What an assignment costs: bit-operations, bytes of weights, or seconds from a latency model; additive over ops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bitwright.backend import Batch, Tap
from bitwright.data import samples_in
from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpId, OpKind, TensorId
from bitwright.placement import SiteId
from bitwright.simulation import QuantSim
from bitwright_search.candidates import COSTED, Candidate, Group
from bitwright_search.latency import LatencyModel
from bitwright_search.solvers import Table

Cost = Literal["bit_operations", "weight_bytes", "latency"]
FLOAT_BITS = 32


def multiply_accumulates(sim: QuantSim, batch: Batch) -> dict[OpId, int]:
    """Multiply-accumulates of each matrix product for one sample; of other ops, values of their outputs.

    Args:
        sim: the network.
        batch: run once where the graph doesn't tell a tensor's shape.

    Raises:
        InputError: the batch is empty.
    """
    graph = sim.graph
    sizes, last = _sizes(sim, batch)
    found = {}
    for op in graph:
        if op.kind is OpKind.OPAQUE or not op.outputs or op.output not in sizes:
            continue
        found[op.id] = round(sizes[op.output] * _products(graph, op, sizes, last))
    return found


def _products(graph: Graph, op: Op, sizes: Mapping[TensorId, float], last: Mapping[TensorId, int]) -> float:
    """Products behind each value of an op's output; `last` has the length of tensors' last axes."""
    if op.kind in (OpKind.CONV, OpKind.LINEAR) and op.weight is not None:
        return float(math.prod(graph.params[op.weight].shape[1:]))
    if op.kind is OpKind.CONV_TRANSPOSE and op.weight is not None:
        shape = graph.params[op.weight].shape
        return sizes[op.data_inputs[0]] * math.prod(shape[1:]) / sizes[op.output]
    return float(last.get(op.data_inputs[0], 1)) if op.kind is OpKind.MATMUL else 1.0


def _sizes(sim: QuantSim, batch: Batch) -> tuple[dict[TensorId, float], dict[TensorId, int]]:
    """Values of each float tensor for one sample, and the length of its last axis."""
    graph = sim.graph
    samples = samples_in(batch) if batch else 0
    if not samples:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")
    fixed = {shape[0] for i in graph.inputs if (shape := graph.tensors[i].shape)}
    length = next(iter(fixed)) if len(fixed) == 1 else None
    found: dict[TensorId, float] = {}
    last: dict[TensorId, int] = {}
    unknown = []
    for op in graph:
        for t in (*op.data_inputs, *op.outputs):
            shape = graph.tensors[t].shape
            if not graph.tensors[t].is_float or t in found:
                continue
            if shape is None or None in shape[1:]:
                unknown.append(t)
            else:
                # A free first dimension is the samples'; a fixed one may be anything that holds all of them.
                first = 1.0 if not shape or shape[0] is None else shape[0] / (length or shape[0])
                found[t] = first * math.prod(n for n in shape[1:] if n is not None)
                last |= {t: shape[-1]} if shape and shape[-1] is not None else {}
    seen = {t: np.asarray(batch[t]) for t in unknown if t in batch}
    wanted = [t for t in dict.fromkeys(unknown) if op_output(graph, t)]
    if wanted:
        values = sim.backend.session(sim.native, [Tap(t) for t in wanted]).run(batch)
        seen |= {t: np.asarray(values[Tap(t)]) for t in wanted}
    found |= {t: v.size / samples for t, v in seen.items()}
    last |= {t: v.shape[-1] for t, v in seen.items() if v.ndim}
    return found, last


def op_output(graph: Graph, tensor: TensorId) -> bool:
    """Whether an op makes a tensor (and no user feeds it)."""
    return graph.producer(tensor) is not None


class CostModel:
    """Costs of the ops of one network.

    Args:
        sim: the network, with its plan.
        kind: what is counted.
        macs: from `multiply_accumulates`.
        latency: for `kind="latency"`.

    Raises:
        InputError: a latency model is missing, or not asked for.
    """

    def __init__(self, sim: QuantSim, kind: Cost, macs: Mapping[OpId, int], latency: LatencyModel | None) -> None:
        if kind not in ("bit_operations", "weight_bytes", "latency"):
            raise InputError(f"cost={kind!r}: choose bit_operations, weight_bytes or latency")
        if (kind == "latency") != (latency is not None):
            raise InputError(
                "cost='latency' needs latency=: a table, a file or a LatencyModel (see measure_latency)"
                if latency is None
                else f"latency= is given, but the cost is {kind}; set cost='latency'"
            )
        self.sim, self.kind, self.macs, self.latency = sim, kind, macs, latency

    def of_op(self, op: Op, weight_bits: int, activation_bits: int) -> float:
        """Cost of one op for one sample (of `weight_bytes`: at all)."""
        if self.kind == "weight_bytes":
            if op.weight is None or self.sim.graph.users(op.weight)[0].id != op.id:
                return 0.0
            return math.prod(self.sim.graph.params[op.weight].shape) * weight_bits / 8
        if self.latency is not None:
            return self.latency.cost(op.id, weight_bits, activation_bits) if op.kind in COSTED else 0.0
        return float(self.macs.get(op.id, 0)) * weight_bits * activation_bits

    def of_group(self, group: Group, candidate: Candidate) -> float:
        """Cost of a group's ops with a candidate."""
        return sum(self._in_group(self.sim.graph.op(o), group, candidate) for o in group.ops)

    def _in_group(self, op: Op, group: Group, candidate: Candidate) -> float:
        weight, inputs = op.weight, op.data_inputs
        activation = candidate.activation_bits if self._root(inputs[0]) in group.activations else self._bits(inputs[0])
        if weight is not None and op.kind in COSTED:
            return self.of_op(op, candidate.weight_bits if weight in group.weights else self._bits(weight), activation)
        second = inputs[1] if op.kind is OpKind.MATMUL and len(inputs) > 1 else inputs[0]
        other = candidate.activation_bits if self._root(second) in group.activations else self._bits(second)
        return self.of_op(op, other, activation)

    def table(self, groups: Sequence[Group], candidates: Sequence[Candidate]) -> Table:
        """Costs (groups, candidates)."""
        return np.array([[self.of_group(g, c) for c in candidates] for g in groups], np.float64)

    def outside(self, groups: Sequence[Group]) -> float:
        """Cost of the matrix products that no group decides on."""
        inside = {op for g in groups for op in g.ops}
        total = 0.0
        for op in self.sim.graph:
            if op.kind in COSTED and op.id not in inside and op.data_inputs:
                second = op.weight or op.data_inputs[-1]
                total += self.of_op(op, self._bits(second), self._bits(op.data_inputs[0]))
        return total

    def _root(self, site: SiteId) -> SiteId:
        return self.sim.plan.root(site)

    def _bits(self, site: SiteId) -> int:
        spec = self.sim.plan.spec(site)
        return FLOAT_BITS if spec is None else spec.bits
