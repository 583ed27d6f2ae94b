"""What an op must have to be computed from its graph: operands in order, what lacks, equality, files, the guide."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bitwright.graph import (
    NEEDS,
    ActivationAttrs,
    AxisAttrs,
    Call,
    Constant,
    ConvAttrs,
    Edit,
    Graph,
    Op,
    OpKind,
    ParamRole,
    PoolAttrs,
    ReplaceActivation,
    Tensor,
    lacking,
    operands,
)
from bitwright.runs import fingerprint
from bitwright.testing.builder import Builder
from bitwright.testing.reference import ReferenceBackend

R, K = ParamRole, OpKind


def op(kind: OpKind, type: str, *inputs, params=(), attrs=None, call=None, native="") -> Op:
    return Op("op", kind, type, inputs or ("x",), ("y",), {r: f"p.{r}" for r in params}, attrs, native, call=call)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (op(K.CONV, "Conv", params=(R.BIAS, R.WEIGHT)), ("x", R.WEIGHT, R.BIAS)),
        (op(K.LINEAR, "Gemm", params=(R.WEIGHT,)), ("x", R.WEIGHT)),
        (op(K.BATCH_NORM, "BatchNormalization", params=(R.MEAN, R.VAR)), ("x", None, None, R.MEAN, R.VAR)),
        (op(K.EMBEDDING, "Gather", params=(R.WEIGHT,)), (R.WEIGHT, "x")),
        (op(K.ADD, "Add", params=(R.CONSTANT,)), ("x", R.CONSTANT)),
        (op(K.ELEMENTWISE, "Sub", params=(R.CONSTANT,), call=Call(operands={0: R.CONSTANT})), (R.CONSTANT, "x")),
        (op(K.ELEMENTWISE, "Where", "c", "x", call=Call(operands={2: Constant(1.0)})), ("c", "x", Constant(1.0))),
        (op(K.RESIZE, "Resize", call=Call(operands={2: Constant([2.0])})), ("x", None, Constant([2.0]))),
        (op(K.RECURRENT, "GRU", "x", None, "h", params=(R.WEIGHT, R.RECURRENT)),
         ("x", R.WEIGHT, R.RECURRENT, None, "h")),
    ],
)  # fmt: skip
def test_operands_stand_in_onnxs_order(made, expected):
    assert operands(made) == expected


def test_constants_are_equal_by_type_and_values():
    assert Constant(1.0) == Constant(np.float32(1)) != Constant(1)
    assert Constant([1, 2]) == Constant(np.array([1, 2])) != Constant([[1, 2]])
    assert Constant(float("nan")) == Constant(float("nan"))
    assert hash(Constant([1, 2])) == hash(Constant([1, 2]))
    assert Constant(1) != 1


TENSORS = {"x": Tensor("x", (None, 4, 4, 4)), "y": Tensor("y", (None, 4, None, None))}
WINDOW = ConvAttrs((2,), (2,), (1,), ((0, 0),))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (op(K.CONV, "Conv"), "it has no parameter weight, no ConvAttrs"),
        (op(K.TRANSPOSE, "Transpose"), "it has no `perm`"),
        (op(K.RESHAPE, "Reshape"), "it has no shape (operand 1)"),
        (op(K.RESHAPE, "Reshape", call=Call(operands={1: Constant([0, -1])})), None),
        (op(K.SLICE, "Slice", call=Call(operands={1: Constant([0])})), "it has no ends (operand 2)"),
        (op(K.MATMUL, "Conv", "x", "z"), "its backend doesn't say how it multiplies (Conv)"),
        (op(K.MATMUL, "Conv", "x", "z", call=Call()), None),
        (op(K.MAX_POOL, "MaxPool", attrs=PoolAttrs()), "it has no window, no axes"),
        (op(K.MAX_POOL, "MaxPool", attrs=PoolAttrs(window=WINDOW)), None),
        (op(K.MAX_POOL, "MaxPool", call=Call({"kernel_shape": (2, 2)})), None),
        (op(K.ELEMENTWISE, "ReduceSum"), "it has no `keepdims`"),
        (op(K.ELEMENTWISE, "ReduceSum", call=Call({"keepdims": 1})), None),
        (op(K.MAX_POOL, "GlobalMaxPool", call=Call()), None),
        (op(K.OPAQUE, "BatchNormalization", *"xzzzz", call=Call()), None),
        (op(K.OPAQUE, "LayerNormalization", "x", "z", call=Call()), None),
        (op(K.SOFTMAX, "Softmax", attrs=AxisAttrs(1)), None),
        (op(K.SOFTMAX, "Softmax", call=Call({"axis": 1})), None),
        (op(K.ACTIVATION, "Clip"), "it has no ActivationAttrs"),
        (op(K.ACTIVATION, "Clip", attrs=ActivationAttrs(0, 1)), None),
        (op(K.LINEAR, "MatMul"), "it has no parameter weight"),
        (op(K.MATMUL, "MatMul", "x", "z"), None),
        (op(K.OPAQUE, "Tanh", native="my.Thing"), "its backend doesn't say what it computes (my.Thing)"),
        (op(K.OPAQUE, "Tanh", call=Call()), None),
        (op(K.RELU, "Relu"), None),
    ],
)  # fmt: skip
def test_what_an_op_lacks(made, reason):
    graph = Graph([made], {**TENSORS, "z": Tensor("z")}, {}, [t for t in (*made.data_inputs,) if t], ["y"])
    assert lacking(made, graph) == reason


def test_a_call_changes_no_fingerprint():
    """Saved runs and states are told by it; what an op computes was the same before a backend said it."""
    plain, told = op(K.RELU, "Relu"), op(K.RELU, "Relu", call=Call({"axis": 1}))
    assert len({fingerprint.of_graph(Graph([o], TENSORS, {}, ["x"], ["y"])) for o in (plain, told)}) == 1


def test_calls_are_kept_in_files_and_go_with_the_op(tmp_path):
    b = Builder()
    x = b.transpose("turn", b.input("x", 3, 4, 4), 0, 2, 3, 1)
    call = Call({"alpha": 0.5, "axes": (1, 2)}, {1: Constant([1, 2]), 2: R.CONSTANT, 3: Constant(0.25)})
    model = b.build(b.op("elu", K.ACTIVATION, "Elu", (x,), (None, 4, 4, 3), call=call))
    backend = ReferenceBackend()
    read = backend.load(backend.save(model, tmp_path / "m.npz")).graph
    assert read.op("elu").call == call
    assert read.op("turn").call == Call({"perm": (0, 2, 3, 1)})
    edits: list[Edit] = [ReplaceActivation("elu", "Relu")]
    assert backend.edit(model, edits).graph.op("elu").call is None


# -- the guide

GUIDE = (Path(__file__).parents[2] / "docs" / "write-a-backend.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    """The guide's table."""
    found: dict[str, list[str]] = {}
    for type, needs in NEEDS.items():
        given = [f"`{needs.record.__name__}`"] if needs.record else []
        given += [f"parameter {role.value}" for role in needs.roles]
        given += [f"`{name}`" for name in needs.attributes]
        given += [f"operand {i}: {what}" for i, what in (needs.operands or {}).items()]
        found.setdefault(f"{', '.join(given)} | {needs.otherwise}", []).append(type)
    return [f"| {', '.join(types)} | {text} |" for text, types in found.items()]


def test_the_guide_lists_what_each_type_must_have():
    text = GUIDE.partition("## What a graph must say to be written as ONNX")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| .* \|$", text, re.M)
    assert [r for r in shown if not r.startswith("| type")] == rows()
