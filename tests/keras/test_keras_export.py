"""Exports of Keras models: files that plain Keras and TensorFlow load, names, QDQ ONNX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

import keras_nets as nets  # noqa: E402

from bitwright import QuantSim, formats  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.bundle import check_bundle, read_encodings  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.capture.files import load_model  # noqa: E402
from bitwright_keras.export.export import export, save_saved_model  # noqa: E402
from bitwright_keras.export.frozen import frozen  # noqa: E402
from bitwright_keras.graph.native import keras_model  # noqa: E402
from bitwright_tensorflow.graph.runtime import session_config  # noqa: E402

BACKEND = KerasBackend()
NETS = ("residual", "branches", "separable", "transformer")


def _data(model: Any, samples: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for x in model.inputs:
        shape = (samples, *x.shape[1:])
        made[x.name] = rng.integers(0, 20, shape).astype(np.int32) if x.dtype == "int32" else rng.normal(size=shape)
    return {k: v if v.dtype == np.int32 else v.astype(np.float32) for k, v in made.items()}


def _run(graph_def: Any, fetches: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with tf.Graph().as_default():
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(config=session_config()) as session:
            return session.run(fetches, {f"{k}:0": v for k, v in feeds.items()})


def _calibrated(net: str, **options: Any) -> tuple[QuantSim, dict[str, np.ndarray]]:
    keras.utils.set_random_seed(3)
    model = nets.settled(getattr(nets, net)())
    data = _data(model, 32)
    return QuantSim(model, **options).calibrate(data), data


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantSim, dict[str, np.ndarray], Path]:
    sim, data = _calibrated("separable", target="generic-int8")
    folder = tmp_path_factory.mktemp("export")
    sim.export(folder, name="net")
    return sim, data, folder


@pytest.mark.parametrize("net", NETS)
def test_every_activation_is_a_tensor_of_the_frozen_graph(net: str) -> None:
    model = BACKEND.adopt(nets.settled(getattr(nets, net)()))
    graph = BACKEND.graph(model)
    found = frozen(model)
    assert {n.op for n in found.graph_def.node}.isdisjoint({"ReadVariableOp", "VarHandleOp", "NoOp"})
    sites = [t for t in graph.tensors if graph.tensors[t].is_float and t in found.tensors]
    assert set(graph.tensors) <= set(found.tensors) and set(graph.outputs) <= set(sites)
    data = _data(_native(model))
    wanted = BACKEND.session(model, [Tap(t) for t in sites]).run(data)
    for site, value in zip(sites, _run(found.graph_def, [found.tensors[s] for s in sites], data), strict=True):
        np.testing.assert_allclose(value, wanted[Tap(site)], rtol=1e-4, atol=1e-5, err_msg=site)


def _native(model: Any) -> Any:
    from bitwright_keras.graph.native import keras_model

    return keras_model(model)


@pytest.mark.parametrize("net", NETS)
def test_parameters_are_constants_of_the_frozen_graph(net: str) -> None:
    model = BACKEND.adopt(nets.settled(getattr(nets, net)()))
    found = frozen(model)
    constants = {n.name: tf.make_ndarray(n.attr["value"].tensor) for n in found.graph_def.node if n.op == "Const"}
    values = BACKEND.read(model, list(BACKEND.graph(model).params))
    assert len(found.constants) >= len([v for v in values.values() if v.ndim])
    for param, name in found.constants.items():
        assert sorted(np.ravel(constants[name]).tolist()) == sorted(np.ravel(values[param]).tolist()), param


def test_a_bundle_has_all_files_and_encodings_name_tensors_of_the_pb(exported: Any) -> None:
    sim, _, folder = exported
    assert {p.name for p in folder.iterdir()} == {
        "net.keras", "net.h5", "net.pb", "net.qdq.onnx", "net.encodings", "net.record.npz", "report.json",
        "report.html"}  # fmt: skip
    graph_def = tf.compat.v1.GraphDef.FromString((folder / "net.pb").read_bytes())
    nodes = {n.name for n in graph_def.node}
    file = formats.read(folder / "net.encodings")
    assert file.activations and file.parameters
    assert {name.removesuffix(":0") for name in file.activations} <= nodes
    assert all(name.endswith(":0") for name in file.activations)
    assert set(file.parameters) <= nodes
    reopened = load_model(folder / "net.keras")
    assert check_bundle(BACKEND.graph(reopened), sim.plan, folder / "net.encodings") == []
    table = read_encodings(folder / "net.encodings", BACKEND.graph(reopened))
    for site, encoding in table.items():
        assert np.array_equal(encoding.scale, sim.table[site].scale), site


PLAIN = """
import sys, numpy as np, keras, tensorflow as tf
folder = sys.argv[1]; x = np.load(folder + "/x.npy")
results = [keras.models.load_model(f"{folder}/net.{s}", compile=False).predict(x, verbose=0) for s in ("keras", "h5")]
served = tf.saved_model.load(folder + "/served")
results.append(next(iter([served.serve(x)])).numpy())
graph_def = tf.compat.v1.GraphDef.FromString(open(folder + "/net.pb", "rb").read())
with tf.Graph().as_default():
    tf.import_graph_def(graph_def, name="")
    with tf.compat.v1.Session() as session:
        results.append(session.run(sys.argv[2], {"x:0": x}))
assert not [m for m in sys.modules if m.startswith("bitwright")]
np.save(folder + "/y.npy", np.stack(results))
"""


def test_exports_load_in_a_process_without_bitwright(exported: Any, tmp_path: Path) -> None:
    sim, data, folder = exported
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    export(sim.native, sim.plan, sim.table, tmp_path / "served", "saved_model")
    np.save(tmp_path / "x.npy", data["x"])
    output = frozen(sim.native).tensors[sim.graph.outputs[0]]
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path), output], check=True, timeout=300)
    wanted = sim.predict(data, simulated=False)[0]
    for result in np.load(tmp_path / "y.npy"):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_qdq_computes_what_the_simulation_does(net: str, tmp_path: Path) -> None:
    from bitwright_onnx.export.runtime import IntegerSession

    sim, data = _calibrated(net, target="onnxruntime-cpu")
    path = tmp_path / "net.qdq.onnx"
    bundle = export(sim.native, sim.plan, sim.table, path, "qdq")
    missing = {s for s in sim.plan.quantized if s not in IntegerSession.tensors(path)}
    # Tensors that are another one's under a second name (dropout) have no pair of their own.
    assert {sim.plan.root(s) for s in missing} <= set(sim.plan.quantized) - missing
    got = IntegerSession(bundle.files["qdq"], reference=True).run(data)[Tap(sim.graph.outputs[0])]
    assert sqnr(sim.predict(data)[0], got) > 40


def test_a_concatenation_of_one_tensor_has_its_grid(tmp_path: Path) -> None:
    """TensorFlow leaves it out: with a grid of its own, other readers of the tensor would be put on it."""
    keras.utils.set_random_seed(0)
    x = keras.Input((32, 32, 3), name="x")
    a = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(x)
    y = keras.layers.MaxPooling2D(4, name="pool")(a)  # its own range isn't that of what it reads
    z = keras.layers.Conv2D(8, 1, name="b")(keras.layers.Concatenate(name="one")([y]))
    sim = QuantSim(keras.Model(x, keras.layers.Concatenate(name="both")([y, z])), target="onnxruntime-cpu")
    data = (np.random.default_rng(0).normal(size=(16, 32, 32, 3)) ** 5).astype(np.float32)
    sim.calibrate({sim.graph.inputs[0]: data}).export(tmp_path, name="m")  # compares tensor by tensor
    assert sim.plan.root("one") == sim.plan.root("pool") != sim.plan.root("both")


def test_verify_opens_the_bundle_and_runs_onnx_runtime(exported: Any) -> None:
    _, data, folder = exported
    result = verify(folder, data, inspected=4)
    assert result.problems == [] and result.agreement["integer_simulated"] > 0.9
    assert result.sqnr_db["integer_simulated"] > 25
    with pytest.raises(InputError, match="nothing for tflite"):
        verify(folder, data, runtime="tflite")
    with pytest.raises(InputError, match="there is no runtime 'tensorrt'"):
        verify(folder, data, runtime="tensorrt")


def test_the_command_line_takes_an_h5_file(tmp_path: Path) -> None:
    from bitwright.cli import main

    keras.utils.set_random_seed(3)
    model = nets.settled(nets.residual())
    model.save(tmp_path / "net.h5")
    np.save(tmp_path / "x.npy", _data(model, 16)["x"])
    out = tmp_path / "out"
    quantize = ["quantize", tmp_path / "net.h5", "--data", tmp_path / "x.npy", "--target", "tflite-int8",
                "--recipe", "fold_batch_norm", "--out", out, "--quiet"]  # fmt: skip
    assert main(list(map(str, quantize))) == 0
    suffixes = {".keras", ".h5", ".pb", ".encodings", ".qdq.onnx", ".tflite", ".record.npz"}
    assert {p.name for p in out.iterdir() if p.is_file()} == {f"net{s}" for s in suffixes} | {
        "report.json", "report.html"}  # fmt: skip
    assert main(["encodings", "check", str(out)]) == 0


def test_bad_exports_leave_nothing(tmp_path: Path) -> None:
    sim, _ = _calibrated("residual", target="generic-int8")
    with pytest.raises(InputError, match=r"no format 'coreml'.*tflite"):
        export(sim.native, sim.plan, sim.table, tmp_path / "x", "coreml")
    with pytest.raises(InputError, match="can't write"):
        export(sim.native, sim.plan, sim.table, tmp_path / "nowhere" / "x.pb", "pb")
    with pytest.raises(InputError, match="can't write"):
        export(sim.native, sim.plan, sim.table, tmp_path / "nowhere" / "served", "saved_model")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_model_is_replaced_whole(tmp_path: Path) -> None:
    model = BACKEND.adopt(nets.settled(nets.residual()))
    path = tmp_path / "served"
    save_saved_model(model, path)
    (path / "stale").write_text("old")
    save_saved_model(model, path)
    assert not (path / "stale").exists() and (path / "saved_model.pb").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["served"]


OTHER = """
import sys, numpy as np, keras
from bitwright_keras.backend import KerasBackend
from bitwright_keras.export.export import save_saved_model
from bitwright_keras.export.frozen import frozen
from bitwright.errors import CapabilityError
from pathlib import Path
assert keras.backend.backend() == "torch"
backend = KerasBackend()
model = backend.load(Path(sys.argv[1]))
found = frozen(model)
Path(sys.argv[2]).write_bytes(found.graph_def.SerializeToString())
assert set(backend.graph(model).tensors) <= set(found.tensors)
try:
    save_saved_model(model, Path(sys.argv[2] + "_served"))
except CapabilityError as error:
    assert "KERAS_BACKEND=tensorflow" in str(error)
else:
    raise SystemExit("a SavedModel of Keras on torch?")
"""


def test_with_keras_on_torch_another_process_freezes(exported: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sim, data, folder = exported
    command = [sys.executable, "-c", OTHER, str(folder / "net.keras"), str(tmp_path / "graph.pb")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "KERAS_BACKEND": "torch"})
    graph_def = tf.compat.v1.GraphDef.FromString((tmp_path / "graph.pb").read_bytes())
    (got,) = _run(graph_def, [f"{sim.graph.outputs[0]}:0"], data)
    np.testing.assert_allclose(got, sim.predict(data, simulated=False)[0], rtol=1e-4, atol=1e-6)


def test_a_model_that_tensorflow_cannot_trace_keeps_its_keras_files(tmp_path: Path) -> None:
    sim, _ = _calibrated("residual", target="generic-int8")
    node = sim.native.nodes[-1]

    class Untraceable(keras.layers.Dense):
        def call(self, x: Any) -> Any:
            if tf.inside_function():
                raise ValueError("not in a graph")
            return super().call(x)

    node.operation.__class__ = Untraceable
    with pytest.raises(ModelError, match=r"can't freeze 'residual': not in a graph"):
        frozen(sim.native)
    with pytest.warns(UserWarning, match=r"\.keras, \.h5 and \.qdq\.onnx are written only.*not in a graph"):
        assert BACKEND.bundled(sim.native) == {"h5": ".h5", "qdq": ".qdq.onnx"}
    opened = BACKEND.adopt(keras_model(sim.native))  # now its own graph doesn't know the layer either
    with pytest.warns(UserWarning, match=r"\.keras, \.h5 and \.qdq\.onnx are written only.*not in a graph"):
        assert BACKEND.bundled(opened) == {"h5": ".h5", "qdq": ".qdq.onnx"}


def test_bytes_divided_by_a_number_are_frozen() -> None:
    x = keras.Input((6, 6, 3), dtype="uint8", name="x")
    model = keras.Model(x, keras.layers.Conv2D(2, 3)(x / 255.0))
    found = BACKEND.adopt(model)
    graph = frozen(found)
    images = np.random.default_rng(0).integers(0, 255, (2, 6, 6, 3)).astype(np.uint8)
    (got,) = _run(graph.graph_def, [graph.tensors[found.output_ids[0]]], {"x": images})
    np.testing.assert_allclose(got, model(images), rtol=1e-5, atol=1e-6)


def test_float16_layers_have_their_codes_in_qdq(tmp_path: Path) -> None:
    x = keras.Input((6, 6, 3), name="x")
    y = keras.layers.Conv2D(4, 3, activation="relu", name="conv", dtype="mixed_float16")(x)
    model = keras.Model(x, keras.layers.Dense(3, dtype="float32", name="head")(keras.layers.Flatten()(y)))
    data = _data(model, 8)
    from bitwright_onnx.backend import OnnxBackend
    from bitwright_onnx.export.runtime import IntegerSession

    sim = QuantSim(model, target="htp_v73").calibrate(data)
    bundle = sim.export(tmp_path, name="net")
    (pair,) = OnnxBackend().pairs(bundle)["conv/kernel"]
    np.testing.assert_array_equal(np.ravel(pair.scale), np.ravel(sim.encodings["conv/kernel"].scale))
    (found,) = IntegerSession(bundle.files["qdq"], reference=True).run(data).values()
    assert sqnr(sim.predict(data)[0], found) > 40


def test_an_output_that_is_an_input_is_handed_out_as_it_came(tmp_path) -> None:
    """In the simulated model, when it predicts, and in the QDQ file; what dropout passes on is on the grid."""
    ort, layers = pytest.importorskip("onnxruntime"), keras.layers
    inputs = keras.Input((6,), name="x")
    made = layers.Dense(6, activation="relu", name="d")(inputs), layers.Dropout(0.5, name="p")(inputs)
    model = keras.Model(inputs, [inputs, *made])
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    sim = QuantSim(model).calibrate(x)
    rounded = sim.table["x"].fake_quantize(x)
    session = ort.InferenceSession(sim.export(tmp_path).files["qdq"])
    assert [o.name for o in session.get_outputs()] == list(sim.graph.outputs) == ["x", "d/relu", "p"]
    for row in (sim.model(x), sim.predict(x), session.run(None, {"x": x})):
        np.testing.assert_array_equal(np.asarray(row[0]), x)
        np.testing.assert_allclose(np.asarray(row[2]), rounded, atol=1e-6)
    found = verify(tmp_path, x)
    assert found.problems == []
    figures = {o.name: o.sqnr_db for o in found.outputs}
    assert figures["x"]["integer_float"] == float("inf")
    assert 30 < figures["p"]["integer_float"] < 60 and figures["p"]["integer_simulated"] > 100


@keras.saving.register_keras_serializable("bitwright-tests")
class Table(keras.layers.Layer):
    """Adds a large constant that is no weight."""

    def build(self, shape: Any) -> None:
        self.table = tf.constant(np.random.default_rng(1).normal(size=(256, 128)).astype(np.float32))
        self.built = True

    def call(self, x: Any) -> Any:
        return x + self.table


@keras.saving.register_keras_serializable("bitwright-tests")
class Choice(keras.layers.Layer):
    """A condition with a constant in one of its branches."""

    def call(self, x: Any) -> Any:
        return tf.cond(tf.reduce_sum(x) > 1e6, lambda: tf.zeros((8, 6)), lambda: tf.tanh(x @ tf.transpose(x) @ x))

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


@keras.saving.register_keras_serializable("bitwright-tests")
class Loop(keras.layers.Layer):
    """A loop with a weight and constants in it."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(6, 6), name="kernel")
        self.built = True

    def call(self, x: Any) -> Any:
        return tf.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, 2.0 * tf.tanh(x @ self.kernel)), [0, x])[1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Table(), (256, 128)),
        (Choice(), (6,)),
        (Loop(), (6,)),
        (keras.layers.LSTM(6), (5, 4)),
        (keras.layers.Bidirectional(keras.layers.GRU(6)), (5, 4)),
    ],
    ids=["table", "choice", "loop", "lstm", "gru"],
)
@pytest.mark.parametrize("large", [1, 2**16])
def test_constants_branches_and_loops_are_in_the_file(
    layer: Any, shape: tuple[int, ...], large: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bitwright_keras.export.frozen.LARGE", large)
    given = keras.Input(shape, name="given")
    model = keras.Model(given, keras.layers.Dense(3)(layer(given)))
    data = {"given": np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)}
    adopted = BACKEND.adopt(model)
    graph = frozen(adopted)
    with (tmp_path / "net.pb").open("wb") as file:
        graph.write(file)
    written = tf.compat.v1.GraphDef.FromString((tmp_path / "net.pb").read_bytes())
    (found,) = _run(written, [graph.tensors[adopted.output_ids[0]]], data)
    np.testing.assert_allclose(found, model(data["given"]).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lacking", ["_FunctionConverterDataInEager", "_replace_variables_by_constants", "_construct_concrete_function"]
)
def test_a_tensorflow_of_other_insides_freezes_all_the_same(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow.python.framework import convert_to_constants

    monkeypatch.setattr("bitwright_keras.export.frozen.LARGE", 1)
    model = nets.settled(nets.separable())
    assert frozen(BACKEND.adopt(model)).left_out
    kept = getattr(convert_to_constants, lacking)
    public = convert_to_constants.convert_variables_to_constants_v2

    def convert(concrete: Any) -> Any:  # which finds the part under another name, so to speak
        with pytest.MonkeyPatch.context() as found:
            found.setattr(convert_to_constants, lacking, kept, raising=False)
            return public(concrete)

    monkeypatch.setattr(convert_to_constants, "convert_variables_to_constants_v2", convert)
    monkeypatch.delattr(convert_to_constants, lacking)
    adopted, data = BACKEND.adopt(model), _data(model)
    graph = frozen(adopted)
    assert not graph.left_out
    (found,) = _run(graph.graph_def, [graph.tensors[adopted.output_ids[0]]], data)
    np.testing.assert_allclose(found, model(next(iter(data.values()))), rtol=1e-4, atol=1e-5)
