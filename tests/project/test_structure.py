"""The house: nobody but `QuantSim` changes a simulation, and modules import each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from bitwright.simulation import QuantSim
from bitwright.state import SimState

ROOT = Path(__file__).parents[2]
QUANTSIM = ROOT / "core/bitwright/simulation/_quantsim.py"
SOURCES = ("core", "backends", "plugins")
OWN = {f.name for f in fields(SimState)} | {"state", "options", "params", "table", "_state", "_opened", "simulation"}
KINDS = ("QuantSim", "SimState")
MAKERS = {"fork", "retyped", "attach", "calibrate", "apply", "set", "of", "load", "load_encodings", "take"}
"""Methods of `QuantSim` that give one."""


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# -- stores


def stores(text: str) -> list[str]:
    """Stores of attributes on simulations and their states: on what is called, annotated or made as one, and, where a
    module knows the class, of a simulation's own attributes on anything but the object whose method it is."""
    if "sim" not in text and not any(kind in text for kind in KINDS):
        return []
    tree = ast.parse(text)
    sims = set(_simulations(tree))
    knows = any(isinstance(n, ast.ImportFrom) and any(a.name in KINDS for a in n.names) for n in ast.walk(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if _is_sim(node.value, sims) or (knows and node.attr in OWN and not itself):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("setattr", "delattr", "__setattr__", "vars") and (
                _is_sim(node.args[0], sims) and (called != "vars" or not _read(node, tree))
            ):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and _is_sim(node.value, sims):
            found.append(ast.unparse(node))
    return found


def _simulations(tree: ast.Module) -> Iterator[str]:
    """Names of variables, arguments and attributes that hold a `QuantSim` or its state."""
    yield "sim"
    for node in ast.walk(tree):
        annotated = isinstance(node, ast.arg | ast.AnnAssign) and node.annotation
        if annotated and any(kind in ast.unparse(annotated) for kind in KINDS):
            yield node.arg if isinstance(node, ast.arg) else ast.unparse(node.target).rpartition(".")[2]
        if isinstance(node, ast.Assign) and _makes(node.value):
            yield from (ast.unparse(t).rpartition(".")[2] for t in node.targets)


def _makes(value: ast.expr) -> bool:
    """Whether an expression is a new simulation: `QuantSim(…)`, `QuantSim.load(…)`, `sim.fork().calibrate(…)`."""
    while isinstance(value, ast.Call):
        called = value.func
        if isinstance(called, ast.Name):
            return called.id == "QuantSim"
        if not isinstance(called, ast.Attribute):
            return False
        if called.attr in ("fork", "retyped"):
            return True
        value = called.value
        if isinstance(value, ast.Name):
            return value.id == "QuantSim" and called.attr in MAKERS
    return False


def _is_sim(value: ast.expr, sims: set[str]) -> bool:
    if isinstance(value, ast.Attribute):
        return value.attr in sims
    return isinstance(value, ast.Name) and value.id in sims


def _read(call: ast.Call, tree: ast.Module) -> bool:
    """Whether the dictionary that `vars` gives is only copied or looked into."""
    return not any(isinstance(n, ast.Attribute | ast.Subscript) and n.value is call for n in ast.walk(tree))


def test_nobody_but_quantsim_stores_on_a_simulation():
    found = {
        str(path.relative_to(ROOT)): what
        for path in files(*SOURCES, "examples", "benchmarks")
        if path != QUANTSIM and "tests" not in path.parts[len(ROOT.parts) :] and (what := stores(path.read_text()))
    }
    assert not found
    own = stores(QUANTSIM.read_text())
    assert {o.rpartition(".")[2] for o in own} <= {"_state", "_opened"}


@pytest.mark.parametrize(
    "line",
    [
        "sim.native = model",
        "self.sim.run = None",
        "from bitwright.simulation import QuantSim\nresult.built.encodings = table",
        "best.sim.anything = 1",
        "twin = sim.fork()\ntwin.scheme = 'mse'",
        "net = QuantSim(model)\nnet.note = 'x'",
        "def f(network: QuantSim): network.note, b = 1, 2",
        "del sim.plan",
        "def f(state: SimState): object.__setattr__(state, 'plan', plan)",
        "net = QuantSim.load(folder).calibrate(data)\nsetattr(net, name, value)",
        "object.__setattr__(sim, '_state', state)",
        "vars(sim).update(before)",
        "sim.__dict__['_state'] = state",
        "for sim.seed in range(3): pass",
    ],
)
def test_stores_are_seen(line):
    assert stores(line)


def test_reading_is_no_store():
    assert not stores(
        "x = sim.native\nself.plan = sim.plan\nself.sim = sim\nseen = dict(vars(sim))\nsim.apply('cle')\nsim.graph.x"
    )


def test_a_simulation_has_its_state_and_what_is_open_of_it():
    made = ast.parse(QUANTSIM.read_text())
    slots = {n.attr for n in ast.walk(made) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert slots == {"_state", "_opened"}
    for field in fields(SimState):
        shown = getattr(QuantSim, field.name, None)
        assert field.name in ("training", "rounded") or (isinstance(shown, property) and shown.fset is None), field.name


# -- circles


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module → modules that it imports, late imports and those for types included.

    A package stands for its own `__init__`; what that hands on by name is looked up where it is defined, and the root
    packages, which import on demand, count for nothing.
    """
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted = [
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in sources else node.module
                    for a in node.names
                ]
            found[name].update(w for w in wanted if w in sources and w != name and "." in w)
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            if (module := stack.pop()) not in seen:
                seen.add(module)
                stack += graph[module]
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(g) for g in groups)


@cache
def modules() -> dict[str, str]:
    found = {}
    for path in files(*SOURCES):
        parts = path.relative_to(ROOT).with_suffix("").parts[1:]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def test_no_modules_import_each_other_in_a_circle():
    assert not circles(arrows(modules()))


def test_nothing_but_entrances_imports_quantsim():
    """The core's operations take a state; only façades and the command line know the simulation that holds it."""
    knowing = set()
    for name, text in modules().items():
        if not name.startswith("bitwright.") or "QuantSim" not in text:
            continue
        imports = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
        if any(a.name == "QuantSim" for n in imports for a in n.names):
            knowing.add(name)
    assert {name for name in knowing if not name.startswith("bitwright.cli.")} == {"bitwright.simulation"}


def test_circles_are_seen():
    late = "from __future__ import annotations\ndef f():\n    from p import b\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.c\n"
    assert circles(arrows({"p": "", "p.a": late, "p.b": typed, "p.c": "from p.a import f"})) == [["p.a", "p.b", "p.c"]]
    assert circles(arrows({"p": "from p.a import f", "p.a": "from p import __version__", "p.b": "import p.a"})) == []


# -- signatures

UNTYPED = 59
"""Parameters and results in the core that are Any and nothing else: the frameworks' own models, settings that each
technique and format narrows, what JSON or a plugin hands over, and keywords that `replace` passes on. Not to grow."""


def untyped(text: str) -> list[str]:
    """Parameters and results that are annotated with a bare Any."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            told = [(a.arg, a.annotation) for a in named if a is not None] + [("return", node.returns)]
            found += [f"{node.name}({n})" for n, kind in told if isinstance(kind, ast.Name) and kind.id == "Any"]
    return found


def test_signatures_of_the_core_say_what_they_take():
    found = [f"{p.relative_to(ROOT)}: {what}" for p in files("core/bitwright") for what in untyped(p.read_text())]
    assert len(found) <= UNTYPED, "\n".join(found)


def test_untyped_parameters_are_seen():
    assert untyped("def f(a: Any, *b: Any, c: list[Any] = (), **d: object) -> Any: ...") == [
        "f(a)",
        "f(b)",
        "f(return)",
    ]
