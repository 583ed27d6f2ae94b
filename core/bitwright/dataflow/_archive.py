"""A dataflow model as one .npz: arrays beside a JSON description, no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import M, PutIn
from bitwright.errors import BitwrightError, InputError
from bitwright.files import DAMAGED, atomic_write, read_npz
from bitwright.graph import Attrs, Call, Constant, Formula, Graph, Op, OpKind, Param, ParamRole, Tensor
from bitwright.grids import Encoding, Granularity

Array = NDArray[Any]
_TYPES: dict[str, Any] = {t.__name__: t for t in (*get_args(Attrs), *get_args(Granularity), Formula, PutIn)}
_LAYOUT = ("bits", "signed", "symmetric", "strict", "float_format", "frozen", "source", "pair_limit", "scale_type",
           "tensor_scale")  # fmt: skip
_VERSION = 1


def write(path: Path, model: M, backend: str, pack: Callable[[Op], object]) -> Path:
    """Write beside, flush to disk, rename.

    Args:
        path: the file; its folder exists.
        model: to be kept.
        backend: whose model it is.
        pack: what is kept of the native part of an op: JSON or bytes.
    """
    graph = model.graph
    native = {op.id: _native(model.native[op.id], pack, op) for op in graph if op.id in model.native}
    blobs = {f"native/{o}": np.frombuffer(n, np.uint8) for o, n in native.items() if isinstance(n, bytes)}
    description = {
        "backend": backend,
        "version": _VERSION,
        "ops": [
            {
                **asdict(replace(op, call=None)),
                "params": {r.value: p for r, p in op.params.items()},
                "attrs": _tagged(op.attrs),
                "call": _called(op.call),
            }
            for op in graph.ops
        ],
        "tensors": [asdict(t) for t in graph.tensors.values()],
        "params": [asdict(p) for p in graph.params.values()],
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "native": {o: n for o, n in native.items() if not isinstance(n, bytes)},
        "layouts": {p: layout.steps for p, layout in model.layouts.items()},
        "encodings": {
            s: {**{k: getattr(e, k) for k in _LAYOUT}, "granularity": _tagged(e.granularity)}
            for s, e in model.encodings.items()
        },
    }
    arrays = {**{f"param/{p}": v for p, v in model.params.items()}, **blobs}
    for s, e in model.encodings.items():
        arrays |= {f"scale/{s}": e.scale, f"zero/{s}": e.zero_point}
        if e.block_scale is not None:
            arrays[f"blocks/{s}"] = e.block_scale
    with atomic_write(path) as file:
        np.savez(file, description=np.array(json.dumps(description)), **arrays)  # type: ignore[arg-type]
    return path


def read(path: Path, made: type[M], backend: str, unpack: Callable[[Any], Any]) -> M:
    """Read what `write` wrote.

    Args:
        path: the file.
        made: type of the model.
        backend: whose model it must be.
        unpack: the inverse of `write`'s `pack`.

    Raises:
        InputError: the file is missing, truncated, another backend's or something else.
    """
    try:
        return _read(path, made, backend, unpack)
    except BitwrightError:
        raise
    except (*DAMAGED, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{path} is not a {backend} model: {reason[:300]}") from error


def _read(path: Path, made: type[M], backend: str, unpack: Callable[[Any], Any]) -> M:
    arrays = {k: np.asarray(v) for k, v in read_npz(path).items()}
    text = json.loads(str(arrays["description"]))
    if (text["backend"], text["version"]) != (backend, _VERSION):
        raise ValueError(f"it was written by {text['backend']}, version {text['version']} of the format")
    graph = Graph(
        [_op(op) for op in text["ops"]],
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
    native: dict[str, Any] = {o: _unpacked(n, unpack) for o, n in text["native"].items()}
    native |= {o: unpack(v.tobytes()) for o, v in _below(arrays, "native/").items()}
    layouts = {p: Layout(_frozen(steps)) for p, steps in text["layouts"].items()}
    return made(graph, _below(arrays, "param/"), native, layouts, encodings)


def _below(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _op(op: dict[str, Any]) -> Op:
    return Op(
        **{
            **op,
            "kind": OpKind(op["kind"]),
            "inputs": tuple(op["inputs"]),
            "outputs": tuple(op["outputs"]),
            "params": {ParamRole(r): p for r, p in op["params"].items()},
            "attrs": _untagged(op["attrs"]),
            "call": _call(op.get("call")),
        }
    )


def _called(call: Call | None) -> object:
    if call is None:
        return None
    operands = {
        i: held.value if isinstance(held, ParamRole) else {"dtype": held.array.dtype.str, "values": held.array.tolist()}
        for i, held in call.operands.items()
    }
    return {"attributes": dict(call.attributes), "operands": operands, "type": call.type}


def _call(stored: Any) -> Call | None:
    if stored is None:
        return None
    operands = {
        int(i): ParamRole(held) if isinstance(held, str) else Constant(np.array(held["values"], held["dtype"]))
        for i, held in stored["operands"].items()
    }
    return Call(_tuples(stored["attributes"]), operands, stored["type"])


def _native(native: object, pack: Callable[[Op], object], op: Op) -> object:
    """What an edit has put in is the base's own."""
    return _tagged(native) if isinstance(native, Formula | PutIn) else pack(op)


def _unpacked(stored: object, unpack: Callable[[Any], Any]) -> Any:
    put_in = isinstance(stored, dict) and stored.get("type!") in (Formula.__name__, PutIn.__name__)
    return _untagged(stored) if put_in else unpack(_deeply(stored))


def _tagged(record: Any) -> Any:
    if type(record).__name__ not in _TYPES:
        return record
    return {"type!": type(record).__name__, **{f.name: _tagged(getattr(record, f.name)) for f in fields(record)}}


def _untagged(record: Any) -> Any:
    if not isinstance(record, dict):
        return _frozen(record)
    return _TYPES[record["type!"]](**{k: _untagged(v) for k, v in record.items() if k != "type!"})


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _frozen(v) for k, v in record.items()}


def _deeply(value: object) -> object:
    """With tuples for lists, in dictionaries too."""
    if isinstance(value, dict):
        return {k: _deeply(v) for k, v in value.items()}
    return tuple(_deeply(v) for v in value) if isinstance(value, list) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
