"""What the PyTorch backend registers; doesn't import torch."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The PyTorch backend."""
    return [
        BackendInfo(
            name="torch",
            summary="PyTorch modules: torch.export captures them, the simulation is an nn.Module.",
            factory="bitwright_torch.backend:TorchBackend",
            modules=("torch",),
            suffixes=(".pt2", ".py"),
            extra="torch",
            port="bitwright_torch.testing:model_port",
        )
    ]
