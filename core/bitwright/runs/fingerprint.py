"""Content fingerprints: what a long step depends on, as a short hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Constant, Graph
from bitwright.grids import EncodingTable, encoding_arrays


def of_json(value: object) -> str:
    """Hash of a JSON-like value; key order doesn't matter."""
    return _short(hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode()))


def of_arrays(arrays: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """Hash of named arrays, in the order given."""
    digest = hashlib.blake2b()
    for name, values in arrays:
        digest.update(f"{name}{values.dtype}{values.shape}".encode())
        if values.dtype == object:  # text of TensorFlow
            digest.update(repr(values.tolist()).encode())
            continue
        # As bytes: not every type (text, dates, bfloat16) has a buffer that can be hashed.
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return _short(digest)


def of_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_graph(graph: Graph) -> str:
    """Hash of a graph's structure (not its parameter values)."""
    return of_json(
        {
            "ops": [
                (op.id, op.type, op.inputs, op.outputs, sorted(op.params.items()), repr(op.attrs)) for op in graph.ops
            ],
            "inputs": graph.inputs,
            "outputs": graph.outputs,
        }
    )


def of_calls(graph: Graph) -> str:
    """Hash of what ops compute beyond `of_graph` and the parameters' values: their attributes and literal operands.

    Apart from `of_graph`, by which saved simulations and banks of earlier versions know their network. Of an op without
    a call, whose backend says nothing of them, they aren't told.
    """
    return of_json(
        [
            (
                op.id,
                op.call.type,
                sorted((name, repr(value)) for name, value in op.call.attributes.items()),
                [
                    (at, of_arrays([("", operand.array)]) if isinstance(operand, Constant) else operand)
                    for at, operand in sorted(op.call.operands.items())
                ],
            )
            for op in graph.ops
            if op.call is not None
        ]
    )


def of_object(value: object) -> str:
    """Hash of settings, arguments and the like: of plain values, containers and arrays what they hold, of functions and
    classes their code, of other objects their type and how they are written, without addresses in memory."""
    return of_json(_plain(value))


def _plain(value: object, around: frozenset[int] = frozenset()) -> object:
    """As JSON has it.

    Args:
        value: what is told.
        around: ids of what it lies in: a decorator's function may hold itself.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | complex):
        return repr(value)
    if isinstance(value, bytes):
        return {"bytes": _short(hashlib.blake2b(value))}
    if id(value) in around:
        return {"circle": type(value).__qualname__}
    inner = partial(_plain, around=around | {id(value)})
    if isinstance(value, Mapping):
        return {"mapping": [(inner(k), inner(v)) for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [inner(v) for v in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(of_json(inner(v)) for v in value)}
    if isinstance(value, np.ndarray):
        return {"array": of_arrays([("", value)])}
    if isinstance(value, CodeType):
        return {"code": value.co_code.hex(), "names": value.co_names, "constants": inner(value.co_consts)}
    if isinstance(value, MethodType):
        return inner(value.__func__)
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_plain(cell)]
        return {"function": value.__qualname__, "of": inner(value.__code__),
                "default": inner((value.__defaults__, value.__kwdefaults__)),
                "closure": [inner(v) for v in held]}  # fmt: skip
    kind = value if isinstance(value, type) else type(value)
    told = {"type": f"{kind.__module__}.{kind.__qualname__}"}
    return told if kind is value else {**told, "written": _ADDRESS.sub("", repr(value))}


def _is_plain(cell: CellType) -> bool:
    """Whether a closure's cell has something in it that says what it is."""
    try:
        return isinstance(
            cell.cell_contents, bool | int | float | str | tuple | list | dict | np.ndarray | FunctionType
        )
    except ValueError:  # it is empty
        return False


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def of_encodings(table: EncodingTable) -> str:
    """Hash of a table's numbers."""
    return of_json({site: of_arrays(encoding_arrays(e).items()) for site, e in table.items()})


def of_params(params: Mapping[str, NDArray[Any]]) -> str:
    """Hash of parameter values; reads one at a time."""
    return of_arrays((name, params[name]) for name in sorted(params))


def _short(digest: hashlib.blake2b) -> str:
    return digest.hexdigest()[:32]
