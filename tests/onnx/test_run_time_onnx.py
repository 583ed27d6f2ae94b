"""Ranges at run time in ONNX: the standard ops of every form, and what ONNX Runtime makes of DynamicQuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from small_nets import proto

from bitwright import QuantSim
from bitwright.backend import Tap
from bitwright.verify import verify
from bitwright_onnx.export.quantized_network import QuantizedFile

SIZES = np.float32([1, 100, 0, 1e-3, 7])[:, None]


def net(opset=17):
    """Two matrix products on rows of very different sizes, one of zeros."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Abs", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(8, 16)), "w2": rng.normal(size=(16, 4))}
    return proto(nodes, {"x": ["N", 5, 8]}, ["y"], weights, opset=opset)


def data(samples=4):
    return {"x": np.float32(np.random.default_rng(1).normal(size=(samples, 5, 8))) * SIZES}


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("kind", ["uint8:dynamic", "int8:dynamic", "int8:per_token", "uint4:per_token"])
def test_simulation_and_file_compute_the_grid(kind, opset, tmp_path):
    sim = QuantSim(net(opset), activations=kind).calibrate()
    batch = data()
    path = sim.export(tmp_path, name="net").files["qdq"]
    taps = [Tap("x"), Tap("r")]
    found = QuantizedFile(path).session(taps).run(batch)
    session = sim.simulation.session(taps)
    simulated = session.run(batch)
    grid = sim.encodings["x"]
    assert np.array_equal(found[taps[0]], grid.fake_quantize(batch["x"]))
    assert np.array_equal(simulated[taps[0]], grid.fake_quantize(batch["x"]))
    assert np.array_equal(found[taps[1]], simulated[taps[1]])
    sim.simulation.set({"x": None})
    assert np.array_equal(session.run(batch)[Tap("x")], batch["x"])


def test_onnx_runtime_multiplies_in_integers(tmp_path):
    """DynamicQuantizeLinear, DequantizeLinear and a product become one integer kernel, with the same numbers."""
    sim = QuantSim(net(), activations="uint8:dynamic").calibrate(data())
    bundle = sim.export(tmp_path, name="net")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(bundle.files["qdq"]), options)
    fused = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert fused.count("DynamicQuantizeMatMul") == 2, fused
    batch = data()
    expected = sim.simulation.model.run(batch)["y"]
    (found,) = session.run(["y"], batch)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["uint8:dynamic", "int8:per_token"])
def test_verify_compares_them(kind, tmp_path):
    sim = QuantSim(net(), activations=kind, weights="int8").calibrate(data())
    sim.export(tmp_path, name="net")
    found = verify(tmp_path, data())
    assert not found.problems
    compared = {t.name: t for t in found.tensors}
    assert {"x", "r"} <= set(compared)
    # Another grid in the file than what was recorded is found.
    text = (tmp_path / "net.encodings").read_text()
    other = "int8:dynamic" if kind.startswith("int8") else "uint4:dynamic"
    (tmp_path / "net.encodings").write_text(text.replace(kind, other, 1))
    assert any("'x'" in p for p in verify(tmp_path, data()).problems)


def test_techniques_see_what_layers_read():
    """GPTQ's quantized inputs are those of the grids at run time."""
    sims = [QuantSim(net(), activations="uint4:per_token", weights="int3") for _ in range(3)]
    calibration = data(40)
    sims[1].apply("gptq", calibration)
    sims[2].apply("adaround", calibration, iterations=200)
    expected = sims[0].predict(calibration, simulated=False)[0]
    errors = [float(np.square(s.calibrate().predict(calibration)[0] - expected).sum()) for s in sims]
    assert max(errors[1:]) < errors[0]
