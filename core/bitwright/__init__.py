"""bitwright: simulate, improve and export quantized neural networks.

What a user starts from is here and imported on first use: `QuantSim`, `RunDirectory`, `validate`, the module
`registry`, and every tool by its name (`auto_quantize`, `quant_analyzer`, …).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitwright import registry
    from bitwright.quantsim import QuantSim
    from bitwright.runs import RunDirectory
    from bitwright.validation import validate

__version__ = "0.1.0"
__all__ = ["QuantSim", "RunDirectory", "__version__", "registry", "validate"]


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from importlib.util import find_spec

    if name == "registry":
        return import_module("bitwright.registry")
    homes = {"QuantSim": "quantsim", "RunDirectory": "runs", "validate": "validation"}
    if module := homes.get(name):
        return getattr(import_module(f"bitwright.{module}"), name)
    # `from bitwright import hookspecs` asks here first, while the registry may be half imported itself.
    if not name.startswith("_") and find_spec(f"bitwright.{name}") is None:
        registry = import_module("bitwright.registry")
        if name in registry.tools():
            return registry.tool(name)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
