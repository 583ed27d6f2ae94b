"""The reference model as one .npz: arrays beside a JSON description, no pickle."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    Param,
    ParamRole,
    PoolAttrs,
    Tensor,
)
from bitwright.grids import Blockwise, Encoding, PerChannel, PerTensor

Array = NDArray[Any]
_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (ConvAttrs, BatchNormAttrs, ActivationAttrs, PoolAttrs, AxisAttrs, PerTensor, PerChannel, Blockwise)
}
_LAYOUT = ("bits", "signed", "symmetric", "strict", "float_format", "frozen", "source")


def write(
    path: Path,
    graph: Graph,
    params: Mapping[str, Array],
    perms: Mapping[str, tuple[int, ...]],
    encodings: Mapping[str, Encoding],
) -> Path:
    """Write beside, flush to disk, rename."""
    description = {
        "ops": [
            {**asdict(op), "params": {r.value: p for r, p in op.params.items()}, "attrs": _tagged(op.attrs)}
            for op in graph.ops
        ],
        "tensors": [asdict(t) for t in graph.tensors.values()],
        "params": [asdict(p) for p in graph.params.values()],
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "perms": perms,
        "encodings": {
            s: {**{k: getattr(e, k) for k in _LAYOUT}, "granularity": _tagged(e.granularity)}
            for s, e in encodings.items()
        },
    }
    arrays = {f"param/{p}": v for p, v in params.items()}
    for s, e in encodings.items():
        arrays |= {f"scale/{s}": e.scale, f"zero/{s}": e.zero_point}
        if e.block_scale is not None:
            arrays[f"blocks/{s}"] = e.block_scale
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, description=np.array(json.dumps(description)), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def read(path: Path) -> tuple[Graph, dict[str, Array], dict[str, tuple[int, ...]], dict[str, Encoding]]:
    """Read what `write` wrote.

    Raises:
        InputError: the file is missing, truncated or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        text = json.loads(str(arrays["description"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a reference model: {error}") from error
    ops = [
        Op(
            **{
                **op,
                "kind": OpKind(op["kind"]),
                "inputs": tuple(op["inputs"]),
                "outputs": tuple(op["outputs"]),
                "params": {ParamRole(r): p for r, p in op["params"].items()},
                "attrs": _untagged(op["attrs"]),
            }
        )
        for op in text["ops"]
    ]
    graph = Graph(
        ops,
        {t["id"]: Tensor(**_tuples(t)) for t in text["tensors"]},
        {p["id"]: Param(**_tuples(p)) for p in text["params"]},
        text["inputs"],
        text["outputs"],
    )
    encodings = {
        s: Encoding(
            **{**e, "granularity": _untagged(e["granularity"])},
            scale=arrays[f"scale/{s}"],
            zero_point=arrays[f"zero/{s}"],
            block_scale=arrays.get(f"blocks/{s}"),
        )
        for s, e in text["encodings"].items()
    }
    params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    return graph, params, {k: tuple(v) for k, v in text["perms"].items()}, encodings


def _tagged(record: Any) -> Any:
    if record is None:
        return None
    fields = {k: getattr(record, k) for k in type(record).__dataclass_fields__}
    return {"type": type(record).__name__, **{k: _tagged(v) if _is_record(v) else v for k, v in fields.items()}}


def _is_record(value: Any) -> bool:
    return type(value).__name__ in _TYPES


def _untagged(record: Any) -> Any:
    if record is None:
        return None
    fields = {k: _untagged(v) if isinstance(v, dict) else v for k, v in record.items() if k != "type"}
    return _TYPES[record["type"]](**_tuples(fields))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    return {k: frozen(v) for k, v in fields.items()}
