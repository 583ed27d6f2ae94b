"""compressed-tensors: a folder with packed weights (https://github.com/vllm-project/compressed-tensors)."""

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
    integer_or_mxfp4_params,
    is_mxfp4,
    lowest_code,
    mxfp4_codes,
    mxfp4_exponents,
    mxfp4_values,
    require_weights_only,
    run_of,
    scales_of,
)
from bitwright_formats.packing import packed, unpacked
from bitwright_formats.tensors import Stored, TensorFile, as_stored, of_array

NAME = "compressed_tensors"
Scheme = tuple[int, bool, int]
"""Width, whether zero points are stored, columns that share a scale (0: all of a row)."""
PACKED, MXFP4 = "pack-quantized", "mxfp4-pack-quantized"
MX_SCHEME: Scheme = (4, False, -32)
"""Of MXFP4, whose codes stand for floats."""


class CompressedTensors:
    """Linear weights in 4 or 8 bits, symmetric or not, a scale for each row or group, or in MXFP4; one scheme a layer.

    A weight of M rows and K columns is ``weight_packed`` int32 (M, K·bits/32), codes counted from the lowest, the first
    in the lowest bits; ``weight_scale`` (M, groups); ``weight_zero_point``, packed along the rows; ``weight_shape``.
    In MXFP4: ``weight_packed`` uint8 (M, K/2), a sign above three bits that number the magnitudes, the first in the
    lower half; ``weight_scale`` uint8 (M, K/32), the exponent plus 127. Readers compute in bfloat16, which holds such
    products, but not those of NVFP4: what its readers make of it aren't the simulation's weights.
    """

    class Settings(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def check(self, model: ToCompile, settings: Any) -> None:
        """See `FormatWriter.check`."""
        require_weights_only(model, NAME)
        for param in integer_or_mxfp4_params(model):
            checked_weight(model, param, NAME, (4, 8), floats=is_mxfp4(model.encodings[param]))
            columns = model.graph.params[param].shape[1]
            if columns % (32 // model.encodings[param].bits):
                raise ModelError(f"{NAME}: {columns} columns of {param!r} don't fill whole words; leave it in float")
        folders.check_names(model, Checkpoint.of(model.source), NAME)

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """See `FormatWriter.write`."""
        checkpoint = Checkpoint.of(model.source)
        weights = integer_or_mxfp4_params(model)
        schemes = {p: _scheme(model, p) for p in weights}
        dtype = folders.scale_dtype([e.scale for p in weights if not is_mxfp4(e := model.encodings[p])], checkpoint)
        tensors = folders.plain_tensors(model, checkpoint, weights)
        for param in weights:
            if schemes[param] == MX_SCHEME:
                tensors += _mx_stored(model, param)
            else:
                tensors += _stored(model, param, schemes[param], dtype)
        return folders.write_folder(path, tensors, _config(model, schemes), checkpoint)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        file = TensorFile.open(path / folders.WEIGHTS)
        yield from folders.plain_values(model, file, integer_or_mxfp4_params(model))
        for param in model.graph.params:
            module = module_of(param)
            if f"{module}.weight_packed" in file.entries:
                yield param, _values(file, module)


def _scheme(model: ToCompile, param: ParamId) -> Scheme:
    encoding, columns = model.encodings[param], model.graph.params[param].shape[1]
    if is_mxfp4(encoding):
        return MX_SCHEME
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


def _mx_stored(model: ToCompile, param: ParamId) -> Iterator[Stored]:
    module, (rows, columns) = module_of(param), model.graph.params[param].shape

    def packed_codes() -> NDArray[np.uint8]:
        codes = mxfp4_codes(model, param)
        return np.asarray(codes[:, ::2] | codes[:, 1::2] << 4, np.uint8)

    yield Stored(f"{module}.weight_packed", "U8", (rows, columns // 2), packed_codes)
    yield of_array(f"{module}.weight_scale", "U8", mxfp4_exponents(model.encodings[param].scale))


def _mx_values(words: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    return mxfp4_values(np.stack([words & 15, words >> 4], axis=-1).reshape(len(words), -1), exponents)


def _values(file: TensorFile, module: str) -> NDArray[np.float32]:
    if f"{module}.weight_shape" not in file.entries:
        return _mx_values(file.read(f"{module}.weight_packed"), file.read(f"{module}.weight_scale"))
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
        mx = scheme == MX_SCHEME
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(different) == 1 else mine,
            "weights": {
                "num_bits": bits, "type": "float" if mx else "int", "symmetric": not zeros,
                "strategy": "group" if run else "channel", "group_size": abs(run) or None, "dynamic": False,
                **({"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if mx else {}),
            },
            "input_activations": None,
            "output_activations": None,
            "format": MXFP4 if mx else PACKED,
        }  # fmt: skip
    formats = {g["format"] for g in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(folders.float_linears(model, schemes)),
    }
