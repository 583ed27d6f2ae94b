"""Do the exact integers equal the integer runtime? Each op is compared from the runtime's own operands.

So an op that the exact view doesn't cover hides none behind it, and a difference is named where it arises. Covered
ops must give the very codes. The others (`IntegerSimulation.uncovered`) are compared as float: a last bit may move a
value by one code, and further codes are a difference only where they are more than a few.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.graph import OpId, TensorId
from bitwright.grids import Encoding
from bitwright.verify._integer import IntegerSimulation

ROUNDING_STEPS = 1
"""Grid steps by which one op in float may depart where a last bit decides."""
FLOAT_NOISE = 1e-4
"""Noise power that a tensor without a grid may have beside the runtime's, as a share of the signal's (40 dB)."""
OFF_GRID = 0.01
"""Part of a grid step by which a value on the grid may be off it: float32's rounding of 16-bit codes is 0.004."""
STRAYS = 0.01
"""Share of a tensor's values that may depart further in an op that isn't covered: sums in float that cancel."""


@dataclass
class Departure:
    """How far one tensor's codes depart from the runtime's, each op from the runtime's own operands.

    Attributes:
        values: how many were compared.
        different: how many are another code.
        beyond: how many are off by more than `ROUNDING_STEPS`.
        steps: the largest departure, in grid steps.
        off_grid: how many of the runtime's values lie on no point of the grid.
        noise, power: in place of these, of a tensor without a grid: Σ departure² and Σ value².
    """

    values: int = 0
    different: int = 0
    beyond: int = 0
    steps: int = 0
    off_grid: int = 0
    noise: float = 0.0
    power: float = 0.0

    def add_real(self, ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        """Count the values of one batch of a tensor that has no grid."""
        signal, other = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
        self.values += signal.size
        finite = np.isfinite(signal)
        if signal.shape != other.shape or not np.array_equal(finite, np.isfinite(other)):
            self.noise = np.inf
            return
        self.power += float(np.square(signal[finite]).sum())
        self.noise += float(np.square(other[finite] - signal[finite]).sum())

    def add_equal(self, values: int) -> None:
        """Count the values of one batch that are all the same codes."""
        self.values += values

    def add(self, steps: NDArray[np.integer], rounding: NDArray[np.floating] | float = 0.0) -> None:
        """Count the values of one batch; `rounding` is what the tensor's own type moves them by, in steps."""
        self.values += steps.size
        self.different += int((steps > 0).sum())
        self.beyond += int((steps > ROUNDING_STEPS + rounding).sum())
        self.steps = max(self.steps, int(steps.max(initial=0)))


LAST_PLACE = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Unit in the last place, as a part of the value, of types that are coarser than grids of 16 bits."""


@dataclass(frozen=True)
class Exactness:
    """What `Examination.result` found.

    Attributes:
        covered: tensors that were compared code by code.
        loose: tensors that were compared as float, with the reason.
        uncovered: ops that the exact view doesn't cover, with the reason.
        departures: of every tensor compared.
        problems: what departs beyond what it may, the first in the graph first.
    """

    covered: tuple[TensorId, ...] = ()
    loose: Mapping[TensorId, str] = field(default_factory=dict)
    uncovered: Mapping[OpId, str] = field(default_factory=dict)
    departures: Mapping[TensorId, Departure] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class Examination:
    """Compares an exact integer simulation with a runtime, batch by batch.

    Args:
        simulation: the exact view.
        tensors: what the runtime hands out.
        foreign: why no op is covered, where the runtime isn't the one whose kernels the exact view follows.
    """

    def __init__(
        self, simulation: IntegerSimulation, tensors: Collection[TensorId], *, foreign: str | None = None
    ) -> None:
        self._simulation = simulation
        made = {t for op in simulation.graph.ops for t in op.outputs}
        floats = {t for t in made if t in simulation.graph.tensors and simulation.graph.tensors[t].is_float}
        self._grids: dict[TensorId, Encoding | None] = {}
        for t in simulation.written:
            if t in floats and t in tensors:
                encoding = simulation.table.get(t)
                self._grids[t] = encoding if encoding is not None and encoding.is_fixed else None
        self._given = frozenset(t for t, e in self._grids.items() if e is not None)
        self._own = foreign is None
        self.uncovered = (
            dict(simulation.uncovered) if foreign is None else {op.id: foreign for op in simulation.graph.ops}
        )
        self._loose = self._reasons()
        self._last_places = self._coarsest()
        self._departures = {t: Departure() for t in self._grids}

    def _reasons(self) -> dict[TensorId, str]:
        """Tensors whose values an op that isn't covered has a part in, since the last that the runtime handed out."""
        loose: dict[TensorId, str] = {}
        for op in self._simulation.graph.ops:
            behind = next((loose[t] for t in op.data_inputs if t in loose and t not in self._given), None)
            reason = self.uncovered.get(op.id)
            why = f"{op.id!r}: {reason}" if reason is not None else behind
            if why is not None:
                loose.update(dict.fromkeys(op.outputs, why))
        return loose

    def _coarsest(self) -> dict[TensorId, float]:
        """Each tensor's last place: its own type's, or that of a coarser one since the last that the runtime gave."""
        tensors = self._simulation.graph.tensors
        coarsest: dict[TensorId, float] = {}
        for op in self._simulation.graph.ops:
            behind = max((coarsest.get(t, 0.0) for t in op.data_inputs if t not in self._given), default=0.0)
            coarsest.update({t: max(behind, LAST_PLACE.get(tensors[t].dtype, 0.0)) for t in op.outputs if t in tensors})
        return coarsest

    def add(self, batch: Batch, runtime: Mapping[TensorId, NDArray[Any]]) -> None:
        """Compare one batch.

        Args:
            batch: the model's inputs.
            runtime: real values of the tensors, as the runtime computed them for it.
        """
        wanted = [t for t in self._grids if t in runtime]
        given = {t: np.asarray(runtime[t]) for t in wanted if t in self._given}
        codes = self._simulation.codes(batch, wanted, given)
        for t in wanted:
            grid = self._grids[t]
            if grid is None:
                self._departures[t].add_real(codes[t], np.asarray(runtime[t]))
                continue
            theirs = grid.quantize(given[t]).astype(np.int64)
            if self._own and self._simulation.graph.tensors[t].dtype == "float32":
                moved = np.abs(grid.dequantize(theirs) - given[t]) > OFF_GRID * grid.spread(theirs.shape)[0]
                self._departures[t].off_grid += int(moved.sum())
            ours = codes[t].astype(np.int64)
            if np.array_equal(ours, theirs):
                self._departures[t].add_equal(ours.size)
            elif ours.shape != theirs.shape:
                self._departures[t].add(np.full(ours.shape, np.iinfo(np.int32).max))
            else:
                finite = np.isfinite(given[t].astype(np.float64))
                last, rounding = self._last_places.get(t, 0.0), np.zeros(())
                if last:
                    # Of the largest value, not of each: what is rounded are terms, whose sum may be near zero.
                    largest = np.abs(given[t].astype(np.float64)).max(initial=0.0, where=finite)
                    rounding = last * largest / grid.spread(theirs.shape)[0]
                # No integer stands for NaN: what codes it gets is nobody's promise. Outputs that hold some are told.
                defined = (ours >= grid.grid.qmin) & (ours <= grid.grid.qmax) & finite
                steps = np.where(defined, np.abs(ours - theirs), 0)
                self._departures[t].add(steps, rounding)

    def result(self) -> Exactness:
        """What was found."""
        problems = [p for t in self._grids if (p := self._problem(t, self._departures[t])) is not None]
        return Exactness(
            tuple(t for t in self._grids if t in self._given and t not in self._loose),
            {t: self._loose.get(t, "it has no grid") for t in self._grids if t not in self._given or t in self._loose},
            self.uncovered,
            self._departures,
            tuple(problems),
        )

    def _problem(self, tensor: TensorId, found: Departure) -> str | None:
        if self._grids[tensor] is None:
            if found.noise <= FLOAT_NOISE * found.power:
                return None
            db = 10 * float(np.log10(max(found.power, 1e-300) / found.noise))
            return f"{tensor}: the runtime departs from the simulated op, {db:.1f} dB beside it"
        if found.off_grid:
            share = f"{found.off_grid} of {found.values}"
            return f"{tensor}: {share} values in the runtime don't lie on the grid of the encodings file"
        share = f"{found.different} of {found.values} codes, by up to {found.steps} steps"
        if tensor not in self._loose:
            return f"{tensor}: the exact integers differ from the runtime in {share}" if found.different else None
        if found.beyond <= STRAYS * found.values:
            return None
        return f"{tensor}: the runtime departs from the simulated op in {share} ({self._loose[tensor]})"
