"""Reads plugins, one by one, into a catalogue of descriptors; a broken one is named and skipped."""

from __future__ import annotations

import difflib
import importlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, Generic, Literal, TypeVar

from pluggy import PluginManager

from bitwright import _version, hookspecs
from bitwright.errors import PluginError
from bitwright.hookspecs import API_VERSIONS, PROJECT, BackendInfo, TechniqueInfo, ToolInfo

DEFAULT_PLUGINS = (
    "bitwright_onnx.plugin",
    "bitwright_torch.plugin",
    "bitwright_keras.plugin",
    "bitwright_tensorflow.plugin",
    "bitwright_techniques.plugin",
    "bitwright_search.plugin",
    "bitwright_analysis.plugin",
    "bitwright_deploy.plugin",
)
"""The built-in plugins; they take the same hooks as everyone's."""

Info = BackendInfo | TechniqueInfo | ToolInfo
I_co = TypeVar("I_co", bound=Info, covariant=True)
I = TypeVar("I", BackendInfo, TechniqueInfo, ToolInfo)  # noqa: E741
State = Literal["ok", "missing framework", "failed", "blocked"]


class PluginWarning(UserWarning):
    """A plugin couldn't be used and was skipped."""


@dataclass(eq=False)
class Owner:
    """A plugin as it was met: where it comes from and how loading it went."""

    name: str
    distribution: str
    version: str
    state: State = "ok"
    reason: str = ""
    traceback: str = ""

    @property
    def title(self) -> str:
        """Plugin, distribution and version, for messages."""
        where = f"{self.distribution} {self.version}".strip()
        return f"plugin {self.name!r}" + (f" ({where})" if where else "")

    def fail(self, reason: str, trace: str = "") -> None:
        """Mark as unusable."""
        self.state, self.reason, self.traceback = "failed", reason, trace


@dataclass(frozen=True)
class PluginStatus:
    """One line of `bitwright plugins`.

    Attributes:
        name: entry-point name, or module of a built-in plugin.
        distribution, version: what was installed.
        state: "ok", "missing framework", "failed" or "blocked" (by BITWRIGHT_PLUGINS).
        reason: why it isn't ok, and the way out.
        backends, techniques, tools: names that it provides.
        traceback: of the failure, where there was an exception.
    """

    name: str
    distribution: str
    version: str
    state: State
    reason: str
    backends: tuple[str, ...]
    techniques: tuple[str, ...]
    tools: tuple[str, ...] = ()
    traceback: str = ""


@dataclass(frozen=True)
class Descriptor(Generic[I_co]):
    """A descriptor and who gave it."""

    info: I_co
    owner: Owner

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.info.name, *(self.info.aliases if isinstance(self.info, TechniqueInfo) else ()))


@dataclass
class Catalogue:
    """What discovery found. `conflicts` and `refused` map (kind, name) to a message."""

    owners: list[Owner] = field(default_factory=list)
    descriptors: list[Descriptor[Any]] = field(default_factory=list)
    conflicts: dict[tuple[type, str], str] = field(default_factory=dict)
    refused: dict[tuple[type, str], str] = field(default_factory=dict)

    def of(self, kind: type[I]) -> list[Descriptor[I]]:
        """The descriptors of one kind, in the order of discovery."""
        return [d for d in self.descriptors if isinstance(d.info, kind)]

    def holder(self, kind: type[Any], name: str) -> Descriptor[Any] | None:
        """Who has a name or alias."""
        return next((d for d in self.of(kind) if name in d.names), None)

    def refuse_conflicts(self, kind: type[Info]) -> None:
        """Raise the first duplicate name of this kind.

        Raises:
            PluginError: two plugins register the same name.
        """
        for (of, _), message in self.conflicts.items():
            if of is kind:
                raise PluginError(message)

    def find(self, kind: type[I], name: str) -> Descriptor[I]:
        """The descriptor of a name or alias.

        Raises:
            PluginError: registered twice, refused for its api number, or unknown.
        """
        if message := self.conflicts.get((kind, name)) or self.refused.get((kind, name)):
            raise PluginError(message)
        if found := self.holder(kind, name):
            return found
        word = _word(kind)
        known = [n for d in self.of(kind) for n in d.names]
        close = difflib.get_close_matches(name, known, n=1)
        names = ", ".join(d.info.name for d in self.of(kind)) or "none"
        message = f"there is no {word} {name!r}"
        message += f" (did you mean {close[0]!r}?)" if close else ""
        message += f"; there are: {names}"
        if failed := [o.name for o in self.owners if o.state == "failed"]:
            message += f" (failed to load: {', '.join(failed)}; see `bitwright plugins`)"
        raise PluginError(message)


def _word(kind: type[Any]) -> str:
    return {BackendInfo: "backend", TechniqueInfo: "technique"}.get(kind, "tool")


def import_dotted(dotted: str) -> Any:
    """The object that ``"package.module:Name"`` names.

    Raises:
        PluginError: the text isn't of that form, or the module has no such name.
        ImportError: the module can't be imported (not explained here).
    """
    module, colon, attribute = dotted.partition(":")
    if not (module and colon and attribute):
        raise PluginError(f"{dotted!r} isn't of the form 'package.module:Name'")
    found: Any = importlib.import_module(module)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise PluginError(f"module {module!r} has no {attribute!r}") from None
    return found


def discover(defaults: Iterable[str] | None = None, *, entry_points: bool = True) -> Catalogue:
    """Read the built-in plugins, then the installed ones.

    Raises:
        PluginError: a plugin is broken and BITWRIGHT_STRICT_PLUGINS=1.
    """
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    catalogue = Catalogue()
    for module in DEFAULT_PLUGINS if defaults is None else defaults:
        owner = Owner(module, PROJECT, _version.__version__)
        _read(catalogue, manager, owner, partial(importlib.import_module, module))
    if entry_points:
        chosen = _chosen()
        for point in sorted(
            metadata.entry_points(group=PROJECT), key=lambda p: (p.dist.name if p.dist else "", p.name)
        ):
            owner = Owner(point.name, point.dist.name if point.dist else "", point.dist.version if point.dist else "")
            if chosen is not None and point.name not in chosen:
                owner.state, owner.reason = "blocked", "left out by BITWRIGHT_PLUGINS"
                catalogue.owners.append(owner)
                continue
            _read(catalogue, manager, owner, point.load)
    return catalogue


def _chosen() -> frozenset[str] | None:
    text = os.environ.get("BITWRIGHT_PLUGINS")
    if text is None or not text.strip():
        return None
    return frozenset() if text.strip() == "none" else frozenset(part.strip() for part in text.split(","))


def _read(catalogue: Catalogue, manager: PluginManager, owner: Owner, load: Callable[[], Any]) -> None:
    """Load one plugin and take its descriptors; a failure of any kind stays its own."""
    catalogue.owners.append(owner)
    plugin = None
    taken: list[Info] = []
    try:
        plugin = load()
        if manager.register(plugin, name=f"{owner.distribution}:{owner.name}") is None:
            raise PluginError("blocked")  # pragma: no cover - nothing blocks in this manager
        manager.check_pending()
        for hook, kind in (
            (manager.hook.register_backends, BackendInfo),
            (manager.hook.register_techniques, TechniqueInfo),
            (manager.hook.register_tools, ToolInfo),
        ):
            for implementation in hook.get_hookimpls():
                if implementation.plugin is plugin:
                    taken += _descriptors(implementation.function(), kind)
    except Exception as error:
        owner.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
        _complain(owner)
        return
    for info in taken:
        _take(catalogue, Descriptor(info, owner))


def _descriptors(given: Any, kind: type[Info]) -> list[Info]:
    items = list(given or ())
    for item in items:
        if not isinstance(item, kind):
            raise PluginError(f"register_{_word(kind)}s returned {item!r}, not a {kind.__name__}")
    return items


def _take(catalogue: Catalogue, descriptor: Descriptor[Any]) -> None:
    info, owner, kind = descriptor.info, descriptor.owner, type(descriptor.info)
    if info.api not in API_VERSIONS:
        newer = info.api >= API_VERSIONS.stop
        offered = f"{API_VERSIONS.start}" if len(API_VERSIONS) == 1 else f"{API_VERSIONS.start} to {API_VERSIONS[-1]}"
        message = (
            f"{_word(kind)} {info.name!r} of {owner.title} is written for plugin api {info.api}, bitwright "
            f"{_version.__version__} serves {offered}: "
            f"pip install --upgrade {'bitwright' if newer else owner.distribution or owner.name}"
        )
        catalogue.refused.update({(kind, name): message for name in descriptor.names})
        owner.fail(message)
        _complain(owner)
        return
    for name in descriptor.names:
        if held := catalogue.holder(kind, name):
            message = (
                f"{_word(kind)} {name!r} is registered twice, by {held.owner.title} and by {owner.title}; uninstall "
                "one of them, or choose the plugins to load with BITWRIGHT_PLUGINS"
            )
            catalogue.conflicts[kind, name] = message
            owner.fail(message)
            _complain(owner)
            return
    catalogue.descriptors.append(descriptor)


BY_HAND = "added by hand"


def admit(catalogue: Catalogue, info: Info) -> None:
    """Take a descriptor that the user's own process adds; one of an earlier `admit` is replaced.

    Raises:
        PluginError: a name belongs to an installed plugin, or the api number isn't served.
    """
    owner = next((o for o in catalogue.owners if o.name == BY_HAND), None) or Owner(BY_HAND, "", "")
    descriptor = Descriptor(info, owner)
    for name in descriptor.names:
        held = catalogue.holder(type(info), name)
        if held and held.owner is not owner:
            raise PluginError(f"{_word(type(info))} {name!r} belongs to {held.owner.title}; choose another name")
    if info.api not in API_VERSIONS:
        raise PluginError(f"{info.name!r} asks for plugin api {info.api}; this bitwright serves {list(API_VERSIONS)}")
    if owner not in catalogue.owners:
        catalogue.owners.append(owner)
    catalogue.descriptors = [
        d for d in catalogue.descriptors
        if not (type(d.info) is type(info) and d.owner is owner and set(d.names) & set(descriptor.names))
    ]  # fmt: skip
    catalogue.descriptors.append(descriptor)


def _complain(owner: Owner) -> None:
    message = f"{owner.title} skipped: {owner.reason}"
    if os.environ.get("BITWRIGHT_STRICT_PLUGINS", "") not in ("", "0"):
        raise PluginError(message)
    warnings.warn(message, PluginWarning, stacklevel=2)
