"""Conditions that inference always decides the same way are the branch that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.errors import InputError  # noqa: E402
from bitwright.graph import OpKind as K  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.capture.sources import from_frozen  # noqa: E402
from bitwright_tensorflow.graph.model import open_session  # noqa: E402

v1 = tf.compat.v1
BACKEND = TensorFlowBackend()


@pytest.fixture(params=["frames", "functions"])
def conditions(request: pytest.FixtureRequest) -> Iterator[str]:
    """How conditions are built: with Switch and Merge as TF 1 does, or as `If` with functions."""
    enabled = v1.control_flow_v2_enabled()
    (v1.disable_control_flow_v2 if request.param == "frames" else v1.enable_control_flow_v2)()
    yield request.param
    (v1.enable_control_flow_v2 if enabled else v1.disable_control_flow_v2)()


def normalized(x: Any, training: Any, name: str, resource: bool, updates: bool) -> Any:
    """A batch norm as TF 1's layers build it: both forms behind a condition, running statistics updated in one."""
    with v1.variable_scope(name):
        shape = [x.shape[-1]]
        gamma, beta, mean, variance = (
            v1.get_variable(n, initializer=tf.constant(v, tf.float32, shape), use_resource=resource)
            for n, v in (("gamma", 1.5), ("beta", 0.25), ("mean", 0.1), ("variance", 2.0))
        )

        def train() -> Any:
            y, m, _ = v1.nn.fused_batch_norm(x, gamma, beta, is_training=True)[:3]
            # A frozen graph can assign nothing: TensorFlow itself doesn't import it then.
            with tf.control_dependencies([v1.assign(mean, m)] if updates else []):
                return tf.identity(y)

        return v1.cond(
            training, train, lambda: v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, is_training=False)[0]
        )


def network(flag: Any, resource: bool, updates: bool) -> Any:
    x = v1.placeholder(tf.float32, (None, 6, 6, 3), name="x")
    w = v1.get_variable("w", initializer=tfnets.image(3, 3, 3, 4), use_resource=resource)
    y = tf.nn.relu(normalized(tf.nn.conv2d(x, w, 1, "SAME"), flag, "norm", resource, updates))
    dense = v1.get_variable("dense", initializer=tfnets.image(4, 2), use_resource=resource)
    y = tf.reduce_mean(y, [1, 2])
    y = v1.cond(tf.logical_not(flag), lambda: tf.matmul(y, dense), lambda: tf.matmul(tf.nn.dropout(y, 0.5), dense))
    return tf.identity(y, name="y")


def built(flag: Any, resource: bool, updates: bool = True) -> tuple[Any, Any]:
    with tf.Graph().as_default() as graph:
        y = network(flag(), resource, updates)
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return session, y


def x_of(session: Any) -> Any:
    return session.graph.get_tensor_by_name("x:0")


def switch() -> Any:
    return v1.placeholder_with_default(False, (), name="training")


EXPECTED = ["Conv", "BatchNormalization", "Relu", "ReduceMean", "Gemm"]


@pytest.mark.parametrize("make", [switch, lambda: v1.placeholder(tf.bool, (), name="training")])
@pytest.mark.parametrize("resource", [True, False])
def test_constants_decide_the_conditions_of_a_session(conditions: str, make: Any, resource: bool) -> None:
    if conditions == "functions" and not resource:
        pytest.skip("functions assign no reference variables")
    session, y = built(make, resource)
    data = {"x:0": tfnets.image(4, 6, 6, 3)}
    expected = session.run(y, {**data, "training:0": False})
    model = BACKEND.adopt(SessionModel(session, ["y"], ["x"], {"training": False}))
    assert [op.type for op in BACKEND.graph(model)] == EXPECTED
    with open_session(model) as again:
        np.testing.assert_allclose(again.run("y:0", data), expected, rtol=1e-5, atol=1e-6)
    sim = QuantSim(SessionModel(session, ["y"], ["x"], {"training": False}), weights="int16", activations="uint16")
    sim.apply("fold_batch_norm").calibrate(data)
    assert K.BATCH_NORM not in [op.kind for op in BACKEND.graph(sim.native)]
    np.testing.assert_allclose(sim.predict(data)[0], expected, rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("conditions")
def test_the_other_branch_is_taken_where_the_constant_says_so() -> None:
    session, _ = built(switch, True)
    before = session.run("norm/mean:0")
    graph = BACKEND.graph(BACKEND.adopt(SessionModel(session, ["y"], ["x"], {"training": True})))
    assert K.BATCH_NORM not in [op.kind for op in graph]  # in training mode it is none that could be folded
    assert not [op for op in graph if op.type == "If"]
    np.testing.assert_array_equal(session.run("norm/mean:0"), before)


@pytest.mark.usefixtures("conditions")
def test_a_session_that_can_be_fed_either_is_left_and_told() -> None:
    session, _ = built(switch, True)
    with pytest.warns(UserWarning, match=r"constants=\{'training': False\}"):
        model = BACKEND.adopt(SessionModel(session, ["y"], ["x"]))
    assert [op.type for op in BACKEND.graph(model) if op.kind is K.OPAQUE] == ["If", "If"]


@pytest.mark.usefixtures("conditions")
def test_files_have_the_default(tmp_path: Path) -> None:
    session, y = built(switch, True, updates=False)
    data = {"x:0": tfnets.image(4, 6, 6, 3)}
    expected = session.run(y, data)
    with session.graph.as_default():
        v1.saved_model.simple_save(session, str(tmp_path / "saved"), {"x": x_of(session)}, {"y": y})
    frozen = v1.graph_util.convert_variables_to_constants(session, session.graph.as_graph_def(), ["y"])
    (tmp_path / "net.pb").write_bytes(frozen.SerializeToString())
    for path in (tmp_path / "saved", tmp_path / "net.pb"):
        # Somebody may feed it, so that what decides is said; what is given decides, and is not.
        with pytest.warns(UserWarning, match=rf"\('training' is False\).*load\('{path.name}', constants=") as told:
            model = BACKEND.load(path)
        assert len(told) == 1
        for same in (model, BACKEND.load(path, constants={"training": False})):
            assert [op.type for op in BACKEND.graph(same)] == EXPECTED
            with open_session(same) as again:
                np.testing.assert_allclose(again.run(same.outputs[0], data), expected, rtol=1e-5, atol=1e-6)
        other = BACKEND.graph(BACKEND.load(path, constants={"training": True}))
        assert K.BATCH_NORM not in [op.kind for op in other]
        assert not [op for op in other if op.type == "If"]
    with pytest.warns(UserWarning, match=r"SessionModel of a session.*constants=\{'training': False\}"):
        BACKEND.adopt(frozen)
    fed = BACKEND.graph(BACKEND.load(tmp_path / "net.pb", inputs=["x", "training"]))
    assert [op.type for op in fed].count("If") == 2


@pytest.mark.usefixtures("conditions")
@pytest.mark.parametrize("decided", [True, False])
def test_a_default_is_told_where_it_decides_and_not_where_something_else_does(decided: bool) -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        flags = [v1.placeholder_with_default(value, (), name=name) for name, value in (("on", True), ("off", False))]
        flag = tf.logical_or(tf.constant(decided), tf.logical_and(*flags))
        tf.identity(v1.cond(flag, lambda: x * 2.0, lambda: tf.tanh(x)), name="y")
    if decided:
        assert from_frozen(graph.as_graph_def(), ["x"], ["y"])
    else:
        with pytest.warns(UserWarning, match=r"\('off' is False\)"):
            from_frozen(graph.as_graph_def(), ["x"], ["y"])


@pytest.mark.usefixtures("conditions")
@pytest.mark.parametrize("join", [tf.logical_and, lambda a, b: tf.logical_not(tf.logical_or(a, b))])
def test_long_chains_of_conditions_are_followed_and_their_parts_looked_at_once(join) -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        flag = v1.placeholder_with_default(True, (), name="on")
        for _ in range(1200):  # deeper than Python's stack, and 2 ** 1200 ways to the end
            flag = join(flag, flag)
        tf.identity(v1.cond(flag, lambda: x * 2.0, lambda: tf.tanh(x)), name="y")
    with pytest.warns(UserWarning, match=r"\('on' is True\)"):
        made = from_frozen(graph.as_graph_def(), ["x"], ["y"])
    assert [op.type for op in BACKEND.graph(made)] == ["Mul"]
    with graph.as_default():
        flag = v1.placeholder(tf.bool, (), name="asked")
        for _ in range(1200):
            flag = join(flag, flag)
        tf.identity(v1.cond(flag, lambda: x * 2.0, lambda: tf.tanh(x)), name="z")
    assert from_frozen(graph.as_graph_def(), ["x", "asked"], ["z"])


def test_functions_whose_placeholders_nobody_feeds_take_no_constants(tmp_path: Path) -> None:
    module = tf.Module()
    module.f = tf.function(lambda x: x * 2.0, input_signature=[tf.TensorSpec((None, 3))])
    tf.saved_model.save(module, str(tmp_path), signatures=module.f)
    with pytest.raises(InputError, match="constants are for graphs of TF 1"):
        BACKEND.load(tmp_path, constants={"training": False})


@pytest.mark.usefixtures("conditions")
def test_nested_conditions_and_those_that_data_decide() -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        flag = v1.placeholder(tf.bool, (), name="training")
        w = v1.get_variable("w", initializer=tfnets.image(3, 3), use_resource=True)

        def inner() -> Any:
            return v1.cond(flag, lambda: x * 2.0, lambda: tf.matmul(x, w) + 1.0)

        y = v1.cond(tf.logical_and(flag, flag), lambda: x, inner)
        y = v1.cond(tf.reduce_sum(y) > 0, lambda: y * 3.0, lambda: y - 1.0)
        y = tf.identity(y, name="y")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    model = BACKEND.adopt(SessionModel(session, ["y"], ["x"], {"training": False}))
    types = [op.type for op in BACKEND.graph(model)]
    assert sum(t in ("If", "StatelessIf") for t in types) == 1 and "Gemm" in types, types
    for sign in (1.0, -1.0):
        data = sign * tfnets.image(4, 3)
        with open_session(model) as again:
            found = again.run("y:0", {"x:0": data})
        np.testing.assert_allclose(found, session.run(y, {"x:0": data, "training:0": False}), rtol=1e-6)


def decided_by_another(x: Any, first: bool) -> Any:
    """A condition whose predicate another one gives, with an op in each branch: one would be there before the other."""
    flag = v1.cond(tf.constant(first), lambda: tf.constant(False), lambda: tf.constant(True))
    return v1.cond(flag, lambda: x * 2.0, lambda: tf.tanh(tf.tanh(tf.exp(x))) + 1.0)


def loop(x: Any, taken: bool) -> Any:
    def rounds() -> Any:
        return tf.while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * 2.0), [0, x])[1]

    return v1.cond(tf.constant(taken), rounds, lambda: x + 1.0)


def which_came(x: Any) -> Any:
    """A merge that is asked which of its operands came."""
    never, always = tf.raw_ops.Switch(data=x, pred=tf.constant(True))
    merged, index = tf.raw_ops.Merge(inputs=[never, tf.tanh(always)])
    return merged + tf.cast(index, tf.float32)


def named_alike(x: Any) -> Any:
    """A branch whose op has the name that the condition's own result has beside it, once it is inlined."""
    return v1.cond(tf.constant(True), lambda: tf.identity(x * 2.0), lambda: x)


@pytest.mark.usefixtures("conditions")
@pytest.mark.parametrize(
    "make",
    [
        lambda x: decided_by_another(x, True),
        lambda x: decided_by_another(x, False),
        lambda x: loop(x, True),
        lambda x: loop(x, False),
        which_came,
        named_alike,
    ],
)
def test_a_branch_that_is_not_taken_never_gives_the_result(make: Any) -> None:
    with tf.Graph().as_default() as graph:
        y = tf.identity(make(v1.placeholder(tf.float32, (None, 3), name="x")), name="y")
        data = {"x:0": tfnets.image(2, 3)}
        with v1.Session(graph=graph) as session:
            expected = session.run(y, data)
    model = from_frozen(graph.as_graph_def(), ["x"], ["y"])
    with open_session(model) as again:
        for _ in range(5):  # of two that arrive, it is chance which is first
            np.testing.assert_allclose(again.run("y:0", data), expected, rtol=1e-6)
