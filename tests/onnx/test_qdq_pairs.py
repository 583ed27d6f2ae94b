"""Pairs read back from a QDQ model, and the check that they are those of the plan."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from bitwright import QuantSim
from bitwright.backend import Bundle, QuantizedArtefact
from bitwright.bundle import check_pairs
from bitwright.calibration import full_table
from bitwright.errors import InputError, ModelError
from bitwright.grids import EncodingTable, encoding_from_range, encoding_of_weights
from bitwright.placement import build_plan
from bitwright_onnx.backend import OnnxBackend


@pytest.fixture
def case(tmp_path):
    """A convolution and its residual sum, exported with made-up activation ranges."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(3, 3, 1, 1)).astype(np.float32), "w")
    bias = onnx.numpy_helper.from_array(rng.normal(size=3).astype(np.float32), "b")
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        onnx.helper.make_node("Add", ["c", "x"], ["y"], "add"),
    ]
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3, 4, 4]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], [weight, bias])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    backend = OnnxBackend()
    native = backend.load(tmp_path / "m.onnx")
    graph = backend.graph(native)
    plan = build_plan(graph, "generic-int8")
    table = {s: encoding_of_weights(backend.read(native, [s])[s], plan.spec(s)) for s in plan.parameters}
    table |= {s: encoding_from_range(plan.spec(s), -1.0, 2.0 + i) for i, s in enumerate(plan.activations)}
    table = full_table(plan, EncodingTable(table))
    backend.export(native, plan, table, tmp_path / "m.qdq.onnx", "qdq")
    return backend, native, Bundle({"qdq": tmp_path / "m.qdq.onnx"}), plan, table


def test_every_site_has_one_pair_on_its_scale(case):
    backend, native, bundle, plan, table = case
    pairs = backend.pairs(bundle)
    assert pairs.keys() == {"x", "w", "b", "c", "y"}
    assert all(len(found) == 1 for found in pairs.values())
    (w,) = pairs["w"]
    assert w.scale.shape == (3, 1, 1, 1) and w.bits == 8 and w.signed
    assert w.codes is not None and w.codes().shape == (3, 3, 1, 1)
    assert pairs["x"][0].codes is None
    assert isinstance(backend, QuantizedArtefact)
    assert check_pairs(backend, native, bundle, plan, table) == []


def edit(bundle, change):
    path = bundle.files["qdq"]
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def drop_pair(graph):
    """Read `c_float` where the dequantized `c` was read."""
    (q,) = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "c_float"]
    (dq,) = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.output[0] == "c"]
    graph.node.remove(q)
    graph.node.remove(dq)
    for node in graph.node:
        node.input[:] = ["c_float" if name == "c" else name for name in node.input]


def pass_by(graph):
    """Read `c_float` beside the pair, which is there still."""
    for node in graph.node:
        node.input[:] = ["c_float" if name == "c" else name for name in node.input]


def change_scale(graph):
    (scale,) = [t for t in graph.initializer if t.name == "w_scale"]
    values = onnx.numpy_helper.to_array(scale) * np.float32(1.01)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, "w_scale"))


def second_pair(graph):
    (dq,) = [n for n in graph.node if n.output[0] == "x_dequantized"]
    graph.node.append(onnx.helper.make_node("DequantizeLinear", dq.input, ["stray"]))


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (drop_pair, "c", "passes through 0 Q/DQ pairs, must be one"),
        (pass_by, "c", "passes through 0 Q/DQ pairs, must be one"),
        (change_scale, "w", "another scale in the Q/DQ pair"),
        (second_pair, "stray", "isn't to be quantized"),
    ],
)
def test_departures_are_found(case, change, name, message):
    backend, native, bundle, plan, table = case
    edit(bundle, change)
    (problem,) = check_pairs(backend, native, bundle, plan, table)
    assert problem.name == name
    assert message in problem.message


def test_nothing_to_read(case, tmp_path):
    backend, native, _, plan, table = case
    with pytest.raises(InputError, match="holds no quantized model"):
        backend.pairs(Bundle({}))
    assert check_pairs(backend, native, Bundle({}), plan, table) == []
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        backend.pairs(Bundle({"qdq": tmp_path / "broken.onnx"}))


@pytest.mark.parametrize("listed", ["all", "root"], ids=["every site listed", "only what grids are shared with"])
def test_the_grid_of_a_bias_is_checked_behind_ops_that_move_values(tmp_path, listed):
    """`m` is not a site: an Identity behind a Reshape; the file may list only the tensor whose grid is passed on."""
    rng = np.random.default_rng(0)
    held = [("w", rng.normal(size=(8, 3)).astype(np.float32)), ("b", rng.normal(size=3).astype(np.float32)),
            ("s", np.array([-1, 8]))]  # fmt: skip
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["r"]),
        onnx.helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        onnx.helper.make_node("Reshape", ["t", "s"], ["q"]),
        onnx.helper.make_node("Identity", ["q"], ["m"]),
        onnx.helper.make_node("Gemm", ["m", "w", "b"], ["y"]),
    ]
    info = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [2, 2, 4]), ("y", [2, 3]))
    ]
    initializers = [onnx.numpy_helper.from_array(v, n) for n, v in held]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], initializers)
    backend = OnnxBackend()
    native = backend.adopt(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    )
    sim = QuantSim(native).calibrate(rng.normal(size=(4, 2, 2, 4)).astype(np.float32))
    bundle = sim.export(tmp_path, name="m")
    table = dict(sim.table.items())
    if listed == "root":
        table = {s: e for s, e in table.items() if sim.plan.root(s) == s}
        assert len(table) < len(dict(sim.table.items()))
    shown = sim.native

    def biases():
        return [p for p in check_pairs(backend, shown, bundle, sim.plan, table) if p.name == "b"]

    assert biases() == []

    def corrupt(graph):
        (scale,) = [t for t in graph.initializer if t.name == "b_scale"]
        values = onnx.numpy_helper.to_array(scale) * np.float32(1.5)
        scale.CopyFrom(onnx.numpy_helper.from_array(values, "b_scale"))

    edit(bundle, corrupt)
    (problem,) = biases()
    assert "another scale" in problem.message
