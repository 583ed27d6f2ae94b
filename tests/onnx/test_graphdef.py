"""Frozen TensorFlow graphs as ONNX: every op against TensorFlow's own numbers, names, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright.backend import Tap  # noqa: E402
from bitwright.calibration import full_table, weight_encodings  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright.grids import Encoding, EncodingTable  # noqa: E402
from bitwright.placement import build_plan  # noqa: E402
from bitwright.targets import load_target  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_onnx.capture.model import adopt_model  # noqa: E402
from bitwright_onnx.export.qdq import write_qdq  # noqa: E402
from bitwright_onnx.export.runtime import IntegerSession, runtime_ops  # noqa: E402
from bitwright_onnx.graphdef.convert import HANDLERS, import_graphdef  # noqa: E402
from bitwright_onnx.graphdef.nodes import decode  # noqa: E402
from bitwright_onnx.simulate.session import OrtSession  # noqa: E402

RNG = np.random.default_rng(7)
IMAGE = (2, 7, 9, 4)


def _w(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.4, shape).astype(np.float32)


def _frozen(function: Callable[..., Any], specs: list[Any]) -> tuple[Any, list[str], list[str]]:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    concrete = convert_variables_to_constants_v2(tf.function(function, input_signature=specs).get_concrete_function())
    graph = concrete.graph.as_graph_def(add_shapes=True)
    return graph, [t.name for t in concrete.inputs], [t.name for t in concrete.outputs]


def _spec(array: np.ndarray, free: bool = True) -> Any:
    return tf.TensorSpec([None, *array.shape[1:]] if free else array.shape, array.dtype)


def _compare(function: Callable[..., Any], *arrays: np.ndarray, free: bool = True, tolerance: float = 1e-5) -> ir.Model:
    graph, inputs, outputs = _frozen(function, [_spec(a, free) for a in arrays])
    model = adopt_model(import_graphdef(graph, inputs, outputs))
    wanted = tf.nest.flatten(function(*map(tf.constant, arrays)))
    got = OrtSession(model, [Tap(o) for o in outputs]).run(dict(zip(inputs, arrays, strict=True)))
    for name, expected in zip(outputs, wanted, strict=True):
        value = np.asarray(got[Tap(name)])
        assert value.shape == tuple(expected.shape), name
        np.testing.assert_allclose(value, expected.numpy(), rtol=tolerance, atol=tolerance * 10)
    return model


K, D = _w(3, 3, 4, 6), _w(3, 3, 4, 2)
N = tf.nn
CONVOLUTIONS: dict[str, Callable[[Any], Any]] = {
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


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_pools(name: str) -> None:
    saved = RNG.bit_generator.state

    def stable(x: Any) -> Any:  # the same weights at each trace
        RNG.bit_generator.state = saved
        return CONVOLUTIONS[name](x)

    _compare(stable, _w(*IMAGE))


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize(("corners", "half"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("size", [(14, 27), (5, 11)])
def test_resizing(method: str, corners: bool, half: bool, size: tuple[int, int]) -> None:
    op = tf.raw_ops.ResizeBilinear if method == "bilinear" else tf.raw_ops.ResizeNearestNeighbor
    _compare(lambda x: op(images=x, size=size, align_corners=corners, half_pixel_centers=half), _w(*IMAGE))


def test_three_dimensions() -> None:
    volume, k = _w(2, 5, 6, 7, 3), _w(2, 3, 3, 3, 4)
    _compare(
        lambda x: (
            N.conv3d(x, k, [1, 1, 2, 1, 1], "SAME"),
            N.max_pool3d(x, 2, 2, "SAME"),
            N.avg_pool3d(x, 2, 1, "VALID"),
            N.conv3d_transpose(x, _w(2, 2, 2, 1, 3) * 0 + 0.5, [tf.shape(x)[0], 10, 12, 14, 1], 2, "SAME"),
        ),
        volume,
    )


def test_elementwise_functions() -> None:
    def function(x: Any, y: Any) -> list[Any]:
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

    _compare(function, _w(2, 3, 5), _w(2, 3, 5))


def test_matrix_products() -> None:
    a, b, heads = _w(2, 5, 6), _w(6, 8), _w(6, 2, 4)

    def function(x: Any) -> list[Any]:
        q = tf.einsum("abc,cde->abde", x, heads) + _w(2, 4) * 0 + 0.25
        scores = tf.einsum("aecd,abcd->acbe", q, q)
        return [
            x @ b, tf.matmul(x, b.T.copy(), transpose_b=True), tf.matmul(x, x, transpose_b=True),
            tf.matmul(x, x, transpose_a=True), tf.matmul(x[:, 0], b) + b[0], tf.matmul(x[0], x[0], transpose_a=True),
            q, scores, tf.einsum("abcd,cde->abe", q, heads.transpose(1, 2, 0).copy()), tf.einsum("abc->acb", x),
            N.bias_add(x @ b, b[1]),
        ]  # fmt: skip

    _compare(function, a)


def test_arrays_and_shapes() -> None:
    def function(x: Any) -> list[Any]:
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

    _compare(function, _w(*IMAGE))


def test_reductions() -> None:
    def function(x: Any) -> list[Any]:
        found = [tf.reduce_mean(x, [1, 2]), tf.reduce_mean(x, [1, 2], keepdims=True), tf.reduce_max(x, [1, 2])]
        kinds = (tf.reduce_mean, tf.reduce_sum, tf.reduce_max, tf.reduce_min)
        found += [op(x, axis) for op in kinds for axis in (1, -1)]
        found += [tf.reduce_prod(x, -1), tf.cast(tf.reduce_any(x > 1, -1), tf.float32)]
        return [*found, tf.cast(tf.reduce_all(x > -1, [1], keepdims=True), tf.float32), tf.argmin(x, 1)]

    _compare(function, _w(*IMAGE))


def test_channels_first_needs_no_transposes() -> None:
    def function(x: Any) -> Any:
        y = tf.raw_ops.Conv2D(input=x, filter=K, strides=[1, 1, 2, 2], padding="SAME", data_format="NCHW")
        return N.bias_add(y, K[0, 0, 0], "NC..")

    graph, inputs, outputs = _frozen(function, [tf.TensorSpec([None, 4, 8, 8])])
    model = import_graphdef(graph, inputs, outputs)  # TensorFlow can't run it on CPUs
    assert [n.op_type for n in model.graph] == ["Conv", "Add"]
    x = _w(2, 4, 8, 8)
    got = OrtSession(adopt_model(model), [Tap(outputs[0])]).run({inputs[0]: x})[Tap(outputs[0])]
    wanted = N.conv2d(x.transpose(0, 2, 3, 1), K, 2, "SAME").numpy() + K[0, 0, 0]
    np.testing.assert_allclose(got, wanted.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def _net(x: Any) -> Any:
    x = N.relu(N.bias_add(N.conv2d(x, tf.identity(K, name="k1"), 1, "SAME", name="c1"), K[0, 0, 0]), name="r1")
    x = N.depthwise_conv2d(x, tf.identity(_FIXED["d"], name="k2"), [1, 1, 1, 1], "SAME", name="c2")
    x = N.relu6(N.bias_add(x, _FIXED["b"], name="b2"), name="r2")
    x = tf.reduce_mean(x, [1, 2], name="gap")
    return tf.add(tf.matmul(x, tf.identity(_FIXED["m"], name="k3"), name="fc"), _FIXED["b3"], name="logits")


_FIXED = {"d": _w(3, 3, 6, 1), "b": _w(6), "m": _w(6, 5), "b3": _w(5)}


def test_tensors_and_weights_have_the_names_asked_for_and_canonical_shapes() -> None:
    graph, inputs, outputs = _frozen(_net, [tf.TensorSpec([None, 7, 9, 4])])
    names = {"k1": "first/kernel", "k2:0": "second/kernel", "k3": "dense/kernel", "r1": "first", "c2:0": "second raw"}
    made = adopt_model(import_graphdef(graph, inputs, outputs, names=names))
    found = OnnxBackend().graph(made)
    assert found.params["first/kernel"].shape == (6, 4, 3, 3)
    assert found.params["second/kernel"].shape == (6, 1, 3, 3)
    assert found.params["dense/kernel"].shape == (5, 6)  # canonical (out, in)
    assert {"first", "second raw", "r2:0", outputs[0]} <= set(found.tensors) | set(found.outputs)
    first = next(op for op in found if op.weight == "first/kernel")
    assert set(map(str, first.params)) == {"weight", "bias"}, "the bias is the convolution's own"
    x = _w(2, 7, 9, 4)
    got = OrtSession(made, [Tap("first"), Tap("second raw"), Tap(outputs[0])]).run({inputs[0]: x})
    first_value = N.relu(N.conv2d(x, K, 1, "SAME") + K[0, 0, 0]).numpy()
    np.testing.assert_allclose(got[Tap("first")], first_value, atol=1e-5)
    raw = N.depthwise_conv2d(first_value, _FIXED["d"], [1, 1, 1, 1], "SAME").numpy()
    np.testing.assert_allclose(got[Tap("second raw")], raw, atol=1e-5)


def test_the_qdq_writer_takes_the_model_and_integer_kernels_run_it(tmp_path: Any) -> None:
    graph, inputs, outputs = _frozen(_net, [tf.TensorSpec([None, 7, 9, 4])])
    backend = OnnxBackend()
    model = backend.adopt(import_graphdef(graph, inputs, outputs))
    shown = backend.graph(model)
    plan = build_plan(shown, load_target("onnxruntime-cpu"))
    x = _w(16, 7, 9, 4)
    sites = list(plan.activations)
    taps = backend.session(model, [Tap(s) for s in sites]).run({inputs[0]: x})
    table = dict(weight_encodings(plan, backend.read(model, list(shown.params)), EncodingTable()))
    for site in sites:
        low, high = min(float(taps[Tap(site)].min()), 0.0), max(float(taps[Tap(site)].max()), 1e-3)
        scale = np.float32((high - low) / 255)
        table[site] = Encoding(8, False, False, scale, np.asarray(round(-low / float(scale)), np.int32))
    path = tmp_path / "net.qdq.onnx"
    report = write_qdq(model, shown, plan, full_table(plan, EncodingTable(table)), path)
    assert not report.skipped
    assert runtime_ops(path).counts["QLinearConv"] == 2, "the Transposes are moved out of the way"
    wanted = np.asarray(_net(tf.constant(x)))
    got = IntegerSession(path).run({inputs[0]: x})[Tap(outputs[0])]
    noise = float(np.square(got - wanted).sum() / np.square(wanted).sum())
    assert 0 < noise < 1e-3


def test_all_unsupported_ops_are_named_at_once() -> None:
    graph, inputs, outputs = _frozen(lambda x: tf.linalg.det(tf.signal.frame(x, 2, 1)[:, :2]) * tf.math.lgamma(x[:, 0]),
                                     [tf.TensorSpec([None, 6])])  # fmt: skip
    with pytest.raises(ModelError, match=r"MatrixDeterminant.*|Lgamma") as error:
        import_graphdef(graph, inputs, outputs)
    assert "Lgamma" in str(error.value) and "MatrixDeterminant" in str(error.value)


def test_bad_graphs_are_refused() -> None:
    graph, inputs, _ = _frozen(lambda x: x + 1.0, [tf.TensorSpec([None, 6])])
    with pytest.raises(ModelError, match="no tensor 'nowhere:0'"):
        import_graphdef(graph, inputs, ["nowhere"])
    variable = tf.Variable([1.0, 2.0])
    concrete = tf.function(lambda x: x * variable, input_signature=[tf.TensorSpec([None, 2])]).get_concrete_function()
    with pytest.raises(ModelError, match="freeze the graph"):
        import_graphdef(concrete.graph.as_graph_def(), [concrete.inputs[0].name], [concrete.outputs[0].name])


def test_constants_of_all_types_are_read() -> None:
    arrays = [np.array([[1.5, -2.0]], t) for t in (np.float32, np.float64, np.float16)]
    arrays += [np.array([1, 2, 3], t) for t in (np.int32, np.int64, np.uint8, np.int8, np.int16)]
    arrays += [np.array([True, False]), np.full((4, 3), 2.5, np.float32), np.asarray(7, np.int32)]
    arrays += [np.zeros(0, np.float32)]
    for array in arrays:
        proto = tf.make_tensor_proto(array)
        np.testing.assert_array_equal(decode(proto), array)
    lists = tf.make_tensor_proto([1.0, 2.0, 2.0], tf.bfloat16)
    np.testing.assert_array_equal(decode(lists).astype(np.float32), [1, 2, 2])
    repeated = type(lists)(dtype=1, float_val=[3.0])
    repeated.tensor_shape.dim.add(size=4)
    np.testing.assert_array_equal(decode(repeated), [3, 3, 3, 3])


def test_every_handler_is_a_tensorflow_op() -> None:
    missing = [op for op in HANDLERS if not hasattr(tf.raw_ops, op) and op not in ("BiasAddV1", "BatchMatMul", "Concat",
               "Gather", "Inv", "ClipByValue", "DivNoNan", "Erfc", "Select", "bitwright.Recurrent")]  # fmt: skip
    assert missing == []
