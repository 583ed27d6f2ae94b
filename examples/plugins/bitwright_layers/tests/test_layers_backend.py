"""bitwright's kit on the backend for lists of layers; then the whole way, to the integers of ONNX Runtime."""

from typing import ClassVar

import numpy as np
import pytest
from bitwright_layers.backend import LayersBackend
from bitwright_layers.framework import Conv, Dense, MaxPool, Mean, Net, Relu

from bitwright import QuantSim
from bitwright.errors import ModelError
from bitwright.graph import OpKind
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.verify import verify

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 9, 9, 3)).astype(np.float32)
FLAT = RNG.normal(size=(8, 10)).astype(np.float32)


def conv(name, size, inputs, outputs, stride=1, pad=0):
    kernel = RNG.normal(size=(size, size, inputs, outputs)) / np.sqrt(size * size * inputs)
    return Conv(name, kernel.astype(np.float32), RNG.normal(size=outputs).astype(np.float32), stride, pad)


def dense(name, inputs, outputs):
    kernel = RNG.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return Dense(name, kernel.astype(np.float32), RNG.normal(size=outputs).astype(np.float32))


CNN = Net([conv("stem", 3, 3, 8, pad=1), Relu("act1"), MaxPool("pool", 3), conv("body", 2, 8, 6), Relu("act2"),
           Mean("mean"), dense("head", 6, 4)])  # fmt: skip
MLP = Net([dense("one", 10, 16), Relu("act"), dense("two", 16, 4)])


class TestLayersBackend(BackendContract):
    suffix = ".layers"
    kinds = frozenset({OpKind.CONV, OpKind.LINEAR, OpKind.RELU, OpKind.MAX_POOL, OpKind.AVERAGE_POOL})

    declines: ClassVar = dict.fromkeys(
        ("depthwise", "forward fold", "shared parameter", "two inputs", "two outputs", "integer input", "mask",
         "embedding", "matmul", "softmax", "layer_norm", "prelu", "mul", "transpose", "recurrent"),
        "lists of layers have no such thing",
    )  # fmt: skip

    def backend(self):
        return LayersBackend()

    def native_value(self, model, param):
        net = CNN if param.split(".")[0] in {layer.name for layer in CNN} else MLP
        (layer,) = (layer for layer in net if layer.name == param.split(".")[0])
        return getattr(layer, param.split(".")[1])

    def cases(self):
        return {"cnn": Case(lambda: LayersBackend().adopt(CNN, {"image": X}), {"image": X}),
                "mlp": Case(lambda: LayersBackend().adopt(MLP, {"x": FLAT}), {"x": FLAT})}  # fmt: skip


def test_the_captured_net_is_the_net():
    model = LayersBackend().adopt(CNN, {"image": X})
    assert [op.id for op in model.graph] == ["stem", "act1", "pool", "body", "act2", "mean", "head"]
    assert np.allclose(model(X), CNN(X), atol=1e-6)


def test_the_whole_way(tmp_path):
    data = [{"image": RNG.normal(size=(8, 9, 9, 3)).astype(np.float32)} for _ in range(4)]
    sim = QuantSim(CNN, {"image": X}, target="onnxruntime-cpu")
    sim.apply("adaround", data).calibrate(data)
    bundle = sim.export(tmp_path / "out")
    assert bundle.files["qdq"].exists()
    seen = verify(tmp_path / "out", data)
    assert seen.recorded
    assert not seen.problems
    assert seen.exact["output_differs"] == 0
    assert set(seen.uncovered) == {"mean"}  # the runtime averages in float
    again = QuantSim.load(sim.save(tmp_path / "saved"))
    assert np.array_equal(again.model(X), sim.model(X))


def test_what_it_does_not_take():
    with pytest.raises(ModelError, match="takes a Net, got list"):
        LayersBackend().adopt([Relu("a")])
    with pytest.raises(ModelError, match="give a sample batch"):
        LayersBackend().adopt(MLP)
    with pytest.raises(ModelError, match="a int is no layer"):
        LayersBackend().adopt(Net([3]), {"x": FLAT})
