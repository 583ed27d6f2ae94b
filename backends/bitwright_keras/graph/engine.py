"""What differs between Keras's own backends: compiling a function of tensors, and a clip that is one op."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from itertools import islice
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from bitwright_keras.graph.model import Spec

Function = Callable[..., Any]
_FORWARD_ONLY = ContextVar("bitwright_keras_forward_only", default=False)
"""Whether what is being traced is never differentiated."""
_AS_SWITCHED = ContextVar("bitwright_keras_as_switched", default=False)
"""Whether what is being traced may take switches (booleans in variables) for what they are now."""


def with_gradient(function: Function) -> Function:
    """`keras.ops.custom_gradient`; where nothing is differentiated, the function's values alone."""
    if not _FORWARD_ONLY.get():
        differentiable: Function = ops.custom_gradient(function)
        return _held_by_graph(differentiable) if keras.backend.backend() == "tensorflow" else differentiable
    return lambda *tensors: function(*tensors)[0]


def _held_by_graph(function: Function) -> Function:
    """A function with its own gradient, which lives as long as the graph that it is traced into.

    TensorFlow registers the gradient of each traced call under a new name, for good; the gradient knows tensors, these
    their graph, and so no traced graph of a simulation would ever be freed. Here the graph holds the gradient, and the
    registry knows it weakly.
    """

    def called(*tensors: Any) -> Any:
        import tensorflow as tf
        from tensorflow.python.framework import ops as tf_ops

        if tf.executing_eagerly():
            return function(*tensors)
        registry: dict[str, dict[str, Any]] = tf_ops.gradient_registry._registry
        known = len(registry)
        result = function(*tensors)
        graph = tf.compat.v1.get_default_graph()
        for name in list(islice(reversed(registry), max(0, len(registry) - known))):
            _hand_over(registry, name, graph)
        return result

    return called


def _hand_over(registry: dict[str, dict[str, Any]], name: str, graph: Any) -> None:
    """Let a graph hold a registered gradient."""
    entry = registry[name]
    gradient = entry.get("type")
    if gradient is None or not name.startswith("CustomGradient"):
        return
    held = getattr(graph, "_bitwright_gradients", None)
    if held is None:
        held = graph._bitwright_gradients = {}
    held[name] = gradient
    place = weakref.ref(graph)

    def looked_up(*arguments: Any) -> Any:
        alive = place()
        if alive is None:
            raise LookupError(f"the graph that the gradient {name} is of is gone")
        return alive._bitwright_gradients[name](*arguments)

    entry["type"] = looked_up
    weakref.finalize(graph, registry.pop, name, None)


def in_one_pass(wanted: bool = True) -> AbstractContextManager[Any]:
    """Lets XLA compile what is traced within on TensorFlow's CPUs: elementwise ops, each of which is a pass over memory
    of its own, become one. It is a hint in the graph, which a runtime without XLA passes over. Sums are taken outside:
    with them, XLA computes what leads there again for each result.

    Args:
        wanted: whether it is; compiling takes a tenth of a second for each shape of a tensor.
    """
    if not wanted or keras.backend.backend() != "tensorflow":
        return nullcontext()
    import tensorflow as tf

    if tf.executing_eagerly() or tf.config.list_physical_devices("GPU"):  # XLA's division isn't exact on GPUs
        return nullcontext()
    scope: AbstractContextManager[Any] = tf.xla.experimental.jit_scope()
    return scope


def traces_once() -> bool:
    """Whether `compiled` makes a graph before the first call, in which branches cost time even where none is taken."""
    name: str = keras.backend.backend()
    return name == "tensorflow"


def switched(variable: keras.Variable) -> bool | None:
    """What a switch is now, where the function that is being traced may take it for good; None where it must look."""
    if not _AS_SWITCHED.get():
        return None
    import tensorflow as tf

    with tf.init_scope():
        return bool(ops.convert_to_numpy(value_of(variable)))


def compiled(
    function: Function, inputs: Sequence[Spec], variables: Sequence[keras.Variable], *, as_switched: bool = False
) -> Function:
    """A function of tensors for many calls, without gradients.

    TensorFlow: one `tf.function` for all batch sizes; JAX: `jax.jit`; PyTorch: without recording gradients.

    Args:
        function: takes tensors, returns a list of tensors.
        inputs: of the tensors that it takes.
        variables: that it reads; each call sees their present values.
        as_switched: TensorFlow may leave out what switches are off for now: a branch for each takes two thirds of the
            time that a network of many takes to trace. The caller compiles again when one is turned.
    """
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        signature = [tf.TensorSpec(spec.shape, spec.dtype) for spec in inputs]
        traced = tf.function(function, input_signature=signature, autograph=False)
        forward, switches = _FORWARD_ONLY.set(True), _AS_SWITCHED.set(as_switched)
        try:
            result: Function = traced.get_concrete_function()
        finally:
            _AS_SWITCHED.reset(switches)
            _FORWARD_ONLY.reset(forward)
        return result
    if name == "torch":
        import torch

        def without_gradients(*tensors: Any) -> Any:
            with torch.no_grad():
                return function(*tensors)

        return without_gradients
    if name == "jax":
        import jax  # type: ignore[import-not-found]

        # Traced as they are, variables would become constants of the compiled function.
        @jax.jit  # type: ignore[untyped-decorator]
        def stateless(values: list[Any], *tensors: Any) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function(*tensors)

        return lambda *tensors: stateless([v.value for v in variables], *tensors)
    return function


def with_values(function: Function, variables: Sequence[keras.Variable]) -> Function:
    """A function of tensors that sees other values in the place of some variables': of these values, and of tensors."""
    called = _in_place(function, variables)
    if keras.backend.backend() != "tensorflow":
        return called
    import tensorflow as tf

    traced: Function = tf.function(called, autograph=False, reduce_retracing=True)
    return traced


def _in_place(function: Function, variables: Sequence[keras.Variable]) -> Function:
    def called(values: Sequence[Any], tensors: Sequence[Any]) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*tensors)

    return called


def pulled_back(function: Function, variables: Sequence[keras.Variable]) -> Function:
    """The gradients of Σ cotangent · output to the values of some variables: of values, tensors and cotangents.

    Args:
        function: takes tensors, returns a list of tensors.
        variables: in whose place the values are.
    """
    called, name = _in_place(function, variables), keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        def by_tape(values: Sequence[Any], tensors: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                outputs = called(values, tensors)
            return tape.gradient(outputs, values, cotangents, tf.UnconnectedGradients.ZERO)

        traced: Function = tf.function(by_tape, autograph=False, reduce_retracing=True)
        return traced
    if name == "jax":
        import jax

        def by_vjp(values: Sequence[Any], tensors: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            return jax.vjp(lambda v: called(v, tensors), list(values))[1](list(cotangents))[0]

        return by_vjp
    import torch

    def by_autograd(values: Sequence[Any], tensors: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        leaves = [v.detach().clone().requires_grad_() for v in values]
        kept = [(y, g) for y, g in zip(called(leaves, tensors), cotangents, strict=True) if y.requires_grad]
        found = torch.autograd.grad([y for y, _ in kept], leaves, [g for _, g in kept], allow_unused=True)
        return [torch.zeros_like(v) if g is None else g.detach() for v, g in zip(leaves, found, strict=True)]

    return by_autograd


def as_numpy(tensor: Any) -> NDArray[Any]:
    """A tensor's values; bfloat16 as float32."""
    value = np.asarray(keras.ops.convert_to_numpy(tensor))
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def is_symbolic(tensor: Any) -> bool:
    """Whether a tensor stands for values that aren't there yet: while a function is traced, or a shape inferred."""
    if isinstance(tensor, keras.KerasTensor):
        return True
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return bool(tf.is_symbolic_tensor(tensor))
    if name == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    return name == "torch" and str(getattr(tensor, "device", "")) == "meta"


def clip(x: Any, low: Any, high: Any) -> Any:
    """Between two scalars or broadcast arrays."""
    if keras.backend.backend() == "tensorflow" and len(low.shape) == 0 and len(high.shape) == 0:
        import tensorflow as tf

        return tf.raw_ops.ClipByValue(t=x, clip_value_min=low, clip_value_max=high)
    return keras.ops.minimum(keras.ops.maximum(x, low), high)


def value_of(variable: keras.Variable) -> Any:
    """A variable's value as a tensor, in a replica and outside.

    On PyTorch, `custom_gradient` takes no Variables. On TensorFlow, Keras takes variables for tensors, but those that
    a strategy mirrors give no arrays until they are read.
    """
    value = ops.convert_to_tensor(variable.value)
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    return tf.convert_to_tensor(value)


def opaque(value: float) -> Any:
    """A double that TensorFlow's graph optimizer can't see: it would multiply by its reciprocal where this divides."""
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    return tf.raw_ops.PlaceholderWithDefault(input=np.float64(value), shape=[])
