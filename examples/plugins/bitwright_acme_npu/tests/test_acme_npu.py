"""The target and the runtime from the outside, as they are installed; the arithmetic against exact fractions."""

from __future__ import annotations

import shutil
from fractions import Fraction

import numpy as np
import pytest
from bitwright_acme_npu.compiler import multiplier
from bitwright_acme_npu.program import Grid
from bitwright_acme_npu.simulator import quantize, rescaled

from bitwright import QuantSim, registry, target_commands
from bitwright.errors import InputError, ModelError
from bitwright.targets import load_target
from bitwright.verify import verify

onnx = pytest.importorskip("onnx")


def network() -> onnx.ModelProto:
    """Two convolutions, a residual sum, pooling and a classifier."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    values = {
        "w1": rng.normal(0, 0.3, (8, 3, 3, 3)), "b1": rng.normal(0, 0.1, 8), "w2": rng.normal(0, 0.2, (8, 1, 3, 3)),
        "w3": rng.normal(0, 0.3, (8, 8, 1, 1)), "w4": rng.normal(0, 0.4, (5, 8)), "b4": rng.normal(0, 0.1, 5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["a1"], "relu1"),
        helper.make_node("Conv", ["a1", "w2"], ["c2"], "conv2", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Relu", ["c2"], ["a2"], "relu2"),
        helper.make_node("Conv", ["a2", "w3"], ["c3"], "conv3"),
        helper.make_node("Add", ["a1", "c3"], ["s"], "add"),
        helper.make_node("GlobalAveragePool", ["s"], ["g"], "average"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(32, 3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("out")
    sim = QuantSim(network(), target="acme-npu").calibrate({"x": data})
    bundle = sim.export(folder, name="net")
    assert bundle.files["acme"] == folder / "net.acme.npz"
    return folder


def test_the_target_is_there_under_its_name():
    target = load_target("ACME_NPU")
    assert target.name == "acme-npu" and target.config.bitwright.runtime == "acme-npu"
    assert target.per_channel("Conv") and not target.runs("Softmax")
    assert load_target({"bitwright": {"extends": "acme-npu", "weights": "int4"}}).weights == "int4"


def test_verify_runs_it_by_default_and_agrees_with_the_simulation(exported, data):
    found = verify(exported, {"x": data})
    assert (found.runtime, found.problems) == ("acme-npu", [])
    assert found.sqnr_db["integer_simulated"] > 35
    assert found.agreement["integer_simulated"] > 0.9
    tensors = {t.name: t for t in found.tensors}
    assert tensors["a1"].simulated_max_steps <= 1, "only rounding is between them"
    assert {"y", "s", "g", "f"} <= set(tensors)


def test_the_other_runtime_is_there_too(exported, data):
    found = verify(exported, {"x": data}, runtime="onnxruntime")
    assert (found.runtime, found.problems) == ("onnxruntime", [])
    assert found.exact["output_differs"] == 0


def test_a_wrong_multiplier_is_noticed(exported, data, tmp_path):
    """What `verify` is for: an NPU that computes something else doesn't pass."""
    shutil.copytree(exported, tmp_path / "bad")
    path = tmp_path / "bad" / "net.acme.npz"
    arrays = dict(np.load(path))
    arrays["0.factors"] = arrays["0.factors"] + np.array([0, 1])  # half of each
    np.savez(path, **arrays)
    found = verify(tmp_path / "bad", {"x": data})
    assert found.problems
    assert found.sqnr_db["integer_simulated"] < 20


def test_what_the_npu_cannot_execute_is_named(tmp_path, data):
    from onnx import helper

    model = network()
    model.graph.node.append(helper.make_node("Softmax", ["y"], ["z"], "softmax"))
    model.graph.output[0].name = "z"
    sim = QuantSim(model, target="acme-npu").calibrate({"x": data})
    with pytest.warns(UserWarning, match=r"net.acme.npz isn't written: the Acme NPU .*'(softmax|z)'"):
        bundle = sim.export(tmp_path, name="net")
    assert "acme" not in bundle.files
    found = verify(tmp_path, {"x": data})
    assert found.runtime == "onnxruntime"
    assert "'acme-npu', and has nothing that it executes" in found.notes[0]


@pytest.mark.parametrize("factor", [0.5, 0.0037, 1.75, 0.999999])
def test_requantization_rounds_halves_away_from_zero(factor):
    mantissa, shift = multiplier(factor)
    assert 2**30 <= mantissa < 2**31
    values = np.arange(-4000, 4001)
    for value, got in zip(values, rescaled(values, mantissa, shift), strict=True):
        exact = Fraction(int(value)) * Fraction(mantissa, 2**shift) if shift >= 0 else None
        nearest = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
        assert got == nearest


def test_inputs_round_halves_away_from_zero():
    assert quantize(np.array([0.5, -0.5, 1.5, 300.0]), Grid(1.0, 10)).tolist() == [11, 9, 12, 255]


def test_target_commands_has_its_lines(exported, data, tmp_path):
    found = target_commands(exported, "acme_npu", data="test.npz")
    assert (found.tool, found.warnings) == ("acme-npu", ())
    assert f"acme-run {exported / 'net.acme.npz'} --samples test.npz" in str(found)
    QuantSim(network(), target="generic-int8").calibrate({"x": data}).export(tmp_path)
    with pytest.raises(InputError, match=r"has no model.acme.npz: export the model for the target acme-npu"):
        target_commands(tmp_path, "acme-npu")


def test_the_runtime_is_registered():
    assert registry.runtimes()["acme-npu"].artefact == "acme"
    with pytest.raises(ModelError):
        from bitwright.backend import ToCompile

        sim = QuantSim(network(), target="default")
        registry.runtime("acme-npu").write(
            ToCompile(sim.graph, sim.params, sim.plan, {}, None), None
        )  # no tensor has a grid
