"""What bitwright's deployment tools register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import ToolchainInfo, ToolInfo, hookimpl

_QUALCOMM = ("1.0.0", "0.6.1")


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


@hookimpl
def register_toolchains() -> list[ToolchainInfo]:
    """The command lines that ship with bitwright."""
    return [
        ToolchainInfo("qnn", "Qualcomm's QNN.", "bitwright_deploy.qualcomm_lines:qnn", schemas=_QUALCOMM, shapes=True),
        ToolchainInfo(
            "snpe", "Qualcomm's SNPE.", "bitwright_deploy.qualcomm_lines:snpe", schemas=_QUALCOMM, shapes=True
        ),
        ToolchainInfo(
            "qairt",
            "Qualcomm's QAIRT.",
            "bitwright_deploy.qualcomm_lines:qairt",
            schemas=(*_QUALCOMM, "2.0.0"),
            shapes=True,
        ),
        ToolchainInfo("onnxruntime", "ONNX Runtime.", "bitwright_deploy.runtime_lines:onnxruntime"),
        ToolchainInfo("tflite", "TensorFlow Lite.", "bitwright_deploy.runtime_lines:tflite"),
        ToolchainInfo("tensorrt", "NVIDIA's TensorRT.", "bitwright_deploy.runtime_lines:tensorrt", shapes=True),
    ]
