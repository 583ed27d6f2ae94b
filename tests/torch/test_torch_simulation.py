"""The simulation as an nn.Module: values, modes, state, copies, compilation, sessions."""

from __future__ import annotations

import copy
import os
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from simulated import ConvNet, Setup, TiedNet, conv_setup, setup  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bitwright.backend import Tap, Training  # noqa: E402
from bitwright.errors import EncodingError, InputError, ModelError  # noqa: E402
from bitwright.grids import PerChannel  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.testing.contract_base import holds  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402
from bitwright_torch.graph.model import program_of  # noqa: E402
from bitwright_torch.simulate.fake_quant import FakeQuantize  # noqa: E402


@pytest.fixture(scope="module")
def net() -> Setup:
    return conv_setup()


def by_hand(net: Setup, x: torch.Tensor) -> torch.Tensor:
    """`ConvNet` in evaluation, with the core's fake quantization written out."""
    m: ConvNet = net.module
    f = nn.functional

    def q(site: str, v: torch.Tensor) -> torch.Tensor:
        encoding = net.table.get(net.plan.root(site))
        return v if encoding is None else torch.tensor(encoding.fake_quantize(v.detach().numpy()))

    x = q("x", x)
    x = f.conv2d(x, q("conv1.weight", m.conv1.weight), None, padding=1)
    x = q("relu.output", torch.relu(m.bn1(x)))
    y = f.conv2d(x, q("dw.weight", m.dw.weight), m.dw.bias, padding=1, groups=8)
    x = q("add.output", q("relu6.output", f.relu6(y)) + x)
    x = q("cat.output", torch.cat([x, f.max_pool2d(x, 3, 1, 1)], 1))
    x = q("relu#1.output", torch.relu(f.conv2d(x, q("conv2.weight", m.conv2.weight), m.conv2.bias)))
    x = q("mean.output", x.mean((2, 3)))
    return q("fc.output", f.linear(x, q("fc.weight", m.fc.weight), m.fc.bias))


def test_output_is_fake_quantization_at_the_planned_sites(net: Setup) -> None:
    model = net.simulation().model
    with torch.no_grad():
        found, expected = model(net.sample), by_hand(net, net.sample)
        flips = (found - expected).abs() > 1e-6
        assert flips.float().mean() < 0.05  # summation order may move a value across a midpoint
        assert not torch.allclose(found, net.module(net.sample), atol=1e-5)


def test_quantizers_compute_the_activation_functions_that_they_round(net: Setup) -> None:
    nodes = [n for n in program_of(net.simulation().model).graph.nodes if n.op in ("call_function", "call_module")]
    assert not [n for n in nodes if n.target in (torch.ops.aten.relu.default, torch.ops.aten.relu6.default)]
    bounds = [n.args[1] for n in nodes if n.op == "call_module" and len(n.args) > 1]
    assert sorted(bounds) == [(0.0, 6.0), (0.0, np.inf), (0.0, np.inf)]


def test_results_take_the_place_of_what_nothing_else_reads(net: Setup) -> None:
    simulation = net.simulation()
    model = simulation.model
    program = program_of(model)
    calls = [n for n in program.graph.nodes if n.kwargs.get("spent")]
    # Not the input, which is the user's, nor what max pooling and concat have of it, nor the mean.
    assert sorted(c.args[0].target.__name__ for c in calls) == [
        "add.Tensor", "batch_norm", "conv2d.default", "conv2d.default", "linear.default"
    ]  # fmt: skip
    places: list[bool] = []

    def look(module: FakeQuantize, x: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        y = FakeQuantize.forward(module, x, *rest, **named)
        places.append(y.data_ptr() == x.data_ptr())
        return y

    given = net.sample.clone()
    with torch.no_grad():
        once = model(given)
        assert torch.equal(given, net.sample)
        assert torch.equal(model(given), once)
        for call in calls:
            module = model.get_submodule(call.target)
            module.forward = partial(look, module)
        assert torch.equal(model(given), once)
        assert places == [True] * len(calls)
        for call in calls:  # whoever looks at a quantizer's calls may keep them
            del model.get_submodule(call.target).forward
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for call in calls:
            model.get_submodule(call.target).register_forward_hook(lambda _, x, y: seen.append((x[0].clone(), x[0])))
        assert torch.equal(model(given), once)
        assert len(seen) == len(calls) and all(torch.equal(before, after) for before, after in seen)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "convolution" in str(func) or "conv2d" in str(func):
                kept.append((result.clone(), result))
            return result

    plain = net.simulation().model
    with torch.no_grad(), Keeping():
        assert torch.equal(plain(given), once)
    assert kept and all(torch.equal(before, after) for before, after in kept)
    # Where gradients are recorded, what they are made of stays.
    model.zero_grad()
    model(given).sum().backward()


def test_what_is_handed_out_or_fed_stays_as_it_is(net: Setup) -> None:
    simulation = net.simulation()
    source = next(n.args[0] for n in program_of(simulation.model).graph.nodes if n.kwargs.get("spent"))
    own = next(name for name, node in simulation._tensors.items() if node is source)
    both = simulation.session([Tap(own), Tap("fc.output")]).run({"x": net.sample.numpy()})
    with torch.no_grad():
        np.testing.assert_array_equal(both[Tap("fc.output")], simulation.model(net.sample).numpy())
    fed = np.array(both[Tap(own)])
    assert np.unique(fed).size > 256  # not rounded
    part = simulation.segment([own], [Tap("fc.output")])
    for _ in range(2):
        np.testing.assert_array_equal(part.run({own: fed})[Tap("fc.output")], both[Tap("fc.output")])
        np.testing.assert_array_equal(fed, both[Tap(own)])


def test_sessions_hand_out_the_same(net: Setup) -> None:
    simulation = net.simulation()
    sites = [*net.plan.activations]
    values = simulation.session([Tap(s) for s in sites]).run({"x": net.sample.numpy()})
    for site in sites:
        v = values[Tap(site)]
        np.testing.assert_array_equal(net.table[site].fake_quantize(v), v)
    with torch.no_grad():
        np.testing.assert_array_equal(values[Tap("fc.output")], simulation.model(net.sample).numpy())


def test_segments_take_fed_tensors_as_they_are(net: Setup) -> None:
    simulation = net.simulation()
    whole = simulation.session([Tap("add.output"), Tap("fc.output")]).run({"x": net.sample.numpy()})
    part = simulation.segment(["add.output"], [Tap("fc.output"), Tap("add.output")])
    found = part.run({"add.output": whole[Tap("add.output")]})
    np.testing.assert_array_equal(found[Tap("fc.output")], whole[Tap("fc.output")])
    odd = whole[Tap("add.output")] + np.float32(1e-3)
    np.testing.assert_array_equal(part.run({"add.output": odd})[Tap("add.output")], odd)
    with pytest.raises(ModelError):
        simulation.segment(["fc.output"], [Tap("add.output")])


def test_setting_bypassing_and_getting(net: Setup) -> None:
    simulation = net.simulation()
    model = simulation.model
    with torch.no_grad():
        quantized = model(net.sample)
        simulation.set(dict.fromkeys(net.table))
        assert len(simulation.get()) == 0
        torch.testing.assert_close(model(net.sample), net.module(net.sample), rtol=1e-5, atol=1e-6)
        simulation.set(net.table)
        assert torch.equal(model(net.sample), quantized)
    for site in net.plan.quantized:
        root = net.plan.root(site)
        if root in net.table:
            assert simulation.get()[site].equals(net.table[root])


def test_shared_sites_follow_their_root(net: Setup) -> None:
    shared = next(s for s in net.plan.quantized if net.plan.root(s) != s)
    simulation = net.simulation()
    other = net.table[net.plan.root(shared)].with_(scale=np.float32(0.5))
    simulation.set({shared: other})
    assert simulation.get()[net.plan.root(shared)].equals(other)


def test_bad_encodings_change_nothing(net: Setup) -> None:
    simulation = net.simulation()
    good = net.table["add.output" if "add.output" in net.table else "cat.output"]
    floating = next(s for s in net.plan if s not in net.plan.quantized)
    wrong = good.with_(granularity=PerChannel(1), scale=np.ones(5, np.float32), zero_point=np.zeros(5, np.int32))
    for bad in (
        {"nowhere": good},
        {floating: good},
        {"conv2.weight": wrong},
        {"fc.output": wrong.with_(granularity=PerChannel(7))},
    ):
        with pytest.raises(EncodingError):
            simulation.set({"x": None, **bad})
    assert holds(simulation, net.table)


def test_the_float_model_is_left_alone(net: Setup) -> None:
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    model = net.simulation().model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(net.sample).square().sum().backward()
    optimizer.step()
    for key, value in net.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])


def test_names_are_the_user_s_and_states_round_trip(net: Setup) -> None:
    model = net.simulation().model
    mine = net.module.state_dict()
    state = model.state_dict()
    assert [k for k in state if not k.startswith("quantizers.")] == list(mine)
    other = net.simulation(**dict.fromkeys(net.table)).model
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(net.sample), model(net.sample))
        other.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in mine.items()})
    assert torch.equal(other.conv1.weight, mine["conv1.weight"] * 2)


def test_copies_are_independent(net: Setup) -> None:
    simulation = net.simulation()
    model = simulation.model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(net.sample)
        assert torch.equal(twin(net.sample), expected)
        simulation.set({"x": None, "conv1.weight": None})
        assert torch.equal(twin(net.sample), expected)
        assert not torch.equal(model(net.sample), expected)


def test_train_and_eval_reach_batch_norm_and_dropout() -> None:
    net = conv_setup(0.5)
    model = net.simulation().model
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(net.sample), model(net.sample))
        model.train()
        before = model.bn1.running_mean.clone()
        assert not torch.equal(model(net.sample), model(net.sample))
        assert not torch.equal(model.bn1.running_mean, before)


def test_tied_parameters_have_one_quantizer() -> None:
    torch.manual_seed(0)
    net = setup(TiedNet(), torch.randint(0, 11, (3, 4)))
    model = net.simulation(Training(range_learning=True)).model.train()
    assert model.table.weight is model.head.weight
    model(net.sample).sum().backward()
    assert model.table.weight.grad.abs().sum() > 0
    quantizers = [n for n, m in model.named_modules() if isinstance(m, FakeQuantize) and "weight" in n]
    assert len(quantizers) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net: Setup, dtype: torch.dtype) -> None:
    model = net.simulation().model.train()
    with torch.autocast("cpu", dtype):
        loss = model(net.sample).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_weights_in_evaluation_are_rounded_once(net: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net.simulation().model
    count = 0
    original = FakeQuantize.round

    def counted(self: FakeQuantize, *args: object) -> object:
        nonlocal count
        count += self.is_parameter
        return original(self, *args)

    monkeypatch.setattr(FakeQuantize, "round", counted)
    with torch.no_grad():
        first = model(net.sample)
        once = count
        assert torch.equal(model(net.sample), first)
        assert count == once > 0
        model.fc.weight.mul_(1.5)
        assert not torch.equal(model(net.sample), first)
        assert count == once + 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of our Function
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_models_agree(net: Setup, compiler: str) -> None:
    if compiler == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    model = net.simulation().model
    compiled = torch.compile(model, backend=compiler)
    with torch.no_grad():
        expected = model(net.sample)
        torch.testing.assert_close(compiled(net.sample), expected, rtol=0, atol=float(net.table["fc.output"].scale))
    model.train()
    compiled(net.sample).sum().backward()
    assert model.conv1.weight.grad is not None


class Scaled(nn.Module):
    """A parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale


def test_scalar_parameters_are_quantized() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    sim = QuantSim(Scaled().eval(), x, scheme="minmax").calibrate([x])
    scale = float(sim.table[sim.graph.outputs[0]].scale)
    assert "scale" in sim.plan
    assert (sim.model(x) - Scaled.forward(sim.native, x)).abs().max() < 4 * scale
    (found,) = sim.predict([x])
    assert (torch.from_numpy(found) - sim.model(x)).abs().max() <= 1.01 * scale


def test_folded_models_can_be_printed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    sim = QuantSim(net, x, scheme="minmax").apply("fold_batch_norm").calibrate([x])
    assert "BatchNorm2d" in repr(sim.model)
    assert set(sim.native.state_dict()) == {"0.weight", "0.bias"} | {
        n for n in sim.native.state_dict() if "num_batches" in n
    }


def test_data_parallel_training() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = conv_setup()
        model = DistributedDataParallel(net.simulation(Training(range_learning=True)).model.train())
        for _ in range(2):  # the second pass checks that every parameter got its gradient
            model(net.sample).square().sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("pick", [(1, 2), (0, 2), (0, 1, 2)])
def test_a_cell_state_has_a_grid_of_its_own(pick):
    """Whichever of an LSTM's outputs the model uses: hidden states are within 1, cell states aren't."""
    torch.manual_seed(0)

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(3, 4, batch_first=True)
            self.lstm.bias_ih_l0.data[4:8] = 3

        def forward(self, x):
            y, (h, c) = self.lstm(x)
            return [(y, h, c)[i] for i in pick]

    x = torch.randn(6, 10, 3)
    sim = QuantSim(Cell().eval(), x, weights="int16", activations="uint16", scheme="minmax").calibrate([x])
    for expected, found in zip(sim.predict([x], simulated=False), sim.predict([x]), strict=True):
        assert sqnr(expected, found) > 50


def test_ids_that_arrive_as_floats_stay_exact():
    torch.manual_seed(0)

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(1000, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.head(self.embed((ids.reshape(-1, 6) - 1).long()))

    ids = torch.randint(1, 999, (32, 6)).float()
    sim = QuantSim(Text().eval(), ids).calibrate([ids])
    assert sqnr(sim.predict([ids], simulated=False)[0], sim.predict([ids])[0]) > 30
    assert sim.graph.inputs[0] not in sim.plan.quantized


def test_divergence_behind_a_softmax_is_read_ahead_of_it() -> None:
    torch.manual_seed(0)
    logits = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
    whole = torch.nn.Sequential(*logits, torch.nn.Softmax(-1)).eval()
    rows = torch.randn(24, 8)
    sims = [QuantSim(net, rows[:2], weights="int4").calibrate(rows) for net in (logits, whole)]
    (tensor,) = (op.inputs[0] for op in sims[1].graph if op.type == "Softmax")
    with pytest.raises(InputError, match="the outputs are probabilities"):
        sims[1].measure(rows, "kl")
    wanted, found = (sim.measure(rows, "kl", output=t)["kl"] for sim, t in zip(sims, (None, tensor), strict=True))
    assert found.simulated == pytest.approx(wanted.simulated, rel=1e-5)


def test_a_segment_computes_with_the_memory_layout_that_the_whole_has():
    """The order of values in memory decides which kernel runs, and so last bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1)).eval().to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 17, 17)
    sim = QuantSim(net, x)
    backend, model, graph = sim.backend, sim.native, sim.graph
    inner, end = (op.output for op in graph.ops)
    whole = backend.session(model, [Tap(inner), Tap(end)]).run({graph.inputs[0]: x.numpy()})
    assert not whole[Tap(inner)].flags.c_contiguous
    for given in (whole[Tap(inner)], _read_only(whole[Tap(inner)])):
        part = backend.segment(model, [inner], [Tap(end)]).run({inner: given})
        np.testing.assert_array_equal(part[Tap(end)], whole[Tap(end)])


def _read_only(array):
    found = array.view()
    found.flags.writeable = False
    return found
