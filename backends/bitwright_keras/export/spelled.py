"""Layers of Keras whose own `call` can't be recorded, or had better not be, written anew with `keras.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from bitwright.errors import ModelError

UNROLLED = 256
"""Steps that a recurrent layer may take to be written step by step."""


def recordable(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A layer with the same arguments and results whose `call` can be recorded; the layer itself where that can."""
    made = _SPELLED.get(type(layer)) if type(layer).__module__.startswith("keras.") else None
    if made is None and isinstance(layer, keras.layers.RNN):
        made = _steps
    if made is None and "backend" in vars(layer):
        made = _by_operations
    call = None if made is None else made(layer)
    return layer if call is None else _Spelled(layer, call)


class _Spelled(keras.layers.Layer):  # type: ignore[misc]
    """Stands in for a layer, which stays its own layers' owner."""

    def __init__(self, inner: keras.layers.Layer, function: Callable[..., Any]) -> None:
        super().__init__(name=inner.name, dtype=inner.dtype_policy)
        self.inner, self.function, self.built = inner, function, True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The same as the layer's."""
        return self.function(*args, **{k: v for k, v in kwargs.items() if k != "training"})


def _steps(rnn: Any) -> Callable[..., Any]:
    """A recurrent layer step by step; masked steps keep state and output (`keras.layers.RNN`)."""

    def call(sequences: Any, initial_state: Any = None, mask: Any = None) -> Any:
        count = sequences.shape[1]
        if count is None or count > UNROLLED or rnn.stateful:
            raise ModelError(
                f"it takes {'any number of' if count is None else count} steps{' and keeps its state' * rnn.stateful}; "
                f"written step by step are at most {UNROLLED}"
            )
        given = rnn.get_initial_state(1) if initial_state is None else initial_state
        state = given if isinstance(given, list | tuple) else [given]
        output, outputs = 0.0, []
        options = {"training": False} if rnn.cell._call_has_training_arg else {}
        for index in range(count)[:: -1 if rnn.go_backwards else 1]:
            new, after = rnn.cell.call(sequences[:, index], list(state), **options)
            after = after if isinstance(after, list | tuple) else [after]
            if mask is None:
                output, state = new, after
            else:
                kept = mask[:, index]

                def chosen(a: Any, b: Any, kept: Any = kept) -> Any:
                    return ops.where(ops.reshape(kept, (-1, *(1,) * (len(a.shape) - 1))), a, b)

                output = chosen(new, 0.0 if rnn.zero_output_for_mask else output)
                state = keras.tree.map_structure(chosen, list(after), list(state))
            outputs.append(output)
        result = ops.stack(outputs, axis=1) if rnn.return_sequences else output
        return (result, *state) if rnn.return_state else result

    return call


def _both_ways(layer: Any) -> Callable[..., Any]:
    """Two recurrent layers, the second from the end."""

    def call(sequences: Any, initial_state: Any = None, mask: Any = None) -> Any:
        half = len(initial_state) // 2 if initial_state is not None else 0
        states = (None, None) if initial_state is None else (initial_state[:half], initial_state[half:])
        found = []
        for inner, state in zip((layer.forward_layer, layer.backward_layer), states, strict=True):
            result = _steps(inner)(sequences, state, mask)
            found.append(result if isinstance(result, tuple) else (result,))
        (y, *after), (z, *later) = found
        z = ops.flip(z, axis=1) if layer.return_sequences else z
        if layer.merge_mode is None:
            return (y, z, *after, *later)
        if layer.merge_mode == "concat":
            merged = ops.concatenate([y, z], axis=-1)
        else:
            merged = y * z if layer.merge_mode == "mul" else y + z
            merged = merged / 2 if layer.merge_mode == "ave" else merged
        return (merged, *after, *later) if layer.return_state else merged

    return call


def _each_step(layer: Any) -> Callable[..., Any] | None:
    """A layer on each step: on the steps as samples."""

    def call(x: Any, mask: Any = None) -> Any:
        if mask is not None or None in x.shape[1:]:
            return layer.call(x, mask=mask)
        y = layer.layer(ops.reshape(x, (-1, *x.shape[2:])))
        return ops.reshape(y, (-1, x.shape[1], *y.shape[1:]))

    return call


def _additive_attention(layer: Any) -> Callable[..., Any]:
    """With the scale as a constant that can stand before a symbolic tensor."""

    def scores(query: Any, key: Any) -> Any:
        total = ops.tanh(ops.expand_dims(query, -2) + ops.expand_dims(key, -3))
        return ops.sum(total * ops.convert_to_numpy(layer.scale) if layer.use_scale else total, axis=-1)

    def call(*args: Any, **kwargs: Any) -> Any:
        own = layer._calculate_scores
        layer.__dict__["_calculate_scores"] = scores
        try:
            return layer.call(*args, **kwargs)
        finally:
            del layer.__dict__["_calculate_scores"]
            assert layer._calculate_scores == own

    return call


def _categories(layer: Any) -> Callable[..., Any]:
    """Category encoding: of one-hot rows, the largest or the sum."""

    def call(x: Any, count_weights: Any = None) -> Any:
        if count_weights is not None or layer.sparse:
            raise ModelError("it weighs what it counts, or gives sparse tensors")
        hot = ops.one_hot(x, layer.num_tokens, dtype=layer.compute_dtype)
        if layer.output_mode == "one_hot":
            return ops.squeeze(hot, -2) if x.shape[-1] == 1 else hot
        if len(x.shape) == 1:
            return hot
        return ops.max(hot, axis=-2) if layer.output_mode == "multi_hot" else ops.sum(hot, axis=-2)

    return call


class _Operations:
    """`keras.ops` under the names of a Keras backend's modules, which preprocessing layers compute with."""

    _backend = "keras.ops"  # its name

    def __getattr__(self, name: str) -> Any:
        if name in ("numpy", "nn", "image", "math", "core", "linalg"):
            return self
        return getattr(ops if hasattr(ops, name) else keras, name)

    @staticmethod
    def convert_to_tensor(x: Any, dtype: Any = None, sparse: Any = None) -> Any:
        """What is one already."""
        return x if dtype is None else ops.cast(x, dtype)


def _by_operations(layer: Any) -> Callable[..., Any]:
    """A layer that computes with a backend's own functions, by those of `keras.ops`."""
    options = {"training": False} if layer._call_has_training_arg else {}

    def call(*args: Any, **kwargs: Any) -> Any:
        own = vars(layer)["backend"]
        object.__setattr__(layer, "backend", _Operations())
        try:
            return layer.call(*args, **kwargs, **options)
        finally:
            object.__setattr__(layer, "backend", own)

    return call


_SPELLED: Mapping[type, Callable[[Any], Callable[..., Any] | None]] = {
    keras.layers.Bidirectional: _both_ways,
    keras.layers.TimeDistributed: _each_step,
    keras.layers.AdditiveAttention: _additive_attention,
    keras.layers.CategoryEncoding: _categories,
}
