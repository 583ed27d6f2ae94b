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


def prenormed():
    """Batch norms before linear ops, one matrix used by two, a bias used by two, two outputs."""
    m = b.ModelBuilder(17)
    m.input("x", ["N", 3, 6, 6])
    m.batch_norm("x", "normed", 3)
    m.node("Conv", ["normed", m.weight("c1.w", 4, 3, 3, 3), m.weight("shared.b", 4)], "c1")
    m.node("LeakyRelu", ["c1"], "act", alpha=0.2)
    m.batch_norm("act", "mid", 4)
    m.node("Conv", ["mid", m.weight("c2.w", 4, 4, 3, 3), "shared.b"], "c2", pads=[1, 1, 1, 1])
    m.node("PRelu", ["c2", m.positive("slope", 4, 1, 1)], "act2")
    m.node("AveragePool", ["act2"], "average", kernel_shape=[2, 2], strides=[2, 2])
    m.node("Flatten", ["average"], "flat")
    m.node("Gemm", ["flat", m.weight("matrix", 16, 16), m.weight("fc.b", 16)], "fc1", transB=1)
    m.node("Sigmoid", ["fc1"], "gate")
    m.node("Mul", ["flat", "gate"], "gated")
    m.node("Gemm", ["gated", "matrix"], "y", transB=1)
    m.output("y", ["N", 16])
    m.output("gate", ["N", 16])
    return m


def tokens():
    """Ids and floats in: embedding tied to the output layer, a mask, an LSTM and a GRU."""
    m = b.ModelBuilder(17)
    m.input("ids", ["N", 5], b.INT64)
    m.input("side", ["N", 5, 8])
    table = m.weight("table", 12, 8)
    m.node("Gather", [table, "ids"], "embedded")
    m.node("Add", ["embedded", "side"], "sum")
    m.node("Transpose", ["sum"], "turned", perm=[0, 2, 1])
    m.node("MatMul", ["sum", "turned"], "scores")
    m.node("Add", ["scores", m.const("mask", np.triu(np.full((5, 5), -1e9, np.float32), 1))], "masked")
    m.node("Softmax", ["masked"], "weights", axis=-1)
    m.node("MatMul", ["weights", "sum"], "mixed")
    m.node("Transpose", ["mixed"], "by_time", perm=[1, 0, 2])
    m.node("LSTM", ["by_time", m.weight("W", 1, 16, 8), m.weight("R", 1, 16, 4), m.weight("B", 1, 32)],
           ["states", "", "cell"], "lstm", hidden_size=4)  # fmt: skip
    m.node("Squeeze", ["states", m.const("one", np.array([1], np.int64))], "seq")
    m.node("GRU", ["seq", m.weight("GW", 1, 24, 4), m.weight("GR", 1, 24, 8)], ["", "last"], "gru", hidden_size=8)
    m.node("Squeeze", ["last", m.const("zero", np.array([0], np.int64))], "state")
    m.node("Transpose", [table], "table_t", perm=[1, 0])
    m.node("MatMul", ["state", "table_t"], "y")
    m.output("y", ["N", 12])
    return m


def case(builder, *shape, **inputs):
    def build():
        return OnnxBackend().adopt(builder().build())

    return Case(build, inputs or {"x": normal(*shape)})


class TestOnnxContract(BackendContract):
    suffix = ".onnx"

    def backend(self):
        return OnnxBackend()

    def native_value(self, model, param):
        return model.graph.initializers[param].const_value.numpy()

    def cases(self):
        ids = np.random.default_rng(0).integers(0, 12, (4, 5))
        return {
            "mobile block": case(mobile_block, 4, 4, 8, 8),
            "transformer": case(transformer_block, 4, 5, 8),
            "prenormed": case(prenormed, 4, 3, 6, 6),
            "tokens": case(tokens, ids=ids, side=normal(4, 5, 8)),
        }
