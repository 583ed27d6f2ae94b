"""Quantization-aware training: plain loops, Lightning, and the way back into QuantSim."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simulated import ConvNet, Setup, conv_setup  # noqa: E402

import bitwright_torch  # noqa: E402
from bitwright.backend import Training  # noqa: E402
from bitwright.calibration import full_table  # noqa: E402
from bitwright.errors import CapabilityError, InputError  # noqa: E402
from bitwright.grids import EncodingTable, encoding_of_weights  # noqa: E402
from bitwright.placement import Derived  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_torch import parameter_groups  # noqa: E402
from bitwright_torch.simulate.fake_quant import FakeQuantize  # noqa: E402

MODES = {"regular": Training(), "range learning": Training(True), "lsq": Training(True, True)}


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose class is which of five places is bright."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(0, 5, (24,), generator=generator)
        x = torch.randn(24, 3, 9, 9, generator=generator) * 0.3
        x[torch.arange(24), y % 3] += 1.0 + 0.6 * (y // 3)[:, None, None]
        found.append((x, y))
    return found


def train(model: torch.nn.Module, data: list, rate: float = 0.01) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    losses = []
    for x, y in data:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="module")
def net() -> Setup:
    return conv_setup(weights="int4", activations="uint4")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_plain_loop_trains(net: Setup, mode: Training) -> None:
    simulation = net.simulation(mode)
    losses = train(simulation.model, batches(30))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    table = simulation.get()
    trained = simulation.float_model()
    for site in net.plan.parameters:
        weight = trained.get_parameter(site).detach().numpy()
        if mode.range_learning:
            assert not table[site].equals(net.table[site])
            assert table[site].frozen
        else:
            assert table[site].equals(encoding_of_weights(weight, net.plan.spec(site)))
    changed = [s for s in net.plan.activations if not table[s].equals(net.table[s])]
    assert bool(changed) is mode.range_learning


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_what_was_trained_is_what_is_exported(net: Setup, mode: Training) -> None:
    """The float model with the encodings read back simulates to the same bits as the trained module."""
    simulation = net.simulation(mode)
    train(simulation.model, batches(5))
    again = type(simulation)(simulation.float_model(), net.plan, simulation.get())
    with torch.no_grad():
        assert torch.equal(again.model(net.sample), simulation.model(net.sample))


def test_accumulated_gradients_double(net: Setup) -> None:
    model = net.simulation(Training(True)).model
    model(net.sample).sum().backward()
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model(net.sample).sum().backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


def test_two_forwards_before_one_backward(net: Setup) -> None:
    model = net.simulation().model.train()
    first = model(net.sample)
    second = model(net.sample[:3])
    (first.sum() + second.sum()).backward()


def test_frozen_grids_stay_in_range_learning(net: Setup) -> None:
    frozen = {s: net.table[s].with_(frozen=True) for s in ("conv2.weight", "x")}
    simulation = net.simulation(Training(True), **frozen)
    train(simulation.model, batches(5))
    now = simulation.get()
    assert all(now[s].equals(net.table[s]) for s in frozen)
    assert not now["fc.weight"].equals(net.table["fc.weight"])


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_derived_grids_of_biases_stay(net: Setup, mode: Training) -> None:
    """They follow from others: neither the bias's values nor an optimizer moves them."""
    full = full_table(net.plan, EncodingTable(net.table))
    derived = [s for s in net.plan.quantized if isinstance(net.plan[s].decision, Derived)]
    simulation = net.simulation(mode, **{s: full[s] for s in derived})
    train(simulation.model, batches(5))
    found, trained = simulation.get(), simulation.float_model()
    assert derived
    for site in derived:
        assert not torch.equal(trained.get_parameter(site), net.model.get_parameter(site))
        assert found[site].equals(full[site]), site


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_grids_get_a_learning_rate_of_their_own(net: Setup, mode: Training) -> None:
    model = torch.nn.Sequential(net.simulation(mode).model)  # as a trainer would wrap it
    groups = parameter_groups(model, 0.01, grid_factor=4.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups][1:] == [(0.04, 0.0)] * mode.range_learning
    assert optimizer.param_groups[0]["lr"] == 0.01
    if mode.range_learning:
        grids = {n for n, p in model.named_parameters() if any(p is q for q in groups[1]["params"])}
        assert grids == {n for n, _ in model.named_parameters() if n.endswith(("log_scale", "zero_shift"))}


def test_lightning_needs_no_special_code(net: Setup) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple, _: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

    simulation = net.simulation(Training(True))
    before = {n: p.detach().clone() for n, p in simulation.model.named_parameters()}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    simulation.model.train()
    trainer.fit(Task(simulation.model), torch.utils.data.DataLoader(batches(4), batch_size=None))
    moved = [n for n, p in simulation.model.named_parameters() if not torch.equal(p, before[n])]
    assert "conv1.weight" in moved
    assert any(n.endswith("log_scale") for n in moved)


def test_quantsim_trains_and_takes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ConvNet().eval()
    data = batches(8)
    sim = QuantSim(module, data[0][0], weights="int4", activations="uint8", scheme="minmax")
    sim.calibrate([x.numpy() for x, _ in data[:4]])
    with pytest.raises(InputError, match="trainable"):
        sim.take()
    model = sim.trainable(range_learning=True)
    assert any(isinstance(m, FakeQuantize) and m.learns for m in model.modules())
    sim.predict(data[0][0])  # not stepped yet: no obstacle
    train(model, data)
    before = {n: p.clone() for n, p in module.named_parameters()}
    for step in (
        lambda: sim.export(tmp_path / "out"), lambda: sim.save(tmp_path / "kept"), lambda: sim.predict(data[0][0]),
        lambda: sim.calibrate(data[0][0]), lambda: sim.apply("cle"), sim.fork, lambda: sim.model,
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"trained and not taken.*take\(\).*drop_training"):
            step()
    assert not list(tmp_path.iterdir())
    assert str(sim).splitlines()[-1] == "next: take(), or drop_training()"
    sim.take()
    assert "\ntrained\n" in str(sim) and "export(folder)" in str(sim).splitlines()[-1]
    assert sim.changed_by == ("training",)
    with pytest.raises(InputError, match="'training' has changed the float model"):
        sim.measure(data[0][0], "agreement")
    assert sim.measure(data[0][0], "agreement", reference=QuantSim(module, data[0][0]))["agreement"].count == len(
        data[0][0]
    )
    with torch.no_grad():
        step = float(sim.encodings["fc.output"].scale)  # biases are int32 in the one, float in the other
        assert (sim.model(data[0][0]) - model(data[0][0])).abs().max() <= 1.01 * step
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    sim.predict(data[0][0])
    train(model, data)  # further training after take() counts again
    with pytest.raises(InputError, match="not taken over since"):
        sim.predict(data[0][0])
    sim.drop_training().predict(data[0][0])
    assert sim.encodings.provenance[-1].technique == "training"
    kept = dict(sim.encodings)
    sim.calibrate([x.numpy() for x, _ in data[:1]])
    assert all(sim.encodings[s].equals(e) for s, e in kept.items())


def test_backends_that_can_t_train_say_so() -> None:
    onnx = pytest.importorskip("onnx")
    x = onnx.helper.make_tensor_value_info("x", 1, [1, 2])
    y = onnx.helper.make_tensor_value_info("y", 1, [1, 2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    sim = QuantSim(model, scheme="minmax").calibrate([np.float32([[1, -1]])])
    with pytest.raises(CapabilityError, match="PyTorch"):
        sim.trainable()


def test_the_guide_s_distillation_brings_the_student_to_its_teacher() -> None:
    """The page's own lines, on a network of 4-bit weights."""
    text = (Path(__file__).parents[2] / "docs" / "pytorch.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "kl_div" in b]
    torch.manual_seed(0)
    model, data = ConvNet().eval(), [x for x, _ in batches(12)]
    sim = QuantSim(model, data[0], weights="int4").calibrate(data[0])

    def apart() -> float:
        x = torch.cat(data)
        return float((torch.from_numpy(sim.predict(x)[0]) - model(x).detach()).square().mean())

    before = apart()
    exec(code, {"torch": torch, "bitwright_torch": bitwright_torch, "model": model, "sim": sim, "batches": data})
    assert apart() < 0.8 * before


def test_training_goes_on_elsewhere_without_calibrating(tmp_path: Path) -> None:
    module, sample = ConvNet().eval(), batches(1)[0][0]
    sim = QuantSim(module, sample, weights="int4").calibrate(sample)
    sim.save(tmp_path)
    model = sim.trainable(range_learning=True)
    train(model, batches(2))
    torch.save(model.state_dict(), tmp_path / "step.pt")

    other = QuantSim.load(tmp_path).trainable(range_learning=True)
    assert not torch.equal(other(sample), model(sample))
    other.load_state_dict(torch.load(tmp_path / "step.pt"))
    assert torch.equal(other(sample), model(sample))
    for write in (pickle.dumps, lambda m: torch.save(m, tmp_path / "whole.pt")):
        with pytest.raises(CapabilityError, match=r"can't be pickled.*QuantSim\.load.*state_dict"):
            write(model)
