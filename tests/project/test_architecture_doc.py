"""docs/architecture.md is a map of this house: every folder is on it, its floors hold, its walks are walked so."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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


def floors() -> dict[str, int]:
    """Room → floor, as drawn."""
    drawn = re.findall(r"│ +(\d+)  ((?:\w+(?: {2})?)+) *│", part("The picture"))
    return {room: int(floor) for floor, rooms in drawn for room in rooms.split()}


def imports(source: str) -> Iterator[str]:
    """Rooms of the core that a module imports: late imports and those for types too."""
    for node in ast.walk(ast.parse(source)):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [f"{node.module}.{a.name}" if node.module == "bitwright" else node.module for a in node.names]
        yield from (name.split(".")[1] for name in wanted if name.startswith("bitwright."))


def climbing(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Imports that don't lead down: "room → room"."""
    drawn = floors()
    return [
        f"{room} → {other}"
        for room, source in sources
        for other in imports(source)
        if other != room and other in drawn and drawn[other] >= drawn[room]
    ]


def test_rooms_import_what_is_drawn_below_them():
    drawn = floors()
    assert set(drawn) == {room.removesuffix(".py") for room in core_rooms()}
    assert sorted(set(drawn.values())) == list(range(len(set(drawn.values()))))
    sources = [
        (path.relative_to(CORE).parts[0].removesuffix(".py"), path.read_text(encoding="utf-8"))
        for path in CORE.rglob("*.py")
    ]
    assert not climbing((room, source) for room, source in sources if room in drawn)


def test_climbing_is_seen():
    assert climbing([("grids", "def f():\n    from bitwright.placement import Plan")]) == ["grids → placement"]
    assert climbing([("graph", "from bitwright import grids")]) == ["graph → grids"]
    typed = "if TYPE_CHECKING:\n    from bitwright.simulation import QuantSim"
    assert climbing([("bundle", typed)]) == ["bundle → simulation"]
    assert not climbing([("placement", "from bitwright.grids import Grid"), ("cli", "from bitwright import QuantSim")])


def reaching_in(path: Path, source: str) -> list[str]:
    """Private modules of the core that a file outside of their room imports."""
    parts = path.parts
    room = f"bitwright.{parts[2].removesuffix('.py')}." if parts[:2] == ("core", "bitwright") else "nothing"
    private = re.findall(r"^\s*(?:from|import) (bitwright\.\w+)(?:\.(_\w+)| import (_\w+))", source, re.M)
    return [
        f"{home}.{a or b}" for home, a, b in private if not f"{home}.".startswith(room) and not (a + b).startswith("__")
    ]


def test_private_modules_are_imported_in_their_room_alone():
    files = [
        p for folder in ("core", "backends", "plugins", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := reaching_in(path.relative_to(ROOT), path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("backends/bitwright_onnx/backend.py", "from bitwright.grids._grid import Grid", ["bitwright.grids._grid"]),
        ("core/bitwright/graph/_graph.py", "    from bitwright.grids import _grid", ["bitwright.grids._grid"]),
        ("core/bitwright/technique.py", "import bitwright.grids._grid as g", ["bitwright.grids._grid"]),
        ("core/bitwright/grids/_encoding.py", "from bitwright.grids._grid import Grid", []),
        ("plugins/bitwright_search/costs.py", "from bitwright.grids import Grid", []),
    ],
)
def test_reaching_in_is_seen(path, line, found):
    assert reaching_in(Path(path), line) == found


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
