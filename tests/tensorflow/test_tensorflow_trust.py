"""Opening a file runs nothing of it, and a network that reaches outside of its graph isn't opened.

SavedModels with an optimizer of Keras 2, and checkpoints of weights alone, open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright import QuantSim  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402

v1 = tf.compat.v1
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


class Net(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = tf.Variable(np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32), name="w")

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, name="x")])
    def __call__(self, x: Any) -> Any:
        return tf.nn.relu(x @ self.w)


def saved(module: Any, path: Path) -> Path:
    tf.saved_model.save(module, str(path), signatures=module.__call__)
    return path


def outputs(path: Path, **options: Any) -> np.ndarray:
    sim = QuantSim(TensorFlowBackend().load(path, **options))
    return sim.predict({sim.graph.inputs[0]: X}, simulated=False)[0]


# -- optimizers


def test_saved_models_of_keras_2_with_an_optimizer(tmp_path: Path) -> None:
    """As Keras 2 wrote them: an object of kind "optimizer" whose slots are variables of its own."""
    from tensorflow.core.protobuf import saved_model_pb2

    net = Net()
    net.optimizer = tf.Module()
    net.optimizer.m = tf.Variable(np.ones((6, 3), np.float32), name="w/m")
    file = saved(net, tmp_path / "net") / "saved_model.pb"
    description = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    nodes = description.meta_graphs[0].object_graph_def.nodes
    children = {c.local_name: c.node_id for c in nodes[0].children}
    optimizer = nodes[children["optimizer"]]
    slot = optimizer.slot_variables.add()
    slot.original_variable_node_id, slot.slot_name = children["w"], "m"
    slot.slot_variable_node_id = next(c.node_id for c in optimizer.children if c.local_name == "m")
    optimizer.user_object.identifier = "optimizer"
    file.write_bytes(description.SerializeToString())
    with pytest.raises(AttributeError, match="add_slot"):
        tf.saved_model.load(str(tmp_path / "net"))
    np.testing.assert_allclose(outputs(tmp_path / "net"), net(X).numpy(), rtol=1e-6)


@pytest.mark.parametrize("resources", [True, False])
def test_a_checkpoint_without_the_optimizer_s_variables(tmp_path: Path, resources: bool) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x, y = v1.placeholder("float32", [None, 6], name="x"), v1.placeholder("float32", [None, 3], name="y")
        w = v1.get_variable("w", [6, 3], use_resource=resources)
        logits = tf.identity(x @ w, name="logits")
        step = v1.train.AdamOptimizer(0.01).minimize(tf.reduce_mean((logits - y) ** 2))
        session.run(v1.global_variables_initializer())
        session.run(step, {x: X, y: X[:, :3]})
        v1.train.Saver([w]).save(session, str(tmp_path / "net"))
        expected = session.run(logits, {x: X})
    model = TensorFlowBackend().load(tmp_path / "net.meta", outputs="logits")
    np.testing.assert_allclose(model.values["beta1_power"], 0.9)
    assert not model.values["w/Adam"].any()
    np.testing.assert_allclose(outputs(tmp_path / "net.meta", outputs="logits"), expected, rtol=1e-6)


# -- what files may do


def test_initializers_of_a_saved_model_are_not_run(tmp_path: Path) -> None:
    from tensorflow.python.trackable.resource import TrackableResource

    mark = tmp_path / "mark"

    class Hostile(TrackableResource):
        def _create_resource(self) -> Any:
            return tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

        def _initialize(self) -> None:
            tf.io.write_file(str(mark), "written")

    net = Net()
    net.resource = Hostile()
    saved(net, tmp_path / "net")
    mark.unlink(missing_ok=True)
    np.testing.assert_allclose(outputs(tmp_path / "net"), net(X).numpy(), rtol=1e-6)
    assert not mark.exists()
    tf.saved_model.load(str(tmp_path / "net"))
    assert mark.exists()  # which is what TensorFlow's own loader does


def test_main_ops_of_a_first_generation_saved_model_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder("float32", [None, 6], name="x")
        y = tf.identity(x @ v1.get_variable("w", [6, 3]), name="y")
        writes = tf.io.write_file(str(mark), "written")
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(tmp_path / "net"))
        signature = v1.saved_model.predict_signature_def({"x": x}, {"y": y})
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature}, main_op=writes)
        builder.save()
        expected = session.run(y, {x: X})
    np.testing.assert_allclose(outputs(tmp_path / "net"), expected, rtol=1e-6)
    assert not mark.exists()


def reaching(kind: str, mark: Path, x: Any) -> Any:
    match kind:
        case "WriteFile":
            with tf.control_dependencies([tf.io.write_file(str(mark), "written")]):
                return tf.identity(x)
        case "ReadFile":
            return x + tf.cast(tf.strings.length(tf.io.read_file(str(mark))), tf.float32)
        case "PyFunc":
            return tf.ensure_shape(v1.py_func(lambda v: v, [x], tf.float32), (None, 6))
        case "PrintV2":
            with tf.control_dependencies([tf.print("x", output_stream=f"file://{mark}")]):
                return tf.identity(x)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["WriteFile", "ReadFile", "PyFunc", "PrintV2"])
@pytest.mark.parametrize("form", ["saved_model", "pb", "meta"])
def test_networks_that_reach_outside_are_refused_by_name(kind: str, form: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / {"saved_model": "net", "pb": "net.pb", "meta": "net.meta"}[form]
    options: dict[str, Any] = {}
    if form == "saved_model":

        class Reaching(Net):
            @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, name="x")])
            def __call__(self, x: Any) -> Any:
                return reaching(kind, mark, x) @ self.w

        saved(Reaching(), path)
    else:
        with tf.Graph().as_default() as graph, v1.Session() as session:
            x = reaching(kind, mark, v1.placeholder("float32", [None, 6], name="x"))
            w = v1.get_variable("w", [6, 3]) if form == "meta" else tf.ones((6, 3))
            tf.matmul(x, w, name="y")
            session.run(v1.global_variables_initializer())
            if form == "meta":
                v1.train.Saver().save(session, str(tmp_path / "net"))
                options = {"outputs": "y"}
            else:
                path.write_bytes(graph.as_graph_def().SerializeToString())
    mark.unlink(missing_ok=True)
    with pytest.raises(ModelError, match=rf"{kind}.*outside"):
        TensorFlowBackend().load(path, **options)
    assert not mark.exists()


def test_a_restore_op_that_does_more_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder("float32", [None, 6], name="x")
        w = v1.get_variable("w", [6, 3])
        tf.matmul(x, w, name="y")
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver({"renamed": w})
        saver.save(session, str(tmp_path / "net"), write_meta_graph=False)
        writes = tf.io.write_file(str(mark), "written", name="writes")
        meta = v1.train.export_meta_graph(saver_def=saver.as_saver_def())
        restore = next(n for n in meta.graph_def.node if n.name == meta.saver_def.restore_op_name)
        plain = meta.SerializeToString()
        restore.input.append(f"^{writes.name}")
    (tmp_path / "net.meta").write_bytes(meta.SerializeToString())
    with pytest.raises(ModelError, match=r"restoring.*WriteFile"):
        TensorFlowBackend().load(tmp_path / "net.meta", outputs="y")
    assert not mark.exists()
    (tmp_path / "net.meta").write_bytes(plain)
    TensorFlowBackend().load(tmp_path / "net.meta", outputs="y")


def test_broken_descriptions_are_typed_errors(tmp_path: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    file = saved(Net(), tmp_path / "net") / "saved_model.pb"
    whole = file.read_bytes()
    description = saved_model_pb2.SavedModel.FromString(whole)
    for node in description.meta_graphs[0].object_graph_def.nodes:
        for child in node.children:
            child.node_id += 1000
    file.write_bytes(description.SerializeToString())
    with pytest.raises(ModelError, match="can't be loaded"):
        TensorFlowBackend().load(tmp_path / "net")
