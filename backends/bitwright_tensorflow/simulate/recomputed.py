"""Gradients of learned scales that keep no tensor: what they need is computed again, in this process's graphs.

A simulated graph is of standard ops (see `fake_quant`), whose own gradients keep of each large activation what a step
of its scale makes of each value: written in the forward pass and read in the backward pass, it costs more than to
compute it again, in the pass that sums. Here such a gradient is put on the operations of an imported graph, as Python
objects have it. Nothing of that is in the graph itself, so a written one trains elsewhere by the gradients of its ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bitwright_tensorflow.simulate.fake_quant import CLIPPED, HELD, NAMESPACE, QUOTIENT, RAISED, SHAPED, STEPS, Node

Gradient = Callable[..., Any]


def recompute(graph: tf.Graph) -> None:
    """Put the gradients on the sites with one learned scale, where this release of TensorFlow has a place for them."""
    for operation in graph.get_operations():
        scope, _, name = operation.name.rpartition("/")
        if name == STEPS and operation.type == "Mul" and hasattr(operation, "_gradient_function"):
            _put_on(graph, scope)


def _put_on(graph: tf.Graph, scope: str) -> None:
    names = (QUOTIENT, RAISED, HELD, CLIPPED, STEPS, SHAPED)
    try:
        quotient, raised, held, clipped, steps, shaped = (graph.get_operation_by_name(f"{scope}/{n}") for n in names)
    except KeyError:  # not one of ours
        return
    value, scale = quotient.inputs
    low, high = raised.inputs[1], held.inputs[1]
    columns = steps.inputs[0].shape[0]

    def of_steps(_: object, g: Node) -> tuple[Node, None]:
        r = value / scale
        q = tf.round(r)
        kept = NAMESPACE.clip(q, low, high)
        share = kept - tf.raw_ops.Select(condition=tf.equal(q, kept), x=r, y=tf.zeros_like(r))
        return tf.reduce_sum(g * tf.reshape(share, [-1, columns]), 0), None

    def of_shaped(_: object, g: Node) -> tuple[Node, None]:
        return tf.reshape(g, [-1, columns]), None  # its own would ask for the shape of what it was made of

    def of_clipped(_: object, g: Node) -> tuple[Node, Node, Node]:
        least, most = clipped.inputs[1:]
        outside = tf.logical_or(tf.less(value, least), tf.greater(value, most))
        nil = tf.zeros_like(g)
        beyond = tf.raw_ops.Select(condition=outside, x=g, y=nil)
        # A zero point moves both limits alike.
        moved = tf.reduce_sum(tf.reduce_sum(tf.reshape(beyond, [-1, columns]), 0))
        return tf.raw_ops.Select(condition=outside, x=nil, y=g), moved, tf.zeros_like(moved)

    for operation, gradient in ((steps, of_steps), (shaped, of_shaped), (clipped, of_clipped)):
        operation._gradient_function = gradient
