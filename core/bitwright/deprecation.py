"""How public names and parameters go: they work on for a minor version at least, and say what takes their place.

The policy is in CONTRIBUTING.md. A version that should no longer have the old name can't be imported with it, so that
none outlives its date.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from bitwright import _version
from bitwright.errors import InputError

__all__ = ["deprecated", "renamed_parameter"]

C = TypeVar("C", bound=Callable[..., Any])


def deprecated(*, since: str, removed: str, instead: str) -> Callable[[C], C]:
    """Mark a function, method or class that will go; each call (or instance) warns at the caller's line.

    Args:
        since: the version that deprecates it, `MAJOR.MINOR`.
        removed: the first version without it, one minor version later at least.
        instead: the way out, with which the warning ends: ``"use QuantSim.fork()"``.

    Raises:
        InputError: when decorating, if the times are no such versions or `removed` has come.
    """

    def mark(thing: C) -> C:
        name = f"{thing.__module__}.{thing.__qualname__}"
        message = _message(name, since, removed, instead)
        if isinstance(thing, type):
            _warn_in(thing, message)
            return thing

        @functools.wraps(thing)
        def call(*args: object, **kwargs: object) -> Any:
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return thing(*args, **kwargs)

        call.__deprecated__ = message  # type: ignore[attr-defined]
        return cast(C, call)

    return mark


def renamed_parameter(old: str, new: str, *, since: str, removed: str) -> Callable[[C], C]:
    """Let a function take the keyword `old` for its parameter `new`, with a warning.

    Args:
        old: the keyword as it was.
        new: the parameter's name now.
        since: the version that renames it, `MAJOR.MINOR`.
        removed: the first version that doesn't take `old`.

    Raises:
        InputError: when decorating, as `deprecated` does or where there is no parameter `new`; in a call that gives
            both.
    """

    def mark(function: C) -> C:
        name = f"{function.__module__}.{function.__qualname__}"
        signature = inspect.signature(function)
        if new not in signature.parameters:
            raise InputError(f"{name} has no parameter {new!r} that {old!r} could be renamed to")
        message = _message(f"{old!r} of {name}", since, removed, f"use {new!r}")

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            if old in kwargs:
                if new in signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k != old}).arguments:
                    raise InputError(f"{name} got {old!r} and {new!r}, which are one parameter; give {new!r} alone")
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(C, call)

    return mark


def _warn_in(cls: type, message: str) -> None:
    """Instances of the class itself warn; of a subclass too, since it is built on what goes."""
    made = cls.__init__  # type: ignore[misc]  # of this very class, which is what is wrapped

    @functools.wraps(made)
    def init(self: object, *args: object, **kwargs: object) -> None:
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        made(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    cls.__deprecated__ = message  # type: ignore[attr-defined]


def _message(name: str, since: str, removed: str, instead: str) -> str:
    if _minor(removed) <= _minor(since):
        raise InputError(f"{name} can't go in {removed}: it works for a minor version at least after {since}")
    if _minor(_version.__version__) >= _minor(removed):
        raise InputError(f"{name} was to go in {removed}, and this is {_version.__version__}: remove it")
    return f"{name} is deprecated since {since} and will be removed in {removed}; {instead}"


def _minor(version: str) -> tuple[int, int]:
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise InputError(f"{version!r} is not a version of the form MAJOR.MINOR") from None
    return major, minor
