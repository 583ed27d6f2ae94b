"""Chains of linear ops whose channels can be rescaled in one and undone in the next.

Two neighbours form a link where everything between them is positively homogeneous and keeps channels apart:
f(s·x) = s·f(x) for every s > 0 of each channel. That holds for ReLU, PReLU, pooling and flattening, and for a
clipped ReLU as far as its upper bound plays no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import (
    LINEAR_KINDS,
    ActivationAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    PoolAttrs,
    TensorId,
    groups_of,
    input_channels,
    output_channels,
)

RECTIFIERS = frozenset({OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU})
_POOLS = frozenset({OpKind.AVERAGE_POOL, OpKind.MAX_POOL})


@dataclass(frozen=True, eq=False)
class Link:
    """Two neighbouring linear ops.

    Attributes:
        first, second: the ops.
        between: what lies between, in order.
        channel_of: for each input channel or feature of `second`, the output channel of `first` that it belongs to.
    """

    first: Op
    second: Op
    between: tuple[Op, ...]
    channel_of: NDArray[np.intp]

    @property
    def rectified(self) -> bool:
        """Whether negative values are changed on the way."""
        return any(op.kind in RECTIFIERS for op in self.between)


Chain = tuple[Link, ...]
ClipRule = Callable[[Op, Op], bool]


def _always(first: Op, clip: Op) -> bool:
    return True


def bounded(op: Op) -> bool:
    """A clipped ReLU with an upper bound."""
    return op.kind is OpKind.CLIPPED_RELU and isinstance(op.attrs, ActivationAttrs) and op.attrs.maximum is not None


def is_depthwise(graph: Graph, op: Op) -> bool:
    """A grouped (transposed) convolution with one input and one output channel a group."""
    if op.weight is None or groups_of(op) == 1:
        return False
    shape = graph.params[op.weight].shape
    return input_channels(op, shape) == output_channels(op, shape) == groups_of(op)


def output_axis(graph: Graph, op: Op) -> int:
    """The weight's axis that runs over output channels."""
    return 1 if op.kind is OpKind.CONV_TRANSPOSE and not is_depthwise(graph, op) else 0


def input_axis(graph: Graph, op: Op) -> int:
    """The weight's axis that runs over input channels."""
    return 0 if op.kind is OpKind.CONV_TRANSPOSE or is_depthwise(graph, op) else 1


def find_chains(
    graph: Graph,
    eligible: Callable[[Op], bool],
    movable: Callable[[TensorId], bool],
    *,
    clipped: ClipRule = _always,
    pooling: bool = True,
) -> list[Chain]:
    """All maximal chains, cut into sets that are equalized together.

    A set begins and ends with an op that mixes channels and has only depthwise ones inside, as (conv, conv),
    (pointwise, depthwise, pointwise) or, at the ends of a chain, (depthwise, conv). Grouped convolutions that
    aren't depthwise end a chain.

    Args:
        graph: the graph.
        eligible: whether an op's parameters may change.
        movable: whether a tensor's range may change.
        clipped: whether to go on through a clipped ReLU, given the op that begins the link and the clip.
        pooling: go through pooling and flattening.
    """
    links: dict[str, Link] = {}
    for op in graph.linear_ops:
        if _fits(graph, op) and eligible(op):
            found = _link(graph, op, movable, clipped=clipped, pooling=pooling)
            if found is not None and _fits(graph, found.second) and eligible(found.second):
                links[op.id] = found
    reached = {link.second.id for link in links.values()}
    sets: list[Chain] = []
    for op in graph.linear_ops:
        if op.id in reached or op.id not in links:
            continue
        open_set: list[Link] = []
        link: Link | None = links[op.id]
        while link is not None:
            open_set.append(link)
            following = links.get(link.second.id)
            if following is None or not is_depthwise(graph, link.second):
                sets.append(tuple(open_set))
                open_set = []
            link = following
    return sets


def _fits(graph: Graph, op: Op) -> bool:
    return groups_of(op) == 1 or is_depthwise(graph, op)


@dataclass
class Flow:
    """Where channels lie in the tensor at hand: axis and rank (None where the shape is unknown)."""

    channels: int
    axis: int
    rank: int | None
    layout: str = "whole"  # or, once flattened, "repeat" (channels first) or "tile" (channels last)
    positions: int | None = None  # spatial positions that were flattened, where known


def _link(
    graph: Graph, op: Op, movable: Callable[[TensorId], bool], *, clipped: ClipRule, pooling: bool
) -> Link | None:
    assert op.weight is not None
    flow = flow_of(graph, op, output_channels(op, graph.params[op.weight].shape))
    tensor = op.output
    between: list[Op] = []
    while True:
        following = graph.sole_consumer(tensor)
        if following is None or not movable(tensor):
            return None
        if following.kind in LINEAR_KINDS:
            channel_of = arrival(graph, flow, following)
            return None if channel_of is None else Link(op, following, tuple(between), channel_of)
        if not passes(graph, flow, following, pooling=pooling) or (bounded(following) and not clipped(op, following)):
            return None
        between.append(following)
        tensor = following.output


def flow_of(graph: Graph, op: Op, channels: int) -> Flow:
    """Where the channels of a linear op's output lie."""
    tensor = graph.tensors[op.output]
    rank = None if tensor.shape is None else len(tensor.shape)
    if rank is None and isinstance(op.attrs, ConvAttrs):
        rank = len(op.attrs.kernel) + 2
    if op.kind is OpKind.LINEAR:
        return Flow(channels, -1 if rank is None else rank - 1, rank)
    axis = 1 if tensor.channel_axis is None else tensor.channel_axis
    return Flow(channels, axis if rank is None else axis % rank, rank)


def passes(graph: Graph, flow: Flow, op: Op, *, pooling: bool) -> bool:
    """Whether channels stay apart and scale through an op; moves `flow` behind it."""
    if op.kind in (OpKind.RELU, OpKind.PRELU, OpKind.IDENTITY):
        return True
    if op.kind is OpKind.CLIPPED_RELU:
        # Only a clip at zero from below is homogeneous, once the bound above doesn't matter.
        return isinstance(op.attrs, ActivationAttrs) and op.attrs.minimum == 0
    if not pooling or flow.layout != "whole" or flow.rank is None:
        return False
    if op.kind in _POOLS and isinstance(op.attrs, PoolAttrs):
        axes = {a % flow.rank for a in op.attrs.axes}
        if axes & {0, flow.axis}:
            return False
        if axes and not op.attrs.keepdims:
            flow.axis -= sum(a < flow.axis for a in axes)
            flow.rank -= len(axes)
        return True
    if op.kind is OpKind.MAX_POOL:  # without attributes: over other axes, if rank and channels stay
        after = graph.tensors[op.output].shape
        return op.attrs is None and after is not None and len(after) == flow.rank and after[flow.axis] == flow.channels
    return op.kind is OpKind.RESHAPE and _flattens(graph, flow, op)


def _flattens(graph: Graph, flow: Flow, op: Op) -> bool:
    before, after = (graph.tensors[t].shape for t in (op.data_inputs[0], op.output))
    if after is None or len(after) != 2 or flow.rank is None or flow.axis not in (1, flow.rank - 1):
        return False
    if before is not None and None not in (before[0], after[0]) and before[0] != after[0]:
        return False
    spatial = None if before is None else [n for i, n in enumerate(before) if i not in (0, flow.axis)]
    if spatial is not None and None not in spatial:
        flow.positions = int(np.prod([n or 1 for n in spatial]))
    elif op.type != "Flatten":  # a reshape to rank 2 may fold positions into the samples instead
        return False
    flow.layout = "repeat" if flow.axis == 1 else "tile"
    flow.axis, flow.rank = 1, 2
    return True


def arrival(graph: Graph, flow: Flow, op: Op) -> NDArray[np.intp] | None:
    """Channel of each input feature of the op that ends a link; None where they don't correspond."""
    if op.weight is None:
        return None
    features = input_channels(op, graph.params[op.weight].shape)
    known = graph.tensors[op.data_inputs[0]].channel_axis
    if op.kind is OpKind.LINEAR:
        on_channels = flow.axis == -1 or flow.rank is None or flow.axis == flow.rank - 1
    else:
        wanted = 1 if known is None else known
        on_channels = flow.rank is not None and flow.axis == wanted % flow.rank
    if not on_channels or features % flow.channels:
        return None
    times = features // flow.channels
    if times != (flow.positions or times) or (flow.layout == "whole" and times != 1):
        return None
    each = np.arange(flow.channels)
    return np.tile(each, times) if flow.layout == "tile" else np.repeat(each, times)
