"""A bare matrix that layers, products with its columns and einsums read: a parameter in each layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import torch.nn.functional as F  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.cli import main  # noqa: E402
from bitwright.graph import ParamRole  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402

READS = {
    "layer, einsum and columns": lambda x, w: torch.einsum("bi,ij->bj", torch.relu(F.linear(x, w)), w) @ w,
    "columns and einsum": lambda x, w: torch.einsum("bi,oi->bo", torch.relu(x @ w), w),
    "einsum and columns": lambda x, w: torch.einsum("bi,ij->bj", torch.relu(x), w) @ w,
    "layer and product": lambda x, w: torch.relu(F.linear(x, w)) @ w.t() + (x[:, None] * w).sum(-1),
    "layer and turned einsum": lambda x, w: torch.einsum("bi,ij->bj", torch.relu(F.linear(x, w)), w.t()),
    "layer, columns and turned columns": lambda x, w: torch.relu(torch.relu(F.linear(x, w)) @ w) @ w.t(),
}


class Reads(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind, self.w = kind, torch.nn.Parameter(torch.randn(8, 8, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return READS[self.kind](x, self.w)


def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)


@pytest.mark.parametrize("target", ["default", "onnxruntime-cpu"])
@pytest.mark.parametrize("kind", READS)
def test_every_layout_is_exported_as_it_was_simulated(kind: str, target: str, tmp_path: Path) -> None:
    x = data()
    sim = QuantSim(Reads(kind).eval(), x[:2], target=target).calibrate(x)
    assert sqnr(sim.predict(x, simulated=False)[0], sim.predict(x)[0]) > 30
    assert "qdq" in sim.export(tmp_path, name="net").files
    result = verify(tmp_path, x)
    assert result.problems == [] and result.sqnr_db["integer_simulated"] > 60
    assert main(["encodings", "check", str(tmp_path)]) == 0


def test_layers_keep_the_matrix_and_columns_read_a_copy() -> None:
    sim = QuantSim(Reads("layer, einsum and columns").eval(), data()[:2])
    read = {op.type: op.params for op in sim.graph if op.params}
    assert read["Gemm"][ParamRole.WEIGHT] == "w" == read["Einsum"][ParamRole.CONSTANT]
    assert read["MatMul"][ParamRole.WEIGHT] != "w"
    assert sim.graph.params[read["MatMul"][ParamRole.WEIGHT]].layout == (1, 0)


def test_both_layouts_train_one_matrix() -> None:
    x = torch.from_numpy(data())
    module = Reads("columns and einsum").eval()
    sim = QuantSim(module, data()[:2], weights="int16", activations="int16").calibrate(data())
    sim.trainable()
    sim.model(x).square().mean().backward()
    module(x).square().mean().backward()
    (trained,) = [p for p in sim.model.parameters() if p.shape == (8, 8)]
    assert trained.grad is not None and module.w.grad is not None
    torch.testing.assert_close(trained.grad, module.w.grad, rtol=1e-2, atol=1e-3)


def test_a_technique_gives_each_layout_its_own_roundings(tmp_path: Path) -> None:
    x = data()
    sim = QuantSim(Reads("layer, columns and turned columns").eval(), x[:2], weights="int4")
    sim.apply("gptq", x).calibrate(x)
    sim.export(tmp_path, name="net")
    assert verify(tmp_path, x).problems == []
    assert main(["encodings", "check", str(tmp_path)]) == 0
