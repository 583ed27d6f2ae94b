"""The exact integers equal the runtime code by code, or an op says that it isn't covered; verify sees differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exactness_nets import CONV, NETS, after_conv, conv, image, made, node, normal, rows
from onnx import numpy_helper

from bitwright import QuantSim
from bitwright.targets import load_target
from bitwright.verify import Verification, verify
from bitwright.verify import _integer_kernels as kernels

PER_TENSOR = load_target("default").config.model_dump(mode="json", exclude_none=True)
PER_TENSOR["defaults"]["per_channel_quantization"] = False
OPTIONS = {
    "default": {},
    "onnxruntime-cpu": {"target": "onnxruntime-cpu"},
    "htp_v73": {"target": "htp_v73"},
    "generic-int8": {"target": "generic-int8"},
    "per tensor": {"target": PER_TENSOR},
    "int8 activations": {"activations": "int8"},
    "6-bit activations": {"activations": "uint6", "scheme": "minmax"},
    "int4": {"weights": "int4"},
    "blocks": {"weights": "int4:block4"},
    "16-bit activations": {"activations": "uint16", "scheme": "minmax"},
    "16 bits": {"weights": "int16", "activations": "uint16", "scheme": "minmax"},
    "float16": {"weights": "float16", "activations": "float16"},
}
KINDS = ("conv_relu", "transposed", "batch_norm", "gemm", "matmul_bias", "layer_norm", "embedding", "average_pool",
         "squeeze_excite")  # fmt: skip


def verified(net, folder, **options) -> Verification:
    model, data = net
    sim = QuantSim(model, **options).calibrate(data)
    sim.export(folder, name="m")
    return verify(folder, data)


def assert_exact(result: Verification) -> None:
    assert not result.problems
    differing = {t.name for t in result.tensors if t.exact_differs}
    assert not differing or result.uncovered


@pytest.mark.parametrize("kind", NETS)
def test_equal_to_the_runtime_or_not_covered(kind, tmp_path):
    assert_exact(verified(NETS[kind](), tmp_path, target="onnxruntime-cpu"))


@pytest.mark.parametrize("options", OPTIONS)
def test_at_every_width(options, tmp_path):
    for kind in KINDS:
        result = verified(NETS[kind](), tmp_path / kind, **OPTIONS[options])
        assert_exact(result)
        if "16" in options:
            assert result.uncovered


COVERED = ("conv", "conv_relu", "conv_clip", "depthwise", "grouped", "strided", "conv1d", "conv3d", "gemm",
           "gemm_turned", "gemm_beta", "matmul", "matmul_bias", "matmul_bias_rows", "matmul_of_activations",
           "leaky_relu", "embedding", "global_pool", "max_pool", "add", "mul", "mul_constant",
           "mul_channels", "mul_scalar", "gate", "sub", "concat", "add_constant",
           "average_pool", "average_pool_padded", "average_pool_counted",
           "maximum", "split", "pad", "transpose", "shared_bias", "gemm_called_twice")  # fmt: skip


@pytest.mark.parametrize("kind", COVERED)
def test_kinds_that_are_covered(kind, tmp_path):
    result = verified(NETS[kind](), tmp_path, target="onnxruntime-cpu")
    assert not result.uncovered
    assert not any(t.exact_differs for t in result.tensors)


@pytest.mark.parametrize("kind", ["log_softmax", "hardmax", "layer_norm", "instance_norm", "batch_norm", "lstm"])
def test_ops_in_float_read_the_rounded_parameters(kind, tmp_path):
    """They run in the runtime's own float kernels here, so that nothing but their operands could differ."""
    result = verified(NETS[kind](), tmp_path)
    assert result.uncovered
    assert max(t.exact_max_steps or 0 for t in result.tensors) == 0


def test_a_bias_has_an_int32_form_for_each_op_that_shares_it(tmp_path):
    result = verified(NETS["shared_bias"](), tmp_path, target="onnxruntime-cpu")
    assert result.exact["output_differs"] == 0 and result.exact["integer_ops"] == 2


@pytest.mark.parametrize("moved", [0, 400])
def test_float16_sums_that_cancel_are_rounding(moved, tmp_path):
    """Their terms are rounded at sizes that near zero nothing of the result shows; another scale is not."""
    half, (a, w, g) = np.float16, (normal(32, 6, 32), normal(32, 24, scale=0.2), 1 + 0.2 * normal(32))
    types = dict.fromkeys("xy", onnx.TensorProto.FLOAT16)
    x = (a / np.sqrt(np.square(a).mean(-1, keepdims=True))).astype(half)
    model = made([node("Mul", ["x", "g"], ["m"]), node("MatMul", ["m", "w"], ["y"])], {"x": ["n", 6, 32]}, types=types,
                 w=w.astype(half), g=g.astype(half))  # fmt: skip
    folder = tmp_path / "m"
    path = QuantSim(model, **OPTIONS["16 bits"]).calibrate({"x": x}).export(folder, name="m").files["qdq"]
    net = onnx.load(path)
    scale = next(t for t in net.graph.initializer if t.name == "w_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1 + moved / 1e4), "w_scale"))
    onnx.save(net, path)
    problems = [p for p in verify(folder, {"x": x}).problems if p.startswith("y:")]
    assert bool(problems) == bool(moved)


def test_a_wrong_kernel_is_a_problem_that_names_the_first_tensor(tmp_path, monkeypatch):
    multiply = kernels.multiply
    monkeypatch.setattr(kernels, "multiply", lambda *args: multiply(*args) ^ 1)
    result = verified(NETS["mul"](), tmp_path, target="onnxruntime-cpu")
    assert [p.split(":")[0] for p in result.problems] == ["y"]


def test_ops_behind_one_that_is_not_covered_are_compared_from_the_runtimes_operands(tmp_path, monkeypatch):
    """The mean over rows departs by a code here and there; the convolution behind it must still be exact."""
    net = image(
        conv(), *list(after_conv("Sigmoid")()[0].graph.node)[1:], conv("z", "y", "w2", "b2"),
        outputs=("z",), w2=normal(4, 8, 3, 3), b2=normal(4), **CONV,
    )  # fmt: skip
    assert not verified(net, tmp_path / "right", target="onnxruntime-cpu").problems
    accumulate = kernels.accumulate

    def wrong(op, codes, inputs, weights, axis):
        return accumulate(op, codes, inputs, weights, axis) + (40000.0 if codes.shape[1] == 8 else 0.0)

    monkeypatch.setattr(kernels, "accumulate", wrong)
    problems = verified(net, tmp_path / "wrong", target="onnxruntime-cpu").problems
    assert [p.split(":")[0] for p in problems] == ["z"]


@pytest.mark.parametrize(("kind", "tensor"), [("squeeze_excite", "g"), ("layer_norm", "y"), ("log_softmax", "c")])
def test_a_changed_scale_in_the_quantized_file_is_a_problem(kind, tensor, tmp_path):
    model, data = NETS[kind]()
    sim = QuantSim(model, target="onnxruntime-cpu" if kind == "squeeze_excite" else "default").calibrate(data)
    path = sim.export(tmp_path, name="m").files["qdq"]
    assert not verify(tmp_path, data).problems
    file = onnx.load(path)
    scale = next(i for i in file.graph.initializer if i.name == f"{tensor}_scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32(1.2) * numpy_helper.to_array(scale), scale.name))
    onnx.save(file, path)
    problems = verify(tmp_path, data).problems
    assert any(p.startswith(f"{tensor}:") and "grid" in p for p in problems), problems


def test_another_runtime_covers_nothing():
    from bitwright.verify._exactness import Examination
    from bitwright.verify._integer import IntegerSimulation

    model, data = NETS["conv_relu"]()
    sim = QuantSim(model).calibrate(data)
    simulation = IntegerSimulation(sim.backend, sim.native, sim.graph, sim.table)
    assert not simulation.uncovered
    examination = Examination(simulation, ["y"], foreign="its kernels round otherwise")
    examination.add(data, {"y": simulation.run(data, ["y"])["y"]})
    found = examination.result()
    assert not found.covered and not found.problems and "round otherwise" in found.loose["y"]


def test_the_runtime_s_operands_are_computed_with():
    """Ops whose operands the plain run had as well aren't computed again; those that got others are."""
    from bitwright.verify._integer import IntegerSimulation

    model, data = NETS["squeeze_excite"]()
    sim = QuantSim(model).calibrate(data)
    first = sim.graph.inputs[0]
    makers = [IntegerSimulation(sim.backend, sim.native, sim.graph, sim.table) for _ in range(2)]
    tensors = [t for t in makers[0].written if t in sim.table]
    inside = tensors[0]
    plain = makers[0].run(data, [first, *tensors])
    for given in ({}, {inside: plain[inside]}, {inside: plain[inside][..., ::-1]}):
        again, fresh = (m.codes(data, tensors, given) for m in makers)  # the second one never ran as a whole
        assert all(np.array_equal(again[t], fresh[t]) for t in tensors)
    assert len(tensors) > 2 and not np.array_equal(
        again[tensors[-1]], sim.table[tensors[-1]].quantize(plain[tensors[-1]])
    )
    other = {name: 0.5 * v for name, v in data.items()}
    assert all(np.array_equal(makers[0].codes(other, tensors, {})[t], makers[1].codes(other, tensors)[t])
               for t in tensors)  # fmt: skip


@pytest.mark.parametrize("kind", ["shared_bias", "gemm_called_twice", "matmul_called_twice"])
def test_a_shared_bias_fits_at_16_bits(kind, tmp_path):
    """In the runtime it becomes int32 on each op's own scale, which overflowed where the plan left it in float."""
    import onnxruntime as ort

    nets = {**NETS, "matmul_called_twice": lambda: rows(
        node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["p"]), node("MatMul", ["p", "w"], ["n"]),
        node("Add", ["n", "b"], ["y"]), w=normal(16, 16, scale=0.02), b=normal(16),
    )}  # fmt: skip
    model, data = nets[kind]()
    sim = QuantSim(model, weights="int16", activations="uint16", scheme="minmax").calibrate(data)
    path = sim.export(tmp_path, name="m").files["qdq"]
    simulated = sim.predict(data)[0]
    (out,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y"], data)
    assert np.abs(out - simulated).max() < 1e-3 * np.abs(simulated).max()
    forms = [i for i in onnx.load(path).graph.initializer if i.name in ("b_quantized", "b_2_quantized")]
    assert len(forms) == 2
    assert all(np.abs(numpy_helper.to_array(f).astype(np.int64)).max() <= 2**30 for f in forms)
    assert not verify(tmp_path, data).problems


@pytest.mark.parametrize("kind", ["shared_bias", "gemm_called_twice"])
@pytest.mark.parametrize("options", [{}, {"weights": "int4"}, {"weights": "int4:lpbq4"}])
def test_a_shared_bias_is_simulated_in_each_of_its_forms(kind, options, tmp_path):
    """4-bit weights make the accumulators' unit so coarse that 8 % of the codes moved."""
    import onnxruntime as ort

    model, data = NETS[kind]()
    sim = QuantSim(model, **options).calibrate(data)
    path = sim.export(tmp_path, name="m").files["qdq"]
    simulated = sim.predict(data)[0]
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (out,) = ort.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"]).run(["y"], data)
    assert (out != simulated).mean() < 0.002
    assert not verify(tmp_path, data).problems
    assert sim.graph.params.keys() == {"w", "b"} | ({"w2"} if kind == "shared_bias" else set())
