"""Plugins: hooks, discovery, and the registry of backends, techniques and tools."""

from __future__ import annotations

from bitwright.plugins._discovery import import_dotted
from bitwright.plugins._hookspecs import AutoStage, BackendInfo, TechniqueInfo, ToolInfo, hookimpl
from bitwright.plugins.registry import Registry, default_registry, plugins

__all__ = [
    "AutoStage",
    "BackendInfo",
    "Registry",
    "TechniqueInfo",
    "ToolInfo",
    "default_registry",
    "hookimpl",
    "import_dotted",
    "plugins",
]
