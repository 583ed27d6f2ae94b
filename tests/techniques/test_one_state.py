"""A simulation is one frozen state: what fails or is stopped, wherever that is, leaves every part of it as it was."""

from __future__ import annotations

import inspect
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from backends import FRAMEWORKS

import bitwright
from bitwright.errors import BitwrightError, EncodingError, InputError, ModelError, TargetError
from bitwright.grids import Encoding
from bitwright.runs import fingerprint
from bitwright.simulation import QuantSim
from bitwright.simulation import _state as sim_state
from bitwright.simulation._state import rebuilt
from bitwright.state import SimState
from bitwright.technique import Outcome, Report, Settings
from bitwright.testing.builder import Builder

PORT = FRAMEWORKS.get("onnx") or next(iter(FRAMEWORKS.values()))
TRAINABLE = [FRAMEWORKS[n] for n in ("torch", "tensorflow", "keras") if n in FRAMEWORKS]
CORE = str(Path(bitwright.__file__).parent)
X = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


def network():
    b = Builder(0)
    return b.build(b.linear("out", b.relu("relu", b.linear("fc", b.input("x", 8), 6)), 4))


def opened(port=PORT, **options: Any):
    model = network()
    data = port.batch({"x": X})
    return port.sim(model, **options).calibrate(data), data


class Halved:
    """Halves every weight; as a technique of two passes, twice."""

    name: ClassVar[str] = "halved"
    requires: ClassVar = frozenset()

    class Settings(Settings):
        passes: int = 1

    def statistics(self, graph, plan, settings):
        return ()

    def stages(self, graph, plan, settings):
        return [self.Settings()] * settings.passes

    def apply(self, ctx):
        weights = {op.weight: ctx.params[op.weight] / 2 for op in ctx.graph.linear_ops}
        folded = {ctx.graph.linear_ops[0].id: (np.ones(6, np.float32), np.zeros(6, np.float32))}
        return Outcome(weights, folded=folded, report=Report("halved", {"by": 2.0}))


class Held:
    """What a simulation is, to be compared by identity, with the numbers of its weights."""

    def __init__(self, sim: Any) -> None:
        self.sim, self.state, self.simulation = sim, sim.state, sim.simulation
        self.parts = {f.name: getattr(sim.state, f.name) for f in fields(SimState)}
        self.weights = fingerprint.of_params(sim.params)

    def check(self, where: object = None) -> None:
        assert self.sim.state is self.state, where
        for name, part in self.parts.items():
            assert getattr(self.sim.state, name) is part, (where, name)
        assert self.sim.simulation is self.simulation, where
        assert fingerprint.of_params(self.sim.params) == self.weights, where


# -- what fails


def test_a_technique_that_fails_anywhere_changes_nothing(monkeypatch):
    sim, _ = opened()
    held = Held(sim)

    def refuse(*_: Any, **__: Any) -> Any:
        raise TargetError("no plan")

    class Broken(Halved):
        def apply(self, ctx):
            return replace(super().apply(ctx), report=None)

    class Late(Halved):
        """Only the second pass fails."""

        calls = 0

        def apply(self, ctx):
            self.calls += 1
            return replace(super().apply(ctx), report=Report("late", {"by": "x"} if self.calls == 2 else {}))

    for technique, passes in ((Broken(), 1), (Broken(), 2), (Late(), 2)):
        with pytest.raises(BitwrightError, match="nothing was changed"):
            sim.apply(technique, passes=passes)
        held.check(technique)
    with monkeypatch.context() as patched:
        patched.setattr(sim_state, "build_plan", refuse)
        for call in (
            lambda: sim.apply(Halved()),
            lambda: sim.apply(Halved(), passes=2),
            lambda: sim.set_precision("fc", weights="int4"),
            lambda: sim.fork(scheme="minmax"),
            lambda: sim.retyped({sim.graph.linear_ops[0].weight: "int4"}),
        ):
            with pytest.raises(TargetError, match="no plan"):
                call()
            held.check(call)
    with monkeypatch.context() as patched:
        patched.setattr(sim.backend, "edit", lambda model, edits: refuse())
        with pytest.raises(TargetError):
            sim.apply(Halved())
        held.check()
    with monkeypatch.context() as patched:
        patched.setattr(sim.backend, "graph", lambda model: refuse())
        with pytest.raises(TargetError):
            sim.apply(Halved())
        held.check()
    sim.apply(Halved(), passes=2)
    assert [name for name, _ in sim.reports] == ["halved"]
    assert sim.reports[0][1].figures["stages"] == 2
    assert [p.technique for p in sim.encodings.provenance] == ["halved"]


def test_encodings_that_fail_change_nothing(tmp_path):
    sim, data = opened()
    site, weight = sim.plan.activations[0], sim.graph.linear_ops[0].weight
    wrong = Encoding(8, True, True, np.ones((), np.float32), np.zeros((), np.int32))
    bundle = sim.export(tmp_path / "out")
    text = Path(bundle.files["encodings"]).read_text()
    (tmp_path / "strange.encodings").write_text(text.replace(f'"{weight}"', '"nowhere"'))
    held = Held(sim)
    bad = dict(data) | {name: np.full_like(v, np.nan) for name, v in data.items()}
    for call, error in (
        (lambda: sim.set({site: wrong, "nowhere": wrong}), EncodingError),
        (lambda: sim.set({site: wrong, weight: 1.0}), EncodingError),
        (lambda: sim.load_encodings(tmp_path / "strange.encodings", partial=False), EncodingError),
        (lambda: sim.load_encodings(tmp_path / "none.encodings"), BitwrightError),
        (lambda: sim.set_precision(["fc", "nowhere"], weights="int4"), InputError),
        (lambda: sim.calibrate([]), InputError),
        (lambda: sim.calibrate(bad), BitwrightError),
    ):
        with pytest.raises(error):
            call()
        held.check(call)


# -- what is stopped


class Stopper:
    """Raises KeyboardInterrupt at the n-th call of a function of the core; without n it counts them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        # Generators aside: what is raised while one is closed goes nowhere.
        if event == "call" and code.co_filename.startswith(CORE) and not code.co_flags & inspect.CO_GENERATOR:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt

    def __enter__(self) -> Stopper:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def stopped(call: Any, held: Held, points: int = 25) -> int:
    """Stop a call at so many points, the last ones among them; how many of them it reached."""
    with Stopper() as counted:
        call(held.sim.fork())
    last = counted.calls
    met = 0
    for at in sorted({*np.linspace(1, last, points, dtype=int).tolist(), *range(max(1, last - 12), last)}):
        try:
            with Stopper(at):
                call(held.sim)
        except KeyboardInterrupt:
            met += 1
            held.check(at)
        else:
            break  # a warm cache has made it shorter than the first time
    return met


@pytest.mark.parametrize("name", ["apply", "stages", "calibrate", "set_precision", "load_encodings", "set", "attach"])
def test_an_interrupt_anywhere_changes_nothing(name, tmp_path):
    sim, data = opened()
    site = sim.plan.activations[0]
    file = sim.export(tmp_path / "out").files["encodings"]
    call = {
        "apply": lambda s: s.apply(Halved()),
        "stages": lambda s: s.apply(Halved(), passes=2),
        "calibrate": lambda s: s.calibrate(data),
        "set_precision": lambda s: s.set_precision("fc", weights="int4"),
        "load_encodings": lambda s: s.load_encodings(file, partial=False),
        "set": lambda s: s.set({site: sim.encodings[site]}),
        "attach": lambda s: s.attach(source=tmp_path),
    }[name]
    assert stopped(call, Held(sim)) >= {"attach": 2, "set": 5}.get(name, 20)


@pytest.mark.parametrize("port", TRAINABLE, ids=lambda p: p.name)
def test_training_is_taken_over_whole_or_not_at_all(port, monkeypatch):
    sim, _ = opened(port)
    sim.trainable(range_learning=True)
    held = Held(sim)

    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError("no graph")

    with monkeypatch.context() as patched:
        patched.setattr(sim.backend, "graph", refuse)
        with pytest.raises(ModelError):
            sim.take()
        held.check()
    with monkeypatch.context() as patched:
        patched.setattr(sim_state, "build_plan", refuse)
        with pytest.raises(ModelError):
            sim.take()
        held.check()
    for at in (5, 60):
        with pytest.raises(KeyboardInterrupt), Stopper(at):
            sim.take()
        held.check(at)
    sim.take()
    assert sim.encodings.frozen and sim.encodings.provenance[-1].settings == {
        "range_learning": True,
        "gradient_scale": False,
    }
    native = sim.native
    sim.take()  # again, from where it was taken last
    assert sim.native is not native


@pytest.mark.parametrize("port", TRAINABLE, ids=lambda p: p.name)
def test_what_was_trained_does_not_undo_what_came_after(port):
    """Weights of `trainable` are those from before; taking them over would lose a technique's, or another type."""
    for change in (lambda s: s.apply(Halved()), lambda s: s.set_precision(s.graph.linear_ops[0].id, weights="int4")):
        sim, data = opened(port)
        sim.trainable()
        change(sim)
        held = Held(sim.calibrate(data))
        with pytest.raises(EncodingError, match=r"since trainable\(\).*undo"):
            sim.take()
        held.check()
        sim.trainable()
        sim.take()


def test_loading_gives_a_whole_simulation_or_none(tmp_path, monkeypatch):
    sim, data = opened()
    sim.apply(Halved()).calibrate(data).save(tmp_path / "kept")
    before = {p.name: p.read_bytes() for p in (tmp_path / "kept").iterdir()}
    with Stopper() as counted:
        again = QuantSim.load(tmp_path / "kept")
    for at in np.linspace(1, counted.calls, 12, dtype=int)[:-1].tolist():
        with pytest.raises(KeyboardInterrupt), Stopper(at):
            QuantSim.load(tmp_path / "kept")
    assert again.save(tmp_path / "again").is_dir()
    for name, content in before.items():
        assert (tmp_path / "again" / name).read_bytes() == content, name
    assert all(again.encodings[s].equals(e) for s, e in sim.encodings.items())
    assert again.folded.keys() == sim.folded.keys()


# -- what a state is


def test_a_state_can_only_be_replaced():
    overrides = {"fc": {"weights": "int4"}}
    sim, data = opened(overrides=overrides)
    sim.apply(Halved()).calibrate(data)
    state = sim.state
    for field in fields(SimState):
        with pytest.raises(FrozenInstanceError):
            setattr(state, field.name, None)
        if field.name not in ("training", "rounded"):
            found, held = getattr(sim, field.name), getattr(state, field.name)
            assert found == held if field.name == "reports" else found is held  # a tuple that shows itself in words
            with pytest.raises(AttributeError):
                setattr(sim, field.name, None)
    overrides["fc"]["weights"] = "int16"  # the user's own dictionary is the user's
    assert sim.overrides == {"fc": {"weights": "int4"}}
    gamma = next(iter(sim.folded.values()))[0]
    for write in (lambda: gamma.fill(0), lambda: sim.folded.update({}), lambda: sim.overrides.update({})):
        with pytest.raises((ValueError, AttributeError)):
            write()
    assert isinstance(sim.reports, tuple)


def test_the_open_simulation_is_that_of_the_network():
    sim, data = opened()
    simulation = sim.simulation
    assert sim.attach(source=Path("net.onnx")).simulation is simulation  # no part of the network
    twin = sim.fork()
    assert twin.simulation is not simulation and twin.state.computes_as(sim.state)
    for change in (
        lambda s: s.calibrate(data),
        lambda s: s.apply(Halved()).calibrate(data),
        lambda s: s.set({s.plan.activations[0]: s.encodings[s.plan.activations[0]]}),
    ):
        before = twin.simulation
        assert change(twin).simulation is not before
    assert sim.simulation is simulation
    state = rebuilt(sim.state, seed=1)
    assert QuantSim.of(state).seed == 1 and sim.seed == 0
