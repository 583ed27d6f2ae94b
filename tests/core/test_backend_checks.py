"""What every backend refuses: encodings against tensors, and the sites that would share them."""

import numpy as np
import pytest

from bitwright.backend import Sites, Tap, check_encodings, handed_out, reduced
from bitwright.backend._checks import check_fits, on_grid
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import Op, OpKind, ParamRole, moved_from, never_negative
from bitwright.grids import Blockwise, Encoding, EncodingTable, PerChannel, Provenance
from bitwright.placement import SharedWith
from bitwright.testing.builder import Builder
from bitwright.testing.harness import simple_plan


def grid(granularity, *shape):
    return Encoding(8, True, True, np.full(shape, 0.1, np.float32), np.zeros(shape, np.int32), granularity)


@pytest.mark.parametrize(
    ("encoding", "shape", "reason"),
    [
        (grid(PerChannel(1), 3), (None, 4, None), r"'t': 3 scales along axis 1 .* \[\?, 4, \?\], which takes 4; give"),
        (grid(PerChannel(1), 1), (None, 4), "1 scales along axis 1"),
        (grid(PerChannel(-1), 3), (None, 4), "3 scales along axis -1"),
        (grid(PerChannel(2), 4), (None, 4), "no such axis"),
        (grid(PerChannel(0), 4), None, "no known rank"),
        (grid(Blockwise(0, 1, 4), 3, 2), (3, 12), "takes 3 × 3"),
        (grid(Blockwise(0, 1, 4), 2, 3), (3, 12), "takes 3 × 3"),
        (grid(Blockwise(0, 1, 4), 2, 3), (3, None), "takes 3 × any number"),
        (grid(Blockwise(0, 1, 5), 3, 2), (3, 12), "choose a block size that divides 12"),
        (grid(Blockwise(0, 1, 0), 3, 2), (3, 12), "choose a block size that divides 12"),
        (grid(Blockwise(0, -2, 1), 3, 3), (3, 12), "blocks lie along another axis"),
    ],
)
def test_scales_that_don_t_fit(encoding, shape, reason):
    with pytest.raises(EncodingError, match=reason):
        check_fits("t", encoding, shape)


@pytest.mark.parametrize(
    ("encoding", "shape"),
    [
        (grid(PerChannel(1), 4), (None, 4, None)),
        (grid(PerChannel(-1), 4), (None, 4)),
        (grid(PerChannel(0), 7), (None, 4)),
        (grid(Blockwise(0, 1, 4), 3, 3), (3, 12)),
        (grid(Blockwise(1, 0, 2), 12, 2), (4, 12)),
        (grid(Blockwise(0, 1, 4), 3, 5), (3, None)),
    ],
)
def test_scales_that_fit(encoding, shape):
    check_fits("t", encoding, shape)


def branches():
    """Two tensors of 4 and 6 channels, concatenated; one of them is pooled before."""
    b = Builder(0)
    x = b.input("x", 3, 6, 6)
    left = b.pool("pool", b.conv("left", x, 4, 1), 3, pad=1)
    return b.build(b.concat("concat", [left, b.conv("right", x, 6, 1)])).graph


def test_an_encoding_must_fit_all_sites_that_share_it():
    graph = branches()
    plan = simple_plan(graph)
    root = "left.output"
    tied = plan.changed({
        s: plan[s].__class__(s, plan[s].kind, SharedWith(root), plan[s].op) for s in ("pool.output", "right.output")
    })  # fmt: skip
    assert on_grid(graph, tied, "pool.output")
    check_encodings(graph, plan, {root: grid(PerChannel(1), 4)})
    with pytest.raises(EncodingError, match=r"'right.output': 4 scales along axis 1 of .* takes 6"):
        check_encodings(graph, tied, {root: grid(PerChannel(1), 4)})
    sites = Sites(graph, tied, EncodingTable({}, (Provenance("mine", {}),)))
    assert "pool.output" not in sites.rounded
    assert {"left.output", "right.output", "concat.output"} <= set(sites.rounded)
    with pytest.raises(EncodingError, match=r"'right.output'"):
        sites.changes({"pool.output": grid(PerChannel(1), 4)})
    with pytest.raises(EncodingError, match="an Encoding is needed, got a float"):
        sites.changes({root: 0.1})
    assert sites.table({root: grid(PerChannel(1), 4)}).provenance == (Provenance("mine", {}),)


def test_where_values_come_from():
    concat = Op("c", OpKind.CONCAT, "Concat", ("a", "b"), ("y",), {ParamRole.CONSTANT: "token"})
    assert moved_from(concat) == ("a", "b", "token")  # a constant among them isn't on a tensor's grid by itself
    gather = Op("g", OpKind.SLICE, "Gather", ("a", "indices"), ("y",))
    assert moved_from(gather) == ("a",)
    table = Op("e", OpKind.EMBEDDING, "Gather", ("ids",), ("y",), {ParamRole.WEIGHT: "w"})
    assert moved_from(table) == ("w",)
    for kind, type, expected in (
        (OpKind.ELEMENTWISE, "Cast", ()),  # a narrower type rounds
        (OpKind.ELEMENTWISE, "Tile", ("a",)),
        (OpKind.ELEMENTWISE, "DepthToSpace", ("a",)),
        (OpKind.IDENTITY, "Dropout", ("a",)),
        (OpKind.OPAQUE, "Tile", ()),
        (OpKind.RELU, "Relu", ()),
    ):
        assert moved_from(Op("o", kind, type, ("a",), ("y",))) == expected, type


def test_outputs_that_can_t_be_negative():
    assert never_negative("Relu")
    assert never_negative("Clip", 0.0)
    assert not never_negative("Clip", -1.0)
    assert not never_negative("Clip")
    assert not never_negative("Tanh")


class Rows:
    """A `TapNamespace` of numpy, of which a graph may not know lengths."""

    def __init__(self, shape):
        self.shape = lambda x: shape

    extremes = staticmethod(lambda x, axes: (x.min(axes), x.max(axes)))
    highest = staticmethod(lambda x, axes: x.max(axes))
    zeros_like = staticmethod(np.zeros_like)
    pair = staticmethod(lambda low, high: np.stack([low, high]).astype(np.float32))
    by_sample = staticmethod(lambda x: x.reshape(len(x), -1))
    second = staticmethod(lambda x, axis: np.moveaxis(x, axis, 1))
    every = staticmethod(lambda x, step: x[:, ::step])
    take = staticmethod(lambda x, places: x[:, places])


TAPS = [Tap("t"), Tap("t", "minmax"), Tap("t", "minmax", 2), Tap("t", "minmax", -1), Tap("t", step=3),
        Tap("t", step=3, axis=1), Tap("t", step=3, axis=2)]  # fmt: skip


@pytest.mark.parametrize("tap", TAPS, ids=str)
def test_taps_hand_out_what_the_core_s_reduction_does(tap):
    x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    for shape in ((2, 4, 5), (None, 4, 5), (None, None, None)):
        assert np.array_equal(handed_out(Rows(shape), x, tap), reduced(x, tap))
    if tap.axis is None:
        assert np.array_equal(handed_out(Rows(None), x, tap), reduced(x, tap))
    else:
        with pytest.raises(ModelError, match="'t' has no known rank"):
            handed_out(Rows(None), x, tap)
    if tap.reduce == "minmax":
        low, high = handed_out(Rows((2, 4, 5)), x, tap, never_negative=True)
        assert not np.any(low)
        assert np.array_equal(high, reduced(x, tap)[1])
