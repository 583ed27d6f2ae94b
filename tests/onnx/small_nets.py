"""Small ONNX models, plans and encodings for the tests of simulation, export and runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from bitwright.backend import Tap
from bitwright.graph import Graph, OpKind, ParamRole
from bitwright.grids import Encoding, PerChannel, QuantSpec, encoding_from_range, encoding_of_weights
from bitwright.placement import Decision, Derived, Float, Plan, Site, SiteKind
from bitwright_onnx.capture.model import adopt_model
from bitwright_onnx.graph.canonical import canonical_graph
from bitwright_onnx.simulate.session import OrtSession

ACTIVATION = QuantSpec(signed=False, symmetric=False)
WEIGHT = QuantSpec(granularity=PerChannel(0))


def proto(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def branch(op: str) -> onnx.GraphProto:
    """A subgraph that reads the outer tensor r."""
    output = helper.make_tensor_value_info(f"{op}_y", onnx.TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["r"], [f"{op}_y"])], op, [], [output])


def opened(model: onnx.ModelProto) -> tuple[ir.Model, Graph]:
    native = adopt_model(model)
    return native, canonical_graph(native)


def identity_net(op: str = "Relu", opset: int = 17) -> tuple[ir.Model, Graph]:
    """x → op → y, with nothing else."""
    return opened(proto([helper.make_node(op, ["x"], ["y"])], {"x": ["N", 4]}, ["y"], opset=opset))


def conv_net(seed: int = 0) -> tuple[ir.Model, Graph]:
    """Conv → Clip(0, 6) → depthwise Conv → Add (residual) → GlobalAveragePool → Flatten → Gemm."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.normal(0, 0.5, (8, 3, 3, 3)),
        "b1": rng.normal(0, 0.5, 8),
        "w2": rng.normal(0, 0.5, (8, 1, 3, 3)),
        "b2": rng.normal(0, 0.5, 8),
        "w3": rng.normal(0, 0.5, (8, 5)),
        "b3": rng.normal(0, 0.5, 5),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="conv1"),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"], name="clip"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=8, name="conv2"),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="add"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], name="gemm"),
    ]
    return opened(proto(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights))


def plan_of(
    graph: Graph,
    *,
    activation: QuantSpec = ACTIVATION,
    weight: QuantSpec = WEIGHT,
    overrides: Mapping[str, Decision] | None = None,
) -> Plan:
    """Every float tensor and weight quantized, biases derived, the input of a clip left to it."""
    sites: dict[str, Site] = {}

    def put(
        name: str, kind: SiteKind, decision: Decision, op: str | None = None, role: ParamRole | None = None
    ) -> None:
        sites[name] = Site(name, kind, (overrides or {}).get(name, decision), op, role)

    for name in graph.inputs:
        put(name, SiteKind.ACTIVATION, activation)
    for op in graph:
        for role, param in op.params.items():
            if role is ParamRole.BIAS and op.weight is not None:
                put(param, SiteKind.PARAMETER, Derived((op.data_inputs[0], op.weight)), op.id, role)
            elif param not in sites:
                put(param, SiteKind.PARAMETER, weight, op.id, role)
        after = graph.sole_consumer(op.output)
        fused = after is not None and after.kind in (OpKind.CLIPPED_RELU, OpKind.RELU)
        put(op.output, SiteKind.ACTIVATION, Float("its activation follows") if fused else activation, op.id)
    return Plan(sites, "test")


def encodings_of(native: ir.Model, graph: Graph, plan: Plan, batch: Mapping[str, np.ndarray]) -> dict[str, Encoding]:
    """Min-max encodings of every site with a specification."""
    from bitwright_onnx.graph.params import read_params

    found: dict[str, Encoding] = {}
    ranges = OrtSession(native, [Tap(t, "minmax") for t in plan.activations]).run(batch)
    for tap, (low, high) in ranges.items():
        spec = plan.spec(tap.tensor)
        assert spec is not None
        found[tap.tensor] = encoding_from_range(spec, low, high)
    for name, values in read_params(native, plan.parameters).items():
        spec = plan.spec(name)
        assert spec is not None
        found[name] = encoding_of_weights(values, spec)
    return found


def encoding(spec: QuantSpec, scale: float, zero: int = 0) -> Encoding:
    return Encoding(spec.bits, spec.signed, spec.symmetric, np.float32(scale), np.int32(zero), strict=spec.strict)


def midpoints(scale: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Halves and wholes of the grid, their float neighbours, random values, and the far ends."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    halves = (rng.integers(-2 * 70000, 2 * 70000, count // 2) / 2 * np.float32(scale)).astype(np.float32)
    near = np.nextafter(halves[: count // 4], np.float32(np.inf), dtype=np.float32)
    rest = rng.normal(0, 100 * scale, count).astype(np.float32)
    ends = np.array([0.0, -0.0, 1e30, -1e30, 3e38, 1e-40], np.float32)
    return np.concatenate([ends, halves, near, rest])[:count].reshape(shape)
