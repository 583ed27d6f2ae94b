"""Folders as transformers reads them: the one that a model was opened from, and the one that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import ToCompile
from bitwright.errors import EncodingError, InputError, ModelError
from bitwright.files import make_directory, write_text
from bitwright.graph import LINEAR_KINDS, OpKind, Param, ParamId, ParamRole
from bitwright_formats.codes import float_params, integer_params, quantized_params
from bitwright_formats.tensors import Stored, TensorFile, as_stored, exact_in, write_tensors

WEIGHTS = "model.safetensors"
TAKEN_ALONG = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
"""What goes with a model and holds no weights, and no code."""
_COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias", "attn.bias")
"""Endings of what older checkpoints have though the class computes it."""
_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Checkpoint:
    """The folder that a model was opened from.

    Attributes:
        folder: its place.
        config: config.json.
        tensors: name → the file that holds it.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorFile]

    @classmethod
    def of(cls, source: Path | None) -> Checkpoint | None:
        """The checkpoint at a model's source; None where that is something else.

        Raises:
            InputError: it can't be read.
        """
        if source is None or not (source / "config.json").is_file():
            return None
        files = [source / WEIGHTS] if (source / WEIGHTS).is_file() else sorted(source.glob("*.safetensors"))
        try:
            config = json.loads((source / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{source}/config.json can't be read: {error}") from error
        opened = [TensorFile.open(f) for f in files]
        return cls(source, config, {name: file for file in opened for name in file.entries})

    def dtype(self, name: str) -> str:
        """The stored type of a tensor; F32 where there is none."""
        return self.tensors[name].entries[name][0] if name in self.tensors else "F32"

    @property
    def scale_dtype(self) -> str:
        """The type in which the model's parameters are meant to be."""
        named = self.config.get("torch_dtype") or self.config.get("dtype")
        return _FLOATS.get(str(named), "F32")


def module_of(param: ParamId) -> str:
    """The layer that a weight belongs to."""
    return param.removesuffix(".weight")


def float_linears(model: ToCompile, packed: Collection[ParamId] | None = None) -> dict[str, bool]:
    """Names of the linear layers whose weights stay in float → whether their result is an output of the network.

    Args:
        model: to be written.
        packed: the weights that don't; None: those that are quantized to integers.
    """
    packed = set(integer_params(model) if packed is None else packed)
    found: dict[str, bool] = {}
    for op in model.graph:
        weight = op.params.get(ParamRole.WEIGHT)
        if op.kind in LINEAR_KINDS and weight is not None and weight not in packed:
            last = op.output in model.graph.outputs
            found[op.id] = last
            if not any(u.kind is OpKind.EMBEDDING for u in model.graph.users(weight)):
                found[module_of(weight)] = last
    return found


def check_names(model: ToCompile, checkpoint: Checkpoint | None, format: str) -> None:
    """Refuse a network whose parameters aren't those of the class that config.json names.

    Raises:
        ModelError: a parameter was added, or one is gone.
    """
    if checkpoint is None:
        return
    params = [*quantized_params(model), *float_params(model)]
    if added := [p for p in params if p not in checkpoint.tensors and not _is_constant(model, p)]:
        bias = added[0].endswith(".bias")  # the usual case: rounding corrects the mean output of layers without one
        way = "Round weights with bias_correction=False" if bias else "Leave out the technique that added it"
        raise ModelError(
            f"{format}: {checkpoint.folder} has no tensor {added[0]!r}; its readers build the network of config.json, "
            f"which has no place for it. {way}, or export another format"
        )
    gone = [n for n in checkpoint.tensors if n not in params and not n.endswith(_COMPUTED)]
    if gone := [n for n in gone if not _is_copy(checkpoint, n, params)]:
        raise ModelError(
            f"{format}: {gone[0]!r} of {checkpoint.folder} isn't in the network any more, and its readers expect it: "
            "it was folded into others, or isn't used. Export before that, or in another format"
        )


def _is_constant(model: ToCompile, param: ParamId) -> bool:
    """Whether a parameter is a constant of the code, which no checkpoint has."""
    return all(r is ParamRole.CONSTANT for op in model.graph.users(param) for r, p in op.params.items() if p == param)


def _is_copy(checkpoint: Checkpoint, name: str, params: Collection[str]) -> bool:
    """Whether a tensor is another's, stored a second time: a head that is tied to the embedding."""
    file = checkpoint.tensors[name]
    kind, shape, _ = file.entries[name]
    alike = [p for p in params if p in checkpoint.tensors and checkpoint.tensors[p].entries[p][:2] == (kind, shape)]
    own = file.read(name) if alike else None
    return any(np.array_equal(own, checkpoint.tensors[p].read(p)) for p in alike)  # type: ignore[arg-type]


def float_value(model: ToCompile, param: ParamId) -> NDArray[np.float32]:
    """What the simulation computes with for a parameter that isn't on an integer grid, in canonical layout."""
    value = model.params[param]
    encoding = model.encodings.get(param)
    return value if encoding is None or encoding.float_format is None else encoding.fake_quantize(value)


def plain_tensors(
    model: ToCompile, checkpoint: Checkpoint | None, packed: Collection[ParamId] | None = None
) -> list[Stored]:
    """The parameters that stay in float, under their names and in their own axes: in the type that the checkpoint has
    them in, where that holds them exactly."""
    found = []
    for param in float_params(model, packed):
        if checkpoint is not None and param not in checkpoint.tensors:
            continue  # a constant of the code
        value = float_value(model, param)
        encoding = model.encodings.get(param)
        wanted = _FLOATS.get(str(encoding.float_format)) if encoding is not None else None
        if wanted is None:
            wanted = "F32" if checkpoint is None else checkpoint.dtype(param)
        dtype = wanted if wanted in ("F16", "BF16") and exact_in(value, wanted) else "F32"
        found.append(
            Stored(param, dtype, to_native(value, model.graph.params[param]).shape, _maker(model, param, dtype))
        )
    return found


def _maker(model: ToCompile, param: ParamId, dtype: str) -> Any:
    return lambda: as_stored(to_native(float_value(model, param), model.graph.params[param]), dtype)


def to_native(value: NDArray[np.float32], param: Param) -> NDArray[np.float32]:
    """A parameter in its model's own axes."""
    return value if param.layout is None else value.transpose(np.argsort(param.layout))


def to_canonical(value: NDArray[np.float32], param: Param) -> NDArray[np.float32]:
    """A parameter in canonical axes."""
    return value if param.layout is None else value.transpose(param.layout)


def plain_values(
    model: ToCompile, file: TensorFile, packed: Collection[ParamId] | None = None
) -> Iterator[tuple[ParamId, NDArray[np.float32]]]:
    """The float parameters that a file holds."""
    for param in float_params(model, packed):
        if param in file.entries:
            yield param, to_canonical(file.floats(param), model.graph.params[param])


def scale_dtype(scales: Sequence[NDArray[np.float32]], checkpoint: Checkpoint | None) -> str:
    """The type that scales are stored in: the model's, where all are exact in it; float32 otherwise."""
    wanted = "F32" if checkpoint is None else checkpoint.scale_dtype
    return wanted if all(exact_in(s, wanted) for s in scales) else "F32"


def write_folder(
    path: Path, tensors: Sequence[Stored], quantization: Mapping[str, Any], checkpoint: Checkpoint | None
) -> Path:
    """Write a folder: weights, the configuration with what was quantized and how, and the tokenizer's files.

    Without a checkpoint, config.json holds the quantization alone.
    """
    make_directory(path)
    write_tensors(path / WEIGHTS, tensors, {"format": "pt"})
    config = {} if checkpoint is None else dict(checkpoint.config)
    config["quantization_config"] = quantization
    write_text(path / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name in TAKEN_ALONG if checkpoint is not None else ():
        assert checkpoint is not None
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, path / name)
    return path


def common_group(runs: Sequence[tuple[int, int]], format: str, *, rows: bool) -> int:
    """The group size of files that have one for all layers; -1 where each row has one scale.

    Args:
        runs: (columns that share a scale, columns) of each weight.
        rows: the format has scales for whole rows; otherwise they are repeated for groups.
        format: for messages.

    Raises:
        EncodingError: no usual size divides them all.
    """
    if rows and all(run == columns for run, columns in runs):
        return -1
    divisor = int(np.gcd.reduce([run for run, _ in runs]))
    for size in (128, 64, 32, 16):
        if divisor % size == 0:
            return size
    raise EncodingError(
        f"{format} has one group size for all layers, and runs of {', '.join(map(str, sorted({r for r, _ in runs})))} "
        "columns share a scale here, which no group of 16 to 128 divides; give all weights blocks of one size"
    )
