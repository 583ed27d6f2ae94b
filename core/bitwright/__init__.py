"""bitwright: simulate, improve and export quantized neural networks.

What a user starts from is here and imported on first use: `QuantSim`, `RunDirectory`, `validate`, the module
`registry`, and every tool by its name (`auto_quantize`, `quant_analyzer`, …).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright.plugins import registry
    from bitwright.runs import RunDirectory
    from bitwright.simulation import QuantSim
    from bitwright.verify import validate

from bitwright._version import __version__

__all__ = ["QuantSim", "RunDirectory", "__version__", "registry", "validate"]


_HOMES = {"QuantSim": "simulation", "RunDirectory": "runs", "validate": "verify"}


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from importlib.util import find_spec

    if name == "registry":
        return import_module("bitwright.plugins.registry")
    if room := _HOMES.get(name):
        return getattr(import_module(f"bitwright.{room}"), name)
    # `from bitwright import plugins` asks here first, while the registry may be half imported itself.
    if name.startswith("_") or find_spec(f"bitwright.{name}") is not None:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    registry = import_module("bitwright.plugins.registry")
    if name in registry.tools():
        return registry.tool(name)
    from bitwright.errors import unknown_name

    raise AttributeError(f"module 'bitwright' has no attribute {name!r}{unknown_name(name, __dir__())}")


def __dir__() -> list[str]:
    from importlib import import_module

    return sorted({*__all__, *import_module("bitwright.plugins.registry").tools()})
