"""What the canonical graph shows of TensorFlow's idioms, and that it computes what the graph does."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.graph import ConvAttrs, OpKind, ParamRole  # noqa: E402
from bitwright.testing.contract_base import assert_close, linear_output, own, rows, run  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.graph.model import open_session  # noqa: E402

v1 = tf.compat.v1
BACKEND = TensorFlowBackend()
K = OpKind


def opened(network, *shape: int, batch: int = 4):
    x = tfnets.image(batch, *shape)
    model = BACKEND.adopt(tf.function(network), x)
    graph = BACKEND.graph(model)
    found = BACKEND.session(model, [Tap(graph.outputs[0])]).run({graph.inputs[0]: x})
    assert_close(found[Tap(graph.outputs[0])], np.asarray(network(tf.constant(x))), 1e-5, "output")
    for op in graph.linear_ops:
        values = run(BACKEND.session(model, [Tap(op.data_inputs[0]), Tap(op.output)]), {graph.inputs[0]: x})
        expected = linear_output(graph, op, values[op.data_inputs[0]], BACKEND.read(model, own(op)))
        assert_close(rows(graph, op, values[op.output]), expected, 1e-5, op.id)
    return model, graph


def variable(*shape: int, seed: int = 3) -> tf.Variable:
    return tf.Variable(tfnets.image(*shape, seed=seed), name="w")


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [[0, 0], [1, 2], [0, 1], [0, 0]]])
def test_convolution_geometry(size: int, stride: int, dilation: int, padding: object) -> None:
    w = variable(3, 2, 3, 4)
    _, graph = opened(lambda x: tf.nn.conv2d(x, w, stride, padding, dilations=dilation), size, size + 1, 3)
    (op,) = graph.ops
    assert op.kind is K.CONV
    assert graph.params["w"].shape == (4, 3, 3, 2)
    assert graph.params["w"].layout == (3, 2, 0, 1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(stride: int, multiplier: int) -> None:
    w = variable(3, 3, 4, multiplier)
    _, graph = opened(lambda x: tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], "SAME"), 7, 7, 4)
    (op,) = graph.ops
    assert isinstance(op.attrs, ConvAttrs)
    assert op.attrs.groups == 4
    assert graph.params["w"].shape == (4 * multiplier, 1, 3, 3)
    assert graph.is_depthwise(op)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("kernel", "stride", "extra"), [(3, 2, 0), (4, 2, 0), (2, 3, 0), (3, 1, 0), (3, 2, -1)])
def test_transposed_convolutions(padding: str, kernel: int, stride: int, extra: int) -> None:
    w = variable(kernel, kernel, 5, 3)
    size = (5 * stride if padding == "SAME" else 4 * stride + kernel) + (extra if padding == "SAME" else -extra)

    def network(x):
        return tf.nn.conv2d_transpose(x, w, [tf.shape(x)[0], size, size, 5], stride, padding)

    _, graph = opened(network, 5, 5, 3)
    (op,) = graph.ops
    assert op.kind is K.CONV_TRANSPOSE
    assert graph.params["w"].shape == (3, 5, kernel, kernel)


def test_one_dimensional_and_atrous_convolutions() -> None:
    w, plane = variable(3, 4, 6), variable(3, 3, 4, 2)
    _, graph = opened(lambda x: tf.nn.bias_add(tf.nn.conv1d(x, w, 2, "SAME"), variable_bias), 9, 4)
    (op,) = graph.ops
    assert op.attrs == ConvAttrs((3,), (2,), (1,), ((1, 1),))
    assert set(op.params) == {ParamRole.WEIGHT, ParamRole.BIAS}
    _, graph = opened(lambda x: tf.nn.atrous_conv2d(x, plane, 2, "SAME"), 7, 7, 4)
    assert [op.kind for op in graph] == [K.CONV]
    _, graph = opened(lambda x: tf.nn.convolution(x, w, padding="SAME", dilations=2), 9, 4)
    assert [op.attrs.dilations for op in graph] == [(2,)]


variable_bias = tf.Variable(np.arange(6, dtype=np.float32), name="b")


def test_dense_layers_on_more_than_two_dimensions() -> None:
    w = variable(6, 5)
    for network in (
        lambda x: tf.tensordot(x, w, 1) + 1.0,
        lambda x: tf.matmul(x, w) + 1.0,
        lambda x: tf.einsum("abc,cd->abd", x, w) + 1.0,
        lambda x: tf.matmul(x, tf.transpose(w_out), name="t") + 1.0,
    ):
        _, graph = opened(network, 4, 6)
        assert [op.kind for op in graph] == [K.LINEAR, K.ADD]
        assert graph.linear_ops[0].type == "MatMul"


w_out = tf.Variable(tfnets.image(5, 6), name="w")


@pytest.mark.parametrize(
    ("network", "type"),
    [
        (tf.nn.gelu, "Gelu"),
        (lambda x: tf.nn.gelu(x, approximate=True), "Gelu"),
        (lambda x: 0.5 * x * (1 + tf.math.erf(x / np.sqrt(2).astype(np.float32))), "Gelu"),
        (tf.nn.silu, "Swish"),
        (lambda x: x * tf.nn.relu6(x + 3) / 6, "HardSwish"),
        (lambda x: tf.nn.relu6(x + 3) * (1 / 6), "HardSigmoid"),
        (lambda x: x * tf.tanh(tf.math.softplus(x)), "Mish"),
        (lambda x: tf.clip_by_value(x, -1.0, 2.0), "Clip"),
        (lambda x: tf.minimum(tf.nn.relu(x), 3.0), "Clip"),
        (lambda x: tf.nn.relu(x) - 0.3 * tf.nn.relu(-x), None),
        (tf.nn.elu, "Elu"),
    ],
)
def test_spelled_activations(network, type: str | None) -> None:
    _, graph = opened(network, 5)
    if type is None:
        assert len(graph) > 1
    else:
        assert [op.type for op in graph] == [type]


def test_what_looks_like_an_activation_but_isn_t() -> None:
    _, graph = opened(lambda x: x * tf.nn.relu6(x + 2.5) / 6, 5)
    assert [op.type for op in graph] == ["Add", "Clip", "Mul", "Div"]


def test_layer_norms_and_parametric_relus_of_keras() -> None:
    keras = pytest.importorskip("keras")
    x = keras.Input((6, 8))
    y = keras.layers.PReLU(shared_axes=[1])(keras.layers.LayerNormalization()(x))
    y = keras.layers.BatchNormalization()(y)
    model = keras.Model(x, keras.layers.GlobalAveragePooling1D()(y))
    _, graph = opened(lambda x: model(x, training=False), 6, 8)
    assert [op.kind for op in graph] == [K.LAYER_NORM, K.PRELU, K.BATCH_NORM, K.AVERAGE_POOL]
    assert set(graph.ops[0].params) == {ParamRole.GAMMA, ParamRole.BETA}


def test_embeddings_are_rows_of_a_parameter() -> None:
    table = variable(12, 5)
    model = BACKEND.adopt(tf.function(lambda ids: tf.nn.embedding_lookup(table, ids)), np.zeros((2, 3), np.int32))
    (op,) = BACKEND.graph(model).ops
    assert op.kind is K.EMBEDDING
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    np.testing.assert_array_equal(model(ids), table.numpy()[ids])


def test_sizes_are_not_shown() -> None:
    w = variable(48, 5)

    def network(x):
        n, h = tf.shape(x)[0], tf.shape(x)[1]
        return tf.matmul(tf.reshape(x, tf.stack([n, h * 12])), w)

    _, graph = opened(network, 4, 4, 3)
    assert [op.kind for op in graph] == [K.RESHAPE, K.LINEAR]


def test_computed_weights_are_opaque() -> None:
    w = variable(4, 5)
    _, graph = opened(lambda x: tf.matmul(x, w / tf.norm(w)), 4)
    assert graph.linear_ops == ()
    assert [op.kind for op in graph] == [K.MATMUL]


def test_a_keras_transformer_and_mobilenet() -> None:
    keras = pytest.importorskip("keras")
    x = keras.Input((7,), dtype="int32")
    y = keras.layers.Embedding(20, 8)(x)
    y = keras.layers.LayerNormalization()(y + keras.layers.MultiHeadAttention(2, 4)(y, y))
    y = keras.layers.LayerNormalization()(y + keras.layers.Dense(8)(keras.layers.Dense(16, "gelu")(y)))
    model = keras.Model(x, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(y)))
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    opened_model = BACKEND.adopt(tf.function(lambda ids: model(ids, training=False)), ids)
    graph = BACKEND.graph(opened_model)
    assert sum(op.kind is K.LINEAR for op in graph) == 7
    assert sum(op.kind is K.LAYER_NORM for op in graph) == 2
    assert not [op for op in graph if op.kind is K.OPAQUE and graph.tensors[op.output].is_float]
    np.testing.assert_allclose(opened_model(ids), model(ids), rtol=1e-5, atol=1e-5)

    net = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35, classes=4)
    mobile = BACKEND.adopt(tf.function(lambda x: net(x, training=False)), tfnets.image(2, 32, 32, 3))
    kinds = [op.kind for op in BACKEND.graph(mobile)]
    assert (kinds.count(K.CONV), kinds.count(K.BATCH_NORM), kinds.count(K.CLIPPED_RELU)) == (52, 52, 35)
    assert K.OPAQUE not in kinds


def controlled(x, flag):
    """A loop, a condition, and a dense layer on either side of them."""
    w = v1.get_variable("w", initializer=tfnets.image(3, 3), use_resource=True)
    x = tf.matmul(x, w, name="first")
    y = v1.while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, tf.matmul(a, w) * 0.5), [tf.constant(0), x])[1]
    y = tf.nn.relu(y, name="between")
    y = v1.cond(flag, lambda: y * 2.0, lambda: tf.matmul(y, w), name="choice")
    return tf.matmul(y, v1.get_variable("v", initializer=tfnets.image(3, 2), use_resource=True), name="last")


@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize("value", [True, False])
def test_control_flow_is_one_opaque_op(frames: bool, value: bool) -> None:
    enabled = v1.control_flow_v2_enabled()
    (v1.disable_control_flow_v2 if frames else v1.enable_control_flow_v2)()
    try:
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, (None, 3), name="x")
            y = controlled(x, tf.greater(v1.placeholder_with_default(float(value), (), name="flag"), 0.5))
            session = v1.Session(graph=graph)
            session.run(v1.global_variables_initializer())
    finally:
        (v1.enable_control_flow_v2 if enabled else v1.disable_control_flow_v2)()
    data = tfnets.image(4, 3)
    model = BACKEND.adopt(SessionModel(session, inputs=["x"], outputs=[y]))
    shown = BACKEND.graph(model)
    assert [op.kind for op in shown] == [K.LINEAR, K.OPAQUE, K.RELU, K.OPAQUE, K.LINEAR]
    taps = [Tap(t) for t in shown.tensors]
    found = BACKEND.session(model, taps).run({"x:0": data})
    fetched = [t for t in taps if graph.is_fetchable(graph.get_tensor_by_name(t.tensor))]
    expected = session.run([t.tensor for t in fetched], {"x:0": data})
    for tap, value_ in zip(fetched, expected, strict=True):
        np.testing.assert_allclose(found[tap], value_, rtol=1e-5, atol=1e-6)
    last = shown.linear_ops[-1]
    (part,) = (
        BACKEND.segment(model, last.data_inputs, [Tap(last.output)])
        .run({last.data_inputs[0]: found[Tap(last.data_inputs[0])]})
        .values()
    )
    np.testing.assert_allclose(part, found[Tap(last.output)], rtol=1e-5)
    with open_session(model) as again:
        np.testing.assert_allclose(again.run(y.name, {"x:0": data}), session.run(y, {"x:0": data}), rtol=1e-6)
