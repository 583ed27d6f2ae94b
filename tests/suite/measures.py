"""How far two outputs lie apart, and how far the float model itself moves when its inputs are put on a grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = Any
SAME_DB = 200.0
_TYPE_DB = {"float16": 60.0, "bfloat16": 42.0, "float8_e4m3fn": 18.0, "float8_e5m2": 12.0}
"""Half a unit in the last place of every value, and some more of them."""


@dataclass(frozen=True)
class Distance:
    """Of one output.

    Attributes:
        decibels: signal to noise of floats; `SAME_DB` where equal, −inf where they can't be compared.
        type_db: what one rounding to the output's own type leaves, which nothing needs to exceed.
        differs: share of elements that differ, of integers, booleans and strings.
        why: shapes, types or infinities that differ; empty otherwise.
    """

    decibels: float
    differs: float = 0.0
    why: str = ""
    type_db: float = SAME_DB

    def close(self, decibels: float) -> bool:
        """Integers equal, floats near."""
        return not self.why and self.differs == 0 and self.decibels >= min(decibels, self.type_db)

    @property
    def rank(self) -> tuple[bool, float, float]:
        return not self.why, -self.differs, self.decibels

    def __str__(self) -> str:
        if self.why:
            return self.why
        if self.differs:
            return f"{100 * self.differs:.3g} % of the elements differ"
        return f"{self.decibels:.1f} dB"


def distance(signal: Array, noisy: Array) -> Distance:
    """Of `noisy` from `signal`."""
    a, b = np.asarray(signal), np.asarray(noisy)
    if a.dtype != b.dtype or a.shape != b.shape:
        return Distance(float("-inf"), why=f"{b.dtype}{list(b.shape)} in place of {a.dtype}{list(a.shape)}")
    if a.size == 0:
        return Distance(SAME_DB)
    if not is_float(a):
        return Distance(SAME_DB, differs=float(np.mean(a != b)))
    type_db = _TYPE_DB.get(a.dtype.name, SAME_DB)
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a)
    if not (np.isfinite(b) == finite).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Distance(float("-inf"), why="NaN or infinity where the other has none")
    noise, power = float(np.square(b[finite] - a[finite]).sum()), float(np.square(a[finite]).sum())
    if noise == 0:
        return Distance(SAME_DB)
    return Distance(min(SAME_DB, 10 * float(np.log10(max(power, 1e-300) / noise))), type_db=type_db)


def undefined(real: Array) -> str:
    """What of a float output integers have no codes for, in words; empty where there is nothing."""
    values = np.asarray(real)
    missing = int(np.isnan(values.astype(np.float64)).sum()) if is_float(values) else 0
    return f"{missing} of {values.size} values are NaN in float, which no integer is" if missing else ""


def defined(real: Array, *others: Array) -> tuple[Array, ...]:
    """Outputs without the elements that are NaN in the float model."""
    values = np.asarray(real)
    if not undefined(values) or any(np.shape(o) != values.shape for o in others):
        return others
    kept = ~np.isnan(values.astype(np.float64))
    return tuple(np.asarray(o)[kept] for o in others)


def equal(expected: Array, got: Array, tolerance: float) -> str:
    """What differs beyond float rounding, in words; empty where nothing does."""
    a, b = np.asarray(expected), np.asarray(got)
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{b.dtype}{list(b.shape)} in place of {a.dtype}{list(a.shape)}"
    if not is_float(a):
        return "" if np.array_equal(a, b) else f"{100 * float(np.mean(a != b)):.3g} % of the elements differ"
    eps = {2: 4e-3, 1: 0.25}.get(a.dtype.itemsize, 0.0)
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a)
    scale = float(np.abs(a[finite]).max(initial=0.0))
    near = np.isclose(a, b, rtol=max(tolerance, eps), atol=max(tolerance, eps) * scale * 0.1 + 1e-9, equal_nan=True)
    if near.all():
        return ""
    with np.errstate(invalid="ignore"):
        return f"{100 * float(1 - near.mean()):.3g} % of the elements differ, by up to {np.nanmax(np.abs(a - b)):.3g}"


def is_float(array: Array) -> bool:
    """Whether an array holds real numbers, ml_dtypes' included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat16", "float8", "float4"))


class Reach:
    """What inputs on their grids do to the float model.

    Args:
        sim: a calibrated `QuantSim`.
        feed: the one run.
    """

    DRAWS = 4

    def __init__(self, sim: Any, feed: Any) -> None:
        self.sim, self.feed = sim, feed

    @cached_property
    def steps(self) -> dict[str, float]:
        """Each quantized float input's step."""
        found = {}
        for name in self.sim.graph.inputs:
            if is_float(np.asarray(self.feed.inputs[name])):
                site = self.sim.plan.root(name) if name in self.sim.plan else name
                grid = self.sim.table[site] if name in self.sim.plan and site in self.sim.table else None
                found[name] = 0.0 if grid is None or grid.float_format else float(np.max(grid.scale))
        return found

    def _run(self, inputs: dict[str, Array]) -> list[Array]:
        return self.sim.predict(type(self.feed)(inputs), simulated=False)

    @cached_property
    def on_grid(self) -> list[Array]:
        """The float model's outputs on the inputs as the simulation rounds them."""
        from bitwright.backend import Tap

        taps = [Tap(n) for n, step in self.steps.items() if step]
        rounded = self.sim.simulation.session(taps).run(dict(self.feed.inputs)) if taps else {}
        return self._run({**self.feed.inputs, **{tap.tensor: np.asarray(v) for tap, v in rounded.items()}})

    @cached_property
    def moved(self) -> list[list[Array]]:
        """The float model's outputs with inputs moved by up to half a step."""
        results = []
        for seed in range(self.DRAWS):
            rng = np.random.default_rng(seed)
            inputs = {}
            for name, value in self.feed.inputs.items():
                step = self.steps.get(name, 0.0)
                noise = rng.choice([-0.5, 0.5], np.shape(value)) * step
                inputs[name] = (np.asarray(value) + noise).astype(np.asarray(value).dtype) if step else value
            results.append(self._run(inputs))
        return results

    def inside(self) -> Iterator[tuple[str, list[Array]]]:
        """Each quantized tensor inside, and the float model's outputs with that tensor moved by half a step.

        Only where the step is the one that the tensor's own float values ask for: a grid that is too wide for them
        is the simulation's fault.
        """
        from bitwright.backend import Tap
        from bitwright.errors import ModelError

        sim, graph = self.sim, self.sim.graph
        outputs = [Tap(t) for t in graph.outputs]
        for site in sim.activation_sites():
            grid = sim.table.get(sim.plan.root(site))
            if site in graph.inputs or grid is None or grid.float_format:
                continue
            values = np.asarray(sim.backend.session(sim.native, [Tap(site)]).run(dict(self.feed.inputs))[Tap(site)])
            fair = (max(float(values.max()), 0.0) - min(float(values.min()), 0.0)) / (2**16 - 1)
            step = float(np.max(grid.scale))
            if step > 1.01 * fair:
                continue
            noise = np.random.default_rng(0).choice([-0.5, 0.5], values.shape) * step
            fed = {**self.feed.inputs, site: (values + noise).astype(values.dtype)}
            try:
                run = sim.backend.segment(sim.native, [*graph.inputs, site], outputs).run(fed)
            except ModelError:
                continue
            yield site, [run[tap] for tap in outputs]

    def excuse(self, index: int, measured: Distance, wanted: float) -> str:
        """Why an output can't be compared at 16 bits; empty if it can.

        The float model must itself move as far, within 6 dB, when its inputs, or one of the tensors inside, move by
        half a step: nothing that rounds them to 16 bits could do better. Below 0 dB, where nothing is left of the
        signal, it is chance how much larger the error is.
        """
        if measured.why:
            return ""
        base: Sequence[Array] = self._run(dict(self.feed.inputs))
        worst = min((distance(base[index], m[index]) for m in self.moved), key=lambda d: d.rank)
        if told := _as_far(worst, measured, wanted):
            return f"half a step of the inputs {told}"
        for site, outputs in self.inside():
            if told := _as_far(distance(base[index], outputs[index]), measured, wanted):
                return f"half a step of {site!r} {told}"
        return ""


def _as_far(moved: Distance, measured: Distance, wanted: float) -> str:
    """How the float model moved, if it moved as far as the simulation did; else empty."""
    if moved.why:
        return f"gives {moved.why}"
    if measured.differs and moved.differs >= measured.differs / 2:
        return f"changes {100 * moved.differs:.3g} % of the elements"
    lost = measured.decibels < 0 and moved.decibels < 0
    if not measured.differs and (lost or moved.decibels <= min(wanted, measured.decibels + 6)):
        return f"leaves {moved.decibels:.0f} dB of the float model itself"
    return ""
