"""`MultiHeadAttention` as dense layers, matrix products and a softmax.

softmax(Q Kᵀ / √d, masked) V, heads side by side (Vaswani et al. 2017, §3.2). Masked scores are set right before the
softmax; the two are shown as one op (`canonical`), so that scores of −10⁹ never reach a quantizer.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from bitwright_keras.capture.einsum import einsum_dense, product_of
from bitwright_keras.capture.emitter import Emitter


def multi_head_attention(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The calls of attention over one axis of (samples, steps, features); None for any other."""
    given = layer._call_signature.bind(*args, **kwargs).arguments
    query, value = given["query"], given["value"]
    key = given.get("key")
    key = value if key is None else key
    projections = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    plain = (
        type(layer) is keras.layers.MultiHeadAttention
        and all(len(x.shape) == 3 for x in (query, key, value))
        and not getattr(layer, "_use_gate", False)
        and getattr(layer, "_sliding_window", None) is None
        and not given.get("return_attention_scores")
        and not given.get("training")
        and all(d.activation is keras.activations.linear for d in projections)
        and product_of(layer.output_dense, 4) is not None
    )
    if not plain:
        return None
    mask = _mask(made, name, given, query, key, value)
    if mask is _UNKNOWN:
        return None
    heads = [
        _heads(made, dense, f"{name}/{part}", x)
        for dense, part, x in zip(projections[:3], ("query", "key", "value"), (query, key, value), strict=True)
    ]
    factor = 1.0 / math.sqrt(layer.key_dim)
    q = made.emit(f"{name}/scale_query", keras.ops.multiply, heads[0], factor)
    k = made.emit(f"{name}/transpose_key", keras.ops.transpose, heads[1], (0, 1, 3, 2))
    scores = made.emit(f"{name}/scores", keras.ops.matmul, q, k)
    softmax, _ = made.layer(
        layer, f"{name}/softmax", "softmax", lambda file: keras.layers.Softmax(-1, name=file, dtype=layer.dtype_policy)
    )
    masked: dict[str, Any] = {}
    if mask is not None and layer.dropout > 0:  # the layer then zeroes queries that may attend to nothing
        masked = {"mask": mask}
    elif mask is not None:
        scores = made.emit(f"{name}/masked", keras.ops.where, mask, scores, _low(scores))
    weights = made.emit(f"{name}/softmax", softmax, scores, params={}, **masked)
    if layer.dropout > 0:
        dropout, _ = made.layer(
            layer, f"{name}/dropout", "dropout",
            lambda file: keras.layers.Dropout(layer.dropout, seed=layer.seed, name=file, dtype=layer.dtype_policy),
        )  # fmt: skip
        weights = made.emit(f"{name}/dropout", dropout, weights, params={})
    mixed = made.emit(f"{name}/context", keras.ops.matmul, weights, heads[2])
    mixed = made.emit(f"{name}/transpose_context", keras.ops.transpose, mixed, (0, 2, 1, 3))
    return einsum_dense(made, layer.output_dense, f"{name}/attention_output", mixed)


_UNKNOWN = object()


def _low(scores: Any) -> float:
    return -3e4 if keras.backend.standardize_dtype(scores.dtype) == "float16" else -1e9


def _heads(made: Emitter, dense: Any, name: str, x: Any) -> Any:
    """Projection, then (samples, heads, steps, size)."""
    return made.emit(f"{name}/heads", keras.ops.transpose, einsum_dense(made, dense, name, x), (0, 2, 1, 3))


def _mask(made: Emitter, name: str, given: Any, query: Any, key: Any, value: Any) -> Any:
    """What may be attended to, broadcastable to (samples, heads, queries, keys); None for everything.

    The masks of query, value and key, the explicit one and the causal one are combined as the layer does.
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
    if given.get("use_causal_mask"):
        steps, others = query.shape[1], value.shape[1]
        if steps is None or others is None:
            return _UNKNOWN
        parts.append(np.tri(steps, others, dtype=bool)[None])
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
