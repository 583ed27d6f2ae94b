"""Latency tables: seconds of an op at given bit widths, from a file, or measured on an integer runtime.

A table is JSON: ``{"schema_version": 1, "entries": [...]}`` with an entry for each thing that was measured::

    {"op": "features.0", "weights": 8, "activations": 8, "seconds": 1.2e-4}
    {"type": "Conv", "shape": [64, 3, 3, 3], "weights": 4, "activations": 8, "seconds": 0.9e-4}
    {"type": "Conv", "weights": 8, "activations": 8, "seconds_per_mac": 2.1e-11}

The first that fits is used: the op by its name, then type and weight shape, then type with seconds for each
multiply-accumulate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitwright.errors import InputError
from bitwright.files import write_text
from bitwright.graph import Graph, OpId


@runtime_checkable
class LatencyModel(Protocol):
    """Cost of an op at given bit widths, measured on a target: what `mixed_precision(cost="latency")` needs."""

    def cost(self, op: OpId, weight_bits: int, activation_bits: int) -> float:
        """Seconds for one sample."""


class Entry(BaseModel):
    """One measured figure."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    op: str | None = None
    type: str | None = None
    shape: tuple[int, ...] | None = None
    weights: int = Field(ge=2, le=32)
    activations: int = Field(ge=2, le=32)
    seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    seconds_per_mac: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_each(self) -> Entry:
        if (self.op is None) == (self.type is None):
            raise ValueError("an entry names either an op or a type")
        if (self.seconds is None) == (self.seconds_per_mac is None):
            raise ValueError("an entry has either seconds or seconds_per_mac")
        if self.type is not None and (self.shape is None) != (self.seconds is None):
            raise ValueError("a type goes with a shape and seconds, or without a shape and with seconds_per_mac")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    entries: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class LatencyTable:
    """Entries as a file holds them; `bind` makes a `LatencyModel` of them for one network."""

    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> LatencyTable:
        """From a file, or decoded JSON.

        Raises:
            InputError: unreadable, or not such a table; names the entry.
        """
        where = "latency table" if isinstance(source, Mapping) else str(source)
        try:
            content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
            return cls(_File.model_validate(content).entries)
        except OSError as error:
            raise InputError(f"can't read {where}: {error.strerror or error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except ValueError as error:
            raise InputError(f"{where} isn't JSON: {error}") from error

    def write(self, path: str | Path) -> Path:
        """Write it as a file that `read` takes."""
        entries = [e.model_dump(mode="json", exclude_none=True) for e in self.entries]
        return write_text(path, json.dumps({"schema_version": 1, "entries": entries}, indent=1) + "\n")

    def bind(self, graph: Graph, macs: Mapping[OpId, int]) -> TableLatency:
        """A latency model for a network whose multiply-accumulates are known."""
        return TableLatency(self.entries, graph, macs)


class TableLatency(LatencyModel):
    """`LatencyModel` by look-up.

    Args:
        entries: what was measured.
        graph: the network.
        macs: multiply-accumulates by op.
    """

    def __init__(self, entries: Sequence[Entry], graph: Graph, macs: Mapping[OpId, int]) -> None:
        self._graph, self._macs = graph, macs
        self._by_key = {(e.op or e.type, e.shape, e.weights, e.activations): e for e in reversed(entries)}

    def cost(self, op: OpId, weight_bits: int, activation_bits: int) -> float:
        """Seconds for one sample.

        Raises:
            InputError: the table has no entry that fits; names the op and the widths.
        """
        node, macs = self._graph.op(op), self._macs.get(op, 0)
        shape = self._graph.params[node.weight].shape if node.weight is not None else None
        for key in ((op, None), (node.type, shape), (node.type, None)):
            entry = self._by_key.get((*key, weight_bits, activation_bits))
            if entry is not None:
                return entry.seconds if entry.seconds is not None else float(entry.seconds_per_mac or 0.0) * macs
        shown = "" if shape is None else f", weight {shape}"
        raise InputError(
            f"the latency table has nothing for op {op!r} ({node.type}{shown}) with {weight_bits}-bit weights and "
            f"{activation_bits}-bit activations; add an entry, or measure one with measure_latency"
        )


def read_latency(given: Any, graph: Graph, macs: Mapping[OpId, int]) -> LatencyModel | None:
    """What the user gave as `latency`: None, a `LatencyModel`, a table, a path, or decoded JSON.

    Raises:
        InputError: none of these, or an invalid table.
    """
    if given is None:
        return None
    if isinstance(given, LatencyTable):
        return given.bind(graph, macs)
    if isinstance(given, str | Path | Mapping):
        return LatencyTable.read(given).bind(graph, macs)
    if isinstance(given, LatencyModel):
        return given
    raise InputError(f"latency={given!r}: give a table, a path or a LatencyModel")


def per_mac(seconds: Mapping[OpId, float], macs: Mapping[OpId, int]) -> float:
    """Seconds for each multiply-accumulate over several ops; 0 where none has any."""
    total = sum(macs.get(op, 0) for op in seconds)
    return math.fsum(seconds.values()) / total if total else 0.0
