"""Ranges, histograms and channel moments: exact, mergeable in any order, never polluted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bitwright.backend._taps import thinned
from bitwright.errors import InputError
from bitwright.statistics import ChannelMoments, HistogramStatistic, RangeStatistic, Request, Statistic, finite
from bitwright.statistics._histogram import MANY

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def batches(seed=0, count=5, shape=(4, 3, 5)):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) * 10.0**i).astype(np.float32) for i in range(count)]


def fed(make, values):
    statistic = make()
    for v in values:
        statistic.update(v)
    return statistic


MAKERS = {
    "range": lambda: RangeStatistic(reduction="none"),
    "range per channel": lambda: RangeStatistic(1, reduction="none"),
    "histogram": HistogramStatistic,
    "histogram per channel": lambda: HistogramStatistic(1),
    "moments": lambda: ChannelMoments(1),
    "moments of the whole": lambda: ChannelMoments(None),
}


def same(a, b, exact=True):
    for key, value in a.state().items():
        if exact:
            assert np.array_equal(value, b.state()[key]), key
        else:
            assert value == pytest.approx(b.state()[key], rel=1e-9), key


@pytest.mark.parametrize("name", MAKERS)
def test_protocol_state_and_merging_in_any_order(name):
    make, parts = MAKERS[name], batches()
    whole = fed(make, parts)
    assert isinstance(whole, Statistic)
    exact = "moments" not in name
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        merged = make()
        for i in order:
            merged.merge(fed(make, [parts[i]]))
        same(merged, whole, exact)
        same(fed(make, [parts[i] for i in order]), whole, exact)
    empty = make()
    empty.merge(make())
    empty.merge(whole)
    same(empty, whole)
    whole.merge(make())
    same(empty, whole)
    back = make()
    back.restore(whole.state())
    same(back, whole)
    if isinstance(whole, RangeStatistic):
        np.testing.assert_array_equal(back.low, whole.low)
        np.testing.assert_array_equal(back.high, whole.high)
    back.update(parts[0])
    whole.update(parts[0])
    same(back, whole)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_polluted_by_nan_or_infinity(name, bad):
    whole = fed(MAKERS[name], batches())
    before = {k: v.copy() for k, v in whole.state().items()}
    batch = batches()[0]
    batch[2, 1, 3] = bad
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match="NaN or infinite"):
        whole.update(batch)
    for key, value in whole.state().items():
        assert np.array_equal(value, before[key])


@pytest.mark.parametrize("name", ["range per channel", "histogram per channel", "moments"])
def test_channels_must_not_change(name):
    statistic = fed(MAKERS[name], batches())
    with pytest.raises(InputError, match="4 channels after batches with 3"):
        statistic.update(np.ones((1, 4, 2), np.float32))
    with pytest.raises(InputError, match="channel axis 1"):
        statistic.update(np.ones(3, np.float32))


def test_reduced_ranges():
    statistic = RangeStatistic()
    assert not statistic.seen
    for pair in ([-1.0, 2.0], [0.5, 3.0]):
        statistic.update(np.array(pair, np.float32))
    assert (float(statistic.low), float(statistic.high)) == (-1.0, 3.0)
    statistic.observe(np.array([[-7.0, 1.0]]))
    assert float(statistic.low) == -7.0
    channels = RangeStatistic(3)
    channels.update(np.array([[-1, -2], [1, 2]], np.float32))
    channels.observe(np.full((1, 2, 2, 2), 5.0))
    assert channels.low.tolist() == [-1, -2]
    assert channels.high.tolist() == [5, 5]
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        statistic.update(np.ones((3, 4)))
    with pytest.raises(InputError, match=r"shape \(2, channels\)"):
        channels.update(np.ones(2))


@settings(max_examples=60, deadline=None)
@given(x=npst.arrays(np.float32, st.integers(1, 200), elements=FLOATS), precision=st.integers(1, 14))
def test_every_value_lies_in_the_bin_that_counts_it(x, precision):
    h = HistogramStatistic(precision=precision)
    h.update(x)
    bins = h.bins()
    low, high, count = bins.low[0], bins.high[0], bins.count[0]
    assert h.total == len(x) == count.sum()
    assert (h.low[0], h.high[0]) == (x.min(), x.max())
    assert (low <= high).all()
    assert (high[:-1] <= low[1:]).all()
    assert (low[0], high[-1]) == (min(x.min(), low[0]), max(x.max(), high[-1]))
    tiny = float(np.finfo(np.float32).tiny)
    wide = high - low
    assert (wide <= 2.0**-precision * np.maximum(abs(low), abs(high))).all()
    # A negative bin holds its far (lower) edge, a positive one its near (lower) edge too.
    flushed = np.where(abs(x) < tiny, 0, x.astype(np.float64))
    for a, b, n in zip(low, high, count, strict=True):
        inside = (flushed >= a) & (flushed <= b)
        assert inside.sum() >= n


def test_subnormal_values_count_as_zero():
    h = HistogramStatistic()
    h.update(np.array([1e-45, -1e-40, 0.0, 1.0], np.float32))
    bins = h.bins()
    assert h.total == bins.count.sum() == 4
    assert bins.count[0][(bins.low[0] <= 0) & (bins.high[0] >= 0)].sum() == 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_coarser_bins_join_whole_bins(bits):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=5000) * np.exp2(rng.integers(-30, 30, 5000))).astype(np.float32)
    fine, coarse = HistogramStatistic(precision=9), HistogramStatistic(precision=bits)
    fine.update(x)
    coarse.update(x)
    for a, b in zip(vars(fine.bins(bits)).values(), vars(coarse.bins()).values(), strict=True):
        assert np.array_equal(a, b)


def test_zero_has_its_own_bin():
    h = HistogramStatistic()
    h.update(np.maximum(np.random.default_rng(0).normal(size=1001), 0))
    bins = h.bins()
    assert (bins.low[0, 0], bins.high[0, 0]) == (0, 0)
    assert 450 < bins.count[0, 0] < 550
    signs = HistogramStatistic()
    signs.update(np.array([-0.0, 0.0, 1e-40, -1e-40], np.float32))
    assert signs.total == 4
    assert signs.bins().high.max() <= 1e-39


def test_an_outlier_takes_nothing_from_the_body():
    x = np.random.default_rng(0).normal(size=10000).astype(np.float32)
    alone, beside = HistogramStatistic(), HistogramStatistic()
    alone.update(x)
    beside.update(x)
    beside.update(np.array([1e30], np.float32))
    assert np.array_equal(beside.bins().count[0, :-1], alone.bins().count[0])


def test_counts_are_exact_across_chunks_and_dtypes():
    n = 200_001
    x = np.tile(np.array([0, 1, 2, 4], np.float64), n)[:n]
    h = HistogramStatistic()
    h.update(x.reshape(3, -1))
    h.update(np.array([1, 2], np.int64))
    assert h.bins().count[0].tolist() == [50001, 50001, 50001, 50000]
    assert h.total.tolist() == [n + 2]


@pytest.mark.parametrize("precision", [1, 9, 10, 11, 14])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_many_values_are_counted_as_few_are(precision, sign):
    """Channels of many values go through counters of all bins, where bins may be so many: octave by octave, signs,
    zeros of both signs and subnormals are where the bits say, batch after batch."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 3, MANY + 5)) * 10.0 ** rng.integers(-40, 30, (2, 3, MANY + 5))).astype(np.float32)
    x[:, 1] *= 1e3  # octaves that the first channel hasn't
    x[:, :, :7] = [0.0, -0.0, 1e-44, -1e-44, 1.0, -1.0, 3e38]
    if sign:
        x = sign * np.abs(x)
    many, few = HistogramStatistic(1, precision=precision), HistogramStatistic(1, precision=precision)
    for batch in x:
        many.update(batch[None])
        for part in np.array_split(batch, 9, axis=1):
            few.update(part[None])
    for key, value in few.state().items():
        np.testing.assert_array_equal(many.state()[key], value)
    codes, counts = np.unique(np.moveaxis(x, 1, 0)[2].view(np.uint32) >> (23 - precision), return_counts=True)
    state = many.state()
    np.testing.assert_array_equal(state["counts"][2][np.isin(state["codes"], codes)], counts)


def test_counting_that_is_broken_off_leaves_nothing_to_the_next(monkeypatch):
    """Counters of all bins belong to a thread, not to a statistic."""
    x = np.random.default_rng(0).normal(size=(2, MANY)).astype(np.float32)
    broken = HistogramStatistic()
    with monkeypatch.context() as patch:
        patch.setattr(HistogramStatistic, "_hold", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.update(x)
    whole = HistogramStatistic()
    whole.update(x)
    assert whole.total == x.size


def test_histograms_per_channel_are_those_of_the_channels():
    x = np.random.default_rng(0).normal(size=(6, 4, 7)).astype(np.float32)
    x[:, 2] = 0
    h = HistogramStatistic(1, precision=9)
    h.update(x)
    for c in range(4):
        one = HistogramStatistic()
        one.update(x[:, c])
        counts = h.bins().count[c]
        assert np.array_equal(counts[counts > 0], one.bins().count[0])
        assert (h.low[c], h.high[c]) == (one.low[0], one.high[0])


def test_histogram_settings():
    with pytest.raises(InputError, match="precision=15"):
        HistogramStatistic(precision=15)
    with pytest.raises(InputError, match="precision=0"):
        HistogramStatistic(precision=0)
    with pytest.raises(InputError, match="precision 5 into one of 9"):
        HistogramStatistic().merge(HistogramStatistic(precision=5))
    empty = HistogramStatistic(1)
    empty.update(np.zeros((0, 3)))
    assert not empty.seen
    assert HistogramStatistic.bytes_for() < 2**18


def test_channel_moments_do_not_cancel():
    rng = np.random.default_rng(0)
    parts = [(1e4 + rng.normal(size=(8, 3, 50))).astype(np.float32) for _ in range(4)]
    m = fed(lambda: ChannelMoments(1), parts)
    x = np.concatenate(parts).astype(np.float64)
    assert m.count == 1600
    assert m.mean == pytest.approx(x.mean(axis=(0, 2)), rel=1e-12)
    assert m.variance == pytest.approx(x.var(axis=(0, 2)), rel=1e-6)
    with pytest.raises(InputError, match="no calibration data"):
        _ = ChannelMoments(1).variance


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(2, 7), st.data())
def test_thinning_takes_the_same_values_in_every_layout(shape, step, data):
    """Wherever the channels lie, in memory that is contiguous or not."""
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    axis = data.draw(st.integers(1, len(shape) - 1))
    expected = thinned(x, step, 1)
    assert expected.shape == (shape[0], -(-int(np.prod(shape[1:])) // step))
    moved = np.moveaxis(x, 1, axis)
    np.testing.assert_array_equal(thinned(moved, step, axis), expected)
    np.testing.assert_array_equal(thinned(np.ascontiguousarray(moved), step, axis), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen(bad):
    well = np.array([-3.0, 2.0], np.float32)
    assert finite([well, np.zeros((0, 2), np.float32)])
    assert not finite([well, np.array([1, bad, 2], np.float32)])


def test_what_is_held_is_told_in_bytes():
    """24 octaves on either side of zero, 2**precision counts of 8 bytes in each."""
    assert HistogramStatistic.bytes_for() == 2 * 24 * 512 * 8
    assert HistogramStatistic.bytes_for(3, 7) == 3 * 2 * 24 * 128 * 8


def test_what_is_asked_for_is_needed_unless_it_says_otherwise():
    request = Request("key", ("a", "b"), RangeStatistic, ("simulated",))
    assert (request.optional, request.memory, request.sources) == (False, 0, ("simulated", "simulated"))


@pytest.mark.parametrize("axis", [None, 1])
def test_counters_widen_before_they_overflow(axis):
    """Those of a bin begin with 16 bits; merging, and going on from a saved state, widen them too."""
    shape = (20_000, 2) if axis == 1 else (40_000,)
    whole, part = HistogramStatistic(axis), HistogramStatistic(axis)
    for number in (1, 2, 3, 4):
        whole.update(np.full(shape, 1.5, np.float32))
        assert np.array_equal(whole.bins().count.ravel(), whole.total)
        assert (whole.total == number * shape[0]).all()
    part.restore(whole.state())
    part.update(np.full(shape, -2.5e20, np.float32))
    part.merge(whole)
    assert part.bins().count.tolist() == [[shape[0], 8.0 * shape[0]]] * (1 if axis is None else 2)
    assert part.state()["counts"].dtype == np.int64


def test_a_histogram_takes_memory_for_the_octaves_that_occur():
    rng, histogram = np.random.default_rng(0), HistogramStatistic()
    assert histogram._table.nbytes == 0
    histogram.update(np.float32([3.0, -0.0]))
    assert histogram._table.nbytes == 2 * 512 * 2  # 0 and −0 differ in sign
    histogram.update(rng.normal(size=2**16).astype(np.float32))
    assert 30 * 512 * 2 < histogram._table.nbytes < HistogramStatistic.bytes_for()


def test_extremes_of_a_batch_whose_values_are_thinned_come_beside_them():
    h = HistogramStatistic(step=2, extremes=True)
    h.update(np.float32([1, 2]), (np.float32([-3]), np.float32([5])), (np.float32([1]), np.float32([2])))
    assert (h.low, h.high) == (-3, 5)
    h.update(np.float32([1, 6]), (np.float32([1]), np.float32([7])))
    assert (h.low, h.high) == (-3, 7)
