"""What plugins can register: one hook and one descriptor a kind, and what makes a descriptor valid."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bitwright import _version
from bitwright.hookspecs import (
    API_VERSIONS,
    AutoStage,
    BackendInfo,
    FormatInfo,
    RuntimeInfo,
    SchemaInfo,
    TargetInfo,
    TechniqueInfo,
    ToolchainInfo,
    ToolInfo,
)

Info = BackendInfo | TechniqueInfo | ToolInfo | TargetInfo | RuntimeInfo | SchemaInfo | FormatInfo | ToolchainInfo
QDQ = "qdq"
"""What the quantized ONNX model is called in a bundle."""
PURPOSES = ("model", "encodings", "record")
"""What else there is in bundles, by purpose."""
ENDINGS = (".encodings", ".qdq.onnx", ".record.npz", ".safetensors")
"""How the names of those files end."""
I_co = TypeVar("I_co", bound=Info, covariant=True)


@dataclass(frozen=True)
class Kind(Generic[I_co]):
    """One kind of item.

    Attributes:
        info: its descriptor.
        word: what messages call it.
        hook: which hook returns descriptors.
        key: names that give the same key are the same name.
    """

    info: type[I_co]
    word: str
    hook: str
    key: Callable[[str], str] = str


def plain(name: str) -> str:
    """A target's name as it is compared: "HTP-V73" is "htp_v73"."""
    return name.lower().replace("-", "_")


KINDS: tuple[Kind[Any], ...] = (
    Kind(BackendInfo, "backend", "register_backends"),
    Kind(TechniqueInfo, "technique", "register_techniques"),
    Kind(ToolInfo, "tool", "register_tools"),
    Kind(TargetInfo, "target", "register_targets", plain),
    Kind(RuntimeInfo, "runtime", "register_runtimes"),
    Kind(SchemaInfo, "encodings schema", "register_schemas"),
    Kind(FormatInfo, "export format", "register_formats"),
    Kind(ToolchainInfo, "toolchain", "register_toolchains", plain),
)
COMMAND: Kind[Any] = Kind(ToolInfo, "command", "register_tools")
"""Commands have names of their own, beside those of the tools that bring them."""


def kind_of(info: type[Any]) -> Kind[Any]:
    """The kind whose descriptors are of a class."""
    return next(k for k in KINDS if k.info is info)


def invalid(info: Info) -> str:
    """What is wrong with a descriptor's fields; empty if nothing."""
    if not isinstance(info.name, str) or not info.name.strip():
        return f"name: {info.name!r} is no name"
    for field in ("aliases", "modules", "suffixes", "needs", "schemas"):
        values = getattr(info, field, ())
        if isinstance(values, str) or not all(isinstance(v, str) and v for v in _listed(values)):
            return f"{field}: {values!r} isn't a tuple of names"
    for field in ("summary", "extra", "command_name", "artefact", "suffix", "arithmetic"):
        if not isinstance(getattr(info, field, ""), str):
            return f"{field}: {getattr(info, field)!r} isn't text"
    for field in ("factory", "command", "sniff", "port", "settings"):
        value = getattr(info, field, "")
        optional = value is None and field in ("sniff", "port", "settings")
        if not isinstance(value, str) and not callable(value) and not optional:
            return f"{field}: {value!r} is neither 'package.module:Name' nor a callable"
    if isinstance(info, TechniqueInfo) and (reason := _no_stage(info.auto)):
        return f"auto: {reason}"
    if isinstance(info, TargetInfo) and not (isinstance(info.file, str) and all(info.file.partition(":"))):
        return f"file: {info.file!r} isn't of the form 'package:file.json'"
    if isinstance(info, RuntimeInfo) and (info.artefact in PURPOSES or not re.fullmatch(r"[\w.-]+", info.artefact)):
        return f"artefact: {info.artefact!r} can't be what it executes: {', '.join(PURPOSES)} are in every export"
    if isinstance(info, RuntimeInfo) and info.artefact != QDQ and (reason := _no_ending(info.suffix)):
        return f"suffix: {reason}; its own artefact {info.artefact!r} needs one"
    if isinstance(info, FormatInfo) and (reason := _no_ending(info.suffix)):
        return f"suffix: {reason}"
    if isinstance(info.api, bool) or not isinstance(info.api, int):
        return f"api: {info.api!r} isn't a number"
    return ""


def _no_stage(auto: object) -> str:
    """What is wrong with a technique's part in `auto_quantize`; empty if nothing."""
    if auto is None:
        return ""
    if not isinstance(auto, AutoStage):
        return f"{auto!r} is no AutoStage"
    if isinstance(auto.order, bool) or not isinstance(auto.order, int | float):
        return f"its order {auto.order!r} isn't a number"
    if isinstance(auto.replaces, str) or not all(isinstance(n, str) and n for n in _listed(auto.replaces)):
        return f"what it replaces, {auto.replaces!r}, isn't a tuple of names"
    return ""


def _no_ending(suffix: str) -> str:
    """Why files of an export can't end so; empty if they can."""
    if not re.fullmatch(r"\.[\w.-]*[\w-]", suffix):
        return f"{suffix!r} is no ending of a file's name"
    return f"{suffix!r} is the ending of another file of an export" if suffix in ENDINGS else ""


def _listed(values: object) -> tuple[object, ...]:
    return tuple(values) if isinstance(values, list | tuple) else (None,)


def unserved(info: Info, distribution: str) -> str:
    """Why a descriptor's plugin api isn't served by this bitwright, and what to upgrade; empty if it is."""
    if info.api in API_VERSIONS:
        return ""
    newer = info.api >= API_VERSIONS.stop
    offered = f"{API_VERSIONS.start}" if len(API_VERSIONS) == 1 else f"{API_VERSIONS.start} to {API_VERSIONS[-1]}"
    return (
        f"it is written for plugin api {info.api}, bitwright {_version.__version__} serves {offered}: "
        f"pip install --upgrade {'bitwright' if newer else distribution}"
    )
