"""What is only read as indices, shapes or conditions is never quantized."""

from __future__ import annotations

from bitwright.graph import Graph, Op, OpKind, Param, ParamRole, Tensor
from bitwright.placement import Float, build_plan

TABLE = {ParamRole.WEIGHT: "table"}
DENSE = {ParamRole.WEIGHT: "w"}
INTS = ("int64", "bool")


def plan(*ops, ints=(), outputs=("y",), target="default"):
    """`ops` are (name, kind, type, inputs, outputs, params); what no op makes is an input."""
    made = [Op(name, kind, type, tuple(i), tuple(o), p) for name, kind, type, i, o, p in ops]
    names = dict.fromkeys(t for op in made for t in (*op.data_inputs, *op.outputs))
    inputs = [t for t in names if not any(t in op.outputs for op in made)]
    tensors = {t: Tensor(t, (None, 8), "int64" if t in ints else "float32") for t in names}
    params = {"table": Param("table", (9, 8)), "w": Param("w", (8, 8))}
    return build_plan(Graph(made, tensors, params, inputs, list(outputs)), target)


def embed(ids, out="e"):
    return "embed", OpKind.EMBEDDING, "Gather", [ids], [out], TABLE


def dense(x, out="y"):
    return "dense", OpKind.LINEAR, "Gemm", [x], [out], DENSE


def op(type, inputs, output, kind=OpKind.OPAQUE):
    return f"{type}_{output}", kind, type, inputs, [output], {}


def is_float(found, *names):
    return all(isinstance(found[n].decision, Float) and "indices" in found[n].decision.reason for n in names)


def test_ids_that_arrive_as_floats():
    found = plan(embed("ids"), dense("e"))
    assert is_float(found, "ids") and {"e", "y"} <= set(found.quantized) and found.notes == ()


def test_through_arithmetic_forms_and_casts():
    found = plan(
        op("Reshape", ["x"], "r", OpKind.RESHAPE),
        op("Add", ["r"], "a", OpKind.ADD),
        op("Floor", ["a"], "f", OpKind.ACTIVATION),
        op("Cast", ["f"], "ids"),
        op("Gather", ["table_rows", "ids"], "e", OpKind.SLICE),
        dense("e"),
        ints=("ids",),
    )
    assert is_float(found, "x", "r", "a", "f") and "table_rows" in found.quantized


def test_conditions():
    found = plan(
        op("Greater", ["x"], "on"),
        op("Where", ["on", "a", "b"], "c", OpKind.ELEMENTWISE),
        dense("c"),
        ints=("on",),
    )
    assert is_float(found, "x") and {"a", "b", "c"} <= set(found.quantized)


def test_a_signal_that_is_also_compared_keeps_its_grid():
    found = plan(op("Greater", ["x"], "on"), op("Where", ["on", "x", "x"], "c", OpKind.ELEMENTWISE), dense("c"),
                 ints=("on",))  # fmt: skip
    assert "x" in found.quantized and found.notes == ()


def test_a_signal_that_is_also_an_index_is_noted():
    for tail in ([embed("x")], [op("Cast", ["x"], "ids"), embed("ids")]):
        found = plan(*tail, dense("x", "d"), op("Add", ["e", "d"], "y", OpKind.ADD), ints=("ids",))
        assert is_float(found, "x") and {"e", "d"} <= set(found.quantized)
        (note,) = found.notes
        assert note.startswith("x: ") and "'dense'" in note


def test_what_an_index_is_chosen_from_is_a_signal():
    found = plan(dense("x", "scores"), op("ArgMax", ["scores"], "best"), embed("best", "y"), ints=("best",))
    assert {"x", "scores"} <= set(found.quantized)


def test_pixels_that_are_cast_are_a_signal():
    """An image network's last cast to whole numbers."""
    found = plan(dense("x", "image"), op("Cast", ["image"], "y"), ints=("y",))
    assert {"x", "image"} <= set(found.quantized)


def test_what_is_written_into_a_tensor_is_a_signal():
    """The second operand of a slice's update is values; indices of a scatter are whole numbers."""
    found = plan(dense("x", "new"), op("ScatterND", ["cache", "new"], "y", OpKind.ELEMENTWISE))
    assert {"cache", "new", "y"} <= set(found.quantized)


def test_overrides_go_before():
    graph = Graph(
        [Op("embed", OpKind.EMBEDDING, "Gather", ("ids",), ("y",), TABLE)],
        {t: Tensor(t, (None, 8)) for t in ("ids", "y")}, {"table": Param("table", (9, 8))}, ["ids"], ["y"],
    )  # fmt: skip
    assert build_plan(graph, "default", overrides={"ids": "uint16"}).spec("ids").bits == 16
