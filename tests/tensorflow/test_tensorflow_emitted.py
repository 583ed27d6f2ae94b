"""TensorFlow models as ONNX, by the canonical graph: nodes say what they compute, against TensorFlow's own numbers."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("onnx_ir")

from tfnets import branches, decoder, mlp, residual, session_model  # noqa: E402

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_onnx.adapters import NotEmittable  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.export.export import as_onnx  # noqa: E402

BACKEND, ONNX = TensorFlowBackend(), OnnxBackend()
v1 = tf.compat.v1


@pytest.mark.parametrize(
    ("build", "shape"), [(residual, (8, 8, 3)), (branches, (7, 7, 3)), (decoder, (4, 4, 3)), (mlp, (6,))]
)
def test_each_site_has_its_pair(build, shape, tmp_path):
    data = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    sim = QuantSim(session_model(build, *shape), target="onnxruntime-cpu").calibrate([{"x:0": data}])
    bundle = BACKEND.export(sim.native, sim.plan, sim.state.table, tmp_path / "a.onnx", "qdq")
    found = ONNX.pairs(bundle)
    sites = [site for site in sim.plan.quantized if site in sim.encodings]
    assert sites
    for site in sites:
        (pair,), encoding = found[site], sim.encodings[site]
        assert (pair.bits, pair.signed) == (encoding.bits, encoding.signed)
        np.testing.assert_array_equal(np.ravel(pair.scale), np.ravel(encoding.scale))


def opened(call, *shape, inputs=1):
    graph = tf.Graph()
    names = ["x", "y"][:inputs]
    with graph.as_default():
        found = tf.nest.flatten(call(*(v1.placeholder(tf.float32, (None, *shape), name=n) for n in names)))
        outputs = [tf.identity(y, name=f"out_{i}") for i, y in enumerate(found)]
    return BACKEND.adopt(SessionModel(v1.Session(graph=graph), inputs=names, outputs=outputs))


def sloped(x):
    """Slopes by column of an image whose channels are on axis 1."""
    x = tf.transpose(tf.nn.conv2d(x, tf.constant(np.eye(4)[None, None], tf.float32), 1, "VALID"), [0, 3, 1, 2])
    return tf.nn.relu(x) + -tf.constant(np.linspace(0.1, 0.9, 6), tf.float32) * tf.nn.relu(-x)


OPS = {
    "slopes of one dimension": sloped,
    "strided": lambda x: x[:, 1:5:2, ..., 0],
    "the last row": lambda x: x[:, -1],
    "an end of each": lambda x: x[:, :-1, 2:],
    "slice": lambda x: tf.slice(x, [0, 1, 0, 2], [-1, 3, -1, 2]),
    "reversed": lambda x: tf.reverse(x, [1, 3]),
    "one minus": lambda x: 1.0 - x,
    "root": lambda x: tf.math.rsqrt(tf.square(x) + 1.0),
    "squared difference": lambda x: tf.math.squared_difference(x, 0.5),
    "where": lambda x: tf.where(x > 0.5, x, -1.0),
    "sum": lambda x: tf.reduce_sum(x, [1, 3], keepdims=True),
    "largest": lambda x: tf.reduce_max(x, [1, 2]),
    "running sum": lambda x: tf.cumsum(x, 2, exclusive=True),
    "einsum": lambda x: tf.einsum("bhwc,bhwd->bhcd", x, x),
    "transposed product": lambda x: tf.matmul(x, x, transpose_b=True),
    "by a constant": lambda x: tf.matmul(x, tf.constant(np.eye(5, 4), tf.float32), transpose_b=True),
    "stack": lambda x: tf.stack([x, tf.nn.relu(x)], 1),
    "unstack": lambda x: tf.unstack(x, axis=1)[2],
    "parts": lambda x: tf.split(x, [1, 3], -1)[1],
    "rows": lambda x: tf.gather(x, [2, 0], axis=1),
    "tile": lambda x: tf.tile(x, [1, 2, 1, 1]),
    "padded": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 0], [0, 1]], constant_values=0.5),
    "reflected": lambda x: tf.pad(x, [[0, 0], [1, 2], [0, 0], [0, 1]], mode="REFLECT"),
    "reshaped": lambda x: tf.reshape(x, [-1, 36, 4]),
    "gelu by tanh": lambda x: tf.nn.gelu(x, approximate=True),
    "bilinear": lambda x: tf.image.resize(x, (12, 18)),
    "nearest, odd": lambda x: tf.image.resize(x, (9, 4), method="nearest"),
    "corners": lambda x: v1.image.resize_bilinear(x, (11, 11), align_corners=True),
    "depth to space": lambda x: tf.nn.depth_to_space(x, 2),
    "space to depth": lambda x: tf.nn.space_to_depth(x, 3),
}


@pytest.mark.parametrize("name", OPS)
def test_nodes_compute_the_same(name):
    """`as_onnx` compares every tensor."""
    as_onnx(opened(OPS[name], 6, 6, 4))


RNG = np.random.default_rng(7)


def _w(*shape):
    return RNG.normal(0, 0.4, shape).astype(np.float32)


N, K, D = tf.nn, _w(3, 3, 4, 6), _w(3, 3, 4, 2)
CONVOLUTIONS = {
    "same": lambda x: N.conv2d(x, K, 2, "SAME"),
    "valid": lambda x: N.conv2d(x, K, [1, 2, 1, 1], "VALID"),
    "explicit": lambda x: N.conv2d(x, K, 1, [[0, 0], [1, 0], [2, 3], [0, 0]]),
    "dilated": lambda x: N.conv2d(x, K, 1, "SAME", dilations=2),
    "grouped": lambda x: N.conv2d(x, _w(3, 3, 2, 6), 1, "SAME"),
    "depthwise": lambda x: N.depthwise_conv2d(x, D, [1, 2, 2, 1], "SAME"),
    "depthwise dilated": lambda x: N.depthwise_conv2d(x, D, [1, 1, 1, 1], "SAME", dilations=[2, 2]),
    "separable": lambda x: N.separable_conv2d(x, D, _w(1, 1, 8, 5), [1, 1, 1, 1], "SAME"),
    "transposed same": lambda x: N.conv2d_transpose(x, _w(3, 3, 5, 4), [tf.shape(x)[0], 14, 18, 5], 2, "SAME"),
    "transposed valid": lambda x: N.conv2d_transpose(x, _w(3, 3, 5, 4), [tf.shape(x)[0], 15, 19, 5], 2, "VALID"),
    "transposed odd": lambda x: N.conv2d_transpose(x, _w(3, 3, 5, 4), [tf.shape(x)[0], 13, 17, 5], 2, "SAME"),
    "transposed wide stride": lambda x: N.conv2d_transpose(x, _w(2, 2, 5, 4), [tf.shape(x)[0], 21, 27, 5], 3, "SAME"),
    "computed filter": lambda x: N.conv2d(
        x, tf.transpose(tf.reshape(x[0, :3, :3, :], (3, 3, 1, 4)), (0, 1, 3, 2)), 1, "SAME"),
    "1-D": lambda x: N.conv1d(x[:, 0], _w(3, 4, 5), 2, "SAME"),
    "1-D dilated": lambda x: N.convolution(x[:, 0], _w(3, 4, 5), padding="SAME", dilations=[3]),
    "2-D dilated by blocks": lambda x: tf.compat.v1.nn.with_space_to_batch(
        x, [2, 3], "VALID", lambda b, *_: N.conv2d(b, K[:2, :2], 1, "VALID"), filter_shape=[2, 2]),
    "max pool": lambda x: N.max_pool2d(x, 3, 2, "SAME"),
    "average pool": lambda x: N.avg_pool2d(x, 3, 2, "SAME"),
    "average pool valid": lambda x: N.avg_pool2d(x, [2, 3], 2, "VALID"),
    "batch norm": lambda x: tf.compat.v1.nn.fused_batch_norm(
        x, _w(4), _w(4), _w(4), np.abs(_w(4)), epsilon=0.01, is_training=False)[0],
    "depth to space": lambda x: N.depth_to_space(x, 2),
    "space to depth": lambda x: N.space_to_depth(x[:, :6, :8], 2),
}  # fmt: skip
FREE = {"same", "valid", "explicit", "grouped", "depthwise", "separable", "1-D", "max pool", "average pool",
        "batch norm"}  # fmt: skip
"""What is written for images of any size too."""


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_pools(name):
    as_onnx(opened(CONVOLUTIONS[name], 7, 9, 4))
    if name in FREE:
        as_onnx(opened(CONVOLUTIONS[name], None, None, 4))


@pytest.mark.parametrize("kind", [v1.image.resize_bilinear, v1.image.resize_nearest_neighbor])
def test_resizing(kind):
    sizes, options = [(14, 27), (5, 11)], [{}, {"half_pixel_centers": True}, {"align_corners": True}]
    as_onnx(opened(lambda x: [kind(x, size, **given) for size in sizes for given in options], 7, 9, 4))
    as_onnx(opened(lambda x: kind(x, tf.shape(x)[1:3] * 2, half_pixel_centers=True), None, None, 4))


def test_three_dimensions():
    k, m = _w(2, 3, 3, 3, 4), _w(2, 2, 2, 1, 3)
    as_onnx(
        opened(
            lambda x: [
                N.conv3d(x, k, [1, 1, 2, 1, 1], "SAME"),
                N.max_pool3d(x, 2, 2, "SAME"),
                N.avg_pool3d(x, 2, 1, "VALID"),
                N.conv3d_transpose(x, m, [tf.shape(x)[0], 10, 12, 14, 1], 2, "SAME"),
            ],
            *(5, 6, 7, 3),
        )
    )


def test_elementwise_functions():
    def function(x, y):
        positive = tf.abs(y) + 0.5
        return [
            N.relu(x), N.relu6(x * 4), N.leaky_relu(x, 0.1), N.elu(x), N.selu(x), tf.sigmoid(x), tf.tanh(x),
            N.softplus(x), N.softsign(x), N.gelu(x), N.gelu(x, approximate=True), N.silu(x), tf.math.erf(x),
            tf.exp(x), tf.math.log(positive), tf.math.log1p(positive), tf.math.expm1(x), tf.sqrt(positive),
            tf.math.rsqrt(positive), tf.square(x), tf.abs(x), -x, tf.sign(x), tf.floor(x * 5), tf.math.ceil(x * 5),
            tf.round(x * 5), tf.math.reciprocal(positive), x + y, x - y, x * y, x / positive, tf.maximum(x, y),
            tf.minimum(x, y), tf.pow(positive, x), tf.math.squared_difference(x, y), tf.math.floordiv(x, positive),
            tf.math.floormod(x, positive), tf.math.divide_no_nan(x, tf.nn.relu(y)), tf.add_n([x, y, x]),
            tf.where(x > y, x, y), tf.where(tf.logical_or(x <= y, tf.logical_not(x >= 0.3)), x, 0.0),
            tf.cast(tf.logical_and(tf.equal(x, y), tf.not_equal(x, y)), tf.float32), tf.clip_by_value(x, -0.2, 0.3),
            N.softmax(x), N.log_softmax(x), N.softmax(x, axis=1), tf.math.erfc(x), tf.cast(x < y, tf.int32),
        ]  # fmt: skip

    as_onnx(opened(function, 3, 5, inputs=2))


def test_matrix_products():
    b, heads = _w(6, 8), _w(6, 2, 4)

    def function(x):
        q = tf.einsum("abc,cde->abde", x, heads) + _w(2, 4) * 0 + 0.25
        scores = tf.einsum("aecd,abcd->acbe", q, q)
        return [
            x @ b, tf.matmul(x, b.T.copy(), transpose_b=True), tf.matmul(x, x, transpose_b=True),
            tf.matmul(x, x, transpose_a=True), tf.matmul(x[:, 0], b) + b[0], tf.matmul(x[0], x[0], transpose_a=True),
            q, scores, tf.einsum("abcd,cde->abe", q, heads.transpose(1, 2, 0).copy()), tf.einsum("abc->acb", x),
            N.bias_add(x @ b, b[1]),
        ]  # fmt: skip

    as_onnx(opened(function, 5, 6))


def test_arrays_and_shapes():
    def function(x):
        batch = tf.shape(x)[0]
        first, second = tf.split(x, 2, axis=3)
        parts = tf.unstack(x, axis=1)
        return [
            tf.reshape(x, (batch, -1)), tf.reshape(x, (batch, 9, 28)), tf.squeeze(x[:, :1], 1), x[:, tf.newaxis],
            tf.transpose(x, (0, 3, 1, 2)), tf.concat([first, second, first], -1), tf.stack([parts[0], parts[2]], 1),
            tf.split(x, [1, 3], axis=3)[1], x[..., 1:3], x[:, ::2, 1:-1, -1], x[:, ::-1], x[:, 2], x[:, -1],
            tf.slice(x, [0, 1, 2, 0], [-1, 3, -1, 2]), tf.gather(x, [2, 0], axis=3),
            tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]]),
            tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], constant_values=3.0),
            tf.pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]], mode="REFLECT"),
            tf.pad(x, [[0, 0], [1, 1], [0, 1], [0, 0]], mode="SYMMETRIC"),
            tf.tile(x, [1, 2, 1, 1]), tf.repeat(x, 2, axis=1), tf.zeros_like(x) + tf.ones_like(x),
            tf.broadcast_to(x[:, :1], tf.shape(x)), tf.fill([batch, 3], 2.5), tf.reverse(x, [2]),
            tf.cast(tf.range(batch), tf.float32), tf.one_hot(tf.argmax(x, -1), 4), tf.math.cumsum(x, 1),
            tf.math.top_k(x, 2)[0], tf.expand_dims(x, -1), tf.cast(tf.size(x), tf.float32), tf.identity(x),
            tf.gather_nd(x[0], [[0, 1], [2, 2]]), tf.cast(tf.cast(x * 3, tf.int32) // 2, tf.float32),
        ]  # fmt: skip

    as_onnx(opened(function, 7, 9, 4))


def test_reductions():
    def function(x):
        found = [tf.reduce_mean(x, [1, 2]), tf.reduce_mean(x, [1, 2], keepdims=True), tf.reduce_max(x, [1, 2])]
        kinds = (tf.reduce_mean, tf.reduce_sum, tf.reduce_max, tf.reduce_min)
        found += [op(x, axis) for op in kinds for axis in (1, -1)]
        found += [tf.reduce_prod(x, -1), tf.cast(tf.reduce_any(x > 1, -1), tf.float32)]
        return [*found, tf.cast(tf.reduce_all(x > -1, [1], keepdims=True), tf.float32), tf.argmin(x, 1)]

    as_onnx(opened(function, 7, 9, 4))


def test_sizes_of_free_axes_are_computed():
    def function(x):
        batch, length = tf.shape(x)[0], tf.shape(x)[1]
        place = tf.gather(_w(40, 4), tf.range(length))
        return [
            tf.reshape(x, [batch, length, 2, 2]), x + place, tf.reshape(x, [batch * length, 4]),
            tf.fill([batch, length], 1.0), tf.zeros([batch, 3]), tf.tensordot(x, _w(4, 5), 1) + 1.0,
            x + tf.cast(tf.reduce_prod(tf.shape(x)[1:]), tf.float32), tf.expand_dims(x, 1), tf.ones_like(x) - x,
        ]  # fmt: skip

    as_onnx(opened(function, None, 4))


def test_computed_weights_are_written():
    """Standardized kernels: no parameter of the model's own, so the op is opaque, and yet it can be written."""
    weight, bias = _w(3, 3, 4, 6), _w(6)

    def call(x):
        kernel = tf.identity(weight)
        moved = (kernel - tf.reduce_mean(kernel, [0, 1, 2])) / tf.math.reduce_std(kernel, [0, 1, 2])
        y = N.relu(N.bias_add(N.conv2d(x, moved, 2, "SAME"), bias))
        return tf.matmul(tf.reduce_mean(y, [1, 2]), tf.nn.l2_normalize(_w(6, 3), 0))

    model = opened(call, 6, 6, 4)
    assert [op.kind for op in BACKEND.graph(model)].count("opaque") == 1
    as_onnx(model)


@pytest.mark.parametrize(
    "call", [N.lrn, lambda x: v1.image.resize_bicubic(x, (9, 9)), lambda x: tf.math.lgamma(tf.math.bessel_i0e(x))]
)
def test_what_onnx_does_not_have_is_not_written(call):
    """An op of which ONNX has no form, or whose name there means something else; all are named at once."""
    with pytest.raises(NotEmittable, match=r"ONNX has no operator tf\.|doesn't say what it computes") as error:
        as_onnx(opened(call, 6, 6, 4))
    assert [op for op in ("Lgamma", "BesselI0e") if op in str(error.value)] in ([], ["Lgamma", "BesselI0e"])


def test_constants_of_all_types_are_read():
    def function(x):
        kinds = [tf.float16, tf.float64, tf.int32, tf.int64, tf.uint8, tf.int8]
        return [tf.cast(tf.abs(x), kind) * tf.constant(np.array([1, 2, 3]), kind) for kind in kinds]

    as_onnx(opened(function, 3))
