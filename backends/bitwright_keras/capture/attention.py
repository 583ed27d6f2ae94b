"""`MultiHeadAttention` and `GroupQueryAttention` as dense layers, matrix products and a softmax.

softmax(Q Kᵀ / √d, masked) V, heads side by side (Vaswani et al. 2017, §3.2). Masked scores are set right before the
softmax; the two are shown as one op (`canonical`), so that scores of −10⁹ never reach a quantizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from bitwright_keras.capture.einsum import einsum_dense, product_of
from bitwright_keras.capture.emitter import Emitter


@dataclass(frozen=True)
class _Parts:
    """What attention layers call otherwise.

    Attributes:
        projections: of query, key and value to (samples, steps, heads, size).
        gate: of the query, to what multiplies the heads' outputs; None for none.
        output: of all heads to features.
        size: of a query's and a key's head.
        groups: query heads that share a head of keys and values.
        window: steps that a query attends to on either side, itself among them; None for all.
    """

    projections: tuple[Any, Any, Any]
    gate: Any
    output: Any
    size: int
    groups: int
    window: int | None


def multi_head_attention(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The calls of `MultiHeadAttention` over one axis of (samples, steps, features); None for any other."""
    if type(layer) is not keras.layers.MultiHeadAttention:
        return None
    parts = _Parts(
        (layer.query_dense, layer.key_dense, layer.value_dense),
        layer._gate_dense if getattr(layer, "_use_gate", False) else None,
        layer.output_dense, layer.key_dim, 1, getattr(layer, "_sliding_window", None),
    )  # fmt: skip
    return _attention(made, layer, parts, name, args, kwargs)


def grouped_query_attention(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The calls of `GroupQueryAttention` (Ainslie et al. 2023), whose query heads share heads of keys and values."""
    if type(layer) is not keras.layers.GroupQueryAttention:
        return None
    parts = _Parts(
        (layer._query_dense, layer._key_dense, layer._value_dense),
        layer._gate_dense if getattr(layer, "use_gate", False) else None,
        layer._output_dense, layer.head_dim, layer.num_repeats, getattr(layer, "sliding_window", None),
    )  # fmt: skip
    return _attention(made, layer, parts, name, args, kwargs)


def _attention(
    made: Emitter, layer: Any, parts: _Parts, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = layer._call_signature.bind(*args, **kwargs).arguments
    query, value = given["query"], given["value"]
    key = given.get("key")
    key = value if key is None else key
    linear = all(d.activation is keras.activations.linear for d in (*parts.projections, parts.output))
    plain = (
        all(len(x.shape) == 3 for x in (query, key, value))
        and not given.get("training")
        and linear
        and (parts.gate is None or parts.gate.activation is keras.activations.sigmoid)
        and product_of(parts.output, 4) is not None
    )
    if not plain:
        return None
    mask = _mask(made, name, given, query, key, value, parts.window)
    heads = [
        _heads(made, dense, f"{name}/{part}", x)
        for dense, part, x in zip(parts.projections, ("query", "key", "value"), (query, key, value), strict=True)
    ]
    if parts.groups > 1:
        heads[1:] = [
            made.emit(f"{name}/repeat_{part}", keras.ops.repeat, x, parts.groups, axis=1)
            for part, x in zip(("key", "value"), heads[1:], strict=True)
        ]
    q = made.emit(f"{name}/scale_query", keras.ops.multiply, heads[0], 1.0 / math.sqrt(parts.size))
    k = made.emit(f"{name}/transpose_key", keras.ops.transpose, heads[1], (0, 1, 3, 2))
    scores = made.emit(f"{name}/scores", keras.ops.matmul, q, k)
    softmax, _ = made.layer(
        layer, f"{name}/softmax", "softmax", lambda file: keras.layers.Softmax(-1, name=file, dtype=layer.dtype_policy)
    )
    masked: dict[str, Any] = {}
    shown = bool(given.get("return_attention_scores"))
    if mask is not None and (layer.dropout > 0 or shown):  # the layer then zeroes queries that may attend to nothing
        masked = {"mask": mask}
    elif mask is not None:
        scores = made.emit(f"{name}/masked", keras.ops.where, mask, scores, _low(scores))
    probabilities = weights = made.emit(f"{name}/softmax", softmax, scores, params={}, **masked)
    if layer.dropout > 0:
        dropout, _ = made.layer(
            layer, f"{name}/dropout", "dropout",
            lambda file: keras.layers.Dropout(layer.dropout, seed=layer.seed, name=file, dtype=layer.dtype_policy),
        )  # fmt: skip
        weights = made.emit(f"{name}/dropout", dropout, weights, params={})
    mixed = made.emit(f"{name}/context", keras.ops.matmul, weights, heads[2])
    mixed = made.emit(f"{name}/transpose_context", keras.ops.transpose, mixed, (0, 2, 1, 3))
    if parts.gate is not None:
        gate = made.emit(
            f"{name}/gate/sigmoid", keras.ops.sigmoid, einsum_dense(made, parts.gate, f"{name}/gate", query)
        )
        mixed = made.emit(f"{name}/gated", keras.ops.multiply, mixed, gate)
    result = einsum_dense(made, parts.output, f"{name}/attention_output", mixed)
    return (result, probabilities) if shown else result


def _low(scores: Any) -> float:
    return -3e4 if keras.backend.standardize_dtype(scores.dtype) == "float16" else -1e9


def _heads(made: Emitter, dense: Any, name: str, x: Any) -> Any:
    """Projection, then (samples, heads, steps, size)."""
    return made.emit(f"{name}/heads", keras.ops.transpose, einsum_dense(made, dense, name, x), (0, 2, 1, 3))


def _mask(made: Emitter, name: str, given: Any, query: Any, key: Any, value: Any, window: int | None) -> Any:
    """What may be attended to, broadcastable to (samples, heads, queries, keys); None for everything.

    The masks of query, value and key, the explicit one, the causal one and a sliding window are combined as the layer
    does.
    """
    parts: list[Any] = []
    for x, argument, axis in ((query, "query_mask", -1), (value, "value_mask", -2), (key, "key_mask", -2)):
        found = given.get(argument)
        if found is None and not (argument == "key_mask" and key is value):
            found = getattr(x, "_keras_mask", None)
        if found is not None:
            found = made.emit(f"{name}/{argument}/bool", keras.ops.cast, found, "bool")
            parts.append(made.emit(f"{name}/{argument}", keras.ops.expand_dims, found, axis=axis))
    explicit = given.get("attention_mask")
    if isinstance(explicit, keras.KerasTensor):
        parts.append(made.emit(f"{name}/attention_mask/bool", keras.ops.cast, explicit, "bool"))
    elif explicit is not None:
        parts.append(np.asarray(explicit).astype(bool))
    parts += _by_place(made, name, query, value, bool(given.get("use_causal_mask")), window)
    symbols = [p for p in parts if isinstance(p, keras.KerasTensor)]
    fixed = [p for p in parts if isinstance(p, np.ndarray)]
    whole: Any = None
    for array in fixed:
        whole = array if whole is None else np.logical_and(whole, array)
    for index, symbol in enumerate(symbols):
        whole = symbol if whole is None else made.emit(f"{name}/mask_{index}", keras.ops.logical_and, whole, symbol)
    if whole is None:
        return None
    missing = 4 - len(whole.shape)
    if isinstance(whole, np.ndarray):
        return whole.reshape(whole.shape[:-2] + (1,) * missing + whole.shape[-2:])
    for index in range(missing):
        whole = made.emit(f"{name}/mask/expand_{index}", keras.ops.expand_dims, whole, axis=-3)
    return whole


def _by_place(made: Emitter, name: str, query: Any, value: Any, causal: bool, window: int | None) -> list[Any]:
    """Masks that depend on the steps' numbers alone: constants, or computed where the numbers of steps are free."""
    if not causal and window is None:
        return []
    steps, others = query.shape[1], value.shape[1]
    found: list[Any] = []
    if steps is not None and others is not None:
        row, column = np.arange(steps)[:, None], np.arange(others)[None]
        found += [(row >= column)[None]] if causal else []
        return found if window is None else [*found, (np.abs(row - column) < window)[None]]
    rows = _numbered(made, f"{name}/row", query)
    columns = made.emit(f"{name}/columns", keras.ops.transpose, _numbered(made, f"{name}/column", value), (0, 2, 1))
    if causal:
        found.append(made.emit(f"{name}/causal", keras.ops.greater_equal, rows, columns))
    if window is not None:
        apart = made.emit(f"{name}/apart", keras.ops.subtract, rows, columns)
        apart = made.emit(f"{name}/distance", keras.ops.absolute, apart)
        found.append(made.emit(f"{name}/window", keras.ops.less, apart, window))
    return found


def _numbered(made: Emitter, name: str, x: Any) -> Any:
    """The number of each step from 1 on, int32 (samples, steps, 1)."""
    ones = made.emit(f"{name}/ones", keras.ops.ones_like, x, dtype="int32")
    numbers = made.emit(f"{name}/numbers", keras.ops.cumsum, ones, axis=1)
    return made.emit(f"{name}/first", lambda tensor: tensor[:, :, :1], numbers)
