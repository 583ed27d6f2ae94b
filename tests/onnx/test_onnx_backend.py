"""The backend object: protocols, formats, errors."""

import builders as b
import numpy as np
import pytest

import bitwright_onnx.capture.writing
from bitwright import registry
from bitwright.backend import Backend, Capability, IntegerRuntime, PartialExecution, require
from bitwright.errors import CapabilityError, InputError
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.simulate.session import compile_session

BACKEND = OnnxBackend()
PLAN = Plan({}, "none")


def test_it_is_what_the_registry_promises():
    assert (
        isinstance(BACKEND, Backend) and isinstance(BACKEND, PartialExecution) and isinstance(BACKEND, IntegerRuntime)
    )
    assert isinstance(registry.backend("onnx"), OnnxBackend)
    assert registry.backend_for_model(b.mlp()).name == "onnx"


def test_the_float_format_is_the_first_and_runs(tmp_path):
    model = BACKEND.adopt(b.mlp())
    bundle = BACKEND.export(model, PLAN, EncodingTable(), tmp_path / "m.onnx", next(iter(BACKEND.formats())))
    x = b.image(2, 3, 6)
    got = compile_session(BACKEND.load(bundle.files["model"])).run(None, {"x": x})[0]
    np.testing.assert_array_equal(got, compile_session(model).run(None, {"x": x})[0])


def test_what_it_does_not_do(tmp_path):
    model = BACKEND.adopt(b.mlp())
    with pytest.raises(InputError, match="no format 'tflite'; there are onnx, qdq"):
        BACKEND.export(model, PLAN, EncodingTable(), tmp_path / "m", "tflite")
    with pytest.raises(CapabilityError, match="onnx backend doesn't offer; open the model in PyTorch, Keras or Tensor"):
        require(BACKEND, {Capability.TRAINABLE}, "training")
    assert not list(tmp_path.iterdir())


def test_big_models_get_a_data_file_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(bitwright_onnx.capture.writing, "EXTERNAL_ABOVE", 300)
    model = BACKEND.adopt(b.mlp())
    BACKEND.save(model, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    read = BACKEND.read(BACKEND.load(tmp_path / "m.onnx"), ["w1", "b1"])
    for id, values in BACKEND.read(model, ["w1", "b1"]).items():
        assert np.array_equal(read[id], values)


def test_equal_runs_give_equal_files(tmp_path):
    paths = [BACKEND.save(BACKEND.adopt(b.small_cnn()), tmp_path / f"{i}.onnx") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
