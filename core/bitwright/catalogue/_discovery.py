"""Reads plugins, one by one, into a catalogue of descriptors; a broken one is named and skipped."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import metadata
from typing import Any

from pluggy import PluginManager

from bitwright import _version, hookspecs
from bitwright.catalogue._catalogue import CORE_COMMANDS, Catalogue, Descriptor, complain, item_of
from bitwright.catalogue._kinds import COMMAND, KINDS, PURPOSES, QDQ
from bitwright.catalogue._owners import Fault, Owner, blamed, described
from bitwright.errors import BitwrightError, PluginError
from bitwright.hookspecs import PROJECT

DEFAULT_PLUGINS = (
    "bitwright.targets.plugin",
    "bitwright.formats.plugin",
    "bitwright_onnx.plugin",
    "bitwright_torch.plugin",
    "bitwright_keras.plugin",
    "bitwright_tensorflow.plugin",
    "bitwright_techniques.plugin",
    "bitwright_search.plugin",
    "bitwright_analysis.plugin",
    "bitwright_deploy.plugin",
    "bitwright_formats.plugin",
)
"""The built-in plugins; they take the same hooks as everyone's."""

RESERVED = {
    COMMAND.word: CORE_COMMANDS,
    "tool": ("QuantSim", "RunDirectory", "registry", "validate"),
    "export format": (*PURPOSES, QDQ, "safetensors"),
}
"""Names that are the core's own: its commands, what `import bitwright` has beside the tools, what bundles hold."""


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


def resolved(descriptor: Descriptor[Any], given: object, item: str = "") -> Any:
    """What a field of a descriptor stands for: the object that its text names, or itself.

    Args:
        descriptor: whose field it is.
        given: ``"package.module:Name"``, or an object.
        item: what messages call it; the descriptor's own item by default.

    Raises:
        PluginError: it can't be imported, or isn't there; names the plugin.
    """
    if not isinstance(given, str):
        return given
    owner, item = descriptor.owner, item or item_of(descriptor.info)
    with blamed(owner, item):
        try:
            return import_dotted(given)
        except PluginError as error:
            owner.add_fault(Fault(item, str(error)))
            raise PluginError(f"{item} of {owner.title} can't be used: {error}") from None


@cache
def current() -> Catalogue:
    """The catalogue of this process: read on first use, and kept."""
    return discover()


def discover(defaults: Iterable[str] | None = None, *, entry_points: bool = True) -> Catalogue:
    """Read the built-in plugins, then the installed ones.

    Raises:
        PluginError: a plugin is broken and BITWRIGHT_STRICT_PLUGINS=1.
    """
    manager = PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    catalogue = Catalogue(reserved=RESERVED)
    for module in DEFAULT_PLUGINS if defaults is None else defaults:
        owner = Owner(module, PROJECT, _version.__version__, module.partition(".")[0], builtin=True)
        catalogue.take(_read(catalogue, manager, owner, partial(importlib.import_module, module)))
    if entry_points:
        chosen = _chosen()
        found: list[tuple[Any, Owner]] = []
        for owner, point in _installed():
            if chosen is not None and owner.name not in chosen:
                owner.blocked = "left out by BITWRIGHT_PLUGINS"
                catalogue.owners.append(owner)
            else:
                found += _read(catalogue, manager, owner, point.load)
        catalogue.take(found)
    return catalogue


def _installed() -> list[tuple[Owner, metadata.EntryPoint]]:
    """The installed plugins, by distribution and name."""
    found = []
    for point in metadata.entry_points(group=PROJECT):
        name, version = "", ""
        with suppress(Exception):  # of a damaged installation it can't be read
            about: Any = point.dist.metadata if point.dist is not None else {}
            name, version = (str(about[key]) if key in about else "" for key in ("Name", "Version"))
        found.append((Owner(point.name, name, version, point.value.partition(":")[0].partition(".")[0]), point))
    return sorted(found, key=lambda pair: (pair[0].distribution, pair[0].name))


def _chosen() -> frozenset[str] | None:
    text = os.environ.get("BITWRIGHT_PLUGINS")
    if text is None or not text.strip():
        return None
    return frozenset() if text.strip() == "none" else frozenset(part.strip() for part in text.split(","))


def _read(
    catalogue: Catalogue, manager: PluginManager, owner: Owner, load: Callable[[], Any]
) -> list[tuple[Any, Owner]]:
    """Load one plugin and collect its descriptors; a failure of any kind stays its own."""
    catalogue.owners.append(owner)
    plugin = None
    with _skipped(owner, "") as whole:
        plugin = load()
        manager.register(plugin, name=f"{owner.distribution}:{owner.name}")
        manager.check_pending()
    if whole:
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
        return []
    found: list[tuple[Any, Owner]] = []
    for kind in KINDS:
        for implementation in getattr(manager.hook, kind.hook).get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            items: list[Any] = []
            with _skipped(owner, f"hook {kind.hook}"):
                items = list(implementation.function() or ())
            for item in items:
                if isinstance(item, kind.info):
                    found.append((item, owner))
                else:
                    what = f"it returned {item!r}, not a {kind.info.__name__}"
                    catalogue.fault(owner, Fault(f"hook {kind.hook}", what))
    return found


@contextmanager
def _skipped(owner: Owner, item: str) -> Iterator[list[Fault]]:
    """Run a plugin's code; where it fails in whatever way, that is a fault of the owner's, and told.

    Yields:
        A list that holds the fault afterwards.
    """
    met: list[Fault] = []
    before = len(owner.faults)
    try:
        with blamed(owner, item, builtin_too=True):
            yield met
    except BitwrightError as error:
        if len(owner.faults) == before:
            owner.add_fault(Fault(item, described(error), traceback.format_exc()))
        met += owner.faults[before:]
        complain(owner, owner.faults[-1])
