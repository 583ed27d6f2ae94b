"""`encodings check` on folders: right exports pass, and each kind of changed number is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from shares import WHOLE

from bitwright import QuantSim

sys.path.insert(0, str(Path(__file__).parent.parent / "onnx"))
from exactness_nets import CONV, NETS, conv, image, node, normal, rows

BLOCKED = {
    "conv": lambda: image(conv("y"), w=normal(6, 4, 3, 3), b=normal(6)),
    "transposed": lambda: image(node("ConvTranspose", ["x", "w", "b"], ["y"]), w=normal(4, 6, 3, 3), b=normal(6)),
    "gemm": lambda: rows(node("Gemm", ["x", "w", "b"], ["y"]), shape=(16,), w=normal(16, 8), b=normal(8)),
    "gemm_turned": lambda: rows(node("Gemm", ["x", "w"], ["y"], transB=1), shape=(16,), w=normal(8, 16)),
    "matmul": lambda: rows(node("MatMul", ["x", "w"], ["y"]), w=normal(16, 8)),
    "square": lambda: rows(node("MatMul", ["x", "w"], ["y"]), w=normal(16, 16)),
}


def exported(net, folder: Path, version: str = "1.0.0", **options: str) -> Path:
    model, data = net
    QuantSim(model, **options).calibrate(data).export(folder, name="m", encodings_version=version)
    (folder / "report.json").unlink()  # the file alone says what is quantized, unless a target is given
    return folder


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("weights", ["int4:block4", "int4:lpbq2"])
def test_blocks_of_every_linear_op_pass(kind, weights, version, run, tmp_path):
    folder = exported(BLOCKED[kind](), tmp_path / "o", version, weights=weights)
    done = run("encodings", "check", folder, "--target", "default", "--weights", weights)
    assert done.status == 0, done.out
    assert "model and target" in done.out


@pytest.mark.parametrize("options", [{}, {"target": "onnxruntime-cpu"}, {"weights": "int16", "activations": "uint16"}])
def test_fresh_exports_of_every_kind_pass_without_a_target(options, run, tmp_path):
    taken = list(NETS.items())
    for kind, net in taken if WHOLE or not options else taken[::4]:
        done = run("encodings", "check", exported(net(), tmp_path / kind, "2.0.0", scheme="minmax", **options))
        assert done.status == 0, (kind, done.out)
        assert "its quantized file" in done.out


def test_files_of_an_export_that_are_gone_are_named(run, tmp_path):
    model, data = BLOCKED["matmul"]()
    QuantSim(model).calibrate(data).export(tmp_path, name="m")
    assert run("encodings", "check", tmp_path).status == 0
    (tmp_path / "m.qdq.onnx").unlink()
    done = run("encodings", "check", tmp_path)
    assert done.status == 1 and "m.qdq.onnx: the export wrote this file, but it is gone" in done.out


# -- numbers changed


def net():
    """Conv → Relu → Conv, whose second convolution has a bias that isn't 0, and a scale that stays in float."""
    second = {"w2": normal(6, 8, 3, 3, scale=0.3), "b2": normal(6)}
    return image(conv(), node("Relu", ["c"], ["r"]), conv("d", "r", "w2", "b2"), node("Sigmoid", ["d"], ["y"]),
                 **CONV, **second)  # fmt: skip


def change_entry(folder: Path, name: str, change) -> None:
    path = folder / "m.encodings"
    content = json.loads(path.read_text())
    change(next(e for e in content["encodings"] if e["name"] == name))
    path.write_text(json.dumps(content))


def change_array(folder: Path, file: str, name: str, change) -> None:
    path = folder / file
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(tensor).copy())), name))
    onnx.save(model, path)


def nudged(index: int, step: float):
    def change(values):
        values.reshape(-1)[index] += values.dtype.type(step)
        return values

    return change


def exchanged(values):
    flat = values.reshape(-1)
    return np.concatenate([flat[-1:], flat[1:-1], flat[:1]]).reshape(values.shape)


def scaled(entry):
    entry["y_scale"] = [v * 1.000001 for v in entry["y_scale"]] if isinstance(entry["y_scale"], list) else (
        entry["y_scale"] * 1.000001)  # fmt: skip


def moved(entry):
    zero = entry.get("y_zero_point", [0] * len(entry["y_scale"]) if isinstance(entry["y_scale"], list) else 0)
    entry["y_zero_point"] = [z + 3 for z in zero] if isinstance(zero, list) else zero + 3


def axis_moved(entry):
    entry["axis"] = 1


CORRUPTIONS = {
    "scale of an activation, file": ("x", lambda f: change_entry(f, "x", scaled)),
    "zero point of an activation, file": ("x", lambda f: change_entry(f, "x", moved)),
    "scale of a weight, file": ("w", lambda f: change_entry(f, "w", scaled)),
    "scale of a bias, file": ("b2", lambda f: change_entry(f, "b2", scaled)),
    "zero point of a bias, file": ("b2", lambda f: change_entry(f, "b2", moved)),
    "axis, file": ("w", lambda f: change_entry(f, "w", axis_moved)),
    "scale of an activation, model": ("r", lambda f: change_array(f, "m.qdq.onnx", "r_scale", lambda v: v * 2)),
    "zero point of an activation, model": (
        "x", lambda f: change_array(f, "m.qdq.onnx", "x_zero_point", lambda v: v + v.dtype.type(5))),
    "scale of a weight, model": ("w2", lambda f: change_array(f, "m.qdq.onnx", "w2_scale", exchanged)),
    "zero point of a weight, model": ("w2", lambda f: change_array(f, "m.qdq.onnx", "w2_zero_point", nudged(2, 1))),
    "code of a weight, model": ("w", lambda f: change_array(f, "m.qdq.onnx", "w_quantized", nudged(17, 1))),
    "scale of a bias, model": ("b", lambda f: change_array(f, "m.qdq.onnx", "b_scale", lambda v: v * 1.5)),
    "zero point of a bias, model": ("b", lambda f: change_array(f, "m.qdq.onnx", "b_zero_point", nudged(1, 1))),
    "code of a bias, model": ("b2", lambda f: change_array(f, "m.qdq.onnx", "b2_quantized", nudged(3, 1))),
    "a float weight": ("w", lambda f: change_array(f, "m.onnx", "w", nudged(17, 0.3))),
    "a float bias": ("b", lambda f: change_array(f, "m.onnx", "b", nudged(1, 0.01))),
}  # fmt: skip


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_each_changed_number_is_named(what, run, tmp_path):
    folder = exported(net(), tmp_path / "o", "2.0.0", target="onnxruntime-cpu")
    for target in ([], ["--target", "onnxruntime-cpu"]):
        assert run("encodings", "check", folder, *target).status == 0
    name, corrupt = CORRUPTIONS[what]
    corrupt(folder)
    for target in ([], ["--target", "onnxruntime-cpu"]):
        done = run("encodings", "check", folder, *target)
        assert done.status == 1, (target, done.out, done.err)
        assert done.err.rstrip().split("the first: ")[1].startswith(f"{name}:"), done.err


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("weights", ["int4:block4", "int4:lpbq2"])
def test_exchanged_block_scales_are_seen(kind, weights, run, tmp_path):
    folder = exported(BLOCKED[kind](), tmp_path / "o", weights=weights)
    change_array(folder, "m.qdq.onnx", "w_scale", exchanged)
    done = run("encodings", "check", folder)
    assert done.status == 1
    assert "w: has another scale" in done.out


def test_one_scale_of_those_repeated_over_the_kernel_is_seen(run, tmp_path):
    folder = exported(BLOCKED["conv"](), tmp_path / "o", weights="int4:block2")
    change_array(folder, "m.qdq.onnx", "w_scale", nudged(5, 0.1))
    assert "w: has another scale" in run("encodings", "check", folder).out


def test_entries_and_pairs_that_are_missing_renamed_or_too_many(run, tmp_path):
    folder = exported(net(), tmp_path / "o", target="onnxruntime-cpu")
    path = folder / "m.encodings"
    content = json.loads(path.read_text())
    entries = content["activation_encodings"]
    (r,) = [e for e in entries if e["name"] == "r"]
    for changed, wanted in (
        ([e for e in entries if e is not r], "r: passes through a Q/DQ pair"),
        ([*(e for e in entries if e is not r), {**r, "name": "q"}], "q: has an entry, but the model has no tensor"),
        ([*entries, {**r, "name": "c"}], "c: passes through 0 Q/DQ pairs"),
    ):
        path.write_text(json.dumps({**content, "activation_encodings": changed}))
        done = run("encodings", "check", folder)
        assert done.status == 1 and wanted in done.out, done.out


def test_a_bias_that_two_ops_share(run, tmp_path):
    folder = exported(NETS["gemm_called_twice"](), tmp_path / "o")
    assert run("encodings", "check", folder).status == 0
    names = [t.name for t in onnx.load(folder / "m.qdq.onnx").graph.initializer if t.name.endswith("_quantized")]
    assert {"b_quantized", "b_2_quantized"} <= set(names)
    change_array(folder, "m.qdq.onnx", "b_2_quantized", nudged(3, 1))
    done = run("encodings", "check", folder)
    assert done.status == 1 and "b: " in done.out


@pytest.mark.parametrize("asked", [[], ["--target", "default"]])
def test_a_bias_that_twins_with_equal_grids_share(asked, run, tmp_path):
    """Siamese branches that are calibrated on the same data: each has its own form, and the two are equal."""
    branches = [node("Abs", ["x"], [f"a{i}"]) for i in "pq"]
    branches += [node("Gemm", [f"a{i}", "w", "b"], [i]) for i in "pq"]
    twins = rows(*branches, node("Mul", ["p", "q"], ["y"]), shape=(8,), w=normal(8, 8), b=normal(8))
    folder = exported(twins, tmp_path / "o", "2.0.0")
    done = run("encodings", "check", folder, *asked)
    assert done.status == 0, done.out
    name = next(t.name for t in onnx.load(folder / "m.qdq.onnx").graph.initializer if t.name == "b_quantized")
    change_array(folder, "m.qdq.onnx", name, nudged(3, 1))
    done = run("encodings", "check", folder, *asked)
    assert done.status == 1 and "b: " in done.out


def test_a_parameter_in_float_is_compared_too(run, tmp_path):
    folder = exported(NETS["batch_norm"](), tmp_path / "o", target="onnxruntime-cpu")
    change_array(folder, "m.qdq.onnx", "me", nudged(3, 0.25))
    done = run("encodings", "check", folder, "--target", "onnxruntime-cpu")
    assert done.status == 1 and "me: 1 of 8 values" in done.out
