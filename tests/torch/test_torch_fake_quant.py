"""`FakeQuantize`: bit-equal to the core's grid, gradients, following weights, learning, state."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bitwright.grids import (  # noqa: E402  # noqa: E402
    Blockwise,
    Encoding,
    PerChannel,
    PerTensor,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
    two_level,
)
from bitwright_torch.simulate import kernels as kernel_module  # noqa: E402
from bitwright_torch.simulate import rounding  # noqa: E402
from bitwright_torch.simulate.absorbed import absorbs  # noqa: E402
from bitwright_torch.simulate.fake_quant import FakeQuantize  # noqa: E402
from bitwright_torch.simulate.passing import passing  # noqa: E402
from bitwright_torch.simulate.rounding import clipped, round_to_grid  # noqa: E402

INTEGERS = {
    "uint8": QuantSpec(8, signed=False, symmetric=False),
    "int8": QuantSpec(8),
    "int8 strict": QuantSpec(8, strict=True),
    "uint4": QuantSpec(4, signed=False, symmetric=False),
    "int2": QuantSpec(2),
    "uint16": QuantSpec(16, signed=False, symmetric=False),
    "int16": QuantSpec(16),
    "int32": QuantSpec(32),
}
FLOATS = ["float16", "bfloat16", "float8e4m3fn", "float8e5m2", "float4e2m1", "nf4"]
WEIGHTS = {
    "tensor": QuantSpec(4),
    "asymmetric": QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(0)),
    "unsigned symmetric": QuantSpec(8, signed=False, granularity=PerChannel(0)),
    "channel": QuantSpec(8, granularity=PerChannel(0)),
    "strict": QuantSpec(8, strict=True, granularity=PerChannel(0)),
    "input channel": QuantSpec(8, granularity=PerChannel(1)),
    "blocks": QuantSpec(4, granularity=Blockwise(0, 1, 4)),
    "blocks across": QuantSpec(4, granularity=Blockwise(1, 0, 2)),
    "lpbq": QuantSpec(4, granularity=Blockwise(0, 1, 4, 8)),
    "fp8": QuantSpec(8, float_format="float8e4m3fn", granularity=PerChannel(0)),
    "nf4": QuantSpec(4, float_format="nf4", granularity=Blockwise(0, 1, 4)),
}


def probe(encoding: Encoding) -> np.ndarray:
    """Codes, midpoints, their neighbours, and what lies beyond."""
    grid = encoding.grid
    codes = np.linspace(grid.qmin - 3, grid.qmax + 3, min(2 * grid.steps + 13, 4001))
    points = (np.rint(codes * 2) / 2 - int(encoding.zero_point)) * np.float64(encoding.scale)
    points = points.astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)]).astype(np.float32)


@pytest.mark.parametrize("spec", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("grad", [False, True])
def test_integers_are_the_core_s(spec: QuantSpec, grad: bool) -> None:
    encoding = encoding_from_range(spec, -1.3, 2.1)
    x = probe(encoding)
    module = FakeQuantize()
    module.set(encoding)
    found = module(torch.tensor(x, requires_grad=grad)).detach().numpy()
    np.testing.assert_array_equal(found, encoding.fake_quantize(x))
    assert module.get().equals(encoding)


@pytest.mark.parametrize("form", FLOATS)
def test_float_formats_are_the_core_s(form: str) -> None:
    encoding = encoding_from_range(QuantSpec(8, float_format=form), -3.0, 2.0)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=4000) * 10.0 ** rng.integers(-9, 5, 4000)).astype(np.float32)
    module = FakeQuantize()
    module.set(encoding)
    np.testing.assert_array_equal(module(torch.tensor(x)).numpy(), encoding.fake_quantize(x))


@pytest.mark.parametrize("spec", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_and_the_grids_that_follow_them(spec: QuantSpec) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(8, 8, 3)).astype(np.float32) for _ in range(2))
    weight = torch.tensor(first)
    module = FakeQuantize((0, 1, 2), (8, 8, 3))
    encoding = encoding_of_weights(first, spec)
    module.set(encoding, weight)
    np.testing.assert_array_equal(module(weight).numpy(), encoding.fake_quantize(first))
    weight.copy_(torch.tensor(second))
    later = encoding_of_weights(second, spec)
    np.testing.assert_array_equal(module(weight).numpy(), later.fake_quantize(second))
    assert module.get().equals(later)


def test_a_chosen_grid_keeps_its_ratio() -> None:
    weight = torch.randn(4, 10)
    encoding = encoding_of_weights(weight.numpy(), QuantSpec(4, granularity=PerChannel(0)))
    chosen = encoding.with_(scale=encoding.scale * np.float32(0.7))
    module = FakeQuantize((0, 1), (4, 10))
    module.set(chosen, weight)
    module(weight)
    assert module.get().equals(chosen)
    weight.mul_(2)
    module(weight)
    np.testing.assert_allclose(module.get().scale, 2 * chosen.scale, rtol=1e-6)
    module.set(chosen.with_(frozen=True), weight)
    weight.mul_(2)
    module(weight)
    assert module.get().equals(chosen)


def test_native_layouts_are_translated() -> None:
    canonical = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for spec in (WEIGHTS["channel"], WEIGHTS["blocks"], WEIGHTS["lpbq"]):
        encoding = encoding_of_weights(canonical, spec)
        module = FakeQuantize((1, 0), (4, 6))
        weight = torch.tensor(canonical.T.copy())
        module.set(encoding, weight)
        np.testing.assert_array_equal(module(weight).numpy(), encoding.fake_quantize(canonical).T)
        assert module.get().equals(encoding)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types_are_kept_and_computed_in_float32(dtype: str) -> None:
    encoding = encoding_from_range(INTEGERS["uint8"], -1.0, 2.0)
    x = torch.randn(100).to(getattr(torch, dtype)).requires_grad_()
    module = FakeQuantize()
    module.set(encoding)
    y = module(x)
    assert y.dtype == x.dtype
    expected = torch.tensor(encoding.fake_quantize(x.detach().float().numpy())).to(x.dtype)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == x.dtype


def test_scales_stay_float32_when_the_model_is_halved() -> None:
    module = FakeQuantize()
    encoding = encoding_from_range(INTEGERS["uint8"], -1.0, 2.0)
    module.set(encoding)
    module.learn()
    module.half()
    assert module.scale.dtype == module.log_scale.dtype == torch.float32
    assert module.get().equals(encoding)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_memory_formats(layout: str) -> None:
    x = torch.randn(2, 6, 5, 7)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(2, 6, 7, 10)[..., ::2].transpose(2, 3)
    encoding = encoding_from_range(QuantSpec(4), -1.0, 1.0)
    module = FakeQuantize()
    module.set(encoding)
    np.testing.assert_array_equal(module(x).numpy(), encoding.fake_quantize(x.numpy()))
    leaf = x.clone().requires_grad_()
    weights = torch.randn(x.shape)
    (module(leaf) * weights).sum().backward()
    inside = (x / encoding.scale.item()).round().clamp(-8, 7) == (x / encoding.scale.item()).round()
    assert torch.equal(leaf.grad, torch.where(inside, weights, 0.0))


class Reference(torch.nn.Module):
    """Straight-through autograd in double, with min and max as parameters."""

    def __init__(self, low: float, high: float, bits: int) -> None:
        super().__init__()
        self.low = torch.nn.Parameter(torch.tensor(low, dtype=torch.float64))
        self.high = torch.nn.Parameter(torch.tensor(high, dtype=torch.float64))
        self.steps = 2**bits - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def straight(v: torch.Tensor) -> torch.Tensor:
            return v + (v.round() - v).detach()

        scale = (self.high - self.low) / self.steps
        zero = straight(-self.low / scale)
        return ((straight(x / scale) + zero).clamp(0, self.steps) - zero) * scale


@pytest.mark.parametrize("ends", [(-5.0, 0.0), (-5.0, 5.0), (0.0, 5.0)])
def test_range_learning_agrees_with_straight_through_autograd(ends: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, generator=generator) * 20 - 10
    g = torch.randn(2000, generator=generator)
    encoding = encoding_from_range(INTEGERS["uint8"], *ends)
    whole = float(encoding.minimum), float(encoding.maximum)  # the ends, moved to a whole zero point
    reference = Reference(*whole, 8)
    leaf = x.double().requires_grad_()
    reference(leaf).backward(g.double())

    scale = torch.tensor(encoding.scale).requires_grad_()
    zero = torch.tensor(float(encoding.zero_point)).requires_grad_()
    mine = x.clone().requires_grad_()
    round_to_grid(mine, scale, zero, encoding.grid, PerTensor()).backward(g)
    # s = (high − low)/n and z = qmin − low/s: by the chain rule, from scale and zero point to the ends.
    n, s = encoding.grid.steps, scale.item()
    slope = whole[0] / (s * s) / n
    low = -scale.grad / n - zero.grad * (1 / s + slope)
    high = scale.grad / n + zero.grad * slope
    assert (mine.grad.double() - leaf.grad).abs().max() <= 1e-6
    torch.testing.assert_close(low.double(), reference.low.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(high.double(), reference.high.grad, rtol=1e-4, atol=1e-3)


def test_gradients_accumulate_and_frozen_grids_get_none() -> None:
    encoding = encoding_from_range(INTEGERS["uint4"], -1.0, 1.0)
    module = FakeQuantize()
    module.set(encoding)
    module.learn()
    x = torch.randn(500)
    module(x).sum().backward()
    once = module.log_scale.grad.clone(), module.zero_shift.grad.clone()
    module(x).sum().backward()
    torch.testing.assert_close((module.log_scale.grad, module.zero_shift.grad), (2 * once[0], 2 * once[1]))
    assert once[0] != 0
    assert once[1] != 0
    module.set(encoding.with_(frozen=True))
    assert list(module.parameters()) == []


def test_learned_parameters_move_the_grid() -> None:
    encoding = encoding_from_range(INTEGERS["uint4"], -1.0, 1.0)
    module = FakeQuantize()
    module.set(encoding)
    module.learn(evened=True)
    assert module.get().equals(encoding)
    x = torch.randn(500)
    with torch.no_grad():
        module.log_scale.fill_(0.2)
        module.zero_shift.fill_(2.2 / 15)
    found = module.get()
    assert found.frozen
    np.testing.assert_allclose(found.scale, encoding.scale * np.exp(0.2), rtol=1e-6)
    assert found.zero_point == encoding.zero_point + 2
    np.testing.assert_array_equal(module(x).detach().numpy(), found.fake_quantize(x.numpy()))


def test_zero_points_behind_a_relu_stay() -> None:
    module = FakeQuantize()
    module.set(encoding_from_range(INTEGERS["uint4"], 0.0, 1.0))
    module.learn()
    assert module.zero_shift is None
    assert module.log_scale is not None


def test_state_round_trips_to_the_bit() -> None:
    weight = torch.randn(8, 8, 3)
    for spec in WEIGHTS.values():
        one, other = FakeQuantize((0, 1, 2), (8, 8, 3)), FakeQuantize((0, 1, 2), (8, 8, 3))
        encoding = encoding_of_weights(weight.numpy(), spec)
        one.set(two_level(encoding.with_(scale=encoding.scale * np.float32(1.5), block_scale=None)), weight)
        state = one.state_dict()
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        other.load_state_dict(state)
        assert torch.equal(one(weight), other(weight))
        assert other.get().equals(one.get())
        third = copy.deepcopy(one)
        assert torch.equal(third(weight), one(weight))


def test_a_float_state_leaves_the_site_alone() -> None:
    module = FakeQuantize()
    encoding = encoding_from_range(INTEGERS["uint4"], -1.0, 1.0)
    module.set(encoding)
    module.load_state_dict({})
    assert module.get().equals(encoding)


def test_a_learned_state_opens_in_an_untrained_site() -> None:
    one, other = FakeQuantize(), FakeQuantize()
    one.set(encoding_from_range(INTEGERS["uint4"], -1.0, 1.0))
    one.learn()
    with torch.no_grad():
        one.log_scale.fill_(0.3)
        one.zero_shift.fill_(3 / 15)
    other.set(encoding_from_range(INTEGERS["uint4"], -1.0, 1.0))
    other.load_state_dict(one.state_dict())
    assert other.get().equals(one.get())


def test_rounded_weights_are_kept_in_evaluation_only() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    module = FakeQuantize((0, 1), (4, 4)).eval()
    module.set(encoding_of_weights(weight.detach().numpy(), QuantSpec(4)), weight)
    with torch.inference_mode():
        first = module(weight)
        assert module(weight) is first
    assert not first.is_inference()
    assert module(weight).requires_grad
    with torch.no_grad():
        weight.mul_(3)
        assert not torch.equal(module(weight), first)


def test_a_new_value_where_an_old_one_lay_is_rounded_anew() -> None:
    # What is computed from a parameter is a new tensor each time, and the allocator hands out the same place again.
    place = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    sites = [FakeQuantize((0, 1), (2, 3)) for _ in range(2)]
    for site, frozen in zip(sites, (False, True), strict=True):
        site.eval().set(encoding_of_weights(place, QuantSpec(8)).with_(frozen=frozen), torch.from_numpy(place.copy()))
    with torch.no_grad():
        before = [site(torch.from_numpy(place)) for site in sites]
        place *= 0.5
        now = torch.from_numpy(place)
        assert now.data_ptr() == place.ctypes.data and now._version == 0
        after = [site(now) for site in sites]
    for old, new in zip(before, after, strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(new, now, rtol=0, atol=0.5 / 127)
    np.testing.assert_array_equal(sites[0].get().scale, encoding_of_weights(place, QuantSpec(8)).scale)


def test_autocast_leaves_the_arithmetic_alone() -> None:
    module = FakeQuantize()
    encoding = encoding_from_range(INTEGERS["uint8"], -1.0, 2.0)
    module.set(encoding)
    x = torch.randn(1000)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(module(x).numpy(), encoding.fake_quantize(x.numpy()))


@pytest.mark.parametrize("bounds", [None, (0.0, 1.5), (0.0, np.inf)])
@pytest.mark.parametrize("mode", ["composed", "compiled"])
def test_results_in_the_place_of_values_are_the_same(
    mode: str, bounds: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", mode)
    monkeypatch.setattr(rounding, "kernels", kernels := kernel_module.Kernels())
    encoding = encoding_from_range(INTEGERS["uint8"], -1.0, 2.0)
    module = FakeQuantize()
    module.set(encoding)
    halves = torch.arange(-600, 600).repeat(40) / 2 * float(encoding.scale)
    for x in (halves, torch.nextafter(halves, torch.tensor(9.0)), torch.nextafter(halves, torch.tensor(-9.0))):
        x = x.reshape(2, 20, 30, 40)
        last = x.contiguous(memory_format=torch.channels_last)
        for held, takes in ((x, True), (last, True), (x.half(), False), (x.transpose(1, 2), False)):
            expected = module(held, bounds)
            place = held.clone()
            found = module(place, bounds, spent=True)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
            assert (found.data_ptr() == place.data_ptr()) == takes
    name = "forward_over" if bounds is None else "clipped_forward_over"
    assert kernels.state().get(f"{name}/1/cpu") == (None if mode == "composed" else "compiled")


def test_kernels_that_fail_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", "compiled")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    kernels = kernel_module.Kernels()
    x, scale, low, high = torch.randn(40_000), torch.tensor(0.1), torch.tensor(-8.0), torch.tensor(7.0)
    assert torch.equal(kernels("forward", x, scale, low, high), kernel_module.composed_forward(x, scale, low, high))
    assert kernels.state() == {"forward/1/cpu": "composed"}


def test_kernels_that_aren_t_bit_equal_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", "compiled")

    def reciprocal(*_: object, **__: object) -> object:
        return lambda x, s, low, high: (x * (1 / s)).round().clamp(low, high) * s

    monkeypatch.setattr(torch, "compile", reciprocal)
    kernels = kernel_module.Kernels()
    kernels("forward", torch.randn(40_000), torch.tensor(0.1), torch.tensor(-8.0), torch.tensor(7.0))
    assert kernels.state() == {"forward/1/cpu": "composed"}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mode", ["composed", "compiled"])
@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.0, 6.0), (-1.0, 1.0)], ids=["relu", "relu6", "hardtanh"])
@pytest.mark.parametrize("ends", [(0.0, 6.0), (-0.5, 4.0)])
def test_an_activation_function_is_computed_on_the_way(
    learned: bool, mode: str, bounds: tuple[float, float], ends: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", mode)
    encoding = encoding_from_range(INTEGERS["uint8"], *ends)
    points = np.concatenate([probe(encoding), np.float32([*bounds, -0.0, np.nan, np.inf, -np.inf])])
    x = torch.tensor(np.resize(points, 40_001))
    g = torch.randn(x.shape)
    module = FakeQuantize()
    module.set(encoding)
    if learned:
        module.learn()
    found = []
    for merged in (True, False):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf, bounds) if merged else module(clipped(leaf, bounds))
        y.backward(g)
        grids = [p.grad.clone() for p in module.parameters()]
        found.append((y.detach(), leaf.grad, grids))
    assert torch.equal(torch.nan_to_num(found[0][0], 7.0), torch.nan_to_num(found[1][0], 7.0))
    assert torch.equal(found[0][1], found[1][1])
    assert bool(found[0][2]) == learned
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-4, equal_nan=True)
    with torch.no_grad():
        module.set(None)
        assert torch.equal(torch.nan_to_num(module(x, bounds), 7.0), torch.nan_to_num(clipped(x, bounds), 7.0))


AROUND_ZERO = (0.0, np.inf), (0.0, 6.0), (-1.0, 1.0), (0.5, 4.0)


@pytest.mark.parametrize("zero", [0, 3, 128, 255])
@pytest.mark.parametrize("bounds", AROUND_ZERO)
def test_an_absorbed_activation_function_changes_no_float(bounds: tuple[float, float], zero: int) -> None:
    """All halves of codes and their neighbours, where decisions fall, and a draw of all float32 patterns."""
    rng = np.random.default_rng(zero)
    patterns = rng.integers(0, 2**32, 40_000, np.uint32).view(np.float32)
    told = set()
    for scale in (*rng.uniform(1e-3, 0.1, 20), 6 / 255, 1 / 127, 1e-40, 1e30):
        encoding = encoding_from_range(INTEGERS["uint8"], 0.0, 1.0).with_(
            scale=np.float32(scale), zero_point=np.int32(zero)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            points = np.concatenate([probe(encoding), patterns, np.float32([*bounds, -0.0, np.nan, np.inf, -np.inf])])
            clips = np.clip(points, *np.float32(bounds))
            same = np.array_equal(encoding.fake_quantize(clips), encoding.fake_quantize(points), equal_nan=True)
        absorbed = absorbs(float(encoding.scale), 0.0 - zero, 255.0 - zero, *bounds)
        assert absorbed == same  # these points show whatever clips at all
        told.add(absorbed)
    if (bounds, zero) in (((0.0, 6.0), 0), ((-1.0, 1.0), 128)):
        assert told == {True, False}


@pytest.mark.parametrize("mode", ["composed", "compiled"])
@pytest.mark.parametrize("spent", [False, True])
def test_absorbed_or_not_results_are_equal_bit_by_bit(mode: str, spent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", mode)
    monkeypatch.setattr(rounding, "kernels", kernels := kernel_module.Kernels())
    bounds = 0.0, 6.0
    module = FakeQuantize()
    specials = np.float32([-0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 6.0, 3e38, -3e38])
    calls = []
    run = kernel_module.Kernels.__call__
    monkeypatch.setattr(
        kernel_module.Kernels, "__call__", lambda self, *a, **k: (calls.append(k["absorbed"]), run(self, *a, **k))[1]
    )
    for low, high in ((0.0, 6.0), (0.0, 4.3), (0.0, 9.0), (-1.0, 6.0)):
        module.set(encoding := encoding_from_range(INTEGERS["uint8"], low, high))
        x = torch.tensor(np.resize(np.concatenate([probe(encoding), specials]), 40_003))
        with torch.no_grad():
            found = module(x.clone(), bounds, spent)
            expected = module(clipped(x, bounds))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))
        assert not torch.signbit(found[found == 0]).any() or mode == "composed"
        # The grid in force decides, at each call.
        assert calls[-2] == (low == 0 and high <= 6)
    name = "forward_over" if spent else "forward"
    left = {f"{name}/1/cpu", f"clipped_{name}/1/cpu"}
    assert left <= kernels.state().keys() if mode == "compiled" else not kernels.state()


def test_a_grid_written_in_place_decides_anew_whether_it_absorbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be told when numbers change: not even writes that leave a tensor's version."""
    monkeypatch.setenv("BITWRIGHT_TORCH_KERNELS", "compiled")
    module = FakeQuantize()
    module.set(encoding_from_range(INTEGERS["uint8"], 0.0, 6.0))
    x = torch.linspace(-2, 9, 40_001)
    with torch.inference_mode():
        assert float(module(x, (0.0, 6.0)).max()) == pytest.approx(6.0)
        module.scale.data.mul_(1.5)
        assert float(module(x).max()) == pytest.approx(9.0)
        assert float(module(x, (0.0, 6.0)).max()) == pytest.approx(6.0, abs=0.02)
        module.zero_point.data.fill_(100)
        assert float(module(x).min()) == pytest.approx(-2.0, abs=0.02)
        assert float(module(x, (0.0, 6.0)).min()) == 0.0


def test_gradients_keep_to_an_absorbed_function() -> None:
    """Below zero the grid alone would pass a gradient down to half a step."""
    module = FakeQuantize()
    module.set(encoding_from_range(INTEGERS["uint8"], 0.0, 2.55))
    x = torch.tensor([-0.004, 0.0, 0.004, 2.5, 2.553, 3.0], requires_grad=True)
    module(x, (0.0, 6.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_grids_under_transforms_are_not_read() -> None:
    """`vmap` over stacked buffers has numbers for each member: none can be read as a Python number."""
    module = FakeQuantize()
    scales = torch.tensor([0.01, 0.02])
    module.set(encoding_from_range(INTEGERS["uint8"], 0.0, 2.55))
    x = torch.linspace(-1, 6, 50).repeat(2, 1)

    def run(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"scale": scale}, (x, (0.0, 6.0)))

    found = torch.func.vmap(run)(scales, x)
    for scale, given, row in zip(scales, x, found, strict=True):
        assert torch.equal(run(scale, given), row)


@pytest.mark.parametrize("steps", [3, 255, 65_535, 2**24 - 1])
def test_codes_clipped_by_relus_are_codes_clipped(steps: int) -> None:
    rng = np.random.default_rng(steps)
    for zero in (0, steps // 3, steps):
        low, high = torch.tensor(0.0 - zero), torch.tensor(float(steps - zero))
        ends = np.float32([low, high])
        codes = np.concatenate([ends, ends - 1, ends + 1, rng.integers(-steps, steps, 500), [np.nan, 1e30, -1e30]])
        x = torch.tensor(np.concatenate([codes, [np.inf, -np.inf, -0.0, 2.0**24, -(2.0**24), 2.0**25]]).astype("f4"))
        found = kernel_module._forward(x, torch.tensor(1.0), low, high)
        expected = kernel_module.composed_forward(x, torch.tensor(1.0), low, high)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("first", ["fake", "real"])
@pytest.mark.parametrize("bounds", [(0.0, 5.5), (-0.75, np.inf)])
def test_what_is_kept_between_runs_is_not_shared_with_fake_tensors(first: str, bounds: tuple[float, float]) -> None:
    """Tensors without values, of one who counts memory, don't get into other runs, nor real ones there."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    encoding = encoding_from_range(INTEGERS["uint8"], 0.0, 6.0)
    alone = bounds[0] + len(first) / 64 + (first == "real") / 8, bounds[1]  # bounds that no other test has

    def run() -> torch.Tensor:
        x, scale, zero = torch.ones(41_000), torch.tensor(0.1), torch.tensor(0)
        return round_to_grid(x, scale, zero, encoding.grid, PerTensor(), bounds=alone)

    if first == "real":
        run()
    with FakeTensorMode():
        assert type(run()) is FakeTensor
    assert type(run()) is torch.Tensor
    with FakeTensorMode():
        assert type(run()) is FakeTensor


@pytest.mark.parametrize("name", ["int32", "float16", "float8e4m3fn", "per channel"])
def test_other_grids_take_an_activation_function_too(name: str) -> None:
    spec = INTEGERS.get(name) or QuantSpec(8, float_format=None if name == "per channel" else name)
    encoding = encoding_from_range(spec, -1.0, 6.0)
    if name == "per channel":
        scales = np.float32([0.02, 0.03])
        encoding = encoding.with_(scale=scales, zero_point=np.zeros(2, np.int32), granularity=PerChannel(1))
    module = FakeQuantize()
    module.set(encoding)
    x = torch.linspace(-3, 9, 4000).reshape(1000, 2, 2)
    np.testing.assert_array_equal(module(x, (0.0, 6.0)).numpy(), encoding.fake_quantize(x.clamp(0, 6).numpy()))


def test_limits_of_what_passes_are_the_grid_s() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scale = np.float32(10.0 ** rng.uniform(-30, 30))
        low = int(rng.integers(-300, 1))
        high = low + int(rng.choice([1, 3, 15, 255, 65535]))
        found = passing(float(scale), float(low), float(high))
        assert found is not None
        below, above = (np.float32(v) for v in found)
        up, down = np.float32(np.inf), np.float32(-np.inf)
        x = np.array([below, np.nextafter(below, up), np.nextafter(above, down), above], np.float32)
        q = np.rint(x / scale)
        assert list((low <= q) & (q <= high)) == [False, True, True, False], (scale, low, high)
    assert passing(float("nan"), -8.0, 7.0) is None
    assert passing(0.1, 0.0, 2.0**24) is None
