"""The same network opened by PyTorch and by ONNX: equal plans, equal bits after folding, equal techniques."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from parity import assert_close_outputs, assert_close_params, assert_equal_plans, matched_names  # noqa: E402
from torch import nn  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.placement import SiteKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402

EPSILON = 1e-3  # no float32: a backend that folds with the double gives other bits


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=EPSILON)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8, eps=EPSILON)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, eps=EPSILON)
        self.fc = nn.Linear(6 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(torch.relu(self.bn3(self.conv3(x))), 1))


def module() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    for norm in (net.bn1, net.bn2, net.bn3):
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.05), (norm.weight, 0.4), (norm.bias, -0.5)):
            tensor.data = torch.rand(tensor.shape, generator=generator) + low
    return net


def as_onnx(net: Net) -> onnx.ModelProto:
    nodes, last = [], "x"
    for i, groups in ((1, 1), (2, 8), (3, 1)):
        pads = [1] * 4 if i < 3 else [0] * 4
        norm = [f"bn{i}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
        nodes += [
            helper.make_node("Conv", [last, f"conv{i}.weight"], [f"c{i}"], f"conv{i}", pads=pads, group=groups),
            helper.make_node("BatchNormalization", [f"c{i}", *norm], [f"b{i}"], f"bn{i}", epsilon=EPSILON),
            helper.make_node("Relu", [f"b{i}"], [f"r{i}"], f"relu{i}"),
        ]
        last = f"r{i}"
    nodes += [
        helper.make_node("Flatten", [last], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    state = {k: v.numpy() for k, v in net.state_dict().items() if "tracked" not in k}
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(v, k) for k, v in state.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


DATA = np.random.default_rng(2).standard_normal((24, 3, 6, 6)).astype(np.float32)


def opened(tmp_path: Path, **options: object) -> tuple[QuantSim, QuantSim, dict[str, str]]:
    """Both, batch norms folded, and the second's name of each site of the first."""
    net = module()
    onnx.save(as_onnx(net), tmp_path / "net.onnx")
    a, b = QuantSim(net, torch.tensor(DATA[:2]), **options), QuantSim(tmp_path / "net.onnx", **options)
    norms = [[op.attrs for op in sim.graph.ops if op.kind is OpKind.BATCH_NORM] for sim in (a, b)]
    assert norms[0] == norms[1]
    assert len(norms[0]) == 3
    a.apply("fold_batch_norm")
    b.apply("fold_batch_norm")
    return a, b, matched_names(a, b, lambda x, y: x.kind is y.kind)


def test_plans_are_equal(tmp_path: Path) -> None:
    a, b, names = opened(tmp_path)
    assert_equal_plans(a, b, names)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, ()),
        ({"target": "per_tensor"}, ("cross_layer_equalization",)),
        ({"target": "per_tensor"}, ("cross_layer_equalization", "bias_correction")),
        ({"weights": "int4"}, ("seq_mse",)),
    ],
    ids=["folded", "equalized", "corrected", "seq_mse"],
)
def test_techniques_give_equal_numbers(tmp_path: Path, options: dict, steps: tuple[str, ...]) -> None:
    a, b, names = opened(tmp_path, scheme="minmax", **options)
    for sim in (a, b):
        for step in steps:
            sim.apply(step, DATA)
        sim.calibrate(DATA)
    for param in a.plan.parameters:
        if param.endswith("weight"):
            np.testing.assert_array_equal(a.params[param], b.params[names[param]])
    assert_close_params(a, b, names)
    for site in (*a.plan.activations, *a.plan.parameters):
        x, y = a.encodings[site], b.encodings[names[site]]
        if a.plan[site].kind is SiteKind.PARAMETER:
            assert x.equals(y)
        np.testing.assert_allclose(x.scale, y.scale, rtol=1e-5)
    assert_close_outputs(a, b, DATA, DATA, exact=1e-6)
