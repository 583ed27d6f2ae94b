"""The part of the backend contract about training: for backends that are `Trainable`, others skip it.

Everything but the step itself is read through the protocol: weights from `float_model`, grids from `get`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from bitwright.backend import Backend, Batch, Differentiable, Tap, Trainable, TrainableSimulation, Training
from bitwright.errors import ModelError
from bitwright.graph import Op, OpKind, ParamRole, SetParams, TensorId, columns, from_matrix
from bitwright.grids import (
    Encoding,
    EncodingTable,
    Groups,
    NumpyNamespace,
    PerChannel,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
    fake_quantize_vjp,
)
from bitwright.placement import Float, Plan
from bitwright.testing.contract_base import (
    Array,
    Case,
    Contract,
    assert_close,
    holds,
    min_max_table,
    of_any_case,
    own,
    rows,
    run,
)
from bitwright.testing.harness import simple_plan


class TrainingContract(Contract):
    """Simulations that the user's own loop trains."""

    def descend(
        self, simulation: TrainableSimulation, batch: Batch, cotangents: Mapping[TensorId, Array], rate: float
    ) -> None:
        """One step of plain gradient descent on Σ cotangent · output, over all that can be trained.

        Batch norms and dropout are as in inference. Give it, so that gradients are checked.

        Args:
            simulation: what `simulate_trainable` returned.
            batch: inputs.
            cotangents: by model output; of outputs that aren't here, zero.
            rate: what gradients are multiplied by.
        """
        raise NotImplementedError

    @of_any_case
    def test_training_starts_from_the_simulation(self, case: Case) -> None:
        """Before the first step a trainable simulation computes what the other does, and taken back it is the model."""
        backend, model = self._trainable(), case.model
        graph = backend.graph(model)
        plan = simple_plan(graph)
        table = min_max_table(backend, case, plan)
        taps = [Tap(t) for t in graph.outputs]
        expected = run(backend.simulate(model, plan, table).session(taps), case.batch)
        for training in (Training(), Training(range_learning=True)):
            simulation = backend.simulate_trainable(model, plan, table, training)
            for t, v in run(simulation.session(taps), case.batch).items():
                assert_close(v, expected[t], 1e-2, t)
                assert np.mean(v != expected[t]) < 0.02, t
            assert holds(simulation, table)
            taken = simulation.float_model()
            assert backend.owns(taken)
            assert [op.id for op in backend.graph(taken)] == [op.id for op in graph]
            before = backend.read(model, list(graph.params))
            for p, v in backend.read(taken, list(graph.params)).items():
                assert np.array_equal(v, before[p]), p

    @pytest.mark.parametrize("mode", ["regular", "range learning"])
    def test_gradients_are_the_core_s(self, case: Case, mode: str) -> None:
        """One step moves weights, biases and learned scales by what the core's vector-Jacobian products say."""
        backend, model = self._trainable(), case.model
        if type(self).descend is TrainingContract.descend:
            pytest.skip("give `descend` to have gradients checked")
        graph = backend.graph(model)
        op = next((op for op in graph.linear_ops if op.output in graph.outputs and _alone(backend, model, op)), None)
        if op is None:
            pytest.skip("no linear op of this case computes a model output with parameters of its own")
        assert op.weight is not None
        learning = mode == "range learning"
        plan, table = _one_layer(backend, model, op, case)
        simulation = backend.simulate_trainable(model, plan, table, Training(range_learning=learning))
        values = run(simulation.session([Tap(op.data_inputs[0]), Tap(op.output)]), case.batch)
        params = backend.read(model, own(op))
        cotangent = np.random.default_rng(0).normal(size=values[op.output].shape).astype(np.float32)
        found = _gradients(backend, model, op, values[op.data_inputs[0]], cotangent, params, table[op.weight])
        # So small that scales stay where the first order is all; so large that weights move visibly.
        rate = 0.05 / max(float(np.abs(found.log_scale).max()), 1e-6) if learning else 0.5
        self.descend(simulation, case.batch, {op.output: cotangent}, rate)
        moved = backend.read(simulation.float_model(), own(op))
        step = (params[op.weight].astype(np.float64) - moved[op.weight]) / rate
        assert_close(step, found.weight, 2e-3, f"gradient of {op.weight}")
        if ParamRole.BIAS in op.params:
            bias = op.params[ParamRole.BIAS]
            step = (params[bias].astype(np.float64) - moved[bias]) / rate
            assert_close(step, found.bias, 2e-3, f"gradient of {bias}")
        if learning:
            ratio = np.log(simulation.get()[op.weight].scale.astype(np.float64) / table[op.weight].scale)
            assert_close(-ratio / rate, found.log_scale, 5e-3, f"gradient of the scale of {op.weight}")
        for p, v in backend.read(model, own(op)).items():
            assert np.array_equal(v, params[p]), f"training changed the {p} of the model that was given"

    @of_any_case
    def test_pullbacks_compute_a_part_and_its_gradients(self, case: Case) -> None:
        """At values that are given, from the inputs or from inside; gradients agree with differences of values."""
        backend, model = self.backend(), case.model
        if not isinstance(backend, Differentiable):
            pytest.skip("the backend isn't Differentiable")
        graph = backend.graph(model)
        plan = simple_plan(graph, activations=None)
        ops = [op for op in graph.linear_ops if _alone(backend, model, op)]
        if not ops:
            pytest.skip("no linear op of this case has parameters of its own")
        before = backend.read(model, [op.weight or "" for op in ops])
        values = {p: (0.9 * v).astype(np.float32) for p, v in before.items()}
        taps = [t for t in graph.outputs if graph.tensors[t].is_float]
        inside = ops[-1]
        simulation = backend.simulate_differentiable(model, plan, min_max_table(backend, case, plan))
        simulation.set({s: None for s in plan.quantized if s not in values})  # matrices that several ops share
        whole = simulation.pullback(list(values), graph.inputs, taps)
        found = whole.run(case.batch, values)
        changed = backend.edit(model, [SetParams(values)])
        wanted = [Tap(t) for t in (*taps, inside.data_inputs[0], inside.output)]
        expected = run(backend.session(changed, wanted), case.batch)
        for t in taps:
            assert_close(found[t], expected[t], 1e-4, t)
        weight = inside.weight or ""
        part = simulation.pullback([weight], (inside.data_inputs[0], *graph.inputs), [inside.output])
        fed = {**case.batch, inside.data_inputs[0]: expected[inside.data_inputs[0]]}
        made = part.run(fed, {weight: values[weight]})
        assert_close(made[inside.output], expected[inside.output], 1e-4, inside.output)
        rng = np.random.default_rng(0)
        cotangents = {t: rng.normal(size=found[t].shape).astype(np.float32) for t in taps}
        gradients = whole.gradients(case.batch, values, lambda outputs: {t: cotangents[t] for t in outputs})

        def loss(moved: Mapping[str, Array]) -> float:
            outputs = whole.run(case.batch, {**values, **moved})
            return sum(float((outputs[t].astype(np.float64) * cotangents[t]).sum()) for t in taps)

        for p, gradient in gradients.items():
            assert gradient.shape == values[p].shape, p
            size = float(np.linalg.norm(gradient))
            if size:  # so small a step that few rectifiers turn, along which the loss changes most
                step = (gradient * (1e-3 * np.linalg.norm(values[p]) / size)).astype(np.float32)
                slope = (loss({p: values[p] + step}) - loss({p: values[p] - step})) / 2
                assert slope == pytest.approx(float((gradient * step).sum()), rel=0.05), f"gradient of {p}"
        assert any(g.any() for g in gradients.values())
        # Rounded activations let the gradient through: it is nearly the same.
        plan = simple_plan(graph)
        simulation = backend.simulate_differentiable(model, plan, min_max_table(backend, case, plan))
        simulation.set({s: None for s in plan.quantized if s in graph.params and s not in values})
        rounded = simulation.pullback(list(values), graph.inputs, taps).gradients(
            case.batch, values, lambda outputs: {t: cotangents[t] for t in outputs}
        )
        flat, other = (np.concatenate([g[p].ravel() for p in values]) for g in (gradients, rounded))
        alike = float(flat @ other) / float(np.linalg.norm(flat) * np.linalg.norm(other))
        assert 0.8 < alike < 1, f"gradients through rounded activations: {alike:.3f} of the same direction"
        for p, v in backend.read(model, list(values)).items():
            assert np.array_equal(v, before[p]), f"{p} of the model that was given changed"
        with pytest.raises(ModelError, match="plan quantizes"):
            simulation.pullback(["no such parameter"], graph.inputs, taps)

    def _trainable(self) -> Any:
        backend = self.backend()
        if not isinstance(backend, Trainable):
            pytest.skip("the backend isn't Trainable")
        return backend


@dataclass(frozen=True)
class _Gradients:
    weight: Array
    bias: Array
    log_scale: Array


def _alone(backend: Backend[Any], model: object, op: Op) -> bool:
    graph = backend.graph(model)
    return all(len(graph.users(p)) == 1 for p in own(op))


def _one_layer(backend: Backend[Any], model: object, op: Op, case: Case) -> tuple[Plan, EncodingTable]:
    """A plan that quantizes one op's weight and input, the weight on a grid that clips its largest values."""
    graph = backend.graph(model)
    assert op.weight is not None
    whole, source = simple_plan(graph), op.data_inputs[0]
    kept = {op.weight, source}
    plan = whole.changed({s: replace(x, decision=Float("not in this test")) for s, x in whole.items() if s not in kept})
    weight = backend.read(model, [op.weight])[op.weight]
    axis = 1 if op.kind is OpKind.CONV_TRANSPOSE else 0
    spec = QuantSpec(4, granularity=PerChannel(axis))
    values = run(backend.session(model, [Tap(source)]), case.batch)[source]
    inputs = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), values.min(), values.max())
    return plan, EncodingTable({op.weight: encoding_of_weights(weight * np.float32(0.7), spec), source: inputs})


def _gradients(
    backend: Backend[Any],
    model: object,
    op: Op,
    x: Array,
    cotangent: Array,
    params: Mapping[str, Array],
    grid: Encoding,
) -> _Gradients:
    """Of Σ cotangent · (Ŵ x + b), Ŵ the weight on its grid (`bitwright.grids.fake_quantize_vjp`)."""
    assert op.weight is not None
    graph = backend.graph(model)
    g = rows(graph, op, cotangent).astype(np.float64)
    cols = np.concatenate(list(columns(op, x, graph.tensors[op.data_inputs[0]].channel_axis)), axis=2)
    matrix = np.matmul(g.reshape(len(cols), -1, g.shape[1]), cols.astype(np.float64).swapaxes(1, 2))
    weight = params[op.weight]
    rounded = from_matrix(op, matrix, weight.shape)
    made = fake_quantize_vjp(
        NumpyNamespace(), rounded, weight, grid.scale, grid.zero_point.astype(np.float32), grid.grid,
        Groups.of(weight.shape, grid.granularity),
    )  # fmt: skip
    assert made.scale is not None
    return _Gradients(np.asarray(made.x), g.sum(axis=1), np.asarray(made.scale * grid.scale))
