"""What bitwright's analysis tools register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolInfo, hookimpl


@hookimpl
def register_tools() -> list[ToolInfo]:
    """The analysis tools that ship with bitwright."""
    return []
