"""Parameters that TensorFlow spells in other ops (−slope, γ/√(var + ε)) and shared ones have their codes in QDQ ONNX.

The same networks as frozen graphs, through the TensorFlow backend too.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("onnxruntime")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from keras import layers as L  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.cli import main  # noqa: E402
from bitwright.placement import OwnForms, SiteKind  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402


def conv(filters: int, **options: Any) -> Any:
    return L.Conv2D(filters, 3, padding="same", **options)


def slopes(x: Any, **options: Any) -> Any:
    return conv(4)(L.PReLU(**options)(conv(6)(x)))


def norm_behind_activation(x: Any) -> Any:
    return conv(4)(L.BatchNormalization(name="norm")(conv(6, activation="relu")(x)))


def called_twice(x: Any) -> Any:
    shared, norm, slope = conv(3, name="shared"), L.BatchNormalization(name="norm"), L.PReLU(shared_axes=[1, 2])
    return slope(norm(shared(slope(norm(shared(x))))))


def siamese(x: Any, y: Any) -> Any:
    """A nested model that is called twice, another in it."""
    i = keras.Input((8, 8, 6))
    tail = keras.Model(i, L.GlobalAveragePooling2D()(L.PReLU(shared_axes=[1, 2], name="slope")(i)), name="tail")
    j = keras.Input((8, 8, 3))
    h = L.BatchNormalization(name="norm")(conv(6, activation="relu", name="conv")(j))
    tower = keras.Model(j, L.Dense(5, name="fc")(tail(h)), name="tower")
    return L.Dense(2, name="head")(ops_abs(tower(x) - tower(y)))


def ops_abs(x: Any) -> Any:
    return keras.ops.absolute(x)


def sequence(x: Any) -> Any:
    """1-D convolutions, which TensorFlow and ONNX files have as 2-D ones with an axis of length 1."""
    x = L.Conv1D(6, 3, activation="relu", name="first")(L.Reshape((32, 6))(x))
    return L.Conv1D(4, 3, name="last")(L.Conv1DTranspose(5, 2, name="up")(L.DepthwiseConv1D(3)(x)))


NETS = {
    "sequence": sequence,
    "grouped": lambda x: conv(4)(L.Conv2D(6, 3, groups=3, strides=2, activation="relu", name="grouped")(x)),
    "slopes": slopes,
    "slopes, shared": lambda x: slopes(x, shared_axes=[1, 2]),
    "norm behind activation": norm_behind_activation,
    "norm over rows": lambda x: conv(4)(L.BatchNormalization(axis=1)(conv(4, activation="relu")(x))),
    "layers called twice": called_twice,
    "siamese": siamese,
    "dense slopes": lambda x: L.Dense(3)(L.PReLU()(L.Dense(6)(L.Flatten()(x)))),
}


def _model(name: str) -> Any:
    keras.utils.set_random_seed(4)
    rng = np.random.default_rng(4)
    inputs = [keras.Input((8, 8, 3), name=n) for n in ("a", "b")[: 1 + (name == "siamese")]]
    model = keras.Model(inputs, NETS[name](*inputs), name="net")
    for v in model.variables:
        if v.path.rsplit("/", 1)[-1] in ("alpha", "moving_variance", "gamma", "moving_mean", "beta", "bias"):
            v.assign(0.3 + 0.5 * np.abs(rng.normal(size=tuple(v.shape))))
    return model


def _unoptimized(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds.values(), strict=True)))


def _proved(sim: QuantSim, data: dict[str, np.ndarray], folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* no .h5 is written")
        bundle = sim.export(folder, name="net")
    for mine, theirs in zip(sim.predict(data), _unoptimized(bundle.files["qdq"], data), strict=True):
        assert sqnr(mine, theirs) >= 60
    held = sim.backend.pairs(bundle)
    for site in sim.plan.quantized:
        if sim.plan[site].kind is SiteKind.PARAMETER:
            assert site in held, site
    for site, place in sim.plan.items():
        if isinstance(place.decision, OwnForms):  # each call's int32 bias, behind the transposes of TensorFlow's layout
            assert [pair.bits for pair in held[site]] == [32] * len(place.decision.uses), site
    assert main(["encodings", "check", str(folder), "--target", "default", "--name", "net"]) == 0
    assert not verify(folder, data, name="net").problems
    return bundle


def test_a_changed_scale_of_a_sequence_convolution_is_found(tmp_path: Path, capsys: Any) -> None:
    model = _model("sequence")
    data = {"a": np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)}
    file = QuantSim(model).calibrate(data).export(tmp_path, name="net").files["qdq"]
    content = onnx.load(file)
    (scale,) = [t for t in content.graph.initializer if t.name == "last/kernel_scale"]
    values = np.array(onnx.numpy_helper.to_array(scale))
    values[1] *= np.float32(1.01)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(content, file)
    assert main(["encodings", "check", str(tmp_path), "--name", "net"]) == 1
    assert "last/kernel: has another scale in the Q/DQ pair" in capsys.readouterr().out


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_has_its_codes(name: str, tmp_path: Path) -> None:
    model = _model(name)
    rng = np.random.default_rng(0)
    data = {x.name: rng.normal(size=(8, 8, 8, 3)).astype(np.float32) for x in model.inputs}
    bundle = _proved(QuantSim(model).calibrate(data), data, tmp_path / "keras")
    again = {f"{k}:0": v for k, v in data.items()}
    _proved(QuantSim(str(bundle.files["pb"])).calibrate(again), again, tmp_path / "tensorflow")
