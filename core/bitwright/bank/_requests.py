"""What a bank asks of the data: a histogram and a range of every tensor, moments of every column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bitwright.backend import Backend, Part, PartialExecution, Picking, Session, Tap
from bitwright.bank._record import PRECISION
from bitwright.calibration import InParts, in_parts, sampled
from bitwright.graph import Graph, Op, OpKind, Tensor, TensorId, groups_of, input_channels
from bitwright.layerwise import blocks_within
from bitwright.statistics import HistogramStatistic, LayerMoments, RangeStatistic, Request, Source

Opener = Callable[[Source, Sequence[Tap]], Session]
"""Opens a session of a network for some taps."""


def float_only(backend: Backend[Any], model: object) -> Opener:
    """Opens sessions of a float model, that pick if the backend's can; those of the same taps are one."""
    opens = backend.picking_session if isinstance(backend, Picking) else backend.session
    known: dict[tuple[Tap, ...], Session] = {}

    def opened(source: Source, taps: Sequence[Tap]) -> Session:
        found = known.get(tuple(taps))
        if found is None:
            found = known[tuple(taps)] = opens(model, taps)
        return found

    return opened


def divided(backend: Backend[Any], model: object, graph: Graph) -> InParts | None:
    """The parts of a float network, where it is large."""

    def open_part(source: Source, part: Part, feeds: Sequence[TensorId] | None, taps: Sequence[Tap]) -> Session:
        if feeds is None:
            return backend.session(model, taps)
        assert isinstance(backend, PartialExecution)
        return backend.segment(model, feeds, taps)

    found = in_parts(backend, graph, open_part)
    return found if found is not None and len(found.parts) > 1 else None


def all_requests(
    graph: Graph,
    tensors: Iterable[TensorId],
    shared: Mapping[object, Sequence[Op]],
    moments_gib: float,
    thin: int | None,
) -> list[Request]:
    """Everything, under `histogram/TENSOR`, `range/TENSOR` and `moments/OP`, of ops that share columns the first."""
    return [*_tensor_requests(graph, tensors), *_moment_requests(graph, shared, moments_gib, thin)]


def _tensor_requests(graph: Graph, tensors: Iterable[TensorId]) -> Iterator[Request]:
    for t in tensors:
        axis = _channels_of(graph, t)
        yield Request(
            f"histogram/{t}", (t,), sampled(lambda: HistogramStatistic(precision=PRECISION), graph.tensors[t])
        )
        yield Request(f"range/{t}", (t,), partial(RangeStatistic, axis))


def _channels_of(graph: Graph, tensor: TensorId) -> int | None:
    """The channel axis of a tensor whose channels techniques look at: one that linear ops read."""
    readers = [op for op in linear_ops(graph) if op.data_inputs[0] == tensor]
    if not readers:
        return None
    known = graph.tensors[tensor]
    if readers[0].kind is OpKind.LINEAR:  # its features, whichever axis the network's channels are on
        return -1 if known.shape is None else len(known.shape) - 1
    return 1 if known.channel_axis is None else known.channel_axis


def linear_ops(graph: Graph) -> list[Op]:
    return [op for op in graph.linear_ops if op.weight is not None]


def features_of(op: Op, graph: Graph) -> int:
    """K of the op's columns."""
    shape = graph.params[op.weight or ""].shape
    return input_channels(op, shape) // groups_of(op) * int(np.prod(shape[2:], dtype=np.int64))


def columns_key(op: Op, graph: Graph) -> tuple[object, ...]:
    """Equal for ops that read the same columns of the same tensor."""
    return op.data_inputs[0], op.kind, repr(op.attrs), features_of(op, graph)


def blocks_of(op: Op, graph: Graph, memory: float) -> tuple[int, str]:
    """In how many blocks an op's moments take so many GiB; or 0, and why in none."""
    return blocks_within(memory, op, graph.params[op.weight or ""].shape, features_of(op, graph))


def _moment_requests(
    graph: Graph, shared: Mapping[object, Sequence[Op]], gib: float, thin: int | None
) -> Iterator[Request]:
    for op, *_ in shared.values():
        features, (blocks, _) = features_of(op, graph), blocks_of(op, graph, gib)
        read = graph.tensors[op.data_inputs[0]]
        make = partial(
            LayerMoments, op, features, read.channel_axis, paired=False, blocks=blocks, thin=thin,
            spatial=_spatial(op, read),
        )  # fmt: skip
        memory = LayerMoments.bytes_for(op, features, paired=False, blocks=blocks)
        yield Request(f"moments/{op.id}", (op.data_inputs[0],), make, memory=memory)


def _spatial(op: Op, read: Tensor) -> tuple[int, ...] | None:
    """The axes of an op's input but samples and channels, where their lengths are known."""
    if read.shape is None or len(read.shape) < 3:
        return None
    default = -1 if op.kind is OpKind.LINEAR else 1
    channels = default if op.kind is OpKind.LINEAR or read.channel_axis is None else read.channel_axis
    rest = [n for i, n in enumerate(read.shape) if i not in (0, channels % len(read.shape))]
    known = tuple(n for n in rest if n is not None)
    return known if len(known) == len(rest) else None
