"""Small reference models, one for each shape of network that a technique or a backend must cope with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import OpKind, ParamRole
from bitwright.testing.builder import Builder
from bitwright.testing.reference import ReferenceModel

IDS = 12
"""How many rows embeddings have."""


def conv_bn_relu(seed: int = 0, *, depth: int = 3, relu6: bool = False, bias: bool = False) -> ReferenceModel:
    """`depth` times conv → batch norm → ReLU (or ReLU6), then global pooling and a linear classifier."""
    b = Builder(seed)
    x = b.input("x", 3, 8, 8)
    for i in range(1, depth + 1):
        x = b.conv(f"conv{i}", x, 4 + 2 * i, pad=1, bias=bias)
        x = b.batch_norm(f"bn{i}", x)
        x = b.clip(f"act{i}", x) if relu6 else b.relu(f"act{i}", x)
    x = b.flatten("flatten", b.global_pool("pool", x))
    return b.build(b.linear("fc", x, 5))


def depthwise_triple(seed: int = 0, *, spread: float = 1.0, relu6: bool = True) -> ReferenceModel:
    """Pointwise → depthwise → pointwise with ReLU6 (or ReLU) between, as in MobileNet; `spread` widens its ranges.

    Channel scales are drawn log-normal with that standard deviation and cancel between layers, so that the float
    function is well behaved while per-tensor weight quantization is not.
    """
    b = Builder(seed)
    x = b.input("x", 4, 8, 8)
    s, t = (np.exp(b.rng.normal(0, spread, 8)) for _ in range(2))
    weight = b.rng.normal(0, 0.5, (8, 4, 1, 1)) * s[:, None, None, None]
    x = b.conv("expand", x, 8, 1, weight=weight, bias=b.rng.normal(0, 0.1, 8) * s)
    x = b.clip("act1", x) if relu6 else b.relu("act1", x)
    weight = b.rng.normal(0, 0.4, (8, 1, 3, 3)) * (t / s)[:, None, None, None]
    x = b.conv("depthwise", x, 8, 3, pad=1, groups=8, weight=weight, bias=b.rng.normal(0, 0.1, 8) * t)
    x = b.clip("act2", x) if relu6 else b.relu("act2", x)
    weight = b.rng.normal(0, 0.4, (6, 8, 1, 1)) / t[:, None, None]
    return b.build(b.conv("project", x, 6, 1, weight=weight))


def residual(seed: int = 0) -> ReferenceModel:
    """A block whose input is also added to its output."""
    b = Builder(seed)
    x = b.relu("act0", b.conv("stem", b.input("x", 3, 8, 8), 6, pad=1))
    y = b.relu("act1", b.conv("conv1", x, 6, pad=1))
    y = b.conv("conv2", y, 6, pad=1)
    y = b.relu("act2", b.binary("add", "Add", x, y))
    return b.build(b.conv("head", y, 4, 1))


def concat_branches(seed: int = 0) -> ReferenceModel:
    """Two branches concatenated, with max pooling and a grouped convolution."""
    b = Builder(seed)
    x = b.relu("act0", b.conv("stem", b.input("x", 3, 8, 8), 4, pad=1))
    left = b.relu("act1", b.conv("left", x, 4, 1))
    right = b.pool("pool", b.conv("right", x, 4, pad=1, groups=2), 3, pad=1)
    y = b.concat("concat", [left, right])
    return b.build(b.conv("head", y, 6, 3, stride=2, groups=2))


def mlp(seed: int = 0) -> ReferenceModel:
    """Linear layers with ReLU and softmax on (samples, features)."""
    b = Builder(seed)
    x = b.relu("act1", b.linear("fc1", b.input("x", 10), 16))
    x = b.relu("act2", b.linear("fc2", x, 12, bias=False))
    return b.build(b.softmax("softmax", b.linear("fc3", x, 4)))


def transposed(seed: int = 0) -> ReferenceModel:
    """An upsampling decoder: conv → transposed conv → batch norm → ReLU → grouped transposed conv."""
    b = Builder(seed)
    x = b.relu("act1", b.conv("conv", b.input("x", 3, 6, 6), 8, pad=1))
    x = b.conv("up1", x, 6, 4, stride=2, pad=1, transposed=True, bias=False)
    x = b.relu("act2", b.batch_norm("bn", x))
    x = b.conv("up2", x, 4, 3, stride=2, pad=1, groups=2, transposed=True, output_padding=1)
    return b.build(x)


def prenormed(seed: int = 0) -> ReferenceModel:
    """Batch norms before linear ops, as in ResNet v2: one before a convolution, one before a linear op."""
    b = Builder(seed)
    x = b.relu("act0", b.batch_norm("bn_in", b.input("x", 3, 6, 6)))
    x = b.relu("act1", b.conv("conv1", x, 4))
    x = b.conv("conv2", b.batch_norm("bn_mid", x), 6)
    x = b.relu("act2", x)
    x = b.flatten("flatten", x)
    return b.build(b.linear("fc", b.batch_norm("bn_out", x), 4))


def tokens(seed: int = 0) -> ReferenceModel:
    """Ids and floats in, two outputs: embedding, layer norm, attention with a mask, one matrix used twice."""
    b = Builder(seed)
    ids, side = b.input("ids", 5, dtype="int64", channel_axis=None), b.input("side", 5, 8, channel_axis=2)
    table = b.param("table", b.rng.normal(0, 0.7, (12, 8)))
    x = b.op("embed", OpKind.EMBEDDING, "Gather", (ids,), (None, 5, 8), params={ParamRole.WEIGHT: table})
    x = b.layer_norm("norm", b.binary("sum", "Add", x, side))
    q, k, v = (b.linear(n, x, 8) for n in ("q", "k", "v"))
    scores = b.matmul("scores", q, b.transpose("kt", k, 0, 2, 1))
    scores = b.masked(b.binary("masked", "Add", scores, np.triu(np.full((5, 5), -1e9, np.float32), 1)))
    y = b.matmul("mix", b.softmax("softmax", scores), v)
    y = b.binary("gated", "Mul", y, b.activation("gate", b.linear("gate_fc", x, 8), "Sigmoid"))
    head = b.op("head", OpKind.LINEAR, "MatMul", (y,), (None, 5, 12), params={ParamRole.WEIGHT: table})
    return b.build(head, b.prelu("side_out", y, 0.2))


MODELS: dict[str, Callable[..., ReferenceModel]] = {
    "conv_bn_relu": conv_bn_relu,
    "depthwise_triple": depthwise_triple,
    "residual": residual,
    "concat_branches": concat_branches,
    "mlp": mlp,
    "transposed": transposed,
}
"""By name; each takes a seed. Techniques are tested on these."""

BACKEND_MODELS: dict[str, Callable[..., ReferenceModel]] = {**MODELS, "prenormed": prenormed, "tokens": tokens}
"""With those that a backend must show and simulate too."""


def batch(model: ReferenceModel, samples: int = 8, seed: int = 0) -> Mapping[str, NDArray[Any]]:
    """Normal random inputs for a model; integer ones are ids below `IDS`."""
    rng = np.random.default_rng(seed)
    found = {}
    for t in model.graph.inputs:
        tensor = model.graph.tensors[t]
        shape = (samples, *(n or 1 for n in (tensor.shape or (None,))[1:]))
        whole = np.dtype(tensor.dtype).kind in "iu"
        found[t] = (
            rng.integers(0, IDS, shape).astype(tensor.dtype) if whole else rng.normal(size=shape).astype("float32")
        )
    return found
