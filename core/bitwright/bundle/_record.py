"""The record of an export: digests, hashes, reference samples and a sealed report, as they lie on disk."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import atomic_write, read_npz
from bitwright.graph import TensorId
from bitwright.grids import Encoding
from bitwright.report import ReferenceRecord, StoredTensor
from bitwright.runs import of_file

ARRAYS_SUFFIX = ".record.npz"
BUDGET = 16 * 2**20
"""Bytes of outputs and taps that an export carries at most."""

Array = NDArray[Any]


def hashes(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of files, and of all files in folders among them, by path relative to `folder`."""
    found: dict[str, str] = {}
    for path in files:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {p.relative_to(folder).as_posix(): of_file(p) for p in inside}
    return found


# -- arrays


@dataclass(frozen=True)
class Reference:
    """Reference samples, read back.

    Attributes:
        inputs: as the model was fed.
        tensors: outputs and taps of the native simulation, in float.
        handed: what parts of the model were fed, of those that were captured in parts.
        outputs: which of them are the model's outputs.
        synthetic: the inputs were made up.
    """

    inputs: dict[str, Array]
    tensors: dict[TensorId, Array]
    outputs: tuple[TensorId, ...]
    synthetic: bool = False
    handed: Mapping[TensorId, Array] = field(default_factory=dict)


def stored(tensor: TensorId, values: Array, encoding: Encoding | None) -> tuple[StoredTensor, Array]:
    """A tensor as the arrays hold it: codes in a byte or two where it is on one grid, otherwise its values."""
    plain, values = StoredTensor(tensor=tensor), _plain(values)
    if encoding is None or encoding.float_format is not None or encoding.scale.ndim or encoding.bits > 16:
        return plain, values
    if values.dtype != np.float32 or not np.isfinite(values).all():
        return plain, values
    codes = encoding.quantize(values)
    if not np.array_equal(encoding.dequantize(codes), values):
        return plain, values
    low = encoding.grid.qmin
    kind = np.uint8 if encoding.bits <= 8 else np.uint16
    about = StoredTensor(tensor=tensor, scale=float(encoding.scale), offset=low - int(encoding.zero_point))
    return about, (codes.astype(np.int64) - low).astype(kind)


def _plain(values: Array) -> Array:
    """Strings as numpy's own: arrays of Python objects would be pickled."""
    return values.astype(str) if values.dtype == object else values


class _WrongCodes(Exception):
    """Codes of another type than `stored` writes."""


def restored(about: StoredTensor, values: Array) -> Array:
    """The inverse of `stored`.

    Raises:
        _WrongCodes: a tensor on a grid isn't kept in codes of one or two bytes.
    """
    if about.scale is None or about.offset is None:
        return np.asarray(values)
    if values.dtype not in (np.uint8, np.uint16):
        raise _WrongCodes(f"{about.tensor!r} is on a grid, and its values are {values.dtype} and not uint8 or uint16")
    return (np.asarray(values, np.int32) + about.offset).astype(np.float32) * np.float32(about.scale)


def write_arrays(
    path: Path,
    inputs: Mapping[str, Array],
    outputs: Sequence[TensorId],
    taps: Sequence[TensorId],
    values: Mapping[TensorId, Array],
    table: Mapping[str, Encoding],
    *,
    synthetic: bool,
    handed: Mapping[TensorId, Array] | None = None,
    budget: int = BUDGET,
) -> ReferenceRecord:
    """Write reference samples within a budget: all inputs, outputs, and taps that are spread over the network.

    Args:
        path: the .npz to write.
        inputs, values: arrays by name.
        outputs, taps: in the order of the network.
        table: encodings.
        synthetic: the inputs were made up.
        handed: what parts of the model were fed.
        budget: bytes of outputs and taps.
    """
    arrays: dict[str, Array] = {f"input/{i}": _plain(v) for i, v in enumerate(inputs.values())}
    made = {t: stored(t, values[t], table.get(t)) for t in dict.fromkeys([*outputs, *taps]) if t in values}
    sizes = {t: v.nbytes for t, (_, v) in made.items()}
    kept_outputs: list[TensorId] = []
    for tensor in outputs:
        if tensor in made and sum(sizes[t] for t in kept_outputs) + sizes[tensor] <= budget:
            kept_outputs.append(tensor)
    left = budget - sum(sizes[t] for t in kept_outputs)
    inside = [t for t in taps if t in made and t not in kept_outputs]
    kept_taps = spread(inside, sizes, left)
    for kind, tensors in (("output", kept_outputs), ("tap", kept_taps)):
        arrays |= {f"{kind}/{i}": made[t][1] for i, t in enumerate(tensors)}
    fed = [stored(t, v, table.get(t)) for t, v in (handed or {}).items()]
    arrays |= {f"handed/{i}": v for i, (_, v) in enumerate(fed)}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return ReferenceRecord(
        file=path.name,
        synthetic=synthetic,
        inputs=tuple(inputs),
        outputs=tuple(made[t][0] for t in kept_outputs),
        taps=tuple(made[t][0] for t in kept_taps),
        handed=tuple(about for about, _ in fed),
        left_out=len(made) - len(kept_outputs) - len(kept_taps),
    )


def spread(tensors: Sequence[TensorId], sizes: Mapping[TensorId, int], budget: int) -> list[TensorId]:
    """Every k-th tensor, for the smallest k with which they fit a budget; the last is always among those tried."""
    for step in range(1, len(tensors) + 1):
        chosen = list(tensors[::-1][::step])[::-1]
        if sum(sizes[t] for t in chosen) <= budget:
            return chosen
    return []


def read_reference(folder: Path, record: ReferenceRecord) -> Reference:
    """The reference samples of an export.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / record.file
    try:
        arrays = read_npz(path)
        return Reference(
            {name: np.array(arrays[f"input/{i}"]) for i, name in enumerate(record.inputs)},
            {a.tensor: restored(a, arrays[f"{kind}/{i}"]) for kind, abouts in
             (("output", record.outputs), ("tap", record.taps)) for i, a in enumerate(abouts)},
            tuple(a.tensor for a in record.outputs),
            record.synthetic,
            {a.tensor: restored(a, arrays[f"handed/{i}"]) for i, a in enumerate(record.handed)},
        )  # fmt: skip
    except KeyError as error:
        raise InputError(f"{path}: it lacks {error}; it isn't the file that the export wrote") from None
    except _WrongCodes as error:
        raise InputError(f"{path}: {error}; it isn't the file that the export wrote") from None


# -- the report
