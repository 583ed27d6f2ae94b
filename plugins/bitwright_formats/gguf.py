"""GGUF, for llama.cpp and others on ggml: blocks of 32 with float16 scales, names and keys as llama.cpp has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bitwright.backend import ToCompile
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import ParamId
from bitwright_formats import checkpoint as folders
from bitwright_formats.checkpoint import Checkpoint
from bitwright_formats.codes import (
    checked_weight,
    codes_of,
    float_params,
    integer_or_mxfp4_params,
    is_mxfp4,
    mxfp4_codes,
    require_weights_only,
    run_of,
    scales_of,
)
from bitwright_formats.gguf_blocks import block_type, from_blocks, to_blocks
from bitwright_formats.gguf_file import BLOCK, TYPES, GgufFile, GgufTensor, write_gguf
from bitwright_formats.gguf_models import Family, family_of, model_keys
from bitwright_formats.tensors import as_stored, bfloat16_bits, exact_in

NAME = "gguf"


class Gguf:
    """Weights and tables in Q4_0, Q4_1, Q8_0 or MXFP4, whichever holds a weight's grid exactly; all else in float.

    Of a folder of Llama's, Mistral's or Qwen2's kind the file is llama.cpp's: its names, its order of the rows of
    queries and keys, hyperparameters and tokenizer. Of any other model it holds the parameters under their own names,
    for a loader of one's own.
    """

    class Settings(BaseModel):
        """Nothing to choose."""

        model_config = ConfigDict(extra="forbid")

    def check(self, model: ToCompile, settings: Any) -> None:
        """See `FormatWriter.check`."""
        require_weights_only(model, NAME)
        for param in integer_or_mxfp4_params(model):
            encoding = checked_weight(
                model, param, NAME, (4, 8), embeddings=True, floats=is_mxfp4(model.encodings[param])
            )
            columns = model.graph.params[param].shape[1]
            run = run_of(encoding, columns)
            if run % BLOCK:
                raise EncodingError(
                    f"{NAME} has blocks of {BLOCK} columns, and {run} share a scale in {param!r}; "
                    f"use a multiple of {BLOCK}, or leave it in float"
                )
            block_type(encoding, param)
        checkpoint = Checkpoint.of(model.source)
        family = family_of(checkpoint)
        if family is not None:
            folders.check_names(model, checkpoint, NAME)
            family.check(model)

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """See `FormatWriter.write`."""
        checkpoint = Checkpoint.of(model.source)
        family = family_of(checkpoint)
        tensors = [_quantized(model, p, family) for p in integer_or_mxfp4_params(model)]
        tensors += [_plain(model, p, family, checkpoint) for p in _floats(model, checkpoint)]
        if family is None or checkpoint is None:
            keys: dict[str, Any] = {"general.architecture": "plain"}
        else:
            keys, remark = model_keys(checkpoint, family)
            if remark:
                warnings.warn(f"{path.name}: {remark}", stacklevel=2)
        return write_gguf(path, {**keys, "general.quantization_version": 2}, tensors)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        checkpoint = Checkpoint.of(model.source)
        family = family_of(checkpoint)
        file = GgufFile.open(path)
        for param in model.graph.params:
            name = _name(param, family)
            if name not in file.tensors:
                continue
            kind, shape, _ = file.tensors[name]
            rows = file.rows(name)
            if TYPES[kind][1] == BLOCK:
                value = from_blocks(kind, rows)
            elif kind == "BF16":
                value = (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                value = rows.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
            value = value.reshape(shape)
            order = None if family is None else family.rows(param, shape[0])
            if order is not None:
                value = value[np.argsort(order)]
            yield param, folders.to_canonical(value, model.graph.params[param])


def _floats(model: ToCompile, checkpoint: Checkpoint | None) -> list[ParamId]:
    """Parameters in float that are written: those of the checkpoint, where there is one."""
    return [
        p for p in float_params(model, integer_or_mxfp4_params(model)) if checkpoint is None or p in checkpoint.tensors
    ]


def _name(param: ParamId, family: Family | None) -> str:
    return param if family is None else family.name(param)


def _quantized(model: ToCompile, param: ParamId, family: Family | None) -> GgufTensor:
    kind, shape = block_type(model.encodings[param], param), model.graph.params[param].shape

    def make() -> NDArray[np.uint8]:
        codes = mxfp4_codes(model, param) if kind == "MXFP4" else codes_of(model, param)
        scale, zero = scales_of(model, param, BLOCK)
        order = None if family is None else family.rows(param, shape[0])
        if order is not None:
            codes, scale, zero = codes[order], scale[order], zero[order]
        return to_blocks(kind, codes, scale, zero)

    return GgufTensor(_name(param, family), kind, shape, make)


def _plain(model: ToCompile, param: ParamId, family: Family | None, checkpoint: Checkpoint | None) -> GgufTensor:
    about = model.graph.params[param]
    value = folders.to_native(folders.float_value(model, param), about)
    if value.ndim > 4:
        raise ModelError(f"{NAME}: {param!r} has {value.ndim} axes, the format 4 at most")
    wanted = "F32" if checkpoint is None or value.ndim < 2 else checkpoint.dtype(param)  # vectors are read as F32
    kind = wanted if wanted in ("F16", "BF16") and exact_in(value, wanted) else "F32"

    def make() -> NDArray[np.uint8]:
        value = folders.to_native(folders.float_value(model, param), about)
        order = None if family is None else family.rows(param, len(value))
        value = value if order is None else value[order]
        stored = bfloat16_bits(value) if kind == "BF16" else as_stored(value, kind)
        return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)

    return GgufTensor(_name(param, family), kind, value.shape or (1,), make)
