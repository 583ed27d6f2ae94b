"""What bitwright's searches register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolInfo, hookimpl


@hookimpl
def register_tools() -> list[ToolInfo]:
    """The searches that ship with bitwright."""
    return []
