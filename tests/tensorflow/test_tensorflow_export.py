"""Exported TensorFlow models: names, what plain TensorFlow makes of them, and failures that leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

from tfsims import setup  # noqa: E402

from bitwright.errors import BitwrightError, InputError, ModelError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.export import export as exporting  # noqa: E402

v1 = tf.compat.v1


@pytest.fixture(scope="module")
def net():
    return setup("trained")


def exported(net, folder, format, name):
    return net.sim.backend.export(net.model, net.sim.plan, net.sim.table, folder / name, format)


def float_output(net):
    return net.sim.predict(net.sample, simulated=False)[0]


def test_everything_loads_without_bitwright(net, tmp_path):
    """The bundle of a session's model, and its SavedModel, in a process with nothing but TensorFlow."""
    bundle = net.sim.export(tmp_path, name="net")
    endings = ["data-00000-of-00001", "encodings", "index", "meta", "pb", "qdq.onnx", "record.npz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"net.{e}" for e in endings), "report.html", "report.json"]
    assert set(bundle.files) == {"model", "meta", "checkpoint", "checkpoint_data", "qdq", "encodings"}
    exported(net, tmp_path, "saved_model", "saved")
    np.savez(tmp_path / "data.npz", x=net.sample, y=float_output(net))
    script = """
        import sys
        import numpy as np, tensorflow as tf
        v1, folder = tf.compat.v1, sys.argv[1]
        data = np.load(folder + "/data.npz")
        close = lambda y: np.testing.assert_allclose(y, data["y"], rtol=1e-5, atol=1e-5)
        with tf.Graph().as_default(), v1.Session() as session:
            v1.train.import_meta_graph(folder + "/net.meta").restore(session, folder + "/net")
            close(session.run("logits:0", {"x:0": data["x"]}))
            feed = {"x:0": data["x"], "labels:0": np.arange(8) % 5}
            before = session.run("loss:0", feed)
            for _ in range(5):
                session.run("train", feed)
            assert session.run("loss:0", feed) < before
        graph_def = v1.GraphDef.FromString(open(folder + "/net.pb", "rb").read())
        assert not any("Variable" in n.op or "Adam" in n.name for n in graph_def.node)
        with tf.Graph().as_default(), v1.Session() as session:
            tf.import_graph_def(graph_def, name="")
            close(session.run("logits:0", {"x:0": data["x"]}))
        saved = tf.saved_model.load(folder + "/saved").signatures["serving_default"]
        close(saved(x=tf.constant(data["x"]))["logits"])
        assert not any(m.startswith("bitwright") for m in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("kind", ["references", "function", "frozen"])
def test_a_bundle_has_the_source_s_own_form(kind, tmp_path):
    net = setup(kind)
    bundle = net.sim.export(tmp_path, name="net")
    own = {"references": {"meta", "checkpoint", "checkpoint_data"}, "function": {"saved_model"}, "frozen": set()}
    assert set(bundle.files) == {"model", "qdq", "encodings"} | own[kind]
    again = net.sim.export(tmp_path, name="net")  # over what is there
    assert again.files == bundle.files
    for purpose in {"model", *own[kind]} & {"model", "meta", "saved_model"}:
        found = TensorFlowBackend().load(bundle.files[purpose])(net.sample)
        assert np.allclose(found, float_output(net), rtol=1e-5, atol=1e-5)


def test_encodings_are_named_by_the_frozen_graph_s_tensors(net, tmp_path):
    bundle = net.sim.export(tmp_path, name="net")
    graph_def = v1.GraphDef.FromString(bundle.files["model"].read_bytes())
    content = json.loads(bundle.files["encodings"].read_text())
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        for entry in content["activation_encodings"]:
            assert graph.get_tensor_by_name(entry["name"]).dtype == tf.float32
        for entry in content["param_encodings"]:
            shape = graph.get_operation_by_name(entry["name"]).outputs[0].shape
            assert len(entry["scale"]) in (1, *shape)
    assert len(content["activation_encodings"]) + len(content["param_encodings"]) > 8
    again = QuantSim(bundle.files["model"], weights="int8", activations="uint8")
    again.load_encodings(bundle.files["encodings"])
    assert all(again.encodings[s].equals(e) for s, e in net.table.items())


@pytest.mark.parametrize("kind", ["trained", "references", "function", "frozen"])
def test_the_integer_runtime_computes_what_the_simulation_does(kind, tmp_path):
    net = setup(kind)
    bundle = net.sim.export(tmp_path, name="net")
    found = next(iter(OnnxBackend().compile(bundle).run({"x:0": net.sample}).values()))
    step = float(net.table[net.sim.graph.outputs[0]].scale)
    steps = np.rint(np.abs(found - net.sim.model(net.sample)) / step)
    assert steps.max() <= 1
    assert np.mean(steps > 0) < 0.05


def test_optimizer_variables_are_in_the_checkpoint(net, tmp_path):
    files = exported(net, tmp_path, "meta", "net.meta").files
    saved = dict(tf.train.list_variables(str(tmp_path / "net")))
    assert set(saved) == set(net.model.variables)
    assert any("Adam" in name for name in saved)
    assert all(p.exists() for p in files.values())


def test_a_checkpoint_of_a_function_s_graph(tmp_path):
    net = setup("function")
    exported(net, tmp_path, "meta", "net.meta")
    with tf.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(str(tmp_path / "net.meta")).restore(session, str(tmp_path / "net"))
        found = session.run(net.model.outputs[0], {net.model.inputs[0]: net.sample})
    assert np.allclose(found, float_output(net), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no variables"):
        exported(setup("frozen"), tmp_path, "meta", "frozen.meta")


def test_a_trained_bias_reaches_the_files(tmp_path):
    """What an edit adds to the graph (a bias of its own) is saved by the checkpoint's saver too."""
    net = setup("trained")
    before = set(net.model.variables)
    net.sim.apply("fold_batch_norm").calibrate(net.sample)
    assert set(net.model.variables) - before
    exported(net, tmp_path, "meta", "net.meta")
    with tf.Graph().as_default(), v1.Session() as session:
        v1.train.import_meta_graph(str(tmp_path / "net.meta")).restore(session, str(tmp_path / "net"))
        found = session.run("logits:0", {"x:0": net.sample})
    assert np.allclose(found, float_output(net), rtol=1e-4, atol=1e-4)


def test_ops_without_an_onnx_counterpart_keep_the_rest(tmp_path):
    def build(net, x):
        y = tf.nn.relu(net.dense("fc", x, 6), name="act")
        return net.dense("out", tf.math.bessel_i0e(y), 3)

    net = setup("session", build, (10,))
    with pytest.warns(UserWarning, match="BesselI0e"):
        bundle = net.sim.export(tmp_path, name="net")
    assert "qdq" not in bundle.files
    assert bundle.files["model"].exists()
    with pytest.raises(ModelError, match="BesselI0e"):
        exported(net, tmp_path, "qdq", "net.qdq.onnx")
    assert not any(p.suffix == ".onnx" or p.name.startswith(".") for p in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*ONNX.*:UserWarning")
def test_loops_and_conditions_of_a_function(tmp_path):
    """The source's functions are still there, under their own names, in the process that exports; and twice."""
    w = tf.Variable(np.eye(4, dtype=np.float32), name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")])
    def run(x):
        _, y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tf.tanh(y)), (0, x))
        return tf.matmul(tf.cond(tf.reduce_sum(y) > 0, lambda: y * 2.0, lambda: y - 1.0), w)

    x = np.linspace(-1, 2, 32, dtype=np.float32).reshape(8, 4)
    sim = QuantSim(run, weights="int8", activations="uint8").calibrate(x)
    for folder in ("first", "second"):
        bundle = sim.export(tmp_path / folder, name="net")
        for purpose in ("model", "saved_model"):
            found = TensorFlowBackend().load(bundle.files[purpose])(x)
            np.testing.assert_allclose(found, run(x), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "first" / "net.pb").read_bytes() == (tmp_path / "second" / "net.pb").read_bytes()


def test_a_variable_inside_of_a_loop_cannot_be_frozen(tmp_path):
    w = tf.Variable(np.eye(4, dtype=np.float32) / 2, name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")])
    def run(x):
        return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tf.matmul(y, w)), (0, x))[1]

    backend, x = TensorFlowBackend(), np.ones((2, 4), np.float32)
    model = backend.adopt(run)
    with pytest.raises(ModelError, match=r"'w' inside of its body.*saved_model"):
        backend.save(model, tmp_path / "net.pb")
    assert list(tmp_path.iterdir()) == []
    backend.save(model, tmp_path / "net")
    np.testing.assert_allclose(backend.load(tmp_path / "net")(x), run(x), rtol=1e-6)


def test_inputs_within_name_scopes_are_arguments_of_a_saved_model(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x, y, z = (v1.placeholder(tf.float32, (None, 4), name=n) for n in ("input/x", "input_x", "2/x"))
        tf.add(x, y * 2.0 + z * 3.0, name="out/sum")
    backend = TensorFlowBackend()
    names = ["input/x", "input_x", "2/x"]
    model = backend.adopt(SessionModel(v1.Session(graph=graph), inputs=names, outputs=["out/sum"]))
    backend.save(model, tmp_path / "net")
    data = [np.full((2, 4), n, np.float32) for n in (1, 2, 3)]
    serve = tf.saved_model.load(str(tmp_path / "net")).signatures["serving_default"]
    keys = ("input_x_1", "input_x", "arg_2_x")
    (found,) = serve(**{k: tf.constant(v) for k, v in zip(keys, data, strict=True)}).values()
    np.testing.assert_array_equal(found, np.full((2, 4), 14, np.float32))


def test_resized_bytes_are_floats_in_onnx_too(tmp_path):
    kernel = tf.Variable(np.linspace(-1, 1, 108, dtype=np.float32).reshape(3, 3, 3, 4), name="kernel")

    @tf.function(input_signature=[tf.TensorSpec((None, 6, 6, 3), tf.uint8, "x")])
    def run(x):
        return tf.nn.conv2d(tf.image.resize(x, (9, 9)) / 255.0, kernel, 1, "SAME")

    images = np.random.default_rng(0).integers(0, 255, (8, 6, 6, 3)).astype(np.uint8)
    sim = QuantSim(run, weights="int8", activations="uint8").calibrate(images)
    bundle = sim.export(tmp_path, name="net")
    found = next(iter(OnnxBackend().compile(bundle).run({sim.native.inputs[0]: images}).values()))
    step = float(sim.table[sim.graph.outputs[0]].scale)
    assert np.abs(found - sim.model(images)).max() <= 1.01 * step


@pytest.mark.parametrize("format", ["pb", "meta", "saved_model", "qdq"])
def test_failures_leave_what_was_there(net, tmp_path, monkeypatch, format):
    """A write that breaks off leaves the old artefact, and no other file."""
    name = {"pb": "net.pb", "meta": "net.meta", "saved_model": "net", "qdq": "net.onnx"}[format]
    exported(net, tmp_path, format, name)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    monkeypatch.setattr(tf.saved_model, "save", broken)
    with pytest.raises(BitwrightError, match="No space"):
        exported(net, tmp_path, format, name)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_parts_that_tensorflow_could_not_remove_are_no_part_of_an_export(net, tmp_path, monkeypatch, caplog):
    saved, checkpoint = tf.saved_model.save, v1.train.Saver.save

    def save(module, folder, **given):
        tf.get_logger().warning("AutoGraph could not transform a function\nCause: Input/output error")
        saved(module, folder, **given)
        (Path(folder) / "variables/variables_temp").mkdir()
        (Path(folder) / "variables/variables_temp/part-00000-of-00001.index").touch()

    def save_checkpoint(self, session, prefix, **given):
        Path(f"{prefix}_temp").mkdir()
        return checkpoint(self, session, prefix, **given)

    monkeypatch.setattr(tf.saved_model, "save", save)
    monkeypatch.setattr(v1.train.Saver, "save", save_checkpoint)
    monkeypatch.setattr(tf.get_logger(), "propagate", True)
    exported(net, tmp_path, "saved_model", "saved")
    assert sorted(p.name for p in (tmp_path / "saved/variables").iterdir()) == [
        "variables.data-00000-of-00001", "variables.index",
    ]  # fmt: skip
    exported(net, tmp_path, "meta", "net.meta")
    assert not list(tmp_path.rglob("*_temp"))
    assert not caplog.records


def test_bad_formats_and_sizes_are_refused(net, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="saved_model"):
        exported(net, tmp_path, "tflite", "net.tflite")
    monkeypatch.setattr(exporting, "LARGEST", 100)
    with pytest.raises(ModelError, match="2 GiB"):
        exported(net, tmp_path, "pb", "net.pb")
    assert list(tmp_path.iterdir()) == []


def test_exporting_quietly_leaves_the_model_alone(net, tmp_path):
    meta = net.model.copy_meta()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        net.sim.export(tmp_path, name="net")
    assert net.model.meta == meta


def test_the_command_line_opens_a_checkpoint(net, tmp_path, capsys):
    """With the outputs named; and `verify` runs what came out."""
    from bitwright.cli import main

    exported(net, tmp_path, "meta", "net.meta")
    np.savez(tmp_path / "data.npz", x=net.sample)
    out = tmp_path / "out"
    given = ["quantize", str(tmp_path / "net.meta"), "--data", str(tmp_path / "data.npz"), "--out", str(out), "-q"]
    assert main([*given, "--load", "outputs=act1,logits", "--load", 'inputs={"image": "x"}']) == 0
    assert {"net.pb", "net.meta", "net.index", "net.encodings", "net.qdq.onnx"} <= {p.name for p in out.iterdir()}
    verified = ["verify", str(out), "--data", str(tmp_path / "data.npz"), "--json", "--float", str(out / "net.pb")]
    capsys.readouterr()
    assert main(verified) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreement"]["integer_simulated"] == 1.0
    assert main([*given, "--load", "outputs"]) == 2
    assert main([*given, "--load", "nothing=1"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_without_onnx_the_native_files_are_written(net, tmp_path, monkeypatch):
    for module in ("onnx_ir", "bitwright_onnx.backend"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.warns(UserWarning, match="pip install"):
        bundle = net.sim.export(tmp_path, name="net")
    assert set(bundle.files) == {"model", "meta", "checkpoint", "checkpoint_data", "encodings"}
