"""Small graphs that stand for something enormous are refused at once, and cost no memory."""

from __future__ import annotations

import time

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
