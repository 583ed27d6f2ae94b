"""The record of an export: decisions, digests, hashes and reference samples, written with it and read back."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import atomic_write, discard, read_npz, write_text
from bitwright.graph import TensorId
from bitwright.grids import Encoding
from bitwright.report import REPORT, BundleRecord, ReferenceRecord, RunReport, StoredTensor, named
from bitwright.runs import of_arrays, of_file

if TYPE_CHECKING:
    from bitwright.bundle._export_gate import Simulated
    from bitwright.bundle._samples import Samples
    from bitwright.simulation import QuantSim

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


def write_with(
    sim: QuantSim,
    folder: Path,
    name: str,
    files: Mapping[str, Path],
    names: Mapping[str, str],
    run: Simulated | str,
    *,
    missing: Mapping[str, str],
    compared: int,
    not_compared: Mapping[TensorId, str],
    stored_anew: Sequence[str] = (),
) -> RunReport:
    """Write an export's reference samples and report beside its other files.

    Args:
        sim: the simulation that is exported.
        folder: holds all files of the export, and nothing else.
        name: its stem.
        files: them by purpose.
        names: site → name in the files, where they differ.
        run: the native simulation on reference samples; or why there is none.
        missing: formats that couldn't be written, with the reason.
        compared, not_compared: what the gate found.
        stored_anew: weights that are kept in another type.
    """
    from bitwright.report import build_report, dumped

    reference = None if isinstance(run, str) else _write_reference(sim, folder / f"{name}{ARRAYS_SUFFIX}", run)
    record = BundleRecord(
        contents=hashes(sorted(folder.iterdir()), folder),
        parameters={names.get(p, p): of_arrays([("", sim.params[p])])[:16] for p in sim.graph.params},
        missing=dict(missing),
        reference=reference,
        without_reference=run if isinstance(run, str) else "",
        compared=compared,
        not_compared=dict(not_compared),
        stored_anew=tuple(stored_anew),
    )
    by_purpose = {purpose: path.name for purpose, path in files.items()}
    if reference is not None:
        by_purpose["record"] = reference.file
    source = sim.source.name if sim.source is not None else type(sim.native).__name__
    report = build_report(sim, name=name, source=source, files=by_purpose, record=record, names=names)
    write_text(folder / REPORT, dumped(report))
    return report


def _write_reference(sim: QuantSim, path: Path, run: Simulated) -> ReferenceRecord:
    from bitwright.bundle._export_gate import run_simulated

    table = sim.table
    fewer = run.samples.first(1)
    if _count(fewer) < _count(run.samples) and _exceeds(run.values, table):
        run = run_simulated(sim, fewer)
    return write_arrays(
        path, run.samples.inputs, sim.graph.outputs, list(run.values), run.values, table,
        synthetic=run.samples.synthetic,
    )  # fmt: skip


def _exceeds(values: Mapping[TensorId, Array], table: Mapping[str, Encoding]) -> bool:
    """Whether stored tensors take more than `BUDGET`; no value is looked at where a byte for each is too much."""
    least = sum(v.size for v in values.values() if v.dtype != object)
    return least > BUDGET or sum(stored(t, v, table.get(t))[1].nbytes for t, v in values.items()) > BUDGET


def _count(samples: Samples) -> int:
    return sum(v.size for v in samples.inputs.values())


def unseal(folder: Path, name: str) -> None:
    """Take away what says that an export of this name is whole; another export's report gets its own name."""
    report = folder / REPORT
    other = named(report)
    if other is not None and other != name and (folder / f"{other}.encodings").exists():
        report.replace(folder / f"{other}.{REPORT}")
    for path in (folder / f"{name}.encodings", report, folder / f"{name}.{REPORT}", folder / "report.html"):
        discard(path)


# -- arrays


@dataclass(frozen=True)
class Reference:
    """Reference samples, read back.

    Attributes:
        inputs: as the model was fed.
        tensors: outputs and taps of the native simulation, in float.
        outputs: which of them are the model's outputs.
        synthetic: the inputs were made up.
    """

    inputs: dict[str, Array]
    tensors: dict[TensorId, Array]
    outputs: tuple[TensorId, ...]
    synthetic: bool = False


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


def restored(about: StoredTensor, values: Array) -> Array:
    """The inverse of `stored`."""
    if about.scale is None or about.offset is None:
        return np.asarray(values)
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
    budget: int = BUDGET,
) -> ReferenceRecord:
    """Write reference samples within a budget: all inputs, outputs, and taps that are spread over the network.

    Args:
        path: the .npz to write.
        inputs, values: arrays by name.
        outputs, taps: in the order of the network.
        table: encodings.
        synthetic: the inputs were made up.
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
        )  # fmt: skip
    except KeyError as error:
        raise InputError(f"{path}: it lacks {error}; it isn't the file that the export wrote") from None


# -- the report
