"""What the backend opens: sessions, checkpoints, SavedModels of both generations, functions, frozen graphs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright import registry  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.graph import OpKind  # noqa: E402
from bitwright.runs import run_in  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.capture import sources  # noqa: E402
from bitwright_tensorflow.graph.model import Kind  # noqa: E402

v1 = tf.compat.v1
BACKEND = TensorFlowBackend()
X = tfnets.image(4, 8, 8, 3)


def outputs(model, x=X):
    graph = BACKEND.graph(model)
    found = BACKEND.session(model, [Tap(t) for t in graph.outputs]).run({graph.inputs[0]: x})
    return [found[Tap(t)] for t in graph.outputs]


def float_output(given: SessionModel, x=X):
    return given.session.run(given.outputs[0], {"x:0": x})


def kinds(model) -> list[OpKind]:
    return [op.kind for op in BACKEND.graph(model)]


RESIDUAL = [OpKind.CONV, OpKind.BATCH_NORM, OpKind.CLIPPED_RELU, OpKind.CONV, OpKind.BATCH_NORM, OpKind.RELU,
            OpKind.ADD, OpKind.AVERAGE_POOL, OpKind.LINEAR]  # fmt: skip


@pytest.mark.parametrize("resource", [True, False])
def test_a_session(resource: bool) -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3, resource=resource, train=True)
    before = len(given.session.graph.get_operations())
    model = BACKEND.adopt(given)
    assert model.kind is Kind.SESSION
    assert kinds(model) == RESIDUAL
    np.testing.assert_allclose(outputs(model)[0], float_output(given), rtol=1e-5, atol=1e-5)
    graph = BACKEND.graph(model)
    assert graph.inputs == ("x:0",)
    assert graph.outputs == ("logits:0",)
    assert graph.op("conv1/Conv2D").params[next(iter(graph.op("conv1/Conv2D").params))] == "conv1/kernel"
    assert graph.tensors["act1:0"].channel_axis == 3
    assert len(given.session.graph.get_operations()) == before, "the user's graph was changed"
    np.testing.assert_allclose(model(X), float_output(given), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model(x=X), float_output(given), rtol=1e-5, atol=1e-5)


def test_a_session_needs_to_be_told_its_outputs() -> None:
    given = tfnets.session_model(tfnets.mlp, 10)
    with pytest.raises(InputError, match="SessionModel"):
        BACKEND.adopt(given.session)
    with pytest.raises(InputError, match="no tensor 'nothing:0'"):
        BACKEND.adopt(SessionModel(given.session, outputs=["nothing"]))
    assert BACKEND.adopt(SessionModel(given.session, outputs=["prob"])).inputs == ("x:0",)


def test_uninitialized_variables_are_named() -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        v1.identity = tf.identity(tf.matmul(x, v1.get_variable("w", (3, 2))), name="y")
    with pytest.raises(ModelError, match="'w'"):
        BACKEND.adopt(SessionModel(v1.Session(graph=graph), outputs=["y"]))


def test_placeholders_that_are_no_data_become_constants() -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        rate = v1.placeholder(tf.float32, (), name="rate")
        tf.multiply(x, rate, name="y")
        session = v1.Session(graph=graph)
    with pytest.raises(InputError, match="constants"):
        BACKEND.adopt(SessionModel(session, inputs=["x"], outputs=["y"]))
    model = BACKEND.adopt(SessionModel(session, inputs=["x"], outputs=["y"], constants={"rate": 2.0}))
    np.testing.assert_array_equal(outputs(model, np.ones((2, 3), np.float32))[0], np.full((2, 3), 2, np.float32))


def test_a_checkpoint(tmp_path: Path) -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3, train=True)
    with given.session.graph.as_default():
        v1.train.Saver().save(given.session, str(tmp_path / "net"))
    model = BACKEND.load(tmp_path / "net.meta", inputs="x", outputs="logits")
    np.testing.assert_allclose(outputs(model)[0], float_output(given), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="outputs"):
        BACKEND.load(tmp_path / "net.meta")
    (tmp_path / "net.index").unlink()
    with pytest.raises(InputError, match="checkpoint"):
        BACKEND.load(tmp_path / "net.meta", outputs="logits")


def test_meta_written_here_opens_without_being_told(tmp_path: Path) -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3, train=True)
    BACKEND.save(BACKEND.adopt(given), tmp_path / "net.meta")
    model = BACKEND.load(tmp_path / "net.meta")
    assert kinds(model) == RESIDUAL
    np.testing.assert_allclose(outputs(model)[0], float_output(given), rtol=1e-5, atol=1e-5)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_frozen_graph(tmp_path: Path) -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3)
    path = BACKEND.save(BACKEND.adopt(given), tmp_path / "net.pb")
    model = BACKEND.load(path)
    assert model.kind is Kind.FROZEN
    assert not model.values
    assert kinds(model) == RESIDUAL
    graph = BACKEND.graph(model)
    assert "conv1/kernel" in graph.params
    assert (graph.inputs, graph.outputs) == (("x:0",), ("logits:0",))
    np.testing.assert_allclose(outputs(model)[0], float_output(given), rtol=1e-5, atol=1e-5)
    cut = BACKEND.load(path, outputs=["sum"])
    assert BACKEND.graph(cut).outputs == ("sum:0",)
    for bad in (b"", b"no graph", path.read_bytes()[: path.stat().st_size // 2]):
        (tmp_path / "bad.pb").write_bytes(bad)
        with pytest.raises(InputError, match=r"bad\.pb"):
            BACKEND.load(tmp_path / "bad.pb")
    with pytest.raises(InputError, match="'checkpoint'"):
        BACKEND.load(path, checkpoint="x")


@pytest.mark.parametrize("generation", [1, 2])
def test_a_saved_model(tmp_path: Path, generation: int) -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3, resource=generation == 2)
    if generation == 1:
        with given.session.graph.as_default():
            v1.saved_model.simple_save(
                given.session, str(tmp_path / "net"), {"image": given.session.graph.get_tensor_by_name("x:0")},
                {"logits": given.outputs[0]},
            )  # fmt: skip
    else:
        module = tfnets.Module(tfnets.residual, 8, 8, 3)
        tf.saved_model.save(module, str(tmp_path / "net"), signatures=module.call.get_concrete_function())
    assert registry.backend_for_path(tmp_path / "net").name == "tensorflow"
    model = BACKEND.load(tmp_path / "net")
    assert model.kind is Kind.SAVED_MODEL
    assert kinds(model) == RESIDUAL
    assert "conv1/kernel" in BACKEND.graph(model).params
    np.testing.assert_allclose(outputs(model)[0], float_output(given), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no signature 'other'"):
        BACKEND.load(tmp_path / "net", signature="other")
    with pytest.raises(InputError, match="tags"):
        BACKEND.load(tmp_path / "net", tags=("train",))


def test_saved_models_written_here(tmp_path: Path) -> None:
    module = tfnets.Module(tfnets.residual, 8, 8, 3)  # a concrete function doesn't keep its variables alive
    for name, given in (
        ("ref", tfnets.session_model(tfnets.residual, 8, 8, 3, resource=False)),
        ("function", module.call.get_concrete_function()),
    ):
        model = BACKEND.adopt(given)
        BACKEND.save(model, tmp_path / name)
        again = BACKEND.load(tmp_path / name)
        assert kinds(again) == RESIDUAL
        assert set(BACKEND.graph(again).params) == set(BACKEND.graph(model).params)
        assert set(BACKEND.graph(again).tensors) == set(BACKEND.graph(model).tensors)
        np.testing.assert_array_equal(outputs(again)[0], outputs(model)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["function", "ref"]


def test_functions_and_modules() -> None:
    module = tfnets.Module(tfnets.residual, 8, 8, 3)
    expected = module.call(X).numpy()
    free = tf.function(module.run)
    for given, sample in ((module.call, None), (module.call.get_concrete_function(), None), (free, X[:2])):
        assert BACKEND.owns(given)
        model = BACKEND.adopt(given, sample)
        assert model.kind is Kind.FUNCTION
        assert BACKEND.input_specs(model) == {"x:0": ((None, 8, 8, 3), "float32")}
        np.testing.assert_allclose(outputs(model)[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="sample"):
        BACKEND.adopt(free)
    with pytest.raises(ModelError, match="traced"):
        BACKEND.adopt(free, X[:2, :, :, :, None])


def test_a_saved_model_s_loop_stays_one_op(tmp_path: Path) -> None:
    module = tf.Module()
    module.w = tf.Variable(tfnets.image(4, 4), name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")])
    def run(x):
        _, y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, tf.tanh(y)), (0, x))
        return {"y": tf.matmul(y, module.w)}

    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"serving_default": run.get_concrete_function()})
    x = tfnets.image(8, 4)
    sim = QuantSim(tmp_path / "saved", weights="int8", activations="uint8").calibrate(x)
    assert [op.kind for op in sim.graph.ops] == [OpKind.OPAQUE, OpKind.LINEAR]
    expected = run(x)["y"].numpy()
    np.testing.assert_allclose(sim.predict(x, simulated=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_callable_modules_and_nested_results() -> None:
    class Two(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(tfnets.image(3, 2), name="w")

        def __call__(self, x, scale):
            y = tf.matmul(x, self.w)
            return {"b": [y, y * scale], "a": tf.nn.relu(y)}

    module, x = Two(), tfnets.image(4, 3)
    scale = np.ones((4, 1), np.float32) * 2
    model = BACKEND.adopt(module, (x, scale))
    assert model.inputs == ("x:0", "scale:0")
    assert list(model.signature.outputs) == ["output_0", "output_1", "output_2"]
    found = model(x, scale=scale)
    expected = tf.nest.flatten(module(x, scale))
    for value, other in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-6)
    with pytest.raises(InputError, match="no input 'z'"):
        model(x, z=scale)
    with pytest.raises(InputError, match="scale"):
        model(x)


def _without_type(graph_def):
    next(n for n in graph_def.node if n.op == "Placeholder").attr["dtype"].type = 0


def _short_strides(graph_def):
    del next(n for n in graph_def.node if n.op == "Conv2D").attr["strides"].list.i[2:]


def _other_shape(graph_def):
    constant = next(n for n in graph_def.node if n.op == "Const" and len(n.attr["value"].tensor.tensor_shape.dim) == 4)
    constant.attr["value"].tensor.tensor_shape.dim[1].size = 7


def _no_channels(graph_def):
    constant = next(n for n in graph_def.node if n.op == "Const" and len(n.attr["value"].tensor.tensor_shape.dim) == 4)
    constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.zeros((3, 3, 0, 4), np.float32)))


@pytest.mark.parametrize("change", [_without_type, _short_strides, _other_shape, _no_channels])
def test_graphs_that_are_damaged_inside_are_refused_by_name(change, tmp_path: Path) -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        weight = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32))
        tf.nn.relu(tf.nn.conv2d(x, weight, 1, "SAME"), name="y")
    graph_def = graph.as_graph_def()
    change(graph_def)
    path = tmp_path / "net.pb"
    path.write_bytes(graph_def.SerializeToString())
    with pytest.raises((InputError, ModelError)):
        QuantSim(path).calibrate(X)


def test_captured_arrays_are_constants_and_tables_are_refused() -> None:
    shift = tf.constant(np.arange(3, dtype=np.float32))
    model = BACKEND.adopt(tf.function(lambda x: x + shift), np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(outputs(model, np.zeros((2, 3), np.float32))[0][0], [0, 1, 2])
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [2.0]), 0.0)
    with pytest.raises(ModelError, match="table"):
        BACKEND.adopt(tf.function(table.lookup), np.zeros((2, 3), np.int32))


def test_quantized_models_are_refused() -> None:
    def network(x):
        return tf.quantization.fake_quant_with_min_max_args(x)

    with pytest.raises(ModelError, match="quantized already"):
        QuantSim(tf.function(network), np.zeros((2, 3), np.float32), backend="tensorflow")


def test_keras_models_are_left_to_keras() -> None:
    keras = pytest.importorskip("keras")
    assert not BACKEND.owns(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))


def test_a_keras_export(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    net = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="conv"),
         layers.BatchNormalization(name="bn"), layers.ReLU(6.0), layers.GlobalAveragePooling2D(),
         layers.Dense(5, activation="softmax", name="fc")]
    )  # fmt: skip
    net.export(tmp_path / "net", verbose=False)
    model = BACKEND.load(tmp_path / "net")
    assert kinds(model) == [OpKind.CONV, OpKind.BATCH_NORM, OpKind.CLIPPED_RELU, OpKind.AVERAGE_POOL, OpKind.LINEAR,
                            OpKind.SOFTMAX]  # fmt: skip
    graph = BACKEND.graph(model)
    variables = {v.path for v in net.weights}
    assert len(variables) == 7
    assert variables == set(graph.params)
    assert not [t for t in graph.tensors if "PartitionedCall" in t]
    np.testing.assert_allclose(outputs(model)[0], np.asarray(net(X)), rtol=1e-5, atol=1e-6)


def test_a_streaming_function_is_calibrated_on_whole_feeds():
    """Time first, a state whose first axis is layers, and a scalar."""
    rng = np.random.default_rng(0)
    w, u = (tf.constant(rng.normal(size=s).astype(np.float32) * 0.4) for s in ((3, 4), (4, 4)))

    @tf.function(input_signature=[tf.TensorSpec((4, 1, 3)), tf.TensorSpec((1, 1, 4)), tf.TensorSpec(())])
    def stream(frames, state, gain):
        h = state[0]
        for t in range(4):
            h = tf.tanh(tf.matmul(frames[t] * gain, w) + tf.matmul(h, u))
        return h[None]

    feeds = [
        {"frames:0": rng.normal(size=(4, 1, 3)), "state:0": rng.normal(size=(1, 1, 4)), "gain:0": 0.5 + 0.1 * k}
        for k in range(5)
    ]
    sim = QuantSim(stream.get_concrete_function()).calibrate(feeds)
    expected, found = (sim.predict(feeds, simulated=s)[0] for s in (False, True))
    assert found.shape == (5, 1, 4)
    assert np.square(expected - found).sum() < 1e-3 * np.square(expected).sum()
    sim.apply("adaround", feeds).calibrate(feeds)


def _held():
    """Each form that the user holds: a function with a sample, a concrete one, a loaded SavedModel, a session."""
    module = tf.Module()
    module.weight = tf.Variable(tf.reshape(tf.range(24.0), (6, 4)) / 10 - 1)
    function = tf.function(lambda x: {"b": tf.nn.relu(x @ module.weight), "a": tf.reduce_sum(x @ module.weight, -1)})
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, (None, 6), "x")
        kept = v1.placeholder(tf.float32, (), "keep")
        y = tf.identity(x @ v1.get_variable("v", (6, 4)) * kept, "y")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    concrete = function.get_concrete_function(tf.TensorSpec((None, 6), name="x"))
    return {
        "function": (function, np.ones((9, 6), np.float32)),
        "concrete": (concrete, None),
        "session": (SessionModel(session, [y.name], constants={"keep": 0.5}), None),
    }, module


def _with_other_weights(capture):
    def made(*arguments):
        model = capture(*arguments)
        return model.with_values({name: value * 1.01 for name, value in model.values.items()})

    return made


@pytest.mark.parametrize("form", ["function", "concrete", "session"])
def test_a_capture_that_computes_something_else_is_refused(form, monkeypatch) -> None:
    forms, _module = _held()
    held, sample = forms[form]
    assert BACKEND.adopt(held, sample).values
    for name in ("open_graph", "from_concrete"):
        monkeypatch.setattr(sources, name, _with_other_weights(getattr(sources, name)))
    with pytest.raises(ModelError, match=r"other results than the model .*output '(a|b|y)' differs"):
        BACKEND.adopt(held, sample)


def test_what_changes_something_is_not_run_to_compare_it() -> None:
    count = tf.Variable(0, trainable=False)

    @tf.function
    def counting(x):
        count.assign_add(1)
        return 2 * x + tf.random.uniform(())

    assert BACKEND.adopt(counting, np.ones((3, 2), np.float32)).outputs
    assert count.numpy() == 0


def test_a_placeholder_without_a_rank_is_named() -> None:
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, None, name="x")
        y = tf.matmul(x, tf.constant(np.ones((4, 3), np.float32)), name="y")
        session = tf.compat.v1.Session(graph=graph)
    sim = QuantSim(SessionModel(session, inputs=[x], outputs=[y]))
    with pytest.raises(InputError, match=r"says nothing of the shape of its input 'x:0'.*None for axes that are free"):
        sim.calibrate(np.ones((8, 4), np.float32))


def test_outputs_of_a_frozen_graph_are_what_depends_on_its_inputs_of_any_op() -> None:
    """A data pipeline's batch is fed in its place; what else the graph computes from placeholders is no output."""
    with tf.Graph().as_default() as graph:
        data = v1.data.Dataset.from_tensors(np.ones((4, 3), np.float32))
        batch = v1.data.make_one_shot_iterator(data).get_next()
        tf.nn.relu(tf.matmul(batch, tf.constant(np.eye(3, dtype=np.float32))), name="y")
        tf.nn.relu(v1.placeholder(tf.float32, (2,), name="other"), name="z")
    model = sources.from_frozen(graph.as_graph_def(), inputs=["IteratorGetNext"])
    assert model.outputs == ("y:0",)
    np.testing.assert_array_equal(model(np.full((4, 3), 5, np.float32)), np.full((4, 3), 5))
    assert sources.from_frozen(graph.as_graph_def()).outputs == ("z:0",)


KILLED = """
import os, signal, sys
from pathlib import Path
import tensorflow as tf
from tensorflow.python.saved_model import save
from bitwright_tensorflow.backend import TensorFlowBackend
from bitwright_tensorflow.export.freezing import save_saved_model

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

at, source, made = sys.argv[1:]
if at == "opening":
    tf.saved_model.load = killed
else:
    build = save._build_meta_graph_impl
    save._build_meta_graph_impl = lambda *given: killed(build(*given))
save_saved_model(TensorFlowBackend().load(Path(source)), Path(made))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is swept there")
@pytest.mark.parametrize("at", ["opening", "saving"])
def test_a_killed_process_leaves_nothing_that_the_next_one_does_not_sweep(at: str, tmp_path, monkeypatch) -> None:
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    out.mkdir()
    module = tfnets.Module(tfnets.residual, 8, 8, 3)
    tf.saved_model.save(module, str(tmp_path / "net"), signatures=module.call.get_concrete_function())
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    words = [sys.executable, "-c", KILLED, at, str(tmp_path / "net"), str(out / "made")]
    assert subprocess.run(words, check=False).returncode == -9
    assert [*temporary.iterdir(), *out.iterdir()], "nothing was left that could be swept"
    with run_in(out):
        BACKEND.load(tmp_path / "net")
    assert not [*temporary.iterdir(), *(p for p in out.iterdir() if p.name != ".run")]
