"""Small models that stand for something enormous are opened or refused at once, and cost no memory."""

import resource
import sys
import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright.errors import ModelError
from bitwright_onnx.backend import OnnxBackend

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
    "constant of shape": ([node("ConstantOfShape", ["k"], ["f"]), *SUM], {"k": [10**6, 10**6]}),
    "expand": ([node("Expand", ["one", "k"], ["r"]), CAST, *SUM], {"k": [10**6, 10**6]}),
    "tile": ([node("Tile", ["v", "k"], ["r"]), CAST, *SUM], {"k": [10**11], "v": [1]}),
    "outer product": ([node("Reshape", ["v", "k"], ["c"]), node("Mul", ["v", "c"], ["r"]), CAST, *SUM],
                      {"v": np.arange(200_000), "k": [-1, 1]}),
    "one-hot": ([node("OneHot", ["v", "k", "on"], ["f"]), *SUM],
                {"v": np.arange(10**5), "k": 10**6, "on": np.array([0, 1], np.float32)}),
    "pad": ([node("Pad", ["v", "k"], ["f"]), *SUM], {"v": np.ones(1, np.float32), "k": [0, 10**10]}),
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


@pytest.fixture
def little_memory():
    if not sys.platform.startswith("linux"):
        pytest.skip("needs RLIMIT_AS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_fold_to_gigabytes_are_left_to_be_computed(name, little_memory):
    started = time.process_time()
    backend = OnnxBackend()
    graph = backend.graph(backend.adopt(model(*BOMBS[name])))
    assert time.process_time() - started < 5
    assert graph.outputs == ("y",)


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


def test_functions_are_not_written_out_without_end():
    backend = OnnxBackend()
    call = [node("f3", ["x"], ["y"], domain="f")]
    opened = backend.adopt(model(call, {}, functions(4, 3), "f"))
    assert sum(n.op_type == "Relu" for n in opened.graph) == 27
    with pytest.raises(ModelError, match="nodes"):
        backend.adopt(model([node("f11", ["x"], ["y"], domain="f")], {}, functions(12, 10), "f"))
    made = helper.make_function(
        "f", "f0", ["a"], ["b"], [node("f0", ["a"], ["b"], domain="f")], [helper.make_opsetid("f", 1)]
    )
    with pytest.raises(ModelError, match="itself"):
        backend.adopt(model([node("f0", ["x"], ["y"], domain="f")], {}, [made], "f"))
