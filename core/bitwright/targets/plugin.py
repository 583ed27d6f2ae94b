"""The presets, as what they are: targets like everyone's, in files of the folder `presets`."""

from __future__ import annotations

from importlib import resources

from bitwright.hookspecs import TargetInfo, hookimpl

_ALIASES = {"default_per_channel": ("default",)}


@hookimpl
def register_targets() -> list[TargetInfo]:
    """One for each file; its description is in the file."""
    folder = resources.files("bitwright").joinpath("targets", "presets")
    names = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
    return [TargetInfo(n, "", f"bitwright:targets/presets/{n}.json", aliases=_ALIASES.get(n, ())) for n in names]
