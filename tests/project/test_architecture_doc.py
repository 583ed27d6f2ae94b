"""docs/architecture.md is a map of this house: every folder is on it, its floors hold, its walks are walked so."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import tomllib
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CORE = ROOT / "core" / "bitwright"
INNER = ("capture", "graph", "simulate", "export")


def part(title: str, level: int = 2) -> str:
    """The text under a heading."""
    (found,) = re.findall(rf"^{'#' * level} {re.escape(title)}\n(.*?)(?=^#{{2,{level}}} |\Z)", TEXT, re.M | re.S)
    return found


# -- folders


def described(title: str) -> set[str]:
    """Folders and files that a paragraph begins with, or that stand in bold within one."""
    bold = " ".join(re.findall(r"\*\*(.*?)\*\*", part(title)))
    return {name.rstrip("/") for name in re.findall(r"`(.*?)`", bold)}


def packages(folder: Path) -> set[str]:
    return {p.parent.relative_to(folder).as_posix() for p in folder.rglob("__init__.py")} - {"."}


def core_rooms() -> set[str]:
    """Folders and public modules right below the core."""
    return {p.parent.name for p in CORE.glob("*/__init__.py")} | {
        p.name for p in CORE.glob("*.py") if not p.stem.startswith("_")
    }


def test_every_folder_of_the_core_is_described():
    data = {p.parent.relative_to(CORE).as_posix() for p in CORE.rglob("*.json")}
    assert described("`core/bitwright/`") == core_rooms() | packages(CORE) | data


def test_every_folder_of_the_backends_is_described():
    found = packages(ROOT / "backends")
    own = {name for name in found if "/" not in name}
    for backend in own:
        assert {f"{backend}/{inner}" for inner in INNER} <= found, backend
    further = {name for name in found if "/" in name and name.partition("/")[2] not in INNER}
    assert described("`backends/`") == own | set(INNER) | further


def test_every_plugin_and_every_other_folder_is_described():
    assert described("`plugins/`") == packages(ROOT / "plugins")
    for name in described("The rest"):
        assert (ROOT / name).is_dir(), name
    kept = {"core", "backends", "plugins", "tests", "docs", "examples", "benchmarks", "changes"}
    assert described("The rest") == kept - {"core", "backends", "plugins"}
    told = set(re.findall(r"`([a-z]+)`", part("The rest")))
    assert {p.parent.name for p in (ROOT / "tests").glob("*/test_*.py")} <= told


# -- floors


def floors(picture: str) -> list[set[str]]:
    """The rooms on each floor, from the top, as drawn: number, names, and what they are."""
    drawn = re.findall(r"│ +(\d+)  (\w+(?: · \w+)*) {2,}", picture)
    assert [int(number) for number, _ in drawn] == list(reversed(range(len(drawn))))
    return [set(names.split(" · ")) for _, names in drawn]


def contract() -> list[set[str]]:
    """The layers that import-linter holds, from the top; private modules of the package itself are not rooms."""
    linted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (c["layers"] for c in linted if c["type"] == "layers" and c["containers"] == ["bitwright"])
    rooms = [{room for room in layer.split(" | ") if not room.startswith("_")} for layer in layers]
    return [layer for layer in rooms if layer]


def test_the_floors_are_those_that_the_import_rules_hold():
    drawn = floors(part("The picture"))
    assert drawn == contract()
    assert set().union(*drawn) == {room.removesuffix(".py") for room in core_rooms()}


def test_the_picture_has_every_backend_and_plugin():
    for folder in ("backends", "plugins"):
        for package in (ROOT / folder).glob("*/__init__.py"):
            assert package.parent.name in part("The picture"), package


# -- walks

WALKS = {
    title: re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", text)
    for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", part("Three walks"), re.M | re.S)
}
QUANTIZE, CALIBRATE, ADAROUND = WALKS


def found(name: str) -> Any:
    """What a dotted name of the map stands for; names of the core begin at `bitwright`."""
    parts = name.split(".")
    parts = parts if parts[0].startswith("bitwright") else ["bitwright", *parts]
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            thing = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
            continue
        for attribute in parts[length:]:
            thing = getattr(thing, attribute)
        return thing
    raise ModuleNotFoundError(name)


def code_of(name: str) -> CodeType:
    thing = found(name)
    if isinstance(thing, property):
        thing = thing.fget
    if isinstance(thing, functools.cached_property):
        thing = thing.func
    code = inspect.unwrap(thing).__code__
    assert isinstance(code, CodeType)
    return code


def called(run: Callable[[], Any]) -> dict[CodeType, int]:
    """Every function that is called, on any thread → its place in the order of first calls."""
    order: dict[CodeType, int] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            order.setdefault(frame.f_code, len(order))

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        threading.setprofile(before)  # type: ignore[arg-type]
    return order


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """Two convolutions, of which the first has a batch norm, as a file beside its data."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("net")
    rng = np.random.default_rng(0)

    def tensor(name, *shape, low=-0.5):
        return onnx.numpy_helper.from_array(rng.uniform(low, 0.5, shape).astype(np.float32), name)

    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["x", "one.weight"], ["one"], "one"),
            node("BatchNormalization", ["one", "gamma", "beta", "mean", "var"], ["norm"], "norm"),
            node("Relu", ["norm"], ["relu"], "relu"),
            node("Conv", ["relu", "two.weight", "two.bias"], ["y"], "two"),
        ],
        "net",
        [info("x", onnx.TensorProto.FLOAT, ["n", 2, 6, 6])],
        [info("y", onnx.TensorProto.FLOAT, None)],
        [
            tensor("one.weight", 4, 2, 3, 3), tensor("gamma", 4, low=0.2), tensor("beta", 4), tensor("mean", 4),
            tensor("var", 4, low=0.2), tensor("two.weight", 3, 4, 1, 1), tensor("two.bias", 3),
        ],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "data.npz", x=rng.normal(size=(16, 2, 6, 6)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def walked(net) -> dict[str, dict[CodeType, int]]:
    """What each walk calls."""
    from bitwright import QuantSim
    from bitwright.cli import main

    for late in ("bitwright.cli.app", "bitwright_onnx.backend", "bitwright_techniques.adaround"):
        import_module(late)  # while nothing counts calls
    words = ["quantize", "net.onnx", "--data", "data.npz", "--recipe", "fold_batch_norm,adaround", "--out", "out"]
    words = [str(net / word) if word in ("net.onnx", "data.npz", "out") else word for word in words]
    statuses = []
    quantized = called(lambda: statuses.append(main([*words, "--quiet"])))
    assert statuses == [0]
    sim = QuantSim(net / "net.onnx")
    with np.load(net / "data.npz") as data:
        calibrated = called(lambda: sim.calibrate(data["x"]))
    return {QUANTIZE: quantized, CALIBRATE: calibrated, ADAROUND: quantized}


def test_there_are_three_walks_with_their_functions():
    assert len(WALKS) == 3
    assert all(len(set(names)) >= 15 for names in WALKS.values())


@pytest.mark.parametrize("walk", [QUANTIZE, CALIBRATE, ADAROUND])
def test_walks_are_walked_as_they_are_described(walk, walked):
    order = walked[walk]
    names = list(dict.fromkeys(WALKS[walk]))
    assert not [name for name in names if code_of(name) not in order]
    places = [order[code_of(name)] for name in names]
    steps = pairwise(zip(names, places, strict=True))
    assert not [f"{b} is called before {a}" for (a, i), (b, j) in steps if j < i]
