"""Export: ONNX with the user's names, QDQ, safetensors, .pt2; reopening gives the same simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from simulated import Setup, conv_setup, setup  # noqa: E402
from torch import nn  # noqa: E402

import bitwright_torch.export.export as export_module  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.graph import OpKind  # noqa: E402
from bitwright.grids import EncodingTable, PerChannel  # noqa: E402
from bitwright.placement import Plan  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402
from bitwright_torch.export.export import export, save_weights  # noqa: E402


class Sequence(nn.Module):
    """Linear layers on three dimensions, which the exporter turns into MatMul with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 5, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(self.embed(ids)))))


@pytest.fixture(scope="module")
def conv() -> Setup:
    return conv_setup(0.3)


@pytest.fixture(scope="module")
def sequence() -> Setup:
    torch.manual_seed(0)
    return setup(Sequence(), torch.randint(0, 11, (3, 4)))


def written(net: Setup, folder: Path, format: str) -> Path:
    bundle = export(net.model, net.plan, EncodingTable(net.table), folder / f"m.{format}", format)
    (path,) = bundle.files.values()
    return path


@pytest.mark.parametrize("which", ["conv", "sequence"])
def test_onnx_has_the_user_s_names_and_the_same_simulation(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    net: Setup = request.getfixturevalue(which)
    bundle = export(net.model, net.plan, EncodingTable(net.table), tmp_path / "m.onnx", "onnx")
    backend = OnnxBackend()
    model = backend.load(tmp_path / "m.onnx")
    graph = backend.graph(model)
    for site in net.plan.quantized:
        assert bundle.names.get(site, site) in {*graph.tensors, *graph.params}, site
    assert set(graph.params) <= set(net.graph.params)
    assert graph.inputs == net.graph.inputs
    assert graph.outputs == net.graph.outputs
    for id, value in backend.read(model, list(graph.params)).items():
        np.testing.assert_array_equal(value.ravel(), net.module.state_dict()[id].numpy().ravel(), err_msg=id)
    sites = [s for s in net.plan.activations if s not in bundle.names]
    feed = {net.graph.inputs[0]: net.sample.numpy()}
    mine = net.simulation().session([Tap(s) for s in sites]).run(feed)
    table = EncodingTable({s: e for s, e in net.table.items() if s not in bundle.names})
    theirs = backend.simulate(model, net.plan, table).session([Tap(s) for s in sites]).run(feed)
    for site in sites:
        steps = np.rint(np.abs(mine[Tap(site)] - theirs[Tap(site)]) / float(net.table[site].scale))
        assert steps.max() <= 1, site
        assert np.mean(steps > 0) < 0.01, site


def test_batches_stay_free(conv: Setup, tmp_path: Path) -> None:
    session = ort.InferenceSession(written(conv, tmp_path, "onnx"))
    x = torch.randn(11, 3, 9, 9)
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, conv.module.eval()(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["conv", "sequence"])
def test_qdq_runs_and_agrees(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    net: Setup = request.getfixturevalue(which)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(written(net, tmp_path, "qdq"), options)
    (found,) = session.run(None, {net.graph.inputs[0]: net.sample.numpy()})
    with torch.no_grad():
        expected = net.simulation().model(net.sample).numpy()
    scale = float(net.table[net.graph.outputs[0]].scale)
    # Biases are int32 there and float in the simulation.
    assert np.abs(found - expected).max() <= 2.01 * scale
    assert np.mean(np.abs(found - expected) > 0.5 * scale) < 0.1


def test_weights(conv: Setup, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(written(conv, tmp_path, "safetensors"))
    state = conv.module.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[k], v) for k, v in state.items())


class Tied(nn.Module):
    """A table that the head multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model

    net, other = Tied(), Tied()
    model = TorchBackend().adopt(net, {"ids": torch.zeros(2, 3, dtype=torch.int64)})
    path = save_weights(model, tmp_path / "net.safetensors")
    assert list(load_file(path)) == ["table.weight"]
    load_model(other, path)
    assert torch.equal(other.head.weight, net.table.weight)


def test_tied_weights_are_stored_once_in_an_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = {"ids": torch.randint(0, 12, (3, 4))}
    files = QuantSim(Tied(), ids, weights="int8", activations="float").calibrate([ids]).export(tmp_path).files
    for file, dtype in (("model", np.float32), ("qdq", np.int8)):
        held = [onnx.numpy_helper.to_array(t) for t in onnx.load(files[file]).graph.initializer]
        assert [a.dtype for a in held if a.size >= 48] == [dtype]


def test_large_weights_lie_once_in_memory_too() -> None:
    """What the ONNX model holds are the module's own arrays, turned where the exporter multiplies by a transpose."""
    model = TorchBackend().adopt(Sequence().eval(), torch.zeros(3, 4, dtype=torch.int64))
    found = export_module._onnx_model(model, Plan({}, "default"))[1].graph.initializers
    for name, parameter in model.named_parameters():
        assert np.shares_memory(found[name].const_value.numpy(), parameter.detach().numpy()), name
    assert found["up.weight"].const_value.numpy().shape == (8, 16)


def test_the_simulation_as_a_program(conv: Setup, tmp_path: Path) -> None:
    program = torch.export.load(written(conv, tmp_path, "pt2")).module()
    with torch.no_grad():
        for x in (conv.sample, torch.randn(2, 3, 9, 9)):
            assert torch.equal(program(x), conv.simulation().model(x))


def test_unknown_formats_are_named(conv: Setup, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        written(conv, tmp_path, "tflite")


def test_quantsim_bundles_reopen_in_the_onnx_backend(tmp_path: Path) -> None:
    """The encodings file, axes included, fits the .onnx beside it."""
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 4))
    sim = QuantSim(Sequence().eval(), ids, weights="int8", scheme="minmax", target="default_per_channel")
    sim.calibrate([ids.numpy()])
    assert isinstance(sim.encodings["up.weight"].granularity, PerChannel)
    bundle = sim.export(tmp_path, name="net", encodings_version="2.0.0")
    assert {p.name for p in tmp_path.iterdir()} == {
        "net.onnx", "net.qdq.onnx", "net.safetensors", "net.encodings", "net.record.npz", "report.json",
        "report.html"}  # fmt: skip
    other = QuantSim(str(bundle.files["model"]), target="default_per_channel", weights="int8", scheme="minmax")
    other.load_encodings(bundle.files["encodings"], strict=False)
    for site in (*sim.plan.activations, *sim.plan.parameters):
        assert other.encodings[site].equals(sim.encodings[site]), site
    (mine,), (theirs,) = sim.predict([ids.numpy()]), other.predict([ids.numpy()])
    assert np.abs(mine - theirs).max() <= 1.01 * float(sim.encodings["down.output"].scale)


def test_an_export_converts_once_and_anew_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    convert = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: made.append(convert(*a, **k)) or made[-1])
    torch.manual_seed(0)
    data = {"x": np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)}
    sim = QuantSim(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.zeros(2, 6))
    batch = {sim.graph.inputs[0]: data["x"]}
    bundle = sim.calibrate(batch).export(tmp_path / "one", name="m")
    assert len(made) == 1
    direct = [sim.backend.export(sim.native, sim.plan, sim.table, tmp_path / f"m{ending}", format)
              for format, ending in (("onnx", ".onnx"), ("qdq", ".qdq.onnx"))]  # fmt: skip
    assert len(made) == 3
    for key, (path,) in zip(("model", "qdq"), (b.files.values() for b in direct), strict=True):
        one, other = (onnx.load(p).graph for p in (path, bundle.files[key]))
        assert [(n.op_type, *n.input, *n.output) for n in one.node] == [
            (n.op_type, *n.input, *n.output) for n in other.node
        ]
        assert [(t.name, t.SerializeToString()) for t in one.initializer] == [
            (t.name, t.SerializeToString()) for t in other.initializer
        ]
    with torch.no_grad():
        for tensor in sim.native.parameters():
            tensor.mul_(0.5)
    again = QuantSim(sim.native).calibrate(batch).export(tmp_path / "two", name="m")
    assert len(made) == 4
    session = ort.InferenceSession(str(again.files["model"]), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, batch)[0], sim.native(torch.from_numpy(data["x"])).detach(), atol=1e-6)


@pytest.mark.parametrize("kind", ["concatenation of one", "times one", "plus zero"])
def test_ops_that_change_nothing_have_their_operand_s_grid(kind: str, tmp_path: Path) -> None:
    """The exporter leaves them out: with a grid of their own, other readers of the operand would be put on it."""
    changed = {"concatenation of one": lambda y: torch.cat([y], 1), "times one": lambda y: y * 1.0,
               "plus zero": lambda y: 0 + y}[kind]  # fmt: skip

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.max_pool2d(self.a(x).relu(), 4)  # the pool's own range isn't that of what it reads
            return self.c(torch.cat([y, self.b(changed(y))], 1))

    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32) ** 5
    sim = QuantSim(Dense().eval(), x[:2], target="onnxruntime-cpu")
    batch = {sim.graph.inputs[0]: x.numpy()}
    site = next(op.output for op in sim.graph if sim.graph.producer("b.output").data_inputs == op.outputs)
    assert sim.plan.root(site) == "relu.output"
    path = sim.calibrate(batch).export(tmp_path, name="m").files["qdq"]  # compares tensor by tensor
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, batch)[0]
    step = float(sim.table[sim.graph.outputs[0]].scale)
    assert (np.abs(found - sim.predict(batch)[0]) > 0.5 * step).mean() < 0.002
    assert sim.plan.root(next(op.output for op in sim.graph if op.kind is OpKind.CONCAT and len(op.data_inputs) > 1)) \
        != "relu.output"  # fmt: skip


def test_equal_and_zero_parameters_keep_their_names(tmp_path: Path) -> None:
    """Fresh models are full of them; exporters merge or drop them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(6, 6)
    )
    with torch.no_grad():
        for layer in (net[0], net[2], net[5]):
            layer.bias.zero_()
            layer.weight.copy_(net[0].weight)
    x = torch.randn(4, 6)
    sim = QuantSim(net.eval(), x, scheme="minmax").calibrate([x])
    bundle = sim.export(tmp_path, encodings_version="2.0.0")
    backend = OnnxBackend()
    known = backend.graph(backend.load(bundle.files["model"])).params
    assert set(known) == set(net.state_dict())
    ort.InferenceSession(bundle.files["qdq"])
    other = QuantSim(bundle.files["model"], scheme="minmax").load_encodings(bundle.files["encodings"], strict=False)
    np.testing.assert_allclose(other.predict([x.numpy()])[0], sim.predict([x.numpy()])[0], atol=1e-6)


class Biased(nn.Module):
    """Its bias over positions doesn't depend on the input: all but the table is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(8, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.table(torch.arange(4) % 3).unsqueeze(0)


def test_constant_embeddings_are_quantized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    sim = QuantSim(Biased().eval(), x, scheme="minmax").calibrate([x])
    bundle = sim.export(tmp_path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (got,) = ort.InferenceSession(bundle.files["qdq"], options).run(None, {"x": x.numpy()})
    assert np.abs(got - sim.predict([x.numpy()])[0]).max() <= 1.01 * float(sim.table[sim.graph.outputs[0]].scale)
    other = QuantSim(bundle.files["model"], scheme="minmax").load_encodings(bundle.files["encodings"])
    assert set(other.encodings) == set(sim.encodings)


class Positions(nn.Module):
    """Rows of a table by indexing, and an op that hands its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Parameter(torch.randn(8, 5)), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.to(torch.float32)) + self.table[torch.arange(x.shape[1])]


def test_indexed_tables_and_handed_on_inputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    sim = QuantSim(Positions().eval(), x, scheme="minmax").calibrate([x])
    bundle = sim.export(tmp_path)
    session = ort.InferenceSession(bundle.files["model"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], sim.native(x).detach(), atol=1e-5)
    other = QuantSim(bundle.files["model"], scheme="minmax").load_encodings(bundle.files["encodings"])
    assert {"index.output", "fc.weight"} <= set(other.encodings)
    ort.InferenceSession(bundle.files["qdq"])


def test_group_norms_are_exported(tmp_path: Path) -> None:
    """Their scale and shift have other ranks in ONNX."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8)).eval(), torch.randn(2, 3, 8, 8)
    sim = QuantSim(net, x, target="default_per_channel", scheme="minmax").calibrate([x])
    bundle = sim.export(tmp_path)
    (found,) = ort.InferenceSession(bundle.files["model"]).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, net(x).detach(), atol=1e-5)
    assert bundle.files["encodings"].exists()


class Tagger(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.cells = kind(8, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.GRU, {}), (nn.RNN, {}), (nn.LSTM, {"bias": False}), (nn.LSTM, {"bidirectional": True})],
)
def test_recurrent_weights_keep_their_names_and_grids(kind: Any, options: Any, tmp_path: Path) -> None:
    """ONNX has other gates' order; the matrices are in integers all the same, and the export proves it."""
    from bitwright.cli import main
    from bitwright.verify import verify

    torch.manual_seed(0)
    data = {"x": torch.randn(8, 5, 8).numpy()}
    sim = QuantSim(Tagger(kind, **options).eval(), torch.randn(2, 5, 8), scheme="minmax").calibrate(data)
    bundle = sim.export(tmp_path, name="net")
    found = verify(tmp_path, data)
    assert found.problems == [] and found.sqnr_db["integer_simulated"] > 40
    assert main(["encodings", "check", str(tmp_path)]) == 0
    if not options.get("bidirectional"):
        import onnx

        graph = onnx.load(bundle.files["qdq"]).graph
        kinds = {i.name: i.data_type for i in graph.initializer}
        for name in ("cells.weight_ih_l0", "cells.weight_hh_l0"):
            assert name in sim.plan.parameters and kinds[f"{name}_quantized"] == onnx.TensorProto.INT8


class Gated(nn.Module):
    """ONNX spells SiLU and the attention's factor in ops of their own, and scalars as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.a(x))
        q, k, v = torch.stack((h, h + 1, h * 0.5)).unbind(0)
        return self.b(nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("target", ["default", "onnxruntime-cpu"])
def test_a_fresh_export_passes_the_check(target: str, tmp_path: Path) -> None:
    """By the folder's report, and by the same target named; not for what it wasn't made for, nor without an entry."""
    import json

    from bitwright.cli import main

    torch.manual_seed(0)
    data = {"x": torch.randn(8, 5, 8).numpy()}
    bundle = QuantSim(Gated().eval(), torch.randn(2, 5, 8), target=target).calibrate(data).export(tmp_path, name="net")
    said = ["encodings", "check", str(tmp_path)]
    assert main(said) == 0
    assert main([*said, "--target", target]) == 0
    assert main([*said, "--target", target, "--weights", "int8"]) == 0
    assert main([*said, "--target", target, "--weights", "int4"]) == 1
    assert main([*said, "--weights", "int4"]) == 1
    held = json.loads(bundle.files["encodings"].read_text())
    held["activation_encodings"] = [e for e in held["activation_encodings"] if e["name"] != "a.output"]
    bundle.files["encodings"].write_text(json.dumps(held))
    assert main([*said, "--target", target]) == 1


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        first, second = torch.unsafe_chunk(self.linear(x), 2)
        return first - second


def test_where_the_optimizer_behind_the_exporter_breaks_the_op_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "spell", lambda part: None)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    sim = QuantSim(Halves().eval(), x).calibrate({"x": x.numpy()})
    with pytest.raises(ModelError, match=r"onnxscript fails.*split"):
        export(sim.native, sim.plan, sim.table, tmp_path / "m.onnx", "onnx")
    with pytest.warns(UserWarning, match=r"model.onnx isn't written, .*onnxscript fails.*split|qdq"):
        assert "qdq" not in sim.export(tmp_path).files


class PassesOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x, torch.relu(self.linear(x)), x.reshape(-1, 6)


def test_an_output_that_is_an_input_is_handed_out_as_it_came(tmp_path):
    """In the simulated model, when it predicts, and in both files; a view of it is computed, and is on the grid."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    sim = QuantSim(PassesOn().eval(), x).calibrate({"x": x.numpy()})
    with torch.no_grad():
        simulated = [v.numpy() for v in sim.model(x)]
    files = sim.export(tmp_path).files
    rows = {"model": simulated, "predict": sim.predict({"x": x.numpy()})}
    for kind in ("model", "qdq"):
        session = ort.InferenceSession(files[kind])
        assert (
            [o.name for o in session.get_outputs()] == list(sim.graph.outputs) == ["x", "relu.output", "reshape.output"]
        )
        rows[kind] = session.run(None, {"x": x.numpy()})
    for row in rows.values():
        np.testing.assert_array_equal(row[0], x.numpy())
    rounded = sim.table["x"].fake_quantize(x.numpy())
    np.testing.assert_allclose(rows["qdq"][2], rounded, atol=1e-6)
    found = verify(tmp_path, {"x": x.numpy()})
    assert found.problems == []
    figures = {o.name: o.sqnr_db["integer_float"] for o in found.outputs}
    assert figures["x"] == float("inf") and 30 < figures["reshape.output"] < 60
