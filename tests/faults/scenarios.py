"""Commands that faults are put into, and what they are given."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Words = Callable[[Path, Path], Sequence[object]]
"""From the folder of the inputs and the output folder to a command."""

IMPORTED_THREADS = 1
"""ONNX Runtime's import starts one, which no session needs."""


@dataclass(frozen=True)
class Scenario:
    """A command.

    Attributes:
        name: what it is called.
        words: the command.
        model: writes the model.
        before: a command whose export lies in the folder already.
        warm: the command may run once before anything is forked, as it starts no threads. Where it starts some, the
            modules that it takes are imported, and nothing else is done.
    """

    name: str
    words: Words
    model: Callable[[Path], None]
    before: Words | None = None
    warm: bool = True


def prepared(scenario: Scenario, inputs: Path) -> None:
    """Write what the command is given, in a process of its own, and import what it takes, so that each fork doesn't.

    Raises:
        RuntimeError: the model can't be written, or importing starts threads, which forks would lack.
    """
    inputs.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 3, 6, 6)).astype(np.float32)
    if scenario.model in (_keras, _tensorflow):
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    np.save(inputs / "data.npy", images)
    np.save(inputs / "labels.npy", rng.integers(0, 4, 12))
    (inputs / "recipe.yaml").write_text("- fold_batch_norm\n- cle\n- adaround: {solver: gradient, iterations: 20}\n")
    writing = multiprocessing.get_context("spawn").Process(target=scenario.model, args=(inputs,))
    writing.start()
    writing.join()
    if writing.exitcode:
        raise RuntimeError(f"{scenario.name}: its model can't be written")
    if scenario.warm:
        _once(scenario, inputs)
    else:
        for name in _taken(scenario, inputs):
            with contextlib.suppress(ImportError):  # what modules put into `sys.modules` under names of their own
                importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) > 1 + IMPORTED_THREADS:
        raise RuntimeError(f"{scenario.name}: threads run before it is forked")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at


def _once(scenario: Scenario, inputs: Path) -> None:
    from bitwright.cli import main

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        main([str(word) for word in scenario.words(inputs, Path(out))])


def _taken(scenario: Scenario, inputs: Path) -> list[str]:
    """The modules that a command imports, in order, from a fork that runs it once."""
    told = inputs / "modules"
    process = os.fork()
    if process == 0:
        try:
            _once(scenario, inputs)
            told.write_text("\n".join(name for name in list(sys.modules) if not name.startswith("__")))
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    return told.read_text().splitlines()


def _onnx(folder: Path) -> None:
    import onnx

    rng, node, info = np.random.default_rng(1), onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)), "g": rng.uniform(0.5, 2, 4), "b": np.zeros(4), "m": np.zeros(4),
        "v": rng.uniform(0.5, 2, 4), "fc": rng.normal(size=(4, 4)),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"), node("BatchNormalization", [*"cgbmv"], ["n"], "norm"),
        node("Relu", ["n"], ["r"], "relu"), node("GlobalAveragePool", ["r"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flatten"), node("Gemm", ["f", "fc"], ["y"], "gemm"),
    ]  # fmt: skip
    arrays = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    graph = onnx.helper.make_graph(nodes, "net", [info("x", 1, ["n", 3, 6, 6])], [info("y", 1, ["n", 4])], arrays)
    _save(graph, folder)


def _small(folder: Path) -> None:
    """A single layer: each site is a trial and a curve of its own, written as all others are."""
    import onnx

    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    nodes = [node("Conv", ["x", "w"], ["c"], "conv"), node("Relu", ["c"], ["y"], "relu")]
    _save(
        onnx.helper.make_graph(
            nodes, "net", [info("x", 1, ["n", 3, 6, 6])], [info("y", 1, ["n", 4, 4, 4])], [weight]
        ), folder,
    )  # fmt: skip


def _save(graph: Any, folder: Path) -> None:
    import onnx

    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        folder / "net.onnx",
    )


def _keras(folder: Path) -> None:
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    keras.Sequential(
        [
            keras.Input((6, 6, 3), name="x"), layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"), layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(name="pool"), layers.Dense(4, name="fc"),
        ]
    ).save(folder / "net.keras")  # fmt: skip


def _tensorflow(folder: Path) -> None:
    import keras

    _keras(folder)
    keras.saving.load_model(folder / "net.keras").export(folder / "net", format="tf_saved_model", verbose=False)


def _command(name: str, model: str, *more: object) -> Words:
    def words(inputs: Path, out: Path) -> Sequence[object]:
        given = [inputs / w[1:] if isinstance(w, str) and w.startswith("@") else w for w in more]
        return [name, inputs / model, "--data", inputs / "data.npy", "--out", out, "-q", *given]

    return words


_QUANTIZE = ("quantize", "net.onnx", "--recipe", "@recipe.yaml")
SCENARIOS = {
    s.name: s
    for s in (
        Scenario("quantize", _command(*_QUANTIZE), _onnx),
        Scenario(
            "quantize, over an older export", _command(*_QUANTIZE, "--weights", "int4"), _onnx, _command(*_QUANTIZE)
        ),
        Scenario(
            "auto",
            _command("auto", "net.onnx", "--labels", "@labels.npy", "--allowed-drop", 0.9, "--schemes", "minmax"),
            _onnx,
        ),
        Scenario(
            "mixed-precision",
            _command("mixed-precision", "net.onnx", "--budget", 0.9, "--candidates", "int8/uint8,int4/uint8"), _small,
        ),
        Scenario("analyze", _command("analyze", "net.onnx"), _small),
        Scenario("collect", _command("collect", "net.onnx", "--techniques", "fold_batch_norm"), _onnx),
        Scenario(
            "quantize, Keras", _command("quantize", "net.keras", "--recipe", "fold_batch_norm"), _keras, warm=False
        ),
        Scenario(
            "quantize, TensorFlow", _command("quantize", "net", "--recipe", "fold_batch_norm"), _tensorflow, warm=False
        ),
    )
}  # fmt: skip
