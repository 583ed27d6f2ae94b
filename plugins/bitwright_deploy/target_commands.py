"""`target_commands`: the command lines that bring an export onto a target, and back to a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitwright import formats
from bitwright.bundle import find_bundle
from bitwright.errors import InputError, PluginError
from bitwright.plugins import registry
from bitwright_deploy.target_job import Command, Job


@dataclass(frozen=True)
class TargetCommands:
    """What `target_commands` found.

    Attributes:
        tool: the tool.
        schemas: encodings schemas that it takes; () where it takes no encodings file.
        schema: that of the bundle's file.
        commands: in order.
        warnings: what stands in the way, and the way out.
    """

    tool: str
    schemas: tuple[str, ...]
    schema: str
    commands: tuple[Command, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"# warning: {w}" for w in self.warnings]
        parts += [f"# {c.purpose}\n{c.line}" for c in self.commands]
        return "\n".join(parts)


def target_commands(
    directory: str | Path,
    tool: str,
    *,
    name: str | None = None,
    data: str | Path = "DATA",
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    soc: str | None = None,
) -> TargetCommands:
    """The command lines for one tool. Nothing is run, nothing written.

    Args:
        directory: what `QuantSim.export` or ``bitwright quantize`` wrote.
        tool: "qnn", "snpe", "qairt", "onnxruntime", "tflite", "tensorrt", or one that a plugin registers
            (`bitwright.hookspecs.ToolchainInfo`).
        name: stem of the files, if the directory holds several exports.
        data: samples for the comparison at the end, as the lines are to name them.
        input_shapes: input → shape, where the model leaves dimensions free; a free first dimension is 1.
        soc: of Qualcomm's tools, such as "sm8650".

    Raises:
        InputError: no such tool or bundle, the bundle lacks the file that the tool takes, or a shape isn't known.
        PluginError: the tool is a plugin's, and broken.
    """
    try:
        info = registry.toolchain_info(tool)
    except PluginError as error:
        raise InputError(str(error)) from None
    make = registry.toolchain(tool)
    bundle = find_bundle(Path(directory), name)
    file = formats.read(bundle.files["encodings"])
    shapes, outputs = _interface(bundle.files["model"], dict(input_shapes or {}), needed=info.shapes)
    stem = bundle.files["encodings"].stem
    job = Job(
        Path(directory), stem, bundle.files["model"], bundle.files["encodings"], file, shapes, outputs, str(data), soc,
        info.schemas,
    )  # fmt: skip
    with registry.default_registry().blaming(info):
        commands = tuple(make(job))
    if strange := [c for c in commands if not isinstance(c, Command)]:
        raise PluginError(f"tool {info.name!r}: it gives {strange[0]!r}, where Commands belong")
    return TargetCommands(info.name, info.schemas, file.version, commands, tuple(job.warnings))


def _interface(
    model: Path, given: dict[str, tuple[int, ...]], *, needed: bool
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """Shape of each input for one sample, and the outputs' names."""
    if not needed:
        return {}, ()
    backend = registry.backend_for_path(model)
    native = backend.load(model)
    found: dict[str, tuple[int, ...]] = {}
    specs = backend.input_specs(native)
    if unknown := set(given) - set(specs):
        raise InputError(f"the model has no input {min(unknown)!r}; its inputs are {', '.join(specs)}")
    for name, (shape, _) in specs.items():
        if name in given:
            found[name] = given[name]
            continue
        filled = tuple(1 if d is None and i == 0 else d for i, d in enumerate(shape))
        if any(d is None for d in filled):
            raise InputError(f"input {name!r} has shape {shape}: give its free dimensions by --input-shape {name}=1,…")
        found[name] = tuple(d for d in filled if d is not None)
    return found, tuple(backend.graph(native).outputs)
