"""How codes are kept in ONNX: types, the opsets that they need, and values ready to be stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.grids import KEPT_AS, Blockwise, Encoding, cast_float, spread
from bitwright_onnx.graph.opset import INT4_OPSET, MINIMUM_OPSET
from bitwright_onnx.simulate.site_ops import FLOAT8_OPSET, FLOAT_TYPES


def storage_type(encoding: Encoding, *, computed: bool = False, packed: bool = True) -> ir.DataType:
    """The narrowest ONNX type that QuantizeLinear or DequantizeLinear knows and that holds the codes.

    Widths without a type of their own take the next one: 2 and 3 bits int4, 5 to 7 int8, 9 to 15 int16. Values of
    float4e2m1 are kept as float8e4m3fn, which has them all: ONNX Runtime 1.32 has no kernel for FLOAT4E2M1 (opset 23).

    Args:
        computed: codes come from QuantizeLinear, so that a grid smaller than its type needs a Clip, which has no
            4-bit types: such grids take 8 bits.
        packed: use the 4-bit types at all.

    Raises:
        ModelError: ONNX has no type for the values.
    """
    if encoding.float_format is not None:
        kept = FLOAT_TYPES.get(KEPT_AS.get(encoding.float_format, encoding.float_format))
        if kept is None:
            raise ModelError(
                f"ONNX has no type for weights in {encoding.float_format}, which is a table of values: take nvfp4, "
                "mxfp4 or int4:block32 for ONNX"
            )
        return kept
    if encoding.bits > 16:
        return ir.DataType.INT32
    width = 4 if encoding.bits <= 4 else 8 if encoding.bits <= 8 else 16
    if width == 4 and (not packed or (computed and encoding.grid.steps != 15)):
        width = 8
    return ir.DataType[f"{'' if encoding.signed else 'U'}INT{width}"]


def opset_for(encoding: Encoding, kind: ir.DataType) -> int:
    """The lowest opset that expresses an encoding with codes of type `kind`."""
    if encoding.float_format is not None and not isinstance(encoding.granularity, Blockwise):
        return FLOAT8_OPSET if kind.bitwidth == 8 else MINIMUM_OPSET
    if encoding.run_time is not None:
        return MINIMUM_OPSET
    if kind.bitwidth in (4, 16) or isinstance(encoding.granularity, Blockwise):
        return INT4_OPSET
    return MINIMUM_OPSET


def stored(x: NDArray[np.float32], encoding: Encoding, kind: ir.DataType) -> NDArray[Any]:
    """A parameter's codes (canonical layout) in the numpy type of its storage."""
    if encoding.float_format is None:
        return encoding.quantize(x).astype(kind.numpy())
    scale = spread(encoding.scale, x.shape, encoding.granularity)
    if not encoding.float_format.endswith("float16"):
        return cast_float(np.divide(x, scale, dtype=np.float32), encoding.float_format).astype(kind.numpy())
    return cast_float(x, encoding.float_format).astype(kind.numpy())
