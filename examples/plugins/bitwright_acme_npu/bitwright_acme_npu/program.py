"""Programs of the NPU: instructions on integer tensors, each on one grid; stored as plain arrays and JSON."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import InputError
from bitwright.files import atomic_write


@dataclass(frozen=True)
class Grid:
    """real = (code − zero) · scale, codes 0 to 255."""

    scale: float
    zero: int


@dataclass(frozen=True)
class Instruction:
    """One step: `op` of tensors `reads` gives tensor `writes`.

    Attributes:
        numbers: shapes, strides and bounds, by name.
        arrays: names of the program's arrays that it uses, by what they are to it.
    """

    op: str
    reads: list[str]
    writes: str
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)


@dataclass
class Program:
    """Instructions in order, grids of all tensors, and integer arrays."""

    inputs: list[str]
    outputs: list[str]
    grids: dict[str, Grid] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def write_program(program: Program, path: Path) -> Path:
    """Write a program, whole or not at all."""
    head = {
        "inputs": program.inputs,
        "outputs": program.outputs,
        "grids": {name: asdict(grid) for name, grid in program.grids.items()},
        "instructions": [asdict(i) for i in program.instructions],
    }
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, program=text, **program.arrays)
    return path


def read_program(path: Path) -> Program:
    """Read a program.

    Raises:
        InputError: it isn't one, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        head = json.loads(arrays.pop("program").tobytes())
        grids = {name: Grid(**grid) for name, grid in head["grids"].items()}
        instructions = [Instruction(**i) for i in head["instructions"]]
        return Program(head["inputs"], head["outputs"], grids, instructions, arrays)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no program of the Acme NPU, or it is damaged ({error})") from error
