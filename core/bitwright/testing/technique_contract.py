"""What every technique must hold, as a pytest class to subclass::

class TestMyTechnique(TechniqueContract):
    reconstructs = True
    settings = {"iterations": 50}

    def technique(self):
        return MyTechnique()
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from bitwright.backend import Backend, Batch, Capability, Tap
from bitwright.errors import BitwrightError
from bitwright.graph import AddBranch, Op, ParamId, ParamRole, SetBias, SetParams, to_matrix
from bitwright.grids import PerChannel, QuantSpec, encoding_of_weights
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Layer, NeedsData, Outcome, Technique
from bitwright.testing import models
from bitwright.testing.harness import Applied, Interrupted, MemoryStore, run_technique, simple_plan
from bitwright.testing.ports import REFERENCE, Port
from bitwright.testing.reference import ReferenceModel

FRAMEWORKS = ("torch", "tensorflow", "keras", "onnx", "onnx_ir", "onnxruntime", "jax")

_MODELS: dict[type, Mapping[str, ReferenceModel]] = {}
"""Models by contract class: each is brought onto a backend once for all tests."""
_RUNS: dict[tuple[type, ReferenceModel, type], _Run] = {}
"""By contract class, model, and class of the backend, which a contract may take in turn."""


@dataclass(frozen=True)
class _Run:
    """A run that several tests look at.

    Attributes:
        done: what it did.
        store: what it stored.
        ops: of the model that it was given, before.
        before: the parameters of that, before.
    """

    done: Applied
    store: MemoryStore
    ops: Sequence[Op]
    before: Mapping[ParamId, NDArray[np.float32]]


class TechniqueContract:
    """Subclass it, give `technique`, and set what applies.

    Attributes:
        settings: the technique's settings for these tests; choose quick ones.
        needs_data: it must be refused in clear words without calibration data.
        reconstructs: it lowers the output error of single layers, so that it may never be above nearest rounding.
        weights, activations: what the test plan quantizes to.
        on: the backend that the tests run on, one of `bitwright.testing.ports.installed`; default: the reference one.
            A model that can't be brought onto it is skipped.
    """

    settings: ClassVar[Mapping[str, Any]] = {}
    needs_data: ClassVar[bool] = True
    reconstructs: ClassVar[bool] = False
    weights: ClassVar[QuantSpec] = QuantSpec(4, granularity=PerChannel(0))
    activations: ClassVar[QuantSpec | None] = QuantSpec(8, signed=False, symmetric=False)
    on: Port = REFERENCE

    def technique(self) -> Technique:
        """The technique under test."""
        raise NotImplementedError("give the technique under test")

    def models(self) -> Mapping[str, Callable[[], ReferenceModel]]:
        """Models that it must cope with; by default all small ones (see `models`)."""
        return models.MODELS

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each model."""
        if "model" in metafunc.fixturenames:
            if type(self) not in _MODELS:
                _MODELS[type(self)] = {name: make() for name, make in self.models().items()}
            found = _MODELS[type(self)]
            metafunc.parametrize("model", list(found.values()), ids=list(found))

    def backend(self) -> Backend[Any]:
        """The backend that it runs on."""
        return self.on.backend()

    def port(self, model: ReferenceModel) -> object:
        """A small model in the backend's form; the same object for the same model."""
        try:
            return self.on.port(model)
        except NotImplementedError as reason:
            pytest.skip(f"{self.on}: {reason}")

    def batch(self, model: ReferenceModel, samples: int = 8, seed: int = 0) -> Batch:
        """A batch for the ported model; override it where inputs have other names or another layout there."""
        return self.on.batch(models.batch(model, samples, seed))

    def interruptions(self, entries: int) -> Iterable[int]:
        """After how many stored results it is interrupted, of so many; by default after each but the last."""
        return range(1, entries)

    def plan(self, model: ReferenceModel) -> Plan:
        """The plan that tests use."""
        graph = self.backend().graph(self.port(model))
        return simple_plan(graph, weights=self.weights, activations=self.activations)

    def apply(self, model: ReferenceModel, store: MemoryStore | None = None, seed: int = 0) -> Applied:
        """One run."""
        data = [self.batch(model, 6, s) for s in range(3)]
        return run_technique(
            self.technique(),
            self.backend(),
            self.port(model),
            data,
            plan=self.plan(model),
            store=store,
            seed=seed,
            **self.settings,
        )

    def _run(self, model: ReferenceModel) -> _Run:
        """`apply`, once for all tests that look at what it does."""
        backend = self.backend()
        key = type(self), model, type(backend)
        if key not in _RUNS:
            native = self.port(model)
            graph, store = backend.graph(native), MemoryStore()
            before = {p: np.array(v) for p, v in backend.read(native, list(graph.params)).items()}
            _RUNS[key] = _Run(self.apply(model, store), store, graph.ops, before)
        return _RUNS[key]

    # -- the contract

    def test_describes_itself(self) -> None:
        """Name, settings, capabilities and requests have the right forms."""
        technique = self.technique()
        assert isinstance(technique, Technique)
        assert re.fullmatch(r"[a-z][a-z0-9_]*", technique.name)
        assert issubclass(technique.Settings, BaseModel)
        assert all(isinstance(c, Capability) for c in technique.requires)
        model = models.conv_bn_relu()
        settings = technique.Settings(**self.settings)
        requests = list(technique.statistics(model.graph, self.plan(model), settings))
        assert all(isinstance(r, Request) for r in requests)
        assert len({r.key for r in requests}) == len(requests)

    def test_refuses_unknown_settings(self) -> None:
        """A mistyped setting is an error, not a silent default; settings don't change."""
        settings = self.technique().Settings
        with pytest.raises(ValidationError):
            settings.model_validate({"no_such_setting": 1})
        made = settings(**self.settings)
        for name in settings.model_fields:
            with pytest.raises(ValidationError):
                setattr(made, name, getattr(made, name))

    def test_imports_no_framework(self) -> None:
        """Its module, and making one, loads none of the frameworks."""
        kind = type(self.technique())
        loaded = f"print([f for f in {FRAMEWORKS!r} if f in sys.modules])"
        code = f"import sys, {kind.__module__} as m; m.{kind.__qualname__}(); {loaded}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_outcome_fits_the_model(self, model: ReferenceModel) -> None:
        """New values name what exists, have its shapes, and are finite; the changed model runs."""
        done = self._run(model).done
        backend, outcome = self.backend(), done.outcome
        graph = backend.graph(done.model)
        params = graph.params
        for p, value in outcome.params.items():
            assert p in params, f"unknown parameter {p!r}"
            assert value.shape == params[p].shape
            assert np.isfinite(value).all()
        for site, encoding in outcome.encodings.items():
            assert site in done.context.plan
            encoding.spread(params[site].shape if site in params else (1,))
        outputs = backend.session(done.model, [Tap(t) for t in graph.outputs]).run(self.batch(model))
        assert all(np.isfinite(v).all() for v in outputs.values())

    def test_report_says_what_was_done(self, model: ReferenceModel) -> None:
        """A summary, finite figures, and rows as wide as their header."""
        report = self._run(model).done.outcome.report
        assert report.summary
        assert "\n" not in report.summary
        assert all(np.isfinite(v) for v in report.figures.values())
        assert all(len(row) == len(report.columns) for row in report.rows)

    def test_is_deterministic(self, model: ReferenceModel) -> None:
        """Equal inputs and seed give bit-equal results."""
        assert same(self._run(model).done.outcome, self.apply(model).outcome)

    def test_leaves_its_inputs_alone(self, model: ReferenceModel) -> None:
        """Neither the model nor the context change."""
        run, backend, native = self._run(model), self.backend(), self.port(model)
        assert backend.graph(native).ops == run.ops
        after = backend.read(native, list(run.before))
        assert all(np.array_equal(after[p], v) for p, v in run.before.items())
        assert all(np.array_equal(run.done.context.params[p], v) for p, v in run.before.items())
        again = self.apply(model).context.encodings
        assert all(run.done.context.encodings[s].equals(e) for s, e in again.items())

    def test_resumes_after_a_crash(self, model: ReferenceModel) -> None:
        """What was finished isn't done again, and the result is bit-equal to that of one run."""
        whole = self._run(model)
        for kept in self.interruptions(len(whole.store.entries)):
            store = MemoryStore(fail_after=kept)
            with pytest.raises(Interrupted):
                self.apply(model, store)
            finished = set(store.entries)
            store.fail_after = None
            done = self.apply(model, store)
            assert same(done.outcome, whole.done.outcome)
            assert done.walk is not None
            assert not {f"layer/{op}" for op in done.walk.visited} & finished

    def test_needs_data_or_not(self) -> None:
        """Without calibration data it works, or says what it needs."""

        def run() -> Applied:
            model = models.conv_bn_relu()
            plan = self.plan(model)
            return run_technique(self.technique(), self.backend(), self.port(model), plan=plan, **self.settings)

        technique = self.technique()
        if self.needs_data:
            with pytest.raises(BitwrightError, match=r"data|samples"):
                run()
        else:
            assert not isinstance(technique, NeedsData) or not technique.needs_data(technique.Settings(**self.settings))
            run()

    def test_leaves_frozen_grids_alone(self) -> None:
        """Weights whose encoding is frozen keep it; those whose codes have been chosen stay on it."""
        model = models.conv_bn_relu()
        backend, native, plan = self.backend(), self.port(model), self.plan(model)
        weights = [op.weight for op in backend.graph(native).linear_ops if op.weight is not None]
        values = backend.read(native, weights)
        specs = {w: plan.spec(w) for w in weights}
        frozen = {w: encoding_of_weights(np.asarray(values[w]), spec).with_(frozen=True, held_by="the kit")
                  for w, spec in specs.items() if spec is not None}  # fmt: skip
        native = backend.edit(native, [SetParams({w: e.fake_quantize(values[w]) for w, e in frozen.items()})])
        data = [self.batch(model, 6, s) for s in range(3)]
        done = run_technique(self.technique(), backend, native, data, plan=plan, encodings=frozen, **self.settings)
        after = backend.read(done.model, list(frozen))
        for w, e in frozen.items():
            assert done.encodings[w].equals(e), f"the frozen encoding of {w!r} has changed"
            assert np.array_equal(e.fake_quantize(after[w]), after[w]), f"{w!r} is no longer on its frozen grid"

    def test_never_above_nearest_rounding(self, model: ReferenceModel) -> None:
        """On the data that each layer saw, its mean squared output error isn't above that of nearest rounding."""
        if not self.reconstructs:
            pytest.skip("the technique doesn't reconstruct layers")
        done = self._run(model).done
        assert done.walk is not None
        assert done.walk.layers, "the technique visited no layer"
        for id, layer in done.walk.layers.items():
            assert layer.op.weight is not None
            weight = done.outcome.params.get(layer.op.weight, layer.weight)
            encoding = done.outcome.encodings.get(layer.op.weight, layer.encoding)
            rounded = encoding.fake_quantize(weight) + branch_matrix(done.outcome, layer)
            reached = output_error(layer, rounded, new_bias(done.outcome, layer))
            nearest = output_error(layer, layer.encoding.fake_quantize(layer.weight), layer.bias)
            assert reached <= nearest * (1 + 1e-5) + 1e-9, f"{id}: {reached} above {nearest}"


def branch_matrix(outcome: Outcome, layer: Layer) -> NDArray[np.float32]:
    """What the branch that a layer was given adds to its weight, or zeros."""
    for edit in outcome.edits:
        if isinstance(edit, AddBranch) and edit.op == layer.op.id:
            return np.asarray(edit.up @ edit.down, np.float32)
    return np.zeros_like(layer.weight)


def new_bias(outcome: Outcome, layer: Layer) -> NDArray[np.float32] | None:
    """A layer's bias after the technique."""
    for edit in outcome.edits:
        if isinstance(edit, SetBias) and edit.op == layer.op.id:
            return np.asarray(edit.value, np.float32)
    bias = layer.op.params.get(ParamRole.BIAS)
    return layer.bias if bias is None else outcome.params.get(bias, layer.bias)


def output_error(layer: Layer, weight: NDArray[np.floating], bias: NDArray[np.floating] | None) -> float:
    """E‖(W x + b) − (Ŵ x̂ + b̂)‖² over the layer's moments, summed over outputs."""
    w, v = (to_matrix(layer.op, np.asarray(a, np.float64)) for a in (layer.weight, weight))
    m = layer.moments
    square = np.einsum("gok,gkl,gol->", w, m.xx, w) + np.einsum("gok,gkl,gol->", v, m.qq, v)
    square -= 2 * np.einsum("gok,gkl,gol->", w, m.xq, v)
    shift = np.zeros(w.shape[0] * w.shape[1])
    for value, sign in ((layer.bias, 1), (bias, -1)):
        shift = shift if value is None else shift + sign * np.asarray(value, np.float64)
    means = np.einsum("gok,gk->go", w, m.mean) - np.einsum("gok,gk->go", v, m.mean_quantized)
    return float(square + 2 * shift @ means.reshape(-1) + shift @ shift)


def same(a: Outcome, b: Outcome) -> bool:
    """Whether two outcomes are bit-equal."""
    if a.params.keys() != b.params.keys() or a.encodings.keys() != b.encodings.keys() or len(a.edits) != len(b.edits):
        return False
    pairs = [(a.params[p], b.params[p]) for p in a.params]
    for x, y in zip(a.edits, b.edits, strict=True):
        if isinstance(x, SetBias) and isinstance(y, SetBias):
            pairs.append((np.asarray(x.value), np.asarray(y.value)))
        if isinstance(x, AddBranch) and isinstance(y, AddBranch):
            pairs += [(np.asarray(x.down), np.asarray(y.down)), (np.asarray(x.up), np.asarray(y.up))]
    return (
        all(type(x) is type(y) for x, y in zip(a.edits, b.edits, strict=True))
        and all(np.array_equal(x, y) for x, y in pairs)
        and all(a.encodings[s].equals(b.encodings[s]) for s in a.encodings)
    )
