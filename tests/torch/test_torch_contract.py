"""The PyTorch backend holds the backend contract."""

import pytest

torch = pytest.importorskip("torch")

import nets  # noqa: E402
import numpy as np  # noqa: E402

from bitwright.backend import Tap  # noqa: E402
from bitwright.testing.backend_contract import BackendContract, Case  # noqa: E402
from bitwright.testing.contract_base import run  # noqa: E402
from bitwright_onnx.backend import OnnxBackend  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402


def case(build, tolerance=1e-5, **inputs):
    def captured():
        torch.manual_seed(0)
        sample = {k: torch.from_numpy(v) for k, v in inputs.items()}
        return TorchBackend().adopt(nets.settled(build()), sample)

    return Case(captured, inputs, tolerance)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def ids(*shape):
    return np.random.default_rng(0).integers(0, 12, shape)


class TestTorchContract(BackendContract):
    suffix = ".pt2"

    def backend(self):
        return TorchBackend()

    def artefact_outputs(self, path, case):
        onnx = OnnxBackend()
        model = onnx.load(path)
        return run(onnx.session(model, [Tap(t) for t in onnx.graph(model).outputs]), case.batch)

    def cases(self):
        return {
            "residual": case(nets.Residual, x=normal(8, 3, 8, 8)),
            "branches": case(nets.Branches, x=normal(4, 3, 6, 6)),
            "mlp": case(nets.Mlp, x=normal(8, 10)),
            "attention": case(nets.Attention, ids=ids(4, 7), mask=np.tile(np.arange(7) < 5, (4, 1))),
            "tied": case(nets.Tied, ids=ids(6, 5)),
        }
