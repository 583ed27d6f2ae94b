"""Outcomes, encodings and feeds that aren't right are refused alike on every framework, and nothing changes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap
from bitwright.errors import BitwrightError, EncodingError, InputError, PluginError
from bitwright.graph import RemoveOp
from bitwright.grids import Blockwise, Encoding, PerChannel
from bitwright.technique import Outcome, Report, Settings
from bitwright.testing.builder import Builder

ports = pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)


def network():
    b = Builder(0)
    return b.build(b.relu("relu", b.linear("fc", b.input("x", 8), 4)))


X = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


class Returning:
    """A technique that returns what it was made with."""

    name: ClassVar[str] = "returning"
    Settings: ClassVar = Settings
    requires: ClassVar = frozenset()

    def __init__(self, make: Any) -> None:
        self.make = make

    def statistics(self, graph, plan, settings):
        return ()

    def apply(self, ctx):
        return self.make(ctx)


def scales(count, axis=1, granularity=None):
    shape = (count,) if granularity is None else (count, 2)
    return Encoding(8, False, False, np.full(shape, 0.05, np.float32), np.zeros(shape, np.int32),
                    granularity or PerChannel(axis))  # fmt: skip


def weight_of(ctx):
    (op,) = ctx.graph.linear_ops
    return op.weight


def _writes_into_the_model(ctx):
    ctx.params[weight_of(ctx)][:] = 0
    return Outcome()


OUTCOMES = {
    "text as a report": lambda c: Outcome({weight_of(c): np.zeros((4, 8), np.float32)}, report="a plain string"),
    "no outcome": lambda c: {"params": {}},
    "none": lambda c: None,
    "unknown parameter": lambda c: Outcome({"nowhere": np.zeros(3, np.float32)}),
    "wrong shape": lambda c: Outcome({weight_of(c): np.zeros((8, 4), np.float32)}),
    "NaN": lambda c: Outcome({weight_of(c): np.full((4, 8), np.nan, np.float32)}),
    "a list as a parameter": lambda c: Outcome({weight_of(c): [[0.0] * 8] * 4}),
    "unknown site": lambda c: Outcome({weight_of(c): np.zeros((4, 8), np.float32)}, {"nowhere": scales(4, 0)}),
    "a shared or float site": lambda c: Outcome(
        {weight_of(c): np.zeros((4, 8), np.float32)},
        {next(s for s in c.plan if c.plan.spec(s) is None or c.plan.root(s) != s): scales(4, 0)},
    ),
    "wrong scales": lambda c: Outcome({weight_of(c): np.zeros((4, 8), np.float32)}, {weight_of(c): scales(3, 0)}),
    "a number as an encoding": lambda c: Outcome({}, {weight_of(c): 0.1}),
    "an unknown op removed": lambda c: Outcome({weight_of(c): np.zeros((4, 8), np.float32)}, {}, [RemoveOp("nowhere")]),
    "text as an edit": lambda c: Outcome({}, {}, ["remove fc"]),
    "text as edits": lambda c: Outcome({}, {}, "remove"),
    "folded into nothing": lambda c: Outcome({}, {}, (), {"nowhere": (np.ones(4), np.ones(4))}),
    "folded NaN": lambda c: Outcome({}, {}, (), {c.graph.linear_ops[0].id: (np.full(4, np.nan), np.ones(4))}),
    "text as a figure": lambda c: Outcome(report=Report("x", {"a": "b"})),
    "rows without columns": lambda c: Outcome(report=Report("x", {}, ("a",), ((1, 2),))),
}


@ports
def test_an_invalid_outcome_changes_nothing(port):
    data = port.batch({"x": X})
    sim = port.sim(network(), overrides={}).calibrate(data)
    weight = sim.graph.linear_ops[0].weight
    values, out, simulation = sim.params[weight].copy(), sim.predict(data)[0], sim.simulation
    before = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(sim).items()}
    for name, make in OUTCOMES.items():
        with pytest.raises(BitwrightError):
            sim.apply(Returning(make))
            pytest.fail(name)
        now = vars(sim)
        assert now.keys() == before.keys()
        assert all(now[k] is v or now[k] == v for k, v in before.items()), name
        assert not sim.folded and not sim.reports and sim.simulation is simulation, name
        assert np.array_equal(sim.params[weight], values), name
        assert np.array_equal(sim.predict(data)[0], out), name
    with pytest.raises(ValueError, match="read-only"):
        sim.apply(Returning(_writes_into_the_model))
    assert np.array_equal(sim.predict(data)[0], out)
    good = Returning(lambda c: Outcome({weight_of(c): values / 2}, report=Report("halved")))
    sim.apply(good)
    assert np.array_equal(sim.params[weight], values / 2)
    assert sim.reports[-1][1].summary == "halved"


def test_an_edit_that_breaks_is_told(monkeypatch):
    port = next(iter(FRAMEWORKS.values()))
    sim = port.sim(network()).calibrate(port.batch({"x": X}))
    native = sim.native

    def broken(model, edits):
        raise KeyError("inside")

    monkeypatch.setattr(sim.backend, "edit", broken)
    with pytest.raises(PluginError, match=r"returning.*can't be edited.*KeyError"):
        sim.apply(Returning(lambda c: Outcome({weight_of(c): np.zeros((4, 8), np.float32)})))
    assert sim.native is native and len(sim.encodings)


@ports
def test_scales_that_do_not_fit_are_refused(port):
    data = port.batch({"x": X})
    sim = port.sim(network()).calibrate(data)
    weight = sim.graph.linear_ops[0].weight
    site = next(s for s in sim.plan.activations if sim.graph.producer(s) is not None)
    simulation = sim.simulation
    wrong = [(site, scales(n)) for n in (1, 3, 8)] + [(site, scales(4, 2)), (site, scales(4, 1, Blockwise(2, 1, 0)))]
    wrong += [(weight, scales(3, 0)), (weight, scales(4, 1)), (weight, scales(8, 0))]
    for where, encoding in wrong:
        for call in (
            lambda s=where, e=encoding: sim.set({s: e}),
            lambda s=where, e=encoding: simulation.set({s: e}),
            lambda s=where, e=encoding: sim.backend.simulate(sim.native, sim.plan, sim.table.merged({s: e})),
        ):
            with pytest.raises(EncodingError, match=r"scale|axis|blocks"):
                call()
    sim.set({site: scales(4)})
    assert np.isfinite(sim.predict(data)[0]).all()


@ports
def test_feeds_are_converted_by_one_rule(port):
    sim = port.sim(network()).calibrate(port.batch({"x": X}))
    (name,) = sim.graph.inputs
    whole = np.abs(np.rint(X * 4))
    tap = Tap(sim.graph.outputs[0])
    for session in (sim.backend.session(sim.native, [tap]), sim.simulation.session([tap])):
        expected = session.run({name: whole.astype(np.float32)})[tap]
        for dtype in (np.int64, np.uint8, np.int32, np.float64, np.float16, np.bool_):
            found = session.run({name: whole.astype(dtype)})[tap]
            if dtype is not np.bool_:
                assert np.array_equal(found, expected), dtype
        with pytest.raises(InputError, match="too large"):
            session.run({name: np.full((8, 8), 1e300)})
        for strange in (np.array([["a"] * 8]), np.full((8, 8), 1j)):
            with pytest.raises(InputError, match=r"numbers|read as an array"):
                session.run({name: strange})
