"""Models that no one here wrote, from opening to the verified export: the steps, and how each ended.

A `Foreign` model comes with one feed and with what its own framework computes from it. `examine` opens it at W16A16,
and compares at every step: float with the framework, simulation with float, the exported QDQ model (run without
optimizations) with the simulation, and `verify`'s four views with each other.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measures import Distance, Reach, defined, distance, equal, undefined

Array = Any

OK, REFUSED, UNTYPED, WRONG, CRASHED, LATE, NOT_RUN = "ok", "refused", "untyped", "wrong", "crashed", "late", "not run"
KINDS = (OK, REFUSED, UNTYPED, WRONG, CRASHED, LATE, NOT_RUN)
"""`refused` is bitwright's own error, `untyped` any other exception, `not run` a model that its framework refuses."""

W16A16: Mapping[str, str] = {"weights": "int16", "activations": "uint16", "scheme": "minmax"}
CLOSE_DB = 60.0
"""Signal to noise that 16 bits keep: one grid of 65,535 steps alone leaves about 90 dB."""
EXPORTED_DB = 70.0
"""The exported model rounds to the same grids; only a value on the edge between two steps may fall otherwise."""


class NotRun(Exception):
    """The model's own framework doesn't run it, or not twice with the same result."""


@dataclass(frozen=True)
class Foreign:
    """A model, one feed, and what comes out of it.

    Attributes:
        name: unique in its source.
        group: op or layer type; samples take every group.
        model: what `QuantSim` takes.
        inputs: arrays by input name (for models that are called with arguments, in their order).
        expected: outputs of the framework itself.
        tolerance: relative, of the float comparison, for float32.
        rerun: outputs of the float model on other inputs, in the framework itself; None: by bitwright's float session.
        sample: one batch for `QuantSim`, where the framework traces.
    """

    name: str
    group: str
    model: Any
    inputs: Mapping[str, Array]
    expected: Sequence[Array]
    tolerance: float = 1e-4
    sample: Any = None


@dataclass
class Outcome:
    """How a model ended.

    Attributes:
        kind: one of `KINDS`.
        step: where it ended: model, open, float, calibrate, simulated, export, qdq, verify, done.
        reason: the error's message, or what differs.
        notes: what couldn't be compared, and why.
        figures: signal to noise in decibels of "simulated" and "qdq", the worst output's.
        seconds: in all.
    """

    name: str
    group: str
    kind: str = OK
    step: str = "done"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Feed:
    """One run of the model as a data set."""

    samples = 1

    def __init__(self, inputs: Mapping[str, Array]) -> None:
        self.inputs = dict(inputs)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        yield dict(self.inputs)

    def fingerprint(self) -> str:
        return "one run"


class _Wrong(Exception):
    """A step's numbers are off."""


def examine(foreign: Foreign) -> Outcome:
    """All steps; never raises."""
    from bitwright.errors import BitwrightError

    outcome = Outcome(foreign.name, foreign.group)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="suite-") as folder:
            warnings.simplefilter("ignore")
            _Examination(foreign, outcome, Path(folder)).run()
    except _Wrong as error:
        outcome.kind, outcome.reason = WRONG, str(error)
    except BitwrightError as error:
        outcome.kind, outcome.reason = REFUSED, f"{type(error).__name__}: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = next(
            (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "bitwright" in f.filename), last
        )
        outcome.kind = UNTYPED
        outcome.reason = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
    else:
        outcome.step = "done"
    outcome.reason = " ".join(outcome.reason.split())[:400]
    return outcome


class _Examination:
    def __init__(self, foreign: Foreign, outcome: Outcome, folder: Path) -> None:
        self.foreign, self.outcome, self.folder = foreign, outcome, folder
        self.feed = Feed(foreign.inputs)
        self.crushed: list[str] = []

    def run(self) -> None:
        from bitwright import QuantSim
        from bitwright.verify import verify

        outcome = self.outcome
        outcome.step = "open"
        sim = QuantSim(self.foreign.model, self.foreign.sample, **W16A16)
        self.names = sim.graph.outputs
        feed = self.feed = Feed(self._by_graph_names(sim.graph.inputs))
        outcome.step = "float"
        real = sim.predict(feed, simulated=False)
        self._same_as_framework(real)
        outcome.step = "calibrate"
        sim.calibrate(feed)
        outcome.step = "simulated"
        simulated = sim.predict(feed)
        outcome.figures["simulated"] = self._close_to_float(sim, real, simulated)
        outcome.step = "export"
        bundle = sim.export(self.folder, name="model")
        if "qdq" not in bundle.files:
            outcome.notes.append("no quantized model is written")
        else:
            outcome.step = "qdq"
            exported = run_unoptimized(bundle.files["qdq"], feed.inputs)
            outcome.figures["qdq"] = self._as_simulated(real, simulated, exported)
        outcome.step = "verify"
        found = verify(self.folder, feed, name="model").problems
        # That the float model itself gives NaN, or keeps nothing of an output at 16 bits, must be said; nothing else.
        lost = any(undefined(v) for v in real)
        told = [f"output {name!r} is crushed" for name in self.crushed]
        if problems := [p for p in found if not (lost and "NaN" in p) and not p.startswith(tuple(told))]:
            raise _Wrong(f"verify: {problems[0]}")

    def _by_graph_names(self, names: Sequence[str]) -> Mapping[str, Array]:
        given = self.foreign.inputs
        if len(names) == len(given) and set(names) != set(given):
            return dict(zip(names, given.values(), strict=True))
        return given

    def _same_as_framework(self, real: Sequence[Array]) -> None:
        expected = self.foreign.expected
        if len(real) != len(expected):
            raise _Wrong(f"{len(real)} outputs, the framework has {len(expected)}")
        for name, a, b in zip(self.names, expected, real, strict=True):
            if told := equal(a, b, self.foreign.tolerance):
                raise _Wrong(f"output {name!r} in float: {told}")

    def _close_to_float(self, sim: Any, real: Sequence[Array], simulated: Sequence[Array]) -> float:
        reach = Reach(sim, self.feed)
        found = []
        for index, (name, a, b) in enumerate(zip(self.names, real, simulated, strict=True)):
            if lost := undefined(a):
                self.outcome.notes.append(f"{name}: {lost}")
            measured = distance(*defined(a, a, b))
            if not measured.close(CLOSE_DB):
                # What the float model itself makes of inputs that lie on the grid: steps of Floor, Round, ArgMax.
                measured = max(measured, distance(reach.on_grid[index], b), key=lambda d: d.rank)
            if not measured.close(CLOSE_DB):
                if told := reach.excuse(index, measured, CLOSE_DB):
                    self.outcome.notes.append(f"{name}, {measured}: {told}")
                    self.crushed.append(name)
                    continue
                raise _Wrong(f"output {name!r} of the simulation: {measured}")
            found.append(measured)
        return _least(found)

    def _as_simulated(self, real: Sequence[Array], simulated: Sequence[Array], exported: Sequence[Array]) -> float:
        found = []
        for name, f, a, b in zip(self.names, real, simulated, exported, strict=True):
            measured = distance(*defined(f, a, b))
            if not measured.close(EXPORTED_DB):
                raise _Wrong(f"output {name!r} of the exported model: {measured}")
            found.append(measured)
        return _least(found)


def _least(found: Sequence[Distance]) -> float:
    return round(min((d.decibels for d in found), default=200.0), 1)


def run_unoptimized(path: Path, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of an ONNX file in ONNX Runtime as it is written, every node by itself."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    values = feeds if set(names) <= set(feeds) else dict(zip(names, feeds.values(), strict=True))
    return session.run(None, {n: values[n] for n in names})
