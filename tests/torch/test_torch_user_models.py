"""Models as people write them: masked attention, parts of one layer, views that are overwritten, checkpoints."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitwright import QuantSim
from bitwright.errors import InputError
from bitwright_torch import capture
from bitwright_torch.backend import TorchBackend

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
PAD = torch.zeros(2, 5, dtype=torch.bool)
PAD[1, 3:] = True


class Module(nn.Module):
    """The model of a function of a module."""

    def __init__(self, call, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part())

    def forward(self, *args):
        return self.call(self, *args)


def attention(need_weights):
    return lambda m, x, pad: m.a(x, x, x, key_padding_mask=pad, need_weights=need_weights)[0]


def filled(m, x, pad):
    y = m.q(x)
    scores = (y @ y.transpose(1, 2)).masked_fill(pad[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ y


def added(m, x, pad):
    y = m.q(x)
    scores = y @ y.transpose(1, 2) + pad[:, None].float() * torch.finfo(torch.float32).min
    return torch.softmax(scores, -1) @ y


def heads():
    return nn.MultiheadAttention(8, 2, batch_first=True)


@pytest.mark.parametrize(
    "model",
    [
        Module(attention(False), a=heads),
        Module(attention(True), a=heads),
        Module(filled, q=lambda: nn.Linear(8, 8)),
        Module(added, q=lambda: nn.Linear(8, 8)),
    ],
    ids=["fused", "weights", "masked_fill", "finfo.min"],
)
def test_masked_attention_is_simulated(model):
    """Masks and masked scores have no grid: neither an error, nor a grid that nothing else fits in."""
    captured = capture(model.eval(), (X, PAD))
    batch = dict(zip(QuantSim(captured).graph.inputs, (X.numpy(), PAD.numpy()), strict=True))
    sim = QuantSim(captured).calibrate([batch])
    expected = model(X, PAD).detach().numpy()
    found = sim.predict(batch)[0]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_queries_that_may_see_no_key_get_zeros(kind):
    """As PyTorch has it: neither NaN nor the mean of all values."""
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    if kind == "added":
        mask = torch.zeros(5, 5).masked_fill(~mask, float("-inf"))

    def call(m, x):
        y = m.q(x)
        return F.scaled_dot_product_attention(y, y, y, mask)

    model = Module(call, q=lambda: nn.Linear(8, 8)).eval()
    expected = model(X).detach()
    assert not expected[:, 2].any()
    sim = QuantSim(model, X).calibrate([X])
    found = torch.from_numpy(sim.predict(X)[0])
    assert not found[:, 2].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def chunk_then_whole(m, x):
    y = m.l(x)
    y.chunk(2, -1)[0].relu_()
    return y


def whole_then_chunk(m, x):
    y = m.l(x)
    a, _ = y.chunk(2, -1)
    y.mul_(2)
    return a


def through_mt(m, x):
    y = m.l(x)
    y.mT.mul_(2)
    return y


@pytest.mark.filterwarnings("ignore:Module is captured in parts:bitwright_torch.CaptureNotice")
@pytest.mark.parametrize("call", [chunk_then_whole, whole_then_chunk, through_mt])
def test_views_without_a_functional_form_are_never_read_stale(call):
    """The captured model says what the model says, whole or in parts."""
    model = Module(call, l=lambda: nn.Linear(8, 8)).eval()
    with torch.no_grad():
        sim = QuantSim(model, (X,))
        expected = model(X).numpy()
    np.testing.assert_allclose(sim.predict({sim.graph.inputs[0]: X.numpy()}, simulated=False)[0], expected, atol=1e-6)


def test_batch_statistics_in_evaluation_stay():
    """`F.batch_norm(training=True)` normalizes by the batch in both modes."""

    def call(m, x):
        y = m.l(x).flatten(0, 1)
        return F.batch_norm(y, torch.zeros(8), torch.ones(8), training=True)

    model = Module(call, l=lambda: nn.Linear(8, 8)).eval()
    with torch.no_grad():
        torch.testing.assert_close(capture(model, (X,))(X), model(X))


class Gated(nn.Module):
    """Data decide on the way; a scale lies outside of the parts; the head is a layer of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.backbone(x)
        if y.sum() > 1e9:
            y = y * 2
        return self.head(y) * self.scale


def test_a_part_of_one_layer_is_edited_and_training_leaves_the_float_model():
    """Names of a part that is one layer lead to it; what lies around the parts is copied for training."""
    model = Gated().eval()
    captured = capture_in_parts(model)
    data = [{name: X[0].numpy() for name in QuantSim(captured).graph.inputs}]
    sim = QuantSim(captured).calibrate(data)
    sim.apply("bias_correction", data)
    before = {n: t.clone() for n, t in captured.state_dict().items()}
    trained = sim.calibrate(data).trainable()
    optimizer = torch.optim.SGD(trained.parameters(), 1.0)
    trained(X[0]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(dict(trained.named_parameters())["scale"], torch.ones(()))
    for name, value in captured.state_dict().items():
        assert torch.equal(value, before[name]), name


def capture_in_parts(model):
    from bitwright_torch.capture.parts import capture_parts

    return capture_parts(model, X[0], ["backbone", "head"])


def test_a_checkpoint_of_range_learning_is_loaded_as_it_was():
    """Learned scales and zero points survive in a simulation that learns none, of any width before."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def opened():
        sim = QuantSim(model, X[0], weights="int4", activations="uint4")
        return sim.calibrate([{sim.graph.inputs[0]: X[0].numpy()}])

    learner = opened().trainable(range_learning=True)
    optimizer = torch.optim.SGD(learner.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (learner(X[0]) - 1).square().mean().backward()
        optimizer.step()
    learner.eval()
    expected, state = learner(X[0]).detach(), copy.deepcopy(learner.state_dict())
    other = opened().simulation.model
    other.load_state_dict(state)
    torch.testing.assert_close(other(X[0]).detach(), expected, rtol=0, atol=1e-6)


def test_a_simulation_is_no_model_to_open():
    """It has quantizers already; opened as a model it would have none of its own."""
    model = nn.Sequential(nn.Linear(8, 8))
    sim = QuantSim(model, X[0])
    sim.calibrate([{sim.graph.inputs[0]: X[0].numpy()}])
    with pytest.raises(InputError, match="simulation already"):
        QuantSim(sim.model, X[0])


def test_weights_written_behind_autograd_are_followed_in_training():
    """`.data` writes change no version; grids follow the weights all the same."""
    model = nn.Sequential(nn.Linear(8, 8))
    sim = QuantSim(model, X[0], weights="int8")
    trained = sim.calibrate([{sim.graph.inputs[0]: X[0].numpy()}]).trainable()
    trained.train()
    trained(X[0])
    weight = next(p for p in trained.parameters() if p.ndim == 2)
    weight.data.mul_(4)
    inner = [m for m in trained.modules() if type(m).__name__ == "FakeQuantize" and m.follows]
    trained(X[0])
    assert inner
    assert torch.allclose(inner[0].scale.max() * 127, weight.abs().max(), rtol=0.02)


def test_free_batches_of_any_arguments():
    """`forward(*xs)` has a free batch as any other; a free dimension that the sample has only 1 of is refused."""
    model = Module(lambda m, *xs: m.l(xs[0]) + xs[1], l=lambda: nn.Linear(8, 8)).eval()
    captured = capture(model, (X, X))
    torch.testing.assert_close(captured(X[:1], X[:1]), model(X[:1], X[:1]))
    single = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(InputError, match="length 1"):
        capture(single, (X[:1],), dynamic_shapes={"input": (0, 1)})


class MakesTensors(nn.Module):
    """Positions, a mask and zeros of its own, on the device of its input, as transformers do."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(16, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, float("-inf")).softmax(-1)
        return self.head(scores @ (x + self.positions(places)).to(x.device))


def test_a_model_captured_on_one_device_runs_on_another():
    """The meta device computes shapes only, but refuses to mix devices as a GPU does."""
    sample = torch.randn(2, 5, 4)
    sim = QuantSim(MakesTensors().eval(), sample)
    sim.calibrate([sample])
    expected = sim.model(sample)
    for model in (sim.model, sim.trainable(range_learning=True)):
        moved = copy.deepcopy(model).to("meta")
        assert moved(sample.to("meta")).device.type == "meta"
    torch.testing.assert_close(sim.model(sample), expected, rtol=0, atol=0)


def test_keys_of_dicts_come_in_any_order():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, batch):
            return self.head(batch["parts"][0]["x"] - batch["y"])

    batch = {"parts": [{"x": X, "unused": X}], "y": 2 * X}
    turned = {"y": 2 * X, "parts": [{"unused": X, "x": X}]}
    model = Named().eval()
    sim = QuantSim(model, (batch,))
    torch.testing.assert_close(sim.native(turned), model(batch), rtol=0, atol=0)
    with pytest.raises(InputError, match="another structure"):
        sim.native({"y": X})


def test_shapes_of_the_whole_dont_go_with_parts():
    model = Module(lambda m, x: m.l(x), l=lambda: nn.Linear(8, 8))
    with pytest.raises(InputError, match="leave one of them out"):
        TorchBackend().adopt(model, X, modules=["l"], dynamic_shapes={"x": (0,)})


def test_a_streaming_model_is_calibrated_on_whole_feeds():
    """Time first, a state whose first axis is layers, and a scalar."""

    def stream(m, frames, state, gain):
        h = state[0]
        for t in range(4):
            h = torch.tanh(m.a(frames[t] * gain) + m.b(h))
        return m.v(h), h[None]

    net = Module(stream, a=lambda: nn.Linear(3, 4), b=lambda: nn.Linear(4, 4), v=lambda: nn.Linear(4, 2)).eval()
    rng = np.random.default_rng(0)
    feeds = [
        (rng.normal(size=(4, 1, 3)).astype(np.float32), rng.normal(size=(1, 1, 4)).astype(np.float32),
         np.array(0.5 + 0.1 * k, np.float32))
        for k in range(5)
    ]  # fmt: skip
    sim = QuantSim(net, tuple(torch.from_numpy(a) for a in feeds[0])).calibrate(feeds)
    expected, found = (sim.predict(feeds, simulated=s)[0] for s in (False, True))
    assert found.shape == (5, 2)
    assert np.square(expected - found).sum() < 1e-3 * np.square(expected).sum()
    sim.apply("adaround", feeds).calibrate(feeds)
