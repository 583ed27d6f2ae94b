"""Parameters that the model computes from parameters alone, such as normalized fusion weights (BiFPN)."""

from __future__ import annotations

import builders as b
import numpy as np
import onnxruntime as ort
import pytest

from bitwright.bundle import check_bundle
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr

DATA = {"x": np.random.default_rng(0).standard_normal((16, 4, 6, 6)).astype(np.float32)}


def gathered(m):
    for i, name in enumerate(("w0", "w1")):
        m.node("Gather", ["normal", m.const(f"at{i}", np.int64(i))], name)


def split(m):
    m.node("Split", ["normal"], ["w0", "w1"], "split", axis=0)


def split_softmax(m):
    m.node("Softmax", ["raw"], "soft")
    m.node("Split", ["soft", m.const("sizes", np.int64([1, 1]))], ["w0", "w1"], "split", axis=0)


@pytest.mark.parametrize("target", ["default", "htp_v73", "onnxruntime-cpu"])
@pytest.mark.parametrize("picked", [gathered, split, split_softmax], ids=lambda f: f.__name__)
def test_normalized_fusion_weights_are_constants(picked, target, tmp_path):
    m = b.ModelBuilder()
    m.input("x", ["n", 4, 6, 6])
    m.node("Conv", ["x", m.weight("c0", 4, 4, 1, 1)], "a0")
    m.node("Conv", ["x", m.weight("c1", 4, 4, 1, 1)], "a1")
    m.node("Relu", [m.const("raw", np.float32([1.0, 0.3]))], "positive")
    m.node("ReduceSum", ["positive"], "total", keepdims=0)
    m.node("Add", ["total", m.const("eps", np.float32(1e-4))], "shifted")
    m.node("Div", ["positive", "shifted"], "normal")
    picked(m)
    for i in range(2):
        m.node("Mul", [f"a{i}", f"w{i}"], f"m{i}")
    m.node("Add", ["m0", "m1"], "s")
    m.node("Conv", ["s", m.weight("c2", 4, 4, 1, 1)], "y")
    m.output("y")
    sim = QuantSim(m.build(), target=target).calibrate(DATA)
    found = sim.predict(DATA)[0]
    assert sqnr(sim.predict(DATA, simulated=False)[0], found) > 30
    assert {"w0", "w1"} <= set(sim.graph.params)
    bundle = sim.export(tmp_path)
    assert check_bundle(sim.graph, sim.plan, bundle.files["encodings"]) == []
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(bundle.files["qdq"])
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, DATA)[0], found)
