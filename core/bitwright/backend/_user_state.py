"""What the user's Python keeps on its way, outside of what is traced: caches, globals, attributes of classes.

Tracing runs a model's code on stand-ins without data. Code that keeps tensors (by shape in a dictionary, behind
`functools.lru_cache`, in a global variable, on a class) would keep those stand-ins, in the user's own process, where
the float model then computes with them. So everything that the code can reach is put back after a trace.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_CONTAINERS = (list, dict, set, deque)
_LEAVES = (str, bytes, int, float, complex, bool, type(None), type(...), range, slice)
_CACHED = type(functools.lru_cache(lambda: None))
_ABSENT = object()
_FRAMEWORKS = frozenset({"torch", "numpy", "keras", "tensorflow", "tf_keras", "jax", "jaxlib", "onnx", "onnxruntime"})


@contextmanager
def user_state_kept(*roots: object, holders: tuple[type, ...] = ()) -> Iterator[None]:
    """Put back, at the end, what code that runs meanwhile has changed in Python objects that it can reach.

    Args:
        roots: what is run: modules, layers, functions.
        holders: types whose instances are looked into although their classes are a framework's own. Other objects of
            frameworks and of the standard library are left alone, and so are the contents of arrays and tensors.

    Attributes, containers, global variables and closures get the values back that they had. A function's
    `functools.lru_cache` is emptied if it was asked for anything new, as single entries can't be taken out. Objects
    that don't let themselves be looked into (a weak reference's proxy whose object is gone) are left alone.
    """
    undo = _Walk(holders).over(roots)
    try:
        yield
    finally:
        _run_all(iter(undo))


def _run_all(steps: Iterator[Callable[[], None]]) -> None:
    """One that fails, as a container may refuse to be changed, keeps no other from it."""
    try:
        for step in steps:
            step()
    except Exception:
        _run_all(steps)
        raise


class _Walk:
    """Over all that is reachable; what undoes later changes of it."""

    def __init__(self, holders: tuple[type, ...]) -> None:
        self._holders = holders
        self._seen: dict[int, object] = {}  # the objects too, so that no other one gets their ids
        self._todo: list[object] = []
        self._undo: list[Callable[[], None]] = []

    def over(self, roots: Iterable[object]) -> list[Callable[[], None]]:
        self._todo.extend(roots)
        while self._todo:
            with suppress(Exception):  # of what doesn't let itself be looked into; it goes on behind that
                self._through()
        return self._undo

    def _through(self) -> None:
        while self._todo:
            value = self._todo.pop()
            if not isinstance(value, _LEAVES) and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._visit(value)

    def _visit(self, value: object) -> None:
        if isinstance(value, FunctionType):
            if not _foreign(value.__module__):
                self._function(value)
        elif isinstance(value, _CACHED):
            self._undo.append(functools.partial(_empty, value, value.cache_info().misses))
            self._todo.append(value.__wrapped__)
        elif isinstance(value, MethodType):
            self._todo += [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            self._todo += [value.func, value.args, value.keywords]
        elif isinstance(value, staticmethod | classmethod):
            self._todo.append(value.__func__)
        elif isinstance(value, property):
            self._todo += [value.fget, value.fset]
        elif isinstance(value, functools.cached_property):
            self._todo.append(value.func)
        elif isinstance(value, type):
            if not _foreign(value.__module__):
                self._class(value)
        elif isinstance(value, tuple | frozenset):
            self._todo.extend(value)
        elif not isinstance(value, ModuleType):
            self._object(value)

    def _object(self, value: object) -> None:
        """An instance: its attributes and, if it is a container, what it holds."""
        if isinstance(value, _CONTAINERS):
            content = _content(value)
            self._undo.append(functools.partial(_refill, value, content))
            self._todo.extend(content.values() if isinstance(content, dict) else content)
        kind = type(value)
        if _foreign(kind.__module__) and not isinstance(value, self._holders):
            return
        self._todo.append(kind)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._undo.append(functools.partial(_refill, attributes, dict(attributes)))
            self._todo.extend(attributes.values())

    def _class(self, value: type) -> None:
        held = dict(vars(value))
        self._undo.append(functools.partial(_rebind_class, value, held))
        self._todo.extend(held.values())
        self._todo.extend(value.__mro__[1:])

    def _function(self, value: FunctionType) -> None:
        """What a function can name: globals and attributes of modules, and what it has closed over."""
        codes = list(_codes(value.__code__))
        names = {name for code in codes for name in code.co_names}
        written = {name for code in codes for name in _written(code)}
        self._scope(value.__globals__, names, written)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # empty as yet
                content = cell.cell_contents
                self._undo.append(functools.partial(_set_cell, cell, content))
                self._todo.append(content)
        self._todo += [value.__defaults__ or (), value.__kwdefaults__ or {}, value.__dict__]

    def _scope(self, scope: dict[str, Any], names: Iterable[str], written: Iterable[str]) -> None:
        """Names of a module: what they mean now, and what the modules among them hold by the same names."""
        names = set(names)
        found = {name: scope[name] for name in names if name in scope}
        kept = {**dict.fromkeys(set(written) - set(found), _ABSENT), **found}
        self._undo.append(functools.partial(_rebind, scope, kept))
        for value in found.values():
            if not isinstance(value, ModuleType):
                self._todo.append(value)
            elif not _foreign(value.__name__) and id(value) not in self._seen:
                self._scope(vars(value), names, ())


def _foreign(module: object) -> bool:
    """Whether code is a framework's, Python's or ours, whose own state a trace may change."""
    root = module.partition(".")[0] if isinstance(module, str) else "builtins"
    return root in _FRAMEWORKS or root in sys.stdlib_module_names or root.startswith("bitwright")


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _written(code: CodeType) -> Iterator[str]:
    """Global variables that code writes to, which needn't exist before."""
    if dis.opmap["STORE_GLOBAL"] in code.co_code[::2]:
        yield from (str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL")


def _rebind(scope: dict[str, Any], kept: dict[str, Any]) -> None:
    for name, value in kept.items():
        if value is _ABSENT:
            scope.pop(name, None)
        elif scope.get(name, _ABSENT) is not value:
            scope[name] = value


def _rebind_class(owner: type, held: dict[str, Any]) -> None:
    now = dict(vars(owner))
    for name in now.keys() | held.keys():
        if name.startswith("__") or now.get(name, _ABSENT) is held.get(name, _ABSENT):
            continue
        with suppress(AttributeError, TypeError):  # classes that don't let themselves be changed weren't
            if name in held:
                setattr(owner, name, held[name])
            else:
                delattr(owner, name)


def _content(container: list[Any] | dict[Any, Any] | set[Any] | deque[Any]) -> list[Any] | dict[Any, Any]:
    """What a container holds itself, whatever its class makes of that when it is asked (transformers' table of
    activations holds classes and gives a new instance at each look; with the instances in it, it would be lost)."""
    if isinstance(container, OrderedDict):
        return {key: dict.__getitem__(container, key) for key in OrderedDict.__iter__(container)}
    if isinstance(container, dict):
        plain = type(container).__iter__ is dict.__iter__  # only then does a copy take what is held
        return dict.copy(container) if plain else dict(dict.items(container))
    kind: Any = next(k for k in _CONTAINERS if isinstance(container, k))
    return list(kind.__iter__(container))


def _refill(container: list[Any] | dict[Any, Any] | set[Any] | deque[Any], content: list[Any] | dict[Any, Any]) -> None:
    now = _content(container)
    if len(now) == len(content) and _same(now, content):
        return
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)


def _same(now: list[Any] | dict[Any, Any], before: list[Any] | dict[Any, Any]) -> bool:
    if isinstance(now, dict) and isinstance(before, dict):
        # Keys by identity too: comparing sizes that are symbols would decide them.
        return _same(list(now), list(before)) and _same(list(now.values()), list(before.values()))
    return all(a is b for a, b in zip(now, before, strict=True))


def _set_cell(cell: CellType, content: object) -> None:
    cell.cell_contents = content


def _empty(cached: functools._lru_cache_wrapper[Any], misses: int) -> None:
    if cached.cache_info().misses != misses:
        cached.cache_clear()
