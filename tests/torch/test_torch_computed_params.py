"""Parameters that are read in other forms, or computed from parameters: simulation, file and encodings are one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from shares import WHOLE  # noqa: E402
from torch import nn  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.bundle import check_bundle  # noqa: E402
from bitwright.graph import SetParams  # noqa: E402
from bitwright.placement import SiteKind  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402


class Tied(nn.Module):
    """A language model's embedding and head."""

    def __init__(self, bias=False, spelled="linear", twice=False):
        super().__init__()
        self.e, self.f, self.h = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=bias)
        self.h.weight = self.e.weight
        self.spelled, self.twice = spelled, twice

    def forward(self, x):
        y = torch.relu(self.f(self.e(x)))
        if self.spelled == "matmul":
            return y @ self.e.weight.t()
        if self.spelled == "einsum":
            return torch.einsum("btd,vd->btv", y, self.e.weight)
        return self.h(y) + self.h(y.flip(1)) if self.twice else self.h(y)


class Net(nn.Module):
    """A convolution, something that `give` computes, a second convolution."""

    def __init__(self, give):
        super().__init__()
        self.c, self.d, self.give = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), give
        self.w, self.g = nn.Parameter(torch.tensor([1.0, 0.5])), nn.Parameter(torch.randn(4, 1, 1))
        self.m = nn.Parameter(torch.randn(16, 4))
        self.register_buffer("b", torch.randn(4))

    def forward(self, x):
        return self.d(self.give(self, self.c(x)))


def fused(s, y):
    w = torch.relu(s.w)
    w = w / (w.sum() + 1e-4)
    return w[0] * y + w[1] * y.flip(3)


def gates(s, y):
    return F.conv2d(y, s.m.reshape(4, 4, 2, 2), padding=1)[..., :8, :8] * torch.sigmoid(s.g)


class Normed(nn.Module):
    """Weight normalization, by parametrization or by hooks."""

    def __init__(self, norm):
        super().__init__()
        self.c, self.l = norm(nn.Conv2d(3, 4, 3)), norm(nn.Linear(4, 5))

    def forward(self, x):
        return self.l(torch.relu(self.c(x)).mean((2, 3)))


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 40, (16, 12), generator=torch.Generator().manual_seed(0))
NETS = {
    "tied": (Tied, IDS),
    "tied, bias": (lambda: Tied(bias=True), IDS),
    "tied, head twice": (lambda: Tied(twice=True), IDS),
    "tied by hand": (lambda: Tied(spelled="matmul"), IDS),
    "tied, einsum": (lambda: Tied(spelled="einsum"), IDS),
    "select": (lambda: Net(lambda s, y: s.w[0] * y), IMAGES),
    "sigmoid": (lambda: Net(lambda s, y: torch.sigmoid(s.g) * y), IMAGES),
    "tanh of a scalar": (lambda: Net(lambda s, y: y + torch.tanh(s.w[1]) * F.relu(y)), IMAGES),
    "fusion weights": (lambda: Net(fused), IMAGES),
    "layer scale": (lambda: Net(lambda s, y: y + s.g.reshape(1, 4, 1, 1) * F.gelu(y)), IMAGES),
    "of a buffer": (lambda: Net(lambda s, y: y * (s.b + 1).view(1, 4, 1, 1)), IMAGES),
    "made convolution": (lambda: Net(gates), IMAGES),
    "slices": (lambda: Net(lambda s, y: F.conv2d(y, s.m[:4, :, None, None]) + F.conv2d(y, s.m[4:8, :, None, None])),
               IMAGES),
    "transposed": (lambda: Net(lambda s, y: (y.transpose(1, 3) @ s.m[:4].t() @ s.m[4:8]).transpose(1, 3)), IMAGES),
    "both ways round": (
        lambda: Net(lambda s, y: F.linear(F.linear(y.transpose(1, 3), s.m), s.m.t()).transpose(1, 3)),
        IMAGES,
    ),
    "weight_norm": (lambda: Normed(torch.nn.utils.parametrizations.weight_norm), IMAGES),
    "weight_norm by hooks": (lambda: Normed(torch.nn.utils.weight_norm), IMAGES),
    "spectral_norm": (lambda: Normed(torch.nn.utils.parametrizations.spectral_norm), IMAGES),
}  # fmt: skip


def calibrated(name, **options):
    torch.manual_seed(0)
    build, data = NETS[name]
    with pytest.warns(FutureWarning) if "hooks" in name else _nothing():
        net = build().eval()
    return net, data, QuantSim(net, data[:2], **options).calibrate({"x": data.numpy()})


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return False


def run(path, data, optimized=False):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: data.numpy()})[0]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "default") for name in NETS),
        *((name, "onnxruntime-cpu") for name in NETS if WHOLE or name in ("tied", "made convolution", "weight_norm")),
    ],
)
def test_the_file_computes_what_was_simulated(name, target, tmp_path: Path):
    net, data, sim = calibrated(name, target=target)
    with torch.no_grad():
        assert torch.equal(sim.native(data), net(data))
    simulated = sim.predict({"x": data.numpy()})[0]
    assert sqnr(net(data).detach().numpy(), simulated) > 20
    bundle = sim.export(tmp_path, name="m")
    assert sqnr(net(data).detach().numpy(), run(bundle.files["model"], data)) > 100
    assert sqnr(simulated, run(bundle.files["qdq"], data)) > 60
    floats = [i.name for i in onnx.load(bundle.files["qdq"]).graph.initializer
              if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) > 40]  # fmt: skip
    assert not floats
    opened = QuantSim(bundle.files["model"], target=target)
    assert check_bundle(opened.graph, opened.plan, bundle.files["encodings"]) == []
    opened.load_encodings(bundle.files["encodings"])
    assert sqnr(simulated, opened.predict({"x": data.numpy()})[0]) > 60
    quantized = {s for s in sim.plan.quantized if sim.plan[s].kind is SiteKind.PARAMETER}
    assert quantized == {s for s in opened.plan.quantized if opened.plan[s].kind is SiteKind.PARAMETER}
    assert verify(tmp_path, {"x": data.numpy()}).problems == []


def test_a_tied_matrix_is_in_the_file_once_and_runs_in_integers(tmp_path: Path):
    _, _, sim = calibrated("tied", target="onnxruntime-cpu", weights="int8")
    bundle = sim.export(tmp_path, name="m")
    stored = [i for i in onnx.load(bundle.files["qdq"]).graph.initializer if np.prod(i.dims) == 40 * 16]
    assert [i.data_type for i in stored] == [onnx.TensorProto.INT8]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(bundle.files["qdq"], options)
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(op in ("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm") for op in ops) == 2


def test_a_tied_matrix_of_four_bits(tmp_path: Path):
    _, data, sim = calibrated("tied", weights="int4", overrides={"e.weight": "int4"})
    assert sim.plan.spec("e.weight").bits == 4
    bundle = sim.export(tmp_path, name="m")
    assert sqnr(sim.predict({"x": data.numpy()})[0], run(bundle.files["qdq"], data)) > 60
    stored = [i for i in onnx.load(bundle.files["qdq"]).graph.initializer if list(i.dims) in ([40, 16], [16, 40])]
    assert [i.data_type for i in stored] == [onnx.TensorProto.INT4]


@pytest.mark.parametrize(
    "name", ["sigmoid", "fusion weights", "weight_norm", "weight_norm by hooks", "made convolution"]
)
def test_gradients_reach_what_a_parameter_is_computed_from(name):
    _, data, sim = calibrated(name)
    model = sim.trainable()
    model(data).square().sum().backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    wanted = {"sigmoid": {"g"}, "fusion weights": {"w"}, "made convolution": {"g", "m"}}.get(name, set())
    assert wanted <= used
    if "norm" in name:
        assert sum(n.startswith("c.") for n in used) == 3  # magnitude, direction and bias
    before = sim.predict({"x": data.numpy()})[0]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in used:
                p.mul_(1.1)
    sim.take()
    assert sqnr(before, sim.predict({"x": data.numpy()})[0]) < 40


@pytest.mark.parametrize("name", ["sigmoid", "weight_norm", "weight_norm by hooks", "select", "of a buffer"])
def test_a_computed_parameter_that_is_set_becomes_one_of_its_own(name, tmp_path: Path):
    net, data, sim = calibrated(name)
    backend, graph = sim.backend, sim.graph
    plain = {n for n, _ in (*net.named_parameters(), *net.named_buffers())}
    site = next(p for p in graph.params if p not in plain)
    value = backend.read(sim.native, [site])[site]
    edited = backend.edit(sim.native, [SetParams({site: value * 0.5})])
    np.testing.assert_array_equal(backend.read(edited, [site])[site], value * 0.5)
    assert backend.graph(edited).params == graph.params and backend.graph(edited).ops == graph.ops
    with torch.no_grad():
        assert torch.equal(sim.native(data), net(data))
        assert not torch.allclose(edited(data), net(data))
        again = backend.edit(edited, [SetParams({site: value})])
        assert torch.allclose(again(data), net(data), rtol=0, atol=1e-6)
    # the simulation's own value, as layer by layer techniques set it
    simulation = sim.simulation
    before = np.asarray(sim.predict({"x": data.numpy()})[0])
    simulation.set_params({site: value * 0.5})
    from bitwright.backend import Tap

    tap = Tap(graph.outputs[0])
    changed = simulation.session([tap]).run({"x": data.numpy()})[tap]
    assert sqnr(before, changed) < 30
    simulation.set_params({site: value})
    np.testing.assert_array_equal(simulation.session([tap]).run({"x": data.numpy()})[tap], before)


def test_techniques_improve_layers_with_computed_weights():
    net, data, sim = calibrated("weight_norm", weights="int4")
    before = sqnr(net(data).detach().numpy(), sim.predict({"x": data.numpy()})[0])
    sim.apply("gptq", {"x": data.numpy()}).calibrate({"x": data.numpy()})
    assert sqnr(net(data).detach().numpy(), sim.predict({"x": data.numpy()})[0]) > before


RESULTS = {
    "sigmoid": lambda s: torch.sigmoid(s.g),
    "softmax": lambda s: torch.softmax(s.m, -1),
    "conv": lambda s: s.c(s.k),
    "linear": lambda s: F.linear(s.m, s.m, s.m[:, 0]),
}


class WithResult(Net):
    def forward(self, x):
        return self.d(torch.relu(self.c(x))), self.give(self)


@pytest.mark.parametrize("of", RESULTS)
def test_results_of_parameters_alone(of, tmp_path):
    torch.manual_seed(0)
    net = WithResult(RESULTS[of])
    net.k = nn.Parameter(torch.randn(1, 3, 4, 4))
    sim = QuantSim(net.eval(), IMAGES[:2]).calibrate(IMAGES.numpy())
    bundle = sim.export(tmp_path, name="m")
    with torch.no_grad():
        wanted = [v.numpy() for v in net(IMAGES)]
    session = ort.InferenceSession(bundle.files["qdq"])
    found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert [sqnr(a, b) > 25 for a, b in zip(wanted, found, strict=True)] == [True, True]
    assert verify(tmp_path, {"x": IMAGES.numpy()}).problems == []


@pytest.mark.parametrize(
    "result",
    [
        lambda s: s.gate,
        lambda s: s.gate.view(4),
        lambda s: s.head.weight.T,
        lambda s: s.head.weight.topk(2)[0],
        lambda s: s.head.weight.chunk(2)[1],
        lambda s: torch.sigmoid(s.head.weight).T,
    ],
    ids=["whole", "view", "transpose", "pick", "part", "computed"],
)
def test_results_that_are_views_of_parameters_are_results(result, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.gate = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 1))

        def forward(self, x):
            return self.head(x), result(self)

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 6)
    sim = QuantSim(net, x[:2]).calibrate(x)
    assert [op.id for op in sim.graph.linear_ops] == ["head"]
    found, simulated = sim.predict(x, simulated=False), sim.predict(x)
    assert len(found) == len(simulated) == 2
    np.testing.assert_allclose(found[1], net(x)[1].detach().numpy(), rtol=1e-6)
    written = onnx.load(sim.export(tmp_path, name="m").files["qdq"])
    assert len(written.graph.output) == 2
    assert not verify(tmp_path, {"x": x.numpy()}).problems
