"""The backends that are there, and small reference models brought onto each: techniques are tested on all of them.

`BACKENDS` maps a name to a `Port`. A backend whose framework isn't installed is left out. Each brings its own
port, see `bitwright.testing.ports`.
"""

from __future__ import annotations

import importlib.util

from bitwright.testing.ports import installed

_MODULES = {"keras": ("tensorflow",)}
"""What tests of a port need beside its framework."""

BACKENDS = {
    port.name: port
    for port in installed()
    if all(importlib.util.find_spec(module) is not None for module in _MODULES.get(port.name, ()))
}
"""By name; the reference backend first."""
FRAMEWORKS = {name: port for name, port in BACKENDS.items() if name != "reference"}
"""Those of real frameworks, which `QuantSim` opens."""
