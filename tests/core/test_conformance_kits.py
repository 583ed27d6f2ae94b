"""The kits must fail what is wrong: each fault below breaks one promise, and one contract test has to notice."""

import inspect
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from pydantic import BaseModel

from bitwright.backend import compare_capture
from bitwright.dataflow import FlowSession, FlowSimulation
from bitwright.errors import BitwrightError, CapabilityError, InputError, ModelError
from bitwright.graph import Graph, SetParams
from bitwright.grids import Encoding, PerChannel
from bitwright.placement import build_plan
from bitwright.simulation import QuantSim
from bitwright.state import SimState
from bitwright.statistics import RangeStatistic, Request
from bitwright.targets import load_target
from bitwright.technique import LayerResult, Outcome, Report
from bitwright.testing import models
from bitwright.testing.backend_contract import BackendContract, Case, Held
from bitwright.testing.contract_base import min_max_table
from bitwright.testing.harness import MemoryStore, SimpleWalk, min_max_encodings, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.technique_contract import TechniqueContract
from bitwright_techniques.bias_correction import BiasCorrection


class _Kit(BackendContract):
    def __init__(self, backend):
        self._backend = backend

    def backend(self):
        return self._backend


CASE = Case(lambda: models.transposed(1), models.batch(models.transposed(1)))


class EditsInPlace(ReferenceBackend):
    def edit(self, model, edits):
        for edit in edits:
            if isinstance(edit, SetParams):
                for p, v in edit.values.items():
                    model.params[p][...] = v
        return super().edit(model, edits)


class WrongLayout(ReferenceBackend):
    def read(self, model, ids):
        return {p: np.flip(v, -1).copy() for p, v in super().read(model, ids).items()}

    def edit(self, model, edits):
        flipped = [SetParams({p: np.flip(v, -1) for p, v in e.values.items()}) if isinstance(e, SetParams) else e
                   for e in edits]  # fmt: skip
        return super().edit(model, flipped)


class ForgetsBias(ReferenceBackend):
    def export(self, model, plan, encodings, path, format):
        bare = {p: v if not p.endswith("bias") else np.zeros_like(v) for p, v in model.params.items()}
        return super().export(replace(model, params=bare), plan, encodings, path, format)


class UncheckedSimulation(FlowSimulation):
    """Takes every encoding, as long as numpy broadcasts."""

    def set(self, encodings):
        given = {s: e for s, e in encodings.items() if e is not None}
        self._in_force.update(given)
        self._roots.update(given)


class ChecksNoEncodings(ReferenceBackend):
    def simulate(self, model, plan, encodings):
        return UncheckedSimulation(self, model, plan, encodings)


class ChecksLate(ReferenceBackend):
    """Installs one encoding after the other, so that some are in force when one is refused."""

    def simulate(self, model, plan, encodings):
        made = super().simulate(model, plan, encodings)
        whole = made.set
        made.set = lambda changes: [whole({s: e}) for s, e in changes.items()]
        return made


class TakesAnyParameter(ReferenceBackend):
    def edit(self, model, edits):
        for edit in edits:
            model = replace(model, params={**model.params, **edit.values})
        return model


class TakesAnyBias(ReferenceBackend):
    def edit(self, model, edits):
        new = {f"{e.op}.bias": np.asarray(e.value) for e in edits}
        return replace(model, params={**model.params, **new})


class _FeedsAsGiven(FlowSession):
    """Numbers of other types go into the ops as they are, and nothing is looked at."""

    def run(self, batch):
        known = self.model.graph.tensors
        self.model = replace(self.model, graph=Graph(
            self.model.graph.ops,
            {t: replace(x, dtype=str(np.asarray(batch[t]).dtype), shape=None) if t in batch else x
             for t, x in known.items()},
            self.model.graph.params, self.model.graph.inputs, self.model.graph.outputs,
        ))  # fmt: skip
        return super().run(batch)


class FeedsAsGiven(ReferenceBackend):
    def session(self, model, taps):
        return _FeedsAsGiven(self, model, taps)


class RefusesIntegers(ReferenceBackend):
    def session(self, model, taps):
        made = super().session(model, taps)
        whole = made.run

        def run(batch):
            if wrong := next((t for t, v in batch.items() if np.asarray(v).dtype.kind in "iu"), None):
                raise InputError(f"input {wrong!r} takes floats")
            return whole(batch)

        made.run = run
        return made


class NeedsEveryFeed(ReferenceBackend):
    def segment(self, model, feeds, taps):
        made = super().segment(model, feeds, taps)
        made.feeds = tuple(feeds)
        return made


class WritesNothing(ReferenceBackend):
    def formats(self):
        return {}


class _Silent(_Kit):
    suffix = None


def test_a_backend_that_writes_no_files(tmp_path):
    kit = _Silent(WritesNothing())
    kit.test_is_a_backend(CASE)
    for test in (kit.test_save_and_load, kit.test_export_and_reload):
        with pytest.raises(pytest.skip.Exception, match=r"no model files|no export formats"):
            test(CASE, tmp_path)
    backend, graph, target = kit.backend(), CASE.model.graph, load_target("default")
    plan = build_plan(graph, target)
    table = min_max_table(backend, CASE, plan)
    state = SimState(backend=backend, native=CASE.model, graph=graph, target=target, plan=plan, encodings=table)
    with pytest.raises(CapabilityError, match="reference backend writes no files"):
        QuantSim.of(state).export(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_framework_has_not_got_is_declined_by_name():
    class Declining(_Kit):
        declines = {"recurrent": "there are no recurrent layers"}  # noqa: RUF012

        def cases(self):
            return {"one": CASE}

    kit = Declining(ReferenceBackend())
    with pytest.raises(pytest.skip.Exception, match="declined: there are no recurrent layers"):
        kit.test_cases_cover_what_goes_wrong("recurrent")
    with pytest.raises(AssertionError, match="no case has it: embedding; or list it in `declines`"):
        kit.test_cases_cover_what_goes_wrong("embedding")


def test_a_right_backend_passes():
    kit = _Kit(ReferenceBackend())
    kit.test_read_and_edit_round_trip(CASE)
    kit.test_canonical_layouts(CASE)


@pytest.mark.parametrize(
    ("backend", "test"),
    [
        (EditsInPlace(), "test_read_and_edit_round_trip"),
        (WrongLayout(), "test_canonical_layouts"),
        (ForgetsBias(), "test_export_and_reload"),
        (ChecksNoEncodings(), "test_encodings_that_don_t_fit_are_refused"),
        (ChecksLate(), "test_encodings_that_don_t_fit_are_refused"),
        (ChecksNoEncodings(), "test_unknown_sites_are_refused"),
        (TakesAnyParameter(), "test_parameter_values_that_don_t_fit_are_refused"),
        (TakesAnyBias(), "test_biases_that_don_t_fit_are_refused"),
        (RefusesIntegers(), "test_sessions_take_numbers_of_any_type"),
        (FeedsAsGiven(), "test_feeds_that_don_t_fit_are_refused"),
        (NeedsEveryFeed(), "test_segments_need_no_more_than_their_taps_do"),
    ],
)
def test_faulty_backends_fail(backend, test, tmp_path):
    arguments = (tmp_path,) if "export" in test else ()
    getattr(_Kit(ReferenceBackend()), test)(CASE, *arguments)
    with pytest.raises((AssertionError, pytest.fail.Exception, InputError)):
        getattr(_Kit(backend), test)(Case(CASE.build, CASE.batch), *arguments)


class Owned:
    """What users of the reference backend could hold: its model, in code that counts its calls."""

    def __init__(self, counts=False):
        self.model, self.counts, self.calls = CASE.build(), counts, 0

    def __call__(self, batch):
        self.calls += 1
        return [v * self.calls if self.counts else v for v in self.model(batch).values()]


class Adopting(ReferenceBackend):
    def adopt(self, model, sample=None):
        return model.model if isinstance(model, Owned) else super().adopt(model, sample)


class AdoptsOtherWeights(Adopting):
    def adopt(self, model, sample=None):
        found = super().adopt(model, sample)
        return replace(found, params={k: v * np.float32(1.01) for k, v in found.params.items()})


class AdoptsOneOutputLess(Adopting):
    def adopt(self, model, sample=None):
        graph = super().adopt(model, sample).graph
        known = Graph(graph.ops, graph.tensors, graph.params, graph.inputs, graph.outputs[1:])
        return replace(model.model, graph=known)


class RunsOnItsWay(Adopting):
    def adopt(self, model, sample=None):
        model(sample)
        model.counts = True
        return super().adopt(model, sample)


class Comparing(Adopting):
    """As an adapter does it."""

    def adopt(self, model, sample=None):
        found = super().adopt(model, sample)
        specs = [((None, *found.graph.tensors[t].shape[1:]), "float32") for t in found.graph.inputs]
        before = model.calls
        finding = compare_capture(
            lambda x: model(dict(zip(found.graph.inputs, x, strict=True))),
            lambda x: list(found(dict(zip(found.graph.inputs, x, strict=True))).values()),
            specs,
            [sample[t] for t in found.graph.inputs],
        )
        model.calls = before
        if finding is not None:
            raise ModelError(str(finding))
        return found


def test_captures_that_compute_something_else_are_noticed():
    def held(odd=""):
        return Held(lambda: Owned(bool(odd)), lambda model, batch: model(batch), CASE.batch, odd)

    for right in (Adopting(), Comparing()):
        _Kit(right).test_a_capture_computes_what_the_model_does(held())
    counts = held("how often it was called")
    _Kit(Comparing()).test_a_capture_computes_what_the_model_does(counts)
    for wrong, model in (
        (AdoptsOtherWeights(), held()), (AdoptsOneOutputLess(), held()), (RunsOnItsWay(), held()), (Adopting(), counts),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=r"on its sample|called again"):
            _Kit(wrong).test_a_capture_computes_what_the_model_does(model)


TICKS = itertools.count()


class Faulty(BiasCorrection):
    """A technique whose way of going wrong is set from outside."""

    fault = ""
    calls = 0

    @property
    def name(self):
        return "Bias Correction" if self.fault == "odd name" else "bias_correction"

    def statistics(self, graph, plan, settings):
        requests = list(super().statistics(graph, plan, settings))
        if self.fault == "needs no data":
            return []
        if self.fault == "same key twice":
            tensors = graph.inputs
            return [*requests, *(Request("same", tensors, RangeStatistic) for _ in range(2))]
        return requests

    def needs_data(self, settings):
        return self.fault != "needs no data"

    def apply(self, ctx):
        if self.fault == "needs no data":
            return Outcome({}, report=Report("done"))
        if self.fault == "writes into its inputs":
            next(iter(ctx.params.values()))[...] = 0
        outcome = super().apply(ctx)
        if self.fault == "random":
            params = {p: v + np.random.default_rng().normal(size=v.shape) for p, v in outcome.params.items()}
            return replace(outcome, params=params)
        if self.fault == "worse":
            return replace(outcome, params={p: v + 1 for p, v in outcome.params.items()})
        if self.fault == "wrong shape":
            return replace(outcome, params={p: v[:1] for p, v in outcome.params.items()})
        if self.fault == "NaN":
            return replace(outcome, params={p: v * np.float32(np.nan) for p, v in outcome.params.items()})
        if self.fault == "unknown parameter":
            return replace(outcome, params={f"{p}?": v for p, v in outcome.params.items()})
        if self.fault == "unknown site":
            return replace(outcome, encodings={"nowhere": next(iter(ctx.encodings.values()))})
        if self.fault == "encoding that doesn't fit":
            weight = ctx.graph.linear_ops[0].weight
            two = Encoding(4, True, True, np.ones(2, np.float32), np.zeros(2, np.int32), PerChannel(0))
            return replace(outcome, encodings={weight: two})
        if self.fault == "replaces frozen scales":
            weights = [op.weight for op in ctx.graph.linear_ops]
            return replace(outcome, encodings={w: ctx.encodings[w].with_(scale=ctx.encodings[w].scale / 2)
                                               for w in weights})  # fmt: skip
        if self.fault == "changes frozen weights":
            return replace(outcome, params={op.weight: ctx.params[op.weight] * np.float32(0.99)
                                            for op in ctx.graph.linear_ops})  # fmt: skip
        if self.fault == "depends on the clock":
            return replace(outcome, params={p: v + next(TICKS) * 1e-3 for p, v in outcome.params.items()})
        if self.fault == "ragged report":
            return replace(outcome, report=Report("done", {}, ("a", "b"), (("only one",),)))
        if self.fault == "two lines":
            return replace(outcome, report=Report("done\nand more"))
        if self.fault == "infinite figure":
            return replace(outcome, report=Report("done", {"gain": float("inf")}))
        if self.fault == "forgets the store":
            for op in ctx.graph.linear_ops:
                ctx.store.put(f"layer/{op.id}", {"weight": np.zeros(1)})
            Faulty.calls += 1
            done = {"fc1.bias": np.full(16, Faulty.calls, np.float32)}
            return Outcome(done, report=Report("done"))
        return outcome


class Loose(BaseModel):
    mode: str = "auto"
    quantized_activations: bool = True


class FaultyKit(TechniqueContract):
    reconstructs = True

    def __init__(self, fault):
        self.fault = fault

    def technique(self):
        made = Faulty()
        made.fault = self.fault
        return made


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("random", "test_is_deterministic"),
        ("depends on the clock", "test_is_deterministic"),
        ("worse", "test_never_above_nearest_rounding"),
        ("wrong shape", "test_outcome_fits_the_model"),
        ("NaN", "test_outcome_fits_the_model"),
        ("unknown parameter", "test_outcome_fits_the_model"),
        ("unknown site", "test_outcome_fits_the_model"),
        ("encoding that doesn't fit", "test_outcome_fits_the_model"),
        ("same key twice", "test_describes_itself"),
        ("odd name", "test_describes_itself"),
        ("needs no data", "test_needs_data_or_not"),
        ("ragged report", "test_report_says_what_was_done"),
        ("two lines", "test_report_says_what_was_done"),
        ("infinite figure", "test_report_says_what_was_done"),
        ("forgets the store", "test_resumes_after_a_crash"),
        ("replaces frozen scales", "test_leaves_frozen_grids_alone"),
        ("changes frozen weights", "test_leaves_frozen_grids_alone"),
    ],
)
def test_faulty_techniques_fail(fault, test):
    for kit in (FaultyKit(""), FaultyKit(fault)):
        method = getattr(kit, test)
        run = partial(method, *([models.mlp()] if "model" in inspect.signature(method).parameters else []))
        if not kit.fault:
            run()
            continue
        with pytest.raises((AssertionError, pytest.fail.Exception, BitwrightError)):
            run()


def test_writing_into_the_context_fails():
    with pytest.raises(ValueError, match="read-only"):
        FaultyKit("writes into its inputs").apply(models.mlp())


def test_loose_settings_fail():
    kit = FaultyKit("")
    technique = kit.technique()
    technique.Settings = Loose
    kit.technique = lambda: technique
    with pytest.raises(pytest.fail.Exception):
        kit.test_refuses_unknown_settings()


def test_what_a_layer_was_measured_at_travels_through_the_store_too():
    model, backend, store = models.mlp(), ReferenceBackend(), MemoryStore()
    plan, data = simple_plan(model.graph), [models.batch(model)]
    walk = SimpleWalk(backend, model, plan, min_max_encodings(backend, model, plan, data), data, store)
    ops = [op.id for op in model.graph.linear_ops]

    def solve(layer):
        return LayerResult(layer.weight, layer.encoding, figures={"after": len(layer.op.id) / 7})

    first, again = walk(ops, solve), walk(ops, solve)
    assert walk.visited == ops
    assert {op: r.figures for op, r in again.items()} == {op: r.figures for op, r in first.items()}
    assert all(r.figures for r in again.values())


def test_layer_results_travel_through_the_store_bit_for_bit():
    kit = FaultyKit("")
    model = models.transposed()
    first = kit.apply(model)
    again = kit.apply(model, first.context.store)
    assert again.walk.visited == []
    for p, v in first.outcome.params.items():
        assert np.array_equal(again.outcome.params[p], v)
