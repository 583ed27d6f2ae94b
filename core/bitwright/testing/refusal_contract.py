"""The part of the backend contract about what is refused, and what is converted: by every backend alike.

The rules themselves stand once, in `bitwright.backend._checks` and `bitwright.backend._sessions`; a backend that calls
them holds this part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bitwright.backend import ParamUpdates, PartialExecution, Tap
from bitwright.errors import EncodingError, InputError, ModelError
from bitwright.graph import Graph, SetBias, SetParams, TensorId, output_channels
from bitwright.grids import Blockwise, Encoding, Granularity, PerChannel
from bitwright.placement import Plan, SiteId
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    everything,
    holds,
    of_any_case,
    plain,
    plain_bare,
    run,
)
from bitwright.testing.plan_contract import check_network
from bitwright.testing.replay import Quantization


class RefusalContract(Contract):
    """What can't be right raises bitwright's own error, names the thing, and changes nothing."""

    @of_any_case
    def test_encodings_that_don_t_fit_are_refused(self, case: Case) -> None:
        """Too few, too many or misplaced scales: when the simulation is built and when they are set; all or nothing."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan, table, simulation = plain(backend, case)
        taps = [Tap(t) for t in graph.outputs]
        before = run(simulation.session(taps), case.batch)
        wrong = list(_misfits(graph, plan))
        assert wrong, "no site of this case can be given a wrong encoding"
        for site, encoding in wrong:
            told = f"{site!r}, {encoding.granularity}, scales {encoding.scale.shape}"
            refused(EncodingError, repr(site), told, simulation.set, {site: encoding})
        fitting = {s: e.with_(scale=e.scale * 2) for s, e in table.items() if s != wrong[0][0]}
        refused(EncodingError, repr(wrong[0][0]), "one of many", simulation.set, {**fitting, wrong[0][0]: wrong[0][1]})
        # Building takes longer: a site of each kind with each layout of scales.
        some = {(plan[s].kind, type(e.granularity)): (s, e) for s, e in wrong}.values()
        for site, encoding in some:
            changed = table.merged({site: encoding})
            refused(EncodingError, repr(site), repr(site), backend.simulate, model, plan, changed)
        assert holds(simulation, table)
        for t, v in run(simulation.session(taps), case.batch).items():
            assert np.array_equal(v, before[t]), t

    def test_a_scale_for_each_channel_of_an_activation(self, case: Case) -> None:
        """Where as many scales are given as there are channels, the tensor is on the grid of each."""
        backend = self.backend()
        graph = backend.graph(case.model)
        plan, simulation = plain_bare(backend, case)
        values, chosen = everything(backend, case), dict[SiteId, Encoding]()
        for site, axis, channels in _channelled(graph, plan):
            reach = np.abs(values[site]).max(axis=tuple(i for i in range(values[site].ndim) if i != axis))
            scale = (np.maximum(reach, 0.1) / 100 * np.linspace(0.5, 1.5, channels)).astype(np.float32)
            chosen[site] = Encoding(8, True, True, scale, np.zeros(channels, np.int32), PerChannel(axis))
        simulation.set(chosen)
        assert holds(simulation, chosen)
        check_network(backend, case, simulation, Quantization(plan, chosen), "a scale for each channel")

    @of_any_case
    def test_parameter_values_that_don_t_fit_are_refused(self, case: Case) -> None:
        """Wrong shapes, NaN, infinity and unknown names: nothing is set, of values in the same edit neither."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        known = {p: np.array(v) for p, v in backend.read(model, list(graph.params)).items()}
        _, _, simulation = plain(backend, case)
        setters: list[Callable[[Any], object]] = [lambda values: backend.edit(model, [SetParams(values)])]
        if isinstance(simulation, ParamUpdates):
            setters.append(simulation.set_params)
        before = run(simulation.session([Tap(t) for t in graph.outputs]), case.batch)
        others = {p: v + 1 for p, v in known.items()}
        for set_params in setters:
            for param, value in known.items():
                bad = {"more axes": value[None], "infinite": _spoilt(value, np.inf), "NaN": _spoilt(value, np.nan)}
                if value.ndim:
                    bad["too long"] = np.concatenate([value, value])
                for what, wrong in bad.items():
                    rest = {p: v for p, v in others.items() if p != param}
                    told = f"{what}: {param!r}"
                    refused(ModelError, repr(param), told, set_params, {**rest, param: wrong})
            unknown = {**others, "no such parameter": np.zeros(3, np.float32)}
            refused(ModelError, "'no such parameter'", "unknown", set_params, unknown)
        refused(ModelError, "'no such parameter'", "read", backend.read, model, ["no such parameter"])
        for t, v in run(simulation.session([Tap(t) for t in graph.outputs]), case.batch).items():
            assert np.array_equal(v, before[t]), t
        for p, v in backend.read(model, list(known)).items():
            assert np.array_equal(v, known[p]), p

    @of_any_case
    def test_biases_that_don_t_fit_are_refused(self, case: Case) -> None:
        """A bias has one finite value for each output; ops that are no linear ones take none."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for op in graph.linear_ops:
            assert op.weight is not None
            right = np.ones(output_channels(op, graph.params[op.weight].shape), np.float32)
            for wrong in (right[:, None], np.append(right, right), _spoilt(right, np.nan), _spoilt(right, -np.inf)):
                refused(ModelError, repr(op.id), op.id, backend.edit, model, [SetBias(op.id, wrong)])
        linear = {op.id for op in graph.linear_ops}
        for op in (o for o in graph if o.id not in linear):
            refused(ModelError, repr(op.id), op.id, backend.edit, model, [SetBias(op.id, np.ones(1, np.float32))])

    @of_any_case
    def test_sessions_take_numbers_of_any_type(self, case: Case) -> None:
        """What is converted without loss is: whole numbers of any type to floats and integers, 0 and 1 to booleans."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        specs = backend.input_specs(model)
        taps = [Tap(t) for t in graph.outputs]
        session = backend.session(model, taps)
        whole = {n: np.abs(np.rint(np.asarray(v, np.float64) * 3)) for n, v in case.batch.items()}
        whole = {n: whole[n] if np.dtype(specs[n][1]).kind == "f" else np.asarray(case.batch[n]) for n in whole}
        expected = run(session, {n: v.astype(specs[n][1]) for n, v in whole.items()})
        for dtype in (np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64):
            found = run(session, {n: v.astype(dtype) for n, v in whole.items()})
            for t, v in found.items():
                assert v.dtype == expected[t].dtype, (t, dtype)
                assert np.array_equal(v, expected[t]), (t, dtype)
        taken = case.batch
        for t, v in run(session, {n: np.asarray(v).tolist() for n, v in taken.items()}).items():
            assert v.dtype == expected[t].dtype, t

    @of_any_case
    def test_feeds_that_don_t_fit_are_refused(self, case: Case) -> None:
        """Missing, misshapen, misread or lossy arrays are InputErrors with the input's name; others are ignored."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        taps = [Tap(t) for t in graph.outputs]
        specs = backend.input_specs(model)
        _, _, simulation = plain(backend, case)
        for session in (backend.session(model, taps), simulation.session(taps)):
            before = run(session, case.batch)
            for name, (shape, dtype) in specs.items():
                given = np.asarray(case.batch[name])
                wrong = {"an axis too many": given[..., None], "strings": np.full(given.shape, "a")}
                for axis, n in enumerate(shape):
                    if n is not None:
                        wrong[f"axis {axis} too long"] = np.concatenate([given, given], axis)
                if np.dtype(dtype).kind in "iu":
                    wrong["fractions"] = given + 0.5
                    if np.dtype(dtype).itemsize < 8:
                        wrong["out of range"] = np.full(given.shape, 2.0**70)
                for what, value in wrong.items():
                    refused(InputError, repr(name), f"{what}: {name}", session.run, {**case.batch, name: value})
                rest = {n: v for n, v in case.batch.items() if n != name}
                refused(InputError, repr(name), f"{name} is missing", session.run, rest)
            for t, v in run(session, {**case.batch, "no input of the model": np.zeros(3)}).items():
                assert np.array_equal(v, before[t]), t

    @of_any_case
    def test_unknown_tensors_are_refused(self, case: Case) -> None:
        """Taps and feeds that the model doesn't have are ModelErrors, when the session is made."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        _, _, simulation = plain(backend, case)
        refused(ModelError, "'no such tensor'", "session", backend.session, model, [Tap("no such tensor")])
        refused(ModelError, "'no such tensor'", "simulation", simulation.session, [Tap("no such tensor")])
        segments: list[Callable[[Any, Any], Any]] = [simulation.segment]
        if isinstance(backend, PartialExecution):
            segments.append(lambda feeds, taps: backend.segment(model, feeds, taps))
        for segment in segments:
            for feeds, tap in ((["no such tensor"], graph.outputs[0]), ([graph.inputs[0]], "no such tensor")):
                refused(ModelError, "'no such tensor'", "segment", segment, feeds, [Tap(tap)])

    @of_any_case
    def test_segments_need_no_more_than_their_taps_do(self, case: Case) -> None:
        """Feeds that no tap depends on need no value; a tap that is a feed is handed out as it is fed, reduced too."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        op = graph.linear_ops[-1]
        x = op.data_inputs[0]
        spare = next((t for t in graph.tensors if t not in (x, op.output) and graph.tensors[t].is_float), None)
        _, _, simulation = plain(backend, case)
        segments: list[Callable[[Any, Any], Any]] = [simulation.segment]
        if isinstance(backend, PartialExecution):
            segments.append(lambda feeds, taps: backend.segment(model, feeds, taps))
        value = run(backend.session(model, [Tap(x)]), case.batch)[x]
        for segment in segments:
            taps = [Tap(op.output), Tap(x), Tap(x, "minmax"), Tap(x, step=2)]
            found = segment([x, *([spare] if spare is not None else [])], taps).run({x: value})
            assert np.array_equal(found[Tap(x)], value)
            assert np.array_equal(found[Tap(x, "minmax")], np.stack([value.min(), value.max()]))
            assert np.array_equal(found[Tap(x, step=2)], value.reshape(len(value), -1)[:, ::2])


def refused(error: type[Exception], name: str, what: str, call: Callable[..., object], *arguments: object) -> None:
    """Assert that a call raises this error, and that its message has the name."""
    try:
        call(*arguments)
    except error as raised:
        assert name in str(raised), f"{what}: the message doesn't name {name}: {raised}"
    except Exception as other:
        pytest.fail(f"{what}: {type(other).__name__} where {error.__name__} belongs: {other}")
    else:
        pytest.fail(f"{what} was taken; {error.__name__} belongs there")


def _spoilt(value: Array, by: float) -> Array:
    """A copy with one value replaced."""
    copy = np.array(value, np.float32)
    copy.reshape(-1)[-1:] = by
    return copy


def _channelled(graph: Graph, plan: Plan) -> list[tuple[TensorId, int, int]]:
    """Activation sites with a known number of channels, the axis and the number."""
    found = []
    for site in plan.activations:
        tensor = graph.tensors[site]
        if tensor.shape is not None and tensor.channel_axis is not None:
            axis = tensor.channel_axis % len(tensor.shape)
            channels = tensor.shape[axis]
            if channels is not None and channels > 1:
                found.append((site, axis, channels))
    return found


def _misfits(graph: Graph, plan: Plan) -> Iterator[tuple[SiteId, Encoding]]:
    """Sites with encodings that can't be right for them."""

    def made(granularity: Granularity, *shape: int) -> Encoding:
        return Encoding(8, True, True, np.full(shape, 0.05, np.float32), np.zeros(shape, np.int32), granularity)

    for site, axis, channels in _channelled(graph, plan):
        rank = len(graph.tensors[site].shape or ())
        for count in {1, channels - 1, channels + 1} - {0, channels}:
            yield site, made(PerChannel(axis), count)
        yield site, made(PerChannel(rank), channels)
        yield site, made(Blockwise(axis, (axis + 1) % rank, 1), channels, 1)
    for site in plan.parameters:
        shape = graph.params[site].shape
        for count in {1, shape[0] + 1} - {shape[0]}:
            yield site, made(PerChannel(0), count)
        yield site, made(PerChannel(len(shape)), shape[0])
        whole = Blockwise(0, 1, shape[1])
        yield site, made(whole, shape[0], 2)
        yield site, made(whole, shape[0] + 1, 1)
        yield site, made(Blockwise(0, 1, shape[1] + 1), shape[0], 1)
        yield site, made(Blockwise(0, 0, 1), shape[0], shape[0])
        yield site, made(Blockwise(0, 1, 0), shape[0], 1)
