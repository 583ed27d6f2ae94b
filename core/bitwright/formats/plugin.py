"""The built-in schemas, as what they are: schemas like everyone's, a module each."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from bitwright.hookspecs import SchemaInfo, hookimpl

_SUMMARIES = {
    "0.6.1": "AIMET's first: a list of objects with min, max, offset and scale for each tensor.",
    "1.0.0": "AIMET's second: two lists of objects, with blocks and LPBQ.",
    "2.0.0": "One list, in the terms of ONNX's QuantizeLinear.",
    "2.1.0": "As 2.0.0, with two-level scales (LPBQ).",
}


@hookimpl
def register_schemas() -> list[SchemaInfo]:
    """One for each module `_schema_…`."""
    return [
        SchemaInfo(
            version,
            summary,
            factory=partial(import_module, f"bitwright.formats._schema_{version.replace('.', '_')}"),
            biases=version.startswith("2"),
        )
        for version, summary in _SUMMARIES.items()
    ]
