"""Calibration schemes: percentiles and entropy by definition, searches never worse than AIMET's, outliers survived."""

import numpy as np
import pytest

from bitwright.calibration import Scheme, _search, fits_accumulator, scheme
from bitwright.calibration._density import Density
from bitwright.calibration._schemes import calibrate_array, schemes
from bitwright.errors import EncodingError, InputError
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.grids._scheme_names import SCHEMES
from bitwright.statistics import HistogramStatistic, RangeStatistic

ASYMMETRIC, SYMMETRIC = {"signed": False, "symmetric": False}, {"signed": True, "symmetric": True}


def calibrate(name, spec, *values):
    """An encoding by the way activations take: statistic, batches, encoding."""
    chosen = scheme(name)
    statistic = chosen.statistic(spec)()
    for v in values:
        if isinstance(statistic, RangeStatistic):
            statistic.observe(np.asarray(v, np.float32))
        else:
            statistic.update(np.asarray(v, np.float32))
    return chosen.encoding(statistic, spec)


def noise(x, encoding):
    return float(np.square(encoding.fake_quantize(x).astype(np.float64) - x).mean())


def samples(name, n=10_000):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=n)
    x = {
        "normal": lambda: normal,
        "laplace": lambda: rng.laplace(size=n),
        "relu": lambda: np.maximum(normal, 0),
        "relu6": lambda: np.clip(4 * normal, 0, 6),
        "uniform": lambda: rng.uniform(-1, 3, n),
        "mixture": lambda: np.where(rng.random(n) < 0.1, rng.normal(3, 5, n), rng.normal(0, 0.3, n)),
        "one outlier": lambda: np.where(np.arange(n) == 7, 1000, normal),
    }[name]()
    return x.astype(np.float32)


def aimet_sqnr(x, bits, symmetric):
    """The search of AIMET 2.42 (`Sqnr`) on the values themselves: the noise of the grid that it picks."""
    n, gamma = 2**bits - 1, 3.0
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    candidates = []
    if symmetric:
        largest = 2 * max(-lo, hi) / n
        candidates = [(largest * k / 100, -(n + 1) // 2) for k in range(1, 102)]
    else:
        largest = (hi - lo) / n
        offsets = [-n + round(n / 20 * i) for i in range(21)] + [round(lo / largest)]
        for k in range(1, 18):
            for offset in offsets:
                delta = largest * k / 16
                low, high = max(delta * offset, lo), min(delta * (offset + n), hi)
                if high - low > 0:
                    delta = (high - low) / n
                    candidates.append((delta, round(low / delta)))
    best, picked = np.inf, 0.0
    for delta, offset in candidates:
        code = np.rint(x / delta) - offset
        error = np.square((np.clip(code, 0, n) + offset) * delta - x)
        cost = np.where((code < 0) | (code > n), gamma * error, error).mean()
        if cost < best:
            best, picked = cost, error
    return float(picked.mean()), picked


# -- names


def test_names_aliases_and_settings():
    assert set(schemes()) == set(SCHEMES) == {"minmax", "percentile", "sqnr", "mse", "entropy", "scores"}
    assert scheme("tf_enhanced").name == scheme("TF-Enhanced").name == "sqnr"
    assert scheme("percentile:99.9").percentile == 99.9
    assert scheme(scheme("mse")).name == "mse"
    for wrong, message in [
        ("best", "unknown calibration scheme 'best'; known: minmax"),
        ("sqnr:3", "takes no setting"),
        ("percentile:-1", "between 50 and 100"),
        ("percentile:49", "between 50 and 100"),
        ("percentile:101", "between 50 and 100"),
        ("percentile:high", "write a number"),
        ("minmax:0.9", "between 1 and 16"),
        ("minmax:wide", "write a number"),
    ]:
        with pytest.raises(InputError, match=message):
            scheme(wrong)
    with pytest.raises(ValueError, match="between 50 and 100"):
        scheme("percentile:101")


def test_min_max_is_reduced_in_the_graph_and_others_are_not():
    spec = QuantSpec(8, **ASYMMETRIC)
    assert isinstance(scheme("minmax").statistic(spec)(), RangeStatistic)
    assert scheme("minmax").statistic(spec)().reduction == "minmax"
    for name in ("percentile", "sqnr", "mse", "entropy", "scores"):
        assert isinstance(scheme(name).statistic(spec)(), HistogramStatistic)
        for free in (spec.with_(bits=16, float_format="float16"), spec.with_(minimum=0.0, maximum=1.0)):
            assert isinstance(scheme(name).statistic(free)(), RangeStatistic)
    per_channel = scheme("sqnr").statistic(spec.with_(granularity=PerChannel(1)))()
    assert per_channel.axis == 1
    with pytest.raises(InputError, match="not in blocks"):
        scheme("sqnr").statistic(spec.with_(granularity=Blockwise()))


# -- min-max and percentile


def test_min_max():
    x = np.array([-1, -0.5, 0, 0.3, 2], np.float32)
    for e in (
        calibrate("minmax", QuantSpec(8, **ASYMMETRIC), x[:2], x[2:]),
        calibrate_array(x, QuantSpec(8, **ASYMMETRIC)),
    ):
        assert (float(e.scale), int(e.zero_point), e.source) == (pytest.approx(0.0117647061, rel=1e-6), 85, "minmax")


def test_min_max_with_room_is_a_multiple_of_the_range():
    x = np.array([-1, -0.5, 0, 0.3, 2], np.float32)
    spec = QuantSpec(16, **ASYMMETRIC)
    once, twice = (calibrate(name, spec, x) for name in ("minmax:1", "minmax:2"))
    assert once.scale == calibrate("minmax", spec, x).scale
    assert (twice.scale, twice.zero_point) == (pytest.approx(2 * once.scale), once.zero_point)
    assert calibrate_array(x, spec, "minmax:2").scale == twice.scale
    pinned = calibrate("minmax:2", spec.with_(minimum=0.0, maximum=1.0), x)
    assert (pinned.minimum, pinned.maximum) == (0, pytest.approx(1))


@pytest.mark.parametrize(("p", "high"), [(100, 1000), (99, 990), (50, 500)])
@pytest.mark.parametrize("way", ["histogram", "values"])
def test_percentile_vectors(p, high, way):
    x = np.arange(1001, dtype=np.float32)
    strict = QuantSpec(8, strict=True)
    run = (
        (lambda s: calibrate(f"percentile:{p}", s, x))
        if way == "histogram"
        else (lambda s: calibrate_array(x, s, f"percentile:{p}"))
    )
    e = run(QuantSpec(8, **ASYMMETRIC))
    assert (e.minimum, e.maximum) == (0, pytest.approx(high, rel=1e-6))
    e = run(strict)
    assert (e.minimum, e.maximum) == (pytest.approx(-high, rel=1e-6), pytest.approx(high, rel=1e-6))


def test_percentile_with_five_hundred_bins():
    h = HistogramStatistic(precision=8)  # bins of width 2 from 512 on: AIMET's 500 over this range
    h.update(np.arange(1001, dtype=np.float32))
    for p, high in [(100, 1000), (99.9, 998), (99, 990), (50, 500)]:
        e = scheme(f"percentile:{p}").encoding(h, QuantSpec(8, **ASYMMETRIC))
        assert e.maximum == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("way", ["histogram", "values"])
def test_percentile_cuts_each_side_by_its_own_values(way):
    """10 of 1,000 values may lie above, and 10 below: neither end is the extreme, nor the other's mirror image."""
    spec = QuantSpec(8, **ASYMMETRIC)
    # How often positive values occur decides where the lower end lies: 1,000 values, and 1,700, of which 17 may.
    for times, low, high in ((1, -290, 690), (2, -283, 692)):
        x = np.concatenate([-np.arange(1.0, 301), *[np.arange(1.0, 701)] * times])
        x = np.random.default_rng(0).permutation(x)
        found = calibrate("percentile:99", spec, x) if way == "histogram" else calibrate_array(x, spec, "percentile:99")
        step = float(found.scale)
        assert step == pytest.approx((high - low) / 255, rel=1e-3)
        assert float(found.maximum) == pytest.approx(high, abs=step)
        assert float(found.minimum) == pytest.approx(low, abs=step)
    # Of values on one side of zero alone the grid still reaches to zero, and the near side is cut there.
    for sign in (1, -1):
        one = calibrate_array(sign * np.arange(1.0, 1001), spec, "percentile:99")
        assert sorted(map(abs, (float(one.minimum), float(one.maximum)))) == [0, pytest.approx(990, rel=1e-4)]


def test_percentile_drops_outliers():
    x = np.arange(101, dtype=np.float32)
    x[-2:] = 800, 1000
    for e in (
        calibrate("percentile:90", QuantSpec(8, **ASYMMETRIC), x),
        calibrate_array(x, QuantSpec(8, **ASYMMETRIC), "percentile:90"),
    ):
        assert 89 < e.maximum < 91


def test_percentile_of_what_is_often_zero_and_never_below_drops_outliers():
    x = np.float32([0] * 50 + [1] * 49 + [1000])
    assert calibrate_array(x, QuantSpec(8, **ASYMMETRIC), "percentile:90").maximum == pytest.approx(1, rel=1e-2)
    assert calibrate("percentile:90", QuantSpec(8, **ASYMMETRIC), x).maximum == pytest.approx(1, rel=1e-2)


def test_percentile_of_nearly_all_zeros_keeps_the_rest():
    x = np.zeros(10_000, np.float32)
    x[:2] = 3
    assert calibrate("percentile:99", QuantSpec(8, **ASYMMETRIC), x).maximum == pytest.approx(3)
    assert calibrate("percentile:99", QuantSpec(8, **ASYMMETRIC), -x).minimum == pytest.approx(-3)


# -- searches

DISTRIBUTIONS = ["normal", "laplace", "relu", "relu6", "uniform", "mixture"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_is_at_most_aimets(distribution, bits, symmetric):
    x = samples(distribution)
    spec = QuantSpec(bits, **(SYMMETRIC if symmetric else ASYMMETRIC))
    theirs, _ = aimet_sqnr(x, bits, symmetric)
    for name in ("sqnr", "mse"):
        # The error of ten thousand points jumps by some 0.1 % between neighbouring scales.
        assert noise(x, calibrate_array(x, spec, name)) <= theirs * 1.002, name
        # On bins the choice is as good up to what is lost by not seeing the values.
        assert noise(x, calibrate(name, spec, x)) <= theirs * 1.02, name
        assert noise(x, calibrate_array(x, spec, name)) <= noise(x, calibrate_array(x, spec, "minmax")) * (1 + 1e-4)


def test_the_least_squares_range_is_the_least():
    x = samples("laplace", 2000)
    for bits in (3, 4, 6):
        spec = QuantSpec(bits)
        found = noise(x, calibrate_array(x, spec, "mse"))
        extreme = float(np.abs(x).max()) / (2 ** (bits - 1) - 1)
        e = calibrate_array(x, spec, "minmax")
        brute = min(noise(x, e.with_(scale=np.float32(extreme * f))) for f in np.linspace(0.02, 1, 2000))
        assert found <= brute * 1.003


def test_the_best_zero_point_is_found():
    x = samples("mixture", 2000)
    spec = QuantSpec(3, **ASYMMETRIC)
    found = noise(x, calibrate_array(x, spec, "mse"))
    e = calibrate_array(x, spec, "minmax")
    scales = float(e.scale) * np.linspace(0.05, 1, 300)
    brute = min(noise(x, e.with_(scale=np.float32(s), zero_point=np.int32(z))) for s in scales for z in range(8))
    assert found <= brute * 1.003


def test_the_best_zero_point_among_many_is_found():
    """64 of them, of which 33 are tried, and then those around the best."""
    x = samples("normal", 4000)
    x = np.concatenate([x, np.linspace(3 * x.max(), 4 * x.max(), 8, dtype=np.float32)])
    e = calibrate_array(x, QuantSpec(6, **ASYMMETRIC), "mse")
    assert noise(x, e) <= min(noise(x, e.with_(zero_point=np.int32(z))) for z in range(64)) * 1.0001


@pytest.mark.parametrize("codes", [None, (-8, 7), (0, 15)])
def test_the_expected_error_is_the_integral_over_each_interval(codes):
    """Wherever a grid ends: outside of the data, at an end of an interval, inside of one."""
    rng = np.random.default_rng(0)
    ends = np.sort(np.concatenate([rng.uniform(-1, 1, (3, 12)), np.full((3, 1), 1.0)], axis=1), axis=1)
    low, high, mass = ends[:, :-1], ends[:, 1:], rng.uniform(0.5, 2, (3, 12))
    if codes == (0, 15):
        low, high = np.abs(low) % 1 * 0.9, np.abs(low) % 1 * 0.9 + 0.05
        order = np.argsort(low, axis=1)
        low, high = np.take_along_axis(low, order, 1), np.take_along_axis(high, order, 1)
    unit = np.ones(3)
    density = Density(np.minimum(low[:, 0], 0), unit, low, high, mass)
    search = _search._Search(density, QuantSpec(4, **(ASYMMETRIC if codes is None else SYMMETRIC)), codes)
    scale = rng.uniform(0.02, 0.2, (5, 3))
    top = np.rint(rng.uniform(4, 15, (5, 3, 4))) if codes is None else np.full((5, 3, 1), float(codes[1]))
    bottom = top - 15 if codes is None else np.full(top.shape, float(codes[0]))
    points = low[..., None] + (high - low)[..., None] * (np.arange(4000) + 0.5) / 4000
    for attempt, row, position in np.ndindex(top.shape):
        s, ends = scale[attempt, row], (bottom[attempt, row, position], top[attempt, row, position])
        error = np.square(points[row] - s * np.clip(np.rint(points[row] / s), *ends)).mean(axis=-1)
        expected = (error * mass[row]).sum()
        assert search._cost(scale, bottom, top)[attempt, row, position] == pytest.approx(expected, rel=1e-4)


def test_known_ranges_of_a_normal_distribution():
    x = samples("normal")
    e = calibrate("sqnr", QuantSpec(4, **ASYMMETRIC), x)
    # 0.3352 is the best step of a uniform 16-level quantizer for N(0, 1) (Max 1960).
    assert e.scale == pytest.approx(0.3352, rel=0.05)
    e = calibrate("sqnr", QuantSpec(8, **ASYMMETRIC), x)
    assert e.maximum > 3.3
    assert e.minimum < -3.7


@pytest.mark.parametrize("way", ["histogram", "values"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_one_outlier_does_not_cost_the_body_its_resolution(bits, symmetric, size, way):
    clean = samples("normal")
    x = np.where(np.arange(len(clean)) == 7, size, clean).astype(np.float32)
    body = np.delete(x, 7)
    spec = QuantSpec(bits, **(SYMMETRIC if symmetric else ASYMMETRIC))
    run = (lambda v: calibrate("sqnr", spec, v)) if way == "histogram" else (lambda v: calibrate_array(v, spec, "sqnr"))
    assert noise(body, run(x)) <= 1.1 * noise(body, run(clean))
    if size == 1e3:
        _, error = aimet_sqnr(x, bits, symmetric)
        assert noise(body, run(x)) < 0.02 * np.delete(error, 7).mean()


def test_an_outlier_that_the_grid_can_afford_is_kept():
    x = samples("one outlier")
    assert calibrate("sqnr", QuantSpec(16, **ASYMMETRIC), x).maximum > 990
    mild = samples("normal")
    mild[7] = 10
    assert calibrate("sqnr", QuantSpec(8, **ASYMMETRIC), mild).maximum > 9


def test_outliers_that_are_not_rare_are_kept():
    x = samples("normal")
    x[::200] = 100
    assert calibrate("sqnr", QuantSpec(8, **ASYMMETRIC), x).maximum > 95


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_keeps_an_outlier_and_has_less_error_than_aimet(bits, symmetric):
    x = samples("one outlier")
    e = calibrate_array(x, QuantSpec(bits, **(SYMMETRIC if symmetric else ASYMMETRIC)), "mse")
    theirs, _ = aimet_sqnr(x, bits, symmetric)
    assert noise(x, e) <= theirs * (1 + 1e-4)
    assert np.abs(e.fake_quantize(x) - x).max() <= e.scale


@pytest.mark.parametrize("name", ["sqnr", "mse", "percentile", "entropy"])
@pytest.mark.parametrize(
    "values", [np.zeros(100), np.full(100, 3.0), np.full(100, -3.0), np.array([1e-30]), np.array([3e38, -3e38])]
)
def test_degenerate_tensors(name, values):
    for spec in (QuantSpec(8, **ASYMMETRIC), QuantSpec(4), QuantSpec(8, unsigned_symmetric=True)):
        for e in (calibrate(name, spec, values), calibrate_array(values, spec, name)):
            x = values.astype(np.float32)
            assert np.abs(e.fake_quantize(x) - x).max() <= np.abs(x).max() * 0.2 + 1e-6


@pytest.mark.parametrize("name", ["sqnr", "mse", "percentile:99", "entropy"])
def test_constraints_are_honoured(name):
    x = samples("normal")
    e = calibrate(name, QuantSpec(8, **ASYMMETRIC, minimum=0.0), x)
    assert (e.minimum, int(e.zero_point)) == (0, 0)
    assert e.maximum > 2
    e = calibrate(name, QuantSpec(8, **ASYMMETRIC, maximum=1.5), x)
    assert 1 < e.maximum <= 1.51
    e = calibrate(name, QuantSpec(8, **ASYMMETRIC, minimum=0.0, maximum=1.0), x)
    assert (e.minimum, e.maximum) == (0, pytest.approx(1))


@pytest.mark.parametrize("exact", [False, True])
def test_what_is_left_out_where_nothing_is_negative_is_zero(exact):
    """The side below zero of rectified values costs half of a search and adds nothing to any error, to the bit."""
    values = np.maximum(np.random.default_rng(0).standard_normal((3, 4000)), 0).astype(np.float32)
    statistic = HistogramStatistic(0)
    statistic.update(values)
    density = Density.of_values(values) if exact else Density.of_statistic(statistic)
    for spec in (QuantSpec(8, **ASYMMETRIC), QuantSpec(4, **SYMMETRIC), QuantSpec(4, **ASYMMETRIC, minimum=0.0)):
        search = _search._Search(density, spec, _search._codes(spec, density))
        assert search.left is None
        found = search.run()
        right = search.right
        outwards = (np.ascontiguousarray(a[:, ::-1]) for a in (-right.high, -right.low, right.mass))
        search.left = _search._Tail.of(*outwards)
        np.testing.assert_array_equal(search.run(), found)
    below = Density.of_values(np.where(values == 0, np.float32(-0.01), values))
    assert _search._Search(below, QuantSpec(8, **ASYMMETRIC), None).left is not None


@pytest.mark.parametrize("name", ["sqnr", "mse"])
def test_searched_grids_follow_the_policy_flags(name):
    x = samples("relu")
    signed, unsigned = calibrate(name, QuantSpec(4), x), calibrate(name, QuantSpec(4, unsigned_symmetric=True), x)
    assert signed.signed
    assert not unsigned.signed
    assert noise(x, unsigned) < 0.5 * noise(x, signed)
    strict = calibrate(name, QuantSpec(4, strict=True), samples("normal"))
    assert strict.minimum == -strict.maximum


# -- streams


@pytest.mark.parametrize("name", ["minmax", "percentile:99.9", "sqnr", "mse", "entropy"])
def test_batches_in_any_order_give_the_same_encoding(name):
    x = samples("mixture")
    spec = QuantSpec(8, **ASYMMETRIC)
    whole = calibrate(name, spec, x)
    parts = np.array_split(x, 7)
    assert calibrate(name, spec, *parts).equals(whole)
    assert calibrate(name, spec, *parts[::-1]).equals(whole)


# -- channels and blocks


@pytest.mark.parametrize("name", ["minmax", "percentile:99", "sqnr", "mse", "entropy"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_are_calibrated_as_if_each_were_alone(name, axis):
    rng = np.random.default_rng(0)
    w = (rng.laplace(size=(6, 5, 40, 4)) * np.exp2(rng.integers(-8, 8, (6, 1, 1, 1)))).astype(np.float32)
    for spec in (QuantSpec(4), QuantSpec(8, **ASYMMETRIC)):
        together = calibrate_array(w, spec.with_(granularity=PerChannel(axis)), name)
        for c in range(w.shape[axis]):
            alone = calibrate_array(np.take(w, c, axis), spec, name)
            assert together.scale[c] == pytest.approx(float(alone.scale), rel=1e-6)
            assert together.zero_point[c] == alone.zero_point


def test_activations_per_channel():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 3, 40)) * np.array([1, 10, 0.1])[:, None]).astype(np.float32)
    spec = QuantSpec(4, granularity=PerChannel(1))
    for name in schemes():
        e = calibrate(name, spec, x[:20], x[20:])
        for c in range(3):
            alone = calibrate(name, QuantSpec(4), x[:, c])
            assert noise(
                x[:, c], e.with_(scale=e.scale[c], zero_point=e.zero_point[c], granularity=PerTensor())
            ) <= 1.05 * noise(x[:, c], alone)


def test_blocks_and_two_level_scales():
    w = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    blocks = QuantSpec(4, granularity=Blockwise(block_size=16))
    assert calibrate_array(w, blocks).equals(encoding_of_weights(w, blocks))
    whole = calibrate_array(w, QuantSpec(4, granularity=Blockwise(block_size=64)), "mse")
    channels = calibrate_array(w, QuantSpec(4, granularity=PerChannel(0)), "mse")
    assert np.array_equal(whole.fake_quantize(w), channels.fake_quantize(w))
    assert noise(w, calibrate_array(w, blocks, "mse")) < noise(w, channels)
    lpbq = calibrate_array(w, QuantSpec(4, granularity=Blockwise(block_size=16, decompressed_bits=8)), "mse")
    assert lpbq.block_scale is not None
    assert lpbq.block_scale.max() == 16
    with pytest.raises(InputError, match="block size 48 doesn't divide"):
        calibrate_array(w, QuantSpec(4, granularity=Blockwise(block_size=48)))


def test_large_arrays_are_searched_through_bins(monkeypatch):
    x = samples("laplace")
    exact = calibrate_array(x, QuantSpec(4), "sqnr")
    monkeypatch.setattr("bitwright.calibration._density.EXACT_LIMIT", 100)
    binned = calibrate_array(x, QuantSpec(4), "sqnr")
    assert noise(x, binned) <= noise(x, exact) * 1.01


# -- entropy


def test_entropy_matches_the_definition():
    """A plain loop over every threshold, as TensorRT describes it."""
    x = np.abs(samples("laplace", 40_000))
    e = calibrate("entropy", QuantSpec(4, **ASYMMETRIC), x)
    width = 2.0 ** (np.floor(np.log2(x.max())) + 1) / 2048
    counts = np.bincount((x / width).astype(int), minlength=2048).astype(float)
    divergences = {}
    for n in range(16, 2049):
        p = counts[:n].copy()
        p[-1] += counts[n:].sum()
        q = np.zeros(n)
        level = np.arange(n) * 16 // n
        for k in range(16):
            inside = (level == k) & (p > 0)
            if inside.any():
                q[inside] = counts[:n][level == k].sum() / inside.sum()
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        divergences[n] = (p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum()
    best = min(divergences.values())
    chosen = round(float(e.maximum) / width)
    assert divergences[min(divergences, key=lambda n: abs(n - chosen))] <= best * 1.1
    # Of the 128 thresholds that are tried it is the best.
    tried = [int(n) for n in np.unique(np.rint(np.linspace(16, 2048, 128)))]
    assert chosen == min(tried, key=lambda n: divergences[n])
    assert e.maximum < 0.9 * x.max()


def test_entropy_joins_magnitudes_to_the_levels_of_one_side():
    """A grid of 5 bits has as many levels on each side of zero as one of 4 bits has above it."""
    x = samples("laplace", 40_000)
    below, above = scheme("entropy").range(Density.of_values(x[None], 10), QuantSpec(5, **ASYMMETRIC))
    _, size = scheme("entropy").range(Density.of_values(np.abs(x)[None], 10), QuantSpec(4, **ASYMMETRIC))
    assert size[0] < 0.9 * np.abs(x).max()
    assert (-below[0], above[0]) == (size[0], size[0])


def test_entropy_compares_where_two_bins_are_left_for_a_level():
    """199 values make 32 bins, full and nearly empty ones in turn: 16 levels join them in pairs, 32 join nothing."""
    x = np.concatenate([np.repeat(np.arange(0.5, 16.5), [1, 20] * 8), np.full(30, 15.5), [31]])[None]
    assert scheme("entropy").range(Density.of_values(x, 10), QuantSpec(4, **ASYMMETRIC))[1] == 16
    assert scheme("entropy").range(Density.of_values(x, 10), QuantSpec(5, **ASYMMETRIC))[1] == 31


@pytest.mark.parametrize("name", ["minmax", "percentile:99", "sqnr", "mse", "entropy"])
def test_what_lies_below_zero_counts_as_what_lies_above(name):
    """Values turned about zero give the grid turned about zero, where a grid has as many steps on either side."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.laplace(2, 3, 30_000), [90]]).astype(np.float32)
    found, turned = (calibrate(name, QuantSpec(6, strict=True), sign * x) for sign in (1, -1))
    assert float(turned.scale) == pytest.approx(float(found.scale), rel=1e-6)
    free, other = (calibrate(name, QuantSpec(6, **ASYMMETRIC), sign * x) for sign in (1, -1))
    ends = [float(v) for v in (free.minimum, free.maximum, other.minimum, other.maximum)]
    assert ends[2:] == pytest.approx([-ends[1], -ends[0]], abs=2 * float(free.scale))


def test_one_end_that_the_target_fixes_leaves_the_other_to_the_scheme():
    """With both ends given there is nothing to choose; with one, the data's tail is still cut."""
    x = samples("one outlier")
    for given in ({"minimum": -2.0}, {"maximum": 2000.0}):
        spec = QuantSpec(4, **ASYMMETRIC, **given)
        assert isinstance(scheme("sqnr").statistic(spec)(), HistogramStatistic)
        assert calibrate("sqnr", spec, x).maximum < 20
    assert calibrate("sqnr", QuantSpec(4, **ASYMMETRIC, minimum=-2.0, maximum=2000.0), x).maximum > 1900


def test_entropy_without_enough_values_takes_the_full_range():
    x = samples("normal", 30)
    assert np.array_equal(calibrate_array(x, QuantSpec(8), "entropy").scale, calibrate_array(x, QuantSpec(8)).scale)


# -- checks of the base


class Halved(Scheme):
    name = "halved"

    def range(self, data: Density, spec: QuantSpec):
        return data.minimum / 2, data.maximum / 2


class Broken(Scheme):
    name = "broken"

    def __init__(self, below: int, above: int) -> None:
        self.ends = -np.ones(below), np.ones(above)

    def range(self, data: Density, spec: QuantSpec):
        return self.ends


def test_a_scheme_of_ones_own_is_a_formula():
    x = np.array([-4, 4], np.float32)
    assert calibrate(Halved(), QuantSpec(8, **ASYMMETRIC), x).maximum == pytest.approx(2, rel=1e-2)
    assert calibrate_array(x, QuantSpec(8, **ASYMMETRIC), Halved()).source == "halved"
    for ends in ((7, 7), (1, 7), (7, 1)):
        with pytest.raises(EncodingError, match=r"broken: .* for \(1,\) groups"):
            calibrate_array(x, QuantSpec(8), Broken(*ends))


def test_what_goes_in_is_checked():
    spec = QuantSpec(8)
    with pytest.raises(EncodingError, match="no calibration data reached this tensor"):
        scheme("sqnr").encoding(HistogramStatistic(), spec)
    with pytest.raises(EncodingError, match="needs a histogram"):
        ranged = RangeStatistic()
        ranged.observe(np.ones(3))
        scheme("mse").encoding(ranged, spec)
    with pytest.raises(EncodingError, match="PerChannel grid"):
        h = HistogramStatistic()
        h.update(np.ones(3))
        scheme("mse").encoding(h, spec.with_(granularity=PerChannel(0)))
    for bad in (np.nan, np.inf, -np.inf):
        for rows in ([[1, bad]], [[1, 2], [bad, 1]]):
            with pytest.raises(EncodingError, match="NaN or infinity"):
                calibrate_array(np.array(rows), spec.with_(granularity=PerChannel(0)), "sqnr")
    with pytest.raises(EncodingError, match="nothing to calibrate"):
        calibrate_array(np.zeros((0, 3)), spec)
    with pytest.raises(InputError, match="axis 4 is out of range"):
        calibrate_array(np.zeros((2, 3)), spec.with_(granularity=PerChannel(4)))


def test_float_formats_need_no_search():
    x = samples("one outlier")
    fp8 = calibrate("sqnr", QuantSpec(8, float_format="float8e4m3fn"), x)
    assert fp8.scale == pytest.approx(1000 / 448)
    half = calibrate_array(x, QuantSpec(16, float_format="float16"), "mse")
    assert half.scale == 1
    assert half.fake_quantize(x) == pytest.approx(x, rel=1e-3)


def test_an_interval_counts_by_its_midpoint():
    """Its near end would make a value of the bin [1, 2] weigh as 1, its far end as 2."""
    one = Density(*(np.array(v, float) for v in ([-2.0], [4.0], [[-2, 0, 1]], [[-1, 1, 4]], [[1, 1, 1]])))
    assert one.magnitude.tolist() == [[1.5, 0.5, 2.5]]


def test_joined_intervals_reach_from_the_first_to_the_last():
    ends = np.array([0.0, 0.25, 0.5, 1, 2])
    density = Density(np.array([0.0]), np.array([2.0]), ends[None, :-1], ends[None, 1:], np.array([[1.0, 2, 3, 4]]))
    joined = density.condensed(1.0)
    assert joined.low.tolist() == [[0, 1]]
    assert joined.high.tolist() == [[1, 2]]
    assert joined.mass.tolist() == [[6, 4]]


def test_each_side_of_zero_is_joined_by_itself_where_a_channel_has_one_side_alone():
    low = np.array([[-1, -0.2, 0.1, 0.5], [0.1, 0.1, 0.1, 0.5], [-1, -0.2, 0, 0]])
    high = np.array([[-0.5, -0.1, 0.2, 1], [0.1, 0.1, 0.2, 1], [-0.5, -0.1, 0, 0]])
    density = Density(low[:, 0], high[:, -1], low, high, np.ones((3, 4)))
    joined = density.condensed(0.3)
    assert joined.low.tolist() == low.tolist()
    assert joined.high.tolist() == high.tolist()


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_points_are_searched_to_half_a_768th_of_an_octave(seed):
    """As far as the scale of least error among 4,001 in a tenth of an octave is from the one that is found."""
    x = np.random.default_rng(seed).laplace(size=3000)
    low, high = _search.least_squares_range(Density.of_values(x[None]), QuantSpec(4))
    found = max(-low[0] / 8, high[0] / 7)
    scales = found * 2 ** np.linspace(-0.05, 0.05, 4001)
    errors = [np.square(x - np.clip(np.rint(x / scale), -8, 7) * scale).sum() for scale in scales]
    assert abs(np.log2(scales[np.argmin(errors)] / found)) < 0.5 / 768


def test_what_lies_far_below_the_body_is_searched_as_one(monkeypatch):
    """A 4,096th part of the body: bins of values down to 2^-40 of it would be tried in vain."""
    seen = []
    monkeypatch.setattr(_search, "_codes", lambda spec, data: seen.append(data) or (-8, 7))
    histogram = HistogramStatistic(precision=6)
    histogram.update(np.geomspace(2.0**-40, 1, 50_000, dtype=np.float32))
    _search.least_squares_range(Density.of_statistic(histogram, 6), QuantSpec(4))
    least = float(seen[0].high[0].min())
    assert 2.0**-14 < least < 2.0**-11
    points = Density.of_values(np.geomspace(2.0**-40, 1, 50, dtype=np.float32)[None], 6)
    _search.least_squares_range(points, QuantSpec(4))
    assert seen[1] is points


def test_scales_are_tried_from_the_largest_down_twelve_in_an_octave(monkeypatch):
    tried = []
    attempt = _search._Search._attempt

    def watched(self, best, fraction, around=None):
        if around is None:
            tried.extend(fraction[:, 0])
        attempt(self, best, fraction, around)

    monkeypatch.setattr(_search._Search, "_attempt", watched)
    calibrate_array(samples("laplace", 1000), QuantSpec(4), "mse")
    np.testing.assert_allclose(tried, 2.0 ** (-np.arange(len(tried)) / 12))
    assert tried[-1] < 0.5


@pytest.mark.parametrize("way", ["values", "histogram"])
@pytest.mark.parametrize("name", ["normal", "laplace", "rectified", "two numbers", "outlier", "narrow bins", "rows"])
def test_scales_that_saturation_rules_out_change_nothing(name, way, monkeypatch):
    """The search that leaves them out finds the very range of one that weighs every scale."""
    rng = np.random.default_rng(5)
    x = {
        "normal": rng.standard_normal((1, 3000)),
        "laplace": rng.laplace(size=(1, 3000)) + 0.3,
        "rectified": np.maximum(rng.standard_normal((1, 3000)), 0),
        "two numbers": np.where(rng.random((1, 3000)) < 0.01, 1.0, 0.0),
        "outlier": np.append(rng.standard_normal(2999), 1e3)[None],
        "narrow bins": rng.choice([0.5, 0.5 + 2.0**-20, 1.0, -0.25], (1, 3000)),
        "rows": rng.standard_normal((5, 600)) * np.geomspace(1e-3, 1, 5)[:, None] ** rng.integers(1, 3, (5, 600)),
    }[name].astype(np.float32)
    statistic = HistogramStatistic(0)
    statistic.update(x)
    density = Density.of_values(x) if way == "values" else Density.of_statistic(statistic)
    weighed = []
    cost, hopeful = _search._Search._cost, _search._Search._hopeful
    monkeypatch.setattr(
        _search._Search, "_cost", lambda self, *a, **k: (weighed.append(len(a[0])), cost(self, *a, **k))[1]
    )
    for spec in (QuantSpec(4, **SYMMETRIC), QuantSpec(8, **ASYMMETRIC), QuantSpec(3, **ASYMMETRIC)):
        for shape in (_search.WEIGHED, 2000):  # and however many are weighed together
            monkeypatch.setattr(_search, "WEIGHED", shape)
            monkeypatch.setattr(_search._Search, "_hopeful", hopeful)
            weighed.clear()
            found = _search.least_squares_range(density, spec)
            fewer = sum(weighed)
            monkeypatch.setattr(_search._Search, "_hopeful", lambda self, best, cuts: np.ones(len(cuts[0].end), bool))
            weighed.clear()
            np.testing.assert_array_equal(_search.least_squares_range(density, spec), found)
            assert fewer <= sum(weighed) and (fewer < sum(weighed) or name not in ("normal", "laplace", "rectified"))


@pytest.mark.parametrize("way", ["values", "histogram"])
def test_a_search_knows_no_unit(way):
    """Values and bounds in units a power of two as large give ranges that are as large to the last bit."""
    x = samples("laplace", 4000)
    for bounds in ({}, {"maximum": 1.0}, {"minimum": -2.0, "maximum": 1.5}):
        found = []
        for unit in (2.0**-30, 1.0, 2.0**20):
            scaled = (x * unit).astype(np.float32)
            spec = QuantSpec(4, **ASYMMETRIC, **{k: v * unit for k, v in bounds.items()})
            if way == "values":
                density = Density.of_values(scaled[None], 7)
            else:
                histogram = HistogramStatistic(precision=7)
                histogram.update(scaled)
                density = Density.of_statistic(histogram, 7)
            found.append([float(end[0]) / unit for end in _search.least_squares_range(density, spec)])
        assert found[0] == found[1] == found[2]


def test_a_searched_range_passes_a_bound_by_half_a_step_at_most():
    for seed in range(20):
        x = np.random.default_rng(seed).laplace(size=(1, 500))
        spec = QuantSpec(2, **ASYMMETRIC, minimum=-1.0, maximum=1.3)
        low, high = _search.least_squares_range(Density.of_values(x, 7), spec)
        half = 0.5 * (high - low) / 3
        assert low >= -1 - 1.0001 * half and high <= 1.3 + 1.0001 * half


def test_bins_of_a_channel_far_below_another_are_searched_all_the_same():
    x = samples("laplace", 20_000)
    histogram = HistogramStatistic(0, precision=7)
    histogram.update(np.stack([x, x * np.float32(2.0**-16)]))
    low, high = _search.least_squares_range(Density.of_statistic(histogram, 7), QuantSpec(4, **ASYMMETRIC))
    assert low[1] * 2.0**16 == pytest.approx(low[0], rel=1e-9)
    assert high[1] * 2.0**16 == pytest.approx(high[0], rel=1e-9)


def test_a_row_s_scales_are_no_smaller_than_its_own_body_asks_for():
    x = np.concatenate([samples("normal", 5000), [30]])[None]
    search = _search._Search(Density.of_values(np.concatenate([x, x]), 7), QuantSpec(4), (-8, 7))
    search.refinements = ()
    search.octaves = np.array([0.0, 14.0])
    _, high = search.run()
    assert high[0] > 28  # of the largest scale and the next, a twelfth of an octave below
    assert high[1] < 10


def test_a_range_is_cut_at_the_threshold_on_the_side_that_passes_it():
    x = np.concatenate([-np.abs(samples("laplace", 40_000)), np.full(4, 0.25, np.float32)])
    low, high = scheme("entropy").range(Density.of_values(x[None], 10), QuantSpec(4, **ASYMMETRIC))
    assert -x.min() > -low[0] > 1 and high[0] == 0.25
    low, high = scheme("entropy").range(Density.of_values(-x[None], 10), QuantSpec(4, **ASYMMETRIC))
    assert x.max() <= high[0] * 100 and -x.min() > high[0] > 1 and low[0] == -0.25


def test_a_large_array_s_percentile_is_known_as_finely_as_bins_are(monkeypatch):
    monkeypatch.setattr("bitwright.calibration._density.EXACT_LIMIT", 10)
    x = np.linspace(1, 1.999, 4_096, dtype=np.float32)
    e = calibrate_array(x, QuantSpec(8, **ASYMMETRIC), "percentile:90")
    assert float(e.maximum) == pytest.approx(1 + 0.999 * 0.9, abs=2.0**-13)


def test_biases_that_fit_an_accumulator():
    assert fits_accumulator(np.float32([1.0, 2.0]), np.float32(1e-4), np.float32(1e-5))
    assert not fits_accumulator(np.float32([1.0, 3.0]), np.float32(1e-4), np.float32(1e-5))  # 2.147 at most
    assert fits_accumulator(np.float32([1.0, 3.0]), np.float32(1e-4), np.float32([1e-5, 1e-4]))
    assert not fits_accumulator(np.float32([3.0, 1.0]), np.float32(1e-4), np.float32([1e-5, 1e-4]))
    assert not fits_accumulator(np.full((2, 3), 3, np.float32), np.float32(1e-4), np.float32([1e-5, 1e-4]))


@pytest.mark.parametrize(("precision", "bits"), [(3, 3), (None, 6)])
def test_arrays_are_searched_in_bins_of_the_schemes_precision(monkeypatch, precision, bits):
    """Mantissa bits of the bins: the scheme's own, or those that its search sees."""
    seen = {}

    class Watching(Scheme):
        name = "watching"
        view = 6

        def range(self, data, spec):
            seen["width"] = float((data.high - data.low).max() / data.high[0, -1])
            return data.minimum, data.maximum

    Watching.precision = precision
    monkeypatch.setattr("bitwright.calibration._density.EXACT_LIMIT", 10)
    values = np.linspace(1, 1.999, 4096, dtype=np.float32)
    Watching().of_array(values, QuantSpec(8, signed=False, symmetric=False, granularity=PerTensor()))
    assert seen["width"] == pytest.approx(2.0**-bits / 1.999, rel=0.01)


@pytest.mark.parametrize("count", [1, 2, 17, 33])
def test_candidates_are_spread_as_numpy_does(count):
    rng = np.random.default_rng(count)
    for zero in (False, True):
        first = np.floor(rng.uniform(-256, 0, (5, 7)))
        last = first + rng.integers(1 - zero, 300, (5, 7))
        last[0, 0] -= (last - first)[0, 0] * zero
        assert np.array_equal(_search._spread(first, last, count), np.linspace(first, last, count, axis=-1))
