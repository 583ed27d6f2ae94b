"""TensorFlow's graphs written node by node are, byte by byte, what protobuf writes of the whole."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

from bitwright.files import write_graph_def

VALUES: dict[str, Any] = {
    "matrix": np.arange(40_000, dtype=np.float32).reshape(200, 200),
    "halves": np.ones((3, 70), np.float16),
    "turned": np.arange(12, dtype=np.float64).reshape(3, 4).T,
}


@pytest.fixture(scope="module")
def whole() -> Any:
    """A graph with a function, and attributes before and behind the values of its constants."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 200], "x")
        made = {n: tf.constant(v, name=n) for n, v in VALUES.items()}
        tf.matmul(x, made["matrix"], name="product")
        tf.identity(tf.function(lambda y: y + 1)(x), "end")
    found = graph.as_graph_def(add_shapes=True)
    for node in found.node:
        if node.name in VALUES:
            node.attr["zone"].s = b"z"
            node.device = "/cpu:0"
            node.experimental_debug_info.original_node_names.append("first")
            node.attr["value"].tensor.Clear()
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(VALUES[node.name]))
            assert node.attr["value"].tensor.tensor_content
    assert found.library.function and found.versions.producer
    return found


def test_bytes_are_those_of_the_whole_message(whole: Any) -> None:
    outline = type(whole)()
    outline.CopyFrom(whole)
    for node in outline.node:
        if node.name in VALUES:
            node.attr["value"].tensor.tensor_content = b"left out"
    file = io.BytesIO()
    write_graph_def(outline, {name: partial(np.asarray, value) for name, value in VALUES.items()}, file)
    assert file.getvalue() == whole.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("x", np.zeros(3, np.float32), "is a Placeholder"), ("matrix", np.zeros((200, 100), np.float32), "of shape")],
)
def test_what_is_no_such_constant_is_refused(whole: Any, name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_graph_def(whole, {name: lambda: value}, io.BytesIO())
