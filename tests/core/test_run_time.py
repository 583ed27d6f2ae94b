"""Ranges at run time: the grid by the specification's numbers, where the plan puts it, and what files say of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitwright.calibration import to_calibrate
from bitwright.errors import EncodingError, InputError, TargetError
from bitwright.formats import EncodingsFile, diff, dumps, loads
from bitwright.graph import OpKind
from bitwright.grids import (
    Dynamic,
    Encoding,
    EncodingTable,
    PerTensor,
    QuantSpec,
    dynamic_encoding,
    encoding_arrays,
    encoding_from_range,
    encoding_of_arrays,
    parse_type,
)
from bitwright.placement import Float, SharedWith, build_plan
from bitwright.targets import load_target
from bitwright.testing import models
from bitwright.testing.builder import Builder

# ONNX operator specification, DynamicQuantizeLinear: the test cases of the operator.
ONNX_CASES = [
    ([0, 2, -3, -2.5, 1.34, 0.5], [153, 255, 0, 26, 221, 179], 0.0196078438, 153),
    ([-1.0, -2.1, -1.3, -2.5, -3.34, -4.0], [191, 121, 172, 96, 42, 0], 0.0156862754, 255),
    (
        [1, 2.1, 1.3, 2.5, 3.34, 4.0, 1.5, 2.6, 3.9, 4.0, 3.0, 2.345],
        [64, 134, 83, 159, 213, 255, 96, 166, 249, 255, 191, 149],
        0.0156862754,
        0,
    ),
]


@pytest.mark.parametrize(("x", "codes", "scale", "zero"), ONNX_CASES)
def test_per_tensor_and_asymmetric_it_is_onnx_s(x, codes, scale, zero):
    encoding = dynamic_encoding("uint8:dynamic")
    assert encoding.quantize(np.float32(x)).tolist() == codes
    expected = (np.float32(codes) - zero) * np.float32(scale)
    assert np.allclose(encoding.fake_quantize(np.float32(x)), expected, rtol=1e-7)


def test_each_token_has_its_own_scale():
    x = np.float32([[[1, -2, 0.5], [0, 0, 0]], [[1e-40, 0, -1e-41], [100, 254, -127]]])
    found = dynamic_encoding("int8:per_token").fake_quantize(x)
    two, wide = np.float32(2 / 127), np.float32(2)
    assert np.array_equal(found[0, 0], np.float32([64 * two, -127 * two, 32 * two]))  # 63.5 and 31.75 steps
    assert not found[0, 1].any() and not found[1, 0].any()  # zeros, and numbers with no normal step
    assert np.array_equal(found[1, 1], np.float32([50 * wide, 127 * wide, -64 * wide]))  # −63.5, half to even
    four = dynamic_encoding("uint4:per_token").fake_quantize(np.float32([[-1, 0, 2], [0, 3, 30]]))
    assert np.array_equal(four, np.float32([[-1, 0, 2], [0, 4, 30]]))  # steps of 0.2 and 2: 1.5 steps are 2
    small = np.float32([[127e-25, 1e-25, -64e-25]])  # small, but not too small for a step
    assert np.allclose(dynamic_encoding("int8:per_token").fake_quantize(small), small, rtol=1e-6, atol=0)
    assert dynamic_encoding("int8:dynamic").fake_quantize(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_types_as_users_write_them():
    assert parse_type("int8:per_token") == (8, True, None, Dynamic(per_token=True))
    assert parse_type("int8-dynamic") == parse_type("int8:dynamic") == (8, True, None, Dynamic(per_token=False))
    assert parse_type("UINT8:per-token") == parse_type("uint8:token") == (8, False, None, Dynamic(per_token=True))
    for text in ("int8:per_token", "uint4:dynamic", "int16:per_token", "int2:per_token"):
        assert str(dynamic_encoding(text).run_time) == text
    for wrong in ("float16:per_token", "fp8:dynamic", "int8:per_token32", "int32:dynamic"):
        with pytest.raises(InputError):
            parse_type(wrong)


def test_steps_between_tensors_whose_grid_is_of_run_time():
    """The grid is that of the first; what differs by more than half a step is another code."""
    a = np.array([[-1.27, 0.3, 1.27]], np.float32)
    for b, apart in (([[-1.27, 0.27, 1.29]], [0, 3, 2]), ([[-1.2649, 0.3, 1.2751]], [1, 0, 1])):
        assert dynamic_encoding("int8:per_token").steps_between(a, np.float32(b)).tolist() == apart


def test_there_are_no_numbers_before_run_time():
    encoding = dynamic_encoding("int8:per_token")
    assert encoding.scale.shape == encoding.zero_point.shape == (0,)
    assert encoding_of_arrays(encoding_arrays(encoding)).equals(encoding)
    assert not encoding.equals(dynamic_encoding("int8:dynamic"))
    with pytest.raises(InputError, match="run time"):
        encoding.spread((3, 4))
    with pytest.raises(EncodingError):
        encoding.with_(scale=np.ones(1, np.float32), zero_point=np.zeros(1, np.int32))
    with pytest.raises(EncodingError):
        dynamic_encoding("int8")
    with pytest.raises(InputError, match="symmetric grid without the lowest"):
        QuantSpec(8, granularity=Dynamic())
    none = np.zeros(0)
    with pytest.raises(InputError, match="follows both ends"):
        Encoding(8, False, True, none, none, Dynamic())


# -- where the plan puts it


def block():
    """A convolution, and a block of two matrix products whose input is also added to the result."""
    b = Builder(0)
    x = b.relu("act", b.conv("conv", b.input("x", 3, 4, 4), 8, pad=1))
    x = b.flatten("flatten", b.global_pool("pool", x))
    y = b.relu("mid", b.linear("first", x, 8))
    return b.build(b.binary("sum", "Add", x, b.linear("second", y, 8))).graph


def test_what_ops_with_weights_read_and_nothing_else():
    graph = block()
    plan = build_plan(graph, "default", activations="int8:per_token")
    specs = {s: plan.spec(s) for s, site in plan.items() if plan.spec(s) is not None and s in graph.tensors}
    read = {op.id: op.data_inputs[0] for op in graph.linear_ops}
    assert set(specs) == set(read.values())
    assert specs[read["conv"]].granularity == Dynamic(per_token=False)  # it has no tokens
    assert specs[read["first"]].granularity == specs[read["second"]].granularity == Dynamic(per_token=True)
    assert not any(isinstance(site.decision, SharedWith) for site in plan.values())
    rest = {site.decision.reason for s, site in plan.items() if s in graph.tensors and s not in specs}
    assert rest - {"inside the supergroup Conv+Relu", "inside the supergroup Gemm+Relu"} == {
        "only what ops with weights read has a range at run time, as was asked; the rest stays in float"
    }
    biases = [plan[p].decision for op in graph.linear_ops for r, p in op.params.items() if r == "bias"]
    assert all(isinstance(d, Float) and "found at run time" in d.reason for d in biases)
    assert {plan.spec(op.weight).bits for op in graph.linear_ops} == {8}


def test_signed_is_symmetric_whatever_the_target_s_grids_are():
    for target in ("default", "htp_v73", "onnxruntime-cpu", "generic-int8", "tflite-int8"):
        for text in ("int8:per_token", "uint8:dynamic"):
            plan = build_plan(block(), target, activations=text)
            found = {str(s.run_time) for a in plan.activations if (s := plan.spec(a)) is not None}
            assert found <= {text, text.replace("per_token", "dynamic")}


def test_exceptions_both_ways():
    graph = block()
    mid, conv = graph.op("mid").output, graph.op("conv").data_inputs[0]
    plan = build_plan(graph, "default", activations="int8:per_token", overrides={mid: "uint16", "conv": "float"})
    assert (plan.spec(mid).bits, plan.spec(mid).granularity) == (16, PerTensor())
    assert plan.spec(conv) is None
    static = build_plan(graph, "default", overrides={"mid": {"activations": "int8:per_token"}})
    assert str(static.spec(mid).run_time) == "int8:per_token"
    assert static.spec(graph.op("sum").output).granularity == PerTensor()
    # What is only moved has a grid of its own behind it: no two tensors need span the same range.
    pool, flat = graph.op("pool").output, graph.op("flatten").output
    assert build_plan(graph, "default").root(flat) == pool
    apart = build_plan(graph, "default", overrides={pool: "int8:per_token"})
    assert (str(apart.spec(pool).run_time), apart.spec(flat).run_time) == ("int8:per_token", None)


@pytest.mark.parametrize("text", ["int8:per_token", "uint8:dynamic"])
def test_weights_are_known_before_run_time(text):
    graph = block()
    with pytest.raises(InputError, match="for activations"):
        build_plan(graph, "default", weights=text)
    with pytest.raises(InputError, match="for activations"):
        build_plan(graph, "default", overrides={"conv": {"weights": text}})
    with pytest.raises(TargetError, match="for activations"):
        load_target(custom(weights=text))
    assert load_target(custom(activations=text)).activations == text


def custom(**types):
    """A target with types of its own."""
    return {"bitwright": {"extends": "generic-int8", **types}}


def test_products_of_two_activations_stay_in_float():
    graph = models.tokens().graph
    plan = build_plan(graph, "default", activations="int8:per_token")
    linear = {op.data_inputs[0] for op in graph.linear_ops}
    scores = {t for op in graph if op.kind is OpKind.MATMUL for t in op.data_inputs} - linear
    assert scores
    assert all(plan.spec(t) is None for t in scores)


# -- in files


def test_encodings_files_say_what_they_are():
    file = EncodingsFile(run_time={"a": "int8:per_token", "b": "uint8:dynamic"}, version="1.0.0")
    for version in ("0.6.1", "1.0.0", "2.0.0", "2.1.0"):
        again = loads(dumps(file, version))
        assert (dict(again.run_time), dict(again.entries)) == (dict(file.run_time), {})
    other = EncodingsFile(run_time={"a": "int8:dynamic"})
    told = [str(d) for d in diff(file, other)]
    assert told == [
        "a: range at run time int8:per_token against int8:dynamic",
        "b: range at run time uint8:dynamic against none",
    ]
    broken = json.loads(dumps(file, "1.0.0"))
    broken["producer"]["bitwright"]["run_time"]["a"] = "int8"
    with pytest.raises(EncodingError, match=r"'a'.*run_time.*int8:per_token"):
        loads(json.dumps(broken))


def test_no_range_is_looked_for_where_it_is_found_at_run_time_or_given():
    plan = build_plan(models.mlp().graph, "default", overrides={"x": "uint8:per_token"})
    sites = [s for s in plan.activations if plan.spec(s).run_time is None]
    assert set(plan.activations) - set(sites) == {"x"}
    assert to_calibrate(plan, EncodingTable({})) == sites
    given = {s: encoding_from_range(plan.spec(s), 0, 1) for s in sites[:2]}
    table = EncodingTable({sites[0]: given[sites[0]].with_(frozen=True), sites[1]: given[sites[1]].with_(kept=True)})
    assert to_calibrate(plan, table) == sites[2:]
