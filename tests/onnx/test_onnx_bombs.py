"""Small models that stand for something enormous are opened or refused at once, and cost no memory."""

import resource
import sys
import time

import numpy as np
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import InlinePass

from bitwright.errors import ModelError
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.capture.inlining import Inlining

node = helper.make_node
SUM = [node("ReduceSum", ["f"], ["s"], keepdims=0), node("Add", ["x", "s"], ["y"])]
CAST = node("Cast", ["r"], ["f"], to=TensorProto.FLOAT)
BOMBS = {
    "range": ([node("Range", ["zero", "n", "one"], ["r"]), CAST, *SUM], {"n": 10**11}),
    "sizes multiplied": ([node("Mul", ["k", "k"], ["n"]), node("Range", ["zero", "n", "one"], ["r"]), CAST, *SUM],
                         {"k": 10**6}),
    "size of an input": ([node("Shape", ["x"], ["sh"]), node("Gather", ["sh", "one"], ["g"]),
                          node("Mul", ["g", "k"], ["n"]), node("Range", ["zero", "n", "one"], ["r"]), CAST, *SUM],
                         {"k": 10**11}),
    "range of less": ([node("Range", ["zero", "n", "one"], ["r"]), CAST, *SUM], {"n": 3 * 10**8}),
    "one axis": ([node("Reshape", ["x", "k"], ["c"]), node("Cast", ["c"], ["r"], to=TensorProto.INT64), CAST, *SUM],
                 {"k": [3 * 10**8]}),
    "constant of shape": ([node("ConstantOfShape", ["k"], ["f"]), *SUM], {"k": [10**6, 10**6]}),
    "expand": ([node("Expand", ["one", "k"], ["r"]), CAST, *SUM], {"k": [10**6, 10**6]}),
    "tile": ([node("Tile", ["v", "k"], ["r"]), CAST, *SUM], {"k": [10**11], "v": [1]}),
    "outer product": ([node("Reshape", ["v", "k"], ["c"]), node("Mul", ["v", "c"], ["r"]), CAST, *SUM],
                      {"v": np.arange(200_000), "k": [-1, 1]}),
    "one-hot": ([node("OneHot", ["v", "k", "on"], ["f"]), *SUM],
                {"v": np.arange(10**5), "k": 10**6, "on": np.array([0, 1], np.float32)}),
    "pad": ([node("Pad", ["v", "k"], ["f"]), *SUM], {"v": np.ones(1, np.float32), "k": [0, 10**10]}),
    "concatenation": ([*[node("Concat", [f"k{i}"] * 2, [f"k{i + 1}"], axis=0) for i in range(36)],
                       node("Identity", ["k36"], ["f"]), *SUM], {"k0": np.ones(1, np.float32)}),
    "products": ([node("Expand", ["v", "k"], ["p0"]),
                  *[node("MatMul", [f"p{i}"] * 2, [f"p{i + 1}"]) for i in range(400)], node("Neg", ["p400"], ["f"]),
                  *SUM], {"v": np.ones((1, 1), np.float32), "k": [900, 900]}),
    "many": ([node("Expand", ["v", "k"], ["e"]), *[node("Neg", ["e"], [f"e{i}"]) for i in range(100)],
              node("Sum", [f"e{i}" for i in range(100)], ["f"]), *SUM],
             {"v": np.ones((1, 1), np.float32), "k": [3000, 3000]}),
    "resize": ([node("Resize", ["v", "", "", "k"], ["f"], mode="nearest"), *SUM],
               {"v": np.ones((1, 1, 1, 1), np.float32), "k": [1, 1, 10**5, 10**5]}),
}  # fmt: skip


def model(nodes, arrays, functions=(), domain=""):
    kept = {"zero": 0, "one": 1, **arrays}
    kept = {k: np.asarray(v) for k, v in kept.items() if any(k in n.input for n in nodes)}
    graph = helper.make_graph(
        nodes, "bomb",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in kept.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def opened(proto):
    """Open a model; resident memory beyond what there was, in MB, and seconds."""
    held, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    backend = OnnxBackend()
    assert backend.graph(backend.adopt(proto)).outputs == ("y",)
    seconds = time.process_time() - started
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024, seconds


@pytest.mark.skipif(sys.platform == "win32", reason="measures by getrusage")
@pytest.mark.parametrize("stated", [False, True], ids=["as it is", "small by its own account"])
@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_fold_to_gigabytes_are_left_to_be_computed(name, stated):
    proto = model(*BOMBS[name])
    if stated:
        types = {"r": TensorProto.INT64, "n": TensorProto.INT64, "sh": TensorProto.INT64, "g": TensorProto.INT64}
        for output in (o for n in proto.graph.node for o in n.output if o not in ("s", "y")):
            kind = types.get(output, TensorProto.FLOAT)
            proto.graph.value_info.append(helper.make_tensor_value_info(output, kind, [4]))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, limits[1]))
    try:
        megabytes, seconds = opened(proto)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert seconds < 2
    assert megabytes < 200


def test_ordinary_constants_are_still_folded():
    nodes = [
        node("Range", ["zero", "n", "one"], ["r"]), CAST, node("Unsqueeze", ["f", "zeros"], ["u"]),
        node("Expand", ["u", "k"], ["e"]), node("Mul", ["e", "e"], ["square"]), node("Add", ["x", "square"], ["y"]),
    ]  # fmt: skip
    backend = OnnxBackend()
    opened = backend.adopt(model(nodes, {"n": 4, "zeros": [0], "k": [3, 4]}))
    assert [n.op_type for n in opened.graph] == ["Add"]
    assert np.array_equal(opened.graph.initializers["square"].const_value.numpy(), np.tile(np.arange(4.0) ** 2, (3, 1)))


def functions(depth, calls):
    made = [helper.make_function("f", "f0", ["a"], ["b"], [node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)])]
    for level in range(1, depth):
        body = [node(f"f{level - 1}", [f"t{i}" if i else "a"], [f"t{i + 1}"], domain="f") for i in range(calls)]
        body.append(node("Identity", [f"t{calls}"], ["b"]))
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        made.append(helper.make_function("f", f"f{level}", ["a"], ["b"], body, opsets))
    return made


def test_functions_that_are_called_often_are_written_out_soon_and_named_as_ever():
    proto = model([node("f6", ["x"], ["y"], domain="f")], {}, functions(7, 3), "f")
    theirs, ours = onnx_ir.from_proto(proto), onnx_ir.from_proto(proto)
    started = time.process_time()
    Inlining()(ours)
    assert time.process_time() - started < 0.5  # onnx-ir's own takes time by the square of calls
    InlinePass()(theirs)
    named = [[(n.name, [o.name for o in n.outputs]) for n in m.graph] for m in (ours, theirs)]
    assert named[0] == named[1]


def test_an_onnx_ir_that_keeps_names_elsewhere_inlines_by_itself(monkeypatch):
    """As 0.1.14 and 0.1.15 do, which pyproject.toml allows."""
    ours, theirs = Inlining(), ([], [])
    monkeypatch.setattr(InlinePass, "_instantiate_call", lambda self, call, where: theirs)
    del ours._used_node_names
    assert ours._instantiate_call(node("f0", ["x"], ["y"], domain="f"), None) is theirs


def test_functions_are_not_written_out_without_end():
    backend = OnnxBackend()
    call = [node("f3", ["x"], ["y"], domain="f")]
    opened = backend.adopt(model(call, {}, functions(4, 3), "f"))
    assert sum(n.op_type == "Relu" for n in opened.graph) == 27
    for many in (functions(12, 10), functions(9, 3)):
        with pytest.raises(ModelError, match="nodes"):
            backend.adopt(model([node(many[-1].name, ["x"], ["y"], domain="f")], {}, many, "f"))
    made = helper.make_function(
        "f", "f0", ["a"], ["b"], [node("f0", ["a"], ["b"], domain="f")], [helper.make_opsetid("f", 1)]
    )
    with pytest.raises(ModelError, match="itself"):
        backend.adopt(model([node("f0", ["x"], ["y"], domain="f")], {}, [made], "f"))


@pytest.mark.parametrize("constant", [False, True], ids=["initializer", "node"])
def test_sizes_in_branches_are_not_written_out(constant):
    """ONNX's data propagation goes into the branches of an If, whatever the condition."""

    def branch(side):
        names = [f"{n}{side}" for n in ("zero", "n", "one", "r", "f", "s")]
        values = {names[0]: 0, names[1]: 10**8, names[2]: 1}
        nodes = [
            node("Range", names[:3], [names[3]]), node("Cast", [names[3]], [names[4]], to=TensorProto.FLOAT),
            node("ReduceSum", [names[4]], [names[5]], keepdims=0),
        ]  # fmt: skip
        if constant:
            nodes = [*(node("Constant", [], [k], value_int=v) for k, v in values.items()), *nodes]
        arrays = [] if constant else [numpy_helper.from_array(np.array(v), k) for k, v in values.items()]
        output = helper.make_tensor_value_info(names[5], TensorProto.FLOAT, None)
        return helper.make_graph(nodes, f"b{side}", [], [output], arrays)

    choice = node("If", ["yes"], ["c"], then_branch=branch(0), else_branch=branch(1))
    megabytes, seconds = opened(model([choice, node("Add", ["x", "c"], ["y"])], {"yes": np.array(True)}))
    assert seconds < 2
    assert megabytes < 200


def test_functions_that_nothing_calls_are_not_written_out():
    many = functions(26, 2)
    opened = OnnxBackend().adopt(model([node("Relu", ["x"], ["y"])], {}, many, "f"))
    assert [n.op_type for n in opened.graph] == ["Relu"]


def test_a_node_has_so_many_operands_and_no_more():
    nodes = [node("Sum", ["x"] * 5000, ["y"])]
    with pytest.raises(ModelError, match="5,000 inputs"):
        OnnxBackend().adopt(model(nodes, {}))
