"""What bitwright looks for; imports no framework."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The backend for lists of layers."""
    return [
        BackendInfo(
            "layers",
            "Lists of numpy layers.",
            factory="bitwright_layers.backend:LayersBackend",
            modules=("bitwright_layers.framework",),
            suffixes=(".layers",),
        )
    ]
