"""What the parts of the backend contract share: cases, sessions, and the core's own idea of each op."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, Session, Simulation, Tap
from bitwright.calibration import weight_encodings
from bitwright.graph import (
    BatchNormAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    ParamRole,
    TensorId,
    columns,
    input_channels,
    output_channels,
    to_matrix,
)
from bitwright.grids import Encoding, EncodingTable, dynamic_encoding, encoding_from_range
from bitwright.placement import Plan, SiteId
from bitwright.testing.harness import simple_plan
from bitwright.testing.replay import Fallback, tappable

Array = NDArray[Any]


_MADE: dict[type, Mapping[str, Case]] = {}
"""Cases by contract class."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: makes it, in the form that the backend works on (what `adopt` or `load` return).
        batch: an input batch of at least four samples.
        tolerance: of float outputs, relative to their largest magnitude.
    """

    build: Callable[[], object]
    batch: Batch
    tolerance: float = 1e-5

    @cached_property
    def model(self) -> object:
        """The model, built once for all tests: no backend changes one that it is given."""
        return self.build()

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What several tests need of the model, by name."""
        return {}


Test = TypeVar("Test", bound=Callable[..., None])


def of_any_case(test: Test) -> Test:
    """Marks a test of what doesn't depend on a case's ops, see `Contract.every`."""
    test.__dict__["of_any_case"] = True
    return test


class Contract:
    """Base of the contract's parts.

    Attributes:
        kinds: ops that the cases must cover between them.
        suffix: of the backend's model files; None if it writes none.
        declines: what the framework can't build → why, in words: kinds ("recurrent") and `replay_contract.FEATURES`
            that no case needs to have. The tests for them are skipped, and say so.
        every: where all of them take too long, each case takes one of so many targets, types and export formats, and
            the next case the next ones; and tests of what doesn't depend on a case's ops (`of_any_case`) take one of so
            many cases. By default all.
    """

    kinds: ClassVar[frozenset[OpKind]] = frozenset(
        {OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR, OpKind.BATCH_NORM, OpKind.RELU, OpKind.CLIPPED_RELU,
         OpKind.ADD, OpKind.CONCAT, OpKind.MAX_POOL}
    )  # fmt: skip
    suffix: ClassVar[str | None] = ".model"
    declines: ClassVar[Mapping[str, str]] = {}
    every: ClassVar[int] = 1

    def backend(self) -> Backend[Any]:
        """The backend under test."""
        raise NotImplementedError("give the backend under test")

    def cases(self) -> Mapping[str, Case]:
        """Models by name."""
        raise NotImplementedError("give models to test it on")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each case."""
        if "case" in metafunc.fixturenames:
            found = self._cases()
            if metafunc.function.__dict__.get("of_any_case"):
                first = zlib.crc32(metafunc.function.__name__.encode())
                found = {name: c for i, (name, c) in enumerate(found.items()) if (first + i) % self.every == 0} or found
            metafunc.parametrize("case", list(found.values()), ids=list(found))

    def _cases(self) -> Mapping[str, Case]:
        """The cases, made once for the class, so that each model is built once."""
        if type(self) not in _MADE:
            _MADE[type(self)] = dict(self.cases())
        return _MADE[type(self)]

    def _taken(self, names: Iterable[str], case: Case) -> list[str]:
        """Those that a case takes."""
        if self.every == 1:
            return list(names)
        place = next((i for i, other in enumerate(self._cases().values()) if other is case), 0)
        return [name for i, name in enumerate(names) if (i + place) % self.every == 0]

    def outputs(self, model: object, case: Case) -> dict[TensorId, Array]:
        """The float model's outputs, in order."""
        backend = self.backend()
        return run(backend.session(model, [Tap(t) for t in backend.graph(model).outputs]), case.batch)


def run(session: Session, batch: Batch) -> dict[TensorId, Array]:
    """Whole taps by tensor."""
    return {tap.tensor: np.asarray(v) for tap, v in session.run(batch).items()}


def assert_close(found: Array, expected: Array, tolerance: float, what: str) -> None:
    """Compare relative to the largest magnitude expected."""
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    scale = max(float(np.abs(expected).max(initial=0)), 1e-6)
    worst = float(np.abs(found.astype(np.float64) - expected).max(initial=0))
    assert worst <= tolerance * scale, f"{what}: differs by {worst:.3g} where values reach {scale:.3g}"


def everything(backend: Backend[Any], case: Case) -> dict[TensorId, Array]:
    """All tensors of the case's float network, computed once."""
    if "values" not in case.kept:
        taps = [Tap(t) for t in tappable(backend.graph(case.model))]
        case.kept["values"] = run(backend.session(case.model, taps), case.batch)
    return dict(case.kept["values"])


def fallback_of(backend: Backend[Any], case: Case) -> Fallback:
    """The case's ops run natively, one at a time, sessions kept."""
    held: Fallback = case.kept.setdefault("fallback", Fallback(backend, case.model))
    return held


def min_max_table(backend: Backend[Any], case: Case, plan: Plan) -> EncodingTable:
    """Every own encoding of a plan: weights by their values, activations by the float network's extremes."""
    model, values = case.model, everything(backend, case)
    params = backend.read(model, list(plan.parameters))
    weights = EncodingTable(weight_encodings(plan, params, EncodingTable({})))
    found: dict[SiteId, Encoding] = {}
    for site in plan.activations:
        spec = plan.spec(site)
        assert spec is not None
        if spec.run_time is not None:
            found[site] = dynamic_encoding(spec)
            continue
        seen = [values[t].astype(np.float64) for t in plan.observed(site) if t in values]
        seen = [v[np.isfinite(v)] for v in seen]
        low = min((float(v.min()) for v in seen if v.size), default=0.0)
        high = max((float(v.max()) for v in seen if v.size), default=0.0)
        found[site] = encoding_from_range(spec, low, high, source="minmax")
    return weights.merged(found)


def holds(simulation: Simulation[Any], encodings: Mapping[SiteId, Encoding]) -> bool:
    """Whether these encodings are in force; they are read once, as a trainable simulation has to run for each `get`."""
    found = simulation.get()
    return all(site in found and found[site].equals(e) for site, e in encodings.items())


def bare(backend: Backend[Any], case: Case, plan: Plan) -> Simulation[Any]:
    """A simulation with every site bypassed."""
    simulation = backend.simulate(case.model, plan, min_max_table(backend, case, plan))
    simulation.set(dict.fromkeys((*plan.activations, *plan.parameters)))
    return simulation


def plain(backend: Backend[Any], case: Case) -> tuple[Plan, EncodingTable, Simulation[Any]]:
    """A simple plan, its min-max encodings, and a simulation of them, built once for tests that only set encodings."""
    key = f"simulation {type(backend).__qualname__}"
    if key not in case.kept:
        plan = simple_plan(backend.graph(case.model))
        table = min_max_table(backend, case, plan)
        case.kept[key] = plan, table, backend.simulate(case.model, plan, table)
    plan, table, simulation = case.kept[key]
    simulation.set({s: table.get(s) for s in (*plan.activations, *plan.parameters)})
    return plan, table, simulation


def plain_bare(backend: Backend[Any], case: Case) -> tuple[Plan, Simulation[Any]]:
    """The plan and the simulation of `plain`, with every site bypassed."""
    plan, _, simulation = plain(backend, case)
    simulation.set(dict.fromkeys((*plan.activations, *plan.parameters)))
    return plan, simulation


def grid_points(encoding: Encoding, shape: Sequence[int]) -> NDArray[np.float32]:
    """Values on the grid, midway between its points, and outside it, as many as fit."""
    size = int(np.prod(shape))
    grid = encoding.grid
    codes = np.linspace(grid.qmin - 2, grid.qmax + 2, 2 * (grid.steps + 4) + 1)  # halves: every code and midpoint
    chosen = codes if size >= len(codes) else codes[:: -(-len(codes) // size)]
    values = (np.resize(chosen, size) - int(encoding.zero_point)) * np.float64(encoding.scale)
    return values.astype(np.float32).reshape(shape)


def floats(graph: Graph) -> list[TensorId]:
    """Float tensors that an op of the graph writes, and float inputs."""
    return [t.id for t in graph.tensors.values() if t.is_float and (graph.producer(t.id) or t.id in graph.inputs)]


def own(op: Op) -> list[str]:
    """Ids of the weight and the bias."""
    return [op.params[r] for r in (ParamRole.WEIGHT, ParamRole.BIAS) if r in op.params]


def check_weight(graph: Graph, op: Op) -> None:
    """Shapes of a linear op's parameters."""
    assert op.weight is not None
    shape = graph.params[op.weight].shape
    if isinstance(op.attrs, ConvAttrs):
        assert shape[2:] == op.attrs.kernel, op.id
        assert (shape[0] if op.kind is OpKind.CONV else input_channels(op, shape)) % op.attrs.groups == 0, op.id
    else:
        assert len(shape) == 2, op.id
    if ParamRole.BIAS in op.params:
        assert graph.params[op.params[ParamRole.BIAS]].shape == (output_channels(op, shape),), op.id


def linear_output(graph: Graph, op: Op, x: Array, params: Mapping[str, Array]) -> Array:
    """(out, rows) of a linear op, computed by the core."""
    assert op.weight is not None
    matrix = to_matrix(op, np.asarray(params[op.weight], np.float32))
    axis = graph.tensors[op.data_inputs[0]].channel_axis
    y = np.concatenate([np.matmul(matrix, c) for c in columns(op, x, axis)], axis=2)
    y = y.reshape(-1, y.shape[2])
    bias = op.params.get(ParamRole.BIAS)
    return y if bias is None else y + np.asarray(params[bias])[:, None]


def rows(graph: Graph, op: Op, y: Array) -> Array:
    """An output tensor as (out, rows)."""
    known = graph.tensors[op.output].channel_axis
    axis = -1 if op.kind is OpKind.LINEAR else 1 if known is None else known
    return np.moveaxis(y, axis, 0).reshape(y.shape[axis], -1)


def scale_shift(backend: Backend[Any], model: object, norm: Op) -> tuple[Array, Array]:
    """s and t of a batch norm as y = s·x + t, for each channel."""
    assert isinstance(norm.attrs, BatchNormAttrs)
    values = {r: v.astype(np.float64) for r, p in norm.params.items() for v in [backend.read(model, [p])[p]]}
    sigma = np.sqrt(values[ParamRole.VAR] + norm.attrs.epsilon)
    scale = values.get(ParamRole.GAMMA, np.ones(len(sigma))) / sigma
    return scale, values.get(ParamRole.BETA, np.zeros(len(sigma))) - values[ParamRole.MEAN] * scale
