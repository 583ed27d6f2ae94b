"""What in a model's architecture quantization or a target doesn't like: rules over graph and target alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import Params
from bitwright.graph import (
    LINEAR_KINDS,
    ActivationAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    ParamRole,
    batch_norm_fold,
    input_channels,
    kind,
    output_channels,
    successor,
    upstream,
)
from bitwright.grids import Encoding
from bitwright.targets import Target
from bitwright_analysis.imbalance import output_ranges
from bitwright_analysis.records import Hint

SPREAD = 10.0
"""A channel whose range is so many times the median one takes more than three bits from the others."""
COSTLY = {
    "Swish": "hard-swish or ReLU6",
    "HardSwish": "ReLU6, where accuracy allows",
    "Mish": "hard-swish or ReLU6",
    "Gelu": "ReLU, where the model can be trained again",
    "QuickGelu": "ReLU, where the model can be trained again",
    "PRelu": "ReLU",
    "Elu": "ReLU",
    "Selu": "ReLU",
    "Softplus": "ReLU",
}
SIDE_EFFECTS = {
    "Swish": "x·sigmoid(x) has a short negative tail down to −0.28 that an asymmetric 8-bit grid spends few codes on, "
    "and an integer target needs a table or three ops for it",
    "PRelu": "one slope a channel is a multiplication of its own on most integer targets, and the negative side widens "
    "the range that the grid covers",
}
_ACTIVATIONS = kind(
    OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.BATCH_NORM, OpKind.IDENTITY
)

Rule = Callable[["Subject"], Iterator[Hint]]


class Subject:
    """What rules look at.

    Args:
        graph: the model.
        target: the target.
        params: parameter values.
        table: encodings, where there are any yet.
        multiple: channels that the target works on at once.
    """

    def __init__(
        self, graph: Graph, target: Target, params: Params, table: Mapping[str, Encoding], multiple: int
    ) -> None:
        self.graph, self.target, self.params, self.table, self.multiple = graph, target, params, table, multiple


def architecture_hints(
    model: Any,
    target: str | Path | Mapping[str, Any] | Target = "default",
    *,
    sample: Any = None,
    multiple: int | None = None,
    backend: str | None = None,
) -> tuple[Hint, ...]:
    """Hints on a model for a target, in the order of the network; the model isn't changed.

    Args:
        model: a framework's model object, a path, or a `QuantSim` (whose target is then taken).
        target: as `QuantSim` takes it.
        sample: one batch, for frameworks that trace a model.
        multiple: channels that the target works on at once; default 32 for Hexagon targets, 8 for others.
        backend: a backend's name, if several could open the model.

    Raises:
        ModelError: the model can't be opened.
        TargetError: the target's configuration is invalid.
    """
    from bitwright.backend import ParamReader
    from bitwright.simulation import QuantSim, open_model
    from bitwright.targets import load_target

    if isinstance(model, QuantSim):
        return hints_of(model.graph, model.target, model.params, model.encodings, multiple)
    chosen = load_target(target)
    adapter, native = open_model(model, sample, backend)
    graph = adapter.graph(native)
    return hints_of(graph, chosen, ParamReader(adapter, native, graph), {}, multiple)


def hints_of(
    graph: Graph, target: Target, params: Params, table: Mapping[str, Encoding], multiple: int | None = None
) -> tuple[Hint, ...]:
    """As `architecture_hints`, for what is open already."""
    subject = Subject(graph, target, params, table, multiple or (32 if target.hw_version is not None else 8))
    order = {op.id: i for i, op in enumerate(graph.ops)}
    found = [hint for rule in RULES for hint in rule(subject)]
    return tuple(sorted(found, key=lambda h: order.get(h.where, len(order))))


def _hint(op: Op, rule: str, what: str, remedy: str, level: str = "warning") -> Hint:
    return Hint(where=op.id, rule=rule, what=what, remedy=remedy, level=level, source=op.source)


def unknown_ops(s: Subject) -> Iterator[Hint]:
    """Ops that no target can name run in float, and end every pattern."""
    for op in s.graph:
        if op.kind is OpKind.OPAQUE and any(s.graph.tensors[t].is_float for t in op.outputs):
            yield _hint(
                op,
                "unknown",
                f"{op.native or op.type} is of no kind that a target could name: it runs in float",
                "express it in standard ops, or let the part before and the part after be quantized apart",
            )


def unsupported_ops(s: Subject) -> Iterator[Hint]:
    """Ops that the target has no integer arithmetic for."""
    for op in s.graph:
        floats = any(s.graph.tensors[t].is_float for t in op.outputs)
        if op.kind is not OpKind.OPAQUE and floats and not s.target.runs(s.target.type_of(op)):
            yield _hint(
                op,
                "unsupported",
                f"{s.target.name} has no integer kernel for {op.type}: it runs in float, with a "
                "conversion before and after",
                "replace it, or move it to the end of the model",
            )


def channel_counts(s: Subject) -> Iterator[Hint]:
    """Channels that don't fill the target's vectors."""
    graph, m = s.graph, s.multiple
    for op in graph.linear_ops:
        if op.kind is OpKind.LINEAR or op.weight is None:
            continue
        shape = graph.params[op.weight].shape
        counts = {"output": output_channels(op, shape)}
        # The model's own inputs have the channels that images have.
        if op.data_inputs[0] not in graph.inputs and not graph.is_depthwise(op):
            counts["input"] = input_channels(op, shape)
        odd = {side: n for side, n in counts.items() if n % m}
        # What a head computes is counted in classes or coordinates, which nobody is free to choose.
        if op.output in graph.outputs:
            odd.pop("output", None)
        if not odd:
            continue
        idle = 1 - np.prod([n / (-(-n // m) * m) for n in counts.values()])
        sides = " and ".join(f"{n} {side}" for side, n in odd.items())
        few = min(odd.values()) < m
        yield _hint(
            op,
            "channels",
            f"{sides} channels are no multiple of {m}: {idle:.0%} of the vector lanes idle",
            f"use {'at least ' if few else ''}{-(-max(odd.values()) // m) * m} channels, or the next multiple below",
            level="warning" if idle >= 0.25 else "note",
        )


def standing_batch_norms(s: Subject) -> Iterator[Hint]:
    """Batch norms that no layer can absorb, and why."""
    for op in s.graph:
        if op.kind is OpKind.BATCH_NORM and batch_norm_fold(s.graph, op) is None:
            reason, remedy = _why_not_folded(s.graph, op)
            yield _hint(
                op,
                "batch-norm",
                f"can't be folded: {reason}. It stays an op with a grid of its own for its output",
                remedy,
            )


def _why_not_folded(graph: Graph, op: Op) -> tuple[str, str]:
    """The first obstacle before it, and the one behind it."""
    if not {ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR} <= op.params.keys():
        return "its statistics are computed at run time", "export the model in inference mode"
    before, after = graph.producer(op.data_inputs[0]), successor(graph, op)
    parts = []
    remedy = "place it right after the layer that it belongs to"
    if before is None:
        parts.append("it stands at the model's input")
        remedy = "put its scale and shift into the preprocessing"
    elif before.kind not in LINEAR_KINDS:
        parts.append(f"a {before.type} stands before it")
    elif successor(graph, before) is not op:
        parts.append(f"the output of {before.id} has other readers")
        remedy = "give the branch its own copy of the layer, or move the batch norm behind the branch"
    elif any(len(graph.users(p)) > 1 for p in before.params.values()):
        parts.append(f"{before.id} shares its weight with another layer")
        remedy = "give the layer its own weight"
    else:
        parts.append(f"{before.id} is a grouped transposed convolution")
    if after is None:
        parts.append("several ops read its result" if graph.consumers(op.output) else "its result leaves the model")
    elif after.kind not in LINEAR_KINDS:
        parts.append(f"a {after.type} follows")
    elif isinstance(after.attrs, ConvAttrs) and any(pad != (0, 0) for pad in after.attrs.pads):
        parts.append(f"{after.id} pads with zeros, which the batch norm would have moved")
    elif isinstance(after.attrs, ConvAttrs):
        parts.append(f"{after.id} is a grouped or transposed convolution, or shares its weight")
    else:
        parts.append(f"{after.id} has no weight of its own")
    return " and ".join(parts), remedy


def padding(s: Subject) -> Iterator[Hint]:
    """Pads that stand alone, and padded convolutions that high biases can't be moved across."""
    graph = s.graph
    for op in graph:
        if op.kind is OpKind.PAD:
            yield _hint(
                op,
                "pad",
                "a padding of its own costs a pass over the tensor"
                + (", and its value takes part in the range of the grid" if ParamRole.CONSTANT in op.params else ""),
                "let the convolution after it pad, where the padding is of zeros",
            )
    between = [op for op in graph.linear_ops if _padded(op) and _behind_activation(graph, op)]
    if between:
        yield _hint(
            between[0],
            "padding-between",
            f"{len(between)} padded convolutions follow layer and activation "
            f"({', '.join(op.id for op in between[:3])}{', …' if len(between) > 3 else ''}): padded zeros don't move "
            "with a bias, so that cross_layer_equalization leaves high biases in front of them where they are",
            "nothing, unless such a bias widens an activation's range: absorb_through_padding moves it all the same, "
            "exact away from the border",
            level="note",
        )


def _padded(op: Op) -> bool:
    return op.kind is OpKind.CONV and isinstance(op.attrs, ConvAttrs) and any(p != (0, 0) for p in op.attrs.pads)


def _behind_activation(graph: Graph, op: Op) -> bool:
    found = upstream(graph, op.data_inputs[0], _ACTIVATIONS)
    return found is not None and found.kind in LINEAR_KINDS and found.output != op.data_inputs[0]


def costly_activations(s: Subject) -> Iterator[Hint]:
    """Activation functions that cost accuracy or time in integers."""
    for op in s.graph:
        name = _activation_name(s.graph, op)
        if name in COSTLY:
            what = SIDE_EFFECTS.get(
                name, "integer targets compute it by a table or in float, and its negative tail widens the grid"
            )
            yield _hint(
                op,
                "activation",
                f"{'SiLU' if name == 'Swish' else name}: {what}",
                f"{COSTLY[name]} if it can be trained again; "
                "otherwise 16-bit activations there, if sensitivities show it",
                level="note",
            )


def _activation_name(graph: Graph, op: Op) -> str:
    if op.kind is OpKind.OPAQUE:
        return ""
    if op.kind is OpKind.PRELU:
        # A leaky ReLU has one slope, which runtimes have kernels for.
        leaky = (
            isinstance(op.attrs, ActivationAttrs) and op.attrs.alpha is not None and ParamRole.SLOPE not in op.params
        )
        return "" if leaky else "PRelu"
    if op.kind is OpKind.MUL and len(op.data_inputs) == 2:
        for gate, value in (op.data_inputs, op.data_inputs[::-1]):
            producer = graph.producer(gate)
            if producer is not None and producer.data_inputs[:1] == (value,):
                if producer.type == "Sigmoid":
                    return "Swish"
                if producer.type == "HardSigmoid":
                    return "HardSwish"
    return op.type


def uneven_weights(s: Subject) -> Iterator[Hint]:
    """Layers with one scale for very uneven channels: depthwise ones above all."""
    for op in s.graph.linear_ops:
        assert op.weight is not None
        encoding = s.table.get(op.weight)
        per_channel = encoding.scale.ndim > 0 if encoding is not None else s.target.per_channel(s.target.type_of(op))
        if per_channel:
            continue
        ranges = output_ranges(op, np.asarray(s.params[op.weight]))
        alive = ranges[ranges > 0]
        if len(alive) < 2:
            continue
        ratio = float(alive.max() / np.median(alive))
        if ratio >= SPREAD:
            weights = "depthwise weights have" if s.graph.is_depthwise(op) else "weights have"
            yield _hint(
                op,
                "ranges",
                f"{weights} one scale for all channels, and the widest channel's range is {ratio:.0f} × the "
                f"median one: half of the channels lose {np.log2(ratio):.1f} bits",
                "cross_layer_equalization, or a target with per-channel weights",
            )


RULES: tuple[Rule, ...] = (
    unknown_ops,
    unsupported_ops,
    channel_counts,
    standing_batch_norms,
    padding,
    costly_activations,
    uneven_weights,
)
"""All of them; each yields its hints."""
