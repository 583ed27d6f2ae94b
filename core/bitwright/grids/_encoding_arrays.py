"""Encodings taken apart: their kind as JSON holds it, their numbers as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.grids._encoding import Encoding
from bitwright.grids._grid import Blockwise, Dynamic, Granularity, PerChannel, PerTensor


def encoding_kind(encoding: Encoding) -> dict[str, Any]:
    """All of an encoding but its arrays, as JSON can hold it.

    Who holds it (`Encoding.held_by`) isn't part of it: it is no number, and equal grids have equal fingerprints.
    """
    layout = encoding.granularity
    meta: dict[str, Any] = {
        "bits": encoding.bits,
        "signed": encoding.signed,
        "symmetric": encoding.symmetric,
        "strict": encoding.strict,
        "float_format": encoding.float_format,
        "frozen": encoding.frozen,
        "source": encoding.source,
        "granularity": {name: getattr(layout, name) for name in layout.__dataclass_fields__},
    }
    if encoding.kept:  # only then, so that what was stored before is found again
        meta["kept"] = True
    if encoding.scale_type is not None:
        meta["scale_type"] = encoding.scale_type
    if encoding.tensor_scale is not None:
        meta["tensor_scale"] = encoding.tensor_scale
    return meta


def encoding_of_kind(
    kind: Mapping[str, Any],
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32],
    block_scale: NDArray[np.int32] | None = None,
) -> Encoding:
    """The encoding of a kind, as `encoding_kind` gave it, with these numbers."""
    fields = kind["granularity"]
    layout: Granularity = PerTensor()
    if "block_size" in fields:
        layout = Blockwise(**fields)
    elif "per_token" in fields:
        layout = Dynamic(**fields)
    elif fields:
        layout = PerChannel(**fields)
    own = {**kind, "granularity": layout}
    return Encoding(scale=scale, zero_point=zero_point, block_scale=block_scale, **own)


def encoding_arrays(encoding: Encoding) -> dict[str, NDArray[Any]]:
    """An encoding as plain arrays for a `Store`; `encoding_of_arrays` is the inverse, bit for bit."""
    arrays: dict[str, NDArray[Any]] = {
        "encoding": np.array(json.dumps(encoding_kind(encoding))),
        "scale": encoding.scale,
        "zero_point": encoding.zero_point,
    }
    if encoding.block_scale is not None:
        arrays["block_scale"] = encoding.block_scale
    return arrays


def encoding_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Encoding:
    """The encoding that `encoding_arrays` took apart."""
    kind = json.loads(str(arrays["encoding"]))
    return encoding_of_kind(kind, arrays["scale"], arrays["zero_point"], arrays.get("block_scale"))
