"""What reads files that strangers may have made: seeds, the damage done to them, and the reading itself."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from framework_files import (
    damaged_checkpoint,
    damaged_frozen,
    damaged_h5,
    damaged_keras,
    damaged_pt2,
    damaged_saved_model,
    opened,
)
from hypothesis import strategies as st
from mutation import as_json, damaged_bytes, damaged_documents, damaged_json, damaged_zip
from onnx import numpy_helper
from PIL import Image

from bitwright import QuantSim, formats
from bitwright.bank import Bank, collect
from bitwright.bank._record import INDEX, _digest
from bitwright.bundle._record import read_reference
from bitwright.data import labels, open_data
from bitwright.errors import BitwrightError
from bitwright.plugins import registry
from bitwright.report import RunReport, read_report
from bitwright.runs._directory import FileStore
from bitwright.simulation import read_recipe
from bitwright.simulation._saved_state import ENCODINGS, STATE
from bitwright.targets import load_target, target_names
from bitwright.testing import models, reference

GOLDEN = Path(__file__).parents[1] / "core/formats_golden"
SPECS: dict[str, tuple[tuple[int | None, ...], str]] = {"x": ((None, 4), "float32"), "k": ((None,), "int64")}


@dataclass(frozen=True)
class Reader:
    """One way in.

    Attributes:
        suffix: of the file.
        inputs: damaged files.
        read: reads one; returns (False: it was told apart from a whole one), or raises `BitwrightError`.
        needs: modules without which it isn't tried.
        cost: so many times fewer inputs are tried, since reading one takes so much longer.
    """

    suffix: str
    inputs: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[Path], object]
    needs: tuple[str, ...] = ()
    cost: int = 1


def _encodings(path: Path) -> None:
    """Read, and what can be read can be written in some schema and then read again as the same."""
    file = formats.read(path)
    for version in formats.VERSIONS:
        try:
            converted = formats.convert(file, version).file
            text = formats.dumps(converted, version)
        except BitwrightError:
            continue
        assert set(formats.loads(text).entries) == set(converted.entries), version


def _golden() -> st.SearchStrategy[bytes]:
    texts = [p.read_bytes() for p in sorted(GOLDEN.iterdir())]
    return st.one_of(damaged_json([json.loads(t) for t in texts]), damaged_bytes(texts))


def _targets() -> st.SearchStrategy[bytes]:
    seeds = [json.loads(load_target(name).to_json()) for name in target_names()]
    return damaged_json([*seeds, {"extends": "generic-int8", "params": {"weight": {"is_quantized": "True"}}}])


RECIPE = [
    "fold_batch_norm", {"cle": {}}, {"adaround": {"include": ["*"], "damping": 0.5}}, {"bias_correction": None},
]  # fmt: skip


def _recipes() -> st.SearchStrategy[bytes]:
    seeds = [RECIPE, {"steps": RECIPE}]
    dumped = damaged_documents(seeds).map(_as_yaml)
    return st.one_of(dumped, damaged_bytes([yaml.safe_dump(s).encode() for s in seeds]))


def _as_yaml(document: Any) -> bytes:
    try:
        return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return b"- \xff"


def _npy() -> st.SearchStrategy[bytes]:
    return damaged_bytes([_saved(np.arange(8, dtype=t).reshape(2, 4)) for t in ("<f4", ">f8", "<i8", "<u1", "<f2")])


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(compressed: bool) -> st.SearchStrategy[bytes]:
    buffer = io.BytesIO()
    write = np.savez_compressed if compressed else np.savez
    write(buffer, x=np.ones((6, 4), np.float32), k=np.arange(6))
    return damaged_zip([buffer.getvalue()], compress=compressed)


def _labels() -> st.SearchStrategy[bytes]:
    return damaged_bytes([b"0\n1\n2\n", b"12 7\n", "٣\n".encode()])


def _data(path: Path) -> None:
    dataset = open_data(path, SPECS, batch_size=4)
    for batch in dataset:
        assert set(batch) == set(SPECS)


def _network() -> onnx.ModelProto:
    """Convolution, batch norm, an If, a function call and a linear layer."""
    rng = np.random.default_rng(0)
    N, V = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)), "g": np.ones(4), "b": np.zeros(4), "m": np.zeros(4), "v": np.ones(4),
        "fc": rng.normal(size=(4, 5)), "yes": np.array(True),
    }  # fmt: skip
    arrays = [numpy_helper.from_array(v.astype(bool if k == "yes" else np.float32), k) for k, v in weights.items()]
    branch = onnx.helper.make_graph([N("Relu", ["n"], ["r"], "relu")], "then", [], [V("r", 1, None)])
    other = onnx.helper.make_graph([N("Twice", ["n"], ["r"], "twice", domain="own")], "else", [], [V("r", 1, None)])
    nodes = [
        N("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]), N("BatchNormalization", [*"cgbmv"], ["n"], "norm"),
        N("If", ["yes"], ["i"], "if", then_branch=branch, else_branch=other),
        N("GlobalAveragePool", ["i"], ["p"], "pool"), N("Flatten", ["p"], ["f"], "flatten"),
        N("Gemm", ["f", "fc"], ["y"], "gemm"),
    ]  # fmt: skip
    twice = onnx.helper.make_function(
        "own", "Twice", ["a"], ["s"], [N("Add", ["a", "a"], ["s"])], [onnx.helper.make_opsetid("", 17)]
    )
    graph = onnx.helper.make_graph(nodes, "net", [V("x", 1, ["n", 3, 8, 8])], [V("y", 1, ["n", 5])], arrays)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=[twice], ir_version=8)


@cache
def _written() -> Mapping[str, bytes]:
    """What one small network leaves behind, by path: its export, its run directory, a saved state."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        onnx.save(_network(), root / "net.onnx")
        batch = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
        sim = QuantSim(root / "net.onnx").apply("fold_batch_norm").calibrate(batch)
        sim.export(root / "out", name="net")
        sim.save(root / "saved")
        _unsealed(root / "saved" / STATE, root / "older" / STATE)
        for name in ("model.onnx", ENCODINGS):
            (root / "older" / name).write_bytes((root / "saved" / name).read_bytes())
        collect(QuantSim(root / "net.onnx"), batch, root / "bank")
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(root / "picture.png")
        FileStore(root / "steps").put("key", {"a": np.arange(6.0)})
        reference.ReferenceBackend().save(models.residual(), root / "model.npz")
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _beside(path: Path, folder: str, place: str) -> Path:
    """A folder with everything undamaged but for the file at `path`, which takes a place in it."""
    root = path.parent / f"{folder}-whole"
    if not root.exists():
        for name, content in _written().items():
            if name.startswith(f"{folder}/"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
    (root / place).write_bytes(path.read_bytes())
    return root / folder


def _json_of(*names: str) -> st.SearchStrategy[bytes]:
    return damaged_json([json.loads(_written()[name]) for name in names])


def _report(path: Path) -> bool:
    found = read_report(_beside(path, "out", "out/report.json"), "net")
    assert found.report is not None or found.damage or json.loads(path.read_text())["name"] != "net"
    return not found.damage


def _record(path: Path) -> None:
    folder = _beside(path, "out", "out/net.record.npz")
    whole = RunReport.model_validate_json(_written()["out/report.json"])
    assert whole.record is not None
    assert whole.record.reference is not None
    read_reference(folder, whole.record.reference)


def _unsealed(state: Path, older: Path) -> None:
    """A saved simulation as older versions wrote it: without hashes, so that damage gets further than to them."""
    content = json.loads(state.read_text())
    older.parent.mkdir()
    older.write_text(json.dumps({k: v for k, v in content.items() if k not in ("seal", "contents")}))


def _saved_state(folder: str, name: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        QuantSim.load(_beside(path, folder, f"{folder}/{name}"))

    return read


def _indices() -> st.SearchStrategy[bytes]:
    """Indices of banks, damaged and then sealed again."""
    seed = json.loads(_written()[f"bank/{INDEX}"])
    del seed["sha256"]
    return st.one_of(damaged_documents([seed]).map(_sealed), damaged_bytes([_written()[f"bank/{INDEX}"]]))


def _sealed(content: Any) -> bytes:
    return as_json({**content, "sha256": _digest(content)} if isinstance(content, dict) else content)


def _bank(path: Path) -> None:
    bank = Bank.open(_beside(path, "bank", f"bank/{INDEX}"))
    bank.verify()
    for tensor in bank.record.tensors:
        bank.histogram(tensor)
        bank.ranges(tensor)
    for place in range(len(bank.record.moments)):
        bank.moments(place)


def _pictures() -> st.SearchStrategy[bytes]:
    seeds = []
    with Image.open(io.BytesIO(_written()["picture.png"])) as picture:
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"):
            buffer = io.BytesIO()
            picture.save(buffer, kind)
            seeds.append(buffer.getvalue())
    return damaged_bytes(seeds)


def _picture(path: Path) -> None:
    for batch in open_data(path.parent, {"x": ((None, 3, 8, 8), "float32")}):
        assert batch["x"].shape == (1, 3, 8, 8)


def _step(path: Path) -> bool:
    """A damaged step is absent: nothing but what was stored ever comes back."""
    ((name, _),) = ((n, c) for n, c in _written().items() if n.startswith("steps/"))
    found = FileStore(_beside(path, "steps", name)).get("key")
    assert found is None or np.array_equal(found["a"], np.arange(6.0))
    return found is not None


def _onnx(path: Path) -> None:
    backend = registry.backend("onnx")
    backend.graph(backend.load(path))


READERS: Mapping[str, Reader] = {
    "encodings": Reader(".encodings", _golden, _encodings),
    "target": Reader(".json", _targets, load_target),
    "recipe.yaml": Reader(".yaml", _recipes, read_recipe),
    "recipe.json": Reader(".json", lambda: damaged_json([RECIPE, {"steps": RECIPE}]), read_recipe),
    "npy": Reader(".npy", _npy, lambda p: open_data(p, {"x": ((None, 4), "float32")})),
    "npz": Reader(".npz", lambda: _npz(False), _data),
    "compressed npz": Reader(".npz", lambda: _npz(True), _data),
    "labels": Reader(".txt", _labels, labels),
    "labels.npy": Reader(".npy", _npy, labels),
    "report": Reader(".json", lambda: _json_of("out/report.json"), _report),
    "record": Reader(".npz", lambda: damaged_zip([_written()["out/net.record.npz"]]), _record),
    "saved state": Reader(".json", lambda: _json_of(f"saved/{STATE}"), _saved_state("saved", STATE)),
    "older state": Reader(".json", lambda: _json_of(f"older/{STATE}"), _saved_state("older", STATE)),
    "saved encodings": Reader(
        ".npz", lambda: damaged_zip([_written()[f"older/{ENCODINGS}"]]), _saved_state("older", ENCODINGS)
    ),
    "bank": Reader(".json", _indices, _bank),
    "picture": Reader(".png", _pictures, _picture),
    "step": Reader(".npz", lambda: damaged_bytes([c for n, c in _written().items() if n.startswith("steps/")]), _step),
    "dataflow model": Reader(".npz", lambda: damaged_zip([_written()["model.npz"]]), reference.ReferenceBackend().load),
    "onnx": Reader(".onnx", lambda: damaged_bytes([_written()["net.onnx"]]), _onnx),
    "keras": Reader(".keras", damaged_keras, partial(opened, "keras"), ("keras",), 15),
    "h5": Reader(".h5", damaged_h5, partial(opened, "keras"), ("keras",), 15),
    "pt2": Reader(".pt2", damaged_pt2, partial(opened, "torch"), ("torch",), 15),
    "frozen.pb": Reader(".pb", damaged_frozen, partial(opened, "tensorflow"), ("tensorflow",), 15),
    "meta": Reader(".meta", *damaged_checkpoint("net.meta"), ("tensorflow",), 15),
    "saved_model.pb": Reader(".pb", *damaged_saved_model("saved_model.pb"), ("tensorflow",), 15),
    "variables.index": Reader(".index", *damaged_saved_model("variables/variables.index"), ("tensorflow",), 15),
}
