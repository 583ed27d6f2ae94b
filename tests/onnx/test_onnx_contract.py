"""The ONNX backend holds the backend contract."""

from __future__ import annotations

import builders as b
import numpy as np

from bitwright.testing.backend_contract import BackendContract, Case
from bitwright_onnx.backend import OnnxBackend


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mobile_block():
    """Convolution with batch norm, depthwise, grouped and transposed convolution, clip, sum and concatenation."""
    m = b.ModelBuilder(13)
    m.input("x", ["N", 4, 8, 8])
    m.node("Conv", ["x", m.weight("stem.w", 8, 4, 3, 3)], "stem", pads=[1, 1, 1, 1])
    m.batch_norm("stem", "stem_bn", 8)
    zero, six = m.const("zero", np.float32(0)), m.const("six", np.float32(6))
    m.node("Clip", ["stem_bn", zero, six], "act")
    m.node("Conv", ["act", m.weight("dw.w", 8, 1, 3, 3), m.weight("dw.b", 8)], "dw", pads=[1, 1, 1, 1], group=8)
    m.node("Relu", ["dw"], "dw_act")
    m.node("Add", ["act", "dw_act"], "sum")
    m.node("Conv", ["sum", m.weight("grouped.w", 6, 4, 1, 1)], "grouped", group=2)
    m.node("MaxPool", ["sum"], "max", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    m.node("Concat", ["grouped", "max"], "cat", axis=1)
    m.node("ConvTranspose", ["cat", m.weight("up.w", 14, 5, 2, 2), m.weight("up.b", 5)], "up", strides=[2, 2])
    m.node("GlobalAveragePool", ["up"], "pool")
    m.node("Flatten", ["pool"], "flat")
    m.node("Gemm", ["flat", m.weight("fc.w", 5, 3), m.weight("fc.b", 3)], "y")
    m.output("y", ["N", 3])
    return m


def transformer_block():
    """MatMul with bias, layer norm, softmax attention, GELU's Erf."""
    m = b.ModelBuilder(17)
    m.input("x", ["N", 5, 8])
    parts = []
    for name in ("q", "k", "v"):
        m.node("MatMul", ["x", m.weight(f"{name}.w", 8, 8)], f"{name}_mm")
        parts.append(m.node("Add", [f"{name}_mm", m.weight(f"{name}.b", 8)], name))
    m.node("Transpose", ["k"], "kt", perm=[0, 2, 1])
    m.node("MatMul", ["q", "kt"], "scores")
    m.node("Softmax", ["scores"], "weights", axis=-1)
    m.node("MatMul", ["weights", "v"], "context")
    m.node("Add", ["context", "x"], "residual")
    m.node("LayerNormalization", ["residual", m.positive("ln.g", 8), m.weight("ln.b", 8)], "norm", axis=-1)
    m.node("MatMul", ["norm", m.weight("out.w", 8, 4)], "y")
    m.output("y", ["N", 5, 4])
    return m


def case(builder, *shape):
    def build():
        return OnnxBackend().adopt(builder().build())

    return Case(build, {"x": normal(*shape)})


class TestOnnxContract(BackendContract):
    suffix = ".onnx"

    def backend(self):
        return OnnxBackend()

    def cases(self):
        return {"mobile block": case(mobile_block, 4, 4, 8, 8), "transformer": case(transformer_block, 4, 5, 8)}
