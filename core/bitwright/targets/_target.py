"""Targets: what a piece of hardware or a runtime quantizes, and how; read from presets or configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from bitwright.catalogue import Descriptor, blamed, current, item_of, kind_of
from bitwright.errors import PluginError, TargetError, unknown_name
from bitwright.files import is_file
from bitwright.graph import (
    COMPOSITES,
    GRIDLESS,
    LINEAR_LAYER,
    ONNX_TYPES,
    OTHER_NAMES,
    VENDOR_TYPES,
    Op,
    OpKind,
    ParamRole,
)
from bitwright.hookspecs import RuntimeInfo, TargetInfo
from bitwright.targets._schema import Kernel, OpSettings, QuantSimConfig, key_path, parse_config

T = TypeVar("T")

PARAM_NAMES: Mapping[ParamRole, tuple[str, ...]] = {
    ParamRole.WEIGHT: ("weight", "kernel", "W", "weight_x", "weight_ih", "embeddings"),
    ParamRole.BIAS: ("bias", "B", "C"),
    ParamRole.GAMMA: ("weight", "gamma", "scale"),
    ParamRole.BETA: ("bias", "beta"),
    ParamRole.MEAN: ("mean", "running_mean", "moving_mean"),
    ParamRole.VAR: ("var", "variance", "running_var", "moving_variance"),
    ParamRole.SLOPE: ("weight", "slope", "prelu", "alpha"),
    ParamRole.RECURRENT: ("weight", "recurrent", "R", "weight_r", "weight_hh"),
    ParamRole.CONSTANT: (),
}
"""Names that configuration files give to each role; where a file uses several, the later one wins."""


@dataclass(frozen=True)
class Target:
    """A validated target.

    Attributes:
        name: the preset's name, or the file's stem.
        config: every section, as read.
        source: where it came from, for messages.
    """

    name: str
    config: QuantSimConfig
    source: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.source))

    @property
    def weights(self) -> str:
        """Type of weights when the user asks for none."""
        return self._default_type("param", self.config.bitwright.weights, signed=True)

    @property
    def activations(self) -> str:
        """Type of activations when the user asks for none."""
        return self._default_type("activation", self.config.bitwright.activations, signed=False)

    def _default_type(self, operand: str, fallback: str, *, signed: bool) -> str:
        kernels = self.config.defaults.supported_kernels
        field = "weights" if signed else "activations"
        if kernels is None or field in self.config.bitwright.model_fields_set:
            return fallback
        number = getattr(kernels[0], operand)
        if number.bitwidth == 32:  # not a quantized type
            return fallback
        if number.dtype == "float":
            return "float16" if number.bitwidth == 16 else "fp8" if number.bitwidth == 8 else fallback
        return f"{'int' if signed else 'uint'}{number.bitwidth}"

    def type_of(self, op: Op) -> str:
        """The type under which the sections speak of an op: its ONNX type, or `LINEAR_LAYER`.

        That one has the settings of MatMul where the file doesn't name the layer.
        """
        layer = op.kind is OpKind.LINEAR and op.type == "MatMul"
        return LINEAR_LAYER if layer and LINEAR_LAYER not in self.config.bitwright.extra_op_types else op.type

    def said(self, type: str) -> OpSettings | None:
        """What `op_type` says of a type (`type_of`), if anything."""
        return self._said.get(type)

    @cached_property
    def _said(self) -> Mapping[str, OpSettings]:
        """`op_type`, with what is said of linear layers over what is said of MatMul, key by key."""
        said = self.config.op_type
        layer, product = said.get(LINEAR_LAYER), said.get("MatMul")
        if product is None or LINEAR_LAYER in self.config.bitwright.extra_op_types:
            return said
        if layer is not None:
            own = _merge_patch(*(s.model_dump(exclude_unset=True) for s in (product, layer)))
            product = OpSettings.model_validate(own)
        return {**said, LINEAR_LAYER: product}

    def op(self, type: str) -> OpSettings:
        """What `op_type` says of a type (`type_of`); an empty entry if nothing."""
        return self.said(type) or OpSettings()

    def param(self, type: str, role: ParamRole) -> tuple[bool, bool]:
        """(quantized, symmetric) of a parameter: `op_type` over `params` over `defaults`."""
        quantized, symmetric = False, False
        names = PARAM_NAMES[role]
        layers = [self.config.defaults.params]
        for table in (self.config.params, self.op(type).params):
            layers += [table[n] for n in names if n in table]
        for settings in layers:
            quantized = quantized if settings.is_quantized is None else settings.is_quantized
            symmetric = symmetric if settings.is_symmetric is None else settings.is_symmetric
        return quantized, symmetric

    def says_quantized(self, type: str, role: ParamRole) -> bool:
        """Whether `params` or `op_type` asks for this parameter by name (and not only `defaults`)."""
        for table in (self.op(type).params, self.config.params):
            named = [table[n].is_quantized for n in PARAM_NAMES[role] if n in table]
            if named and named[-1] is not None:
                return named[-1]
        return False

    def per_channel(self, type: str) -> bool:
        """Whether weights of an op type have one scale a channel."""
        own = self.op(type).per_channel_quantization
        return bool(self.config.defaults.per_channel_quantization) if own is None else own

    def kernels(self, type: str) -> tuple[Kernel, ...]:
        """The kernels of an op type; () where the target lists none."""
        return self.op(type).supported_kernels or self.config.defaults.supported_kernels or ()

    def runs(self, type: str) -> bool:
        """Whether the target has integer arithmetic for an op type."""
        listed = self.config.bitwright.quantized_ops
        return listed is None or type in listed or (type == LINEAR_LAYER and "MatMul" in listed)

    @property
    def passes(self) -> tuple[str, ...]:
        """Composite patterns that the target runs as one op: those that it lists, or those of norms."""
        listed = self.config.supergroup_pass_list
        return GRIDLESS if listed is None else listed

    @cached_property
    def hw_version(self) -> int | None:
        """The hardware generation (66, 68, 69, 73, …), whose exceptions hold; None if none."""
        version = self.config.defaults.hw_version
        return None if version in (None, "default") else int(version[1:])

    def to_json(self) -> str:
        """The configuration as a file that loads again, any `extends` resolved."""
        return self.config.model_dump_json(exclude_unset=True, indent=2)


@dataclass(frozen=True)
class TargetSummary:
    """A target in a few words, for listings."""

    name: str
    description: str
    weights: str
    activations: str
    per_channel: str
    supergroups: tuple[str, ...]
    passes: tuple[str, ...]
    hw_version: int | None
    runtime: str | None


def load_target(target: str | Path | Mapping[str, Any] | Target, *, runtime_needed: bool = True) -> Target:
    """A target by preset name ("htp_v73", "htp-v73"), file, decoded JSON, or itself.

    Args:
        target: which.
        runtime_needed: the runtime that it names must be installed; not so where what was made for the target before
            is opened again.

    Raises:
        TargetError: no such preset or file, not JSON, or the schema is broken: the message names file and key.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, Mapping):
        raw = _extended(dict(target), "custom target", Path(), ())
        return _build("custom", raw, "custom target", runtime_needed)
    if isinstance(target, str) and (found := _registered(target)) is not None:
        try:
            read = _read_registered(found)
            raw = _extended(read.raw, read.title, read.folder, (read.key,))
            return _build(_alias_or(target, found.info), raw, read.source, runtime_needed)
        except TargetError as error:
            if found.owner.name == PRESETS or found.owner.title in str(error):
                raise
            raise TargetError(f"target {found.info.name!r} of {found.owner.title}: {error}") from error
    path = Path(target)
    if not path.is_file():
        if isinstance(target, str) and path.suffix != ".json" and len(path.parts) == 1:
            raise TargetError(
                f"no target is called {target!r}{unknown_name(target, target_names())}; or give a .json file"
            )
        raise TargetError(f"target file {str(path)!r} doesn't exist")
    raw = _extended(_decode(_read_text(path, str(path)), str(path)), str(path), path.parent, (str(path.resolve()),))
    return _build(path.stem, raw, str(path), runtime_needed)


def target_names(*, shipped: bool = False) -> tuple[str, ...]:
    """The names of all targets, aliases too, sorted.

    Args:
        shipped: those that come with bitwright alone; otherwise those of installed plugins too.
    """
    found = current().of(TargetInfo)
    return tuple(sorted(name for d in found if d.owner.builtin or not shipped for name in d.names))


def is_preset(target: Target) -> bool:
    """Whether a target ships with bitwright, so that its name alone says what it is."""
    return target.source.startswith(_PRESET)


def target_summary(target: str | Path | Target) -> TargetSummary:
    """What `bitwright targets` shows of a target."""
    t = load_target(target)
    own = {n: s.per_channel_quantization for n, s in t.config.op_type.items() if s.per_channel_quantization is not None}
    if t.config.defaults.per_channel_quantization:
        off = ", ".join(n for n, on in own.items() if not on)
        per_channel = "all" + (f" but {off}" if off else "")
    else:
        per_channel = ", ".join(n for n, on in own.items() if on) or "none"
    return TargetSummary(
        t.name,
        t.config.bitwright.description,
        t.weights,
        t.activations,
        per_channel,
        tuple("+".join(g.op_list) for g in t.config.supergroups),
        t.passes,
        t.hw_version,
        t.config.bitwright.runtime,
    )


_GENERATIONS = 20
_PRESET = "preset "
PRESETS = "bitwright.targets.plugin"
"""The plugin of the presets, whose errors go by the target's name alone."""


@dataclass(frozen=True)
class _Read:
    """A registered target's file: its content, the folder that it lies in, a key, and what messages call it."""

    raw: dict[str, Any]
    folder: Path | Traversable
    key: str
    title: str
    source: str


def _alias_or(asked: str, info: TargetInfo) -> str:
    key = kind_of(TargetInfo).key
    return next((n for n in info.aliases if key(asked) == key(n)), info.name)


def _registered(name: str) -> Descriptor[TargetInfo] | None:
    """The target of a name or alias.

    Raises:
        TargetError: two plugins bring it, so that nobody has the name.
    """
    if found := current().holder(TargetInfo, name):
        return found
    if reason := current().why_lost(kind_of(TargetInfo).word, name, kind_of(TargetInfo).key):
        raise TargetError(reason)
    return None


def _read_registered(found: Descriptor[TargetInfo]) -> _Read:
    package, _, inner = found.info.file.partition(":")
    title = found.info.name if found.owner.name == PRESETS else f"target {found.info.name!r} of {found.owner.title}"
    try:
        with blamed(found.owner, item_of(found.info)):
            file = resources.files(package).joinpath(*inner.split("/"))
            folder = resources.files(package).joinpath(*inner.split("/")[:-1])
    except PluginError as error:
        raise TargetError(str(error)) from error
    raw = _decode(_read_text(file, title if found.owner.name == PRESETS else f"{title}: {inner}"), title)
    if found.info.summary and isinstance(raw.get("bitwright", {}), dict):
        raw = {**raw, "bitwright": {"description": found.info.summary, **raw.get("bitwright", {})}}
    source = f"{_PRESET}{found.info.name}" if found.owner.name == PRESETS else title
    return _Read(raw, folder, found.info.file, title, source)


def _read_text(path: Path | Traversable, source: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or no path at all
        raise TargetError(f"{source}: can't be read ({error})") from None


def _decode(text: str, source: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise TargetError(f"{source}: key {key!r} stands twice in one object; keep one of them")
            seen[key] = value
        return seen

    try:
        raw = json.loads(text, object_pairs_hook=unique)
    except TargetError:
        raise
    except json.JSONDecodeError as error:
        raise TargetError(f"{source}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands of brackets
        raise TargetError(f"{source}: can't be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise TargetError(f"{source}: a target configuration is a JSON object, not {type(raw).__name__}")
    return raw


def _extended(raw: dict[str, Any], source: str, folder: Path | Traversable, seen: tuple[str, ...]) -> dict[str, Any]:
    """Resolve `bitwright.extends`, recursively, with op types under their ONNX names."""
    raw = _in_onnx_names(raw, source)
    extension = raw.get("bitwright")
    base = extension.get("extends") if isinstance(extension, dict) else None
    if base is None:
        return raw
    if not isinstance(base, str):
        raise TargetError(f"{source}: bitwright.extends: got {base!r}; allowed: a target's name or a file")
    found = _registered(base)
    path = folder.joinpath(base)
    if found is None and not _is_file(path):
        raise TargetError(
            f"{source}: bitwright.extends: no target or file {base!r}{unknown_name(base, target_names())}"
        )
    key = found.info.file if found is not None else str(path.resolve() if isinstance(path, Path) else path)
    if key in seen:
        raise TargetError(
            f"{source}: bitwright.extends: files extend each other in a circle: {' → '.join((*seen, key))}"
        )
    if len(seen) > _GENERATIONS:
        raise TargetError(f"{source}: bitwright.extends: more than {_GENERATIONS} files extend each other")
    if found is not None:
        read = _read_registered(found)
        parent = _extended(read.raw, read.title, read.folder, (*seen, key))
    else:
        parent = _decode(_read_text(path, f"{source}, {base}"), f"{source}, {base}")
        parent = _extended(parent, str(path), path.parent if isinstance(path, Path) else folder, (*seen, key))
    own = {**raw, "bitwright": {k: v for k, v in raw["bitwright"].items() if k != "extends"}}
    merged: dict[str, Any] = _merge_patch(parent, own)
    if isinstance(settings := merged.get("op_type"), dict) and LINEAR_LAYER in settings:
        # Where it was taken back, the file would else say the layer's of it when it is read again.
        merged["op_type"] = {OTHER_NAMES[LINEAR_LAYER]: {}, **settings}
    return merged


def _is_file(path: Path | Traversable) -> bool:
    return is_file(path) if isinstance(path, Path) else path.is_file()


def _in_onnx_names(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """A decoded file with the op types that frameworks' tools name otherwise renamed (`GELU`, `Conv2D`, `AddV2`).

    Raises:
        TargetError: two names of one type have settings that differ.
    """
    extension = raw.get("bitwright")
    own = extension.get("extra_op_types") if isinstance(extension, dict) else None
    kept = {name for name in own if isinstance(name, str)} if isinstance(own, list) else set()

    def renamed(name: T) -> T | str:
        return OTHER_NAMES.get(name, name) if isinstance(name, str) and name not in kept else name

    def layer(name: object) -> bool:
        return isinstance(name, str) and name not in kept and OTHER_NAMES.get(name) == OTHER_NAMES[LINEAR_LAYER]

    def listed(names: list[Any]) -> list[Any]:
        told: list[Any] = []  # which may be anything, until it is checked
        for n in (n for name in names for n in (renamed(name), *([LINEAR_LAYER] * layer(name)))):
            told += [] if n in told else [n]
        return told

    found = dict(raw)
    if isinstance(settings := raw.get("op_type"), dict):
        merged: dict[str, Any] = {}
        said_by: dict[str, str] = {}
        for name, value in settings.items():
            # What is said of Gemm by this name is said of matrices alone, and of them before what is said of layers.
            matrices = [] if layer(name) and OTHER_NAMES[LINEAR_LAYER] in settings else [renamed(name)]
            for type in (*matrices, *([LINEAR_LAYER] * layer(name))):
                if type in merged and merged[type] != value:
                    raise TargetError(
                        f"{source}: op_type: {said_by[type]!r} and {name!r} are both {type} here, and their settings "
                        "differ; give them the same"
                    )
                merged[type] = value
                said_by.setdefault(type, name)
        found["op_type"] = merged
    if isinstance(groups := raw.get("supergroups"), list):
        found["supergroups"] = [
            {**g, "op_list": [LINEAR_LAYER if layer(n) else renamed(n) for n in g["op_list"]]}
            if isinstance(g, dict) and isinstance(g.get("op_list"), list)
            else g
            for g in groups
        ]
    if isinstance(extension, dict):
        lists = {k: listed(v) for k in ("ties", "quantized_ops") if isinstance(v := extension.get(k), list)}
        found["bitwright"] = {**extension, **lists}
    return found


def _merge_patch(base: object, patch: object) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge_patch(merged.get(key), value)
    return merged


def _build(name: str, raw: dict[str, Any], source: str, runtime_needed: bool) -> Target:
    config = parse_config(raw, source)
    _check_names(config, source)
    runtimes = current().names(RuntimeInfo)
    if runtime_needed and (runtime := config.bitwright.runtime) is not None and runtime not in runtimes:
        raise TargetError(
            f"{source}: bitwright.runtime: there is no integer runtime {runtime!r}{unknown_name(runtime, runtimes)}; "
            "install the distribution that brings it, or leave the key out"
        )
    return Target(name, config, source)


def _check_names(config: QuantSimConfig, source: str) -> None:
    """Op types, parameter names and graph passes must exist: a misspelt one would silently do nothing."""
    extension = config.bitwright
    op_types = ONNX_TYPES | VENDOR_TYPES | {LINEAR_LAYER} | set(extension.extra_op_types)
    named: list[tuple[tuple[str | int, ...], str]] = [(("op_type",), n) for n in config.op_type]
    for i, group in enumerate(config.supergroups):
        named += [(("supergroups", i, "op_list", j), n) for j, n in enumerate(group.op_list)]
    named += [(("bitwright", "ties"), n) for n in extension.ties]
    named += [(("bitwright", "quantized_ops"), n) for n in extension.quantized_ops or ()]
    for loc, name in named:
        if name not in op_types:
            raise TargetError(
                f"{source}: {key_path(loc)}: unknown op type {name!r}{unknown_name(name, op_types, listed=False)} "
                "Types are ONNX operator names; list custom ones in bitwright.extra_op_types"
            )
    params = {n for names in PARAM_NAMES.values() for n in names}
    tables = [(("params",), config.params), *((("op_type", n, "params"), s.params) for n, s in config.op_type.items())]
    for where, table in tables:
        for name in table:
            if name not in params:
                raise TargetError(
                    f"{source}: {key_path(where)}: unknown parameter {name!r}{unknown_name(name, params)}"
                )
    for name in config.supergroup_pass_list or ():
        if name not in COMPOSITES:
            raise TargetError(
                f"{source}: supergroup_pass_list: unknown graph pass {name!r}{unknown_name(name, COMPOSITES)}"
            )
