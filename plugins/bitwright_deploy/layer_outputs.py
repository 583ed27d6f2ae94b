"""`layer_outputs`: every layer's output on disk, sample by sample, as the tools of targets dump and compare them.

The folder has AIMET's layout, which Qualcomm's tools and scripts around them read::

    inputs/input_0.raw                                  sample 0 (several inputs: inputs/input_0/<input>.raw)
    outputs/layer_outputs_0/<tensor>.raw                float32, one sample, its batch axis kept
    layer_output_name_order.json                        file stems in the order of the network
    input_list.txt                                      the inputs, as snpe-net-run and qnn-net-run take them
    index.json                                          tensor → file, shape, layout and grid
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.backend import Tap
from bitwright.data import DataLike, Dataset, FirstSamples, samples_in
from bitwright.errors import InputError
from bitwright.files import make_directory, write_text
from bitwright.graph import Graph
from bitwright.grids import Encoding
from bitwright.progress import Progress, stage
from bitwright.simulation import QuantSim
from bitwright_analysis.analyzer import opened
from bitwright_analysis.layer_errors import packed
from bitwright_deploy.tensor_names import file_names

INDEX = "index.json"
LAYOUTS = ("NHWC", "native")
FORMAT = 1
ORDER, INPUT_LIST = "layer_output_name_order.json", "input_list.txt"
OWN = {INDEX, ORDER, INPUT_LIST, "inputs", "outputs"}


class Stored(BaseModel):
    """One tensor of a dump.

    Attributes:
        file: stem of its files.
        shape: as written, one sample with its batch axis.
        native: the model's own shape.
        channels_last: whether the channel axis was moved to the end to write it.
        channel_axis: where the channels lie in `native`; null where that isn't known.
        op, type: what computes it; empty for a model input.
        inputs: the tensors that it is computed from.
        dtype: of the file's values; "float32" but for integer inputs.
        scale, zero_point, bits, signed: of its grid, where it has one grid for the whole tensor.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    file: str
    shape: tuple[int, ...]
    native: tuple[int, ...]
    channels_last: bool
    channel_axis: int | None = None
    op: str = ""
    type: str = ""
    inputs: tuple[str, ...] = ()
    dtype: str = "float32"
    scale: float | None = None
    zero_point: int | None = None
    bits: int | None = None
    signed: bool = False


class Index(BaseModel):
    """What `index.json` holds: tensors in the order of the network."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = FORMAT
    layout: str = "NHWC"
    quantized: bool = True
    samples: int = 0
    inputs: dict[str, Stored] = Field(default_factory=dict)
    tensors: dict[str, Stored] = Field(default_factory=dict)


@dataclass(frozen=True)
class Dump:
    """A folder that `layer_outputs` wrote.

    Attributes:
        path: the folder.
        index: what is in it.
    """

    path: Path
    index: Index

    @classmethod
    def open(cls, path: str | Path) -> Dump:
        """Open a dump.

        Raises:
            InputError: there is none, or its index can't be read.
        """
        path = Path(path)
        try:
            index = Index.model_validate_json((path / INDEX).read_text(encoding="utf-8"))
        except OSError:
            raise InputError(f"{path} has no {INDEX}; give a folder that `bitwright layer-outputs` wrote") from None
        except (ValidationError, UnicodeDecodeError) as error:
            raise InputError(f"{path / INDEX} can't be read: {error}") from None
        if index.format > FORMAT:
            raise InputError(f"{path / INDEX} was written by a newer bitwright")
        return cls(path, index)

    def file(self, tensor: str, sample: int) -> Path:
        """Where a tensor of one sample lies."""
        return self.path / "outputs" / f"layer_outputs_{sample}" / f"{self.index.tensors[tensor].file}.raw"

    def read(self, tensor: str, sample: int) -> NDArray[np.float32]:
        """One tensor of one sample, in the shape that was written.

        Raises:
            InputError: the file is missing or has another size.
        """
        file, shape = self.file(tensor, sample), self.index.tensors[tensor].shape
        try:
            values = np.fromfile(file, np.float32)
        except OSError as error:
            raise InputError(f"can't read {file}: {error}") from None
        if values.size != int(np.prod(shape)):
            raise InputError(f"{file} holds {values.size} values, {int(np.prod(shape))} are expected")
        return values.reshape(shape)


def layer_outputs(
    model: Any,
    data: DataLike,
    out: str | Path,
    *,
    layout: str = "NHWC",
    quantized: bool = True,
    tensors: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    sample: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Dump:
    """Write every float tensor that an op computes, one folder a sample.

    Tensors are what the simulation hands on, after their own quantization. Those whose channel axis is known and
    that have three or more axes are written with the channels last.

    Args:
        model: a `QuantSim` (calibrated if `quantized`), a model, or a path.
        data: samples in any accepted form.
        out: folder; an earlier dump there is replaced when the new one is whole.
        layout: "NHWC", or "native" for the model's own.
        quantized: of the simulated network, or the float one.
        tensors: only these; default: every one.
        limit: only the first so many samples; whole batches where the model fixes their size.
        batch_size: samples a batch.
        sample: one batch, for frameworks that trace a model.
        progress: where progress is shown.
        options: of `QuantSim`, for a model.

    Raises:
        InputError: an unknown layout or tensor, a folder that holds something else, or data that don't fit.
        EncodingError: `quantized`, but the `QuantSim` isn't calibrated.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout={layout!r}: layouts are {', '.join(LAYOUTS)}")
    out = Path(out)
    _check_free(out)
    sim = opened(model, sample, options, progress)
    dataset = FirstSamples(sim.open(data, batch_size=batch_size), limit, sim.fixed_batch)
    if quantized and not isinstance(model, QuantSim):
        sim.calibrate(dataset)
    wanted = _wanted(sim.graph, tensors)
    table: Mapping[str, Encoding] = sim.table if quantized else {}
    make_directory(out.parent)
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        make_directory(staging)
        writer = _Writer(staging, sim, layout, quantized, table)
        writer.inputs(dataset)
        writer.outputs(wanted, dataset)
        writer.finish()
        _move(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Dump.open(out)


def _check_free(out: Path) -> None:
    """Refuse a folder with anything in it that isn't of a dump: it would be lost.

    Raises:
        InputError: there is such a thing.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder")
    other = sorted(p.name for p in out.iterdir() if p.name not in OWN)
    if other or (any(out.iterdir()) and not (out / INDEX).is_file()):
        named = f" holds {other[0]!r}" if other else ""
        raise InputError(f"{out}{named} and would be replaced as a whole; choose another folder")


def _wanted(graph: Graph, asked: Sequence[str] | None) -> list[str]:
    computed = [t for op in graph for t in op.outputs if t in graph.tensors and graph.tensors[t].is_float]
    if asked is None:
        return computed
    if unknown := [t for t in asked if t not in computed]:
        raise InputError(
            f"no op computes a float tensor {unknown[0]!r}; `bitwright layer-outputs` without a choice lists all"
        )
    return [t for t in computed if t in set(asked)]


def channels_last(values: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """A tensor with its channels on the last axis; as it is where they are unknown or it has fewer than three axes."""
    if axis is None or values.ndim < 3 or axis % values.ndim in (0, values.ndim - 1):
        return values
    return np.ascontiguousarray(np.moveaxis(values, axis, -1))


class _Writer:
    def __init__(
        self, folder: Path, sim: QuantSim, layout: str, quantized: bool, table: Mapping[str, Encoding]
    ) -> None:
        self.folder, self.sim, self.layout, self.quantized, self.table = folder, sim, layout, quantized, table
        self.samples = 0
        self.stored: dict[str, Stored] = {}
        self.stored_inputs: dict[str, Stored] = {}
        self.names: dict[str, str] = {}

    def inputs(self, data: Dataset) -> None:
        names = file_names(self.sim.graph.inputs)
        (self.folder / "inputs").mkdir()
        lines = []
        for batch in data:
            length = samples_in(batch)
            for index in range(length):
                entries = []
                for name in self.sim.graph.inputs:
                    single = len(self.sim.graph.inputs) == 1
                    stem = f"input_{self.samples}" if single else f"input_{self.samples}/{names[name]}"
                    file = self.folder / "inputs" / f"{stem}.raw"
                    file.parent.mkdir(exist_ok=True)
                    values = np.asarray(batch[name])
                    values = values if length == 1 else values[index : index + 1]  # a whole feed isn't cut
                    self._write(file, name, values, names[name], self.stored_inputs)
                    entries.append(f"inputs/{stem}.raw" if single else f"{name}:=inputs/{stem}.raw")
                lines.append(" ".join(entries))
                self.samples += 1
        if not self.samples:
            raise InputError("the data are empty; give at least one sample")
        write_text(self.folder / INPUT_LIST, "\n".join(lines) + "\n")

    def outputs(self, tensors: Sequence[str], data: Dataset) -> None:
        self.names = file_names(tensors)
        for sample in range(self.samples):
            (self.folder / "outputs" / f"layer_outputs_{sample}").mkdir(parents=True)
        size = samples_in(next(iter(data)))
        groups = packed(self.sim.graph, tensors, size)
        with stage(self.sim.progress, "Writing layer outputs", len(groups) * self.samples):
            for group in groups:
                taps = [Tap(t) for t in group]
                session = (
                    self.sim.simulation.session(taps)
                    if self.quantized
                    else self.sim.backend.session(self.sim.native, taps)
                )
                begin = 0
                for batch in data:
                    length = samples_in(batch)
                    found = session.run(batch)
                    for tap in taps:
                        values = _by_sample(tap.tensor, np.asarray(found[tap]), length)
                        for index in range(length):
                            stem = self.names[tap.tensor]
                            file = self.folder / "outputs" / f"layer_outputs_{begin + index}" / f"{stem}.raw"
                            part = values if length == 1 else values[index : index + 1]
                            self._write(file, tap.tensor, part, stem, self.stored)
                    begin += length
                    self.sim.progress.advance(length)

    def _write(self, file: Path, tensor: str, values: NDArray[Any], stem: str, into: dict[str, Stored]) -> None:
        known = self.sim.graph.tensors.get(tensor)
        axis = None if known is None else known.channel_axis
        native = np.ascontiguousarray(values, values.dtype if values.dtype.kind in "iub" else np.float32)
        written = channels_last(native, axis) if self.layout == "NHWC" else native
        written.tofile(file)
        if tensor not in into:
            into[tensor] = self._record(tensor, stem, native, written, axis)

    def _record(self, tensor: str, stem: str, native: NDArray[Any], written: NDArray[Any], axis: int | None) -> Stored:
        op, grid = self.sim.graph.producer(tensor), self.table.get(tensor)
        single = grid is not None and grid.scale.ndim == 0 and grid.float_format is None
        return Stored(
            file=stem,
            shape=written.shape,
            native=native.shape,
            channels_last=written is not native,
            channel_axis=axis,
            op="" if op is None else op.id,
            type="" if op is None else op.type,
            inputs=() if op is None else op.data_inputs,
            dtype=native.dtype.name,
            **(
                {
                    "scale": float(grid.scale),
                    "zero_point": int(grid.zero_point),
                    "bits": grid.bits,
                    "signed": grid.signed,
                }
                if single and grid is not None
                else {}
            ),
        )

    def finish(self) -> None:
        ordered = [t for t in self.names if t in self.stored]
        index = Index(
            layout=self.layout,
            quantized=self.quantized,
            samples=self.samples,
            inputs=self.stored_inputs,
            tensors={t: self.stored[t] for t in ordered},
        )
        order = {"layer_output_names": [self.stored[t].file for t in ordered]}
        write_text(self.folder / ORDER, json.dumps(order, indent=1) + "\n")
        write_text(self.folder / INDEX, index.model_dump_json(indent=1) + "\n")


def _by_sample(tensor: str, values: NDArray[Any], length: int) -> NDArray[Any]:
    """A tensor whose first axis is samples; with one sample a batch, any tensor is one."""
    if values.ndim and len(values) == length:
        return values
    if length == 1:
        return values[None]
    raise InputError(
        f"{tensor!r} has shape {values.shape} for {length} samples: its first axis isn't samples, so it can't be "
        "written sample by sample; leave it out (tensors=…), or use batch_size=1"
    )


def _move(staging: Path, out: Path) -> None:
    """Put the finished folder in place; an earlier dump goes only when the new one is there."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.replace(old)
    staging.replace(out)
    shutil.rmtree(old, ignore_errors=True)
