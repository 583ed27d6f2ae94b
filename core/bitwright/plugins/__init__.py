"""Plugins: how they are discovered, and the registry of backends, techniques and tools."""

from __future__ import annotations

from bitwright.plugins._discovery import import_dotted
from bitwright.plugins.registry import Registry, default_registry, plugins

__all__ = ["Registry", "default_registry", "import_dotted", "plugins"]
