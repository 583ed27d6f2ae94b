"""Edits on GraphDefs: names stay, training nodes run on, nothing is left over."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright.graph import (  # noqa: E402  # noqa: E402
    FoldBatchNorm,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
)
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.graph.model import open_session  # noqa: E402

v1 = tf.compat.v1
BACKEND = TensorFlowBackend()
X = tfnets.image(4, 8, 8, 3)


def value(model, tensor, x=X):
    tap = Tap(tensor)
    return BACKEND.session(model, [tap]).run({BACKEND.graph(model).inputs[0]: x})[tap]


def test_folding_leaves_a_training_graph_that_trains() -> None:
    given = tfnets.session_model(tfnets.residual, 8, 8, 3, resource=False, train=True)
    sim = QuantSim(given, backend="tensorflow")
    before = value(sim.native, "logits:0")
    sim.apply("fold_batch_norm")
    assert not [op for op in sim.graph if op.kind is OpKind.BATCH_NORM]
    np.testing.assert_allclose(value(sim.native, "logits:0"), before, rtol=1e-4, atol=1e-5)
    assert sim.graph.op("conv1/Conv2D").params[ParamRole.BIAS] == "conv1/bias"
    feed = {"x:0": X, "labels:0": np.arange(4)}
    with open_session(sim.native) as session:
        names = {v.op.name for v in session.graph.get_collection(v1.GraphKeys.TRAINABLE_VARIABLES)}
        assert {"conv1/kernel", "conv1/bias", "dw/bias"} <= names
        np.testing.assert_allclose(session.run("logits:0", feed), before, rtol=1e-4, atol=1e-5)
        losses = []
        for _ in range(5):
            losses.append(session.run("loss:0", feed))
            session.run("train", feed)
        assert np.isfinite(losses).all()
        assert losses[-1] != losses[0]


def test_folding_leaves_nothing_over_in_a_graph_without_training() -> None:
    module = tfnets.Module(tfnets.residual, 8, 8, 3)
    sim = QuantSim(module.call)
    sim.apply("fold_batch_norm")
    nodes = {node.name: node.op for node in sim.native.graph_def.node}
    assert nodes["bn1/norm"] == "BiasAdd"
    assert not [n for n, op in nodes.items() if op in ("FusedBatchNormV3", "Rsqrt", "Identity") and n != "logits"]
    assert not [v for v in sim.native.values if v.startswith(("bn1/", "bn2/"))]
    assert set(sim.native.values) == set(sim.native.variables)


def test_a_frozen_model_keeps_constants(tmp_path) -> None:
    path = BACKEND.save(BACKEND.adopt(tfnets.session_model(tfnets.residual, 8, 8, 3)), tmp_path / "net.pb")
    sim = QuantSim(path)
    before = value(sim.native, "logits:0")
    sim.apply("fold_batch_norm")
    assert not sim.native.values
    np.testing.assert_allclose(value(sim.native, "logits:0"), before, rtol=1e-4, atol=1e-5)


def test_values_are_set_without_touching_the_graph() -> None:
    model = BACKEND.adopt(tfnets.session_model(tfnets.residual, 8, 8, 3))
    weight = BACKEND.read(model, ["conv1/kernel"])["conv1/kernel"]
    new = BACKEND.edit(model, [SetParams({"conv1/kernel": weight * 2})])
    assert new.meta is model.meta
    np.testing.assert_array_equal(new.values["conv1/kernel"], model.values["conv1/kernel"] * 2)
    np.testing.assert_array_equal(BACKEND.read(model, ["conv1/kernel"])["conv1/kernel"], weight)
    with pytest.raises(ModelError, match="NaN"):
        BACKEND.edit(model, [SetParams({"conv1/kernel": weight * np.nan})])


def test_a_bias_takes_over_the_tensor_s_name() -> None:
    model = BACKEND.adopt(tfnets.session_model(tfnets.decoder, 5, 5, 3))
    x = tfnets.image(2, 5, 5, 3)
    graph = BACKEND.graph(model)
    op = graph.op("up1/conv2d_transpose")
    before = value(model, op.output, x)
    bias = np.arange(6, dtype=np.float32)
    once = BACKEND.edit(model, [SetBias(op.id, bias)])
    assert BACKEND.graph(once).op(op.id).output == op.output
    np.testing.assert_allclose(value(once, op.output, x), before + bias, rtol=1e-5, atol=1e-5)
    twice = BACKEND.edit(once, [SetBias(op.id, -bias)])
    np.testing.assert_allclose(value(twice, op.output, x), before - bias, rtol=1e-5, atol=1e-5)
    assert len(twice.graph_def.node) == len(once.graph_def.node)


def test_shared_weights_split_and_stay_variables() -> None:
    model = BACKEND.adopt(tfnets.session_model(tfnets.mlp, 10))
    graph, x = BACKEND.graph(model), tfnets.image(4, 10)
    assert [op.id for op in graph.users("fc2/kernel")] == ["fc2/MatMul", "again"]
    split = BACKEND.edit(model, [SplitSharedParam("again", "fc2/kernel")])
    own = BACKEND.graph(split).op("again").weight
    assert own not in (None, "fc2/kernel")
    assert own in split.variables
    np.testing.assert_array_equal(value(split, graph.outputs[0], x), value(model, graph.outputs[0], x))
    changed = BACKEND.edit(split, [SetParams({own: np.zeros((10, 10), np.float32)})])
    assert not value(changed, "again:0", x).any()
    assert value(changed, "fc2/MatMul:0", x).any()
    with open_session(split) as session:
        assert own in {v.op.name for v in session.graph.get_collection(v1.GraphKeys.GLOBAL_VARIABLES)}


def test_a_shared_bias_is_replaced_for_one_op_only() -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 4), name="x")
        w, v = (
            v1.get_variable(n, initializer=tfnets.image(4, 4, seed=i), use_resource=True) for i, n in enumerate("wv")
        )
        bias = v1.get_variable("bias", initializer=np.ones(4, np.float32), use_resource=True)
        y = tf.nn.bias_add(tf.matmul(x, w, name="a"), bias)
        tf.nn.bias_add(tf.matmul(y, v, name="b"), bias, name="y")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    model = BACKEND.adopt(SessionModel(session, inputs="x", outputs="y"))
    edited = BACKEND.edit(model, [SetBias("b", np.zeros(4, np.float32))])
    shown = BACKEND.graph(edited)
    assert shown.op("a").params[ParamRole.BIAS] == "bias"
    assert shown.op("b").params[ParamRole.BIAS] != "bias"
    data = tfnets.image(2, 4)
    np.testing.assert_allclose(value(edited, "y:0", data) + 1, value(model, "y:0", data), rtol=1e-5)


def test_activations_are_replaced_and_removed() -> None:
    model = BACKEND.adopt(tfnets.session_model(tfnets.residual, 8, 8, 3, train=True))
    graph = BACKEND.graph(model)
    replaced = BACKEND.edit(model, [ReplaceActivation("act1", "Tanh")])
    np.testing.assert_allclose(value(replaced, "act1:0"), np.tanh(value(model, "bn1/norm:0")), rtol=1e-5, atol=1e-6)
    removed = BACKEND.edit(model, [RemoveOp("act1")])
    shown = BACKEND.graph(removed)
    assert "act1" not in shown
    assert set(graph.tensors) - set(shown.tensors) == {"act1:0"}
    np.testing.assert_array_equal(value(removed, "dw/depthwise:0").shape, value(model, "dw/depthwise:0").shape)
    for wrong in (ReplaceActivation("act1", "NoSuch"), ReplaceActivation("conv1/Conv2D", "Relu"), RemoveOp("sum"),
                  SplitSharedParam("fc/MatMul", "conv1/kernel"), SetBias("act1", np.zeros(3, np.float32)),
                  FoldBatchNorm("bn2/norm/add_1", "conv1/Conv2D")):  # fmt: skip
        with pytest.raises(ModelError):
            BACKEND.edit(model, [wrong])


def test_forward_folds_and_folds_that_others_would_see() -> None:
    with tf.Graph().as_default() as graph:
        net = tfnets.Net()
        x = v1.placeholder(tf.float32, (None, 6, 6, 3), name="x")
        y = tf.nn.relu(net.batch_norm("bn", x), name="other")
        z = net.conv("conv", net.batch_norm("first", x), 4, padding="VALID")
        outputs = [y, z]
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    model = BACKEND.adopt(SessionModel(session, inputs=[x], outputs=outputs))
    folded = BACKEND.edit(model, [FoldBatchNorm("first/norm", "conv/Conv2D")])
    assert BACKEND.graph(folded).op("conv/Conv2D").inputs == ("x:0",)
    assert "first/norm" not in BACKEND.graph(folded)
    both = BACKEND.adopt(SessionModel(session, inputs=[x], outputs=["first/norm", z]))
    with pytest.raises(ModelError, match="also read"):
        BACKEND.edit(both, [FoldBatchNorm("first/norm", "conv/Conv2D")])
