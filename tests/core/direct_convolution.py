"""Convolutions written out as loops, and a case of every geometry."""

import itertools

import numpy as np

from bitwright.graph import ConvAttrs, Op, OpKind


def conv_op(kind, attrs):
    return Op("layer", kind, "Conv", ("x",), ("y",), attrs=attrs)


def direct(op, x, w):
    """y by definition, float64: scatter for a transposed convolution, gather for a convolution."""
    a, spatial = op.attrs, x.shape[2:]
    groups, rank = a.groups, len(a.kernel)
    x, w = x.astype(np.float64), w.astype(np.float64)
    if op.kind is OpKind.CONV:
        size = [
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(spatial, a.pads, a.dilations, a.kernel, a.strides, strict=True)
        ]
        y = np.zeros((len(x), w.shape[0], *size))
        per_in, per_out = w.shape[1], w.shape[0] // groups
    else:
        extra = a.output_padding or (0,) * rank
        size = [
            s * (n - 1) + e + d * (k - 1) + 1 - sum(p)
            for n, p, d, k, s, e in zip(spatial, a.pads, a.dilations, a.kernel, a.strides, extra, strict=True)
        ]
        y = np.zeros((len(x), w.shape[1] * groups, *size))
        per_in, per_out = w.shape[0] // groups, w.shape[1]
    outer = size if op.kind is OpKind.CONV else spatial
    inner = spatial if op.kind is OpKind.CONV else size
    for g in range(groups):
        ins, outs = slice(g * per_in, (g + 1) * per_in), slice(g * per_out, (g + 1) * per_out)
        for at in itertools.product(*map(range, outer)):
            for tap in itertools.product(*map(range, a.kernel)):
                far = tuple(
                    i * s + t * d - p[0] for i, s, t, d, p in zip(at, a.strides, tap, a.dilations, a.pads, strict=True)
                )
                if any(not 0 <= f < n for f, n in zip(far, inner, strict=True)):
                    continue
                if op.kind is OpKind.CONV:
                    y[(slice(None), outs, *at)] += x[(slice(None), ins, *far)] @ w[(outs, slice(None), *tap)].T
                else:
                    y[(slice(None), outs, *far)] += x[(slice(None), ins, *at)] @ w[(ins, slice(None), *tap)]
    return y


C, T = OpKind.CONV, OpKind.CONV_TRANSPOSE
CASES = {
    "plain": (C, ConvAttrs((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0))), (2, 4, 6, 5), (3, 4, 3, 3)),
    "pointwise": (C, ConvAttrs((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))), (2, 4, 3, 3), (5, 4, 1, 1)),
    "even": (C, ConvAttrs((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0))), (2, 4, 5, 5), (3, 4, 2, 2)),
    "strided_padded": (C, ConvAttrs((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1))), (2, 4, 7, 6), (3, 4, 3, 3)),
    "asymmetric_pads": (C, ConvAttrs((3, 2), (2, 1), (1, 1), ((0, 1), (2, 0))), (2, 2, 6, 5), (3, 2, 3, 2)),
    "dilated": (C, ConvAttrs((3, 3), (1, 2), (2, 1), ((2, 2), (1, 1))), (1, 3, 7, 7), (2, 3, 3, 3)),
    "grouped": (C, ConvAttrs((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "depthwise": (C, ConvAttrs((3, 3), (2, 2), (1, 1), ((0, 1), (0, 1)), 4), (2, 4, 6, 6), (4, 1, 3, 3)),
    "depthwise_multiplier": (C, ConvAttrs((3,), (1,), (1,), ((1, 1),), 3), (2, 3, 8), (6, 1, 3)),
    "conv1d": (C, ConvAttrs((5,), (3,), (1,), ((2, 1),)), (3, 2, 11), (4, 2, 5)),
    "conv3d": (
        C,
        ConvAttrs((2, 3, 2), (1, 2, 1), (1, 1, 2), ((1, 0), (1, 1), (0, 1))),
        (1, 2, 4, 5, 5),
        (3, 2, 2, 3, 2),
    ),
    "transposed": (T, ConvAttrs((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1))), (2, 4, 4, 3), (4, 3, 3, 3)),
    "transposed_output_padding": (
        T,
        ConvAttrs((3, 3), (2, 3), (1, 1), ((1, 1), (0, 1)), 1, (1, 2)),
        (2, 4, 3, 3),
        (4, 2, 3, 3),
    ),
    "transposed_grouped_dilated": (
        T,
        ConvAttrs((3, 2), (2, 1), (1, 2), ((1, 0), (0, 0)), 2),
        (2, 4, 3, 4),
        (4, 3, 3, 2),
    ),
    "transposed_cropped": (T, ConvAttrs((2, 2), (2, 2), (1, 1), ((3, 2), (2, 3))), (1, 2, 6, 6), (2, 3, 2, 2)),
    "transposed_1d": (T, ConvAttrs((4,), (2,), (1,), ((1, 1),)), (2, 3, 5), (3, 2, 4)),
    "transposed_3d": (T, ConvAttrs((2, 2, 2), (2, 1, 2), (1, 1, 1), ((0, 0),) * 3), (1, 2, 2, 3, 2), (2, 2, 2, 2, 2)),
}


def tensors(name):
    kind, attrs, x_shape, w_shape = CASES[name]
    rng = np.random.default_rng(len(name))
    return (
        conv_op(kind, attrs),
        rng.normal(size=x_shape).astype(np.float32),
        rng.normal(size=w_shape).astype(np.float32),
    )
