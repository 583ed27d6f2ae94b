"""`EinsumDense` as what it mostly is: a dense layer between two reshapes.

"abc,cde->abde" multiplies the last axis by a (c, d·e) matrix and splits the result; so its weight is shown in the
canonical (out, in) layout, as every other framework has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np

from bitwright_keras.capture.emitter import Emitter


@dataclass(frozen=True)
class Product:
    """An einsum equation as a matrix product.

    Attributes:
        kept: how many leading axes pass through.
        order: kernel axes in the order (contracted, made).
        contracted: how many kernel axes are contracted.
        bias: sizes that the bias has along the axes that are made, 1 where it broadcasts; None for no bias.
    """

    kept: int
    order: tuple[int, ...]
    contracted: int
    bias: tuple[int, ...] | None


def product_of(layer: Any, rank: int) -> Product | None:
    """The matrix product that an `EinsumDense` computes; None for what is none."""
    left, _, right = layer.equation.replace(" ", "").partition("->")
    source, _, kernel = left.partition(",")
    if "..." in source or "..." in right:
        if not (source.startswith("...") and right.startswith("...")):
            return None
        free = "".join(chr(ord("A") + i) for i in range(rank - len(source) + 3))
        source, right = free + source[3:], free + right[3:]
    contracted = [c for c in source if c in kernel]
    kept = source[: len(source) - len(contracted)]
    made = right[len(kept) :]
    plain = (
        len(source) == rank
        and source == kept + "".join(contracted)
        and right == kept + made
        and not set(made) & set(source)
        and sorted(kernel) == sorted([*contracted, *made])
        and len(set(kernel)) == len(kernel)
        and kept
    )
    if not plain:
        return None
    bias = None
    if layer.bias is not None:
        axes = layer.bias_axes
        if any(c not in made for c in axes):
            return None
        sizes = dict(zip(kernel, layer.kernel.shape, strict=True))
        bias = tuple(sizes[c] if c in axes else 1 for c in made)
    return Product(len(kept), tuple(kernel.index(c) for c in (*contracted, *made)), len(contracted), bias)


def einsum_dense(made: Emitter, layer: Any, name: str, x: Any, owner: str = "") -> Any:
    """The calls of an `EinsumDense` without its activation; None where it is not a matrix product.

    Args:
        made: where the calls go.
        layer: built.
        name: op id of the product.
        x: the symbolic input.
        owner: op id that its parameters are named by; the op's own by default.
    """
    found = product_of(layer, len(x.shape))
    if found is None or getattr(layer, "lora_enabled", False):
        return None
    kernel = np.transpose(keras.ops.convert_to_numpy(layer.kernel), found.order)
    inner, outer = kernel.shape[: found.contracted], kernel.shape[found.contracted :]
    kept = tuple(x.shape[1 : found.kept])
    if sum(n is None for n in kept) > 1 and (len(inner) > 1 or len(outer) > 1):
        return None
    free = tuple(-1 if n is None else n for n in kept)
    if found.contracted > 1:
        reshape, _ = made.layer(
            layer,
            f"{name}/flatten",
            f"flatten{free}",  # a shared layer may be called over several lengths
            lambda file: keras.layers.Reshape((*free, prod(inner)), name=file),
        )
        x = made.emit(f"{name}/flatten", reshape, x, params={})
    bias = None
    if found.bias is not None:
        values = keras.ops.convert_to_numpy(layer.bias).reshape(found.bias)
        bias = np.broadcast_to(values, outer).reshape(-1)
    keys = ("kernel",) if bias is None else ("kernel", "bias")
    dense, params = made.layer(
        layer,
        name,
        "dense",
        lambda file: keras.layers.Dense(
            prod(outer), use_bias=bias is not None, name=file, dtype=layer.dtype_policy, trainable=layer.trainable,
            kernel_regularizer=layer.kernel_regularizer, bias_regularizer=layer.bias_regularizer,
        ),
        params={key: f"{owner or name}/{key}" for key in keys},
    )  # fmt: skip
    fresh = not dense.built
    x = made.emit(name, dense, x, params=params)
    if fresh:
        dense.kernel.assign(np.ascontiguousarray(kernel).reshape(prod(inner), prod(outer)))
        if bias is not None:
            dense.bias.assign(bias)
    if len(outer) > 1:
        reshape, _ = made.layer(
            layer, f"{name}/split", f"split{free}", lambda file: keras.layers.Reshape((*free, *outer), name=file)
        )
        x = made.emit(f"{name}/split", reshape, x, params={})
    return x
