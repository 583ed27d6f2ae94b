"""What the PyTorch backend registers; doesn't import torch."""

from __future__ import annotations

from pathlib import Path

from bitwright.hookspecs import BackendInfo, hookimpl


def is_model_folder(path: Path) -> bool:
    """Whether a folder is a model of transformers: a configuration, with weights or without."""
    return path.is_dir() and (path / "config.json").is_file()


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
            sniff=is_model_folder,
            port="bitwright_torch.testing:model_port",
        )
    ]
