"""AutoAWQ's layout, version "gemm": a folder whose packed weights lie (inputs, outputs), outputs in an own order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bitwright.backend import ToCompile
from bitwright.errors import ModelError
from bitwright.graph import ParamId
from bitwright_formats import checkpoint as folders
from bitwright_formats.checkpoint import Checkpoint, module_of
from bitwright_formats.codes import (
    Codes,
    checked_weight,
    codes_of,
    require_float16_scales,
    require_weights_only,
    scales_of,
)
from bitwright_formats.gptq import group_size, packed_weights
from bitwright_formats.packing import packed, unpacked
from bitwright_formats.tensors import Stored, TensorFile, of_array

NAME, BITS = "awq", 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs is in the lowest four bits of a word, in the next four, …"""


class Awq:
    """Linear weights in 4 bits, with one group size for all layers.

    Of a weight with N outputs and K inputs: ``qweight`` int32 (K, N/8), packed along the outputs in `ORDER`; ``qzeros``
    int32 (groups, N/8), packed so too; ``scales`` float16 (groups, N). The weight is ``scales · (code - zero)``.
    """

    class Settings(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def check(self, model: ToCompile, settings: Any) -> None:
        """See `FormatWriter.check`."""
        require_weights_only(model, NAME)
        weights = packed_weights(model, NAME)
        for param in weights:
            encoding = checked_weight(model, param, NAME, (BITS,))
            require_float16_scales(encoding, param, NAME, "w4a16_asymmetric")
            rows = model.graph.params[param].shape[0]
            if rows % len(ORDER):
                raise ModelError(f"{NAME}: {rows} outputs of {param!r} don't fill whole words; leave it in float")
        group_size(model, weights, NAME, rows=False)
        folders.check_names(model, Checkpoint.of(model.source), NAME)

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """See `FormatWriter.write`."""
        checkpoint = Checkpoint.of(model.source)
        weights = packed_weights(model, NAME)
        size = group_size(model, weights, NAME, rows=False)
        tensors = folders.plain_tensors(model, checkpoint)
        for param in weights:
            tensors += _stored(model, param, size)
        quantization = {
            "quant_method": "awq", "bits": BITS, "group_size": size, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": list(folders.float_linears(model)) or None,
        }  # fmt: skip
        return folders.write_folder(path, tensors, quantization, checkpoint)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        file = TensorFile.open(path / folders.WEIGHTS)
        yield from folders.plain_values(model, file)
        for param in model.graph.params:
            module = module_of(param)
            if f"{module}.qweight" in file.entries:
                codes = unpacked(file.read(f"{module}.qweight"), BITS, ORDER).T
                zero = unpacked(file.read(f"{module}.qzeros"), BITS, ORDER).T.astype(np.int32)
                yield param, Codes(codes, file.floats(f"{module}.scales").T, zero, BITS).values()


def _stored(model: ToCompile, param: ParamId, size: int) -> Iterator[Stored]:
    module, (rows, columns) = module_of(param), model.graph.params[param].shape
    scale, zero = scales_of(model, param, size)
    yield Stored(
        f"{module}.qweight", "I32", (columns, rows // len(ORDER)),
        lambda: packed(np.ascontiguousarray(codes_of(model, param).T), BITS, ORDER),
    )  # fmt: skip
    yield of_array(f"{module}.qzeros", "I32", packed(zero.T.astype(np.uint8), BITS, ORDER))
    yield of_array(f"{module}.scales", "F16", scale.T.astype(np.float16))
