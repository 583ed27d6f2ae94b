"""QDQ files from the canonical graph: nodes say what they compute, and the files are those of the frozen graph."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
pytest.importorskip("onnx_ir")

from tfnets import branches, decoder, mlp, residual, session_model  # noqa: E402

from bitwright.graph import Op, lacking  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_onnx.adapters import NotEmittable, export_qdq, written  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.export.export import _frozen_qdq  # noqa: E402

BACKEND, ONNX = TensorFlowBackend(), OnnxBackend()
v1 = tf.compat.v1


@pytest.mark.parametrize(
    ("build", "shape"), [(residual, (8, 8, 3)), (branches, (7, 7, 3)), (decoder, (4, 4, 3)), (mlp, (6,))]
)
def test_both_ways_give_the_same_pairs(build, shape, tmp_path):
    data = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    sim = QuantSim(session_model(build, *shape), target="onnxruntime-cpu").calibrate([{"x:0": data}])
    arguments = sim.native, sim.plan, sim.state.table
    found, expected = export_qdq(BACKEND, *arguments, tmp_path / "a.onnx"), _frozen_qdq(*arguments, tmp_path / "b.onnx")
    assert found.names == expected.names
    pairs, others = ONNX.pairs(found), ONNX.pairs(expected)
    assert pairs
    assert set(pairs) == set(others)
    for site, (pair,) in pairs.items():
        (other,) = others[site]
        assert (pair.bits, pair.signed, pair.float_format) == (other.bits, other.signed, other.float_format)
        for a, b in ((pair.scale, other.scale), (pair.zero_point, other.zero_point)):
            np.testing.assert_array_equal(np.ravel(a), np.ravel(b))
        if pair.codes is not None:
            np.testing.assert_array_equal(np.ravel(pair.codes()), np.ravel(other.codes()))


def opened(call, *shape: int):
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, (None, *shape), name="x")
        y = call(x)
    session = v1.Session(graph=graph)
    from bitwright_tensorflow import SessionModel

    return BACKEND.adopt(SessionModel(session, inputs=["x"], outputs=[y]))


OPS = {
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
    """`written` compares every tensor."""
    written(BACKEND, opened(OPS[name], 6, 6, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: tf.math.divide_no_nan(x, x - x),
        lambda x: tf.math.floormod(x, 0.3),
        tf.nn.lrn,
        lambda x: v1.image.resize_bicubic(x, (9, 9)),
        lambda x: tf.gather_nd(x, [[0, 1]]),
    ],
)
def test_what_onnx_has_otherwise_is_not_written(call):
    """The type is the name of an ONNX operator that computes something else in places."""
    model = opened(call, 6, 6, 4)
    with pytest.raises(NotEmittable, match=r"ONNX has no operator tf\."):
        written(BACKEND, model)


def test_a_reshape_of_two_free_axes_is_left_to_the_frozen_graph():
    graph = BACKEND.graph(opened(lambda x: tf.reshape(x, [tf.shape(x)[0], tf.shape(x)[1], 8]), None, 4, 2))
    op: Op = graph.ops[-1]
    assert "it has no shape" in (lacking(op, graph) or "")
