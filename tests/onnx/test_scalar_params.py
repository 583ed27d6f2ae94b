"""Scalar constants keep their shape () on the way in and out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import ModelBuilder

from bitwright import QuantSim
from bitwright.graph import SetParams
from bitwright_onnx.backend import OnnxBackend


def test_a_scalar_constant_is_read_and_written_as_a_scalar(tmp_path):
    three = onnx.numpy_helper.from_array(np.array(3.0, np.float32), "three")
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "three"], ["y"], "add")], "g", info[:1], info[1:], [three]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    backend = OnnxBackend()
    native = backend.load(tmp_path / "m.onnx")
    value = backend.read(native, ["three"])["three"]
    assert (value.shape, float(value)) == ((), 3.0)
    edited = backend.edit(native, [SetParams({"three": value * 2})])
    assert backend.read(edited, ["three"])["three"] == np.float32(6.0)


@pytest.mark.parametrize("op", ["ReduceSum", "Squeeze"])
def test_a_folded_scalar_has_no_axis_and_neither_has_the_output(tmp_path, op):
    b = ModelBuilder(opset=17)
    x, y = b.input("x", [2, 3]), b.output("y")
    table = b.const("table", np.array([[2.0]], np.float32))
    b.node(op, [table], "s", **({"keepdims": 0} if op == "ReduceSum" else {}))
    b.node("ReduceSum", [x], "t", keepdims=0)
    b.node("Mul", ["t", "s"], y)
    fed = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    sim = QuantSim(b.build()).calibrate(fed)
    for simulated in (False, True):
        (out,) = sim.predict(fed, simulated=simulated)
        assert out.shape == () and abs(out - 30) < 0.2
    for file in ("model", "qdq"):
        path = sim.export(tmp_path).files[file]
        assert onnxruntime.InferenceSession(path).run(None, fed)[0].shape == ()


def test_scalar_outputs_of_several_batches_are_one_a_batch():
    b = ModelBuilder(opset=17)
    b.node("ReduceSum", [b.input("x", ["n", 2])], b.output("y"), keepdims=0)
    sim = QuantSim(b.build())
    (out,) = sim.predict([np.full((3, 2), 1.0, np.float32), np.full((1, 2), 4.0, np.float32)], simulated=False)
    np.testing.assert_array_equal(out, [6.0, 8.0])
