"""Random layers with moments of correlated inputs, for tests of layer-wise solvers."""

import numpy as np

from bitwright.graph import ConvAttrs, Op, OpKind, ParamRole, groups_of, input_channels, to_matrix
from bitwright.grids import PerChannel, QuantSpec, encoding_of_weights
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer

W4 = QuantSpec(4, granularity=PerChannel(0))


def make_op(kind):
    """An op and its weight's shape, by a name."""
    plain = {"strides": (1, 1), "dilations": (1, 1), "pads": ((1, 1), (1, 1))}
    shapes = {
        "linear": (OpKind.LINEAR, None, (6, 12)),
        "conv": (OpKind.CONV, ConvAttrs((3, 3), (2, 1), (1, 1), ((0, 1), (1, 1))), (5, 4, 3, 3)),
        "grouped": (OpKind.CONV, ConvAttrs((3, 3), groups=2, **plain), (6, 3, 3, 3)),
        "depthwise": (OpKind.CONV, ConvAttrs((3, 3), groups=8, **plain), (8, 1, 3, 3)),
        "transposed": (OpKind.CONV_TRANSPOSE, ConvAttrs((2, 2), (2, 2), (1, 1), ((0, 0), (0, 0)), 2), (6, 3, 2, 2)),
    }
    op_kind, attrs, shape = shapes[kind]
    return Op(kind, op_kind, kind, ("x",), ("y",), {ParamRole.WEIGHT: "w"}, attrs), shape


KINDS = ("linear", "conv", "grouped", "depthwise", "transposed")


def inputs(op, shape, rng, samples=24):
    """Non-negative, correlated activations in the op's input shape, with means that differ from zero."""
    channels = input_channels(op, shape)
    mixing = rng.normal(size=(channels, channels)) / np.sqrt(channels)
    size = (samples * 8, channels) if op.kind is OpKind.LINEAR else (samples, 5, 5, channels)
    x = np.maximum(rng.normal(size=size) @ mixing + 0.3, 0).astype(np.float32)
    return x if op.kind is OpKind.LINEAR else np.moveaxis(x, -1, 1)


def make_layer(kind="conv", seed=0, *, spec=W4, noise=0.0, weight=None, x=None, bias=True):
    """A layer as the walk hands it over; `noise` > 0 makes the quantized network's input differ."""
    rng = np.random.default_rng(seed)
    op, shape = make_op(kind)
    if weight is None:
        weight = (rng.normal(size=shape) * rng.uniform(0.2, 2, (shape[0],) + (1,) * (len(shape) - 1))).astype(
            np.float32
        )
    x = inputs(op, shape, rng) if x is None else x
    moments = LayerMoments(op, to_matrix(op, weight).shape[2], paired=noise > 0)
    if noise:
        moments.update(x, (x + noise * rng.normal(size=x.shape) + noise).astype(np.float32))
    else:
        moments.update(x)
    if op.kind is OpKind.CONV_TRANSPOSE and isinstance(spec.granularity, PerChannel):
        spec = spec.with_(granularity=PerChannel(1))
    outputs = groups_of(op) * to_matrix(op, weight).shape[1]
    b = rng.normal(size=outputs).astype(np.float32) if bias else None
    return Layer(op, weight, b, moments, encoding_of_weights(weight, spec))
