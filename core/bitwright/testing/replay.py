"""What an op must compute by the graph alone: its kind, type, attributes and parameters, run by the kit's own kernels.

The canonical graph doesn't say everything (a permutation, the places that a slice takes). Where it leaves several
possibilities each is an alternative; where it says too little there are none, and `Fallback` runs the op natively.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, PartialExecution, Session, Tap, on_grid
from bitwright.errors import BitwrightError
from bitwright.graph import Graph, Op, OpId, OpKind, ParamId, ParamRole, SetParams, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Plan
from bitwright.testing.called import called
from bitwright.testing.kernels import ELEMENTWISE, ELEMENTWISE_KINDS, compute, supports

Array = NDArray[Any]
_EPSILONS = (1e-5, 1e-3, 1e-6, 1e-12, 1e-8, 1e-7, 0.0)
"""Of norms whose attributes don't say."""
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def alternatives(
    graph: Graph, op: Op, inputs: Sequence[Array], params: Mapping[ParamRole, Array], shape: tuple[int, ...]
) -> list[list[Array]]:
    """All that an op's outputs may be by what the graph says of it; empty where it doesn't say enough.

    Args:
        graph: of the op.
        op: of the graph.
        inputs: present data inputs, in order.
        params: by role, canonical layout.
        shape: of the first output.
    """
    said = called(graph, op, inputs, params)
    if said is not None:
        return [said]
    if op.kind is OpKind.TRANSPOSE:
        x = inputs[0]
        perms = itertools.permutations(range(x.ndim)) if x.ndim <= 6 else ()
        return [[np.transpose(x, p)] for p in perms if tuple(x.shape[i] for i in p) == shape]
    if op.kind is OpKind.RESHAPE:
        if op.type in _RESHAPES and len(inputs) == 1 and inputs[0].size == np.prod(shape):
            return [[inputs[0].reshape(shape)]]
        return []
    if op.kind in (OpKind.LAYER_NORM, OpKind.NORM):
        return [[y] for y in _normalized(op, inputs[0], params)] if len(inputs) == 1 else []
    if op.kind is OpKind.SPLIT or not _tells(op, inputs, params):
        return []
    made = compute(op, graph, tuple(inputs), params, ())
    if op.kind in ELEMENTWISE_KINDS and ParamRole.CONSTANT in params and len(inputs) == 1:
        turned = np.asarray(ELEMENTWISE[op.type](params[ParamRole.CONSTANT], inputs[0]))
        return [made, [turned]]  # the graph doesn't say on which side the constant is
    return [made]


def _tells(op: Op, inputs: Sequence[Array], params: Mapping[ParamRole, Array]) -> bool:
    """Whether the graph has all that `compute` needs for this op."""
    if not supports(op) or not inputs or None in op.inputs:
        return False
    attrs: Any = op.attrs
    operands = len(inputs) + (ParamRole.CONSTANT in params)
    match op.kind:
        case OpKind.MAX_POOL | OpKind.AVERAGE_POOL:
            return attrs is not None and (attrs.window is not None or bool(attrs.axes)) and op.type != "ReduceMin"
        case OpKind.MATMUL:
            plain = op.type == "MatMul" and operands == 2
            return plain and (attrs is None or attrs.transposed is not None)
        case OpKind.ADD | OpKind.MUL | OpKind.ELEMENTWISE:
            return op.type in ELEMENTWISE and operands >= 2
        case OpKind.CONCAT:
            return not params
        case OpKind.PRELU:
            return op.type == "PRelu" or attrs is not None
        case OpKind.ACTIVATION:
            return len(inputs) == 1 and (op.type != "Clip" or attrs is not None)
        case OpKind.SOFTMAX:
            return op.type != "Hardmax" and len(inputs) == 1
        case OpKind.EMBEDDING:
            return op.weight is not None and inputs[0].dtype.kind in "iu"
        case OpKind.LINEAR | OpKind.CONV | OpKind.CONV_TRANSPOSE:
            return ParamRole.WEIGHT in params and len(inputs) == 1
    return len(inputs) == 1


def _normalized(op: Op, x: Array, params: Mapping[ParamRole, Array]) -> list[Array]:
    gamma = params.get(ParamRole.GAMMA)
    if gamma is None or op.type not in ("LayerNormalization", "RMSNormalization"):
        return []
    if gamma.shape != x.shape[x.ndim - gamma.ndim :]:
        return []
    axes = tuple(range(x.ndim - gamma.ndim, x.ndim))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=axes, keepdims=True) if op.type == "LayerNormalization" else wide
    var = np.square(centred).mean(axis=axes, keepdims=True)
    said = getattr(op.attrs, "epsilon", None)
    shift = params.get(ParamRole.BETA, np.zeros(1))
    epsilons = _EPSILONS if said is None else (said,)
    with np.errstate(divide="ignore", invalid="ignore"):
        return [(centred / np.sqrt(var + e) * gamma + shift).astype(np.float32) for e in epsilons]


def tappable(graph: Graph) -> list[TensorId]:
    """Tensors that hold numbers, in the order of the network."""
    made = (*graph.inputs, *(t for op in graph for t in op.outputs))
    return [t for t in dict.fromkeys(made) if graph.tensors[t].dtype != "sequence"]


def agrees(found: Array, expected: Array, encoding: Encoding | None, tolerance: float) -> bool:
    """Whether a tensor is what is expected, rounded to a grid if there is one.

    A value must lie between those that the grid gives for the expected one a little lower and a little higher: exactly
    on it but where the float value falls on the edge between two codes.

    Args:
        found: as it was computed.
        expected: before it is rounded.
        encoding: the grid; None leaves it in float.
        tolerance: of the float value, relative to the largest magnitude.
    """
    if found.shape != expected.shape:
        return False
    if found.dtype.kind not in "f":
        return bool(np.array_equal(found, expected))
    finite = np.isfinite(expected)
    wide = np.where(finite, expected, 0).astype(np.float64)
    slack = tolerance * max(float(np.abs(wide).max(initial=0)), 1e-6)
    if not np.array_equal(found[~finite], expected[~finite], equal_nan=True) and encoding is None:
        return False
    low, high = wide - slack, wide + slack
    if encoding is not None and encoding.run_time is not None:
        rounded = encoding.fake_quantize(np.where(finite, expected, 0)).astype(np.float64)
        off = (np.abs(np.where(finite, found, 0) - rounded) > 2 * slack).reshape(-1)
        # The range moves with the values' last bits, so that no two runs need have the very same numbers.
        steps = encoding.steps_between(rounded.astype(np.float32), np.where(finite, found, 0))
        return bool(steps.max(initial=0) <= 1 and np.count_nonzero(off) <= 1 + 0.01 * off.size)
    if encoding is not None:
        if not np.array_equal(encoding.fake_quantize(found), found, equal_nan=True):
            return False
        low, high = (encoding.fake_quantize(v.astype(np.float32)).astype(np.float64) for v in (low, high))
    return bool(((low <= found) & (found <= high))[finite].all())


def departure(found: Array, expected: Array, encoding: Encoding | None) -> str:
    """How far a tensor is from what is expected, in words."""
    if found.shape != expected.shape:
        return f"shape {found.shape}, expected {expected.shape}"
    if encoding is not None:
        rounded = encoding.fake_quantize(expected.astype(np.float32))
        off = int((found != rounded).sum())
        return (
            f"{off} of {found.size} values aren't the grid's, by {np.abs(found - rounded).max(initial=0):.3g} at most"
        )
    return f"differs by {np.abs(found.astype(np.float64) - expected).max(initial=0):.3g}"


@dataclass
class Fallback:
    """Ops that the graph doesn't say enough of, run natively and alone, with parameters on their grids.

    Attributes:
        backend, model: the float model.
        sessions: those of ops whose parameters aren't quantized, kept.
    """

    backend: Backend[Any]
    model: object
    sessions: dict[OpId, Session | None] = field(default_factory=dict)

    def outputs(
        self, op: Op, values: Mapping[TensorId, Array], params: Mapping[ParamId, Array] | None = None
    ) -> list[Array] | None:
        """The op's outputs for these inputs; None where the backend can't run it alone."""
        taps = [Tap(t) for t in op.outputs]
        if params:
            session = self._open(op, self.backend.edit(self.model, [SetParams(params)]), taps)
        else:
            if op.id not in self.sessions:
                self.sessions[op.id] = self._open(op, self.model, taps)
            session = self.sessions[op.id]
        if session is None:
            return None
        found = session.run({t: values[t] for t in op.data_inputs})
        return [np.asarray(found[tap]) for tap in taps]

    def _open(self, op: Op, model: object, taps: Sequence[Tap]) -> Session | None:
        if not isinstance(self.backend, PartialExecution) or not op.data_inputs:
            return None
        try:
            return self.backend.segment(model, list(dict.fromkeys(op.data_inputs)), taps)
        except BitwrightError:
            return None  # it also reads sizes of other tensors


@dataclass(frozen=True)
class Quantization:
    """What is fake-quantized in a network that is replayed.

    Attributes:
        plan: its sites.
        encodings: in force, one for each site that quantizes.
        biases: grids of biases that have one of their own for each op, by (op, parameter).
    """

    plan: Plan
    encodings: Mapping[str, Encoding]
    biases: Mapping[tuple[OpId, ParamId], Encoding] = field(default_factory=dict)


def replay(
    graph: Graph,
    values: Mapping[TensorId, Array],
    params: Mapping[ParamId, Array],
    quantization: Quantization | None,
    tolerance: float,
    fallback: Callable[[Op, Mapping[ParamId, Array]], list[Array] | None],
) -> tuple[list[str], frozenset[OpId]]:
    """Compare each op of a network that was run with what it must make of the inputs that it got.

    Args:
        graph: the model's.
        values: every tensor that was handed out, after its own fake quantization.
        params: float values of the parameters, canonical layout.
        quantization: None for the float network.
        tolerance: see `agrees`.
        fallback: runs an op natively, with parameters by id where they are quantized.

    Returns:
        What departs, in words, and the ops that were compared by what the graph says of them.
    """
    faults: list[str] = []
    replayed: set[OpId] = set()
    for op in graph:
        if any(t not in values for t in (*op.data_inputs, *op.outputs)):
            continue
        inputs = [values[t] for t in op.data_inputs]
        rounded = _params(op, params, quantization)
        found = [values[t] for t in op.outputs]
        by_role = {role: rounded.get(p, params[p]) for role, p in op.params.items()}
        made = alternatives(graph, op, inputs, by_role, found[0].shape)
        if made:
            replayed.add(op.id)
        else:
            native = fallback(op, rounded)
            if native is None:
                continue
            made = [native]
        grids = [_grid(graph, quantization, t) for t in op.outputs]
        if not any(all(map(agrees, found, m, grids, [tolerance] * len(found))) for m in made):
            told = [f"{t}: {departure(v, m, g)}" for t, v, m, g in zip(op.outputs, found, made[0], grids, strict=True)]
            faults.append(f"{op.id} ({op.type}, {op.attrs}): {'; '.join(told)}")
    return faults, frozenset(replayed)


def _params(op: Op, params: Mapping[ParamId, Array], quantization: Quantization | None) -> dict[ParamId, Array]:
    """The op's parameters that are on a grid."""
    if quantization is None:
        return {}
    found: dict[ParamId, Array] = {}
    for param in op.params.values():
        encoding = quantization.biases.get((op.id, param), quantization.encodings.get(param))
        if encoding is not None:
            found[param] = encoding.fake_quantize(params[param])
    return found


def _grid(graph: Graph, quantization: Quantization | None, tensor: TensorId) -> Encoding | None:
    if quantization is None or tensor not in quantization.plan or on_grid(graph, quantization.plan, tensor):
        return None
    return quantization.encodings.get(tensor)
