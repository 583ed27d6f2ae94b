"""A constant that is joined to activations (a class token, a padding) is a parameter, stored on the result's grid."""

from __future__ import annotations

import builders as b
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitwright.graph import ParamRole
from bitwright.placement import SharedWith
from bitwright.simulation import QuantSim
from bitwright.testing.contract_base import assert_close
from bitwright.verify import verify

TOKEN = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
X = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)


def joined(*operands: str) -> onnx.ModelProto:
    m = b.ModelBuilder(20)
    m.input("x", [3, 6])
    m.node("Sigmoid", ["x"], "s")
    m.const("token", TOKEN)
    m.node("Concat", list(operands), "y", name="join", axis=1)
    m.output("y")
    return m.build()


@pytest.mark.parametrize("operands", [("s", "token"), ("token", "s"), ("token", "s", "token")])
def test_the_constant_is_stored_on_the_grid_of_the_result(tmp_path, operands):
    sim = QuantSim(joined(*operands)).calibrate({"x": X})
    assert sim.graph.op("join").params == {ParamRole.CONSTANT: "token"}
    assert sim.plan["token"].decision == SharedWith("y")
    grid = sim.table["y"]
    (found,) = sim.predict({"x": X})
    start = 6 if operands[0] == "s" else 0
    assert_close(found[:, start : start + 4], grid.fake_quantize(TOKEN), 1e-6, "the joined constant")
    bundle = sim.export(tmp_path)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle.files["qdq"]).graph.initializer}
    assert np.array_equal(stored["token_quantized"], grid.quantize(TOKEN))
    assert verify(tmp_path, {"x": X}).problems == []
