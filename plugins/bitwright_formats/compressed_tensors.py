"""compressed-tensors: a folder with pack-quantized weights (https://github.com/vllm-project/compressed-tensors)."""

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
    lowest_code,
    quantized_params,
    require_weights_only,
    run_of,
    scales_of,
)
from bitwright_formats.packing import packed, unpacked
from bitwright_formats.tensors import Stored, TensorFile, as_stored, of_array

NAME = "compressed_tensors"
Scheme = tuple[int, bool, int]
"""Width, whether zero points are stored, columns that share a scale (0: all of a row)."""


class CompressedTensors:
    """Linear weights in 4 or 8 bits, symmetric or not, a scale for each row or group; one scheme a layer.

    A weight of M rows and K columns is ``weight_packed`` int32 (M, K·bits/32), codes counted from the lowest, the first
    in the lowest bits; ``weight_scale`` (M, groups); ``weight_zero_point``, packed along the rows; ``weight_shape``.
    """

    class Settings(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def check(self, model: ToCompile, settings: Any) -> None:
        """See `FormatWriter.check`."""
        require_weights_only(model, NAME)
        for param in _weights(model):
            checked_weight(model, param, NAME, (4, 8))
            columns = model.graph.params[param].shape[1]
            if columns % (32 // model.encodings[param].bits):
                raise ModelError(f"{NAME}: {columns} columns of {param!r} don't fill whole words; leave it in float")
        folders.check_names(model, Checkpoint.of(model.source), NAME)

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """See `FormatWriter.write`."""
        checkpoint = Checkpoint.of(model.source)
        weights = _weights(model)
        schemes = {p: _scheme(model, p) for p in weights}
        dtype = folders.scale_dtype([model.encodings[p].scale for p in weights], checkpoint)
        tensors = folders.plain_tensors(model, checkpoint)
        for param in weights:
            tensors += _stored(model, param, schemes[param], dtype)
        return folders.write_folder(path, tensors, _config(model, schemes), checkpoint)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        file = TensorFile.open(path / folders.WEIGHTS)
        yield from folders.plain_values(model, file)
        for param in model.graph.params:
            module = module_of(param)
            if f"{module}.weight_packed" in file.entries:
                yield param, _values(file, module)


def _weights(model: ToCompile) -> list[ParamId]:
    return [p for p in quantized_params(model) if model.encodings[p].float_format is None]


def _scheme(model: ToCompile, param: ParamId) -> Scheme:
    encoding, columns = model.encodings[param], model.graph.params[param].shape[1]
    middle = encoding.zero_point - lowest_code(encoding) == 2 ** (encoding.bits - 1)
    run = run_of(encoding, columns)
    return encoding.bits, not bool(middle.all()), 0 if run == columns else run


def _stored(model: ToCompile, param: ParamId, scheme: Scheme, dtype: str) -> Iterator[Stored]:
    bits, zeros, _ = scheme
    module, (rows, columns) = module_of(param), model.graph.params[param].shape
    yield Stored(
        f"{module}.weight_packed", "I32", (rows, columns * bits // 32),
        lambda: packed(codes_of(model, param), bits),
    )  # fmt: skip
    scale, zero = scales_of(model, param)
    yield of_array(f"{module}.weight_scale", dtype, as_stored(scale, dtype))
    yield of_array(f"{module}.weight_shape", "I64", np.array([rows, columns], np.int64))
    if zeros:
        padded = np.zeros((-(-rows // (32 // bits)) * (32 // bits), zero.shape[1]), np.uint8)
        padded[:rows] = zero
        yield of_array(f"{module}.weight_zero_point", "I32", packed(padded.T, bits).T)


def _values(file: TensorFile, module: str) -> NDArray[np.float32]:
    rows, columns = (int(n) for n in file.read(f"{module}.weight_shape"))
    words, scale = file.read(f"{module}.weight_packed"), file.floats(f"{module}.weight_scale")
    bits = words.shape[1] * 32 // columns
    zero = np.full(scale.shape, 2 ** (bits - 1), np.int32)
    if f"{module}.weight_zero_point" in file.entries:
        zero = unpacked(file.read(f"{module}.weight_zero_point").T, bits).T[:rows].astype(np.int32)
    return Codes(unpacked(words, bits), scale, zero, bits).values()


def _config(model: ToCompile, schemes: dict[ParamId, Scheme]) -> dict[str, Any]:
    different = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, scheme in enumerate(different):
        bits, zeros, run = scheme
        mine = [module_of(p) for p, s in schemes.items() if s == scheme]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(different) == 1 else mine,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": not zeros, "strategy": "group" if run else "channel",
                "group_size": run or None, "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(folders.float_linears(model)),
    }
