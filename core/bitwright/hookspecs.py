"""The whole plugin surface: hooks that return light descriptors, and the markers to implement them.

A distribution names a module in the entry-point group ``bitwright``::

    [project.entry-points.bitwright]
    lsq = "bitwright_lsq.plugin"

and that module, which must import no framework, implements one or more of the hooks::

    from bitwright.hookspecs import TechniqueInfo, hookimpl

    @hookimpl
    def register_techniques():
        return [TechniqueInfo("lsq", "Learned step sizes.", factory="bitwright_lsq.lsq:Lsq")]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pluggy import HookimplMarker, HookspecMarker

PROJECT = "bitwright"
"""Name of the pluggy project and of the entry-point group."""

API_VERSIONS = range(1, 2)
"""The plugin interface versions that this release serves; `api` of a descriptor must be one of them."""

hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)

Factory = str | Callable[[], Any]
"""What makes the object: ``"package.module:Name"``, imported on first use, or a callable without arguments."""


@dataclass(frozen=True)
class BackendInfo:
    """One framework's adapter, described without importing the framework.

    Attributes:
        name: what `backend=` and the command line call it.
        summary: one line.
        factory: makes the `Backend`.
        modules: top-level modules of the framework. A model object is offered to this backend only where one of
            them is in `sys.modules`; all of them must be installed for the factory to work.
        suffixes: file suffixes that it opens, with the dot, lower case.
        sniff: optional; ``"package.module:function"`` or a function, `Path -> bool`, that tells by content whether
            it can open a file or folder. Must import no framework.
        extra: the extra of its distribution that installs the framework; empty where there is none.
        api: version of the plugin interface that it was written for.
        port: optional; makes the `bitwright.testing.ports.ModelPort` that brings the test kits' models onto it.
    """

    name: str
    summary: str
    factory: Factory
    modules: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    extra: str = ""
    api: int = 1
    sniff: str | Callable[[Path], bool] | None = None
    port: Factory | None = None

    @property
    def suffix(self) -> str:
        """Of the files that it saves models in: the first that it opens, or its name where it claims none."""
        return self.suffixes[0] if self.suffixes else f".{self.name}"


@dataclass(frozen=True)
class AutoStage:
    """How a technique takes part in `auto_quantize`.

    Attributes:
        order: its place; lower comes first. The built-in ones: batch-norm folding 10, equalization 20, bias correction
            30, AdaRound 40.
        prepares: it changes the form of the network and not its float function, and the target does the same: done
            first, and kept whatever it scores.
        weights_only: it repairs weights; left out where quantized weights alone cost no accuracy, or little beside
            what activations cost.
        replaces: techniques whose part it does itself, and better on a network that they haven't changed: it starts
            from the network before them, and the better of both is kept.
    """

    order: int
    prepares: bool = False
    weights_only: bool = False
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class TechniqueInfo:
    """One technique, described without importing its module.

    Attributes:
        name: what recipes call it.
        summary: one line.
        factory: makes the `Technique`.
        settings: its pydantic model, ``"package.module:Settings"`` or the class; None takes `Technique.Settings`.
        api: version of the plugin interface that it was written for.
        aliases: other names that recipes may use.
        auto: its part in `auto_quantize`; None if it has none.
    """

    name: str
    summary: str
    factory: Factory
    settings: str | type | None = None
    api: int = 1
    aliases: tuple[str, ...] = ()
    auto: AutoStage | None = None


@dataclass(frozen=True)
class ToolInfo:
    """What works on whole models, by running many simulations: a search, an analysis. Not a recipe's step.

    Attributes:
        name: what `registry.tool` and ``bitwright.<name>`` call it.
        summary: one line.
        factory: the tool itself, a callable whose first argument is a model or a `QuantSim`, or its
            ``"package.module:name"``.
        command: its command of ``bitwright``: a function with Typer annotations, or its ``"package.module:name"``;
            empty where it has none. Its module must be light: what is heavy is imported within.
        command_name: what the command line calls it; the tool's name with hyphens if empty.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    factory: str | Callable[..., Any]
    command: str | Callable[..., Any] = ""
    command_name: str = ""
    api: int = 1


@dataclass(frozen=True)
class TargetInfo:
    """One target: a configuration file that travels in a package.

    Attributes:
        name: what ``target=`` and ``--target`` call it; capitals, and whether it has "-" or "_", make no difference.
        summary: one line; empty takes the file's `bitwright.description`.
        file: ``"package:acme.json"``, or a path within the package (``"package:targets/acme.json"``). What it extends
            is a target's name, or a file beside it.
        aliases: other names.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    file: str
    aliases: tuple[str, ...] = ()
    api: int = 1


@dataclass(frozen=True)
class RuntimeInfo:
    """One integer runtime: what executes an exported model as the hardware does, for `verify`.

    Attributes:
        name: what a target's `bitwright.runtime` and ``verify --runtime`` call it.
        summary: one line.
        factory: makes the `bitwright.backend.IntegerRuntime`.
        artefact: what it executes, by its purpose in a bundle. "qdq" is the quantized ONNX model, which exports have
            anyway. Any other name is an artefact of its own, written for targets that name this runtime: by the
            backend, where it has an export format of that name, and otherwise by the runtime
            (`bitwright.backend.ArtefactWriter`).
        suffix: ending of the artefact's name, with the dot; needed for an artefact of its own.
        arithmetic: in words, how its arithmetic departs from ONNX Runtime's, which the exact integers follow: ops are
            compared as numbers then, not code by code. Empty where it doesn't.
        otherwise: in words, what to do where neither the backend nor the runtime writes the artefact; told by the
            export, which then goes without it.
        modules: top-level modules that must be installed.
        extra: the extra of its distribution that installs them; empty where there is none.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    factory: Factory
    artefact: str = "qdq"
    suffix: str = ""
    arithmetic: str = ""
    modules: tuple[str, ...] = ()
    extra: str = ""
    api: int = 1
    otherwise: str = ""


@dataclass(frozen=True)
class SchemaInfo:
    """One schema of encodings files: a JSON object with its name under "version".

    Attributes:
        name: what such a file has under "version", and ``encodings_version=`` and ``--encodings-version`` call it.
        summary: one line.
        factory: makes what reads and writes it (`bitwright.formats.Schema`).
        biases: exports write int32 bias encodings too, unless they are told otherwise.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    factory: Factory
    biases: bool = False
    api: int = 1


@dataclass(frozen=True)
class FormatInfo:
    """One file format of other runtimes that exports write on request, from the network and its encodings.

    Attributes:
        name: what `export(formats=…)` and ``--format`` call it.
        summary: one line.
        factory: makes the `bitwright.backend.FormatWriter`.
        suffix: ending of the name of its file, or of its folder, with the dot.
        needs: formats of the backend that it is made from, such as "qdq"; they are written too.
        modules: top-level modules that must be installed.
        extra: the extra of its distribution that installs them; empty where there is none.
        aliases: other names.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    factory: Factory
    suffix: str
    needs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    extra: str = ""
    aliases: tuple[str, ...] = ()
    api: int = 1


@dataclass(frozen=True)
class ToolchainInfo:
    """The command lines of one target's tools, for `target_commands`.

    Attributes:
        name: what ``target-commands --tool`` calls it; capitals, and whether it has "-" or "_", make no difference.
        summary: one line.
        factory: the function itself, from a `bitwright_deploy.target_job.Job` to its `Command`s in order, or its
            ``"package.module:name"``.
        schemas: schemas of encodings files that its tools take, the preferred one first; () where they take none.
        shapes: its lines name the shapes of the model's inputs, which are asked for where the model leaves them free.
        aliases: other names.
        api: version of the plugin interface that it was written for.
    """

    name: str
    summary: str
    factory: str | Callable[..., Any]
    schemas: tuple[str, ...] = ()
    shapes: bool = False
    aliases: tuple[str, ...] = ()
    api: int = 1


@hookspec
def register_backends() -> Iterable[BackendInfo]:  # type: ignore[empty-body]
    """Return the backends that this distribution provides. Must not import a framework."""


@hookspec
def register_techniques() -> Iterable[TechniqueInfo]:  # type: ignore[empty-body]
    """Return the techniques that this distribution provides. Must not import a framework."""


@hookspec
def register_tools() -> Iterable[ToolInfo]:  # type: ignore[empty-body]
    """Return the tools that this distribution provides. Must not import a framework."""


@hookspec
def register_targets() -> Iterable[TargetInfo]:  # type: ignore[empty-body]
    """Return the targets that this distribution provides."""


@hookspec
def register_runtimes() -> Iterable[RuntimeInfo]:  # type: ignore[empty-body]
    """Return the integer runtimes that this distribution provides. Must not import a framework."""


@hookspec
def register_schemas() -> Iterable[SchemaInfo]:  # type: ignore[empty-body]
    """Return the schemas of encodings files that this distribution provides."""


@hookspec
def register_formats() -> Iterable[FormatInfo]:  # type: ignore[empty-body]
    """Return the export formats that this distribution provides. Must not import a framework."""


@hookspec
def register_toolchains() -> Iterable[ToolchainInfo]:  # type: ignore[empty-body]
    """Return the command lines of targets' tools that this distribution provides."""
