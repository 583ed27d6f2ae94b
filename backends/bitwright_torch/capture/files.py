"""Model files: `.pt2` programs, and `file.py:function` factories."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._export.serde.serialize import SerializeError
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from bitwright.backend import silenced
from bitwright.errors import BitwrightError, InputError, ModelError, first_line
from bitwright.files import atomic_write
from bitwright_torch.capture.archive import check_name, trusted_copy
from bitwright_torch.capture.capturing import from_exported
from bitwright_torch.graph.calling import CallingConvention
from bitwright_torch.graph.model import NAMES, CapturedModel, info, program_of, with_program
from bitwright_torch.graph.naming import call_name

RECORD = "bitwright.json"
"""Entry of a .pt2 file that keeps the names of ops and tensors."""


def save_program(program: ExportedProgram, file: Any, extra: dict[str, str] | None = None) -> None:
    """Write a `.pt2` program; parameters that are views of a larger array, which PyTorch warns of, are kept as such.

    Raises:
        ModelError: the format has no place for something in it (arguments or results of the user's own classes).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group", category=UserWarning)
        try:
            torch.export.save(program, file, extra_files=extra)
        except (NotImplementedError, SerializeError) as error:
            raise ModelError(f"a .pt2 file can't hold the model: {first_line(error)}") from error


def save_pt2(model: CapturedModel, path: Path) -> Path:
    """Write a captured model as a `torch.export` program, atomically, with the names that bitwright uses.

    Raises:
        InputError: the file can't be written.
        ModelError: the model can't be exported again.
    """
    program = program_of(model)
    result: list[Any] = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    if text := [leaf for leaf in result if isinstance(leaf, str)]:
        # torch.export writes these, and then can't read its own file.
        raise ModelError(f"a .pt2 file can't hold a model that returns a text ({text[0]!r}); return tensors or numbers")
    exported = reexport(model)
    record = {
        "ops": [[call_name(n), info(n).op, info(n).tensor, info(n).source] for n in _named(program.graph)],
        "inputs": list(program.convention.names),
        "given": list(program.convention.given),
    }
    with atomic_write(path) as file:
        save_program(exported, file, {RECORD: json.dumps(record)})
    return path


def reexport(model: CapturedModel) -> ExportedProgram:
    """A captured model in evaluation mode as an exported program, free dimensions and argument names kept.

    Named tuples of PyTorch's own (`torch.return_types`), which files can't hold, are plain tuples in it.

    Raises:
        ModelError: it can't be exported.
    """
    program = program_of(model)
    convention = program.convention
    leaves: list[Any] = []
    free: list[Any] = []
    for node, shape in zip((n for n in program.graph.nodes if n.op == "placeholder"), program.example, strict=True):
        about = info(node)
        if shape is None or about.shape is None:
            leaves.append(convention.constants.get(len(leaves)))
            free.append(None)
        else:
            leaves.append(torch.zeros(shape, dtype=getattr(torch, about.dtype)))
            free.append({i: Dim.AUTO for i, n in enumerate(about.shape) if n is None} or None)
    given = dict(zip(convention.given, pytree.tree_unflatten(leaves, convention.in_spec), strict=True))
    shapes = dict(zip(convention.given, pytree.tree_unflatten(free, convention.in_spec), strict=True))
    bound = inspect.BoundArguments(convention.signature, given)
    for parameter in convention.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name in shapes:
            shapes.update(shapes.pop(parameter.name))
    copied = with_program(model, program).to("cpu").eval()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _plain(CapturedModel.forward(copied, *args, **kwargs))

    forward.__signature__ = convention.signature  # type: ignore[attr-defined]
    copied.forward = forward  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            return torch.export.export(copied, bound.args, bound.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ModelError(f"the model can't be exported: {first_line(error)}") from error


def _plain(value: Any) -> Any:
    """A result with tuples in the place of `torch.return_types`."""
    if isinstance(value, dict) and type(value) is dict:
        return {k: _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return tuple(value) if type(value).__module__ == "torch.return_types" else value


def _named(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes that are the same, in the same order, when the graph is exported again."""
    for node in graph.nodes:
        if node.op == "call_function" and info(node).shape is not None:
            yield node


def load_pt2(path: Path) -> CapturedModel:
    """Open a `torch.export` program, bitwright's own or any other in training IR.

    The file may come from anybody: nothing of it is run (see `archive`).

    Raises:
        InputError: no such file, it isn't a .pt2 program, or it holds more than plain data.
        ModelError: the program can't be brought into captured form.
    """
    if not path.is_file():
        raise InputError(f"there is no model {str(path)!r}")
    archive, text = trusted_copy(path, RECORD)
    try:
        with archive, silenced("torch"):
            exported = torch.export.load(archive)
    except Exception as error:
        raise InputError(f"{path} isn't a torch.export program: {first_line(error, 200)}") from error
    record = _record(path, text)
    try:
        return load_exported(exported, record)
    except BitwrightError:
        raise
    except Exception as error:  # PyTorch and its signatures take a program at its word
        raise InputError(f"{path} isn't opened: its program contradicts itself: {first_line(error, 200)}") from error


def _record(path: Path, text: str) -> dict[str, Any] | None:
    """What `save_pt2` kept beside the program.

    Raises:
        InputError: it isn't of that form.
    """
    if not text:
        return None
    try:
        record = json.loads(text)
        names: list[Any] = [*record.get("inputs", ()), *record.get("given", ())]
        for call, op, tensor, source in record.get("ops", ()):
            names += [call, op, tensor]
            if not isinstance(source, str | None):
                raise TypeError("a source is not text")
        for name in names:
            check_name(name)
    except (ValueError, TypeError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{path} isn't opened: its names ({RECORD}) are damaged: {error}") from error
    assert isinstance(record, dict)
    return record


def load_exported(exported: ExportedProgram, record: dict[str, Any] | None = None) -> CapturedModel:
    """A `torch.export` program as a captured model.

    Args:
        exported: the program, in training IR (as `torch.export.export` gives it).
        record: what `save_pt2` keeps beside it.

    Raises:
        ModelError: the program can't be brought into captured form.
    """
    record = record or {}
    model = from_exported(_holder(exported), exported, _convention(exported, record))
    return _renamed(model, record.get("ops", []))


def _holder(exported: ExportedProgram) -> nn.Module:
    """A bare module tree with the program's parameters and buffers."""
    root = nn.Module().eval()
    held: dict[int, nn.Parameter] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            continue
        target = str(spec.target)
        value = exported.state_dict[target] if target in exported.state_dict else exported.constants[target]
        *path, last = target.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module().eval())
            owner = owner.get_submodule(part)
        if spec.kind is InputKind.PARAMETER:
            parameter = held.setdefault(id(value), nn.Parameter(value.detach(), requires_grad=value.requires_grad))
            owner.register_parameter(last, parameter)
        else:
            owner.register_buffer(last, value.detach(), persistent=bool(spec.persistent))
    return root


def _convention(exported: ExportedProgram, record: dict[str, Any]) -> CallingConvention:
    specs = [s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    constants = {i: s.arg.value for i, s in enumerate(specs) if isinstance(s.arg, ConstantArgument)}
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise ModelError("the program doesn't say how it is called")
    positional, keyword = pytree.tree_unflatten([s.arg.name for s in specs], in_spec)
    values = [*positional, *keyword.values()]
    given = record.get("given") or [_first(v, i) for i, v in enumerate(positional)] + list(keyword)
    if len(given) != len(values):
        given = [_first(v, i) for i, v in enumerate(values)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in given])
    _, spec = pytree.tree_flatten(values)
    names = tuple(record.get("inputs") or (s.arg.name for s in specs))
    return CallingConvention(signature, tuple(given), spec, names, constants, out_spec)


def _first(value: Any, position: int) -> str:
    """A name for an argument: its tensor's, if it is one tensor."""
    return value if isinstance(value, str) else f"argument_{position}"


def _renamed(model: CapturedModel, ops: list[list[Any]]) -> CapturedModel:
    """Give the nodes the names that were recorded, if the record fits the graph."""
    nodes = list(_named(program_of(model).graph))
    if [call_name(n) for n in nodes] != [o[0] for o in ops]:
        return model
    for node, (_, op, tensor, source) in zip(nodes, ops, strict=True):
        node.meta[NAMES] = replace(info(node), op=op, tensor=tensor, source=source)
    for node in program_of(model).graph.nodes:
        # Tuples have the name of what is picked from them.
        if node.op == "call_function" and info(node).shape is None and node.users:
            picks = [u for u in node.users if u.op == "call_function" and call_name(u) == "getitem"]
            if picks:
                node.meta[NAMES] = replace(info(node), op=info(picks[0]).op)
    return model


def run_factory(text: str, sample: Any = None) -> tuple[nn.Module, Any]:
    """Run `function()` of "file.py:function": a module, and the sample to capture it with.

    The function returns both, or the module alone if it has an `example_input_array` or a sample is given.

    Raises:
        InputError: no such file or function, it fails, or it returns something else.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise InputError(f"{text!r}: name the function that builds the model, as in model.py:build")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"there is no file {file!r}")
    built = _run(path, name)
    if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module):
        module, sample = built
    else:
        module = built
    if not isinstance(module, nn.Module):
        raise InputError(f"{text!r} returned a {type(built).__name__}, not a module and a sample")
    if sample is None:
        sample = getattr(module, "example_input_array", None)
    if sample is None:
        raise InputError(
            f"{text!r} must return the module and a sample batch, to capture it with, or be opened with one: "
            "QuantSim(path, sample), or data in arrays on the command line"
        )
    return module, sample


def _run(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bitwright_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"{path} has no function {name!r}")
        return function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}:{name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
