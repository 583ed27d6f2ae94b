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
    from bitwright.verification import validate

__version__ = "0.1.0"
__all__ = ["QuantSim", "RunDirectory", "__version__", "registry", "validate"]


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from importlib.util import find_spec

    if name == "registry":
        return import_module("bitwright.plugins.registry")
    homes = {"QuantSim": "quantsim", "RunDirectory": "runs", "validate": "validation"}
    if module := homes.get(name):
        return getattr(import_module(f"bitwright.{module}"), name)
    # `from bitwright import hookspecs` asks here first, while the registry may be half imported itself.
    if not name.startswith("_") and find_spec(f"bitwright.{name}") is None:
        registry = import_module("bitwright.plugins.registry")
        if name in registry.tools():
            return registry.tool(name)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
