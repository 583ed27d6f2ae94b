"""Small graphs that stand for something enormous are refused at once, and cost no memory."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from tensorflow.core.framework.graph_pb2 import GraphDef  # noqa: E402

from bitwright.errors import ModelError  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402

BACKEND = TensorFlowBackend()


def _placeholder(graph_def: GraphDef) -> None:
    node = graph_def.node.add(name="x", op="Placeholder")
    node.attr["dtype"].type = tf.float32.as_datatype_enum
    node.attr["shape"].shape.CopyFrom(tf.TensorShape((None, 4)).as_proto())


def _constant(columns: int) -> GraphDef:
    """A product with a constant whose values are all equal: it is stored as one of them."""
    graph_def = GraphDef()
    _placeholder(graph_def)
    weight = graph_def.node.add(name="w", op="Const")
    weight.attr["dtype"].type = tf.float32.as_datatype_enum
    tensor = weight.attr["value"].tensor
    tensor.dtype = tf.float32.as_datatype_enum
    tensor.tensor_shape.CopyFrom(tf.TensorShape((4, columns)).as_proto())
    tensor.float_val.append(1.0)
    product = graph_def.node.add(name="y", op="MatMul", input=["x", "w"])
    product.attr["T"].type = tf.float32.as_datatype_enum
    return graph_def


def _functions(depth: int, calls: int, *, circle: bool = False) -> GraphDef:
    """Functions each of which calls the next one so many times."""
    graph_def = GraphDef()
    _placeholder(graph_def)

    def call(node, name: str, source: str) -> None:
        node.op = "PartitionedCall"
        node.input.append(source)
        node.attr["Tin"].list.type.append(tf.float32.as_datatype_enum)
        node.attr["Tout"].list.type.append(tf.float32.as_datatype_enum)
        node.attr["f"].func.name = name

    call(graph_def.node.add(name="y"), f"f{depth}", "x")
    for level in range(depth + 1):
        function = graph_def.library.function.add()
        function.signature.name = f"f{level}"
        function.signature.input_arg.add(name="a", type=tf.float32.as_datatype_enum)
        function.signature.output_arg.add(name="b", type=tf.float32.as_datatype_enum)
        last = "a"
        for index in range(calls if level else 1):
            node = function.node_def.add(name=f"n{index}")
            if level or circle:
                call(node, f"f{level - 1 if level else depth}", last)
                last = f"n{index}:output:0"
            else:
                node.op = "Relu"
                node.input.append(last)
                node.attr["T"].type = tf.float32.as_datatype_enum
                last = f"n{index}:activations:0"
        function.ret["b"] = last
    return graph_def


@pytest.mark.parametrize(
    ("graph_def", "message"),
    [
        (_constant(10**9), "the constants in its 0.0 MiB are 15,259 MiB large"),
        (_functions(25, 2), "with its functions written out the graph has"),
        (_functions(3, 2, circle=True), "calls itself"),
        (_functions(200, 1), "nested without end"),
    ],
    ids=["constant", "functions", "circle", "depth"],
)
def test_graphs_that_are_far_larger_than_their_files(tmp_path, graph_def, message):
    path = tmp_path / "bomb.pb"
    path.write_bytes(graph_def.SerializeToString())
    started = time.process_time()
    with pytest.raises(ModelError, match=message):
        BACKEND.load(path)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("graph_def", "type", "count"),
    [(_constant(5), "Gemm", 1), (_functions(3, 3), "Relu", 27)],
    ids=["constant", "functions"],
)
def test_others_open(tmp_path, graph_def, type, count):
    path = tmp_path / "plain.pb"
    path.write_bytes(graph_def.SerializeToString())
    assert [op.type for op in BACKEND.graph(BACKEND.load(path))].count(type) == count


@tf.function(input_signature=[tf.TensorSpec([1], tf.int32)])
def _filled(n):
    return tf.raw_ops.Fill(dims=n, value=tf.constant(2))[:2]


def _one_hot(n):
    return tf.raw_ops.OneHot(indices=1, depth=tf.reshape(n, []), on_value=1, off_value=0)


def _doubled(n):
    for _ in range(28):
        n = tf.concat([n, n], 0)
    return n


def _product(n):
    rows = tf.range(tf.reshape(n, []))
    return tf.reshape(rows[:, None] * rows[None], [-1])


LARGE = {
    "Fill": (lambda n: tf.raw_ops.Fill(dims=n, value=2), 2**28),
    "Range": (lambda n: tf.range(tf.reshape(n, [])), 2**28),
    "Tile": (lambda n: tf.tile([2], n), 2**28),
    "BroadcastTo": (lambda n: tf.broadcast_to([2], n), 2**28),
    "OneHot": (_one_hot, 2**28),
    "ConcatV2": (_doubled, 2),
    "Mul": (_product, 2**14),
    "Where": (lambda n: tf.tile(tf.reshape(tf.cast(tf.where([True, False, True]), tf.int32), [-1]), n), 2**27),
    "floats": (lambda n: tf.cast(tf.fill(n, 2.0), tf.int32), 2**28),
    "function": (_filled, 2**28),
    "value": (lambda n: None, 2**28),
}
"""Vectors of 2**28 numbers made of a few, and what their `n`, a constant of shape (1,), then is."""


def _asked(kind: str) -> GraphDef:
    """A Reshape whose shape is the beginning of a large vector; for "value", a bias that is one's beginning."""
    make, number = LARGE[kind]
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4), "x")
        n = tf.compat.v1.placeholder(tf.int32, (1,), "n")
        if kind == "value":
            tf.add(x, tf.fill(n, 2.0)[:4], name="y")
        else:
            tf.identity(make(n)[:2], "made")
            tf.raw_ops.Reshape(tensor=x, shape=tf.compat.v1.placeholder(tf.int32, (2,), "shape"), name="y")
    graph_def = graph.as_graph_def()
    unread = [node for node in graph_def.node if node.name == "shape"]
    for node in unread:
        graph_def.node.remove(node)
    for reader in graph_def.node:
        reader.input[:] = ["made" if name == "shape" else name for name in reader.input]
    node = next(node for node in graph_def.node if node.name == "n")
    node.op = "Const"
    node.attr.clear()
    node.attr["dtype"].type = tf.int32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto([number], tf.int32))
    return graph_def


@pytest.mark.parametrize("kind", [*LARGE])
def test_what_opening_would_compute(tmp_path, kind):
    path = tmp_path / "bomb.pb"
    path.write_bytes(_asked(kind).SerializeToString())
    started, before = time.process_time(), _peak()
    message = "by more than 100,000 ways" if kind == "ConcatV2" else r"opening it would compute .*, from [\d,]+ MiB"
    with pytest.raises(ModelError, match=message):
        BACKEND.graph(BACKEND.load(path))
    assert time.process_time() - started < 2
    assert _peak() - before < 200


def test_what_a_saved_models_functions_would_compute(tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32)])
        def __call__(self, x):
            n = tf.constant([12_345])
            return {"y": tf.reshape(x, tf.concat([tf.shape(x)[:1], tf.tile([4], n)[:1]], 0))}

    model = Model()
    tf.saved_model.save(model, str(tmp_path), signatures=model.__call__)
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((tmp_path / "saved_model.pb").read_bytes())
    for function in saved.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            node.attr.pop("_output_shapes", None)
        for node in (n for n in function.node_def if n.op == "Const"):
            value = tf.make_ndarray(node.attr["value"].tensor)
            if value.tolist() == [12_345]:
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.full_like(value, 2**28)))
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    (tmp_path / "fingerprint.pb").unlink()
    started, before = time.process_time(), _peak()
    with pytest.raises(ModelError, match=r"opening it would compute .*, a constant, from 1,024 MiB"):
        BACKEND.load(tmp_path)
    assert time.process_time() - started < 2
    assert _peak() - before < 200


def test_masks_and_positions_that_networks_compute_open(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 2048, 2), "x")
        scores = tf.matmul(x, x, transpose_b=True)
        for _ in range(8):  # in each layer anew
            rows = tf.range(2048)
            mask = tf.cast(rows[:, None] >= rows[None], tf.float32)
            scores += (1.0 - mask) * -1e9
        tf.identity(tf.gather(scores, tf.reshape(tf.where(np.arange(9) % 2 == 0), [-1]), axis=1), "y")
    path = tmp_path / "net.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    assert "GatherV2" in {op.id for op in BACKEND.graph(BACKEND.load(path))}


def _peak() -> float:
    """MB of memory that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


SELECTED = {
    "Where": lambda: tf.where(tf.fill([2**13, 2**13], True)),
    "Unique": lambda: tf.unique(tf.fill([2**26], 1.0)),
    "ListDiff": lambda: tf.raw_ops.ListDiff(x=tf.fill([2**26], 1.0), y=tf.constant([2.0])),
}


@pytest.mark.parametrize("kind", [*SELECTED])
def test_what_selects_of_something_enormous_is_not_run_to_tell_its_size(tmp_path, kind):
    with tf.Graph().as_default() as graph:
        SELECTED[kind]()
        tf.nn.relu(tf.compat.v1.placeholder(tf.float32, (None, 4), "x"), "y")
    path = tmp_path / "bomb.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    before = _peak()
    BACKEND.load(path)  # nothing reads it
    assert _peak() - before < 200


def test_what_selects_of_something_whose_size_is_not_told_opens(tmp_path):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4), "x")
        kept = tf.where(tf.not_equal(tf.io.decode_raw(tf.constant(b"a\0b\0"), tf.uint8), 0))
        tf.gather(x, tf.reshape(kept, [-1]), axis=1, name="y")
    path = tmp_path / "net.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    assert [op.type for op in BACKEND.graph(BACKEND.load(path)) if op.id == "y"] == ["Gather"]


def test_buckets_of_relative_positions_open(tmp_path):
    """As T5 has them, of 4,096 positions: integers of 576 MiB, which no shape is made of."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4096, 2), "x")
        rows = tf.range(4096)
        apart = rows[None] - rows[:, None]
        near = tf.cast(apart > 0, tf.int32) * 16
        apart = tf.abs(apart)
        far = 8 + tf.cast(tf.math.log(tf.cast(apart, tf.float32) / 8) * 2.9, tf.int32)
        bucket = near + tf.where(apart < 8, apart, tf.minimum(far, 15))
        bias = tf.gather(tf.constant(np.arange(32, dtype=np.float32)), bucket)
        tf.add(tf.matmul(x, x, transpose_b=True), bias, name="y")
    path = tmp_path / "net.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    before = _peak()
    BACKEND.load(path)
    assert _peak() - before < 200


def _joined(text, times):
    for _ in range(times):
        text = tf.raw_ops.StringJoin(inputs=[text, text])
    return text


def _reduced(text, times):
    for _ in range(times):
        text = tf.raw_ops.ReduceJoin(inputs=tf.tile(tf.reshape(text, [1]), [8]), reduction_indices=0)
    return text


def _encoded(text, times):
    for _ in range(times):
        text = tf.io.encode_base64(text)
    return text


def _measured_text(make, times: int) -> GraphDef:
    """A Reshape whose shape is pieced together from how long a text is, which is made of a short one."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4), "x")
        length = tf.strings.length(make(tf.compat.v1.placeholder(tf.string, (), "text"), times))
        tf.reshape(x, tf.stack([-1, length * 0 + 4]), name="y")
    graph_def = graph.as_graph_def()
    node = next(node for node in graph_def.node if node.name == "text")
    node.op = "Const"
    node.attr.clear()
    node.attr["dtype"].type = tf.string.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(b"a" * 100))
    return graph_def


@pytest.mark.parametrize("make", [_joined, _reduced, _encoded])
def test_texts_that_grow_are_not_written_to_tell_a_shape(tmp_path, make):
    path = tmp_path / "texts.pb"
    path.write_bytes(_measured_text(make, 60).SerializeToString())
    started, before = time.process_time(), _peak()
    with pytest.raises(ModelError, match=r"opening it would compute .*, from [\d,]+ MiB"):
        BACKEND.graph(BACKEND.load(path))
    assert time.process_time() - started < 2
    assert _peak() - before < 200


@pytest.mark.parametrize("make", [_joined, _reduced])
def test_short_texts_open(tmp_path, make):
    path = tmp_path / "texts.pb"
    path.write_bytes(_measured_text(make, 3).SerializeToString())
    assert BACKEND.graph(BACKEND.load(path)).inputs == ("x:0",)


def test_what_no_input_reaches_is_no_output(tmp_path):
    """It was taken for one, over which opening ended in a KeyError."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4), "x")
        tf.matmul(x, tf.ones((4, 3)), name="y")
        tf.raw_ops.AsString(input=tf.fill([3], 1.0), name="told")
    path = tmp_path / "told.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    assert BACKEND.graph(BACKEND.load(path)).outputs == ("y:0",)
