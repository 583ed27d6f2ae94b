"""AIMET's default configurations, as the files that bitwright has them in."""

from __future__ import annotations

from importlib import resources

__all__ = ["get_path_for_per_channel_config", "get_path_for_per_tensor_config"]


def get_path_for_per_channel_config() -> str:
    """The configuration of the target "default": weights have a scale for each channel."""
    return _path("default_per_channel")


def get_path_for_per_tensor_config() -> str:
    """The configuration of the target "per_tensor": one scale for each tensor."""
    return _path("per_tensor")


def _path(name: str) -> str:
    return str(resources.files("bitwright").joinpath("targets", "presets", f"{name}.json"))
