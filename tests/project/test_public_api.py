"""The public API is what the façades name; it changes on purpose only, and nobody reaches behind it."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest
from public_api import ROOT, SNAPSHOT, described, facades, parsed

import bitwright

SOURCES = [p for base in ("core", "backends", "plugins", "examples", "benchmarks") for p in (ROOT / base).rglob("*.py")]


def test_the_public_api_is_as_noted() -> None:
    now, noted = described().splitlines(), SNAPSHOT.read_text(encoding="utf-8").splitlines()
    change = "\n".join(difflib.unified_diff(noted, now, "public_api.txt", "the code", lineterm="", n=0))
    assert not change, f"the public API has changed; if on purpose: python {SNAPSHOT.with_suffix('.py')}\n{change}"


def test_dir_shows_all_that_the_package_offers() -> None:
    shown = dir(bitwright)
    assert {"QuantSim", "RunDirectory", "validate", "registry", "auto_quantize", "quant_analyzer"} <= set(shown)
    assert all(getattr(bitwright, name) is not None for name in shown)


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(AttributeError, match="did you mean 'auto_quantize'"):
        bitwright.auto_quantise  # noqa: B018


def _private_imports(path: Path) -> Iterator[str]:
    """Imports of a core package's private modules, or of anybody's private names, from outside of that package."""
    inside = path.relative_to(ROOT).parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            private = [i for i, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
            if not parts[0].startswith("bitwright") or not private:
                continue
            if parts[: private[0]] != list(inside[1 : private[0] + 1]) or len(private) > 1:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {module}"


def test_nobody_imports_what_is_private() -> None:
    assert [found for path in SOURCES for found in _private_imports(path)] == []


def test_every_facade_says_what_it_is() -> None:
    for name, path in facades().items():
        assert ast.get_docstring(parsed(path)), name


FRAMEWORKS_OWN = {
    "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_schema", "_ops", "_version", "_layers",
    "_functional", "_inputs", "_evaluate", "_registry",
}  # fmt: skip
"""Private names of frameworks that have no public way, and that our own classes have too (or inherit)."""


def _owned(tree: ast.AST) -> set[str]:
    """Private attributes and methods that the classes of a module give themselves."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_no_class_reaches_into_the_private_parts_of_another() -> None:
    trees = {path: parsed(path) for path in SOURCES}
    owned_by = {path: _owned(tree) for path, tree in trees.items()}
    ours = set().union(*owned_by.values()) - FRAMEWORKS_OWN
    found = []
    for path, tree in trees.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        inside = {id(n): owned for c in classes for owned in (_owned(c),) for n in ast.walk(c)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in ours:
                continue
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            # Another object of the same class is not a stranger, and accessors stand beside their class.
            if node.attr in inside.get(id(node), set()) or (id(node) not in inside and node.attr in owned_by[path]):
                continue
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
