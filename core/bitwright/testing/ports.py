"""The kits' small reference models on every backend that is installed, so that techniques are tested on all of them.

A backend brings its own port (`BackendInfo.port`); `installed` collects them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from bitwright.backend import Backend
from bitwright.errors import PluginError
from bitwright.plugins import registry
from bitwright.plugins.registry import PluginWarning
from bitwright.testing.reference import ReferenceBackend, ReferenceModel


@dataclass(frozen=True)
class ModelPort:
    """What a backend's `BackendInfo.port` makes.

    Attributes:
        native: a reference model as what the user of the framework would hold, for `QuantSim`.
        batch: a reference model's batch as that takes it.
        sample: one batch, where the framework traces with it; otherwise None.
    """

    native: Callable[[ReferenceModel], Any]
    batch: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    sample: Callable[[ReferenceModel], Any] = lambda model: None


@dataclass(frozen=True)
class Port:
    """One backend, with reference models on it.

    Attributes:
        name: its name.
        backend: makes it.
        models: how reference models are brought onto it.
    """

    name: str
    backend: Callable[[], Backend[Any]]
    models: ModelPort

    def __str__(self) -> str:
        return self.name

    def native(self, model: ReferenceModel) -> object:
        """As what the user of the framework would hold."""
        return self.models.native(model)

    def batch(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A reference model's batch as the native one takes it."""
        return self.models.batch(batch)

    def sample(self, model: ReferenceModel) -> Any:
        """One batch, where the framework traces with it."""
        return self.models.sample(model)

    def port(self, model: ReferenceModel) -> object:
        """In the backend's own form; the same object for the same model."""
        return _ported(self, model)

    def sim(self, model: ReferenceModel, **options: Any) -> Any:
        """A `QuantSim` of it, on the one `port` that all have in common."""
        import bitwright

        return bitwright.QuantSim(self.port(model), backend=self.name, **options)


@cache
def _ported(port: Port, model: ReferenceModel) -> object:
    return port.backend().adopt(port.native(model), port.sample(model))


REFERENCE = Port("reference", ReferenceBackend, ModelPort(lambda model: model))
"""The reference backend, which opens reference models as they are."""


@cache
def installed() -> tuple[Port, ...]:
    """The reference backend, then every backend that has a port and whose framework is installed."""
    found = [REFERENCE]
    known = registry.default_registry()
    for name, info in known.backends().items():
        if info.port is None or known.missing(name):
            continue
        try:
            port = _made(known, name)
        except PluginError as error:  # whoever tests a technique hasn't asked for this backend
            warnings.warn(f"{error}; nothing is tested on it", PluginWarning, stacklevel=2)
            continue
        found.append(Port(name, lambda name=name: registry.backend(name), port))  # type: ignore[misc]
    return tuple(found)


def _made(known: registry.Registry, name: str) -> ModelPort:
    made = known.port(name)
    if not isinstance(made, ModelPort):
        raise PluginError(f"the port of backend {name!r} makes a {type(made).__name__}, not a ModelPort")
    return made
