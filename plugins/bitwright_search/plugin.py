"""What bitwright's searches register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolInfo, hookimpl


@hookimpl
def register_tools() -> list[ToolInfo]:
    """The searches that ship with bitwright."""
    return [
        ToolInfo(
            "auto_quantize",
            "Quantize a model so that it loses no more than an allowed drop.",
            factory="bitwright_search.auto_quantize:auto_quantize",
            command="bitwright_search.auto_command:auto",
            command_name="auto",
        ),
        ToolInfo(
            "mixed_precision",
            "Give each group of layers the bit widths that it needs.",
            factory="bitwright_search.mixed_precision:mixed_precision",
            command="bitwright_search.mixed_command:mixed",
        ),
        ToolInfo(
            "measure_latency",
            "Time a model's ops on an integer runtime at several bit widths.",
            factory="bitwright_search.latency_measure:measure_latency",
        ),
    ]
