"""Modules as AIMET's functions name them: themselves, their types, or by a rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from bitwright.errors import InputError


class HasModules(Protocol):
    """A simulation of a module, as far as names go."""

    @property
    def modules(self) -> list[tuple[str, Any]]:
        """The user's modules and their names."""

    def name_of(self, layer: Any) -> str:
        """The name of a module, or of what is a name already."""


def names_of(sim: HasModules, arg: Any) -> list[str]:
    """The names, in the model's order, of modules that have a weight.

    Args:
        sim: the simulation.
        arg: a module of the user's model, its name, a type, a function of a module, or a list of the former three.

    Raises:
        InputError: there is none.
    """
    several = isinstance(arg, Iterable) and not isinstance(arg, str) and not hasattr(arg, "forward")
    given = list(arg) if several else [arg]
    found: dict[str, None] = {}
    for one in given:
        if isinstance(one, str) or (hasattr(one, "forward") and not isinstance(one, type)):
            found[sim.name_of(one)] = None
        elif isinstance(one, type):
            found |= dict.fromkeys(name for name, module in sim.modules if isinstance(module, one))
        elif callable(one):
            found |= dict.fromkeys(name for name, module in sim.modules if one(module))
        else:
            raise InputError(f"{one!r}: give modules of your model, their types, or a function of a module")
    if not found:
        raise InputError(f"{arg!r} is no module of the model")
    return list(found)
