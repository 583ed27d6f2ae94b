"""The base of dataflow backends, on a backend whose parameters lie otherwise and whose functions add no bias."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from bitwright.backend import ParamUpdates, Tap, TrainableSimulation, Training
from bitwright.dataflow import FlowBackend, FlowModel, Layout, NumpyLike, TrainableFlow
from bitwright.errors import InputError, ModelError
from bitwright.graph import (
    ACTIVATION_TYPES,
    LINEAR_KINDS,
    Graph,
    OpKind,
    ParamRole,
    ReplaceActivation,
    SetBias,
    output_channels,
)
from bitwright.grids import FLOAT_FORMATS, NUMPY, Encoding, Groups, PerChannel, QuantSpec, fake_quantize_vjp
from bitwright.testing import models
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.testing.contract_base import holds
from bitwright.testing.harness import min_max_encodings, simple_plan
from bitwright.testing.kernels import compute
from bitwright.testing.reference import ReferenceBackend, ReferenceModel


@dataclass(frozen=True, eq=False)
class TwistedModel(FlowModel):
    """Weights lie (kernel…, in, out), those of transposed convolutions flipped, vectors as rows."""


def twisted(model):
    graph, layouts = model.graph, {}
    for op in graph:
        for role, p in op.params.items():
            rank = len(graph.params[p].shape)
            if role is ParamRole.WEIGHT:
                layout = Layout().permuted(*reversed(range(rank)))
                layouts[p] = layout.flipped(*range(2, rank)) if op.kind is OpKind.CONV_TRANSPOSE else layout
            else:
                layouts[p] = Layout().reshaped((1, *graph.params[p].shape), graph.params[p].shape)
    params = {p: replace(param, layout=layouts[p].order) for p, param in graph.params.items()}
    graph = Graph(graph.ops, graph.tensors, params, graph.inputs, graph.outputs)
    return TwistedModel(graph, dict(model.params), dict(model.native), layouts)


class TwistedBackend(FlowBackend[TwistedModel]):
    name = "twisted"
    model_type = TwistedModel

    def adopt(self, model, sample=None):
        return twisted(model) if isinstance(model, ReferenceModel) else model

    def adds_bias(self, model, op):
        return False

    def function(self, model, op):
        def run(inputs, params):
            assert op.kind not in LINEAR_KINDS or ParamRole.BIAS not in params
            canonical = {r: model.layouts[op.params[r]].canonical(v) for r, v in params.items()}
            bare = replace(op, params={r: p for r, p in op.params.items() if r in canonical})
            return compute(bare, model.graph, inputs, canonical, model.native.get(op.id, ()))

        return run


BACKEND = TwistedBackend()


class TestTwistedBackend(BackendContract):
    declines: ClassVar = {"recurrent": "the kernels have no recurrent ops"}

    def backend(self):
        return BACKEND

    def native_value(self, model, param):
        layout = model.layouts[param]
        return model.params[param] if layout.order is None else layout.native(model.params[param])

    def cases(self):
        return {
            name: Case(lambda make=make: twisted(make()), models.batch(make()))
            for name, make in models.BACKEND_MODELS.items()
        }


def test_layouts_are_undone():
    rng = np.random.default_rng(0)
    native = rng.normal(size=(3, 3, 4, 6))
    layout = Layout().permuted(2, 3, 0, 1).flipped(2, 3).reshaped((4, 6, 3, 3), (4, 6, 9)).permuted(1, 0, 2)
    canonical = layout.canonical(native)
    assert canonical.shape == (6, 4, 9)
    assert np.array_equal(canonical[1, 2].reshape(3, 3), native[::-1, ::-1, 2, 1])
    assert np.array_equal(layout.native(canonical), native)
    assert layout.order is None
    assert Layout().permuted(3, 2, 0, 1).permuted(1, 0, 2, 3).order == (2, 3, 0, 1)
    assert Layout().permuted(1, 0).permuted(1, 0).order is None
    back = Layout().permuted(1, 2, 0).then(Layout().permuted(2, 0, 1).reshaped((4, 6), (24,)))
    assert back.reshaped((24,), (4, 6)) == Layout()
    assert Layout().permuted(0, 1) == Layout() == Layout().reshaped((2, 3), (2, 3)).flipped()


def test_files_keep_layouts_activations_put_in_and_biases(tmp_path):
    model = twisted(models.transposed())
    edits = [ReplaceActivation("act1", "Gelu"), SetBias("up1", np.arange(6.0))]
    edited = BACKEND.edit(model, edits)
    again = BACKEND.load(BACKEND.save(edited, tmp_path / "model.npz"))
    assert again.layouts == edited.layouts
    assert again.graph.ops == edited.graph.ops
    batch, taps = models.batch(models.transposed()), [Tap(t) for t in model.graph.outputs]
    found, expected = (BACKEND.session(m, taps).run(batch)[taps[0]] for m in (again, edited))
    assert np.array_equal(found, expected)
    with pytest.raises(InputError, match=r"not a reference model: it was written by twisted, version 1"):
        ReferenceBackend().load(tmp_path / "model.npz")


def test_simulations_take_new_parameters_in_every_layout():
    model = twisted(models.transposed())
    plan, batch = simple_plan(model.graph), models.batch(models.transposed())
    simulation = BACKEND.simulate(model, plan, min_max_encodings(BACKEND, model, plan, [batch]))
    assert isinstance(simulation, ParamUpdates)
    session = simulation.session([Tap(t) for t in model.graph.outputs])
    before = next(iter(session.run(batch).values()))
    simulation.set_params({"conv.weight": np.zeros(model.graph.params["conv.weight"].shape)})
    assert not np.array_equal(next(iter(session.run(batch).values())), before)
    with pytest.raises(ModelError, match="no parameter 'nowhere'"):
        simulation.set_params({"conv.bias": np.ones(8), "nowhere": np.ones(1)})
    assert not np.array_equal(simulation.model.params["conv.bias"], np.ones(8))


@pytest.mark.parametrize("format", FLOAT_FORMATS)
def test_float_formats_are_the_core_s_to_the_bit(format):
    rng = np.random.default_rng(0)
    _, mantissa, largest = FLOAT_FORMATS[format]
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([bits[np.isfinite(bits)], np.float32([0.0, -0.0, largest, -largest, min(largest * 2, 3e38)])])
    halves = np.ldexp(np.arange(2**mantissa, 2 ** (mantissa + 1)) + 0.5, -mantissa).astype(np.float32)
    x = np.concatenate([x, *(np.ldexp(halves, e) for e in range(-30, 9))])
    scale = np.ones((), np.float32) if format.endswith("float16") else np.float32(0.37)
    wide = Encoding(16 if format.endswith("float16") else 8, True, True, scale, np.zeros((), np.int32),
                    float_format=format)  # fmt: skip
    expected = wide.fake_quantize(x)
    model, site = models.mlp(), "x"
    plan = simple_plan(model.graph)
    backend = ReferenceBackend()
    table = min_max_encodings(backend, model, plan, [models.batch(model)])
    simulation = backend.simulate(model, plan, table)
    simulation.set({site: wide})
    padded = np.resize(x, (-(-len(x) // 10), 10))
    with np.errstate(over="ignore"):
        found = simulation.session([Tap(site)]).run({site: padded})[Tap(site)]
    assert np.array_equal(found.reshape(-1)[: len(x)], expected)


def test_grids_of_32_bits_and_of_each_channel():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(64, 10)) * 100).astype(np.float32)
    model, backend = models.mlp(), ReferenceBackend()
    plan = simple_plan(model.graph)
    simulation = backend.simulate(model, plan, min_max_encodings(backend, model, plan, [models.batch(model)]))
    session = simulation.session([Tap("x")])
    wide = Encoding(32, True, True, np.float32(1e-7), np.int32(3))
    each = Encoding(8, False, False, np.linspace(0.1, 2, 10), np.arange(10), PerChannel(1))
    for encoding in (wide, each, wide):
        simulation.set({"x": encoding})
        assert np.array_equal(session.run({"x": x})[Tap("x")], encoding.fake_quantize(x))


def test_plain_numpy_functions_are_the_core_s_activations():
    x = np.concatenate([np.linspace(-8, 8, 1001), [-100, 100, -0.0]]).astype(np.float32)
    functions = NumpyLike(np).functions
    for name in functions.keys() & ACTIVATION_TYPES.keys():
        assert np.allclose(functions[name](x), ACTIVATION_TYPES[name].compute(x), atol=2e-6), name
        assert functions[name](x).dtype == np.float32, name


def test_biases_are_added_along_the_channels_wherever_they_lie():
    model = twisted(models.transposed())
    for op in model.graph.linear_ops:
        width = output_channels(op, model.graph.params[op.weight].shape)
        changed = BACKEND.edit(model, [SetBias(op.id, np.arange(width) * 10)])
        batch, tap = models.batch(models.transposed()), Tap(op.output)
        old = model.params.get(op.params.get(ParamRole.BIAS, ""), np.zeros(width))
        step = BACKEND.session(changed, [tap]).run(batch)[tap] - BACKEND.session(model, [tap]).run(batch)[tap]
        assert np.allclose(step, (np.arange(width) * 10 - old)[:, None, None], atol=1e-4)


class TrainableTwisted(TrainableFlow, TwistedBackend):
    """Without a framework that differentiates: what is computed, forwards and backwards, is looked at here."""

    gradients: ClassVar = []

    def with_vjp(self, forward, vjp):
        def run(*given):
            y = forward(*given)
            self.gradients.append(vjp(np.ones_like(y), *given))
            return y

        return run


def training(bits=4, **settings):
    model, batch = twisted(models.conv_bn_relu()), models.batch(models.conv_bn_relu())
    backend = TrainableTwisted()
    plan = simple_plan(model.graph, weights=QuantSpec(bits, granularity=PerChannel(0)))
    table = min_max_encodings(backend, model, plan, [batch])
    taps = [Tap(t) for t in model.graph.outputs]
    simulated = backend.simulate(model, plan, table).session(taps).run(batch)[taps[0]]
    made = backend.simulate_trainable(model, plan, table, Training(**settings))
    return model, backend, plan, table, batch, taps, simulated, made


@pytest.mark.parametrize("settings", [{}, {"range_learning": True}, {"range_learning": True, "gradient_scale": True}])
def test_training_starts_from_the_simulation_to_the_bit(settings):
    model, _backend, _plan, table, batch, _taps, simulated, made = training(**settings)
    assert isinstance(made, TrainableSimulation)
    assert np.array_equal(made.model(batch["x"]), simulated)
    assert made.get().keys() == table.keys()
    assert holds(made, table)
    params = made.model.params
    assert not {p for p in params["weights"] if "mean" in p or "var" in p}
    assert bool(params["scales"]) == bool(settings)
    for p, v in params["weights"].items():
        assert np.array_equal(model.layouts[p].canonical(v), model.params[p])


def test_weights_that_were_trained_have_grids_that_follow():
    model, backend, plan, table, batch, taps, simulated, made = training()
    made.model.params["weights"]["conv1.weight"] *= np.float32(3)
    found = made.get()["conv1.weight"]
    assert np.allclose(found.scale, 3 * table["conv1.weight"].scale)
    assert not np.array_equal(made.model(batch["x"]), simulated)
    again = backend.simulate(made.float_model(), plan, made.get()).session(taps).run(batch)[taps[0]]
    assert np.array_equal(again, made.model(batch["x"]))
    assert np.array_equal(made.session(taps).run(batch)[taps[0]], again)
    assert np.array_equal(backend.read(made.float_model(), ["conv1.weight"])["conv1.weight"],
                          3 * model.params["conv1.weight"])  # fmt: skip
    assert np.array_equal(backend.simulate(model, plan, table).session(taps).run(batch)[taps[0]], simulated)


def test_scales_that_were_trained_are_the_encodings():
    _model, backend, plan, table, batch, taps, _simulated, made = training(range_learning=True)
    made.model.params["scales"]["x"] = np.float32(np.log(2))
    found = made.get()["x"]
    assert np.allclose(found.scale, 2 * table["x"].scale)
    assert found.frozen
    again = backend.simulate(made.float_model(), plan, made.get()).session(taps).run(batch)[taps[0]]
    assert np.array_equal(again, made.model(batch["x"]))


def test_gradients_are_the_core_s():
    TrainableTwisted.gradients.clear()
    model, _backend, _plan, table, batch, _taps, _simulated, made = training(range_learning=True)
    made.model(batch["x"])
    weight = next(g for g in TrainableTwisted.gradients if np.shape(g[0]) == model.params["conv1.weight"].shape)
    form = table["conv1.weight"]
    zero = form.zero_point.astype(np.float32)
    groups = Groups.of(model.params["conv1.weight"].shape, form.granularity)
    ones = np.ones(model.params["conv1.weight"].shape, np.float32)
    expected = fake_quantize_vjp(NUMPY, ones, model.params["conv1.weight"], form.scale, zero, form.grid, groups)
    for a, b in zip(weight, expected, strict=True):
        assert np.array_equal(a, b)


def test_encodings_set_in_training_go_on_from_the_weights_as_they_are():
    _model, backend, plan, table, batch, taps, _simulated, made = training()
    made.model.params["weights"]["conv1.weight"] *= np.float32(2)
    coarse = table["x"].with_(scale=table["x"].scale * np.float32(4))
    made.set({"x": coarse})
    assert made.get()["x"].equals(coarse)
    again = backend.simulate(made.float_model(), plan, made.get()).session(taps).run(batch)[taps[0]]
    assert np.array_equal(again, made.model(batch["x"]))
