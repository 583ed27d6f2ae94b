"""Tables in which rows are looked up: what is read of large ones, and which are of masks."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from bitwright.dataflow import FlowModel, GraphBuilder
from bitwright.graph import OpKind
from bitwright.placement import Extent, NodeView, masks
from bitwright.placement._masks import _SAMPLED

S = 6
FUTURE = np.triu(np.ones((S, S), bool), 1)


class Recorded:
    """A table that says which of its rows were read."""

    def __init__(self, *shape, masked=()):
        self.shape, self.masked = shape, masked
        self.read = []

    def __getitem__(self, rows):
        self.read.append(range(*rows.indices(self.shape[0])))
        values = np.zeros((len(self.read[-1]), *self.shape[1:]), np.float32)
        values[[row in self.masked for row in self.read[-1]]] = -1e4
        return values


def test_of_a_large_table_few_rows_are_read_all_over_it():
    table = Recorded(50_000, 4096)
    start = time.process_time()
    assert Extent.of_table(table).largest == 0
    assert time.process_time() - start < 5  # 0.1 s; the whole takes minutes
    rows = list(itertools.chain(*table.read))
    assert len(rows) == len(set(rows)) and 0 in rows and 49_999 in rows
    assert len(rows) * 4096 <= _SAMPLED
    assert max(b[0] - a[-1] for a, b in itertools.pairwise(table.read)) < 50_000 / 10


@pytest.mark.parametrize("masked", [range(4000), range(46_000, 50_000), range(20_000, 24_000)])
def test_masks_anywhere_in_a_large_table_are_found(masked):
    extent = Extent.of_table(Recorded(50_000, 4096, masked=masked))
    assert extent.binary and extent.largest == 1e4


@pytest.mark.parametrize("shape", [(), (0, 4), (4, 0), (3,), (1, 2**22 + 1), (2**22 + 1,), (2**21, 3)])
def test_tables_of_any_shape(shape):
    values = np.zeros(shape, np.float32)
    values.reshape(-1)[-1:] = -1e4
    assert Extent.of_table(values).largest == (1e4 if values.size else 0)
    assert Extent.of_table(values).scalar == (values.size == 1)


TABLES = {
    "zeros and one": (np.where(FUTURE, -1e4, 0), {"Softmax", "Sigmoid", "ReduceMax", ""}),
    "zeros and minus infinity": (np.where(FUTURE, -np.inf, 0), {"Softmax", "Sigmoid", "ReduceMax", ""}),
    "with a slope": (np.where(FUTURE, -1e4, -0.1 * np.arange(S)), {"Softmax", "Sigmoid"}),
    "a codebook": (np.random.default_rng(0).standard_normal((S, S)), set()),
    "flags": (FUTURE.astype(float), set()),
}


@pytest.mark.parametrize("reader", ["Softmax", "Sigmoid", "ReduceMax", ""])
@pytest.mark.parametrize("table", TABLES)
def test_who_reads_what_a_table_is_added_to_decides(table, reader):
    values, masked_for = TABLES[table]
    kinds = {"Softmax": OpKind.SOFTMAX, "Sigmoid": OpKind.ACTIVATION, "ReduceMax": OpKind.MAX_POOL}
    steps = [
        NodeView(OpKind.SLICE, "Gather", ("table", "rows"), ("found",)),
        NodeView(OpKind.RELU, "Relu", ("x",), ("signal",)),
        NodeView(OpKind.ADD, "Add", ("signal", "found"), ("sum",)),
    ]
    if reader:
        steps.append(NodeView(kinds[reader], reader, ("sum",), ("y",)))
    found = masks(steps, ["x", "rows"], ["y" if reader else "sum"], {"table": Extent.of(values)},
                  lambda name: name not in ("rows", "table"))  # fmt: skip
    assert ("sum" in found) == (reader in masked_for)
    assert ("found" in found) == ("sum" in found)


@pytest.mark.parametrize(("table", "masked"), [(FUTURE.astype(float), True), (FUTURE + 0.25, False)])
def test_flags_that_are_looked_up_are_conditions_and_words_are_not(table, masked):
    """(1 − m)·−100 masks; words scaled by √1024 don't, whatever they are added to."""
    steps = [
        NodeView(OpKind.SLICE, "Gather", ("table", "rows"), ("found",)),
        NodeView(OpKind.MUL, "Mul", ("found", "factor"), ("scaled",)),
        NodeView(OpKind.RELU, "Relu", ("x",), ("signal",)),
        NodeView(OpKind.ADD, "Add", ("signal", "scaled"), ("sum",)),
        NodeView(OpKind.SOFTMAX, "Softmax", ("sum",), ("y",)),
    ]
    constants = {"table": Extent.of(table), "factor": Extent.of(-100.0)}
    found = masks(steps, ["x", "rows"], ["y"], constants, lambda name: name not in ("rows", "table", "factor"))
    assert ("sum" in found) == masked


@pytest.mark.parametrize("value", [-1e4, -np.inf, -2.0])
def test_the_builder_of_dataflow_backends_looks_at_tables(value):
    b = GraphBuilder()
    x, rows = b.input("x", (None, S, S)), b.input("rows", (None, S), "int64")
    table = b.param("table", np.where(FUTURE, value, 0).astype(np.float32))
    (found,) = b.op("Gather", [table, rows], [(None, S, S)], lambda t, r: [t[r]], name="lookup")
    (signal,) = b.op("Relu", [x], [(None, S, S)], lambda x: [np.maximum(x, 0)])
    (scores,) = b.op("Add", [signal, found], [(None, S, S)], lambda a, c: [a + c], name="add")
    (y,) = b.op("Softmax", [scores], [(None, S, S)], lambda s: [np.exp(s)])
    graph = b.build(FlowModel, [y]).graph
    lookup = next(op for op in graph if op.type == "Gather")
    assert lookup.kind is OpKind.EMBEDDING
    assert graph.tensors[lookup.output].mask == (value < -100)


def test_indices_and_bounds_are_no_masks():
    """Numbers beyond 1,000 that say which values are taken, from a signal that a softmax reads."""
    b = GraphBuilder()
    x, more = b.input("x", (None, 2000)), b.input("more", (None, 2))
    (signal,) = b.op("Relu", [x], [(None, 2000)], lambda x: [np.maximum(x, 0)])
    indices = b.constant(np.array([0, 1999]))
    (taken,) = b.op("Gather", [signal, indices], [(None, 2)], lambda x, i: [x[:, i]], attributes={"axis": 1})
    (other,) = b.op("Relu", [more], [(None, 2)], lambda x: [np.maximum(x, 0)])
    (scores,) = b.op("Add", [other, taken], [(None, 2)], lambda a, c: [a + c])
    (y,) = b.op("Softmax", [scores], [(None, 2)], lambda s: [np.exp(s)])
    assert not any(t.mask for t in b.build(FlowModel, [y]).graph.tensors.values())
