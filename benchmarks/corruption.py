"""Corrupted exports and untouched ones: what `verify` and `encodings check` say.

    python benchmarks/corruption.py                 # every kind of corruption, and untouched exports of ONNX models
    python benchmarks/corruption.py --frameworks onnx,torch,keras,tensorflow [--json out.json]

A corruption is found where one of the two exits with 1, and named where a line that they print has the tensor or file.
Exits with 1 if one isn't, or if an untouched export has a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bitwright import QuantSim
from bitwright.cli import main as bitwright

N = helper.make_node
NAME = "net"


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def model_of(nodes: list[Any], inputs: dict[str, list[Any]], outputs: list[str], **arrays: Any) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    info, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "net", [info(k, kind, v) for k, v in inputs.items()], [info(k, kind, None) for k in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cnn(seed: int = 0) -> onnx.ModelProto:
    """Convolutions, a residual sum and a classifier."""
    return model_of(
        [
            N("Conv", ["x", "w1", "b1"], ["c1"], pads=[1] * 4),
            N("Relu", ["c1"], ["r1"]),
            N("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1] * 4),
            N("Add", ["c2", "r1"], ["s"]),
            N("GlobalAveragePool", ["s"], ["g"]),
            N("Flatten", ["g"], ["f"]),
            N("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
        ],
        {"x": ["n", 3, 8, 8]},
        ["y"],
        w1=normal(16, 3, 3, 3, scale=0.3, seed=seed), b1=normal(16, scale=0.1, seed=seed),
        w2=normal(16, 16, 3, 3, scale=0.1, seed=seed), b2=normal(16, scale=0.1, seed=seed),
        w3=normal(10, 16, scale=0.5, seed=seed), b3=normal(10, scale=0.1, seed=seed),
    )  # fmt: skip


DATA = {"x": normal(32, 3, 8, 8)}
BLOCK_DATA = {"x": normal(32, 64)}


def mlp() -> onnx.ModelProto:
    """Matrix products, for weights in blocks."""
    return model_of(
        [N("MatMul", ["x", "w1"], ["a"]), N("Relu", ["a"], ["r"]), N("MatMul", ["r", "w2"], ["y"])],
        {"x": ["n", 64]}, ["y"], w1=normal(64, 32, scale=0.1), w2=normal(32, 8, scale=0.2),
    )  # fmt: skip


# -- exports that corruptions start from


def exported(folder: Path, model: onnx.ModelProto, data: dict[str, Any], **options: Any) -> Path:
    QuantSim(model, **options).calibrate(data).export(folder, name=NAME)
    np.savez(folder / "data.npz", **data)
    return folder


def bases(folder: Path) -> dict[str, Path]:
    """Whole exports: of one network, of the same with other data, other weights, other bits, and in blocks."""
    return {
        "plain": exported(folder / "plain", cnn(), DATA),
        "other data": exported(folder / "other_data", cnn(), {"x": 1.7 * DATA["x"]}),
        "other weights": exported(folder / "other_weights", cnn(1), DATA),
        "int4": exported(folder / "int4", cnn(), DATA, weights="int4"),
        "blocks": exported(folder / "blocks", mlp(), BLOCK_DATA, target="default_per_channel", weights="int4:block32"),
    }


# -- corruptions


def encodings(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / f"{NAME}.encodings"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(e for e in [*content["activation_encodings"], *content["param_encodings"]] if e["name"] == name)


def scaled(content: dict[str, Any], name: str, factor: float) -> None:
    found = entry(content, name)
    found["scale"] = [factor * v for v in found["scale"]]


def moved(content: dict[str, Any], name: str, steps: int) -> None:
    found = entry(content, name)
    found["offset"] = [v + steps for v in found["offset"]]


def removed(content: dict[str, Any], name: str) -> None:
    for table in ("activation_encodings", "param_encodings"):
        content[table] = [e for e in content[table] if e["name"] != name]


def renamed(content: dict[str, Any], old: str, new: str) -> None:
    entry(content, old)["name"] = new


def tensor(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray], ending: str = ".qdq.onnx") -> None:
    """Change an initializer, element by element as its type counts."""
    path = folder / f"{NAME}{ending}"
    model = onnx.load(path)
    found = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(found)
    changed = change(array.copy())
    found.CopyFrom(
        helper.make_tensor(name, found.data_type, array.shape, changed.tobytes(), raw=True)
        if array.dtype.itemsize and found.data_type not in (21, 22)
        else helper.make_tensor(name, found.data_type, array.shape, changed.reshape(-1).tolist())
    )
    onnx.save(model, path)


def first(change: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Change one value: the first that may grow."""

    def changed(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1)
        index = int(np.flatnonzero(flat == np.median(flat))[0]) if (flat == np.median(flat)).any() else 0
        flat[index] = change(flat[index])
        return flat.reshape(array.shape)

    return changed


def without_pair(folder: Path, name: str) -> None:
    """Let all that reads a tensor read it as it is before its pair."""
    path = folder / f"{NAME}.qdq.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = f"{name}_float"
    onnx.save(model, path)


def swapped_blocks(array: np.ndarray) -> np.ndarray:
    """Two scales of one block axis in each other's place."""
    flat = array.reshape(-1)
    other = int(np.flatnonzero(flat != flat[0])[0])
    flat[[0, other]] = flat[[other, 0]]
    return flat.reshape(array.shape)


def renamed_tensor(folder: Path, old: str, new: str) -> None:
    path = folder / f"{NAME}.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == old:
                    names[index] = new
    onnx.save(model, path)


def arrays(folder: Path) -> None:
    path = folder / f"{NAME}.record.npz"
    with np.load(path) as archive:
        found = dict(archive)
    found["tap/1"] = found["tap/1"] ^ 8
    np.savez(path, **found)


def report(folder: Path) -> None:
    path = folder / "report.json"
    content = json.loads(path.read_text())
    content["sites"][0]["scale_smallest"] *= 2
    path.write_text(json.dumps(content))


def taken(folder: Path, other: Path, *endings: str) -> None:
    for ending in endings:
        shutil.copy(other / f"{NAME}{ending}", folder / f"{NAME}{ending}")


@dataclass(frozen=True)
class Corruption:
    """One way to damage a copy of an export.

    Attributes:
        base: which export.
        apply: damages the folder; is handed all exports.
        names: what must be named: one of these.
    """

    base: str
    apply: Callable[[Path, dict[str, Path]], None]
    names: tuple[str, ...]


def _e(change: Callable[..., None], *arguments: Any) -> Callable[[Path, dict[str, Path]], None]:
    return lambda folder, _: encodings(folder, lambda content: change(content, *arguments))


def _t(name: str, change: Callable[[np.ndarray], np.ndarray], ending: str = ".qdq.onnx") -> Any:
    return lambda folder, _: tensor(folder, name, change, ending)


CORRUPTIONS: dict[str, Corruption] = {
    "scale in the encodings": Corruption("plain", _e(scaled, "r1", 1.01), ("r1",)),
    "zero point in the encodings": Corruption("plain", _e(moved, "x", 3), ("x",)),
    "weight scale in the encodings": Corruption("plain", _e(scaled, "w2", 1.001), ("w2",)),
    "entry removed": Corruption("plain", _e(removed, "s"), ("s",)),
    "entry renamed": Corruption("plain", _e(renamed, "s", "sum"), ("s", "sum")),
    "encodings of another run": Corruption(
        "plain", lambda f, b: taken(f, b["other data"], ".encodings"), ("x", f"{NAME}.encodings")),
    "int8 encodings beside int4": Corruption(
        "int4", lambda f, b: taken(f, b["plain"], ".encodings"), ("w1", "w2", "w3")),
    "scale in the quantized file": Corruption("plain", _t("r1_scale", lambda a: a * np.float32(1.02)), ("r1",)),
    "zero point in the quantized file": Corruption("plain", _t("s_zero_point", lambda a: a + 5), ("s",)),
    "weight scale in the quantized file": Corruption("plain", _t("w2_scale", lambda a: a * np.float32(1.05)), ("w2",)),
    "weight code": Corruption("plain", _t("w2_quantized", first(lambda v: v + 9)), ("w2",)),
    "bias code": Corruption("plain", _t("b1_quantized", first(lambda v: v + 900)), ("b1",)),
    "pair removed": Corruption("plain", lambda f, _: without_pair(f, "r1"), ("r1", "c2", "s")),
    "block scales exchanged": Corruption("blocks", _t("w1_scale", swapped_blocks), ("w1",)),
    "quantized file of another run": Corruption(
        "plain", lambda f, b: taken(f, b["other data"], ".qdq.onnx"), ("x", f"{NAME}.qdq.onnx")),
    "quantized file of other weights": Corruption(
        "plain", lambda f, b: taken(f, b["other weights"], ".qdq.onnx"), ("w1", f"{NAME}.qdq.onnx")),
    "float weight": Corruption("plain", _t("w2", first(lambda v: v + 0.2), ".onnx"), ("w2",)),
    "float model of another run": Corruption("plain", lambda f, b: taken(f, b["other weights"], ".onnx"), ("w1",)),
    "tensor renamed in the float model": Corruption("plain", lambda f, _: renamed_tensor(f, "s", "sum"), ("s", "sum")),
    "reference samples": Corruption("plain", lambda f, _: arrays(f), (f"{NAME}.record.npz",)),
    "reference samples gone": Corruption(
        "plain", lambda f, _: (f / f"{NAME}.record.npz").unlink(), (f"{NAME}.record.npz",)),
    "report": Corruption("plain", lambda f, _: report(f), ("report.json",)),
}  # fmt: skip


# -- judging


@dataclass(frozen=True)
class Judged:
    """What the two commands said of a folder: exit codes, and all lines."""

    verify: int
    check: int
    lines: tuple[str, ...]

    @property
    def found(self) -> bool:
        return 1 in (self.verify, self.check)

    def names(self, wanted: tuple[str, ...]) -> bool:
        return any(f"{name!r}" in line or line.startswith(f"{name}:") or f" {name}:" in line or name in line.split()
                   or f"bitwright: {name}" in line for line in self.lines for name in wanted)  # fmt: skip


def judged(folder: Path) -> Judged:
    """Run ``verify`` and ``encodings check`` on an export."""
    codes, said = [], []
    for words in (["verify", folder, "--data", folder / "data.npz", "-q"], ["encodings", "check", folder]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            codes.append(bitwright([str(w) for w in words]))
        problems = out.getvalue().splitlines() if words[0] == "encodings" else []
        said += [line for line in (*err.getvalue().splitlines(), *problems) if codes[-1]]
    return Judged(codes[0], codes[1], tuple(said))


def corrupted(base: dict[str, Path], folder: Path, kind: str) -> Path:
    """A damaged copy of an export."""
    corruption = CORRUPTIONS[kind]
    copy = folder / kind.replace(" ", "_")
    shutil.copytree(base[corruption.base], copy)
    corruption.apply(copy, base)
    return copy


# -- untouched exports


def untouched(frameworks: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Whole exports of many kinds of network."""
    if "onnx" in frameworks:
        for label, options in {
            "cnn, int8": {}, "cnn, int4": {"weights": "int4"}, "cnn, W8A16": {"activations": "uint16"},
            "cnn, W16A16": {"weights": "int16", "activations": "uint16", "scheme": "minmax"},
            "cnn, htp_v73": {"target": "htp_v73"}, "cnn, onnxruntime-cpu": {"target": "onnxruntime-cpu"},
            "cnn, float16": {"weights": "float16", "activations": "float16"},
        }.items():  # fmt: skip
            version = "2.0.0" if "float16" in label else "1.0.0"
            yield f"onnx: {label}", _export(folder, label, cnn, DATA, version, **options)
        blocks = {"target": "default_per_channel", "weights": "int4:block32"}
        yield "onnx: mlp, int4 blocks", _export(folder, "mlp", mlp, BLOCK_DATA, **blocks)
        yield "onnx: attention", _export(folder, "attention", attention, {"x": normal(16, 6, 16)})
        yield "onnx: LSTM", _export(folder, "lstm", lstm, {"x": normal(16, 5, 4)})
        yield "onnx: shared weight", _export(folder, "shared", shared, {"x": normal(16, 16)})
    makers = {"torch": torch_networks, "keras": keras_networks, "tensorflow": tensorflow_networks}
    for framework, networks in makers.items():
        if framework in frameworks:
            for label, (make, sample, data, options) in networks().items():
                yield (
                    f"{framework}: {label}",
                    _export(folder, f"{framework}{label}", make, data, sample=sample, **options),
                )


def _export(
    folder: Path, label: str, make: Callable[[], Any], data: dict[str, Any], version: str = "1.0.0",
    sample: Any = None, **options: Any,
) -> Path:  # fmt: skip
    out = folder / "".join(c if c.isalnum() else "_" for c in label)
    sim = QuantSim(make(), **options) if sample is None else QuantSim(make(), sample, **options)
    sim.calibrate(data).export(out, name=NAME, encodings_version=version)
    np.savez(out / "data.npz", **data)
    return out


def attention() -> onnx.ModelProto:
    weights = {f"w{k}": normal(16, 16, scale=0.3, seed=i) for i, k in enumerate("qkvo")}
    nodes = [N("MatMul", ["x", f"w{k}"], [k]) for k in "qkv"]
    nodes += [N("Transpose", ["k"], ["kt"], perm=[0, 2, 1]), N("MatMul", ["q", "kt"], ["scores"]),
              N("Mul", ["scores", "quarter"], ["scaled"]), N("Softmax", ["scaled"], ["p"], axis=-1),
              N("MatMul", ["p", "v"], ["h"]), N("MatMul", ["h", "wo"], ["o"]), N("Add", ["o", "x"], ["y"])]  # fmt: skip
    return model_of(nodes, {"x": ["n", 6, 16]}, ["y"], quarter=np.float32(0.25), **weights)


def lstm() -> onnx.ModelProto:
    return model_of(
        [N("Transpose", ["x"], ["t"], perm=[1, 0, 2]), N("LSTM", ["t", "W", "R", "B"], ["", "h"], hidden_size=8),
         N("Squeeze", ["h", "axes"], ["s"]), N("MatMul", ["s", "w"], ["y"])],
        {"x": ["n", 5, 4]}, ["y"], W=normal(1, 32, 4, scale=0.3), R=normal(1, 32, 8, scale=0.3),
        B=normal(1, 64, scale=0.1), axes=np.array([0]), w=normal(8, 3),
    )  # fmt: skip


def shared() -> onnx.ModelProto:
    return model_of([N("MatMul", ["x", "w"], ["a"]), N("Relu", ["a"], ["r"]), N("MatMul", ["r", "w"], ["y"])],
                    {"x": ["n", 16]}, ["y"], w=normal(16, 16, scale=0.3))  # fmt: skip


def torch_networks() -> dict[str, Any]:
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.b, self.f = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Linear(16, 10)

        def forward(self, x):
            y = nn.functional.silu(self.n(self.a(x)))
            return self.f((y + nn.functional.gelu(self.b(y))).mean((2, 3)))

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = nn.Embedding(50, 32), nn.Linear(32, 50)
            self.l = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)

        def forward(self, ids):
            return self.h(self.l(self.e(ids)))

    x, ids = torch.randn(8, 3, 16, 16), torch.randint(0, 50, (8, 12))
    images, tokens = {"x": x.numpy()}, {"ids": ids.numpy()}
    blocks = {"target": "default_per_channel", "weights": "int4:block16"}
    return {
        "cnn, int8": (lambda: Net().eval(), x[:2], images, {}),
        "cnn, int4 blocks": (lambda: Net().eval(), x[:2], images, blocks),
        "transformer": (lambda: Tokens().eval(), ids[:2], tokens, {}),
    }


def keras_networks() -> dict[str, Any]:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)

    def net():
        x = layers.Input((16, 16, 3), name="x")
        y = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
        z = layers.ReLU(6.0)(layers.BatchNormalization()(layers.SeparableConv2D(16, 3, padding="same")(y)))
        y = layers.GlobalAveragePooling2D()(layers.Add()([y, z]))
        return keras.Model(x, layers.Dense(10, activation="softmax")(y))

    def attends():
        x = layers.Input((6, 16), name="x")
        y = layers.LayerNormalization()(layers.MultiHeadAttention(2, 8)(x, x) + x)
        return keras.Model(x, layers.Dense(4)(y))

    images = {"x": normal(16, 16, 16, 3)}
    return {
        "cnn, int8": (net, None, images, {}),
        "cnn, int4": (net, None, images, {"weights": "int4"}),
        "attention": (attends, None, {"x": normal(8, 6, 16)}, {}),
    }


def tensorflow_networks() -> dict[str, Any]:
    import tensorflow as tf

    module = tf.Module()
    module.a, module.b = tf.Variable(normal(3, 3, 3, 16, scale=0.3)), tf.Variable(normal(3, 3, 16, 1, scale=0.3))
    module.w, module.c = tf.Variable(normal(16, 10, scale=0.3)), tf.Variable(normal(10, scale=0.1))

    @tf.function(input_signature=[tf.TensorSpec([None, 16, 16, 3], tf.float32, name="x")])
    def net(x):
        y = tf.nn.relu(tf.nn.conv2d(x, module.a, 2, "SAME"))
        y = tf.nn.relu6(tf.nn.depthwise_conv2d(y, module.b, [1, 1, 1, 1], "SAME")) + y
        return tf.nn.softmax(tf.matmul(tf.reduce_mean(y, [1, 2]), module.w) + module.c)

    module.net = net
    images = {"x:0": normal(16, 16, 16, 3)}
    return {
        "cnn, int8": (net.get_concrete_function, None, images, {}),
        "cnn, W8A16": (net.get_concrete_function, None, images, {"activations": "uint16"}),
        "cnn, htp_v73": (net.get_concrete_function, None, images, {"target": "htp_v73"}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", default="onnx")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bitwright-corruption-") as name:
        folder = Path(name)
        base = bases(folder)
        print(f"{'corruption':<38} {'verify':>6} {'check':>6}  named")
        for kind, corruption in CORRUPTIONS.items():
            told = judged(corrupted(base, folder, kind))
            named = told.names(corruption.names)
            rows.append({"kind": kind, "verify": told.verify, "check": told.check, "named": named})
            line = next((x for x in told.lines if any(n in x for n in corruption.names)), "")
            print(f"{kind:<38} {told.verify:>6} {told.check:>6}  {'yes' if named else 'NO '}  {line[:120]}", flush=True)
            rows[-1]["found"] = told.found
        print(f"\n{'untouched export':<38} {'verify':>6} {'check':>6}")
        for label, path in untouched(arguments.frameworks.split(","), folder):
            told = judged(path)
            rows.append({"kind": label, "verify": told.verify, "check": told.check, "alarm": told.verify or told.check})
            print(
                f"{label:<38} {told.verify:>6} {told.check:>6}  {told.lines[0][:140] if told.lines else ''}", flush=True
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    missed = [r["kind"] for r in rows if "found" in r and not (r["found"] and r["named"])]
    alarms = [r["kind"] for r in rows if r.get("alarm")]
    count = sum("found" in r for r in rows)
    whole = len(rows) - count
    print(
        f"\n{count - len(missed)} of {count} corruptions found and named; {len(alarms)} false alarms in {whole} exports"
    )
    return 1 if missed or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
