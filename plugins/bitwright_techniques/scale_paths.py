"""Where a factor for each channel can move from an activation into the weights that read it.

y = W x = (W·s)(x/s): the division is absorbed by what made x, the gain and shift of a norm or the rows of a linear op,
if everything on the way lets factors through and *all* that read x can take them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import LINEAR_KINDS, BatchNormAttrs, Graph, Op, OpId, OpKind, ParamRole, TensorId, output_channels
from bitwright_techniques.channel_chains import Flow, arrival, bounded, flow_of, passes

_NORMS = frozenset({OpKind.LAYER_NORM, OpKind.NORM, OpKind.BATCH_NORM})
_LAST_AXIS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})

Obstacle = Callable[[Op], str | None]
"""Why an op's parameters can't be changed; None where they can."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear op that takes the factors into its weight.

    Attributes:
        op: the op.
        channel_of: for each of its input channels (features), the source's output channel.
    """

    op: Op
    channel_of: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class ScalePath:
    """A source and all that read it.

    Attributes:
        source: a norm with a gain of its own, or a linear op.
        channels: of the source.
        readers: every linear op behind it.
    """

    source: Op
    channels: int
    readers: tuple[Reader, ...]


class _Blocked(Exception):
    """A path ends at something that factors can't pass; the message says what."""


def find_paths(
    graph: Graph, obstacle: Obstacle, movable: Callable[[TensorId], bool]
) -> tuple[list[ScalePath], dict[OpId, str]]:
    """All paths, and why the inputs of the remaining linear ops can't be scaled.

    Args:
        graph: the graph.
        obstacle: see `Obstacle`; asked of sources and readers.
        movable: whether a tensor's range may change.
    """
    paths: list[ScalePath] = []
    reasons: dict[TensorId, str] = {}
    for op in graph.ops:
        if op.kind in LINEAR_KINDS | _NORMS:
            try:
                paths.append(_path(graph, op, obstacle, movable))
            except _Blocked as blocked:
                reasons[op.output] = str(blocked)
    reached = {reader.op.id for path in paths for reader in path.readers}
    missed = {op.id: _reason(graph, op, reasons) for op in graph.linear_ops if op.id not in reached}
    return paths, missed


def _path(graph: Graph, op: Op, obstacle: Obstacle, movable: Callable[[TensorId], bool]) -> ScalePath:
    flow = _start(graph, op)
    if (reason := obstacle(op)) is not None:
        raise _Blocked(reason)
    readers = tuple(_readers(graph, op.output, flow, obstacle, movable))
    if not readers:
        raise _Blocked(f"no linear op reads {op.id!r}")
    return ScalePath(op, flow.channels, readers)


def _start(graph: Graph, op: Op) -> Flow:
    """Where the channels of a source's output lie.

    Raises:
        _Blocked: it has no parameter for each channel.
    """
    if op.kind in LINEAR_KINDS:
        if op.weight is None:
            raise _Blocked(f"{op.id!r} has no weight of its own")
        return flow_of(graph, op, output_channels(op, graph.params[op.weight].shape))
    gain = op.params.get(ParamRole.GAMMA)
    if gain is None:
        raise _Blocked(f"{op.id!r} has no gain to absorb factors")
    shape, tensor = graph.params[gain].shape, graph.tensors[op.output]
    rank = None if tensor.shape is None else len(tensor.shape)
    if op.kind is OpKind.LAYER_NORM or op.type in _LAST_AXIS:
        axis = -1 if rank is None else rank - 1
    elif isinstance(op.attrs, BatchNormAttrs):
        axis = op.attrs.axis
    else:
        axis = 1 if tensor.channel_axis is None else tensor.channel_axis
    size = None if tensor.shape is None else tensor.shape[axis]
    if len(shape) != 1 or (size is not None and size != shape[0]):
        raise _Blocked(f"the gain of {op.id!r} isn't one number for each channel")
    return Flow(shape[0], axis if rank is None else axis % rank, rank)


def _readers(
    graph: Graph, tensor: TensorId, flow: Flow, obstacle: Obstacle, movable: Callable[[TensorId], bool]
) -> list[Reader]:
    if tensor in graph.outputs:
        raise _Blocked(f"{tensor!r} is an output of the model")
    if not movable(tensor):
        raise _Blocked(f"the encoding of {tensor!r} is frozen")
    found: list[Reader] = []
    for op in graph.consumers(tensor):
        if op.kind in LINEAR_KINDS:
            channel_of = arrival(graph, flow, op)
            if channel_of is None:
                raise _Blocked(f"the channels of {tensor!r} aren't those that {op.id!r} reads")
            if (reason := obstacle(op)) is not None:
                raise _Blocked(reason)
            found.append(Reader(op, channel_of))
            continue
        behind = replace(flow)
        if bounded(op) or not (_product(graph, tensor, op) or passes(graph, behind, op, pooling=True)):
            raise _Blocked(f"{tensor!r} is read by {op.id!r} ({op.type}), which factors can't pass")
        found += _readers(graph, op.output, behind, obstacle, movable)
    return found


def _product(graph: Graph, tensor: TensorId, op: Op) -> bool:
    """A product with another tensor or a constant that leaves the shape: linear in each operand."""
    shapes = (graph.tensors[tensor].shape, graph.tensors[op.output].shape)
    once = op.data_inputs.count(tensor) == 1
    return op.kind is OpKind.MUL and once and shapes[0] is not None and shapes[0] == shapes[1]


def _reason(graph: Graph, op: Op, reasons: dict[TensorId, str]) -> str:
    """What stands between an op's input and a source, walking back through what lets factors pass."""
    waiting: list[TensorId] = [op.data_inputs[0]]
    last = ""
    while waiting:
        tensor = waiting.pop()
        if tensor in reasons:
            return reasons[tensor]
        maker = graph.producer(tensor)
        if maker is None or not maker.data_inputs:
            last = last or "its input comes straight from the model's input"
            continue
        shape = graph.tensors[tensor].shape or (0, 0)
        flow = Flow(shape[min(1, len(shape) - 1)] or 1, min(1, len(shape) - 1), len(shape))
        through = maker.kind is OpKind.MUL or passes(graph, flow, maker, pooling=True)
        if through and not bounded(maker):
            waiting += reversed(maker.data_inputs)
        else:
            last = last or f"its input is made by {maker.id!r} ({maker.type}), which can't absorb factors"
    return last
