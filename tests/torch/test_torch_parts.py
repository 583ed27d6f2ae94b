"""Models that can't be captured whole, and what users are told."""

import copy
import json
import shutil
import warnings

import pytest

torch = pytest.importorskip("torch")

import nets  # noqa: E402
import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

import bitwright  # noqa: E402
import bitwright_torch  # noqa: E402
from bitwright.backend import Tap  # noqa: E402
from bitwright.cli import main  # noqa: E402
from bitwright.data import FirstSamples  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402

BACKEND = TorchBackend()


class Detector(nn.Module):
    """A backbone and a head; which boxes are kept depends on their scores."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        features = self.backbone(x).flatten(2).transpose(1, 2)
        boxes = self.head(features)
        kept = [b[b[:, 0] > 0] for b in boxes]
        if len(kept[0]) > 1000:
            return None
        return {"boxes": kept, "all": boxes}


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return nets.settled(Detector())


def images():
    return torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return images()


def captured(detector, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright_torch.CaptureNotice)
        return BACKEND.adopt(detector, x, **options)


def same(a, b):
    assert torch.equal(a["all"], b["all"])
    assert all(torch.equal(p, q) for p, q in zip(a["boxes"], b["boxes"], strict=True))


def test_the_largest_parts_are_captured_with_a_notice(detector, x):
    with pytest.warns(bitwright_torch.CaptureNotice, match=r"in parts \(backbone, head\)"):
        model = BACKEND.adopt(detector, x)
    same(model(x), detector(x))
    same(model(x[:2]), detector(x[:2]))
    assert list(model.state_dict()) == list(detector.state_dict())
    assert not any(m.training for m in model.modules())
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.head.weight.zero_()
    same(model(x), detector(x))


class FixedPart(nn.Module):
    """Its code fixes a length: that of the batch if it is given features, none of the model's if given positions."""

    def __init__(self, length):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, 4))

    def forward(self, y):
        return y + self.table


class Around(nn.Module):
    """Python that depends on data, and a part of a fixed length."""

    def __init__(self, grows):
        super().__init__()
        self.body, self.grows = nn.Linear(6, 4), grows
        self.part = FixedPart(3 if grows else 4)

    def forward(self, x):
        y = self.body(x)
        y = self.part(y) if self.grows else y + self.part(torch.eye(4)).sum(0)
        return y if float(y.detach().sum()) > -1e9 else -y


@pytest.mark.filterwarnings("ignore:Around is captured in parts:bitwright_torch.CaptureNotice")
def test_a_part_of_a_fixed_batch_fixes_the_whole():
    x = torch.randn(3, 6)
    with pytest.warns(bitwright_torch.CaptureNotice, match="takes only the sample's batch size, as part does"):
        model = BACKEND.adopt(Around(grows=True).eval(), x)
    assert BACKEND.input_specs(model)["x"][0] == (3, 6)


def test_a_part_of_a_fixed_length_that_no_batch_reaches_leaves_it_free():
    x, net = torch.randn(3, 6), Around(grows=False).eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = BACKEND.adopt(net, x)
    assert not any("sample's batch size" in str(w.message) for w in told)
    assert "part" in model.parts and model.parts["part"]._program.notices
    assert BACKEND.input_specs(model)["x"][0] == (None, 6)
    y = torch.randn(5, 6)
    assert torch.equal(model(y), net(y))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:.*torch.jit.trace")
def test_torchscript_within_stays_as_it_is_and_alone_is_refused():
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, nn.Sequential(nn.Linear(4, 3), nn.ReLU())).eval()
    x = torch.randn(5, 4)
    with pytest.warns(bitwright_torch.CaptureNotice, match=r"in parts \(1\).*in float: 0"):
        sim = QuantSim(model, x)
    assert torch.equal(sim.backend.adopt(sim.native)(x), model(x))
    for script in (scripted, torch.jit.trace(nn.Linear(4, 4), x)):
        with pytest.raises(ModelError, match=r"TorchScript.*give the nn\.Module"):
            QuantSim(script, x)


def test_parts_can_be_named(detector, x):
    model = captured(detector, x, modules=["head"])
    assert list(model.parts) == ["head"]
    same(model(x), detector(x))
    with pytest.raises(InputError, match="no submodule 'neck'"):
        BACKEND.adopt(detector, x, modules=["neck"])


def test_one_graph_spans_the_parts(detector, x):
    graph = BACKEND.graph(captured(detector, x))
    assert [op.id for op in graph] == [
        "backbone/python", "backbone.0", "backbone.1", "backbone.2", "head/python", "head", "python"
    ]  # fmt: skip
    assert graph.producer(graph.outputs[0]).type == "python"
    assert {"backbone.0.weight", "head.weight", "head.bias"} <= graph.params.keys()


def test_taps_and_edits_reach_into_the_parts(detector, x):
    model = captured(detector, x)
    graph = BACKEND.graph(model)
    conv = graph.linear_ops[0]
    taps = [Tap(conv.output), Tap("x"), Tap(graph.linear_ops[1].output, "minmax")]
    found = BACKEND.session(model, taps).run({"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found[taps[0]]), detector.backbone[0](x))
    np.testing.assert_array_equal(found[taps[1]], x.numpy())
    assert found[taps[2]][0] == detector(x)["all"].min()
    part = BACKEND.segment(model, [conv.data_inputs[0]], [Tap(conv.output)])
    np.testing.assert_array_equal(part.run({conv.data_inputs[0]: x.numpy()})[Tap(conv.output)], found[taps[0]])
    weight = BACKEND.read(model, [conv.weight])[conv.weight]
    changed = BACKEND.edit(model, [bitwright.graph.SetParams({conv.weight: 2 * weight})])
    assert torch.equal(changed.backbone.get_parameter("0.weight"), 2 * detector.backbone[0].weight)
    same(model(x), detector(x))
    with pytest.raises(ModelError, match=r"over the Python|alone"):
        BACKEND.segment(model, [conv.data_inputs[0]], [Tap(graph.linear_ops[1].output)])


def test_parts_are_simulated(detector, x):
    sim = bitwright.QuantSim(captured(detector, x), target="default_per_channel", scheme="minmax")
    sim.calibrate({"x": x.numpy()})
    model = sim.simulation.model
    close = (model(x)["all"] - detector(x)["all"]).abs().max()
    assert 0 < close < 0.1 * detector(x)["all"].abs().max()


def test_parts_are_exported_one_by_one(detector, x, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sim = bitwright.QuantSim(captured(detector, x), target="default_per_channel", scheme="minmax")
    sim.apply("fold_batch_norm").calibrate([x])
    bundle = sim.export(tmp_path, name="net")
    assert {p.name for p in tmp_path.iterdir()} == {
        "net.backbone.onnx", "net.head.onnx", "net.backbone.qdq.onnx", "net.head.qdq.onnx", "net.safetensors",
        "net.encodings", "net.record.npz", "report.json", "report.html"}  # fmt: skip
    graph = BACKEND.graph(sim.native)
    taps = [Tap(t) for t in ("head.input", "head.output") if t in graph.tensors]
    seen = {t.tensor: v for t, v in sim.simulation.session(taps).run({"x": x.numpy()}).items()}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(bundle.files["qdq/head"], options)
    (got,) = session.run(None, {"head.input": seen["head.input"]})
    assert np.abs(got - seen["head.output"]).max() <= 1.01 * float(sim.table["head.output"].scale)
    plain = ort.InferenceSession(bundle.files["model/backbone"])
    (name,) = (i.name for i in plain.get_inputs())
    np.testing.assert_allclose(plain.run(None, {name: x.numpy()})[0], detector.backbone(x).detach(), atol=1e-5)
    read = bitwright.formats.read(bundle.files["encodings"])
    assert {"backbone.0.weight", "head.weight"} <= read.parameters.keys()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    detector, x = nets.settled(Detector()), images()
    folder = tmp_path_factory.mktemp("exported")
    bitwright.QuantSim(captured(detector, x)).calibrate([x]).export(folder, name="net")
    return folder


@pytest.fixture
def exported(bundle, tmp_path):
    """A copy that the test may change."""
    return shutil.copytree(bundle, tmp_path / "exported")


def test_verify_compares_an_export_part_by_part(exported, x):
    """On what each part was handed, as no file holds the Python between them."""
    assert json.loads((exported / "report.json").read_text())["record"]["compared"] >= 2
    found = verify(exported)
    assert found.problems == [] and found.recorded and list(found.parts) == ["net.backbone", "net.head"]
    assert any("captured in parts" in note for note in found.notes)
    assert {o.name for o in found.outputs} == {o.name for p in found.parts.values() for o in p.outputs}
    for part in found.parts.values():
        assert part.samples == 3 and part.plain is not None
        assert part.exact["output_differs"] == 0 and part.sqnr_db["simulated_float"] > 20
    with pytest.raises(InputError, match=r"captured in parts.*name='net\.backbone', 'net\.head'"):
        verify(exported, x.numpy())


def test_the_commands_know_parts(exported, capsys):
    from bitwright.cli import main

    assert main(["verify", str(exported), "-q"]) == 0
    shown = capsys.readouterr().out
    assert main(["encodings", "check", str(exported), "--name", "net.head"]) == 0
    assert "net.backbone:" in shown and "net.head:" in shown and "integer (onnxruntime)" in shown


def test_verify_takes_data_of_one_part(exported):
    features = np.random.default_rng(0).normal(size=(5, 36, 4)).astype(np.float32).clip(0)
    found = verify(exported, {"head.input": features}, name="net.head")
    assert found.problems == [] and found.samples == 5 and not found.parts


@pytest.mark.parametrize(("damaged", "told"), [
    ("net.head.qdq.onnx", "'head"), ("net.head.onnx", "'head.weight' holds other values"),
])  # fmt: skip
def test_a_part_that_was_changed_is_named(exported, damaged, told):
    import onnx

    model = onnx.load(exported / damaged)
    weight = max(model.graph.initializer, key=lambda t: np.prod(t.dims))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.roll(onnx.numpy_helper.to_array(weight), 1), weight.name))
    onnx.save(model, exported / damaged)
    found = verify(exported)
    assert any(told in p for p in found.problems) and any(
        p.startswith(f"{damaged}: was changed") for p in found.problems
    )
    assert not found.parts["net.backbone"].problems


def test_parts_are_trained(detector, x):
    sim = bitwright.QuantSim(captured(detector, x), scheme="minmax").calibrate([x])
    model = sim.trainable(range_learning=True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = model(x)["all"].square().mean()
    for _ in range(5):
        optimizer.zero_grad()
        model(x)["all"].square().mean().backward()
        optimizer.step()
    assert model(x)["all"].square().mean() < before
    sim.take()
    model.eval()
    again = sim.model(x)["all"]
    # Biases are int32 in the simulation and float in training.
    assert (model(x)["all"] - again).abs().max() <= 1.01 * float(sim.table["head.output"].scale)
    assert not torch.equal(sim.model.head.weight, detector.head.weight)
    state = copy.deepcopy(sim.model).state_dict()
    with torch.no_grad():
        sim.model.get_parameter("head.weight").zero_()
    sim.model.load_state_dict(state)
    assert torch.equal(sim.model(x)["all"], again)


def test_a_failure_names_the_line_and_a_way_out():
    class Bad(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"test_torch_parts.py:\d+ in forward: return x \* 2 if.*torch.where"):
        BACKEND.adopt(Bad(), torch.ones(2))


def test_validate_tells_what_is_fused_and_what_it_does_not_know(detector, x):
    report = bitwright.validate(detector, x)
    assert report.opened and report.sites > 0
    assert any("in parts" in n for n in report.notices)
    assert "head/python" in {f.where for f in report.unknown}
    assert not report.in_float
    assert report.fused >= 2  # what the batch norm has, which folds into the convolution
    assert f"{report.fused} more are fused into others" in str(report)


def test_validate_tells_why_a_model_can_t_be_captured():
    class Bad(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    report = bitwright.validate(Bad(), torch.ones(2))
    assert not report.opened
    assert "test_torch_parts.py" in str(report) and "torch.where" in str(report)


class ListDetector(nn.Module):
    """Takes a list of images (C, H, W), as those of torchvision do; its loop over them can't be captured."""

    def __init__(self, whole=False):
        super().__init__()
        self.body, self.whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), whole

    def forward(self, images):
        found = self.body(torch.stack(images))
        return found if self.whole or float(found.sum()) > 1e9 else [{"scores": v.amax((1, 2))} for v in found]


@pytest.mark.parametrize("whole", [True, False])
def test_images_of_a_detector_are_samples_whatever_their_channels(whole):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright_torch.CaptureNotice)
        sim = QuantSim(ListDetector(whole).eval(), ([torch.rand(3, 8, 8)],))
    images = [torch.rand(3, 8, 8) for _ in range(5)]
    for data in (images, [([x],) for x in images], [{"images": [x]} for x in images], torch.stack(images).numpy()):
        dataset = sim.open(data)
        assert dataset.samples == 5
        assert [b["images.0"].shape for b in dataset] == [(3, 8, 8)] * 5
        assert [b["images.0"].shape for b in FirstSamples(dataset, 2)] == [(3, 8, 8)] * 2
    assert [b["images.0"].shape for b in sim.open(images, limit=2)] == [(3, 8, 8)] * 2
    sim.calibrate(images)
    with pytest.raises(InputError, match="'images' has 5 elements, and the model was opened on a sample with 1"):
        sim.open([(images,)])


def test_elements_of_lists_that_are_batches_stay_such():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, features):
            return self.a(features[0]) + features[1]

    sim = QuantSim(Two().eval(), ([torch.rand(2, 4), torch.rand(2, 4)],))
    assert sim.open([([torch.rand(5, 4), torch.rand(5, 4)],)]).samples == 5


DETECTOR_FILE = """
import torch
from test_torch_parts import ListDetector

def build():
    return ListDetector().eval(), ([torch.rand(3, 8, 8)],)

def score(model):
    return 1.0
"""


@pytest.mark.parametrize("command", ["validate", "auto"])
def test_a_command_tells_once_that_a_model_is_in_parts(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(DETECTOR_FILE)
    np.save("images.npy", np.random.default_rng(0).random((6, 3, 8, 8), np.float32))
    words = ["--data", "images.npy"]
    if command == "auto":
        words += ["--evaluate", "own.py:score", "--allowed-drop", "0.5", "--out", "out"]
    assert main([command, "own.py:build", *words]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("is captured in parts") == 1


def test_elements_of_lists_that_are_batches_of_a_fixed_size_are_samples():
    class Two(nn.Module):
        def __init__(self, samples):
            super().__init__()
            self.a, self.samples = nn.Linear(4, 4), samples

        def forward(self, features):
            scores = self.a(features[0]).view(self.samples, 2, 2).flatten(1) + features[1]
            return scores, (scores > -100).float()  # an answer that may be the same of all samples

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright_torch.CaptureNotice)
        sim = QuantSim(Two(4).eval(), ([torch.rand(4, 4), torch.rand(4, 4)],))
        pair = QuantSim(Two(2).eval(), ([torch.rand(2, 4), torch.rand(2, 4)],))
        three = QuantSim(ListDetector(True).eval(), ([torch.rand(3, 8, 8) for _ in range(3)],))
    assert sim.open([([torch.rand(4, 4), torch.rand(4, 4)],) for _ in range(3)]).samples == 12
    assert sim.open({"features": [np.ones((8, 4), np.float32)] * 2}).samples == 8
    # As many elements as samples: shapes don't tell, but each sample is computed for itself.
    assert pair.open([([torch.rand(2, 4), torch.rand(2, 4)],) for _ in range(3)]).samples == 6
    assert pair.open({"features": [np.ones((8, 4), np.float32)] * 2}).samples == 8
    # Three images of three channels have the same shapes, and aren't.
    assert three.open([([torch.rand(3, 8, 8) for _ in range(3)],)]).samples == 1


class ImagesOfImages(nn.Module):
    """An image (C, H, W) of each image of a list, or one of all of them."""

    def __init__(self, joined):
        super().__init__()
        self.joined = joined
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, images):
        return self.body(torch.stack(images).mean(0)) if self.joined else [self.body(x[None])[0] for x in images]


@pytest.mark.parametrize("joined", [False, True])
def test_images_of_which_a_network_makes_images_are_no_batches_of_channels(joined):
    feeds = [([torch.rand(3, 8, 8) for _ in range(2)],) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bitwright_torch.CaptureNotice)
        sim = QuantSim(ImagesOfImages(joined).eval(), feeds[0])
    assert sim.open(feeds).samples == 4
    with pytest.raises(InputError, match=r"shape \[6, 8, 8\], but the model takes \[3, 8, 8\]"):
        sim.open({"images": [np.ones((6, 8, 8), np.float32)] * 2})


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (torch.zeros(2, 8, 8, 3), r"float32 \[2, 8, 8, 3\].*expected input.* to have 3 channels"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \[2, 3, 8, 8\]"),
    ],
)
def test_a_sample_that_the_model_does_not_take_is_named(sample, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(ModelError, match=f"Sequential doesn't run on the sample, {reason}.*axes in their order"):
        QuantSim(model, sample)
