"""Finds backends, techniques and tools: built-in, from installed plugins, or added by hand in a notebook.

Nothing is discovered before the first look-up; the answer is kept. `Registry` is the only caller of the hooks.

Environment:
    BITWRIGHT_PLUGINS: ``none`` loads no third-party plugin, ``a,b`` only these entry points. Unset: all.
    BITWRIGHT_STRICT_PLUGINS: ``1`` makes a broken plugin an error; otherwise it is named in a warning and skipped.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from bitwright.backend import Backend
from bitwright.errors import InputError, MissingExtraError, PluginError
from bitwright.hookspecs import BackendInfo, TechniqueInfo, ToolInfo
from bitwright.plugins._discovery import (
    Catalogue,
    Descriptor,
    Owner,
    PluginStatus,
    PluginWarning,
    admit,
    discover,
    import_dotted,
)
from bitwright.technique import Settings, Technique

__all__ = [
    "PluginStatus",
    "PluginWarning",
    "Registry",
    "add",
    "backend",
    "backend_for_model",
    "backend_for_path",
    "backends",
    "default_registry",
    "model_file",
    "plugins",
    "technique",
    "techniques",
    "tool",
    "tools",
]

T = TypeVar("T")


class Registry:
    """All backends and techniques by name.

    Args:
        default_plugins: modules whose hooks are read first; None takes the built-in ones.
        entry_points: whether installed third-party plugins are read too.
    """

    def __init__(self, default_plugins: Iterable[str] | None = None, *, entry_points: bool = True) -> None:
        self._defaults = None if default_plugins is None else tuple(default_plugins)
        self._entry_points = entry_points
        self._found: Catalogue | None = None
        self._instances: dict[tuple[str, str], Any] = {}

    @property
    def _catalogue(self) -> Catalogue:
        if self._found is None:
            self._found = discover(self._defaults, entry_points=self._entry_points)
        return self._found

    # -- listing

    def backends(self) -> Mapping[str, BackendInfo]:
        """Every usable backend's descriptor, by name, whether its framework is installed or not.

        Raises:
            PluginError: two distributions register the same name.
        """
        self._catalogue.refuse_conflicts(BackendInfo)
        return {d.info.name: d.info for d in self._catalogue.of(BackendInfo)}

    def techniques(self) -> Mapping[str, TechniqueInfo]:
        """Every usable technique's descriptor, by name.

        Raises:
            PluginError: two distributions register the same name or alias.
        """
        self._catalogue.refuse_conflicts(TechniqueInfo)
        return {d.info.name: d.info for d in self._catalogue.of(TechniqueInfo)}

    def tools(self) -> Mapping[str, ToolInfo]:
        """Every usable tool's descriptor, by name.

        Raises:
            PluginError: two distributions register the same name.
        """
        self._catalogue.refuse_conflicts(ToolInfo)
        return {d.info.name: d.info for d in self._catalogue.of(ToolInfo)}

    def plugins(self) -> tuple[PluginStatus, ...]:
        """The state of every plugin: "ok", "missing framework", "failed" or "blocked", with the reason."""
        return tuple(self._status(owner) for owner in self._catalogue.owners)

    def _status(self, owner: Owner) -> PluginStatus:
        mine = [d for d in self._catalogue.descriptors if d.owner is owner]
        state, reason = owner.state, owner.reason
        if state == "ok":
            missing = [self._missing(d) for d in mine if isinstance(d.info, BackendInfo)]
            if hints := [hint for hint in missing if hint]:
                state, reason = "missing framework", "; ".join(hints)
        return PluginStatus(
            owner.name, owner.distribution, owner.version, state, reason,
            tuple(d.info.name for d in mine if isinstance(d.info, BackendInfo)),
            tuple(d.info.name for d in mine if isinstance(d.info, TechniqueInfo)),
            tuple(d.info.name for d in mine if isinstance(d.info, ToolInfo)),
            owner.traceback,
        )  # fmt: skip

    # -- one by name

    def technique_info(self, name: str) -> TechniqueInfo:
        """The descriptor of a technique, by name or alias.

        Raises:
            PluginError: unknown, or registered twice.
        """
        return self._catalogue.find(TechniqueInfo, name).info

    def technique(self, name: str) -> Technique:
        """The technique of that name or alias.

        Raises:
            PluginError: unknown, registered twice, or its module doesn't provide it.
        """
        descriptor = self._catalogue.find(TechniqueInfo, name)
        made = self._make(descriptor)
        if not isinstance(made, Technique):
            raise PluginError(
                f"technique {name!r} of {descriptor.owner.title} isn't a Technique: "
                f"it lacks {_lacking(made, Technique)}"
            )
        return made

    def settings(self, name: str) -> type[Settings]:
        """The pydantic model of a technique's settings.

        Raises:
            PluginError: as `technique`, or the model isn't a subclass of `bitwright.technique.Settings`.
        """
        info = self.technique_info(name)
        model = import_dotted(info.settings) if isinstance(info.settings, str) else info.settings
        model = model if model is not None else self.technique(name).Settings
        if not (inspect.isclass(model) and issubclass(model, Settings)):
            raise PluginError(f"the settings of technique {name!r} must be a subclass of bitwright.technique.Settings")
        return model

    def tool(self, name: str) -> Callable[..., Any]:
        """The tool of that name, a callable.

        Raises:
            PluginError: unknown, registered twice, or its module doesn't provide it.
        """
        descriptor = self._catalogue.find(ToolInfo, name)
        made: Any = import_dotted(descriptor.info.factory)
        if not callable(made):
            raise PluginError(f"tool {name!r} of {descriptor.owner.title} can't be called: {descriptor.info.factory}")
        found: Callable[..., Any] = made
        return found

    def backend_info(self, name: str) -> BackendInfo:
        """The descriptor of a backend.

        Raises:
            PluginError: unknown, or registered twice.
        """
        return self._catalogue.find(BackendInfo, name).info

    def backend(self, name: str) -> Backend[Any]:
        """The backend of that name; imports its framework.

        Raises:
            PluginError: unknown, registered twice, or its module doesn't provide it.
            MissingExtraError: its framework isn't installed; the message holds the `pip install` line.
        """
        return self._backend(self._catalogue.find(BackendInfo, name))

    def _backend(self, descriptor: Descriptor[BackendInfo]) -> Backend[Any]:
        if hint := self._missing(descriptor):
            raise MissingExtraError(hint)
        try:
            made = self._make(descriptor)
        except ModuleNotFoundError as error:
            # Only the framework's own absence is explained; any other failing import is a bug to be seen as it is.
            if (error.name or "").partition(".")[0] not in descriptor.info.modules:
                raise
            raise MissingExtraError(_hint(descriptor, [str(error.name)])) from error
        if not isinstance(made, Backend):
            raise PluginError(
                f"backend {descriptor.info.name!r} of {descriptor.owner.title} isn't a Backend: "
                f"it lacks {_lacking(made, Backend)}"
            )
        return made

    def _missing(self, descriptor: Descriptor[BackendInfo]) -> str:
        """What to install for a backend; empty where all is there. Imports nothing."""
        absent = [m for m in descriptor.info.modules if m not in sys.modules and importlib.util.find_spec(m) is None]
        return _hint(descriptor, absent) if absent else ""

    def _make(self, descriptor: Descriptor[Any]) -> Any:
        key = (type(descriptor.info).__name__, descriptor.info.name)
        if key not in self._instances:
            factory = descriptor.info.factory
            self._instances[key] = (import_dotted(factory) if isinstance(factory, str) else factory)()
        return self._instances[key]

    # -- by what the user holds

    def backend_for_model(self, model: object) -> Backend[Any]:
        """The backend that owns a model object.

        Only backends whose framework is already imported are asked: an object of any other can't exist. First that of
        the class nearest to the object's: a Keras model that runs on PyTorch is an `nn.Module` too.

        Raises:
            PluginError: none owns it; the message lists the backends that there are.
            MissingExtraError: none owns it, and one that might needs something installed.
        """
        missing: list[str] = []
        packages = [base.__module__.partition(".")[0] for base in type(model).__mro__]

        def distance(descriptor: Descriptor[BackendInfo]) -> int:
            return next((i for i, p in enumerate(packages) if p in descriptor.info.modules), len(packages))

        for descriptor in sorted(self._catalogue.of(BackendInfo), key=distance):
            modules = descriptor.info.modules
            if modules and not any(m in sys.modules for m in modules):
                continue
            try:
                candidate = self._backend(descriptor)
            except MissingExtraError as error:
                missing.append(str(error))
                continue
            if candidate.owns(model):
                return candidate
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        if missing:
            raise MissingExtraError(f"no usable backend takes a {kind}: {'; '.join(missing)}")
        raise PluginError(f"no backend takes a {kind}; there are {self._describe_backends()}")

    def backend_for_path(self, path: str | Path) -> Backend[Any]:
        """The backend that opens a model file or folder: by suffix, and by content where that doesn't decide.

        Raises:
            InputError: there is no such file, or no backend opens it.
            MissingExtraError: the backend's framework isn't installed.
        """
        path = model_file(path)
        if not path.exists():
            raise InputError(f"there is no model {str(path)!r}")
        offered = self._catalogue.of(BackendInfo)
        by_suffix = [d for d in offered if path.suffix.lower() in d.info.suffixes]
        if len(by_suffix) != 1:
            by_content = [d for d in by_suffix or offered if _recognizes(d.info, path)]
            by_suffix = by_content or by_suffix
        if not by_suffix:
            raise InputError(f"no backend opens {str(path)!r}; there are {self._describe_backends()}")
        return self._backend(by_suffix[0])

    def _describe_backends(self) -> str:
        if not (offered := self._catalogue.of(BackendInfo)):
            return "no backends: reinstall bitwright"
        texts = []
        for d in offered:
            opens = ", ".join(d.info.suffixes) or "model objects"
            missing = self._missing(d)
            texts.append(f"{d.info.name} ({opens}{'; ' + missing if missing else ''})")
        return ", ".join(texts)

    # -- by hand

    def add(self, item: T) -> T:
        """Register a descriptor, or a technique or backend class, for this process; usable as a decorator.

        An item added again under its name takes the place of the earlier one, so that a notebook cell can be rerun.

        Raises:
            PluginError: the name belongs to an installed plugin, or the class lacks what the protocol asks.
        """
        info = item if isinstance(item, BackendInfo | TechniqueInfo | ToolInfo) else _describe(item)
        self._instances.pop((type(info).__name__, info.name), None)
        admit(self._catalogue, info)
        return item


def model_file(path: str | Path) -> Path:
    """The file behind a model's path: "model.py" of "model.py:build", everything else as it is."""
    file, colon, function = str(path).rpartition(":")
    return Path(file) if colon and file.endswith(".py") and function.isidentifier() else Path(path)


def _describe(cls: object) -> BackendInfo | TechniqueInfo:
    """The descriptor of a class given to `add`."""
    if not isinstance(cls, type) or not isinstance(getattr(cls, "name", None), str):
        raise PluginError(f"{cls!r} can't be registered: give a descriptor, or a class with a `name`")
    item: Any = cls
    summary = (inspect.getdoc(item) or item.__name__).splitlines()[0]
    if hasattr(item, "apply") and hasattr(item, "Settings"):
        auto = getattr(item, "auto", None)
        return TechniqueInfo(item.name, summary, factory=item, settings=item.Settings, auto=auto)
    if hasattr(item, "owns") and hasattr(item, "graph"):
        return BackendInfo(item.name, summary, factory=item)
    raise PluginError(
        f"{item.__name__} is neither a technique (name, Settings, requires, statistics, apply) "
        "nor a backend (see bitwright.backend.Backend)"
    )


def _lacking(made: object, protocol: type) -> str:
    wanted = {m for m in (*getattr(protocol, "__annotations__", ()), *vars(protocol)) if not m.startswith("_")}
    return ", ".join(sorted(m for m in wanted if not hasattr(made, m))) or "nothing by name (is it a class?)"


def _recognizes(info: BackendInfo, path: Path) -> bool:
    if info.sniff is None:
        return False
    sniff: Any = import_dotted(info.sniff) if isinstance(info.sniff, str) else info.sniff
    return bool(sniff(path))


def _hint(descriptor: Descriptor[BackendInfo], absent: list[str]) -> str:
    info, owner = descriptor.info, descriptor.owner
    wanted = f'"{owner.distribution or "bitwright"}[{info.extra}]"' if info.extra else " ".join(absent)
    return f"backend {info.name!r} needs {', '.join(absent)}: pip install {wanted}"


@cache
def default_registry() -> Registry:
    """The registry that the module's functions, `QuantSim` and the command line use."""
    return Registry()


def backends() -> Mapping[str, BackendInfo]:
    """`Registry.backends` of the default registry."""
    return default_registry().backends()


def techniques() -> Mapping[str, TechniqueInfo]:
    """`Registry.techniques` of the default registry."""
    return default_registry().techniques()


def plugins() -> tuple[PluginStatus, ...]:
    """`Registry.plugins` of the default registry."""
    return default_registry().plugins()


def backend(name: str) -> Backend[Any]:
    """`Registry.backend` of the default registry."""
    return default_registry().backend(name)


def technique(name: str) -> Technique:
    """`Registry.technique` of the default registry."""
    return default_registry().technique(name)


def backend_for_model(model: object) -> Backend[Any]:
    """`Registry.backend_for_model` of the default registry."""
    return default_registry().backend_for_model(model)


def backend_for_path(path: str | Path) -> Backend[Any]:
    """`Registry.backend_for_path` of the default registry."""
    return default_registry().backend_for_path(path)


def tools() -> Mapping[str, ToolInfo]:
    """`Registry.tools` of the default registry."""
    return default_registry().tools()


def tool(name: str) -> Callable[..., Any]:
    """`Registry.tool` of the default registry."""
    return default_registry().tool(name)


def add(item: T) -> T:
    """`Registry.add` of the default registry: ``@bitwright.plugins.registry.add`` above a technique class."""
    return default_registry().add(item)
