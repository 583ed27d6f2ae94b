"""Layer moments: the loss that they give is the loss on the outputs, for every geometry and any split of the data."""

import numpy as np
import pytest
from direct_convolution import CASES, conv_op, direct, tensors

from bitwright.errors import InputError
from bitwright.graph import ConvAttrs, Op, OpKind, columns, output_spatial, to_matrix
from bitwright.statistics import LayerMoments
from bitwright.statistics._displacement import Centred, centred_products


def moments_of(op, features, *batches, **options):
    m = LayerMoments(op, features, **options)
    for batch in batches:
        m.update(*batch)
    return m


def trace(a, m, b):
    return float(np.einsum("goi,gij,goj->", a, m, b))


@pytest.mark.parametrize("name", CASES)
def test_loss_identity(name):
    op, x, w = tensors(name)
    rng = np.random.default_rng(3)
    # Few mantissa bits, so that the float32 products of the moments are exact and only float64 rounding is left.
    x, w = np.round(x * 16) / 16, np.round(w * 16) / 16
    xq = (x + np.round(rng.normal(size=x.shape)) / 16).astype(np.float32)
    wq = (w + np.round(rng.normal(size=w.shape)) / 16).astype(np.float32)
    a, b = to_matrix(op, w).astype(np.float64), to_matrix(op, wq).astype(np.float64)
    m = moments_of(op, a.shape[2], (x, xq))
    y, yq = direct(op, x, w), direct(op, xq, wq)
    positions = y.size // y.shape[1]
    assert m.count == positions
    loss = trace(b, m.qq, b) - 2 * trace(b, np.swapaxes(m.xq, 1, 2), a) + trace(a, m.xx, a)
    expected = np.square(yq - y).sum() / positions
    assert loss == pytest.approx(expected, rel=1e-10)
    gradient = 2 * (b @ m.qq - a @ m.xq)
    step = rng.normal(size=b.shape)
    moved = lambda t: trace(b + t * step, m.qq, b + t * step) - 2 * trace(b + t * step, np.swapaxes(m.xq, 1, 2), a)
    assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(float((gradient * step).sum()), rel=1e-7)
    # The bias that takes the mean error away leaves the centred loss.
    h, hq, c = m.centred()
    centred = trace(b, hq, b) - 2 * trace(b, np.swapaxes(c, 1, 2), a) + trace(a, h, a)
    error = np.moveaxis(yq - y, 1, 0).reshape(y.shape[1], -1)
    assert centred == pytest.approx(np.square(error - error.mean(axis=1, keepdims=True)).sum() / positions, rel=1e-8)
    assert (b @ m.mean_quantized[..., None] - a @ m.mean[..., None]).ravel() == pytest.approx(
        error.mean(axis=1), abs=1e-12
    )


@pytest.mark.parametrize("name", ["strided_padded", "depthwise", "transposed"])
def test_merges_and_splits_in_any_order(name):
    op, x, w = tensors(name)
    x = np.concatenate([x, x + 1, 2 * x])
    features = to_matrix(op, w).shape[2]
    whole = moments_of(op, features, (x,), paired=False)
    parts = [moments_of(op, features, (p,), paired=False) for p in np.array_split(x, 3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = moments_of(op, features, paired=False)
        for i in order:
            merged.merge(parts[i])
        assert merged.count == whole.count
        assert merged.xx == pytest.approx(whole.xx, rel=1e-5, abs=1e-6)
        assert merged.mean == pytest.approx(whole.mean, rel=1e-6, abs=1e-7)


def test_unpaired_is_paired_with_itself_and_holds_one_matrix():
    op, x, w = tensors("grouped")
    features = to_matrix(op, w).shape[2]
    one, two = moments_of(op, features, (x,), paired=False), moments_of(op, features, (x, x))
    for name in ("xx", "qq", "xq", "mean", "mean_quantized"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-5, abs=1e-6)
    held = sum(a.nbytes for k, a in one.state().items() if k != "count")
    assert held == LayerMoments.bytes_for(op, features, paired=False)
    held = sum(a.nbytes for k, a in two.state().items() if k != "count")
    assert held == LayerMoments.bytes_for(op, features)


def test_channels_last_gives_the_same_moments():
    op, x, w = tensors("depthwise")
    features = to_matrix(op, w).shape[2]
    last = moments_of(op, features, (np.moveaxis(x, 1, -1),), channel_axis=3, paired=False)
    assert np.array_equal(last.xx, moments_of(op, features, (x,), paired=False).xx)


def test_state_round_trip():
    op, x, w = tensors("plain")
    features = to_matrix(op, w).shape[2]
    m = moments_of(op, features, (x, x + 1))
    back = LayerMoments(op, features)
    back.restore(m.state())
    assert np.array_equal(back.xq, m.xq)
    back.update(x, x)
    assert back.count == 2 * m.count


def test_bad_batches_change_nothing():
    op, x, w = tensors("plain")
    m = moments_of(op, to_matrix(op, w).shape[2], (x, x))
    before = m.xx.copy()
    for batch, message in [((x,), "expected 2"), ((x, x[:1]), "float input"), ((x, x * np.nan), "'layer'.*NaN")]:
        with pytest.raises(InputError, match=message):
            m.update(*batch)
    assert np.array_equal(m.xx, before)
    with pytest.raises(InputError, match="no calibration data"):
        _ = LayerMoments(op, 36).xx


def test_linear_rows():
    op = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",))
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    m = moments_of(op, 5, (x,), paired=False)
    rows = x.reshape(-1, 5).astype(np.float64)
    assert m.count == 12
    assert m.xx[0] == pytest.approx(rows.T @ rows / 12, rel=1e-5)


def test_an_empty_batch_adds_nothing():
    attrs = ConvAttrs((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    m = moments_of(conv_op(OpKind.CONV, attrs), 2, (np.ones((1, 2, 3, 3)),), (np.ones((0, 2, 3, 3)),), paired=False)
    assert m.count == 9


def steady(rows=400, features=300, mean=1e4):
    """Features that vary by 1 around large means, and one that never changes."""
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((rows, features)) + mean * np.linspace(0.5, 1, features)).astype(np.float32)
    x[:, 7] = 123.4
    return x


def test_the_variance_of_features_that_barely_vary_is_that_of_float64():
    op, x = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",)), steady()
    q = np.round(x)
    m = moments_of(op, 300, (x[:100], q[:100]), (x[100:], q[100:]))
    a, b = x.astype(np.float64), q.astype(np.float64)
    ca, cb = a - a.mean(0), b - b.mean(0)
    for found, expected in zip(m.centred(), (ca.T @ ca, cb.T @ cb, ca.T @ cb), strict=True):
        assert np.allclose(found[0], expected / 400, rtol=1e-4, atol=2e-5)
        assert np.abs(found[0, 7]).max() < 1e-6
    assert np.allclose(m.xx[0], a.T @ a / 400, rtol=1e-9)
    assert np.allclose(m.xq[0], a.T @ b / 400, rtol=1e-9)
    assert np.allclose(m.mean_quantized[0], b.mean(0), rtol=1e-9)


def test_parts_about_different_means_merge():
    op, x = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",)), steady()
    r = (x[:, :2] - x[:, :2].mean(0)).astype(np.float32)
    whole, first, second = (LayerMoments(op, 300, residual_outputs=2) for _ in range(3))
    whole.update(x, x + 1, r)
    first.update(x[:150] + 5, x[:150] + 6, r[:150])
    second.update(x[150:] + 5, x[150:] + 6, r[150:])
    merged = LayerMoments(op, 300, residual_outputs=2)
    for part in (first, second):
        merged.merge(part)
    for found, expected in zip(merged.centred(), whole.centred(), strict=True):
        assert np.allclose(found, expected, rtol=0, atol=2e-3)
    assert np.allclose(merged.mean, whole.mean + 5, rtol=1e-7)
    rx, rq, square = merged.centred_residual()
    for found, expected in zip((rx, rq, square), whole.centred_residual(), strict=True):
        assert np.allclose(found, expected, rtol=0, atol=2e-3)
    assert rx[0, 0] == pytest.approx(1.0, abs=0.2)
    assert np.allclose(merged.residual[0], rx + np.outer(merged.residual[2], merged.mean[0]), atol=1e-4)


def test_residual_sums_of_parts_move_with_their_own_inputs():
    op, x = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",)), steady()
    r = (x[:, :2] - x[:, :2].min(0)).astype(np.float32)
    y = 2 * x + 3
    merged = LayerMoments(op, 300, residual_outputs=2)
    for part, far in ((slice(150), 0), (slice(150, None), 8)):
        one = LayerMoments(op, 300, residual_outputs=2)
        one.update(x[part] + far, y[part] - far, r[part])
        merged.merge(one)
    far = np.where(np.arange(len(x)) < 150, 0, 8)[:, None]
    for found, inputs in zip(merged.residual, (x + far, y - far), strict=False):
        expected = r.astype(np.float64).T @ inputs.astype(np.float64) / len(x)
        assert np.allclose(found, expected, rtol=1e-5)


def test_inputs_that_vary_are_summed_as_they_are():
    op, x, w = tensors("plain")
    m = moments_of(op, to_matrix(op, w).shape[2], (x, x))
    assert not m.state()["shift_x"].any()


def test_features_steady_below_zero_are_summed_about_their_means_too():
    op, x = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",)), -steady()
    m = moments_of(op, 300, (x, x))
    assert (m.state()["shift_x"][0, :7] < 0).all()
    a = x.astype(np.float64) - x.astype(np.float64).mean(0)
    assert np.allclose(m.centred()[0][0], a.T @ a / 400, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("axis", [None, 1])
def test_the_errors_of_a_residual_operand_in_every_layout(axis):
    """Of a 1 × 1 convolution: each position is a row, whichever axis holds the channels, and errors have a mean."""
    rng = np.random.default_rng(5)
    x, r = rng.normal(size=(3, 4, 5, 6)).astype(np.float32), rng.normal(2, 1, (3, 2, 5, 6)).astype(np.float32)
    attrs = ConvAttrs((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 1)
    op = Op("c", OpKind.CONV, "Conv", ("x",), ("y",), {}, attrs)
    m = moments_of(op, 4, (x, x, r), channel_axis=axis, residual_outputs=2)
    rows, errors = (np.moveaxis(t, 1, -1).reshape(-1, t.shape[1]).astype(np.float64) for t in (x, r))
    rx, rq, mean, square = m.residual
    assert np.allclose(rx, errors.T @ rows / 90, atol=1e-6) and np.allclose(rq, rx, atol=1e-6)
    assert np.allclose(mean, errors.mean(0), atol=1e-6) and np.allclose(square, np.square(errors).mean(0), atol=1e-5)
    free = errors - errors.mean(0)
    cx, _, variance = m.centred_residual()
    assert np.allclose(cx, free.T @ (rows - rows.mean(0)) / 90, atol=1e-6)
    assert np.allclose(variance, np.square(free).mean(0), atol=1e-5)


def geometries(count):
    """Convolutions with one and two axes, any strides, dilations and paddings, few channels a group."""
    rng, found = np.random.default_rng(6), 0
    while found < count:
        rank, groups = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        kernel, strides, dilations, spatial = (
            tuple(map(int, rng.integers(low, high, rank))) for low, high in ((1, 6), (1, 4), (1, 3), (1, 12))
        )
        pads = tuple((int(a), int(b)) for a, b in rng.integers(0, 4, (rank, 2)))
        attrs = ConvAttrs(kernel, strides, dilations, pads, groups)
        if min(output_spatial(spatial, attrs)) > 0:
            found += 1
            yield attrs, (int(rng.integers(1, 4)), groups * int(rng.integers(1, 3)), *spatial)


@pytest.mark.parametrize("parts", [False, True])
def test_products_by_displacement_are_those_of_columns(parts, monkeypatch):
    """Of one input and of two, about zero and about a number for each channel: small integers, so to the bit."""
    if parts:  # of samples, groups and rows
        monkeypatch.setattr("bitwright.statistics._displacement.BLOCK", 40)
        monkeypatch.setattr("bitwright.statistics._displacement.DOT", 20)
    rng = np.random.default_rng(7)
    large = ConvAttrs((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 2), (2, 2, 70, 5)
    for attrs, shape in [*geometries(60), large]:
        op, centred = conv_op(OpKind.CONV, attrs), []
        for part in (0, 1):
            x = rng.integers(-4, 5, shape).astype(np.float32)
            centre = part * rng.integers(-3, 4, shape[1]) * rng.integers(0, 2, shape[1]).astype(np.float64)
            centred += [Centred(x, x.sum(axis=0, dtype=np.float64), c) for c in (np.zeros(shape[1]), centre)]
        for a, b in ((0, 0), (0, 2), (3, 3), (1, 3), (3, 0)):
            one, other = (
                np.concatenate(list(columns(op, centred[i].values)), axis=2)
                - centred[i].centre.reshape(attrs.groups, -1).repeat(np.prod(attrs.kernel), 1)[..., None]
                for i in (a, b)
            )
            expected = one.astype(np.float64) @ np.swapaxes(other, 1, 2)
            assert np.array_equal(centred_products(attrs, centred[a], centred[b]), expected), (attrs, shape, a, b)
        x = rng.normal(size=shape).astype(np.float32)
        rough = Centred(x, x.sum(axis=0, dtype=np.float64), np.zeros(shape[1]))
        found = centred_products(attrs, rough, rough)
        assert np.array_equal(found, np.swapaxes(found, 1, 2)), "what is rounded isn't symmetric"


@pytest.mark.parametrize("axis", [1, 3])
def test_channels_of_a_depthwise_layer_that_barely_vary(axis):
    """Their variance is that of float64 beside padding too, in every layout; the others are summed about zero."""
    rng = np.random.default_rng(8)
    attrs = ConvAttrs((3, 3), (2, 1), (1, 1), ((1, 1), (0, 1)), 3)
    x = rng.normal(size=(40, 3, 7, 6)).astype(np.float32)
    x[:, 1] = 1e4 + x[:, 1]
    op = conv_op(OpKind.CONV, attrs)
    m = LayerMoments(op, 9, axis, paired=False)
    for part in np.array_split(np.moveaxis(x, 1, axis), 3):
        m.update(part)
    assert m.state()["shift_x"].any(axis=1).tolist() == [False, True, False]
    full = np.concatenate(list(columns(op, x)), axis=2).astype(np.float64)
    assert m.count == full.shape[2]
    assert np.allclose(m.mean, full.mean(axis=2), rtol=1e-9, atol=1e-12)
    rest = full - full.mean(axis=2, keepdims=True)
    inside = (full[1] != 0).all(axis=1)  # taps that padding never meets
    assert inside.any() and not inside.all()
    expected = rest @ np.swapaxes(rest, 1, 2) / m.count
    assert np.allclose(m.centred()[0][[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)
    assert np.allclose(m.centred()[0][1][inside][:, inside], expected[1][inside][:, inside], rtol=1e-4, atol=1e-4)
    assert np.allclose(m.centred()[0][1], expected[1], rtol=1e-6, atol=5)  # beside variances of 2e7
    assert np.allclose(m.xx, full @ np.swapaxes(full, 1, 2) / m.count, rtol=1e-6, atol=5)


@pytest.mark.parametrize("paired", [False, True])
def test_settled_moments_are_the_same_in_half_the_memory(paired):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 12)) * np.linspace(0.1, 9, 12) + 20 * (rng.random(12) > 0.5)
    moments = LayerMoments(Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",)), 12, paired=paired)
    moments.update(*[x.astype(np.float32)] * (1 + paired))

    def given():
        return [moments.second(name, centred=centred) for name in ("xx", "qq", "xq") for centred in (False, True)]

    def held():
        return sum(v.nbytes for v in moments.state().values() if v.ndim == 3)

    before, size = given(), held()
    moments.settle()
    assert all(map(np.array_equal, before, given()))
    assert held() == (size if paired else size // 2)
