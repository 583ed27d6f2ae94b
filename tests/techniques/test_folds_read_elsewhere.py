"""A batch norm isn't folded where something else reads the tensor between it and the linear op: on no framework."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.backend import Tap
from bitwright.errors import ModelError
from bitwright.graph import FoldBatchNorm, OpKind, SetBias
from bitwright.testing import models
from bitwright.testing.builder import Builder


def behind():
    b = Builder(0)
    x = b.conv("conv", b.input("x", 3, 6, 6), 4, 3, pad=1)
    return b.build(b.binary("sum", "Add", x, b.relu("relu", b.batch_norm("norm", x))))


def before():
    b = Builder(0)
    x = b.batch_norm("norm", b.relu("relu", b.input("x", 4, 6, 6)))
    return b.build(b.binary("sum", "Add", x, b.conv("conv", x, 4, 3, pad=1)))


MODELS = {"behind": behind(), "before": before()}


@pytest.mark.parametrize("where", MODELS)
@pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_fold_is_refused_where_another_op_reads_the_tensor_between(port, where):
    backend, model = port.backend(), port.port(MODELS[where])
    graph = backend.graph(model)
    (norm,) = (op for op in graph if op.kind is OpKind.BATCH_NORM)
    (conv,) = graph.linear_ops
    between = conv.output if where == "behind" else norm.output
    taps, batch = [Tap(t) for t in graph.outputs], port.batch(models.batch(MODELS[where]))
    expected = backend.session(model, taps).run(batch)
    with pytest.raises(ModelError, match=f"'{norm.id}' .* can't be folded into '{conv.id}' .*'{between}' is also read"):
        backend.edit(model, [SetBias(conv.id, np.ones(4, np.float32)), FoldBatchNorm(norm.id, conv.id)])
    found = backend.session(model, taps).run(batch)
    assert all(np.array_equal(found[t], expected[t]) for t in taps)
