"""Encodings as plain arrays, for stores that hold nothing but arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.grids._encoding import Encoding
from bitwright.grids._grid import Blockwise, Dynamic, Granularity, PerChannel, PerTensor


def encoding_arrays(encoding: Encoding) -> dict[str, NDArray[Any]]:
    """An encoding as plain arrays for a `Store`; `encoding_of_arrays` is the inverse, bit for bit.

    Who holds it (`Encoding.held_by`) isn't among them: it is no number, and equal grids have equal fingerprints.
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
    arrays: dict[str, NDArray[Any]] = {
        "encoding": np.array(json.dumps(meta)),
        "scale": encoding.scale,
        "zero_point": encoding.zero_point,
    }
    if encoding.block_scale is not None:
        arrays["block_scale"] = encoding.block_scale
    return arrays


def encoding_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Encoding:
    """The encoding that `encoding_arrays` took apart."""
    meta = json.loads(str(arrays["encoding"]))
    fields = meta.pop("granularity")
    layout: Granularity = PerTensor()
    if "block_size" in fields:
        layout = Blockwise(**fields)
    elif "per_token" in fields:
        layout = Dynamic(**fields)
    elif fields:
        layout = PerChannel(**fields)
    return Encoding(
        scale=arrays["scale"],
        zero_point=arrays["zero_point"],
        granularity=layout,
        block_scale=arrays.get("block_scale"),
        **meta,
    )
