"""The registry of backends, techniques and tools: what the catalogue describes is made here."""

from __future__ import annotations

from bitwright.plugins.registry import Registry, default_registry, plugins

__all__ = ["Registry", "default_registry", "plugins"]
