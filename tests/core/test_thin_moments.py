"""Moments of some positions: the columns at these and no others, spread evenly, the same on every machine."""

import numpy as np
import pytest
from direct_convolution import CASES, conv_op

from bitwright.backend import Tap, picked
from bitwright.errors import InputError
from bitwright.graph import ConvAttrs, Op, OpKind, columns, to_matrix
from bitwright.statistics import LayerMoments
from bitwright.statistics._positions import FEWEST, TURNS, picks, spread, wanted

FC = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",))


def case(name, samples=TURNS + 3, larger=4):
    """An op of every geometry, its input of a larger image, and K."""
    kind, attrs, shape, weight = CASES[name]
    larger *= 4 if len(shape) == 3 else 1
    op, rng = conv_op(kind, attrs), np.random.default_rng(5)
    x = rng.normal(size=(samples, shape[1], *(larger * n for n in shape[2:]))).astype(np.float32)
    return op, x, to_matrix(op, np.zeros(weight, np.float32)).shape[2]


def chosen(op, x, features, thin, axis=None):
    """All columns, by sample and position, and of these the counted ones: (groups, K, rows)."""
    whole = np.concatenate(list(columns(op, x, axis)), axis=2)
    whole = whole.reshape(*whole.shape[:2], len(x), -1)
    seen = x if axis in (None, 1) else np.moveaxis(x, axis, 1)
    found = picks(op, seen.shape[2:], features, thin)
    assert found is not None
    return np.concatenate([whole[:, :, n, found.outputs[n % TURNS]] for n in range(len(x))], axis=2).astype(np.float64)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_the_columns_at_these_positions(name, last):
    op, x, features = case(name)
    axis = -1 if last else None
    if last:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    thin = max(1, features // 6)
    rows = chosen(op, x, features, thin, axis)
    m = LayerMoments(op, features, axis, paired=False, thin=thin)
    for batch in np.array_split(x, 4):
        m.update(batch)
    assert m.count == rows.shape[2] == len(x) * wanted(features, thin)
    np.testing.assert_allclose(m.xx, rows @ rows.swapaxes(1, 2) / m.count, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(m.mean, rows.mean(axis=2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_was_picked_gives_the_same_bits(name, last):
    """In each geometry: strides, dilations and borders, where taps lie outside of the image."""
    op, x, features = case(name)
    axis = -1 if last else None
    if last:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    spatial = x.shape[1:-1] if last else x.shape[2:]
    thin = max(1, features // 4)
    whole, some = (LayerMoments(op, features, axis, paired=False, thin=thin, spatial=spatial) for _ in range(2))
    if some.places is None:
        chosen = picks(op, spatial, features, thin)
        assert chosen is None or chosen.places.table.shape[1] > np.prod(spatial), "fewer would do"
        return
    tap = Tap("x", axis=some.place_axis, places=some.places)
    for batch in np.array_split(x, 4):
        whole.update(batch)
        some.update_picked(picked(batch, tap, some.next_sample))
    assert whole.state().keys() == some.state().keys()
    for key, value in whole.state().items():
        np.testing.assert_array_equal(some.state()[key], value, err_msg=key)
    bad = picked(x[:2], tap, 0)
    bad[1, 0, -1] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        some.update_picked(bad)


def test_pairs_and_unknown_shapes_are_taken_whole():
    op, x, features = case("plain")
    for given in ({"paired": True, "spatial": x.shape[2:]}, {"paired": False}, {"paired": False, "thin": None}):
        assert LayerMoments(op, features, **{"thin": 9, **given}).places is None
    assert LayerMoments(op, features, paired=False, thin=9, spatial=(64, 64)).places is not None


def test_tokens_of_a_sequence():
    x = np.random.default_rng(0).normal(size=(20, 50, 24)).astype(np.float32)
    rows = np.concatenate([x[n, spread((50,), 6)[n % TURNS]] for n in range(20)]).astype(np.float64)
    m = LayerMoments(FC, 24, -1, paired=False, thin=4)
    m.update(x)
    assert m.count == len(rows) == 120
    np.testing.assert_allclose(m.xx[0], rows.T @ rows / 120, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("steady", [1, 7])
@pytest.mark.parametrize("groups", [1, 8])
def test_features_that_barely_vary_keep_their_digits(groups, steady, last):
    """Whether few or most are summed about a shift: their variance is a millionth of their mean squared. What was given
    stays as it is."""
    op = conv_op(OpKind.CONV, ConvAttrs((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), groups))
    x, features = np.random.default_rng(0).normal(size=(2 * TURNS, 8, 20, 20)).astype(np.float32), 72 // groups
    x[:, :steady] += 1000
    axis = -1 if last else None
    given = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x.copy()
    kept, thin = given.copy(), max(1, features // 6)
    m = LayerMoments(op, features, axis, paired=False, thin=thin)
    for batch in np.array_split(given, 8):
        m.update(batch)
    np.testing.assert_array_equal(given, kept)
    rows = chosen(op, given, features, thin, axis)
    mean = rows.mean(axis=2)
    centred = rows @ rows.swapaxes(1, 2) / m.count - mean[:, :, None] * mean[:, None]
    np.testing.assert_allclose(m.centred()[0], centred, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-5, atol=1e-5)


def test_quantized_inputs_and_residuals_are_taken_at_the_same_positions():
    op, x, features = case("plain")
    rng = np.random.default_rng(1)
    q = x + rng.normal(size=x.shape).astype(np.float32) / 8
    error = rng.normal(size=(len(x), 3, *(n - 2 for n in x.shape[2:]))).astype(np.float32)
    a, b = chosen(op, x, features, 6), chosen(op, q, features, 6)
    where = picks(op, x.shape[2:], features, 6).outputs
    r = np.concatenate([error[n].reshape(3, -1)[:, where[n % TURNS]] for n in range(len(x))], axis=1)
    m = LayerMoments(op, features, residual_outputs=3, thin=6)
    for part in np.array_split(np.arange(len(x)), 3):
        m.update(x[part], q[part], error[part])
    np.testing.assert_allclose(m.xq, a @ b.swapaxes(1, 2) / m.count, rtol=1e-4, atol=1e-5)
    rx, rq, mean, square = m.residual
    np.testing.assert_allclose(rx, r @ a[0].T / m.count, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rq, r @ b[0].T / m.count, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, r.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(square, np.square(r).mean(axis=1), rtol=1e-5)


def test_in_blocks():
    op, x, features = case("plain")
    whole, parts = (LayerMoments(op, features, paired=False, blocks=n, thin=4) for n in (1, 2))
    for m in (whole, parts):
        m.update(x)
    assert parts.count == whole.count
    half = features // 2
    np.testing.assert_allclose(parts.xx[1], whole.xx[0, half:, half:], rtol=1e-5, atol=1e-6)


def test_small_inputs_are_counted_whole():
    op, x, features = case("depthwise", larger=1)
    count = x[0, 0].size
    assert picks(op, x.shape[2:], features, 10**6) is None or count >= 2 * FEWEST
    whole, thin = LayerMoments(FC, 6, paired=False), LayerMoments(FC, 6, paired=False, thin=3)
    rows = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    for m in (whole, thin):
        m.update(rows)
    assert thin.count == whole.count == 30
    np.testing.assert_allclose(thin.xx, whole.xx, rtol=1e-5)
    assert not thin.scarce, "none was left out"
    kept = thin.xx.copy()
    rows[:] = 1e6
    np.testing.assert_array_equal(thin.xx, kept, err_msg="what waits is the batch's own memory")


@pytest.mark.parametrize("parts", [(16, 16), (32, 5), (16, 16, 5)])
def test_merged_is_one_run_where_parts_are_whole_turns(parts):
    op, x, features = case("strided_padded", samples=sum(parts))
    whole = LayerMoments(op, features, paired=False, thin=9)
    merged = LayerMoments(op, features, paired=False, thin=9)
    whole.update(x)
    for part in np.split(x, np.cumsum(parts)[:-1]):
        one = LayerMoments(op, features, paired=False, thin=9)
        one.update(part)
        back = LayerMoments(op, features, paired=False, thin=9)
        back.restore(one.state())
        assert back.scarce == one.scarce
        merged.merge(back)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.xx, whole.xx, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="other positions, thin=9 and thin=None"):
        merged.merge(LayerMoments(op, features, paired=False))


def test_the_answer_doesnt_change_while_it_is_asked_for():
    """Columns that wait are in every figure, whichever is asked for first."""
    op, x, features = case("plain")
    for name in ("count", "mean", "mean_quantized", "xx", "state", "centred"):
        one, all_at_once = (LayerMoments(op, features, paired=False, thin=9) for _ in range(2))
        for sample in x:
            one.update(sample[None])
        all_at_once.update(x)
        asked, told = getattr(one, name), getattr(all_at_once, name)
        asked, told = (v() if callable(v) else v for v in (asked, told))
        first = lambda v: v["xx"] if isinstance(v, dict) else np.asarray(v)
        np.testing.assert_allclose(first(asked), first(told), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(7, 7), (14, 14), (112, 112), (28, 13), (100,), (5, 6, 7)])
@pytest.mark.parametrize("count", [4, 9, 21])
def test_positions_are_different_and_evenly_spread(shape, count):
    total = int(np.prod(shape))
    found = spread(shape, count)
    if 2 * count > total:
        assert found is None
        return
    assert found.shape == (TURNS, count)
    assert all(len(set(turn)) == count for turn in found)
    met = np.bincount(found.ravel(), minlength=total)
    assert met.max() <= 2 * max(1, TURNS * count / total) + 1
    for axis, at in enumerate(np.unravel_index(found.ravel(), shape)):
        n = shape[axis]
        quarters = np.bincount(at * 4 // n, minlength=4) / at.size
        even = np.bincount(np.arange(n) * 4 // n, minlength=4) / n
        assert np.abs(quarters - even).max() < 0.11, f"axis {axis}: {quarters}"
        assert abs((at % 2).mean() - (np.arange(n) % 2).mean()) < 0.15, "a stride of two would be met on one side"


def test_they_are_about_those_of_all_positions():
    """Of smooth images with a border of zeros, which a set of positions that is always the same would get wrong."""
    op = conv_op(OpKind.CONV, ConvAttrs((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)), 3))
    coarse = np.random.default_rng(2).gamma(1, 1, (320, 3, 4, 4))
    x = coarse.repeat(2, axis=2).repeat(2, axis=3)[:, :, :7, :7].astype(np.float32)
    whole, thin = LayerMoments(op, 25, paired=False), LayerMoments(op, 25, paired=False, thin=16)
    for batch in np.split(x, 10):
        whole.update(batch)
        thin.update(batch)
    assert thin.count == 4 * 320
    error = np.linalg.norm(thin.xx - whole.xx) / np.linalg.norm(whole.xx)
    assert error < 0.1
    assert not thin.scarce


def test_what_is_wrong_is_refused_and_few_columns_are_told():
    op, x, features = case("plain")
    for thin in (0, -3):
        with pytest.raises(InputError, match=f"'layer': thin={thin}; one position"):
            LayerMoments(op, features, thin=thin)
    m = LayerMoments(op, features, paired=False, thin=9)
    bad = x.copy()
    bad[:] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        m.update(bad)
    for place in range(0, x.size, x.size // 7):  # most of them where nothing is counted
        one = x.copy()
        one.reshape(-1)[place] = np.nan
        with pytest.raises(InputError, match="NaN or infinite"):
            m.update(one)
    assert m.count == 0
    m.update(x)
    assert m.scarce
    assert m.per_feature == m.count / features < 4


def test_sums_that_overflow_are_infinite_without_a_warning(recwarn):
    moments = LayerMoments(FC, 4, paired=False, thin=1)
    moments.update(np.full((8, 40, 4), 3e38, np.float32))
    assert moments.count and np.isinf(moments.mean).all()
    assert not recwarn.list
