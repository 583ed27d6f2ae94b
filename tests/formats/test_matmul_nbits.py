"""MatMulNBits: ONNX Runtime gives back the simulation's weights, bit for bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import IDS, expected, simulated
from onnx import TensorProto, helper

from bitwright.errors import InputError, ModelError


def written(sim, folder, **settings):
    path = sim.export(folder, formats={"matmul_nbits": settings}).files["matmul_nbits"]
    return path, [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]


def product_with_identity(path, node):
    """What ONNX Runtime's kernel computes from a unit matrix: the stored matrix, exactly, as all else is times 0."""
    model = onnx.load(path)
    attributes = {a.name: a.i for a in node.attribute}
    held = [i for i in model.graph.initializer if i.name in node.input[1:]]
    source = helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [attributes["K"]] * 2)
    result = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    alone = helper.make_graph([node], "one", [source], [result], held)
    made = helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    return session.run(None, {node.input[0]: np.eye(attributes["K"], dtype=np.float32)})[0].T


@pytest.mark.parametrize(
    ("target", "weights", "bits", "size"),
    [
        ("w4a16", "int4:block32", 4, 32),
        ("w4a16", "int4", 4, 64),
        ("w4a16_asymmetric", "uint4:block64", 4, 64),
        ("w4a16", "int8:block32", 8, 32),
        ("w4a16_asymmetric", "uint8", 8, 64),
    ],
)
def test_weights_come_back(tmp_path, target, weights, bits, size):
    sim = simulated(target, weights)
    path, nodes = written(sim, tmp_path)
    wanted = expected(sim)
    assert len(nodes) == 3
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["bits"] == bits and attributes["accuracy_level"] == 1
        assert attributes["block_size"] in (size, 128 if ":" not in weights else size)
        name = node.input[1].removesuffix("_nbits")
        assert np.array_equal(product_with_identity(path, node), wanted[name])
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, IDS)[0]
    assert np.allclose(found, sim.predict(IDS)[0], atol=1e-5)


def test_the_level_is_the_users(tmp_path):
    sim = simulated("w4a16", "int4:block32")
    _, nodes = written(sim, tmp_path, accuracy_level=4)
    assert {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"} == {4}
    with pytest.raises(InputError, match="accuracy_level: Input should be less than or equal to 4"):
        written(sim, tmp_path, accuracy_level=5)


def test_a_tied_matrix_is_stored_once(tmp_path):
    sim = simulated("gguf_q4_0", tied=True)
    path, nodes = written(sim, tmp_path)
    held = {i.name for i in onnx.load(path).graph.initializer}
    assert len(nodes) == 2 and "embed.weight_quantized" in held
    assert not any(n.startswith("embed.weight_nbits") for n in held)
    assert not any(n.endswith("_quantized") for n in held - {"embed.weight_quantized"})


def test_nothing_to_write(tmp_path):
    with pytest.raises(ModelError, match="no product of the model has a stored matrix of 4 or 8 bits"):
        written(simulated("w4a16", "int16"), tmp_path)
