"""Products of two activations in ONNX: Gemm and Conv are quantized as MatMul is."""

from __future__ import annotations

import builders as b
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bitwright.graph import OpKind
from bitwright.simulation import QuantSim
from bitwright.verify import sqnr, verify

RNG = np.random.default_rng(0)
DATA = {"a": RNG.standard_normal((8, 8)).astype(np.float32), "c": RNG.standard_normal((8, 8)).astype(np.float32)}
IMAGES = {"a": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32),
          "c": RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)}  # fmt: skip


def product(type, data, extra=(), **attrs):
    """Tanh of each input, and their product."""
    m = b.ModelBuilder()
    for name, values in data.items():
        m.input(name, values.shape)
        m.node("Tanh", [name], f"t{name}", f"tanh_{name}")
    for name in extra:
        m.weight(name, 8) if name == "bias" else m.node("Relu", ["ta"], name)
    m.node(type, ["ta", "tc", *extra], "y", "product", **attrs)
    m.output("y")
    return m.build()


class One:
    """One batch whose inputs' first axes differ."""

    samples = 1

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        yield self.batch

    def fingerprint(self):
        return "one batch"


CASES = {
    "Gemm": ("Gemm", DATA, (), {}),
    "Gemm transB": ("Gemm", DATA, (), {"transB": 1}),
    "Gemm transA": ("Gemm", DATA, (), {"transA": 1}),
    "Gemm alpha": ("Gemm", DATA, (), {"alpha": 0.25, "transB": 1}),
    "Gemm constant bias": ("Gemm", DATA, ("bias",), {"beta": 0.5}),
    "Gemm computed bias": ("Gemm", DATA, ("r",), {}),
    "Conv": ("Conv", IMAGES, (), {"pads": [1] * 4}),
}


@pytest.mark.parametrize("target", ["default", "htp_v73", "onnxruntime-cpu"])
@pytest.mark.parametrize("case", CASES)
def test_products_of_two_activations_are_quantized(case, target, tmp_path):
    type, data, extra, attrs = CASES[case]
    sim = QuantSim(product(type, data, extra, **attrs), target=target).calibrate(One(data))
    assert sim.graph.op("product").kind is OpKind.MATMUL
    assert {"ta", "tc", "y"} <= set(sim.plan.quantized)
    bundle = sim.export(tmp_path, name="net")
    graph = onnx.load(bundle.files["qdq"]).graph
    makers = {o: n.op_type for n in graph.node for o in n.output}
    node = next(n for n in graph.node if n.op_type == type)
    assert [makers[i] for i in node.input[:2]] == ["DequantizeLinear"] * 2
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = ort.InferenceSession(str(bundle.files["qdq"]), options, providers=["CPUExecutionProvider"]).run(None, data)
    assert np.array_equal(found[0], sim.predict(One(data))[0])
    assert sqnr(sim.predict(One(data), simulated=False)[0], found[0]) > 25


def test_a_gemm_of_two_activations_verifies(tmp_path):
    sim = QuantSim(product("Gemm", DATA, transB=1), target="onnxruntime-cpu").calibrate(DATA)
    sim.export(tmp_path)
    assert verify(tmp_path, DATA).problems == []


@pytest.mark.parametrize("attrs", [{"transA": 1}, {}])
def test_a_gemm_whose_form_no_linear_op_has_is_quantized(attrs):
    """A constant matrix with the activation transposed, or with a computed bias."""
    m = b.ModelBuilder()
    m.input("a", [8, 8])
    m.weight("w", 8, 8)
    m.node("Gemm", ["a", "w", "a"], "y", "product", **attrs)
    m.output("y")
    sim = QuantSim(m.build()).calibrate({"a": DATA["a"]})
    assert {"a", "w", "y"} <= set(sim.plan.quantized)
    data = {"a": DATA["a"]}
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 25
