"""A bias that stays in float between integer operands: default ONNX Runtime sessions may not overflow it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import ModelBuilder

from bitwright import QuantSim
from bitwright.verify import verify


def net(kind, size, **attributes):
    b = ModelBuilder(opset=17)
    rows = kind == "Gemm"
    shape = [6, 6] if rows else [6, 4, 6, 6]
    x = b.input("x", shape)
    w = b.const("w", (b.rng.standard_normal((6, 4) if rows else (4, 4, 3, 3)) * size).astype(np.float32))
    y = b.output("y", [6, 4] if rows else [6, 4, *([4, 4] if kind == "Conv" else [8, 8])])
    b.node(kind, [x, w, b.const("c", np.float32([1, -2, 3, 4]))], y, **attributes)
    return b.build(), {"x": b.rng.standard_normal(shape).astype(np.float32)}


class Whole:
    """One run: a matrix that is read transposed has no batch."""

    samples = 1

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield self.data

    def fingerprint(self):
        return "whole"


@pytest.mark.filterwarnings("ignore:calibrate. the weights of 'w'")  # of 1e-9: that they become zero
@pytest.mark.parametrize(
    ("kind", "size", "bits", "attributes", "split"),
    [
        ("Gemm", 0.01, 16, {}, True),
        ("Gemm", 0.01, 16, {"transA": 1}, True),
        ("Conv", 0.01, 16, {}, True),
        ("ConvTranspose", 0.01, 16, {}, True),
        ("Gemm", 1e-9, 8, {}, True),
        ("Gemm", 0.01, 8, {}, False),
        ("Conv", 0.01, 8, {}, False),
    ],
)
def test_a_default_session_keeps_a_float_bias(kind, size, bits, attributes, split, tmp_path):
    model, data = net(kind, size, **attributes)
    options = {} if attributes else {"overrides": {"c": "float"}}
    sim = QuantSim(model, weights=f"int{bits}", activations=f"uint{bits}", scheme="minmax", **options)
    sim.calibrate(Whole(data))
    file = sim.export(tmp_path, name="model").files["qdq"]
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (expected,) = sim.predict(Whole(data))
    np.testing.assert_allclose(session.run(None, data)[0], expected, atol=np.abs(expected).max() * 1e-2 / 2**bits)
    assert verify(tmp_path, Whole(data), name="model").problems == []
    assert ("Add" in {n.op_type for n in onnx.load(file).graph.node}) is split
