"""8-bit weights in blocks with 8-bit activations: default ONNX Runtime sessions run them as the file says.

ONNX Runtime's MatMulIntegerToFloat refuses blocks; the optimizer makes one where a product of dequantized operands
stays in float, as with a bias on three axes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright import QuantSim
from bitwright.cli import main
from bitwright.verify import verify

N = helper.make_node
NETS = {
    "bias": [N("MatMul", ["x", "w"], ["m"]), N("Add", ["m", "b"], ["y"])],
    "behind a reshape": [N("Reshape", ["x", "s"], ["r"]), N("MatMul", ["r", "w"], ["m"]), N("Add", ["m", "b"], ["y"])],
    "twice": [N("MatMul", ["x", "w"], ["m"]), N("Relu", ["m"], ["r"]), N("MatMul", ["r", "w"], ["y"])],
    "float result": [N("MatMul", ["x", "w"], ["m"]), N("Erf", ["m"], ["y"])],
    "tied to an embedding": [
        N("Gather", ["w", "x"], ["e"]), N("Relu", ["e"], ["r"]), N("Transpose", ["w"], ["t"], perm=[1, 0]),
        N("MatMul", ["r", "t"], ["m"]), N("Add", ["m", "b"], ["y"]),
    ],
}  # fmt: skip


def net(kind: str) -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = kind.startswith("tied")
    held = {"w": rng.normal(size=(32, 48)[:: -1 if rows else 1] if kind != "twice" else (32, 32)).astype(np.float32)}
    held |= {"b": rng.normal(size=48).astype(np.float32), "s": np.array([0, 5, 32])}
    read = {i for n in NETS[kind] for i in n.input}
    x = rng.integers(0, 48, (16, 5)) if rows else rng.normal(size=(16, 5, 32)).astype(np.float32)
    type = TensorProto.INT64 if rows else TensorProto.FLOAT
    graph = helper.make_graph(
        NETS[kind], "g", [helper.make_tensor_value_info("x", type, ["N", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in held.items() if n in read],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), x


@pytest.mark.filterwarnings("ignore:weights of unsigned codes")
@pytest.mark.parametrize("weights", ["int8:block16", "uint8:block16"])
@pytest.mark.parametrize("kind", NETS)
def test_a_default_session_computes_the_simulation(kind: str, weights: str, tmp_path: Path) -> None:
    model, x = net(kind)
    sim = QuantSim(model, weights=weights, activations="uint8").calibrate(x)
    file = sim.export(tmp_path, name="net").files["qdq"]
    (codes,) = [t for t in onnx.load(file).graph.initializer if t.name == "w_quantized"]
    assert codes.data_type in (TensorProto.INT8, TensorProto.UINT8)
    (y,) = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(y, sim.predict(x)[0], atol=1e-5)
    assert verify(tmp_path, x).problems == []
    assert main(["encodings", "check", str(tmp_path)]) == 0


def test_a_changed_code_of_a_turned_matrix_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = net("bias")
    file = QuantSim(model, weights="int8:block16").calibrate(x).export(tmp_path, name="net").files["qdq"]
    written = onnx.load(file)
    (codes,) = [t for t in written.graph.initializer if t.name == "w_quantized"]
    values = np.array(numpy_helper.to_array(codes))
    assert values.shape == (48, 32)
    values[3, 5] += 1
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    onnx.save(written, file)
    assert main(["encodings", "check", str(tmp_path)]) == 1
    assert "w: 1 of 1536 codes" in capsys.readouterr().out
