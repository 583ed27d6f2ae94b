"""What bitwright's analysis tools register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolInfo, hookimpl


@hookimpl
def register_tools() -> list[ToolInfo]:
    """The analysis tools that ship with bitwright."""
    return [
        ToolInfo(
            "quant_analyzer",
            "Where quantization hurts in a model: sensitivities, ranges, errors, and what to do.",
            factory="bitwright_analysis.analyzer:quant_analyzer",
            command="bitwright_analysis.commands:analyze",
            command_name="analyze",
        ),
        ToolInfo(
            "visualize",
            "Weights and activations before and after a technique, on one page.",
            factory="bitwright_analysis.visualization:visualize",
            command="bitwright_analysis.commands:visualize",
        ),
        ToolInfo(
            "architecture_hints",
            "What in a model's architecture quantization or the target doesn't like.",
            factory="bitwright_analysis.hints:architecture_hints",
            command="bitwright_analysis.commands:validate",
            command_name="validate",
        ),
    ]
