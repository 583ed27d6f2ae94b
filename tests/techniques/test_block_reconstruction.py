"""Block reconstruction: blocks are found in the graph, their output error falls, and what can't be done is said."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Differentiable, Tap
from bitwright.bank import collect
from bitwright.errors import CapabilityError, InputError
from bitwright.graph import OpKind, ParamRole, SetParams
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.plugins import registry
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import MemoryStore, run_technique, simple_plan
from bitwright.testing.technique_contract import TechniqueContract
from bitwright_techniques.learned_weights import LearnedWeight, Learning
from bitwright_techniques.network_blocks import network_blocks

torch_only = pytest.mark.skipif("torch" not in FRAMEWORKS, reason="needs PyTorch")


@torch_only
class TestBlockReconstruction(TechniqueContract):
    settings: ClassVar = {"iterations": 4, "layers": 1, "samples": 12}

    @pytest.fixture(autouse=True)
    def _on_torch(self):
        self.on = FRAMEWORKS["torch"]

    def technique(self):
        return registry.technique("block_reconstruction")

    def models(self):
        return {"residual": models.residual}

    def interruptions(self, entries):
        return [1, entries - 1]


def residual(blocks=4):
    """Convolutions with a sum around each pair; the last one is dense."""
    b = Builder(0)
    x = b.relu("act", b.conv("stem", b.input("x", 3, 6, 6), 8, pad=1))
    for i in range(blocks):
        y = b.conv(f"b{i}", b.relu(f"act{i}", b.conv(f"a{i}", x, 8, pad=1)), 8, pad=1)
        x = b.binary(f"sum{i}", "Add", x, y)
    return b.build(b.linear("fc", b.flatten("flatten", x), 5))


def test_blocks_lie_between_places_where_one_tensor_passes():
    graph = residual().graph
    names = {op.id for op in graph.linear_ops}
    one = network_blocks(graph, names, additions=1, layers=9)
    assert [s.ops for s in one] == [("stem", "a0", "b0"), ("a1", "b1"), ("a2", "b2"), ("a3", "b3"), ("fc",)]
    assert [(s.feeds, s.taps) for s in one[:2]] == [
        (("x",), ("sum0.output",)),
        (("sum0.output",), ("sum1.output",)),
    ]
    assert one[-1].taps == graph.outputs
    two = network_blocks(graph, names, additions=2, layers=9)
    assert [len(s.ops) for s in two] == [5, 4, 1]
    few = network_blocks(graph, {"a1", "fc"}, additions=1, layers=9)
    assert [(s.ops, s.feeds) for s in few] == [(("a1",), ("sum0.output",)), (("fc",), ("flatten.output",))]
    short = network_blocks(models.mlp().graph, {"fc1", "fc2", "fc3"}, additions=2, layers=2)
    assert [s.ops for s in short] == [("fc1", "fc2"), ("fc3",)]


def test_sums_inside_of_a_block_are_none_of_its_additions():
    """Two heads, each a sum of two products, as rotary embeddings have."""
    b = Builder(0)
    x = b.linear("embed", b.input("x", 8), 8)
    for i in range(4):
        q, k = (b.linear(f"{n}{i}", x, 8) for n in "qk")
        turned = [b.binary(f"r{n}{i}", "Add", y, b.relu(f"a{n}{i}", y)) for n, y in (("q", q), ("k", k))]
        x = b.binary(f"sum{i}", "Add", x, b.binary(f"mix{i}", "Mul", *turned))
    graph = b.build(x).graph
    spans = network_blocks(graph, {op.id for op in graph.linear_ops}, additions=2, layers=9)
    assert [s.taps for s in spans] == [("sum1.output",), ("sum3.output",)]


def test_what_depends_on_no_layer_passes_beside_a_block():
    b = Builder(0)
    mask = b.activation("mask", b.input("m", 4), "Abs")
    x = b.input("x", 4)
    for i in range(3):
        x = b.binary(f"masked{i}", "Mul", b.linear(f"fc{i}", x, 4), mask)
    graph = b.build(x).graph
    spans = network_blocks(graph, {"fc0", "fc1", "fc2"}, additions=1, layers=1)
    assert [s.ops for s in spans] == [("fc0",), ("fc1",), ("fc2",)]
    assert [s.feeds for s in spans[1:]] == [("masked0.output", "mask.output"), ("masked1.output", "mask.output")]
    assert [s.taps for s in spans] == [(f"masked{i}.output",) for i in range(3)]


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, granularity=PerChannel(0)),
        QuantSpec(4, signed=False, symmetric=False, granularity=PerTensor()),
        QuantSpec(3, granularity=Blockwise(0, 1, 4)),
    ],
)
@pytest.mark.parametrize("rounding", [True, False])
def test_gradients_of_a_learned_weight_are_exact(spec, rounding):
    """Adam's first step goes by the gradient's sign: here that of ‖ŵ − t‖², against differences of it."""
    rng = np.random.default_rng(0)
    weight, target = (rng.normal(size=(6, 8)).astype(np.float32) for _ in range(2))
    how = Learning(rounding, True, 0.01, 0.01)

    def made(logs=0.0, v=None, at=0):
        held = LearnedWeight(weight, encoding_of_weights(weight, spec), how)
        held.logs.reshape(-1)[at] += logs
        if v is not None:
            held._v[v] += np.float32(1e-2)
        return held

    def loss(held):
        return float(np.square(held.relaxed().astype(np.float64) - target).sum())

    start = made()
    assert np.abs(start.relaxed() - np.clip(weight, *_ends(start))).max() < 1e-5 or not rounding
    gradient = 2 * (start.relaxed() - target)
    before, v = start.logs.copy(), start._v.copy()
    start.descend(gradient, None, 1.0)
    if rounding:
        for at in range(start.logs.size):
            slope = loss(made(1e-2, at=at)) - loss(made(-1e-2, at=at))
            assert np.sign((before - start.logs).reshape(-1)[at]) == np.sign(slope) or abs(slope) < 1e-4
        for at in list(np.ndindex(v.shape))[::7]:
            slope = loss(made(v=at)) - loss(made())
            assert np.sign((v - start._v)[at]) == np.sign(slope) or abs(slope) < 1e-4
    else:
        assert np.array_equal(start._v, v)
        assert (start.logs != before).any()
    value, encoding = start.result("test")
    assert np.array_equal(encoding.fake_quantize(value), start.rounded())
    assert (encoding.frozen, encoding.kept) == (rounding, not rounding)


def _ends(held):
    e = held.start
    scale, zero = e.spread(held.weight.shape)
    return (e.grid.qmin - zero) * scale, (e.grid.qmax - zero) * scale


@pytest.mark.parametrize("name", [n for n, p in FRAMEWORKS.items() if isinstance(p.backend(), Differentiable)])
def test_a_block_s_error_falls_and_weights_lie_on_their_grid(name):
    port, model = FRAMEWORKS[name], residual(2)
    data = [port.batch(models.batch(model, 8, s)) for s in range(4)]
    native = port.port(model)
    plan = simple_plan(port.backend().graph(native), weights=QuantSpec(3, granularity=PerChannel(0)))
    store = MemoryStore()
    technique = registry.technique("block_reconstruction")
    done = run_technique(technique, port.backend(), native, data, plan=plan, store=store, iterations=120)
    rows = [row for row in done.outcome.report.rows if isinstance(row[1], int)]
    assert [row[1] for row in rows] == [5, 1]
    assert all(row[3] < share * row[2] for row, share in zip(rows, (0.92, 0.5), strict=True)), rows
    for p, value in done.outcome.params.items():
        encoding = done.outcome.encodings[p]
        assert encoding.frozen
        assert np.array_equal(encoding.fake_quantize(value), value)
        assert not np.array_equal(value, done.context.encodings[p].fake_quantize(done.context.params[p]))
    assert set(store.entries) == {f"block/{op.id}" for op in done.context.graph.linear_ops}
    # What the last block hands on is what the whole quantized network makes: the first one's weights were in it.
    backend, tap = port.backend(), Tap(done.context.graph.outputs[0])
    simulation = backend.simulate(done.model, plan, done.context.encodings.merged(done.outcome.encodings))
    made, wanted = (
        np.concatenate([s.run(batch)[tap] for batch in data])
        for s in (simulation.session([tap]), backend.session(native, [tap]))
    )
    assert np.square(made - wanted).sum() / np.square(wanted).sum() == pytest.approx(rows[-1][3], rel=1e-3)
    # Scales that were searched stay, and codes that were chosen too.
    stem, fc = done.context.graph.linear_ops[0].weight, done.context.graph.linear_ops[-1].weight
    held = {
        stem: (wide := done.context.encodings[stem].with_(scale=done.context.encodings[stem].scale * 0.9, frozen=True)),
        fc: done.outcome.encodings[fc],
    }
    again = run_technique(technique, backend, backend.edit(native, [SetParams({fc: done.outcome.params[fc]})]), data,
                          plan=plan, encodings=held, iterations=5)  # fmt: skip
    assert again.outcome.encodings[stem].equals(wide.with_(source="block_reconstruction"))
    assert fc not in again.outcome.params
    assert "its codes are chosen (block_reconstruction)" in again.outcome.report.rows[-1]
    scales = run_technique(technique, port.backend(), native, data, plan=plan, rounding=False, iterations=30,
                           scale_rate=0.01)  # fmt: skip
    assert not scales.outcome.params
    first = scales.outcome.report.rows[0]
    assert first[3] < 0.9 * first[2]
    assert scales.outcome.encodings[stem].kept
    assert not scales.outcome.encodings[stem].frozen


@pytest.mark.skipif("onnx" not in FRAMEWORKS, reason="needs ONNX")
def test_it_is_refused_where_nothing_can_be_differentiated_and_on_banks(tmp_path):
    port, model = FRAMEWORKS["onnx"], models.mlp()
    data = port.batch(models.batch(model, 8))
    with pytest.raises(CapabilityError, match=r"block_reconstruction needs differentiable .* the onnx backend doesn't"):
        port.sim(model).apply("block_reconstruction", data)
    if "torch" in FRAMEWORKS:
        sim = FRAMEWORKS["torch"].sim(model, weights="int4")
        given = FRAMEWORKS["torch"].batch(models.batch(model, 8))
        with pytest.raises(InputError, match="a bank has none; pass the data"):
            sim.apply("block_reconstruction", collect(sim, given, tmp_path / "bank"))
        with pytest.raises(InputError, match="nothing to learn"):
            sim.apply("block_reconstruction", given, rounding=False, scales=False)


def test_kinds_of_ops_that_count_as_flow():
    """An embedding begins the flow, so that what is made of ids alone doesn't widen the cuts."""
    b = Builder(0)
    ids = b.input("ids", 4, dtype="int64", channel_axis=None)
    table = b.param("table", b.rng.normal(size=(9, 6)))
    x = b.op("embed", OpKind.EMBEDDING, "Gather", (ids,), (None, 4, 6), params={ParamRole.WEIGHT: table})
    for i in range(2):
        x = b.binary(f"sum{i}", "Add", x, b.linear(f"fc{i}", x, 6))
    spans = network_blocks(b.build(x).graph, {"fc0", "fc1"}, additions=1, layers=4)
    assert [(s.ops, s.feeds) for s in spans] == [(("fc0",), ("ids",)), (("fc1",), ("sum0.output",))]
