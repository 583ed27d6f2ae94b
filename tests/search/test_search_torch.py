"""The searches on a PyTorch module: the same stages, resumed from saved programs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

from bitwright import auto_quantize, mixed_precision  # noqa: E402


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    ).eval()
    images = torch.randn(32, 3, 10, 10)
    with torch.no_grad():
        exact = module(images)

    def evaluate(model):
        assert isinstance(model, torch.nn.Module)
        with torch.no_grad():
            return 1 - (model(images) - exact).norm() / exact.norm()

    return module, images, evaluate


CALLS = []  # not in the evaluation's closure: what that holds tells one evaluation from another


def test_auto_quantize(case, tmp_path):
    module, images, evaluate = case
    CALLS.clear()

    def counted(model):
        CALLS.append(1)
        return evaluate(model)

    def run():
        return auto_quantize(module, [images], counted, sample=images[:2], allowed_drop=0.0, weights="int4",
                             schemes=["sqnr", "minmax"], techniques="bn_fold,cle,bias_correction",
                             run=tmp_path / "run")  # fmt: skip

    first = run()
    assert first.float_score == pytest.approx(1, abs=1e-5)
    assert first.score == pytest.approx(float(evaluate(first.model)))
    assert first.score > 0.5
    assert [t.name for t in first.trials if t.kind == "technique"] == ["cross_layer_equalization", "bias_correction"]
    count = len(CALLS)
    again = run()
    assert len(CALLS) == count
    assert [(t.name, t.status, t.score) for t in again.trials] == [(t.name, t.status, t.score) for t in first.trials]
    assert all(again.sim.encodings[s].equals(e) for s, e in first.sim.encodings.items())
    assert float(evaluate(again.model)) == pytest.approx(first.score)


def test_mixed_precision_and_set_precision(case):
    module, images, evaluate = case
    result = mixed_precision(module, [images], evaluate, sample=images[:2], allowed_drop=0.2,
                             candidates=[("int8", "uint8"), ("int4", "uint8")])  # fmt: skip
    assert result.met
    assert result.relative_cost < 1
    assert result.score == pytest.approx(float(evaluate(result.model)))
    sim = result.sim
    sim.set_precision("Conv", weights="int16")
    assert {sim.plan.spec(op.weight).bits for op in sim.graph.linear_ops if op.type == "Conv"} == {16}
