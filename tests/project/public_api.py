"""The public API as text: every name of every façade with its signature.

`python tests/project/public_api.py` writes it. Read from the source, so that no framework need be installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("public_api.txt")
BACKENDS = ("bitwright_onnx", "bitwright_torch", "bitwright_keras", "bitwright_tensorflow")


@cache
def parsed(path: Path) -> ast.Module:
    """A source file; most are looked at for many names."""
    return ast.parse(path.read_text(encoding="utf-8"))


def facades() -> dict[str, Path]:
    """Public packages and modules → the file that says what they offer."""
    core = ROOT / "core" / "bitwright"
    found = {"bitwright": core / "__init__.py"}
    found |= {f"bitwright.{p.parent.name}": p for p in sorted(core.glob("*/__init__.py"))}
    for path in sorted([*core.glob("*.py"), *core.glob("*/*.py")]):
        if not path.stem.startswith("_") and path.parent.name != "cli":
            found[".".join(("bitwright", *path.relative_to(core).with_suffix("").parts))] = path
    return found | {name: ROOT / "backends" / name / "__init__.py" for name in BACKENDS}


def described() -> str:
    """All of it, a line for each name, class members indented."""
    lines: list[str] = []
    for name, path in facades().items():
        tree = parsed(path)
        lines += [f"# {name}", *_offered(tree, path), ""]
    return "\n".join(lines)


def _offered(tree: ast.Module, path: Path) -> Iterator[str]:
    listed = _listed(tree)
    if listed is None:
        for node in tree.body:
            yield from _public(node)
        return
    for name in sorted(listed):
        node = _definition(tree, name, path)
        yield from _described(node) if node is not None else [name]


def _listed(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def _definition(tree: ast.Module, name: str, path: Path) -> ast.stmt | None:
    """Where a name is defined: here, or in the module that it is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and any((a.asname or a.name) == name for a in node.names):
            source = _file(node.module)
            if source is None or source == path:
                return None
            origin = next(a.name for a in node.names if (a.asname or a.name) == name)
            return _definition(parsed(source), origin, source)
    for statement in tree.body:
        if name in _names(statement):
            return statement
    return None


def _file(module: str) -> Path | None:
    for base in ("core", "backends"):
        path = ROOT / base / Path(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _names(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
            return [t.id for t in flat if isinstance(t, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _public(node: ast.stmt) -> Iterator[str]:
    if any(not name.startswith("_") or name == "__init__" for name in _names(node)):
        yield from _described(node)


def _described(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef():
            result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
            yield f"{node.name}({ast.unparse(node.args)}){result}"
        case ast.ClassDef():
            bases = ", ".join(ast.unparse(b) for b in node.bases)
            yield f"class {node.name}({bases})"
            for member in node.body:
                yield from (f"    {line}" for line in _public(member))
        case ast.AnnAssign():
            # Whether there is a default belongs to a signature; which it is, only where it is short.
            yield f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}" + (" = …" if node.value else "")
        case ast.Assign():
            yield ", ".join(_names(node))


if __name__ == "__main__":
    SNAPSHOT.write_text(described(), encoding="utf-8")
