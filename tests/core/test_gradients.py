"""Forward and vjp of fake quantization: the published vectors, the reference grid, and finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.grids import (
    Blockwise,
    Grid,
    Groups,
    PerChannel,
    PerTensor,
    QuantSpec,
    cast_float,
    cast_vjp,
    encoding_from_range,
    fake_quantize,
    fake_quantize_vjp,
    lsq_factor,
    spread,
)
from bitwright.grids._gradients import NumpyNamespace

NP = NumpyNamespace()
LAYOUTS = {
    "tensor": PerTensor(),
    "channel": PerChannel(0),
    "last channel": PerChannel(-1),
    "blocks": Blockwise(0, 1, 2),
    "blocks before channels": Blockwise(1, 0, 3),
    "blocks, distant axes": Blockwise(2, 0, 2),
}
SHAPE = (6, 4, 5)


def scales(layout: object, shape: tuple[int, ...] = SHAPE) -> tuple[Groups, np.ndarray, np.ndarray]:
    groups = Groups.of(shape, layout)
    rng = np.random.default_rng(1)
    return groups, rng.uniform(0.1, 0.4, groups.scale), rng.integers(2, 12, groups.scale).astype(np.float64)


def test_asymmetric_vector() -> None:
    grid, x = Grid(0, 3), np.array([-3, -0.9, 0.4, 1.7, 5])
    groups = Groups.of(x.shape, PerTensor())
    one, zero = np.array(1.0), np.array(1.0)
    np.testing.assert_array_equal(fake_quantize(NP, x, one, zero, grid, groups), [-1, -1, 0, 2, 2])
    dx, ds, dz = fake_quantize_vjp(NP, np.ones(5), x, one, zero, grid, groups)
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 0])
    np.testing.assert_allclose([ds, dz], [0.8, -2.0], rtol=1e-12)


def test_symmetric_vector() -> None:
    grid, x = Grid(-8, 7), np.array([-9, -0.9, 0.4, 1.7, 9])
    groups = Groups.of(x.shape, PerTensor())
    one, zero = np.array(1.0), np.array(0.0)
    np.testing.assert_array_equal(fake_quantize(NP, x, one, zero, grid, groups), [-8, -1, 0, 2, 7])
    dx, ds, dz = fake_quantize_vjp(NP, np.ones(5), x, one, zero, grid, groups)
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 0])
    np.testing.assert_allclose([ds, dz], [-1.2, -2.0], rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forward_is_the_reference_grid(layout: object) -> None:
    rng = np.random.default_rng(0)
    spec = QuantSpec(4, signed=False, symmetric=False, granularity=layout)
    groups = Groups.of(SHAPE, layout)
    encoding = encoding_from_range(spec, rng.uniform(-1, -0.5, groups.scale), rng.uniform(0.5, 2, groups.scale))
    scale, zero = encoding.spread(SHAPE)
    halves = rng.integers(-4, 40, SHAPE) / 2 - zero
    x = (halves * scale).astype(np.float32)  # codes, midpoints, and beyond the ends
    found = fake_quantize(NP, x, encoding.scale, encoding.zero_point.astype(np.float32), encoding.grid, groups)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, encoding.fake_quantize(x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_broadcast_and_reduce_are_transposes(layout: object) -> None:
    groups, scale, _ = scales(layout)
    full = spread(scale, SHAPE, layout)
    np.testing.assert_array_equal(
        groups.joined(NP, groups.broadcast(NP, scale) + np.zeros(groups.split)), full + np.zeros(SHAPE)
    )
    y = np.random.default_rng(0).normal(size=SHAPE)
    dotted = np.vdot(groups.broadcast(NP, scale) + np.zeros(groups.split), groups.cut(NP, y))
    np.testing.assert_allclose(np.vdot(scale, groups.reduce(NP, groups.cut(NP, y))), dotted)
    assert groups.reduce(NP, groups.cut(NP, y)).shape == scale.shape
    assert groups.elements * scale.size == y.size


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_scale_and_zero_gradients_are_finite_differences(layout: object) -> None:
    """With rounding passed through, y is x + (rounding error held) inside, and code · s outside."""
    grid = Grid(0, 15)
    groups, scale, zero = scales(layout)
    rng = np.random.default_rng(2)
    x, g = rng.normal(0, 2, SHAPE), rng.normal(size=SHAPE)
    s0, z0 = (groups.broadcast(NP, v) for v in (scale, zero))
    xs, gs = groups.cut(NP, x), groups.cut(NP, g)
    held = np.rint(xs / s0) - xs / s0  # straight through: a constant

    def loss(s: np.ndarray, z: np.ndarray) -> float:
        s, z = groups.broadcast(NP, s), groups.broadcast(NP, z)
        inside = (np.rint(xs / s0) + z0 >= grid.qmin) & (np.rint(xs / s0) + z0 <= grid.qmax)
        ends = np.where(np.rint(xs / s0) + z0 < grid.qmin, grid.qmin - z, grid.qmax - z)
        return float(np.sum(gs * np.where(inside, xs / s + held, ends) * s))

    dx, ds, dz = fake_quantize_vjp(NP, g, x, scale, zero, grid, groups)
    h = 1e-6
    for index in np.ndindex(scale.shape):
        step = np.zeros(scale.shape)
        step[index] = h
        by_scale = (loss(scale + step, zero) - loss(scale - step, zero)) / (2 * h)
        by_zero = (loss(scale, zero + step) - loss(scale, zero - step)) / (2 * h)
        np.testing.assert_allclose(ds[index], by_scale, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dz[index], by_zero, rtol=1e-5, atol=1e-6)
    q = np.rint(xs / s0) + z0
    inside = groups.joined(NP, (q >= grid.qmin) & (q <= grid.qmax))
    np.testing.assert_array_equal(dx, np.where(inside, g, 0))
    assert 0 < inside.sum() < inside.size


def test_gradients_are_wanted_or_not() -> None:
    groups, scale, zero = scales(PerChannel(0))
    x = np.random.default_rng(0).normal(size=SHAPE)
    alone = fake_quantize_vjp(NP, x, x, scale, zero, Grid(0, 15), groups, learned=False)
    assert alone.scale is None
    assert alone.zero_point is None
    np.testing.assert_array_equal(alone.x, fake_quantize_vjp(NP, x, x, scale, zero, Grid(0, 15), groups).x)


def test_float_formats_saturate() -> None:
    # 224 = 448 · 0.5 is the largest value: it is inside.
    x, g = np.array([-1000.0, -3.0, 0.3, 500.0, 224, -224], np.float32), np.ones(6, np.float32)
    scale = np.array(0.5, np.float32)
    y = cast_float(x, "float8e4m3fn", scale)
    groups = Groups.of(x.shape, PerTensor())
    dx, ds, dz = cast_vjp(NP, g, x, y, scale, 448.0, groups)
    np.testing.assert_array_equal(dx, [0, 1, 1, 0, 1, 1])
    inside = [float(y[i] - x[i]) / 0.5 for i in (1, 2)]
    np.testing.assert_allclose(ds, -448 + 448 + sum(inside), atol=1e-4)
    assert dz is None


def test_lsq_factor() -> None:
    assert lsq_factor(100, Grid(-8, 7)) == pytest.approx(1 / np.sqrt(700))
    assert lsq_factor(100, Grid(0, 15)) == pytest.approx(1 / np.sqrt(1500))
