"""Model files: .pt2 programs and factories."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import nets  # noqa: E402

from bitwright import QuantSim, registry  # noqa: E402
from bitwright.cli import main  # noqa: E402
from bitwright.errors import InputError, ModelError  # noqa: E402
from bitwright_torch import CaptureNotice  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402

BACKEND = TorchBackend()
FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(2, 4)

def broken():
    raise ValueError("no weights")

def bare():
    return nn.Linear(4, 3)
"""


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return nets.settled(nets.Residual())


def test_a_program_keeps_names_and_modes(residual, tmp_path):
    x = torch.randn(3, 3, 8, 8)
    model = BACKEND.adopt(residual, x)
    opened = BACKEND.load(BACKEND.save(model, tmp_path / "m.pt2"))
    before, after = BACKEND.graph(model), BACKEND.graph(opened)
    assert after.ops == before.ops and after.tensors == before.tensors and after.params == before.params
    assert list(opened.state_dict()) == list(residual.state_dict())
    assert torch.equal(opened(x), residual(x)) and torch.equal(opened(x=x[:1]), residual(x[:1]))
    opened.train()
    residual.train()
    torch.manual_seed(1)
    expected = residual(x)
    torch.manual_seed(1)
    assert torch.equal(opened(x), expected)
    assert torch.equal(opened.bn.running_mean, residual.bn.running_mean)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_anyone_s_program_opens(residual, tmp_path):
    x = torch.randn(3, 3, 8, 8)
    exported = torch.export.export(residual, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(exported, tmp_path / "m.pt2")
    for model in (BACKEND.load(tmp_path / "m.pt2"), BACKEND.adopt(exported)):
        assert torch.equal(model(x[:2]), residual(x[:2]))
        assert "stem.0" in BACKEND.graph(model) and BACKEND.graph(model).inputs == ("x",)
    assert registry.backend_for_path(tmp_path / "m.pt2").name == "torch"


def test_nested_calling_survives(tmp_path):
    class Nested(nets.Nested):
        def forward(self, pair, scale=2.0, *, extra=None):
            result = super().forward(pair, scale, extra=extra)
            return {"sum": result["sum"], "list": [result["list"][0], None]}

    with pytest.raises(ModelError, match="returns a text"):
        whole = (torch.randn(3, 4), {"y": torch.randn(3, 5)})
        BACKEND.save(BACKEND.adopt(nets.Nested().eval(), {"pair": whole}), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    module = Nested().eval()
    pair = (torch.randn(3, 4), {"y": torch.randn(3, 5)})
    model = BACKEND.adopt(module, {"pair": pair, "extra": torch.randn(3, 1)})
    opened = BACKEND.load(BACKEND.save(model, tmp_path / "m.pt2"))
    extra = torch.randn(3, 1)
    assert torch.equal(opened(pair, extra=extra)["sum"], module(pair, extra=extra)["sum"])
    assert BACKEND.graph(opened).inputs == ("pair.0", "pair.1.y", "extra")


def test_a_factory_is_a_model_path(tmp_path):
    (tmp_path / "model.py").write_text(FACTORY)
    sim = QuantSim(f"{tmp_path}/model.py:build", target="default_per_channel")
    assert sim.backend.name == "torch" and sim.graph.linear_ops[0].id == "0"
    assert sim.native(torch.zeros(5, 4)).shape == (5, 3)


def test_a_factory_may_return_the_module_alone_where_there_are_data(tmp_path):
    (tmp_path / "model.py").write_text(FACTORY)
    path = f"{tmp_path}/model.py:bare"
    data = np.random.default_rng(0).normal(size=(16, 4))
    sim = QuantSim(path, data[:2].astype(np.float32))
    assert sim.graph.tensors[sim.graph.inputs[0]].shape == (None, 4)
    np.savez(tmp_path / "data.npz", anything=data)
    words = ["--data", str(tmp_path / "data.npz"), "--quiet", "--out", str(tmp_path / "out")]
    assert main(["quantize", path, *words]) == 0
    assert len(list((tmp_path / "out").glob("*.qdq.onnx"))) == 1
    (tmp_path / "images").mkdir()
    assert main(["quantize", path, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "none")]) == 2


DETECTOR = """
import torch
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        boxes = self.head(self.backbone(x).flatten(2).transpose(1, 2))
        return {"boxes": [b[b[:, 0] > 0] for b in boxes] if boxes.max() > 0 else None, "all": boxes}

def build():
    return Detector().eval(), torch.randn(2, 3, 6, 6)
"""


def test_a_factory_whose_model_cannot_be_captured_whole_gives_its_parts(tmp_path):
    (tmp_path / "model.py").write_text(DETECTOR)
    with pytest.warns(CaptureNotice, match=r"in parts \(backbone, head\)"):
        sim = QuantSim(f"{tmp_path}/model.py:build")
    images = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of arrays that torch may not write to
        sim.calibrate({"x": images}).export(tmp_path / "out")
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.backbone.onnx", "model.head.qdq.onnx", "model.encodings"} <= written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no function 'nothing'"),
        ("broken", "failed: ValueError: no weights"),
        ("bare", "must return the module and a sample"),
    ],
)
def test_wrong_factories_are_explained(tmp_path, name, message):
    (tmp_path / "model.py").write_text(FACTORY)
    with pytest.raises(InputError, match=message):
        BACKEND.load(f"{tmp_path}/model.py:{name}")


def test_wrong_files_are_refused(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"isn't a torch.export program"):
        BACKEND.load(tmp_path / "m.pt2")
    with pytest.raises(InputError, match="there is no"):
        BACKEND.load(tmp_path / "other.pt2")
    with pytest.raises(InputError, match="no option 'device'"):
        BACKEND.load(tmp_path / "m.pt2", device="cpu")
    with pytest.raises(InputError, match="there is no file"):
        QuantSim(f"{tmp_path}/none.py:build")
