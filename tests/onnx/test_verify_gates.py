"""`verify` fails where an export departs from what was simulated, names where, and takes every legitimate output."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import bitwright
from bitwright import QuantSim
from bitwright.backend import Tap
from bitwright.bundle import over_outputs, risky
from bitwright.bundle._agreement import departure, independent
from bitwright.bundle._crushed import joined
from bitwright.data import open_data
from bitwright.errors import InputError, ModelError
from bitwright.graph import Graph, Op, OpKind, Tensor
from bitwright.grids import Encoding
from bitwright.progress import Silent
from bitwright.verify import verify

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "corruption.py"
N = onnx.helper.make_node


@pytest.fixture(scope="module")
def script() -> Any:
    """The benchmark, whose corruptions these tests share."""
    spec = importlib.util.spec_from_file_location("corruption", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["corruption"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["corruption"]


@pytest.fixture(scope="module")
def bases(script: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return script.bases(tmp_path_factory.mktemp("bases"))


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def problems(folder: Path) -> list[str]:
    with np.load(folder / "data.npz") as archive:
        return verify(folder, dict(archive)).problems


# -- corruption


def test_untouched_exports_have_no_problem(bases):
    for folder in bases.values():
        with np.load(folder / "data.npz") as archive:
            found = verify(folder, dict(archive))
        assert found.problems == [] and found.recorded


NAMED = {
    "scale in the encodings": "'r1' has another grid in net.encodings",
    "zero point in the encodings": "'x' has another grid in net.encodings",
    "entry removed": "'s' was quantized, but has no entry",
    "entry renamed": "'sum' has an entry",
    "int8 encodings beside int4": "'w1' has another grid",
    "scale in the quantized file": "r1: ",
    "weight code": "net.qdq.onnx: was changed",
    "pair removed": "net.qdq.onnx departs from the recorded simulation at 'c2'",
    "quantized file of other weights": "net.qdq.onnx departs from the recorded simulation at 'r1'",
    "float weight": "'w2' holds other values in the float model",
    "float model of another run": "the reopened simulation departs from the recorded one at",
    "reference samples": "net.record.npz: was changed",
    "reference samples gone": "net.record.npz: the export wrote this file, but it is gone",
    "report": "report.json: it was changed",
}


@pytest.mark.parametrize("kind", NAMED)
def test_corruption_is_found_and_named(script, bases, tmp_path, kind):
    folder = script.corrupted(bases, tmp_path, kind)
    found = problems(folder)
    assert any(NAMED[kind] in problem for problem in found), found


def test_a_change_that_changes_no_number_says_so(bases, tmp_path):
    import shutil

    folder = shutil.copytree(bases["plain"], tmp_path / "o")
    model = onnx.load(folder / "net.qdq.onnx")
    model.doc_string = "touched"
    onnx.save(model, folder / "net.qdq.onnx")
    (problem,) = problems(folder)
    assert problem == "net.qdq.onnx: was changed after the export, though it still computes the recorded numbers"


def test_an_export_without_a_record_still_verifies_and_says_that_it_has_none(bases, tmp_path):
    import shutil

    folder = shutil.copytree(bases["plain"], tmp_path / "o")
    (folder / "report.json").unlink()
    assert problems(folder) == ["report.json: the export wrote this file, but it is gone"]
    (folder / "net.record.npz").unlink()
    with np.load(folder / "data.npz") as archive:
        found = verify(folder, dict(archive))
    assert found.problems == [] and not found.recorded
    assert any("no record" in note for note in found.notes)


@pytest.mark.parametrize("field", ["name", "versions"])
def test_a_report_is_sealed_whole(bases, tmp_path, field):
    """Its name too, by which it is found: with another one it isn't of this export, and doesn't fit its seal either."""
    import shutil

    folder = shutil.copytree(bases["plain"], tmp_path / "o")
    report = json.loads((folder / "report.json").read_text())
    report[field] = {"python": "2"} if field == "versions" else "other"
    (folder / "report.json").write_text(json.dumps(report))
    assert any("it was changed after the export" in problem for problem in problems(folder))


def test_each_problem_is_a_line_and_the_status_is_1(script, bases, tmp_path, capsys):
    from bitwright.cli import main

    folder = script.corrupted(bases, tmp_path, "float model of another run")
    assert main(["verify", str(folder), "--data", str(folder / "data.npz"), "-q"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and all(line.startswith("bitwright: ") for line in lines)


def test_limits_of_the_user_s_own(bases, capsys):
    from bitwright.cli import main

    folder = bases["int4"]
    words = ["verify", str(folder), "--data", str(folder / "data.npz"), "-q"]
    assert main([*words, "--min-sqnr", "5"]) == 0
    assert main([*words, "--min-sqnr", "60"]) == 1
    assert "60 dB are asked" in capsys.readouterr().err


# -- outputs of every kind


def exported(folder: Path, nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, int], data: Any,
             **arrays: Any) -> Any:  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    graph = onnx.helper.make_graph(
        nodes, "net", [info(k, onnx.TensorProto.FLOAT, v) for k, v in inputs.items()],
        [info(k, kind, None) for k, kind in outputs.items()],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    sim = QuantSim(model).calibrate(data)
    sim.export(folder, name="m")
    return sim


FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def test_scalar_empty_integer_and_boolean_outputs(tmp_path):
    data = {"x": normal(16, 12)}
    exported(
        tmp_path,
        [
            N("MatMul", ["x", "w"], ["a"]),
            N("ReduceSum", ["a"], ["total"], keepdims=0),
            N("ArgMax", ["a"], ["k"], axis=1),
            N("Greater", ["a", "zero"], ["positive"]),
            N("Slice", ["a", "start", "start", "one"], ["nothing"]),
        ],
        {"x": ["n", 12]},
        {"total": FLOAT, "a": FLOAT, "k": INT64, "positive": BOOL, "nothing": FLOAT},
        data,
        w=normal(12, 6), zero=np.float32(0), start=np.array([0]), one=np.array([1]),
    )  # fmt: skip
    found = verify(tmp_path, data)
    assert found.problems == []
    by_name = {o.name: o for o in found.outputs}
    assert by_name.keys() == {"total", "a", "k", "positive", "nothing"}
    assert by_name["a"].sqnr_db["simulated_float"] > 25
    assert by_name["k"].agreement["integer_float"] > 0.9
    assert found.samples == 16


def test_labels_of_samples_that_have_several_rows_of_classes_are_refused(tmp_path):
    data = {"x": normal(16, 4, 12)}
    nodes = [N("MatMul", ["x", "w"], ["a"]), N("Reshape", ["a", "rows"], ["y"])]
    exported(tmp_path, nodes, {"x": ["n", 4, 12]}, {"y": FLOAT}, data, w=normal(12, 6), rows=np.array([-1, 6]))
    for count in (16, 64):
        with pytest.raises(InputError, match="64 rows for 16 samples"):
            verify(tmp_path, data, labels=np.zeros(count, int))
    assert verify(tmp_path, data).problems == []


def test_a_fixed_batch_is_run_whole_and_samples_that_are_left_out_are_told(tmp_path):
    data = {"x": normal(35, 12)}
    with pytest.warns(UserWarning, match="left out"):
        exported(tmp_path, [N("MatMul", ["x", "w"], ["y"])], {"x": [10, 12]}, {"y": FLOAT}, data, w=normal(12, 6))
    with pytest.warns(UserWarning, match="left out"):
        found = verify(tmp_path, data)
    assert (found.samples, found.problems) == (30, [])
    assert any("the last 5 of 35 samples are left out" in note for note in found.notes)


def test_an_export_whose_quantized_file_couldn_t_be_written(tmp_path, monkeypatch):
    from bitwright_onnx.backend import OnnxBackend

    real = OnnxBackend.export

    def refusing(self: Any, model: Any, plan: Any, encodings: Any, path: Path, format: str) -> Any:
        if format == "qdq":
            raise ModelError("op 'odd' has no form in ONNX")
        return real(self, model, plan, encodings, path, format)

    monkeypatch.setattr(OnnxBackend, "export", refusing)
    data = {"x": normal(16, 12)}
    with pytest.warns(UserWarning, match="isn't written: op 'odd'"):
        exported(tmp_path, [N("MatMul", ["x", "w"], ["y"])], {"x": ["n", 12]}, {"y": FLOAT}, data, w=normal(12, 6))
    found = verify(tmp_path, data)
    assert found.problems == [] and found.recorded
    assert found.sqnr_db.keys() == {"simulated_float"} and found.sqnr_db["simulated_float"] > 25
    assert any("no qdq: op 'odd' has no form in ONNX" in note for note in found.notes)
    from bitwright.cli import main

    np.savez(tmp_path / "data.npz", **data)
    assert main(["verify", str(tmp_path), "--data", str(tmp_path / "data.npz"), "-q", "--min-sqnr", "20"]) == 0
    assert main(["verify", str(tmp_path), "--data", str(tmp_path / "data.npz"), "-q", "--min-sqnr", "90"]) == 1


# -- crushed outputs

DETECTOR = [
    N("Conv", ["x", "wb"], ["pixels"]),
    N("Conv", ["x", "ws"], ["logits"]),
    N("Sigmoid", ["logits"], ["scores"]),
    N("Concat", ["pixels", "scores"], ["j"], axis=1, name="joined"),
    N("Transpose", ["j"], ["y"], perm=[0, 2, 3, 1]),
]


def detector(folder: Path, size: float) -> Any:
    data = {"x": normal(16, 3, 8, 8)}
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in DETECTOR]
    sim = exported(folder, nodes, {"x": ["n", 3, 8, 8]}, {"y": FLOAT}, data,
                   wb=normal(4, 3, 1, 1, scale=size), ws=normal(3, 3, 1, 1))  # fmt: skip
    return sim, data


def test_a_crushed_part_of_a_concatenation_is_named(tmp_path):
    sim, data = detector(tmp_path, 500)
    found = verify(tmp_path, data)
    (problem,) = found.problems
    assert "'scores' is crushed in output 'y'" in problem and "'joined'" in problem
    assert found.sqnr_db["simulated_float"] > 20  # the whole looks well
    from bitwright_analysis.analyzer import quant_analyzer

    analysis = quant_analyzer(sim, data)
    assert "'scores' is crushed" in analysis.advice[0].text
    assert "lost" in analysis.verdict and str(analysis).startswith(analysis.verdict)
    assert not any("Export it" in a.text for a in analysis.advice)


SIZES = np.array([500, 500, 1], np.float32).reshape(3, 1, 1)
BESIDE = {  # how values of other sizes come to lie side by side, without a concatenation that is an output
    "channels of one layer": [N("Conv", ["x", "wide"], ["y"])],
    "a product with a vector": [N("Conv", ["x", "w"], ["c"]), N("Mul", ["c", "sizes"], ["y"])],
    "moved afterwards": [
        N("Conv", ["x", "w"], ["c"]), N("Mul", ["c", "sizes"], ["p"]), N("Transpose", ["p"], ["y"], perm=[0, 2, 3, 1]),
    ],
    "a sum of padded parts": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Pad", ["c", "after"], ["p"]),
        N("Pad", ["s", "before"], ["q"]), N("Add", ["p", "q"], ["y"]),
    ],
    "a selection": [N("Conv", ["x", "wide3"], ["c"]), N("Conv", ["x", "w"], ["s"]), N("Where", ["m", "c", "s"], ["y"])],
    "written over": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("Transpose", ["j"], ["t"], perm=[1, 0, 2, 3]), N("Transpose", ["s"], ["u"], perm=[1, 0, 2, 3]),
        N("ScatterND", ["t", "last", "u"], ["v"]), N("Transpose", ["v"], ["y"], perm=[1, 0, 2, 3]),
    ],
    "concatenated, then pooled": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("MaxPool", ["j"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ],
    "concatenated, then averaged": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("GlobalAveragePool", ["j"], ["y"]),
    ],
    "concatenated, then resized": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("Resize", ["j", "", "twice"], ["y"], mode="nearest"),
    ],
    "one layer, then averaged": [N("Conv", ["x", "wide"], ["c"]), N("GlobalAveragePool", ["c"], ["y"])],
    "a batch norm": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("BatchNormalization", ["j", "still", "zeros", "zeros", "still"], ["y"]),
    ],
    "a batch norm that multiplies": [
        N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["r"]),
        N("BatchNormalization", ["r", "gammas", "zeros", "zeros", "still"], ["y"]),
    ],
    "concatenated, then added to": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("Add", ["j", "shift"], ["y"]),
    ],
    "concatenated, then multiplied": [
        N("Conv", ["x", "two"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("Mul", ["j", "sizes"], ["y"]),
    ],
    "concatenated, then activated": [
        N("Conv", ["x", "wide2"], ["c"]), N("Conv", ["x", "one"], ["s"]), N("Concat", ["c", "s"], ["j"], axis=1),
        N("Relu", ["j"], ["y"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("evened", [False, True])
def test_what_is_crushed_beside_larger_values_is_named(way, evened, tmp_path):
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in BESIDE[way]]
    w, sizes = normal(3, 3, 1, 1), np.ones_like(SIZES) if evened else SIZES
    held = {
        "w": w, "sizes": sizes, "wide": w * sizes[..., None], "wide2": (w * sizes[..., None])[:2], "one": w[2:],
        "wide3": w * sizes.max(), "two": w[:2], "after": np.array([0, 0, 0, 0, 0, 1, 0, 0]),
        "before": np.array([0, 2, 0, 0, 0, 0, 0, 0]), "m": np.arange(8) % 4 > 0,
        "shift": np.full((1, 3, 1, 1), 0.1, np.float32), "last": np.array([[2]]), "still": np.ones(3, np.float32),
        "zeros": np.zeros(3, np.float32), "gammas": sizes.ravel(), "twice": np.array([1, 1, 2, 2], np.float32),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    data = {"x": normal(16, 3, 8, 8)}
    exported(tmp_path, nodes, {"x": ["n", 3, 8, 8]}, {"y": FLOAT}, data, **{k: v for k, v in held.items() if k in used})
    found = verify(tmp_path, data)
    assert found.sqnr_db["simulated_float"] > 20  # the whole looks well
    assert len(found.problems) == (0 if evened else 1)
    assert all("crushed" in p and "'y'" in p for p in found.problems)


def test_a_few_idle_channels_are_no_part(tmp_path):
    w = normal(16, 3, 1, 1)
    w[3] /= 3000
    data = {"x": normal(16, 3, 8, 8)}
    exported(tmp_path, [N("Conv", ["x", "w"], ["y"])], {"x": ["n", 3, 8, 8]}, {"y": FLOAT}, data, w=w)
    assert verify(tmp_path, data).problems == []


def test_parts_of_one_range_are_not_crushed(tmp_path):
    sim, data = detector(tmp_path, 0.5)
    assert verify(tmp_path, data).problems == []
    from bitwright_analysis.analyzer import quant_analyzer

    analysis = quant_analyzer(sim, data)
    assert analysis.crushed == ()
    assert analysis.widths == "weights int8, activations uint8"


def test_validate_names_the_risk_before_any_data(tmp_path):
    sim, _ = detector(tmp_path, 500)
    found = bitwright.validate(tmp_path / "m.onnx")
    (risk,) = found.risks
    assert risk.where == "joined" and "'scores'" in risk.what and "'pixels'" in risk.what
    assert str(found).startswith("can be quantized, but a part of an output may be lost: look at joined first")
    assert "weights int8, activations uint8" in str(found)
    assert bitwright.validate(tmp_path / "m.onnx", activations="uint16").risks == ()
    (join,) = joined(sim.graph)
    assert (join.output, join.inputs) == ("y", ("pixels", "scores"))
    assert risky(sim.graph, sim.plan)


# -- how two tensors are compared


def grid(bits: int, scale: float) -> Encoding:
    return Encoding(bits, False, False, np.float32(scale), np.int32(2 ** (bits - 1)))


def test_rounding_passes_and_more_does_not():
    encoding = grid(8, 0.02)
    x = encoding.fake_quantize(normal(100, 100))
    few = x.copy()
    few.reshape(-1)[::1000] += 0.02
    assert departure("t", x, few, encoding) is None
    many = x.copy()
    many.reshape(-1)[::50] += 0.02
    assert departure("t", x, many, encoding).share == pytest.approx(0.02, rel=0.05)
    far = x.copy()
    far[0, 0] += 0.06
    assert departure("t", x, far, encoding).steps == pytest.approx(3)
    assert departure("t", x, x[:50], encoding).text.startswith("has the shape [50, 100]")
    odd = x.copy()
    odd[3, 3] = np.nan
    assert "NaN" in departure("t", x, odd, encoding).text
    masked = np.full_like(x, -np.inf)
    assert departure("t", masked, masked, None) is None


def test_fine_grids_allow_for_float32():
    encoding = grid(16, 1e-4)
    x = encoding.fake_quantize(normal(100, 100))
    noisy = encoding.fake_quantize(x * (1 + np.float32(2e-6)))
    assert (noisy != x).mean() < 0.1 and departure("t", x, noisy, encoding) is None
    wrong = encoding.fake_quantize(x * np.float32(1.001))
    assert departure("t", x, wrong, encoding) is not None


def test_tensors_that_depend_on_each_other_are_judged_apart():
    names = ["x", "a", "b", "c", "d"]
    ops = [
        Op("1", OpKind.RELU, "Relu", ("x",), ("a",)),
        Op("2", OpKind.RELU, "Relu", ("a",), ("b",)),
        Op("3", OpKind.ADD, "Add", ("a", "b"), ("c",)),
        Op("4", OpKind.RELU, "Relu", ("x",), ("d",)),
    ]
    graph = Graph(ops, {n: Tensor(n) for n in names}, {}, ["x"], ["c", "d"])
    groups = independent(graph, ["a", "b", "c", "d"], set(names))
    assert groups == [["a", "d"], ["b"], ["c"]]
    assert independent(graph, ["a", "c"], {"x", "a", "c"}) == [["a"], ["c"]]


def test_what_a_view_does_not_have_is_told_and_gets_no_figure():
    """An output that nothing was compared with isn't one of infinite signal to noise."""
    graph = Graph([], {t: Tensor(t, (None, 2), "float32") for t in ("x", "y")}, {}, ("x",), ("x", "y"))

    class View:
        def __init__(self, *tensors):
            self.tensors = tensors

        def run(self, batch):
            return {Tap(t): 2 * batch["x"] for t in self.tensors}

    data = open_data({"x": np.ones((3, 2), np.float32)}, {"x": ((None, 2), "float32")})
    sums = over_outputs(
        graph, {"float": View("x", "y"), "simulated": View("x", "y"), "integer": View("x")}, data, Silent()
    )
    figures = {f.name: f.sqnr_db for f in sums.figures()}
    assert figures["y"] == {"simulated_float": float("inf")}
    assert set(figures["x"].values()) == {float("inf")} and len(figures["x"]) == 3
    assert any("integer output 'y' isn't compared" in p for p in sums.problems)
    np.testing.assert_array_equal(sums.first["integer"], np.ones((3, 2)))  # the input as it was fed
