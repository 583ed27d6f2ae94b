"""Scalar constants keep their shape () on the way in and out."""

from __future__ import annotations

import numpy as np
import onnx

from bitwright.edits import SetParams
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
