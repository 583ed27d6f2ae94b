"""What this distribution registers; imports neither numpy nor the simulator."""

from __future__ import annotations

from bitwright.hookspecs import RuntimeInfo, TargetInfo, ToolchainInfo, hookimpl


@hookimpl
def register_targets() -> list[TargetInfo]:
    """The NPU as a target."""
    return [
        TargetInfo(
            "acme-npu",
            "Acme NPU: uint8 activations, int8 per-channel weights, int32 biases",
            file="bitwright_acme_npu:acme.json",
        )
    ]


@hookimpl
def register_runtimes() -> list[RuntimeInfo]:
    """The NPU's simulator."""
    return [
        RuntimeInfo(
            "acme-npu",
            "A simulator of the Acme NPU.",
            factory="bitwright_acme_npu.runtime:AcmeNpu",
            artefact="acme",
            suffix=".acme.npz",
            arithmetic="the NPU requantizes by a fixed-point multiplier and rounds halves away from zero",
        )
    ]


@hookimpl
def register_toolchains() -> list[ToolchainInfo]:
    """The NPU's command line."""
    return [ToolchainInfo("acme-npu", "The Acme NPU's runner.", factory="bitwright_acme_npu.lines:lines")]
