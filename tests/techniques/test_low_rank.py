"""Branches of low rank: the optimum on moments, the same on every backend, through simulation, export and verify."""

from __future__ import annotations

import json

import numpy as np
import pytest
from backends import BACKENDS, FRAMEWORKS
from layers import make_layer

from bitwright import RunDirectory, registry
from bitwright.backend import Tap
from bitwright.bank import collect
from bitwright.errors import CapabilityError, InputError, ModelError
from bitwright.graph import AddBranch, OpKind, ParamRole, branch_names
from bitwright.grids import Blockwise, QuantSpec
from bitwright.simulation import QuantSim
from bitwright.statistics import LayerMoments
from bitwright.technique import Outcome, Settings
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright.verify import verify
from bitwright_techniques.low_rank import LowRank, LowRankSettings, branch_of, correct_layer, output_power

WEIGHTS_ONLY = {"weights": "int4", "activations": "float"}


def network(seed=3, bias=True):
    """Three linear layers, one of them without bias."""
    b = Builder(seed)
    x = b.input("x", 24, channel_axis=1)
    y = b.relu("act1", b.linear("fc1", x, 32, bias=bias))
    y = b.relu("act2", b.linear("fc2", y, 20, bias=False))
    return b.build(b.linear("head", y, 8, bias=bias))


def data(model, count=3):
    mixing = np.random.default_rng(7).normal(size=(24, 24)).astype(np.float32) / 5
    return [{"x": np.asarray(models.batch(model, 48, s)["x"]) @ mixing} for s in range(count)]


def outputs(backend, model, batch):
    taps = [Tap(t) for t in backend.graph(model).outputs]
    return [np.asarray(v) for v in backend.session(model, taps).run(batch).values()]


# -- the solution


@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (9, 9)])
@pytest.mark.parametrize("centred", [False, True])
def test_no_other_branch_of_that_rank_leaves_less(shape, centred):
    """Against the closed form with an inverse, alternating least squares from random starts, and random branches."""
    rng = np.random.default_rng(0)
    layer = make_layer("linear", weight=None)
    x = (rng.normal(size=(400, shape[1])) @ rng.normal(size=(shape[1], shape[1])) + 0.5).astype(np.float32)
    moments = LayerMoments(layer.op, shape[1], paired=False)
    moments.update(x)
    error = rng.normal(size=shape)
    h = moments.second("xx", centred=centred)[0]
    values, vectors = np.linalg.eigh(h)
    root = vectors * np.sqrt(values)
    for rank in (1, 2, 4):
        down, up = branch_of(error, moments, rank, centred=centred)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        left = output_power(error - up.astype(np.float64) @ down, moments, centred=centred)
        u, s, v = np.linalg.svd(error @ root)
        assert left == pytest.approx(np.square(s[rank:]).sum(), rel=1e-4)
        direct = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)
        np.testing.assert_allclose(up @ down, direct, atol=1e-4 * np.abs(direct).max())
        least = np.inf
        for start in range(3):
            b = np.random.default_rng(start).normal(size=(rank, shape[1]))
            for _ in range(200):
                a = error @ h @ b.T @ np.linalg.inv(b @ h @ b.T)
                b = np.linalg.lstsq(a, error, rcond=None)[0]
            least = min(least, output_power(error - a @ b, moments, centred=centred))
        assert left <= least * (1 + 1e-5)
        other = rng.normal(size=up.shape) @ rng.normal(size=down.shape)
        assert left < output_power(error - other, moments, centred=centred)


def test_the_error_grows_for_no_input_and_is_gone_at_full_rank():
    """Also where fewer samples than features make H singular."""
    rng = np.random.default_rng(1)
    layer = make_layer("linear")
    for shape in ((6, 12), (12, 5)):
        moments = LayerMoments(layer.op, shape[1], paired=False)
        moments.update(rng.normal(size=(3, shape[1])).astype(np.float32))
        error = rng.normal(size=shape)
        probes = rng.normal(size=(shape[1], 100))
        norms = np.linalg.norm(error @ probes, axis=0)
        for rank in range(1, min(shape) + 1):
            down, up = branch_of(error, moments, rank)
            left = error - up.astype(np.float64) @ down
            assert (np.linalg.norm(left @ probes, axis=0) <= norms * (1 + 1e-6)).all()
            assert output_power(left, moments) <= output_power(error, moments) * (1 + 1e-6)
        full = min(shape) if shape[0] <= shape[1] else shape[1]
        down, up = branch_of(error, moments, full)
        assert output_power(error - up.astype(np.float64) @ down, moments) < 1e-10 * output_power(error, moments)


@pytest.mark.parametrize("shape", [(6, 12), (18, 12)])
def test_moments_in_blocks(shape):
    """What features of different blocks have in common is left out; of independent blocks nothing is."""
    rng = np.random.default_rng(2)
    layer = make_layer("linear")
    x = rng.normal(size=(500, 12)).astype(np.float32)
    x[:, :6] @= rng.normal(size=(6, 6)).astype(np.float32)
    error = rng.normal(size=shape)
    whole, parts = (LayerMoments(layer.op, 12, paired=False, blocks=blocks) for blocks in (1, 2))
    for moments in (whole, parts):
        moments.update(x)
    losses = []
    for moments in (whole, parts):
        down, up = branch_of(error, moments, 3)
        losses.append(output_power(error - up.astype(np.float64) @ down, whole))
    assert losses[0] <= losses[1] <= 1.1 * losses[0]


def test_matrices_are_of_one_size():
    layer = make_layer("linear")
    error = np.random.default_rng(3).normal(size=(6, 12)) * 1e-6
    down, up = branch_of(error, layer.moments, 2)
    ratio = np.abs(down).max(axis=1) / np.abs(up).max(axis=0)
    assert (ratio > 0.4).all()
    assert (ratio < 2.5).all()


def test_moments_that_overflow_are_refused():
    layer = make_layer("linear", x=np.full((4, 12), 1e20, np.float32))
    with pytest.raises(FloatingPointError, match="overflow"):
        branch_of(np.ones((6, 12)), layer.moments, 2)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(rounding, bias):
    """Figures are those of what is handed back: weight on its grid, half-precision branch, bias for the means."""
    layer = make_layer("linear", bias=bias)
    settings = LowRankSettings(rank=2, rounding=rounding)
    found = correct_layer(layer, settings, {"linear": "float16"})
    down, up = found.extra["down"], found.extra["up"]
    assert down.shape == (2, 12) and up.shape == (6, 2)
    for matrix in (down, up):
        assert np.array_equal(matrix, matrix.astype(np.float16))
    assert found.encoding.frozen
    np.testing.assert_array_equal(found.encoding.fake_quantize(found.weight), found.weight)
    error = layer.weight - found.weight
    powers = [output_power(m, layer.moments, centred=bias) for m in (layer.weight, error, error - up @ down)]
    assert found.figures["before"] == pytest.approx(powers[1] / powers[0], rel=1e-4)
    assert found.figures["after"] == pytest.approx(powers[2] / powers[0], rel=1e-4)
    assert found.figures["after"] < 0.9 * found.figures["before"]
    assert found.figures["parameters"] == 2 * (6 + 12)
    mean = layer.moments.mean[0]
    if bias:
        shift = (error - up @ down) @ mean + layer.bias - found.bias
        assert np.abs(shift).max() < 1e-5
    else:
        assert found.bias is None


def test_a_branch_that_brings_too_little_is_left_out():
    layer = make_layer("linear")
    wanted = correct_layer(layer, LowRankSettings(rank=2, least_gain=0), {"linear": "float"})
    gain = 1 - wanted.figures["after"] / wanted.figures["before"]
    below, above = (
        correct_layer(layer, LowRankSettings(rank=2, least_gain=gain + d), {"linear": "float"}) for d in (-1e-6, 1e-6)
    )
    assert below.extra and not above.extra
    assert above.figures["after"] == above.figures["before"]
    assert above.figures["parameters"] == 0
    np.testing.assert_array_equal(above.weight, wanted.weight)


# -- on networks


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_every_backend_gives_the_same(name, rounding):
    """The branches, and what the corrected network computes, are those of the reference backend."""
    model = network()
    results = {}
    for port in (BACKENDS["reference"], BACKENDS[name]):
        native, backend = port.port(model), port.backend()
        plan = simple_plan(backend.graph(native), weights=QuantSpec(4), activations=None)
        batches = [port.batch(b) for b in data(model)]
        done = run_technique(LowRank(), backend, native, batches, plan=plan, rank=3, rounding=rounding)
        branches = [e for e in done.outcome.edits if isinstance(e, AddBranch)]
        results[port.name] = [e.up @ e.down for e in branches], outputs(backend, done.model, batches[0])
        graph = backend.graph(done.model)
        for e in branches:
            names = branch_names(e.op)
            assert graph.op(names.total).output == backend.graph(native).op(e.op).output
    expected, found = results["reference"], results[name]
    assert len(expected[0]) == len(found[0]) == 3
    for a, b in zip(expected[0], found[0], strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3 * np.abs(a).max())
    for a, b in zip(expected[1], found[1], strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3 * np.abs(a).max())


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_branch_of_full_rank_gives_the_float_network_back(name):
    port, model = FRAMEWORKS[name], network()
    sim = port.sim(model, **WEIGHTS_ONLY)
    batches = [port.batch(b) for b in data(model)]
    (before,) = outputs(sim.backend, sim.native, batches[0])
    rounded = sim.fork().apply("gptq", batches)
    sim.apply("low_rank", batches, rank=32, branch_weights="float").calibrate(batches)
    (after,) = outputs(sim.backend, sim.native, batches[0])
    (coarse,) = outputs(sim.backend, rounded.native, batches[0])
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()
    assert np.abs(coarse - before).max() > 1e-2 * np.abs(before).max()
    tap = Tap(sim.graph.outputs[0])
    (simulated,) = sim.simulation.session([tap]).run(batches[0]).values()
    assert np.abs(np.asarray(simulated) - before).max() < 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_plan_the_simulation_and_saved_states(name, tmp_path):
    """Branch matrices have the type that was asked for; a state that is saved and opened computes the same."""
    port, model = FRAMEWORKS[name], network()
    sim = port.sim(model, **WEIGHTS_ONLY)
    batches = [port.batch(b) for b in data(model)]
    sim.apply("low_rank", batches, rank=2).calibrate(batches)
    report = sim.reports[-2 if sim.reports[-1][0] == "calibrate" else -1][1]
    assert report.figures["branches"] == 3
    assert report.figures["parameters"] == 2 * (24 + 32 + 32 + 20 + 20 + 8)
    for op in [op for op in sim.graph.linear_ops if op.id.endswith(("/down", "/up"))]:
        spec = sim.plan.spec(op.weight)
        assert (spec.bits, spec.float_format) == (16, "float16")
        assert sim.plan.spec(op.output) is None
    tap = Tap(sim.graph.outputs[0])
    (expected,) = sim.simulation.session([tap]).run(batches[0]).values()
    loaded = QuantSim.load(sim.save(tmp_path / "state"))
    (found,) = loaded.simulation.session([tap]).run(batches[0]).values()
    np.testing.assert_array_equal(found, expected)
    decisions = [{s: repr(x.decision) for s, x in each.plan.items()} for each in (loaded, sim)]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_branches_bring_networks_closer_to_float(name):
    """At static uint8 activations too, where branches are integers; the error on other data falls."""
    port, model = FRAMEWORKS[name], network()
    batches = [port.batch(b) for b in data(model, 4)]
    calibration, test = batches[:3], batches[3]
    for activations in ("float", "uint8"):
        sim = port.sim(model, weights="int4", activations=activations)
        (wanted,) = outputs(sim.backend, sim.native, test)
        tap, errors = Tap(sim.graph.outputs[0]), []
        for rank in (0, 8):
            fork = sim.fork()
            if rank:
                fork.apply("low_rank", calibration, rank=rank, rounding="nearest")
            fork.calibrate(calibration)
            (found,) = fork.simulation.session([tap]).run(test).values()
            errors.append(float(np.square(np.asarray(found) - wanted).sum()))
        assert errors[1] < 0.4 * errors[0], activations
        if activations == "uint8":
            weights = [fork.plan.spec(op.weight) for op in fork.graph.linear_ops if op.id.endswith("/down")]
            assert weights and all((s.bits, s.float_format) == (8, None) for s in weights)
            told = dict(fork.reports)["low_rank"].summary
            assert "errors are those of branches in float" in told


@pytest.mark.parametrize("activations", ["float", "uint8"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_exports_are_the_simulation(name, activations, tmp_path):
    """The export's own gate compares every tensor; the files hold the branch."""
    port, model = FRAMEWORKS[name], network()
    sim = port.sim(model, weights="int4", activations=activations)
    batches = [port.batch(b) for b in data(model)]
    sim.apply("low_rank", batches, rank=2).calibrate(batches)
    formats = [f for f in sim.backend.formats() if f.startswith("qdq") or f == next(iter(sim.backend.formats()))]
    bundle = sim.export(tmp_path / "out", formats=formats)
    assert all(p.exists() for p in bundle.files.values())
    quantized = next((p for k, p in bundle.files.items() if k.split("/")[0] == "qdq"), None)
    assert quantized is not None, formats
    import onnx

    nodes = onnx.load(quantized).graph.node
    assert sum(n.op_type in ("MatMul", "Gemm") for n in nodes) == 3 * 3


@pytest.mark.skipif("onnx" not in FRAMEWORKS, reason="needs ONNX")
def test_verify_agrees_with_onnx_runtime(tmp_path):
    port, model = FRAMEWORKS["onnx"], network()
    sim = port.sim(model, target="onnxruntime-cpu", weights="int8", activations="uint8")
    batches = [port.batch(b) for b in data(model)]
    sim.apply("low_rank", batches, rank=2, most_bits=8, least_gain=0).calibrate(batches)
    assert dict(sim.reports)["low_rank"].figures["branches"] == 3
    sim.export(tmp_path / "out")
    found = verify(tmp_path / "out", batches)
    assert not found.problems


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_branches_from_a_bank_are_those_from_data(name, tmp_path):
    port, model = FRAMEWORKS[name], network()
    sim = port.sim(model, **WEIGHTS_ONLY)
    samples = {k: np.concatenate([port.batch(b)[k] for b in data(model)]) for k in port.batch(data(model)[0])}
    bank = collect(sim, samples, tmp_path / "bank")
    on_data, on_bank = (sim.fork().apply("low_rank", d, rank=2) for d in (samples, bank))
    graph = on_data.graph
    assert [op.id for op in on_bank.graph] == [op.id for op in graph]
    for param in graph.params:
        np.testing.assert_array_equal(on_bank.params[param], on_data.params[param], err_msg=param)
    assert "on a bank of 144 samples" in on_bank.reports[-1][1].summary
    with pytest.raises(InputError, match="low_rank changed the network since"):
        on_bank.apply("gptq", bank)


def test_finished_layers_are_not_solved_again(tmp_path, monkeypatch):
    from bitwright_techniques import low_rank as module

    port, model = next(iter(FRAMEWORKS.values())), network()
    solved = []
    original = module.branch_of
    monkeypatch.setattr(module, "branch_of", lambda *a, **k: solved.append(1) or original(*a, **k))
    params, run = [], RunDirectory(tmp_path / "run")
    for _ in range(2):
        sim = port.sim(model, run=run, **WEIGHTS_ONLY)
        sim.apply("low_rank", [port.batch(b) for b in data(model)], rank=2)
        params.append({p: np.array(sim.params[p]) for p in sim.graph.params})
    assert len(solved) == 3
    assert params[0].keys() == params[1].keys()
    assert all(np.array_equal(params[0][p], params[1][p]) for p in params[0])


# -- what is left alone, and what is refused


def test_layers_are_left_alone_with_the_reason():
    port = next(iter(FRAMEWORKS.values()))
    model = models.conv_bn_relu(depth=1)
    batches = [port.batch(models.batch(model))]
    sim = port.sim(model, **WEIGHTS_ONLY)
    wide = sim.fork(
        overrides={next(op.id for op in sim.graph.linear_ops if op.kind is OpKind.LINEAR): {"weights": "int8"}}
    )
    for each, expected in ((sim, ["branches are for matrix products"]), (wide, ["matrix products", "8 bits"])):
        done = each.fork().apply("low_rank", batches, rank=2)
        reasons = [str(row[1]) for row in done.reports[-1][1].rows]
        assert all(any(e in r for r in reasons) for e in expected), reasons
    rounded = sim.fork().apply("gptq", batches).apply("low_rank", batches, rank=2)
    assert "frozen (gptq)" in rounded.reports[-1][1].summary
    assert not any(op.id.endswith("/down") for op in rounded.graph)


def test_what_the_user_says_of_a_branch_goes_before():
    port, model = next(iter(FRAMEWORKS.values())), network()
    batches = [port.batch(b) for b in data(model)]
    sim = port.sim(model, **WEIGHTS_ONLY)
    op = sim.graph.linear_ops[0].id
    sim.apply("low_rank", batches, rank=2)
    down = sim.graph.op(branch_names(op).down)
    assert sim.plan.spec(down.weight).float_format == "float16"
    sim.set_precision(down.id, weights="int8")
    assert (sim.plan.spec(down.weight).bits, sim.plan.spec(down.weight).float_format) == (8, None)


def test_wrong_settings_are_refused():
    port, model = next(iter(FRAMEWORKS.values())), network()
    sim = port.sim(model, **WEIGHTS_ONLY)
    batches = [port.batch(b) for b in data(model)]
    for settings, told in (
        ({"rank": 0}, "rank"),
        ({"branch_weights": "int99"}, "branch_weights"),
        ({"include": ["nothing*"]}, "matches no linear layer"),
        ({"least_gain": 1.0}, "least_gain"),
    ):
        with pytest.raises(InputError, match=told):
            sim.apply("low_rank", batches, **settings)


def test_backends_without_branches_are_refused_before_any_work(monkeypatch):
    class Plain(ReferenceBackend):
        branch_obstacle = None

    monkeypatch.setattr(registry, "backend_for_model", lambda model: Plain())
    sim = QuantSim(network(), **WEIGHTS_ONLY)
    with pytest.raises(CapabilityError, match=r"low_rank needs branching .*use gptq or adaround"):
        sim.apply("low_rank", data(network()), rank=2)


class Typed:
    """A technique that gives what it adds a type."""

    name = "typed"
    Settings = Settings
    requires = frozenset()

    def __init__(self, overrides):
        self.overrides = overrides

    def statistics(self, graph, plan, settings):
        return ()

    def apply(self, ctx):
        op = ctx.graph.linear_ops[0]
        out, width = ctx.graph.params[op.weight].shape
        branch = AddBranch(op.id, np.ones((1, width), np.float32), np.zeros((out, 1), np.float32))
        return Outcome(edits=[branch], overrides=self.overrides(op))


def test_types_of_what_a_technique_adds():
    port, model = next(iter(FRAMEWORKS.values())), network()
    sim = port.sim(model, **WEIGHTS_ONLY)
    graph = sim.graph
    with pytest.raises(InputError, match="no op or tensor 'nowhere'"):
        sim.apply(Typed(lambda op: {"nowhere": "float"}))
    assert sim.graph is graph
    sim.apply(Typed(lambda op: {branch_names(op.id).up: {"weights": "int8"}}))
    up = sim.graph.op(branch_names(graph.linear_ops[0].id).up)
    assert sim.plan.spec(up.weight).bits == 8
    assert sim.overrides[up.id] == {"weights": "int8"}


def test_a_tied_matrix_has_no_branch_and_blocks_of_floats_have():
    b = Builder(1)
    x = b.input("x", 24, channel_axis=1)
    y = b.op("twice", OpKind.LINEAR, "MatMul", (b.linear("fc", x, 24, bias=False),), (None, 24),
             params={ParamRole.WEIGHT: "fc.weight"})  # fmt: skip
    model = b.build(b.linear("last", y, 8, bias=False))
    plan = simple_plan(model.graph, weights=QuantSpec(4), activations=None)
    batches = [models.batch(model, 40)]
    done = run_technique(LowRank(), ReferenceBackend(), model, batches, plan=plan, rank=2)
    assert [e.op for e in done.outcome.edits if isinstance(e, AddBranch)] == ["last"]
    reasons = {row[0]: row[1] for row in done.outcome.report.rows}
    assert "shared" in reasons["fc"]
    floats = QuantSpec(4, granularity=Blockwise(0, 1, 8), float_format="float4e2m1", scale_type="float8e8m0")
    plan = simple_plan(model.graph, weights=floats, activations=None)
    for rounding in ("nearest", "gptq"):
        done = run_technique(
            LowRank(), ReferenceBackend(), model, batches, plan=plan, rank=2, rounding=rounding, include=("last",)
        )
        assert [e.op for e in done.outcome.edits if isinstance(e, AddBranch)] == ["last"]


def test_parts_and_single_layers_of_torch():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(24, 16)
            self.body = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(16, 8))

        def forward(self, x):
            y = self.fc(x)
            if float(y.sum()) > 1e9:
                y = -y
            return self.body(y)

    torch.manual_seed(0)
    x = torch.randn(12, 24)
    with pytest.warns(UserWarning, match="captured in parts"):
        sim = QuantSim(Net().eval(), x, **WEIGHTS_ONLY)
    (before,) = outputs(sim.backend, sim.native, {"x": x.numpy()})
    sim.apply("low_rank", {"x": x.numpy()}, rank=24, branch_weights="float")
    (after,) = outputs(sim.backend, sim.native, {"x": x.numpy()})
    assert {op.id for op in sim.graph} >= {"fc/down", "fc/up", "fc/sum", "body.1/down"}
    assert np.abs(after - before).max() < 1e-4 * np.abs(before).max()


def test_checkpoints_have_no_place_for_branches(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("bitwright_formats.tensors")
    from bitwright.backend import Bundle, ToCompile
    from bitwright_formats.checkpoint import Checkpoint, check_names

    torch.manual_seed(0)
    sim = QuantSim(torch.nn.Sequential(torch.nn.Linear(24, 8)).eval(), torch.randn(12, 24), **WEIGHTS_ONLY)
    names = list(sim.graph.params)
    (tmp_path / "config.json").write_text(json.dumps({}))
    stored = [safetensors.Stored(p, "F32", (1,), lambda: np.zeros(1, np.float32)) for p in names]
    safetensors.write_tensors(tmp_path / "model.safetensors", stored, {"format": "pt"})

    def model(sim):
        return ToCompile(sim.graph, sim.params, sim.plan, sim.table, Bundle({}), tmp_path)

    sim.calibrate()
    checkpoint = Checkpoint.of(tmp_path)
    check_names(model(sim), checkpoint, "gguf")
    sim.apply("low_rank", {next(iter(sim.graph.inputs)): np.random.default_rng(0).normal(size=(12, 24)).astype("f")},
              rank=2)  # fmt: skip
    sim.calibrate()
    with pytest.raises(ModelError, match=r"has no tensor '.*branch_down'.*Leave out the technique that added it"):
        check_names(model(sim), checkpoint, "gguf")


def _onnx_with_a_hidden_name():
    """Two layers; the bias of the first is added by a node that is called as its branch's sum would be."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    held = {n: rng.normal(size=s).astype(np.float32) for n, s in (("a", (12, 10)), ("b", (10,)), ("c", (10, 8)))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], "fc"),
        helper.make_node("Add", ["p", "b"], ["q"], "fc/sum"),
        helper.make_node("MatMul", ["q", "c"], ["y"], "head"),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w])] for n, w in (("x", 12), ("y", 8))]
    graph = helper.make_graph(nodes, "g", *ends, [numpy_helper.from_array(v, n) for n, v in held.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return model, rng.normal(size=(64, 12)).astype(np.float32), "there is an op 'fc/sum' already"


def _tensorflow_of_unknown_rank():
    """Of what the first layer reads, not even the rank is known."""
    import tensorflow as tf

    from bitwright_tensorflow import SessionModel

    rng, v1 = np.random.default_rng(0), tf.compat.v1
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3, 12), name="x")
        shape = v1.placeholder_with_default(tf.shape(x), (None,))
        a, c = (v1.get_variable(n, initializer=rng.normal(size=s).astype(np.float32))
                for n, s in (("a", (12, 10)), ("c", (10, 8))))  # fmt: skip
        y = tf.linalg.matmul(tf.reshape(tf.linalg.matmul(tf.reshape(x, shape), a, name="fc"), (-1, 10)), c, name="head")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    model = SessionModel(session, inputs=[x], outputs=[y])
    return model, rng.normal(size=(64, 3, 12)).astype(np.float32), "the rank of 'fc:0' isn't known"


@pytest.mark.parametrize(
    ("name", "made"), [("onnx", _onnx_with_a_hidden_name), ("tensorflow", _tensorflow_of_unknown_rank)]
)
def test_what_the_framework_refuses_is_known_before_any_work(name, made):
    if name not in FRAMEWORKS:
        pytest.skip(f"needs {name}")
    model, samples, reason = made()
    sim = QuantSim(model, samples, backend=name, **WEIGHTS_ONLY)
    sim.apply("low_rank", samples, rank=2)
    rows = {row[0]: row for row in sim.reports[-1][1].rows}
    first = next(id for id in rows if id.startswith("fc"))
    assert rows[first][1] == reason
    assert [op.id for op in sim.graph if op.id.endswith("/down")] == ["head/down"]
    with pytest.raises(ModelError, match=reason):
        sim.backend.edit(sim.native, [AddBranch(first, np.ones((1, 12), np.float32), np.ones((10, 1), np.float32))])


def test_convolutions_of_one_point_are_told_why():
    port, model = next(iter(FRAMEWORKS.values())), models.residual()
    sim = port.sim(model, **WEIGHTS_ONLY)
    point = [op for op in sim.graph.linear_ops if set(op.attrs.kernel) == {1}]
    wider = [op for op in sim.graph.linear_ops if set(op.attrs.kernel) != {1}]
    assert point and wider
    for op in (*point, *wider):
        told = sim.backend.branch_obstacle(sim.native, op.id)
        assert "branches are for matrix products along the last axis" in told
        assert ("be it of one point" in told) == (op in point)
