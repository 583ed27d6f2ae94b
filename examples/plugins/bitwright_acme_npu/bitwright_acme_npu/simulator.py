"""The NPU's arithmetic, bit by bit, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitwright.backend import Batch, Tap
from bitwright.errors import InputError
from bitwright_acme_npu.compiler import multiplier
from bitwright_acme_npu.program import Grid, Instruction, Program

Codes = np.ndarray[Any, np.dtype[np.int64]]


class NpuSession:
    """A program, ready to run (`bitwright.backend.Session`).

    Args:
        program: as the compiler makes it.
        taps: tensors that are wanted beside the outputs, in real numbers; those that are fused away are left out.
    """

    def __init__(self, program: Program, taps: Sequence[str] = ()) -> None:
        self.program = program
        self.wanted = list(dict.fromkeys([*program.outputs, *(t for t in taps if t in program.grids)]))

    def run(self, batch: Batch) -> Mapping[Tap, np.ndarray]:
        """The outputs, then the taps."""
        if missing := [name for name in self.program.inputs if name not in batch]:
            raise InputError(f"the batch has no array for input {missing[0]!r}")
        codes = {name: quantize(np.asarray(batch[name]), self.program.grids[name]) for name in self.program.inputs}
        for step in self.program.instructions:
            reads = [(codes[t], self.program.grids[t]) for t in step.reads]
            codes[step.writes] = execute(step, reads, self.program.grids[step.writes], self.program.arrays)
        grids = self.program.grids
        return {Tap(t): ((codes[t] - grids[t].zero) * np.float32(grids[t].scale)).astype(np.float32)
                for t in self.wanted}  # fmt: skip


def quantize(values: np.ndarray, grid: Grid) -> Codes:
    """Real numbers to codes, halves away from zero."""
    steps = values.astype(np.float64) / grid.scale
    return np.clip(np.sign(steps) * np.floor(np.abs(steps) + 0.5) + grid.zero, 0, 255).astype(np.int64)


def rescaled(values: Codes, mantissa: Any, shift: Any) -> Codes:
    """values · mantissa · 2^−shift in integers, halves away from zero: the NPU's requantization."""
    product = np.abs(values) * np.asarray(mantissa, np.int64)
    return np.sign(values) * ((product + (np.int64(1) << (np.asarray(shift, np.int64) - 1))) >> shift)


def execute(step: Instruction, reads: Any, grid: Grid, arrays: Mapping[str, np.ndarray]) -> Codes:
    """One instruction."""
    own = {key: arrays[name] for key, name in step.arrays.items()}
    (codes, source), n = reads[0], step.numbers
    match step.op:
        case "conv" | "linear":
            sums = (_conv if step.op == "conv" else _linear)(codes - source.zero, own["weight"], n)
            along = (1, -1, *(1,) * (sums.ndim - 2)) if step.op == "conv" else (-1,)
            mantissa, shift = (own["factors"][:, i].reshape(along) for i in (0, 1))
            found = rescaled(sums + own["bias"].reshape(along), mantissa, shift)
        case "add":
            parts = [rescaled(c - g.zero, *factor) for (c, g), factor in zip(reads, n["factors"], strict=True)]
            found = parts[0] + parts[1]
        case "rescale":
            found = rescaled(codes - source.zero, *n["factor"])
        case "average":
            axes = tuple(n["axes"])
            count = np.prod([codes.shape[a] for a in axes])
            sums = (codes - source.zero).sum(axis=axes, keepdims=n["keepdims"])
            found = rescaled(sums, *multiplier(n["scale"] / count))
        case "reshape":
            return codes.reshape(len(codes), *n["shape"])
        case _:
            raise InputError(f"the NPU knows no instruction {step.op!r}")
    return np.clip(found + grid.zero, n.get("low", 0), n.get("high", 255))


def _linear(x: Codes, weight: np.ndarray, numbers: Mapping[str, Any]) -> Codes:
    return x @ weight.astype(np.int64).T


def _conv(x: Codes, weight: np.ndarray, numbers: Mapping[str, Any]) -> Codes:
    groups, kernel = numbers["groups"], weight.shape[2:]
    windows = _windows(x, kernel, numbers)
    parts = np.split(windows, groups, axis=1), np.split(weight.astype(np.int64), groups, axis=0)
    axes = [1, *range(-len(kernel), 0)], [1, *range(2, weight.ndim)]
    sums = [np.moveaxis(np.tensordot(a, w, axes), -1, 1) for a, w in zip(*parts, strict=True)]
    return np.concatenate(sums, axis=1)


def _windows(x: Codes, kernel: Sequence[int], numbers: Mapping[str, Any]) -> Codes:
    """(samples, channels, *positions, *kernel) of (samples, channels, *spatial)."""
    x = np.pad(x, [(0, 0), (0, 0), *map(tuple, numbers["pads"])])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, numbers["dilations"], strict=True)]
    axes = tuple(range(2, 2 + len(kernel)))
    found = np.lib.stride_tricks.sliding_window_view(x, reach, axes)
    step = [slice(None), slice(None), *(slice(None, None, s) for s in numbers["strides"]),
            *(slice(None, None, d) for d in numbers["dilations"])]  # fmt: skip
    return found[tuple(step)]
