"""AutoGPTQ's layout, version "gptq": a folder whose packed weights lie (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bitwright.backend import ToCompile
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import ParamId
from bitwright_formats import checkpoint as folders
from bitwright_formats.checkpoint import Checkpoint, module_of
from bitwright_formats.codes import (
    Codes,
    checked_weight,
    codes_of,
    integer_params,
    lowest_code,
    require_float16_scales,
    require_weights_only,
    run_of,
    scales_of,
)
from bitwright_formats.packing import packed, unpacked
from bitwright_formats.tensors import Stored, TensorFile, of_array

NAME = "gptq"


class Gptq:
    """Linear weights in 2, 4 or 8 bits, with one width and one group size for all layers.

    Of a weight with N outputs and K inputs: ``qweight`` int32 (K·bits/32, N), packed along the inputs; ``qzeros`` int32
    (groups, N·bits/32), zero points less one; ``scales`` float16 (groups, N); ``g_idx`` int32 (K). The weight is
    ``scales · (code - zero)``. Codes are written as they are, whoever has chosen them.
    """

    class Settings(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def check(self, model: ToCompile, settings: Any) -> None:
        """See `FormatWriter.check`."""
        require_weights_only(model, NAME)
        weights = packed_weights(model, NAME)
        for param in weights:
            encoding = checked_weight(model, param, NAME, (2, 4, 8))
            require_float16_scales(encoding, param, NAME, "w4a16")
            if (encoding.zero_point == lowest_code(encoding)).any():
                raise EncodingError(
                    f"{NAME}: a zero point of {param!r} is the grid's lowest code, which the layout can't store (it "
                    "keeps zero points less one); use symmetric weights, or compressed_tensors or awq"
                )
            per_word = 32 // encoding.bits
            if any(n % per_word for n in model.graph.params[param].shape):
                raise ModelError(f"{NAME}: {model.graph.params[param].shape} of {param!r} doesn't fill whole words")
        if len(widths := {model.encodings[p].bits for p in weights}) > 1:
            raise EncodingError(f"{NAME} has one width for all layers, not {sorted(widths)}; use compressed_tensors")
        group_size(model, weights, NAME, rows=True)
        if left := [name for name, last in folders.float_linears(model).items() if not last]:
            raise ModelError(
                f"{NAME}: its readers take every linear layer but the head for packed, and {left[0]!r} is in float; "
                "use compressed_tensors or awq"
            )
        folders.check_names(model, Checkpoint.of(model.source), NAME)

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """See `FormatWriter.write`."""
        checkpoint = Checkpoint.of(model.source)
        weights = packed_weights(model, NAME)
        size = group_size(model, weights, NAME, rows=True)
        tensors = folders.plain_tensors(model, checkpoint)
        for param in weights:
            tensors += _stored(model, param, size)
        bits = model.encodings[weights[0]].bits
        symmetric = all((scales_of(model, p)[1] == 2 ** (bits - 1)).all() for p in weights)
        quantization = {
            "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": symmetric,
            "lm_head": not any(folders.float_linears(model).values()), "checkpoint_format": "gptq",
            "true_sequential": True,
        }  # fmt: skip
        return folders.write_folder(path, tensors, quantization, checkpoint)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        file = TensorFile.open(path / folders.WEIGHTS)
        yield from folders.plain_values(model, file)
        for param in model.graph.params:
            module = module_of(param)
            if f"{module}.qweight" in file.entries:
                yield param, _values(file, module)


def packed_weights(model: ToCompile, format: str) -> list[ParamId]:
    """The weights on integer grids.

    Raises:
        ModelError: there are none.
    """
    found = integer_params(model)
    if not found:
        raise ModelError(f"{format}: no weight is on an integer grid")
    return found


def group_size(model: ToCompile, weights: list[ParamId], format: str, *, rows: bool) -> int:
    """Of all layers; see `checkpoint.common_group`."""
    columns = {p: model.graph.params[p].shape[1] for p in weights}
    return folders.common_group(
        [(run_of(model.encodings[p], columns[p]), columns[p]) for p in weights], format, rows=rows
    )


def _stored(model: ToCompile, param: ParamId, size: int) -> Iterator[Stored]:
    module, (rows, columns) = module_of(param), model.graph.params[param].shape
    scale, zero = scales_of(model, param, size if size > 0 else None)
    bits, run = model.encodings[param].bits, columns // scale.shape[1]
    yield Stored(
        f"{module}.qweight", "I32", (columns * bits // 32, rows), lambda: packed(codes_of(model, param), bits).T
    )
    yield of_array(f"{module}.qzeros", "I32", packed((zero.T - 1).astype(np.uint8), bits))
    yield of_array(f"{module}.scales", "F16", scale.T.astype(np.float16))
    yield of_array(f"{module}.g_idx", "I32", (np.arange(columns) // run).astype(np.int32))


def _values(file: TensorFile, module: str) -> NDArray[np.float32]:
    words, scale = file.read(f"{module}.qweight"), file.floats(f"{module}.scales").T
    zeros = file.read(f"{module}.qzeros")
    bits = 32 * zeros.shape[1] // scale.shape[0]
    zero = unpacked(zeros, bits).T.astype(np.int32) + 1
    return Codes(unpacked(words.T, bits), scale, zero, bits).values()
