"""The PyTorch backend holds the backend contract, on the CPU or on the device that BITWRIGHT_TORCH_DEVICE names."""

import os

import pytest

torch = pytest.importorskip("torch")

import nets  # noqa: E402
import numpy as np  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.testing.backend_contract import BackendContract, Case, Held  # noqa: E402
from bitwright.testing.contract_base import run  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402
from bitwright_torch.graph.canonical import canonical  # noqa: E402

DEVICE = os.environ.get("BITWRIGHT_TORCH_DEVICE", "cpu")
torch.backends.cudnn.allow_tf32 = False  # it rounds the float products that everything is compared with


def there(values):
    return torch.from_numpy(values).to(DEVICE)


def case(build, tolerance=1e-5, **inputs):
    def captured():
        torch.manual_seed(0)
        sample = {k: there(v) for k, v in inputs.items()}
        return TorchBackend().adopt(nets.settled(build()).to(DEVICE), sample)

    return Case(captured, inputs, tolerance)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def ids(*shape):
    return np.random.default_rng(0).integers(0, 12, shape)


class Prenormed(torch.nn.Module):
    """Batch norms before linear ops, a leaky ReLU and a PReLU, average pooling, two outputs."""

    def __init__(self):
        super().__init__()
        self.bn_in, self.conv1 = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3)
        self.bn_mid, self.conv2 = torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.prelu = torch.nn.PReLU(4)
        self.fc = torch.nn.Linear(16, 5)

    def forward(self, x):
        x = torch.nn.functional.leaky_relu(self.conv1(self.bn_in(x)), 0.2)
        x = self.prelu(self.conv2(self.bn_mid(x)))
        y = torch.nn.functional.avg_pool2d(x, 2).flatten(1)
        return self.fc(y * torch.sigmoid(y)), y


class Sequence(torch.nn.Module):
    """Scores with a mask, an LSTM and a GRU; slopes by token, though features lie last."""

    def __init__(self):
        super().__init__()
        self.register_buffer("triangle", torch.full((5, 5), -1e9).triu(1))
        self.lstm = torch.nn.LSTM(6, 4, batch_first=True)
        self.gru = torch.nn.GRU(4, 3, batch_first=True)
        self.fc, self.prelu = torch.nn.Linear(3, 4), torch.nn.PReLU(5)
        torch.nn.init.uniform_(self.prelu.weight, 0.1, 0.9)

    def forward(self, x, scale):
        x = torch.softmax(x @ x.transpose(1, 2) + self.triangle, -1) @ x * scale
        return self.prelu(self.fc(self.gru(self.lstm(x)[0])[0]))


class Odd(torch.nn.Module):
    """One linear op, times what its code makes of what no graph holds."""

    def __init__(self, factor):
        super().__init__()
        self.fc, self.factor, self.calls = torch.nn.Linear(6, 4), factor, 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x) * self.factor(self, x)


def readable(x):
    """Whether tensors have data: those of a trace haven't."""
    try:
        return float(x.abs().max()) >= 0
    except Exception:
        return False


ODD = {
    "how often it was called": lambda net, x: float(net.calls),
    "whether it is the first call": lambda net, x: 2.0 if net.calls == 1 else 1.0,
    "whether it is exported": lambda net, x: 2.0 if torch.compiler.is_compiling() else 1.0,
    "what tensors are": lambda net, x: 2.0 if type(x) is torch.Tensor else 1.0,
    "whether numbers can be read": lambda net, x: 2.0 if readable(x) else 1.0,
    "whether it is one sample": lambda net, x: 2.0 if len(x) == 1 else 1.0,
    "whether there are many samples": lambda net, x: 2.0 if len(x) > 5 else 1.0,
}


def held(build, odd="", **inputs):
    def made():
        torch.manual_seed(0)
        return nets.settled(build()).to(DEVICE).eval()

    def run_it(model, batch):
        with torch.no_grad():
            found = model(**{k: there(v.copy()) for k, v in batch.items()})
        return [y.cpu().numpy() for y in torch.utils._pytree.tree_leaves(found)]

    return Held(made, run_it, inputs, odd)


class TestTorchContract(BackendContract):
    suffix = ".pt2"

    def backend(self):
        return TorchBackend()

    def artefact_outputs(self, path, case):
        onnx = OnnxBackend()
        model = onnx.load(path)
        return run(onnx.session(model, [Tap(t) for t in onnx.graph(model).outputs]), case.batch)

    def native_value(self, model, param):
        state = model.state_dict()
        held = state[param] if param in state else canonical(model).params[param][0].view(model)
        return held.detach().cpu().numpy()

    def descend(self, simulation, batch, cotangents, rate):
        model = simulation.model.eval()
        outputs = model(*(there(v) for v in batch.values()))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names = TorchBackend().graph(simulation.float_model()).outputs
        pairs = zip(names, outputs, strict=True)
        loss = sum((y * there(cotangents[t])).sum() for t, y in pairs if t in cotangents)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad

    def held(self):
        odd = {what: held(lambda f=f: Odd(f), what, x=normal(4, 6)) for what, f in ODD.items()}
        return {"prenormed": held(Prenormed, x=normal(4, 3, 6, 6)), "tied": held(nets.Tied, ids=ids(6, 5)), **odd}

    def cases(self):
        return {
            "prenormed": case(Prenormed, x=normal(4, 3, 6, 6)),
            "sequence": case(Sequence, x=normal(4, 5, 6), scale=normal(4, 5, 1)),
            "residual": case(nets.Residual, x=normal(8, 3, 8, 8)),
            "branches": case(nets.Branches, x=normal(4, 3, 6, 6)),
            "mlp": case(nets.Mlp, x=normal(8, 10)),
            "attention": case(nets.Attention, ids=ids(4, 7), mask=np.tile(np.arange(7) < 5, (4, 1))),
            "tied": case(nets.Tied, ids=ids(6, 5)),
        }
