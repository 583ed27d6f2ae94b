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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

from bitwright.backend import Backend, FormatWriter, IntegerRuntime
from bitwright.catalogue import (
    Catalogue,
    Descriptor,
    Fault,
    Info,
    Owner,
    PluginStatus,
    PluginWarning,
    State,
    blamed,
    command_of,
    culprits,
    current,
    discover,
    item_of,
    resolved,
)
from bitwright.errors import BitwrightError, InputError, MissingExtraError, PluginError
from bitwright.formats import schema
from bitwright.hookspecs import (
    BackendInfo,
    FormatInfo,
    RuntimeInfo,
    SchemaInfo,
    TargetInfo,
    TechniqueInfo,
    ToolchainInfo,
    ToolInfo,
)
from bitwright.targets import load_target
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
    "format_info",
    "format_writer",
    "formats",
    "model_file",
    "plugins",
    "runtime",
    "runtimes",
    "technique",
    "techniques",
    "tool",
    "toolchain",
    "toolchain_info",
    "toolchains",
    "tools",
]

T = TypeVar("T")


class Registry:
    """All backends and techniques by name.

    Args:
        default_plugins: modules whose hooks are read first; None takes the built-in ones.
        entry_points: whether installed third-party plugins are read too.
        catalogue: where what plugins offer is looked up; None reads it by the arguments above.
    """

    def __init__(
        self,
        default_plugins: Iterable[str] | None = None,
        *,
        entry_points: bool = True,
        catalogue: Callable[[], Catalogue] | None = None,
    ) -> None:
        self._defaults = None if default_plugins is None else tuple(default_plugins)
        self._entry_points = entry_points
        self._given = catalogue
        self._found: Catalogue | None = None
        self._instances: dict[tuple[str, str], Any] = {}

    @property
    def _catalogue(self) -> Catalogue:
        if self._found is None:
            read = self._given or (lambda: discover(self._defaults, entry_points=self._entry_points))
            self._found = read()
        return self._found

    # -- listing

    def backends(self) -> Mapping[str, BackendInfo]:
        """Every usable backend's descriptor, by name, whether its framework is installed or not."""
        return {d.info.name: d.info for d in self._catalogue.of(BackendInfo)}

    def techniques(self) -> Mapping[str, TechniqueInfo]:
        """Every usable technique's descriptor, by name."""
        return {d.info.name: d.info for d in self._catalogue.of(TechniqueInfo)}

    def tools(self) -> Mapping[str, ToolInfo]:
        """Every usable tool's descriptor, by name."""
        return {d.info.name: d.info for d in self._catalogue.of(ToolInfo)}

    def runtimes(self) -> Mapping[str, RuntimeInfo]:
        """Every usable integer runtime's descriptor, by name, whether what it needs is installed or not."""
        return {d.info.name: d.info for d in self._catalogue.of(RuntimeInfo)}

    def formats(self) -> Mapping[str, FormatInfo]:
        """Every usable export format's descriptor, by name, whether what it needs is installed or not."""
        return {d.info.name: d.info for d in self._catalogue.of(FormatInfo)}

    def toolchains(self) -> Mapping[str, ToolchainInfo]:
        """The descriptor of every target's tools whose command lines there are, by name."""
        return {d.info.name: d.info for d in self._catalogue.of(ToolchainInfo)}

    def plugins(self, *, examined: bool = False) -> tuple[PluginStatus, ...]:
        """The state of every plugin, see `PluginStatus`, with the reasons.

        Args:
            examined: make every item of third parties, so that one that can't be made is known; without, only what
                went wrong so far is.
        """
        if examined:
            for descriptor in self._catalogue.descriptors:
                if not descriptor.owner.builtin:
                    with suppress(BitwrightError):  # it is among the owner's faults now
                        self._examine(descriptor)
        return tuple(self._status(owner) for owner in self._catalogue.owners)

    def _examine(self, descriptor: Descriptor[Any]) -> None:
        info, owner = descriptor.info, descriptor.owner
        known = len(owner.faults)
        try:
            match info:
                case TechniqueInfo():
                    self.technique(info.name)
                    self.settings(info.name)
                case ToolInfo():
                    self.tool(info.name)
                    if info.command:
                        self.command(command_of(info))
                case BackendInfo():
                    self._backend(descriptor)
                case RuntimeInfo():
                    self.runtime(info.name)
                case TargetInfo():
                    load_target(info.name)
                case SchemaInfo():
                    schema(info.name)
                case FormatInfo():
                    self.format_writer(info.name)
                case ToolchainInfo():
                    self.toolchain(info.name)
        except MissingExtraError:
            raise
        except BitwrightError as error:
            if len(owner.faults) == known and item_of(info) not in {f.item for f in owner.faults}:
                owner.add_fault(Fault(item_of(info), str(error)))
            raise

    def _status(self, owner: Owner) -> PluginStatus:
        mine = [d for d in self._catalogue.descriptors if d.owner is owner]
        faults = tuple(map(str, owner.faults))
        broken = {f.item for f in owner.faults}
        needing = (d for d in mine if isinstance(d.info, BackendInfo | RuntimeInfo | FormatInfo))
        missing = list(dict.fromkeys(hint for d in needing if (hint := self._missing(d))))
        state: State = "ok"
        if owner.blocked:
            state = "blocked"
        elif faults:
            state = "failed" if all(item_of(d.info) in broken for d in mine) else "partial"
        elif missing:
            state = "missing framework"
        kinds = (
            BackendInfo, TechniqueInfo, ToolInfo, TargetInfo, RuntimeInfo, SchemaInfo, FormatInfo, ToolchainInfo,
        )  # fmt: skip
        names = {k: tuple(d.info.name for d in mine if isinstance(d.info, k) and item_of(d.info) not in broken)
                 for k in kinds}  # fmt: skip
        return PluginStatus(
            owner.name, owner.distribution, owner.version, state,
            owner.blocked or "; ".join([*faults, *missing]),
            names[BackendInfo], names[TechniqueInfo], names[ToolInfo],
            next((f.traceback for f in owner.faults if f.traceback), ""), faults,
            names[TargetInfo], names[RuntimeInfo], names[SchemaInfo], names[FormatInfo], names[ToolchainInfo],
        )  # fmt: skip

    def culprits(self, error: BaseException) -> tuple[str, ...]:
        """Plugins of third parties whose code an exception has come through, the innermost first."""
        return tuple(o.title for o in culprits(error.__traceback__, self._catalogue.owners))

    def release(self, item: str | object) -> str:
        """What third party's distribution a technique, or another object, comes from, with its version.

        Results that are kept for later runs depend on it.

        Args:
            item: a technique's name or alias, or an object that a plugin has made.

        Returns:
            Such as "bitwright-acme 1.0"; empty for what ships with bitwright, is added by hand, or is nobody's.
        """
        if isinstance(item, str):
            held = self._catalogue.holder(TechniqueInfo, item)
            owner = None if held is None else held.owner
        else:
            package = type(item).__module__.partition(".")[0]
            owner = next((o for o in self._catalogue.owners if o.package == package), None)
        if owner is None or owner.builtin or not owner.distribution:
            return ""
        return f"{owner.distribution} {owner.version}".strip()

    @contextmanager
    def blaming(self, info: Info) -> Iterator[None]:
        """Run code of what a descriptor has made; what it raises is its plugin's fault, but bitwright's own errors.

        Raises:
            PluginError: names the item and the plugin. Exceptions of what ships with bitwright pass as they are.
        """
        held = self._catalogue.holder(type(info), info.name)
        if held is None:
            yield
            return
        with blamed(held.owner, item_of(info)):
            yield

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
        made: Technique = _fitting(descriptor, self._make(descriptor), Technique)
        return made

    def settings(self, name: str) -> type[Settings]:
        """The pydantic model of a technique's settings.

        Raises:
            PluginError: as `technique`, or the model isn't a subclass of `bitwright.technique.Settings`.
        """
        descriptor = self._catalogue.find(TechniqueInfo, name)
        model = resolved(descriptor, descriptor.info.settings)
        model = model if model is not None else self.technique(name).Settings
        if not (inspect.isclass(model) and issubclass(model, Settings)):
            raise _unfit(descriptor, "has settings that are no subclass of bitwright.technique.Settings")
        return model

    def tool(self, name: str) -> Callable[..., Any]:
        """The tool of that name, a callable.

        Raises:
            PluginError: unknown, registered twice, or its module doesn't provide it.
        """
        return _function(self._catalogue.find(ToolInfo, name))

    def toolchain_info(self, name: str) -> ToolchainInfo:
        """The descriptor of a target's tools, by name or alias.

        Raises:
            PluginError: unknown, or registered twice.
        """
        return self._catalogue.find(ToolchainInfo, name).info

    def toolchain(self, name: str) -> Callable[..., Any]:
        """What makes the command lines of a target's tools.

        Raises:
            PluginError: unknown, registered twice, or its module doesn't provide it.
        """
        return _function(self._catalogue.find(ToolchainInfo, name))

    def commands(self) -> Mapping[str, ToolInfo]:
        """The tools that bring a command, by what the command line calls it."""
        return {command_of(d.info): d.info for d in self._catalogue.of(ToolInfo) if d.info.command}

    def lost_command(self, name: str) -> str:
        """Why no plugin has a command that two bring; empty where that isn't so."""
        return self._catalogue.why_lost("command", name)

    def command(self, name: str) -> Callable[..., Any]:
        """The command of that name that a tool brings, a function with Typer annotations.

        Raises:
            PluginError: there is none, two plugins bring it, or its module doesn't provide it.
        """
        for descriptor in self._catalogue.of(ToolInfo):
            if descriptor.info.command and command_of(descriptor.info) == name:
                made: Any = resolved(descriptor, descriptor.info.command, f"command {name!r}")
                if not callable(made):
                    raise _unfit(descriptor, f"can't be called: {descriptor.info.command}", f"command {name!r}")
                found: Callable[..., Any] = made
                return found
        raise PluginError(self.lost_command(name) or f"no plugin brings a command {name!r}")

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

    def runtime(self, name: str) -> IntegerRuntime:
        """The integer runtime of that name.

        Raises:
            PluginError: unknown, two plugins bring it, or its module doesn't provide it.
            MissingExtraError: what it needs isn't installed; the message holds the `pip install` line.
        """
        made: IntegerRuntime = self._installed(self._catalogue.find(RuntimeInfo, name), IntegerRuntime)
        return made

    def format_info(self, name: str) -> FormatInfo:
        """The descriptor of an export format, by name or alias.

        Raises:
            PluginError: unknown, or registered twice.
        """
        return self._catalogue.find(FormatInfo, name).info

    def format_writer(self, name: str) -> FormatWriter:
        """What writes the export format of that name or alias.

        Raises:
            PluginError: unknown, two plugins bring it, or its module doesn't provide it.
            MissingExtraError: what it needs isn't installed; the message holds the `pip install` line.
        """
        made: FormatWriter = self._installed(self._catalogue.find(FormatInfo, name), FormatWriter)
        return made

    def _backend(self, descriptor: Descriptor[BackendInfo]) -> Backend[Any]:
        if hint := self._missing(descriptor):
            raise MissingExtraError(hint)
        try:
            made = self._make(descriptor)
        except (ModuleNotFoundError, PluginError) as error:
            # Only the framework's own absence is explained; any other failing import is a bug to be seen as it is.
            cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            name = str(getattr(cause, "name", None) or "")
            packages = {m.partition(".")[0] for m in descriptor.info.modules}
            if not isinstance(cause, ModuleNotFoundError) or name.partition(".")[0] not in packages:
                raise
            raise MissingExtraError(_hint(descriptor, [name])) from error
        found: Backend[Any] = _fitting(descriptor, made, Backend)
        return found

    def missing(self, name: str) -> str:
        """What must be installed for a backend, with the `pip install` line; empty where all is there.

        Raises:
            PluginError: unknown, or two plugins bring it.
        """
        return self._missing(self._catalogue.find(BackendInfo, name))

    def port(self, name: str) -> object:
        """What a backend's `BackendInfo.port` makes; None where it has none.

        Raises:
            PluginError: unknown, or its module doesn't provide it.
        """
        descriptor = self._catalogue.find(BackendInfo, name)
        if descriptor.info.port is None:
            return None
        item = f"port of {item_of(descriptor.info)}"
        factory = resolved(descriptor, descriptor.info.port, item)
        with blamed(descriptor.owner, item):
            return factory()

    def _missing(self, descriptor: Descriptor[Any]) -> str:
        """What to install for a backend or a runtime; empty where all is there. Imports nothing."""
        absent = [m for m in descriptor.info.modules if not _is_installed(m)]
        return _hint(descriptor, absent) if absent else ""

    def _installed(self, descriptor: Descriptor[Any], protocol: type) -> Any:
        """What a descriptor makes, where all that it needs is installed."""
        if hint := self._missing(descriptor):
            raise MissingExtraError(hint)
        return _fitting(descriptor, self._make(descriptor), protocol)

    def _make(self, descriptor: Descriptor[Any]) -> Any:
        key = (type(descriptor.info).__name__, descriptor.info.name)
        if key not in self._instances:
            factory = resolved(descriptor, descriptor.info.factory)
            with blamed(descriptor.owner, item_of(descriptor.info)):
                self._instances[key] = factory()
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
        broken: list[str] = []
        packages = [base.__module__.partition(".")[0] for base in type(model).__mro__]

        def distance(descriptor: Descriptor[BackendInfo]) -> int:
            return next((i for i, p in enumerate(packages) if p in descriptor.info.modules), len(packages))

        for descriptor in sorted(self._catalogue.of(BackendInfo), key=distance):
            modules = descriptor.info.modules
            if modules and not any(m in sys.modules for m in modules):
                continue
            try:
                candidate = self._backend(descriptor)
                with blamed(descriptor.owner, item_of(descriptor.info)):
                    owned = candidate.owns(model)
            except MissingExtraError as error:
                missing.append(str(error))
                continue
            except PluginError as error:  # a broken backend is none for this model; others may be
                broken.append(str(error))
                continue
            if owned:
                return candidate
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        if missing:
            raise MissingExtraError(f"no usable backend takes a {kind}: {'; '.join(missing)}")
        told = f" ({'; '.join(broken)})" if broken else ""
        raise PluginError(f"no backend takes a {kind}; there are {self._describe_backends()}{told}")

    def backend_for_path(self, path: str | Path) -> Backend[Any]:
        """The backend that opens a model file or folder: by suffix, and by content where that doesn't decide.

        Raises:
            InputError: there is no such file, or no backend opens it.
            MissingExtraError: the backend's framework isn't installed.
        """
        path = model_file(path)
        if not path.exists():
            raise InputError(f"there is no file {path}{self._others_like(path)}")
        offered = self._catalogue.of(BackendInfo)
        by_suffix = [d for d in offered if path.suffix.lower() in d.info.suffixes]
        if len(by_suffix) != 1:
            by_content = [d for d in by_suffix or offered if _recognizes(d, path)]
            by_suffix = by_content or by_suffix
        if not by_suffix:
            raise InputError(
                f"no backend opens {str(path)!r}{self._others_like(path)}; there are {self._describe_backends()}"
            )
        return self._backend(by_suffix[0])

    def _others_like(self, path: Path) -> str:
        """The end of a message about a path that is no model: the models in that folder, or of that name and more."""
        suffixes = {suffix for d in self._catalogue.of(BackendInfo) for suffix in d.info.suffixes}
        try:
            found = path.iterdir() if path.is_dir() else path.parent.glob(f"{escape(path.name)}.*")
            models = sorted(p for p in found if p.suffix.lower() in suffixes and p.suffix != ".py" and p.is_file())
        except (OSError, ValueError):
            return ""
        return f"; did you mean {str(models[0])!r}?" if models else ""

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
        info = item if isinstance(item, Info) else _describe(item)
        self._instances.pop((type(info).__name__, info.name), None)
        self._catalogue.admit(info)
        return item


def model_file(path: str | Path) -> Path:
    """The file behind a model's path: "model.py" of "model.py:build", everything else as it is."""
    file, colon, function = str(path).rpartition(":")
    return Path(file) if colon and file.endswith(".py") and function.isidentifier() else Path(path)


def _is_installed(module: str) -> bool:
    """Whether there is a module, dotted or not; neither it nor what it lies in is imported."""
    if module in sys.modules:
        return True
    package, _, inner = module.partition(".")
    try:
        spec = importlib.util.find_spec(package)
        for depth in range(1, inner.count(".") + 2) if inner else ():
            if spec is None or spec.submodule_search_locations is None:
                return False
            name = ".".join(module.split(".")[: depth + 1])
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError):  # no name of a module, or one that is half imported
        return False
    return spec is not None


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


def _function(descriptor: Descriptor[Any]) -> Callable[..., Any]:
    """The function that a descriptor's factory is."""
    made: Any = resolved(descriptor, descriptor.info.factory)
    if not callable(made):
        raise _unfit(descriptor, f"can't be called: {descriptor.info.factory}")
    found: Callable[..., Any] = made
    return found


def _fitting(descriptor: Descriptor[Any], made: object, protocol: type) -> Any:
    """An object as it is, if it has what the protocol asks for."""
    if not isinstance(made, protocol):
        name = protocol.__name__
        article = "an" if name[0] in "AEIOU" else "a"
        raise _unfit(descriptor, f"isn't {article} {name}: it lacks {_lacking(made, protocol)}")
    return made


def _lacking(made: object, protocol: type) -> str:
    wanted = {m for m in (*getattr(protocol, "__annotations__", ()), *vars(protocol)) if not m.startswith("_")}
    return ", ".join(sorted(m for m in wanted if not hasattr(made, m))) or "nothing by name (is it a class?)"


def _recognizes(descriptor: Descriptor[BackendInfo], path: Path) -> bool:
    """Whether a backend tells by content that it opens a file; one that fails at it doesn't."""
    if descriptor.info.sniff is None:
        return False
    item = f"sniff of {item_of(descriptor.info)}"
    try:
        sniff: Any = resolved(descriptor, descriptor.info.sniff, item)
        with blamed(descriptor.owner, item):
            return bool(sniff(path))
    except PluginError as error:
        warnings.warn(str(error), PluginWarning, stacklevel=3)
        return False


def _unfit(descriptor: Descriptor[Any], reason: str, item: str = "") -> PluginError:
    """What is raised where something was made, and isn't what it should be."""
    item = item or item_of(descriptor.info)
    descriptor.owner.add_fault(Fault(item, reason))
    return PluginError(f"{item} of {descriptor.owner.title} {reason}")


def _hint(descriptor: Descriptor[Any], absent: list[str]) -> str:
    info, owner = descriptor.info, descriptor.owner
    wanted = f'"{owner.distribution or "bitwright"}[{info.extra}]"' if info.extra else " ".join(absent)
    return f"{item_of(info)} needs {', '.join(absent)}: pip install {wanted}"


@cache
def default_registry() -> Registry:
    """The registry that the module's functions, `QuantSim` and the command line use."""
    return Registry(catalogue=current)


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


def runtimes() -> Mapping[str, RuntimeInfo]:
    """`Registry.runtimes` of the default registry."""
    return default_registry().runtimes()


def runtime(name: str) -> IntegerRuntime:
    """`Registry.runtime` of the default registry."""
    return default_registry().runtime(name)


def formats() -> Mapping[str, FormatInfo]:
    """`Registry.formats` of the default registry."""
    return default_registry().formats()


def format_info(name: str) -> FormatInfo:
    """`Registry.format_info` of the default registry."""
    return default_registry().format_info(name)


def format_writer(name: str) -> FormatWriter:
    """`Registry.format_writer` of the default registry."""
    return default_registry().format_writer(name)


def tools() -> Mapping[str, ToolInfo]:
    """`Registry.tools` of the default registry."""
    return default_registry().tools()


def tool(name: str) -> Callable[..., Any]:
    """`Registry.tool` of the default registry."""
    return default_registry().tool(name)


def toolchains() -> Mapping[str, ToolchainInfo]:
    """`Registry.toolchains` of the default registry."""
    return default_registry().toolchains()


def toolchain_info(name: str) -> ToolchainInfo:
    """`Registry.toolchain_info` of the default registry."""
    return default_registry().toolchain_info(name)


def toolchain(name: str) -> Callable[..., Any]:
    """`Registry.toolchain` of the default registry."""
    return default_registry().toolchain(name)


def add(item: T) -> T:
    """`Registry.add` of the default registry: ``@bitwright.plugins.registry.add`` above a technique class."""
    return default_registry().add(item)
