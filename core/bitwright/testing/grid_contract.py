"""The part of the backend contract about grids: every format, on every kind of site, changed while sessions are open.

Each test opens one simulation and one session and installs one encoding after another: a session follows `set`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitwright.backend import Backend, PartialExecution, Session, Simulation, Tap
from bitwright.graph import Graph, Op, OpKind, ParamRole
from bitwright.grids import (
    FLOAT_FORMATS,
    Blockwise,
    Encoding,
    EncodingTable,
    PerChannel,
    QuantSpec,
    dynamic_encoding,
    encoding_from_range,
    encoding_of_weights,
)
from bitwright.placement import Derived, Plan, SharedWith, Site, SiteId, SiteKind
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    assert_close,
    bare,
    everything,
    grid_points,
    holds,
    linear_output,
    min_max_table,
    of_any_case,
    own,
    plain_bare,
    rows,
    run,
)
from bitwright.testing.harness import simple_plan
from bitwright.testing.replay import agrees, departure

ACTIVATION_SPECS = (
    QuantSpec(8, signed=False, symmetric=False),
    QuantSpec(8),
    QuantSpec(8, strict=True),
    QuantSpec(4, signed=False, symmetric=False),
    QuantSpec(2),
    QuantSpec(16, signed=False, symmetric=False),
    QuantSpec(16),
    *(QuantSpec(16 if "16" in name else 8, float_format=name) for name in FLOAT_FORMATS),  # type: ignore[arg-type]
)
"""Of tensors with one scale."""
RUN_TIME_TYPES = ("uint8:dynamic", "int8:per_token", "uint4:per_token")
"""Grids that the values themselves span."""


class GridContract(Contract):
    """Encodings of every format, where they may be."""

    @of_any_case
    def test_fake_quantization_is_the_core_s_grid(self, case: Case) -> None:
        """Bit-equal to `Encoding.fake_quantize`: codes, midpoints, beyond the ends, subnormal floats, overflow."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        for t in (t for t in graph.inputs if graph.tensors[t].is_float):
            _, simulation = plain_bare(backend, case)
            session = simulation.session([Tap(t)])
            for spec in ACTIVATION_SPECS:
                for encoding in _input_encodings(spec):
                    points = float_points if encoding.float_format else grid_points
                    batch = {**case.batch, t: points(encoding, case.batch[t].shape)}
                    simulation.set({t: encoding})
                    found = run(session, batch)[t]
                    expected = encoding.fake_quantize(batch[t])
                    off = found != expected
                    told = f"{batch[t][off][:4]} → {found[off][:4]}, not {expected[off][:4]}"
                    assert not off.any(), f"{t}, {spec}: {told}"

    def test_ranges_at_run_time(self, case: Case) -> None:
        """Bit-equal to `Encoding.fake_quantize`: of tensors and of tokens, of zeros and of numbers too small to divide
        by, before a fixed grid; ops compute with what was rounded."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan = simple_plan(graph)
        simulation = bare(backend, case, plan)
        for t in [t for t in graph.inputs if graph.tensors[t].is_float][:1]:
            session = simulation.session([Tap(t)])
            values = spread_rows(case.batch[t])
            for type in RUN_TIME_TYPES:
                encoding = dynamic_encoding(type)
                simulation.set({t: encoding})
                assert simulation.get()[t].equals(encoding)
                for batch in (values, np.zeros_like(values), np.full_like(values, -3.3)):
                    found = run(session, {**case.batch, t: batch})[t]
                    expected = encoding.fake_quantize(batch)
                    off = found != expected
                    assert not off.any(), f"{t}, {type}: {batch[off][:4]} → {found[off][:4]}, not {expected[off][:4]}"
            fixed = encoding_from_range(QuantSpec(8), -1.3, 2.1)
            simulation.set({t: fixed})
            found = run(session, {**case.batch, t: values})[t]
            assert np.array_equal(found, fixed.fake_quantize(values)), f"{t}, on a fixed grid again"
            simulation.set({t: None})
        for op in [op for op in graph.linear_ops if op.data_inputs[0] in plan.activations][-1:]:
            site, encoding = op.data_inputs[0], dynamic_encoding("int8:per_token")
            session = simulation.session([Tap(site), *_ends([op])])
            plain = run(session, case.batch)[site]
            simulation.set({site: encoding})
            quantized = run(session, case.batch)
            assert agrees(quantized[site], plain, encoding, max(case.tolerance, 1e-5)), (
                f"{site}: {departure(quantized[site], plain, encoding)}"
            )
            self._check_linear(graph, [op], quantized, backend.read(model, own(op)), {}, case)

    @of_any_case
    def test_activations_of_every_format(self, case: Case) -> None:
        """Each tensor, on a grid of each format in turn, is the float tensor on that grid."""
        plan, simulation = plain_bare(self.backend(), case)
        sites = list(plan.activations)
        session = simulation.session([Tap(t) for t in sites])
        floats = run(session, case.batch)
        for at, spec in enumerate((*ACTIVATION_SPECS, None)):
            # One site at a time would take a run for each; two that lie apart don't touch one another's values.
            site = sites[at % len(sites)]
            values = floats[site]
            if spec is None:
                simulation.set({site: None})
                found = run(session, case.batch)[site]
                assert_close(found, values, case.tolerance, f"{site}, bypassed again")
                continue
            low, high = float(values.min()), float(values.max())
            encoding = encoding_from_range(spec, 0.9 * low, 0.9 * high)
            if encoding.float_format and "16" not in encoding.float_format:
                encoding = encoding.with_(scale=np.float32(max(abs(low), abs(high), 0.1) / 100))
            simulation.set({site: encoding})
            found = run(session, case.batch)[site]
            assert agrees(found, values, encoding, max(case.tolerance, 1e-5)), (
                f"{site}, {spec}: {departure(found, values, encoding)}"
            )
            assert simulation.get()[site].equals(encoding)
            simulation.set({site: None})

    def test_weights_of_every_format(self, case: Case) -> None:
        """One scale, one for each channel, blocks, two levels, floats: ops compute with their weight on that grid."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        _, simulation = plain_bare(backend, case)
        ops = graph.linear_ops
        params = backend.read(model, [p for op in ops for p in own(op)])
        session = simulation.session(_ends(ops))
        formats = {op.weight: list(weight_encodings(op, params[op.weight or ""])) for op in ops if op.weight}
        for at in range(max(map(len, formats.values()), default=0)):
            chosen = {w: found[at % len(found)] for w, found in formats.items()}
            simulation.set(chosen)
            values = run(session, case.batch)
            self._check_linear(graph, ops, values, params, chosen, case)
        assert holds(simulation, chosen)
        simulation.set(dict.fromkeys(chosen))
        self._check_linear(graph, ops, run(session, case.batch), params, {}, case)

    def test_derived_biases_are_quantized(self, case: Case) -> None:
        """An int32 bias is rounded, and clipped, on the grid that it is given: one scale, or one for each channel."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        ops = [op for op in graph.linear_ops if ParamRole.BIAS in op.params]
        if not ops:
            pytest.skip("no linear op of this case has a bias")
        plan = simple_plan(graph)
        biases = {op.params[ParamRole.BIAS]: op for op in reversed(ops)}
        plan = plan.changed({
            b: Site(b, SiteKind.PARAMETER, Derived((op.data_inputs[0], op.weight or "")), op.id, ParamRole.BIAS)
            for b, op in biases.items()
        })  # fmt: skip
        params = backend.read(model, [p for op in ops for p in own(op)])
        table = min_max_table(backend, case, plan)
        grids = [{b: encoding for b in biases for encoding in [_bias_grid(params[b], form)]} for form in range(3)]
        simulation = backend.simulate(model, plan, EncodingTable({**table, **grids[0]}))
        simulation.set({s: None for s in plan.quantized if s not in biases})
        session = simulation.session(_ends(ops))
        for chosen in grids:
            simulation.set(chosen)
            self._check_linear(graph, ops, run(session, case.batch), params, chosen, case)
            assert holds(simulation, chosen)
        simulation.set(dict.fromkeys(biases))
        self._check_linear(graph, ops, run(session, case.batch), params, {}, case)

    @of_any_case
    def test_tied_sites_have_one_grid(self, case: Case) -> None:
        """Any two tensors may be tied: whichever is set, both are on the grid, in sessions that are open already."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        pair = _apart(graph, simple_plan(graph))
        if pair is None:
            pytest.skip("the case has no two tensors of which neither is the other's values")
        root, tied = pair
        plan = simple_plan(graph)
        plan = plan.changed({tied: replace(plan[tied], decision=SharedWith(root))})
        table = min_max_table(backend, case, plan)
        simulation = bare(backend, case, plan)
        session = simulation.session([Tap(root), Tap(tied)])
        for name, factor in ((root, 9), (tied, 17), (root, 5)):
            coarse = table[root].with_(scale=table[root].scale * np.float32(factor))
            simulation.set({name: coarse})
            assert holds(simulation, {root: coarse, tied: coarse})
            for t, v in run(session, case.batch).items():
                assert np.array_equal(coarse.fake_quantize(v), v), f"{t} isn't on the grid that was set at {name}"
        simulation.set({tied: None})
        assert not {root, tied} & set(simulation.get())
        plain = run(backend.session(model, [Tap(root), Tap(tied)]), case.batch)
        for t, v in run(session, case.batch).items():
            assert_close(v, plain[t], case.tolerance, f"{t}, bypassed again")

    @of_any_case
    def test_tied_weights_have_one_grid(self, case: Case) -> None:
        """Two parameters of one shape may share an encoding."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan = simple_plan(graph)
        first = next(iter(graph.linear_ops), None)
        second = next((op for op in graph.linear_ops if first is not None and op.weight != first.weight), None)
        if first is None or second is None:
            pytest.skip("the case has no two weights")
        root, tied = first.weight or "", second.weight or ""
        plan = plan.changed({tied: replace(plan[tied], decision=SharedWith(root))})
        simulation = bare(backend, case, plan)
        params = backend.read(model, [p for op in (first, second) for p in own(op)])
        session = simulation.session(_ends((first, second)))
        for name, scale in ((root, 0.11), (tied, 0.23)):
            encoding = _one_scale(4, scale)
            simulation.set({name: encoding})
            chosen = {root: encoding, tied: encoding}
            self._check_linear(graph, (first, second), run(session, case.batch), params, chosen, case)
            assert simulation.get()[tied].equals(encoding)

    @of_any_case
    def test_the_simulated_model_follows_too(self, case: Case) -> None:
        """What a session is opened with after `set` is what one opened before computes, a segment's too; another
        simulation of the model, and what `get` has handed out, stay as they are."""
        backend, model = self.backend(), case.model
        graph = backend.graph(model)
        plan = simple_plan(graph, weights=QuantSpec(4))
        table = min_max_table(backend, case, plan)
        simulation = backend.simulate(model, plan, table)
        taps = [Tap(t) for t in graph.outputs]
        before = simulation.session(taps)
        first, held = run(before, case.batch), simulation.get()
        segment, fed = _segment(backend, case, simulation, graph)
        coarse = {s: e.with_(scale=e.scale * np.float32(1.7)) for s, e in table.items()}
        simulation.set(coarse)
        assert all(held[s].equals(e) for s, e in table.items()), "what `get` handed out has changed"
        followed, anew = run(before, case.batch), run(simulation.session(taps), case.batch)
        beside = backend.simulate(model, plan, table.merged(coarse)).session(taps)
        other = run(beside, case.batch)
        for t in graph.outputs:
            assert np.array_equal(followed[t], anew[t]), t
            assert np.array_equal(followed[t], other[t]), t
        if segment is not None:
            again, _ = _segment(backend, case, simulation, graph)
            assert again is not None, "a segment that was cut can't be cut again"
            for t, v in run(segment, fed).items():
                assert np.array_equal(v, run(again, fed)[t]), f"{t}, of a segment that was open"
        simulation.set(table)
        for t, v in run(before, case.batch).items():
            assert np.array_equal(v, first[t]), t
        for t, v in run(beside, case.batch).items():
            assert np.array_equal(v, other[t]), f"{t}, by another simulation of the model"

    def _check_linear(
        self,
        graph: Graph,
        ops: Sequence[Op],
        values: Mapping[str, Array],
        params: Mapping[str, Array],
        chosen: dict[str, Encoding],
        case: Case,
    ) -> None:
        for op in ops:
            held = {p: chosen[p].fake_quantize(params[p]) if p in chosen else params[p] for p in own(op)}
            expected = linear_output(graph, op, values[op.data_inputs[0]], held)
            told = ", ".join(f"{p}: {_told(chosen[p])}" for p in own(op) if p in chosen)
            assert_close(rows(graph, op, values[op.output]), expected, max(case.tolerance, 1e-5), f"{op.id} ({told})")


def _segment(
    backend: Backend[Any], case: Case, simulation: Simulation[Any], graph: Graph
) -> tuple[Session | None, Mapping[str, Array]]:
    """The last linear op of a simulated network alone, and what it is fed; None where segments aren't there."""
    op = next((op for op in reversed(graph.linear_ops) if graph.tensors[op.data_inputs[0]].is_float), None)
    if op is None or not isinstance(backend, PartialExecution):
        return None, {}
    site = op.data_inputs[0]
    return simulation.segment([site], [Tap(op.output)]), {site: everything(backend, case)[site]}


def float_points(encoding: Encoding, shape: Sequence[int]) -> Array:
    """Values where rounding to a float format goes wrong: ties, subnormals, the largest values and beyond."""
    exponent_bits, mantissa_bits, largest = FLOAT_FORMATS[str(encoding.float_format)]
    bias = 2 ** (exponent_bits - 1) - 1
    step = 2.0 ** (1 - bias - mantissa_bits)  # between subnormal numbers
    ulp = 2.0**-mantissa_bits
    halves = np.arange(0, 2 * 2 ** min(mantissa_bits, 3) + 3) / 2
    near = [1 + h * ulp for h in halves] + [largest * f for f in (1, 1 - ulp / 4, 1 + ulp / 8, 1.5)]
    low = [h * step for h in halves] if step > 1e-37 else []  # float32 has subnormals of its own below
    with np.errstate(over="ignore"):
        points = np.array([0.0, *near, *low, 3.14159, 0.1, 77.7]) * np.float64(encoding.scale)
    points = np.clip(np.concatenate([points, -points]), -3e38, 3e38).astype(np.float32)
    return np.resize(points, int(np.prod(shape))).reshape(shape)


def spread_rows(values: Array) -> Array:
    """Values whose rows have ranges of very different sizes, one of zeros and one of subnormal numbers among them."""
    rows = np.array(values, np.float32).reshape(-1, values.shape[-1])
    rows *= np.resize(np.array([1, 100, 1e-3, 0, 1e-40, 7], np.float32), len(rows))[:, None]
    return rows.reshape(values.shape)


def weight_encodings(op: Op, weight: Array) -> Iterator[Encoding]:
    """Encodings of every format that fits an op's weight; scales differ enough that no two can be mistaken."""
    axis = 1 if op.kind is OpKind.CONV_TRANSPOSE else 0
    across = 1 - axis
    channels, length = weight.shape[axis], weight.shape[across]
    spread = np.linspace(0.6, 1.8, channels, dtype=np.float32)
    specs = [
        QuantSpec(4),
        QuantSpec(8, signed=False, symmetric=False),
        QuantSpec(4, granularity=PerChannel(axis)),
        QuantSpec(8, signed=False, symmetric=False, granularity=PerChannel(axis)),
        QuantSpec(8, strict=True, granularity=PerChannel(across)),
        QuantSpec(16, granularity=PerChannel(axis)),
    ]
    size = next((n for n in (2, 3, 5, 7) if length % n == 0), length)
    specs.append(QuantSpec(4, granularity=Blockwise(axis, across, size)))
    specs.append(QuantSpec(4, granularity=Blockwise(axis, across, size, decompressed_bits=8)))
    specs += [QuantSpec(16 if "16" in name else 8, float_format=name) for name in FLOAT_FORMATS]  # type: ignore[arg-type]
    specs.append(QuantSpec(8, float_format="float8e4m3fn", granularity=PerChannel(axis)))
    blocks = Blockwise(axis, across, size)
    specs += [QuantSpec(4, float_format="float4e2m1", granularity=blocks, scale_type="float8e8m0"),
              QuantSpec(8, float_format="float8e4m3fn", granularity=blocks, scale_type="float8e8m0"),
              QuantSpec(4, float_format="float4e2m1", granularity=blocks, scale_type="float8e4m3fn"),
              QuantSpec(4, float_format="nf4", granularity=blocks)]  # fmt: skip
    for spec in specs:
        made = encoding_of_weights(weight, spec)
        layout = made.granularity
        if isinstance(layout, PerChannel) and layout.axis == axis:
            made = made.with_(scale=made.scale * spread)
        elif isinstance(layout, Blockwise) and layout.decompressed_bits is None:
            made = made.with_(scale=made.scale * spread[:, None])
        elif made.float_format and made.float_format.startswith("float8") and made.scale.ndim == 0:
            made = made.with_(scale=np.float32(0.013))
        yield made


def _input_encodings(spec: QuantSpec) -> Iterator[Encoding]:
    if spec.float_format is None:
        yield encoding_from_range(spec, -1.3, 2.1)
        return
    yield _one_scale(spec.bits, 1.0).with_(float_format=spec.float_format)
    if spec.bits == 8:
        yield _one_scale(8, 0.037).with_(float_format=spec.float_format)


def _bias_grid(bias: Array, form: int) -> Encoding:
    """A 32-bit grid so coarse that its rounding shows; per channel; one so fine that the largest values are clipped."""
    reach = max(float(np.abs(bias).max(initial=0)), 0.1)
    if form == 1:
        scale = (reach / np.linspace(2.3, 4.7, len(bias))).astype(np.float32)
        return Encoding(32, True, True, scale, np.zeros(len(bias), np.int32), PerChannel(0))
    return _one_scale(32, reach / 3.3 if form == 0 else reach / 2**31 / 1.6)


def _one_scale(bits: int, scale: float) -> Encoding:
    return Encoding(bits, True, True, np.asarray(scale, np.float32), np.zeros((), np.int32))


def _apart(graph: Graph, plan: Plan) -> tuple[SiteId, SiteId] | None:
    """Two float tensors that ops compute anew, the second after the first."""
    made = [op.output for op in graph if op.kind in (OpKind.CONV, OpKind.LINEAR, OpKind.CONV_TRANSPOSE, OpKind.ADD)]
    found = [t for t in made if t in plan.activations]
    return (found[0], found[-1]) if len(found) > 1 else None


def _ends(ops: Sequence[Op]) -> list[Tap]:
    return [Tap(t) for t in dict.fromkeys(t for op in ops for t in (op.data_inputs[0], op.output))]


def _told(encoding: Encoding) -> str:
    kind = encoding.float_format or f"{'int' if encoding.signed else 'uint'}{encoding.bits}"
    return f"{kind} {encoding.granularity}"
