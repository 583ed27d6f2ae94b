"""Matchers, chains, walks, foldable batch norms and composite patterns."""

import numpy as np
import pytest

from bitwright.graph import (
    Graph,
    Op,
    OpKind,
    Param,
    ParamRole,
    Tensor,
    batch_norm_fold,
    chain,
    downstream,
    kind,
    op_type,
    successor,
    upstream,
    where,
)
from bitwright.graph._composites import layer_normalizations, matmul_adds, rms_normalizations
from bitwright.graph._patterns import identity, linear, nothing, optional
from bitwright.testing.builder import Builder

act = kind(OpKind.RELU, OpKind.CLIPPED_RELU)


def straight():
    b = Builder()
    x = b.conv("conv1", b.input("x", 3, 8, 8), 4, pad=1)
    x = b.identity("drop", b.relu("relu", x))
    x = b.conv("conv2", x, 4, pad=1)
    return b, x


def test_matchers_compose():
    b, x = straight()
    g = b.build(x).graph
    names = lambda m: [op.id for op in m.find(g)]
    assert names(kind(OpKind.CONV)) == ["conv1", "conv2"]
    assert names(kind(OpKind.CONV) | op_type("Relu")) == ["conv1", "relu", "conv2"]
    assert names(linear & where(lambda _, op: op.id.endswith("2"))) == ["conv2"]
    assert names(~(linear | act)) == ["drop"]
    assert names(nothing) == []
    assert repr(kind(OpKind.CONV) | op_type("Gemm", "MatMul")) == "(conv | Gemm | MatMul)"


def test_opaque_ops_have_no_type():
    b = Builder()
    g = b.build(b.opaque("o", b.input("x", 4), type="Relu")).graph
    assert list(op_type("Relu").find(g)) == []


def test_chain_passes_identities_and_names_its_ops():
    b, x = straight()
    g = b.build(x).graph
    pair = chain(linear.named("first"), optional(act.named("act")), linear.named("second"))
    (match,) = pair.find(g)
    assert dict(match) == {"first": g.op("conv1"), "act": g.op("relu"), "second": g.op("conv2")}
    assert [op.id for op in match.ops] == ["conv1", "relu", "conv2"]
    assert [op.id for op in match.path] == ["conv1", "relu", "drop", "conv2"]
    assert match.inner == ("conv1.output", "relu.output", "drop.output")
    assert match.output == "conv2.output"
    assert list(chain(linear, act, linear, through=nothing).find(g)) == []


def test_optional_elements_backtrack():
    b = Builder()
    x = b.relu("r2", b.relu("r1", b.conv("c", b.input("x", 3, 8, 8), 4)))
    g = b.build(x).graph
    relu = op_type("Relu")
    (match,) = chain(linear, optional(relu.named("a")), relu.named("b")).find(g)
    assert (match["a"].id, match["b"].id) == ("r1", "r2")
    (match,) = chain(linear, optional(relu.named("a")), optional(relu.named("b")), optional(relu.named("c"))).find(g)
    assert set(match) == {"a", "b"}
    (match,) = chain(linear, optional(op_type("Clip").named("no")), relu, relu).find(g)
    assert "no" not in match
    (match,) = (chain(linear, op_type("Clip")) | chain(linear, relu)).find(g)
    assert match.ops[-1].id == "r1"


@pytest.mark.parametrize("how", ["branch", "output", "twice", "second output"])
def test_chains_end_where_the_flow_branches(how):
    b = Builder()
    y = b.conv("c", b.input("x", 3, 8, 8), 4)
    z = b.relu("r", y)
    if how == "branch":
        outputs = [z, b.activation("s", y, "Sigmoid")]
    elif how == "output":
        outputs = [z, y]
    elif how == "twice":
        outputs = [b.binary("add", "Add", y, y)]
    else:
        split = Op("split", OpKind.SPLIT, "Split", (y,), ("p", "q"))
        r = Op("r", OpKind.RELU, "Relu", ("p",), ("r.o",))
        tensors = {t: Tensor(t, (None, 4)) for t in (y, "p", "q", "r.o")}
        g = Graph([split, r], tensors, {}, [y], ["r.o", "q"])
        assert successor(g, g.op("split")) is None
        return
    g = b.build(*outputs).graph
    assert list(chain(linear, where(lambda *_: True)).find(g)) == []
    assert downstream(g, g.op("c")) is None


def test_a_chain_needs_a_first_element():
    for elements in ((), (optional(act), linear)):
        with pytest.raises(ValueError, match="chain"):
            chain(*elements)


def test_walks():
    b, x = straight()
    g = b.build(x).graph
    assert downstream(g, g.op("relu")).id == "conv2"
    assert downstream(g, g.op("relu"), nothing).id == "drop"
    assert downstream(g, g.op("conv2")) is None
    assert upstream(g, "drop.output").id == "relu"
    assert upstream(g, "drop.output", identity | act).id == "conv1"
    assert upstream(g, "x") is None
    assert upstream(g, "conv2.output") is None  # a model output has readers outside
    assert upstream(g, "conv2.output", linear=False).id == "conv2"


def fold_of(build):
    b = Builder()
    g = b.build(build(b, b.input("x", 4, 8, 8))).graph
    fold = batch_norm_fold(g, g.op("bn"))
    return None if fold is None else (fold.direction, fold.into.id)


def test_batch_norms_fold_backward():
    assert fold_of(lambda b, x: b.batch_norm("bn", b.conv("c", x, 4))) == ("backward", "c")
    assert fold_of(lambda b, x: b.batch_norm("bn", b.conv("c", x, 4, groups=4))) == ("backward", "c")
    assert fold_of(lambda b, x: b.batch_norm("bn", b.conv("c", x, 6, transposed=True))) == ("backward", "c")
    depthwise = lambda b, x: b.batch_norm("bn", b.conv("c", x, 4, groups=4, transposed=True))
    assert fold_of(depthwise) == ("backward", "c")
    assert fold_of(lambda b, x: b.batch_norm("bn", b.conv("c", x, 4, groups=2, transposed=True))) is None
    # backward wins over forward
    assert fold_of(lambda b, x: b.conv("c2", b.batch_norm("bn", b.conv("c1", x, 4)), 4)) == ("backward", "c1")


def test_batch_norms_fold_forward_without_padding_only():
    assert fold_of(lambda b, x: b.conv("c", b.batch_norm("bn", x), 4)) == ("forward", "c")
    assert fold_of(lambda b, x: b.conv("c", b.batch_norm("bn", x), 4, pad=1)) is None
    assert fold_of(lambda b, x: b.conv("c", b.batch_norm("bn", x), 4, groups=2)) is None
    assert fold_of(lambda b, x: b.conv("c", b.batch_norm("bn", x), 4, transposed=True)) is None
    assert fold_of(lambda b, x: b.relu("r", b.batch_norm("bn", b.relu("r0", x)))) is None
    assert fold_of(lambda b, x: b.binary("a", "Add", x, b.batch_norm("bn", b.binary("s", "Add", x, x)))) is None


def test_shared_weights_do_not_fold():
    w = np.ones((4, 4, 1, 1))

    def build(b, x):
        y = b.batch_norm("bn", b.conv("c", x, 4, 1, weight=w, bias=False))
        params = {ParamRole.WEIGHT: "c.weight"}
        return b.op("again", OpKind.CONV, "Conv", (y,), b.shape(y), params=params)

    assert fold_of(build) is None  # fmt: skip


def mean(b, name, x):
    return b.op(name, OpKind.AVERAGE_POOL, "ReduceMean", (x,), (*b.shape(x)[:-1], 1))


def unary(b, name, type, x, constant=None):
    params = {} if constant is None else {ParamRole.CONSTANT: b.param(f"{name}.constant", np.float32(constant))}
    return b.op(name, OpKind.ELEMENTWISE, type, (x,), b.shape(x), params=params)


def layer_norm(b, x, *, square="Pow", scaled="Div", affine=True, twice=False):
    d = b.binary("sub", "Sub", x, mean(b, "mean", x))
    d2 = b.binary("sub2", "Sub", x, mean(b, "mean2", x)) if twice else d
    sq = unary(b, "square", "Pow", d2, 2.0) if square == "Pow" else b.binary("square", "Mul", d2, d2)
    std = b.activation("sqrt", b.binary("eps", "Add", mean(b, "var", sq), np.float32(1e-5)), "Sqrt")
    if scaled == "Div":
        y = b.binary("norm", "Div", d, std)
    else:
        y = b.binary("norm", "Mul", d, unary(b, "inverse", "Reciprocal", std))
    if affine:
        y = b.binary("beta", "Add", b.binary("gamma", "Mul", y, np.ones(8)), np.zeros(8))
    return y


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("scaled", ["Div", "Reciprocal"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("twice", [True, False])
def test_layer_normalization_is_recognized(square, scaled, affine, twice):
    b = Builder()
    y = layer_norm(b, b.input("x", 5, 8), square=square, scaled=scaled, affine=affine, twice=twice)
    g = b.build(b.relu("r", y)).graph
    (found,) = layer_normalizations(g)
    assert found.source == "x" and found.output.id == ("beta" if affine else "norm")
    assert {op.id for op in found.ops} == {op.id for op in g} - {"r"}
    assert (found.gamma is not None) == affine == (found.beta is not None)
    assert list(rms_normalizations(g)) == []


def test_layer_normalization_with_an_inner_tensor_read_outside():
    b = Builder()
    y = layer_norm(b, b.input("x", 5, 8))
    g = b.build(y, b.relu("r", "sub.output")).graph
    assert list(layer_normalizations(g)) == []


@pytest.mark.parametrize("form", ["div", "reciprocal", "one over", "power"])
def test_rms_normalization_is_recognized(form):
    b = Builder()
    x = b.relu("r", b.input("x", 5, 8))
    v = b.binary("eps", "Add", mean(b, "mean", unary(b, "square", "Pow", x, 2.0)), np.float32(1e-6))
    if form == "power":
        y = b.binary("norm", "Mul", x, unary(b, "root", "Pow", v, -0.5))
    else:
        root = b.activation("root", v, "Sqrt")
        if form == "div":
            y = b.binary("norm", "Div", x, root)
        else:
            inverse = unary(
                b, "inv", "Reciprocal" if form == "reciprocal" else "Div", root, None if form == "reciprocal" else 1.0
            )
            y = b.binary("norm", "Mul", inverse, x)
    g = b.build(b.binary("gamma", "Mul", y, np.ones(8))).graph
    (found,) = rms_normalizations(g)
    assert (found.source, found.gamma.id, found.beta) == ("r.output", "gamma", None)
    assert found.inner == tuple(op.output for op in g.ops[1:-1])


def test_matmul_add():
    x, w, c = Tensor("x", (None, 4)), Param("w", (8, 4)), Param("c", (8,))
    matmul = Op("m", OpKind.LINEAR, "MatMul", ("x",), ("y",), {ParamRole.WEIGHT: "w"})
    add = Op("a", OpKind.ADD, "Add", ("y",), ("z",), {ParamRole.CONSTANT: "c"})
    tensors = {"x": x, "y": Tensor("y", (None, 8)), "z": Tensor("z", (None, 8))}
    g = Graph([matmul, add], tensors, {"w": w, "c": c}, ["x"], ["z"])
    (found,) = matmul_adds(g)
    assert (found.ops, found.inner, found.beta) == ((matmul, add), ("y",), add)
    residual = Op("a", OpKind.ADD, "Add", ("y", "y"), ("z",))
    assert list(matmul_adds(Graph([matmul, residual], tensors, {"w": w, "c": c}, ["x"], ["z"]))) == []
