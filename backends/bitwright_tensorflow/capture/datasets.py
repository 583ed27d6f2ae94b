"""Datasets of graph mode, where TensorFlow lets nobody iterate over one in Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf


def dataset_batches(dataset: Any) -> Any:
    """A `tf.data.Dataset` that was made in a graph, as calibration data; everything else as it is.

    Scripts that disable eager execution, and datasets made under `with graph.as_default()`, have such ones. An
    iterator is added to the dataset's graph, once; each pass over the data opens a session of its own on it.

    Args:
        dataset: of elements as the network takes them, or (inputs, labels).
    """
    graph = getattr(getattr(dataset, "_variant_tensor", None), "graph", None)
    if not isinstance(dataset, tf.data.Dataset) or graph is None:
        return dataset
    return _GraphDataset(dataset, graph)


class _GraphDataset:
    def __init__(self, dataset: Any, graph: Any) -> None:
        self._graph = graph
        with graph.as_default():
            iterator = tf.compat.v1.data.make_initializable_iterator(dataset)
            self._start, self._next = iterator.initializer, iterator.get_next()

    def __iter__(self) -> Iterator[Any]:
        session = tf.compat.v1.Session(graph=self._graph)  # not entered: whoever takes the batches may enter others
        try:
            session.run(self._start)
            while True:
                try:
                    element = session.run(self._next)
                except tf.errors.OutOfRangeError:
                    return
                yield element
        finally:
            session.close()
