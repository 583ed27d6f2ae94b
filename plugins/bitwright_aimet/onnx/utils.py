"""`aimet_onnx.utils`: what workflows take of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright_aimet.onnx._models import proto_of

__all__ = ["make_dummy_input"]

_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
"""ONNX's TensorProto.DataType → numpy's."""


def make_dummy_input(model: Any, dynamic_size: int = 1) -> dict[str, NDArray[Any]]:
    """Normal random numbers for each input of a `ModelProto`; free dimensions have `dynamic_size`.

    Raises:
        InputError: an input has a type that numpy doesn't have.
    """
    rng, found = np.random.default_rng(0), {}
    for item in proto_of(model).graph.input:
        tensor = item.type.tensor_type
        if tensor.elem_type not in _TYPES:
            raise InputError(f"input {item.name!r} has ONNX's type {tensor.elem_type}: make an array for it yourself")
        shape = [dynamic_size if d.dim_param or not d.dim_value else d.dim_value for d in tensor.shape.dim]
        found[item.name] = np.asarray(rng.standard_normal(shape)).astype(_TYPES[tensor.elem_type])
    return found
