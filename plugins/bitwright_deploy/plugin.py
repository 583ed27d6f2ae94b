"""What bitwright's deployment tools register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolInfo, hookimpl


@hookimpl
def register_tools() -> list[ToolInfo]:
    """The deployment tools that ship with bitwright."""
    return [
        ToolInfo(
            "layer_outputs",
            "Write each layer's output, as the tools of targets dump them.",
            factory="bitwright_deploy.layer_outputs:layer_outputs",
            command="bitwright_deploy.commands:layer_outputs",
        ),
        ToolInfo(
            "compare",
            "Where a target's dump first departs from the simulation.",
            factory="bitwright_deploy.departures:compare",
            command="bitwright_deploy.commands:compare",
        ),
        ToolInfo(
            "target_commands",
            "The command lines that bring an export onto a target.",
            factory="bitwright_deploy.target_commands:target_commands",
            command="bitwright_deploy.commands:target_commands",
        ),
    ]
