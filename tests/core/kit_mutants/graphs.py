"""Backends whose graph says what is not so."""

from __future__ import annotations

from dataclasses import replace

from bitwright.graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    Call,
    ConvAttrs,
    Graph,
    OpKind,
    ParamRole,
    PoolAttrs,
)
from kit_mutants.base import shown, with_attrs, with_ops, with_tensors

TYPES = "test_types_and_attributes_go_with_kinds"
REPLAYED = "test_ops_compute_what_the_graph_says"
SHAPES = "test_shapes_and_types_are_those_of_the_values"

shown("every type is Foo", "cnn", with_ops(lambda op: replace(op, type="Foo")), TYPES)
shown("clips are shown as ReLUs by type", "cnn", with_ops(
    lambda op: replace(op, type="Relu") if op.type == "Clip" else op), TYPES)  # fmt: skip
shown("clips are shown as ReLUs by kind", "cnn", with_ops(
    lambda op: replace(op, kind=OpKind.RELU) if op.type == "Clip" else op), REPLAYED)  # fmt: skip
shown("activations have one type", "tokens", with_ops(
    lambda op: replace(op, type="Tanh") if op.kind is OpKind.ACTIVATION else op), REPLAYED)  # fmt: skip
shown("a product is shown as a sum", "tokens", with_ops(
    lambda op: replace(op, kind=OpKind.ADD, type="Add") if op.type == "Mul" else op), REPLAYED)  # fmt: skip


def window(**changes):
    return with_attrs(PoolAttrs, lambda a: a if a.window is None else replace(a, window=replace(a.window, **changes)))


shown("pools have larger windows", "branches", window(kernel=(5, 5), pads=((2, 2), (2, 2))), REPLAYED)
shown("pools have no strides", "pooled", window(strides=(1, 1)), REPLAYED)
shown("averages count the padding", "pooled", with_attrs(
    PoolAttrs, lambda a: replace(a, count_include_pad=True)), REPLAYED)  # fmt: skip
shown("averages are taken over other axes", "cnn", with_attrs(
    PoolAttrs, lambda a: replace(a, axes=(2,)) if a.axes else a), REPLAYED)  # fmt: skip
shown("clips end elsewhere", "cnn", with_attrs(
    ActivationAttrs, lambda a: replace(a, maximum=1.0) if a.maximum else a), REPLAYED)  # fmt: skip
shown("clips have no end", "cnn", with_attrs(ActivationAttrs, lambda a: ActivationAttrs()), TYPES)
shown("leaky ReLUs leak otherwise", "pooled", with_attrs(
    ActivationAttrs, lambda a: replace(a, alpha=0.01)), REPLAYED)  # fmt: skip
shown("softmax is over another axis", "pooled", with_ops(
    lambda op: replace(op, attrs=AxisAttrs(2)) if op.kind is OpKind.SOFTMAX else op), REPLAYED)  # fmt: skip
shown("batch norms have another ε", "cnn", with_attrs(
    BatchNormAttrs, lambda a: replace(a, epsilon=1e-2)), "test_batch_norm_parameters", REPLAYED)  # fmt: skip
shown("convolutions have no padding", "branches", with_ops(
    lambda op: replace(op, attrs=replace(op.attrs, pads=((0, 0), (0, 0))))
    if isinstance(op.attrs, ConvAttrs) else op), REPLAYED)  # fmt: skip
shown("layouts are in reverse", "cnn", lambda g: Graph(g.ops, g.tensors, {
    p: replace(x, layout=tuple(reversed(range(len(x.shape))))) for p, x in g.params.items()}, g.inputs, g.outputs),
    "test_parameters_lie_as_their_layout_says")  # fmt: skip
shown("channels are said to be last", "cnn", with_tensors(
    lambda t: replace(t, channel_axis=len(t.shape) - 1)), "test_channels_lie_where_linear_ops_have_them")  # fmt: skip
shown("free lengths are fixed", "cnn", with_tensors(
    lambda t: replace(t, shape=(1, *t.shape[1:]))), SHAPES)  # fmt: skip
shown("integers are shown as floats", "tokens", with_tensors(lambda t: replace(t, dtype="float32")), SHAPES)
shown("masks aren't told", "tokens", with_tensors(lambda t: replace(t, mask=False)), "cover[mask]")
shown("a shared parameter isn't told", "pooled", with_ops(
    lambda op: replace(op, params={r: p for r, p in op.params.items() if r is ParamRole.WEIGHT})),
    REPLAYED)  # fmt: skip


shown(
    "axes are said to be exchanged otherwise",
    "tokens",
    with_ops(lambda op: replace(op, call=Call({"perm": (1, 0, 2)})) if op.kind is OpKind.TRANSPOSE else op),
    REPLAYED,
)
