"""A matrix that is read as it is and transposed is one parameter: in the graph, in the simulation and in the file."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright import QuantSim
from bitwright.bundle import check_bundle
from bitwright.graph import SetBias, SetParams, SplitSharedParam
from bitwright.verify import sqnr, verify
from bitwright_onnx.backend import OnnxBackend

node = helper.make_node
BACKEND = OnnxBackend()
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(40, 16)).astype(np.float32)
IDS = RANDOM.integers(0, 40, (16, 12))


def model(kind="gather"):
    arrays = {"table": TABLE}
    turn = node("Transpose", ["table"], ["right"], perm=[1, 0])
    name, type, shape = "ids", TensorProto.INT64, ["n", 12]
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("Relu", ["e"], ["r"])]
    if kind == "gather":
        nodes += [turn, node("MatMul", ["r", "right"], ["y"])]
    elif kind == "two heads on one transpose":
        nodes += [turn, node("MatMul", ["r", "right"], ["a"]), node("MatMul", ["e", "right"], ["b"])]
        nodes += [node("Add", ["a", "b"], ["y"])]
    elif kind == "gemm":
        nodes += [turn, node("Reshape", ["r", "rows"], ["f"])]
        nodes += [node("Gemm", ["f", "right"], ["y"])]
        arrays["rows"] = np.array([-1, 16])
    else:  # nothing reads the table as it is
        name, type, shape = "x", TensorProto.FLOAT, ["n", 12, 16]
        other = node("Transpose", ["table"], ["other"])
        nodes = [node("Relu", ["x"], ["r"]), turn, other, node("MatMul", ["r", "right"], ["a"]),
                 node("MatMul", ["x", "other"], ["b"]), node("Add", ["a", "b"], ["y"])]  # fmt: skip
    for i, each in enumerate(nodes):
        each.name = f"n{i}_{each.op_type}"
    graph = helper.make_graph(
        nodes, "tied", [helper.make_tensor_value_info(name, type, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(kind):
    return {"x": RANDOM.normal(size=(4, 12, 16)).astype(np.float32)} if kind == "turned only" else {"ids": IDS}


def run(proto, batch):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto.SerializeToString() if isinstance(proto, onnx.ModelProto) else str(proto)
    return ort.InferenceSession(source, options).run(None, batch)[0]


@pytest.mark.parametrize("kind", ["gather", "two heads on one transpose", "gemm", "turned only"])
def test_one_parameter_two_uses(kind, tmp_path):
    proto, batch = model(kind), feeds(kind)
    sim = QuantSim(proto, scheme="minmax").calibrate(batch)
    assert list(sim.graph.params) == ["table"]
    assert len(sim.graph.users("table")) == len(sim.graph.linear_ops) + (kind != "turned only")
    np.testing.assert_array_equal(BACKEND.read(sim.native, ["table"])["table"], TABLE)
    floats, simulated = sim.predict(batch, simulated=False)[0], sim.predict(batch)[0]
    np.testing.assert_allclose(floats, run(proto, batch), atol=1e-5)
    bundle = sim.export(tmp_path, name="m")
    assert sqnr(simulated, run(bundle.files["qdq"], batch)) > 100
    stored = [i.data_type for i in onnx.load(bundle.files["qdq"]).graph.initializer if np.prod(i.dims) == 640]
    assert stored == [TensorProto.INT8]
    assert check_bundle(sim.graph, sim.plan, bundle.files["encodings"]) == []
    assert verify(tmp_path, batch).problems == []


def test_shared_blocks_are_stored_once_and_read_both_ways(tmp_path):
    nodes = [
        node("Gemm", ["x", "table"], ["a"], transB=1, name="gemm"),
        node("Transpose", ["table"], ["right"], name="turn"),
        node("MatMul", ["x", "right"], ["b"], name="product"),
        node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    graph = helper.make_graph(
        nodes, "blocks", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [numpy_helper.from_array(TABLE, "table")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    batch = {"x": RANDOM.normal(size=(8, 16)).astype(np.float32)}
    sim = QuantSim(proto, weights="int4:block8").calibrate(batch)
    bundle = sim.export(tmp_path, name="m")
    assert sqnr(sim.predict(batch)[0], run(bundle.files["qdq"], batch)) > 100
    stored = [i for i in onnx.load(bundle.files["qdq"]).graph.initializer if np.prod(i.dims) == 640]
    assert [i.data_type for i in stored] == [TensorProto.INT4]


def test_edits_of_a_shared_matrix():
    opened, batch = BACKEND.adopt(model("two heads on one transpose")), feeds("gather")
    before = run(model("two heads on one transpose"), batch)
    head = BACKEND.graph(opened).linear_ops[0]

    def outputs(edited):
        return run(ir.to_proto(edited), batch)

    doubled = BACKEND.edit(opened, [SetParams({"table": TABLE * 2})])
    np.testing.assert_allclose(outputs(doubled), before * 4, rtol=1e-4, atol=1e-4)
    bias = RANDOM.normal(size=40).astype(np.float32)
    np.testing.assert_allclose(outputs(BACKEND.edit(opened, [SetBias(head.id, bias)])), before + bias, atol=1e-4)
    split = BACKEND.edit(opened, [SplitSharedParam(head.id, "table")])
    np.testing.assert_allclose(outputs(split), before, atol=1e-5)
    own = BACKEND.graph(split).op(head.id).weight
    assert own != "table" and len(BACKEND.graph(split).users("table")) == 2
    alone = BACKEND.edit(split, [SetParams({own: TABLE * 0})])
    assert not np.allclose(outputs(alone), before) and np.abs(outputs(alone)).max() > 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Gemm", {}), ("Gemm", {"transB": 1})),
        (("Gemm", {"transB": 1}), ("Gemm", {})),
        (("Gemm", {"transB": 1}), ("MatMul", {})),
        (("MatMul", {}), ("Gemm", {"transB": 1})),
    ],
    ids=["straight, transposed", "transposed, straight", "transposed, MatMul", "MatMul, transposed"],
)
def test_scales_of_the_other_axis_are_not_taken_for_those_of_channels(first, second, tmp_path):
    """A square matrix has as many columns as rows, so that a default session can't see the difference."""
    sizes = np.logspace(-1, 0, 16, dtype=np.float32)
    arrays = {"w": RANDOM.normal(size=(16, 16)).astype(np.float32) * sizes * sizes[:, None]}
    nodes = [
        node(first[0], ["x", "w"], ["h"], name="one", **first[1]),
        node("Relu", ["h"], ["r"], name="relu"),
        node(second[0], ["r", "w"], ["y"], name="two", **second[1]),
    ]
    graph = helper.make_graph(
        nodes, "square", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )  # fmt: skip
    sim = QuantSim(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    data = {"x": RANDOM.normal(size=(16, 16)).astype(np.float32)}
    file = sim.calibrate(data).export(tmp_path).files["qdq"]
    (got,) = ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, data)
    assert sqnr(sim.predict(data)[0], got) > 60
    assert verify(tmp_path, data).problems == []
