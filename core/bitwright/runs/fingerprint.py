"""Content fingerprints: what a long step depends on, as a short hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
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
                    (at, _of_literal(operand.array) if isinstance(operand, Constant) else operand)
                    for at, operand in sorted(op.call.operands.items())
                ],
            )
            for op in graph.ops
            if op.call is not None
        ]
    )


def _of_literal(values: NDArray[Any]) -> str:
    return of_arrays([("", values.astype(np.str_) if values.dtype == object else values)])


def of_encodings(table: EncodingTable) -> str:
    """Hash of a table's numbers."""
    return of_json({site: of_arrays(encoding_arrays(e).items()) for site, e in table.items()})


def of_params(params: Mapping[str, NDArray[Any]]) -> str:
    """Hash of parameter values; reads one at a time."""
    return of_arrays((name, params[name]) for name in sorted(params))


def _short(digest: hashlib.blake2b) -> str:
    return digest.hexdigest()[:32]
