"""Which evaluation it is: a fingerprint, so that a resumed run takes no score of another one.

A function counts by its source and by what it holds: closure, defaults, the arguments of a partial, the state of the
object that it is a method of. Arrays and tensors count by content; an object that has a method `identity()` by what
that gives.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitwright.runs import fingerprint


@runtime_checkable
class Identified(Protocol):
    """An evaluation that says itself what tells it from others."""

    def identity(self) -> object:
        """Something that JSON can hold, the same in any process."""


def identity(evaluate: object) -> str:
    """A fingerprint of an evaluation: the data and labels, or the function's source and what it holds.

    What a function reads when it runs (files, global variables) can't be seen from here; a changed file needs another
    run directory.
    """
    return fingerprint.of_json(_Describer().of(evaluate))


DEEPEST = 40
"""Objects within objects are followed so far; what lies deeper is a framework's structure, not a user's setting."""


class _Describer:
    """Values as JSON."""

    def __init__(self) -> None:
        # By identity: the digest, None while it is made. The values are kept, since the identity of a freed one may
        # come again.
        self._known: dict[int, tuple[str | None, Any]] = {}
        self._depth = 0

    def of(self, value: object) -> object:
        """What tells a value from others, in any process."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path):
            return [type(value).__name__, repr(value)]
        if id(value) in self._known:
            return self._known[id(value)][0] or "circle"
        if self._depth == DEEPEST:
            return "deep"
        self._known[id(value)] = (None, value)
        self._depth += 1
        try:
            digest = fingerprint.of_json(self._described(value))
        finally:
            self._depth -= 1
        self._known[id(value)] = (digest, value)
        return digest

    def _described(self, value: object) -> object:
        if isinstance(value, Identified) and not isinstance(value, type):
            return ["identity", value.identity()]
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func), self._all(value.args), self.of(value.keywords)]
        if isinstance(value, type):
            return ["class", value.__module__, value.__qualname__, _source(value)]
        if inspect.ismodule(value) or isinstance(value, logging.Logger):
            return ["named", type(value).__name__, getattr(value, "__name__", None) or getattr(value, "name", "")]
        if inspect.ismethod(value):
            return ["method", self.of(value.__func__), self.of(value.__self__)]
        if inspect.isfunction(value):
            return self._function(value)
        if (array := _array(value)) is not None:
            if array.dtype.kind == "O":
                return ["objects", self._all(array.ravel())]
            return ["array", fingerprint.of_arrays([("", array)])]
        return self._collection(value)

    def _collection(self, value: object) -> object:
        kind = [type(value).__module__, type(value).__qualname__]
        if isinstance(value, Mapping):
            # By text, as keys of several types have no order; that of insertion isn't part of a mapping's value.
            pairs = sorted(value.items(), key=lambda pair: repr(pair[0]))
            return ["mapping", kind, [[self.of(k), self.of(v)] for k, v in pairs]]
        if isinstance(value, Sequence):
            return ["sequence", kind, self._all(value)]
        if isinstance(value, Set):
            return ["set", kind, sorted(map(_plain, value))]
        state = _state(value)
        source = _source(type(value)) if callable(value) else ""
        if state is not None:
            return ["object", kind, source, [[k, self.of(v)] for k, v in sorted(state.items())]]
        return ["other", kind, source, _plain(value)]

    def _function(self, function: FunctionType) -> object:
        cells = [self._cell(c) for c in function.__closure__ or ()]
        defaults = [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        return ["function", function.__module__, function.__qualname__, _source(function.__code__), cells, defaults]

    def _cell(self, cell: CellType) -> object:
        try:
            return self.of(cell.cell_contents)
        except ValueError:
            return "empty"

    def _all(self, values: Iterable[object]) -> list[object]:
        return [self.of(v) for v in values]


def _state(value: object) -> dict[str, object] | None:
    """An object's attributes; None where it has no place for them."""
    found = dict(vars(value)) if hasattr(value, "__dict__") else {}
    declared = (c.__dict__.get("__slots__", ()) for c in type(value).__mro__)
    slots = [s for names in declared for s in ([names] if isinstance(names, str) else names)]
    found |= {s: getattr(value, s) for s in slots if s not in ("__dict__", "__weakref__") and hasattr(value, s)}
    return found if found or hasattr(value, "__dict__") else None


def _plain(value: object) -> str:
    # Addresses differ from process to process and say nothing.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _array(value: object) -> NDArray[Any] | None:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, type) or not hasattr(value, "__array__"):
        return None
    try:
        if hasattr(value, "detach"):  # a torch tensor, perhaps on a device or with a gradient
            tensor: Any = value.detach().cpu()
            value = tensor.float() if "bfloat16" in str(tensor.dtype) else tensor
        return np.asarray(value)
    except Exception:  # frameworks raise what they like for what has no values, such as a symbolic tensor
        return None


def _source(item: type | CodeType) -> str:
    try:
        return inspect.getsource(item)
    except (OSError, TypeError):
        # Made by exec or in a shell: there is no file.
        return repr((item.co_code, _plain(item.co_consts), item.co_names)) if inspect.iscode(item) else ""
