"""Reading .pt2 files from anybody: what could run code is taken out or refused before `torch.export.load` sees it.

`torch.export.load` trusts its file: it evaluates texts as Python (sizes), unpickles (sample inputs, tensor
subclasses, custom objects), loads compiled code (AOTInductor), imports modules that a file names (enums and default
factories in call structures), calls any function of `torch` as an op, and writes names into generated source. Here
the archive is written anew with plain data alone: program and configurations as JSON that was looked through, raw
tensors, and the one extra file that bitwright keeps. So two readers of one archive can't see different files either.
"""

from __future__ import annotations

import contextlib
import io
import json
import keyword
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from bitwright.errors import InputError, first_line
from bitwright.files import scratch_file
from bitwright_torch.capture.size_expressions import check_expression

_IN_MEMORY = 2**28
_INFLATED = 2**26
_VIEWED = 2**28
_DEPTH = 200
_PROGRAM, _OLD_PROGRAM = "models/model.json", "serialized_exported_program.json"
_TEXTS = ("archive_format", "archive_version", "byteorder", "version", ".data/version", ".data/serialization_id")
_CONFIGS = {"data/weights": "model_weights_config.json", "data/constants": "model_constants_config.json"}
_PICKLED = ("data/weights/model.pt", "data/constants/model.pt", "serialized_state_dict.pt",
            "serialized_constants.pt")  # fmt: skip
_SAMPLES = ("data/sample_inputs/model.pt", "serialized_example_inputs.pt")
_METADATA = ("stack_trace", "nn_module_stack")
_SYMBOLIC = frozenset({"math.trunc", *(f"_operator.{name}" for name in (
    "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lshift", "lt", "mod", "mul", "ne", "neg", "or_",
    "pos", "pow", "rshift", "sub", "truediv",
))})  # fmt: skip
_SYMBOLIC_TORCH = frozenset({"sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum",
                             "_sym_sqrt"})  # fmt: skip
_FOREIGN = frozenset({
    "prim", "static_runtime", "profiler", "debugprims", "debug_mode_ops", "streams", "symm_mem", "c10d", "_c10d",
    "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "_dtensor", "rpc", "_test",
    "inductor", "_inductor_test",
})  # fmt: skip
"""Namespaces of PyTorch's own ops that reach beyond the process, or are no part of a model."""
_FILES = frozenset({"filename", "file", "path", "file_path"})
_FACTORIES = frozenset({"list", "dict", "int", "float", "set", "tuple", "str"})


def trusted_copy(path: Path, record: str) -> tuple[IO[bytes], str]:
    """A .pt2 archive with plain data only, for `torch.export.load`, and the text of one extra file ("" without).

    Raises:
        InputError: the file is no .pt2 archive, or holds what isn't plain data; the message names it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as source:
            return _copied(source, path.stat().st_size, record)
    except InputError as error:
        raise InputError(f"{path} isn't opened: {error}") from None
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError,
            NotImplementedError, RecursionError, MemoryError, RuntimeError) as error:  # fmt: skip
        raise InputError(f"{path} isn't a torch.export program: {first_line(error, 200)}") from error


def _copied(source: zipfile.ZipFile, size: int, record: str) -> tuple[IO[bytes], str]:
    entries = source.infolist()
    if len({i.filename.casefold() for i in entries}) != len(entries):
        raise InputError("two of its entries have one name")
    if sum(i.file_size for i in entries) > size + _INFLATED:
        raise InputError("it unpacks to far more than its own size")
    names = {i.filename: i for i in entries}
    root = next((n.removesuffix(_PROGRAM) for n in names if n.endswith(f"/{_PROGRAM}") or n == _PROGRAM), "")
    kept = {n.removeprefix(root): i for n, i in names.items() if n.startswith(root)}
    program = _PROGRAM if _PROGRAM in kept else _OLD_PROGRAM
    if program not in kept:
        raise InputError("it holds no exported program (models/model.json); compiled packages can't be quantized")
    made: IO[bytes] = scratch_file() if size > _IN_MEMORY else io.BytesIO()
    with zipfile.ZipFile(made, "w") as copy:

        def put(name: str, data: bytes) -> None:
            copy.writestr(root + name, data)

        for name in _TEXTS:
            if name in kept:
                put(name, source.read(kept[name]))
        put(program, json.dumps(_vetted_program(_json(source.read(kept[program])))).encode())
        for name in _PICKLED:
            if name in kept:
                data = source.read(kept[name])
                _check_tensors(data, name)
                put(name, data)
        for folder, name in _CONFIGS.items():
            if f"{folder}/{name}" in kept:
                config = _json(source.read(kept[f"{folder}/{name}"]))
                for payload in dict.fromkeys(_payloads(config, folder, kept)):
                    put(payload, source.read(kept[payload]))
                put(f"{folder}/{name}", json.dumps(config).encode())
        for name in _SAMPLES:
            if name in kept:
                put(name, b"")  # a pickle that nothing here needs
    extra = next((kept[n] for n in (f"extra/{record}", f"extra_files/{record}") if n in kept), None)
    made.seek(0)
    return made, "" if extra is None else source.read(extra).decode()


def _json(data: bytes) -> Any:
    return json.loads(data.decode())


def _check_tensors(data: bytes, name: str) -> None:
    """A pickle of an older format, which PyTorch's restricted reader takes: tensors and plain containers."""
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="meta")
    except Exception as error:
        raise InputError(f"{name} holds more than tensors, and unpickling that may run code") from error


def _payloads(config: Any, folder: str, kept: dict[str, zipfile.ZipInfo]) -> Iterator[str]:
    """Files of raw tensors that a configuration names."""
    for name, about in config["config"].items():
        check_name(name)
        if about["use_pickle"] or about["tensor_meta"] is None or not about["path_name"].startswith(
            ("weight_", "tensor_")
        ):  # fmt: skip
            raise InputError(f"{name!r} is kept as a pickle (a tensor subclass or an object), which may run code")
        path = f"{folder}/{about['path_name']}"
        if PurePosixPath(path).parent != PurePosixPath(folder) or path not in kept:
            raise InputError(f"the data of {name!r} are missing")
        meta = about["tensor_meta"]
        sizes = [n["as_int"] for n in meta["sizes"]]
        for number in (*sizes, *(n["as_int"] for n in meta["strides"]), meta["storage_offset"]["as_int"]):
            if not isinstance(number, int) or number < 0:
                raise InputError(f"{name!r} has a size or stride that is not a number")
        if math.prod(sizes) > (max(kept[path].file_size, _VIEWED) if kept[path].file_size else 0):
            raise InputError(f"{name!r} is far larger than its data")
        yield path


# -- the program


def _vetted_program(program: Any) -> Any:
    """The program without what only tools ask for; every text that PyTorch evaluates, resolves or writes into source
    is checked.
    """
    program["guards_code"] = []
    module = program["graph_module"]
    module["metadata"] = {}
    for entry in module["module_call_graph"]:
        signature = entry.get("signature") or {}
        for key in ("in_spec", "out_spec"):
            if key in signature:
                _check_call_structure(json.loads(signature[key]), 0)
    _walk(program, 0)
    for part in _objects(program):
        for values in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
            for name in part.get(values) or {}:
                _check_identifier(name)
    return program


def _walk(value: Any, depth: int) -> None:
    if depth > _DEPTH:
        raise InputError("its program is nested without end")
    if isinstance(value, list):
        for part in value:
            _walk(part, depth + 1)
        return
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        match key:
            case "expr_str":
                check_expression(part)
            case "target" | "as_operator" if part is not None:
                _check_target(part)
            case "name" | "as_name" if part:
                _check_identifier(part)
            case "parameter_name" | "buffer_name" | "tensor_constant_name" | "user_input_name" | "fqn" if part:
                check_name(part)
            case "forward_arg_names":
                for name in part or ():
                    _check_identifier(name)
            case "as_custom_obj" | "custom_obj" | "custom_obj_values":
                if part:
                    raise InputError("it holds a custom object, which is kept as a pickle")
            case "as_string_to_argument":
                for name in part:
                    check_name(name)
                _walk(part, depth + 1)
            case "metadata":
                value[key] = {k: str(part[k]) for k in _METADATA if k in part}
            case _:
                _walk(part, depth + 1)


def _check_identifier(name: object) -> None:
    """Names of nodes and arguments stand in generated source as they are."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(f"{str(name)[:60]!r} is not a name of a tensor")


def check_name(name: object) -> None:
    """Names of parameters and modules stand in generated source between double quotes.

    Raises:
        InputError: a name that could end the quotation.
    """
    if not isinstance(name, str) or '"' in name or "\\" in name or not name.isprintable():
        raise InputError(f"{str(name)[:60]!r} is not a name of a parameter or module")


def _check_target(target: object) -> None:
    """Ops of PyTorch's dispatcher, and arithmetic on sizes; any other function of `torch` could be called else.

    Raises:
        InputError: another target, or an op that reads or writes files.
    """
    text = str(target)
    first, *rest = text.split(".")
    if text in _SYMBOLIC or (first == "torch" and len(rest) == 1 and rest[0] in _SYMBOLIC_TORCH):
        return
    if first == "torch" and len(rest) in (3, 4) and rest[0] == "ops" and rest[1] not in _FOREIGN:
        space = getattr(torch.ops, rest[1], None) if rest[1].isidentifier() else None
        packet = getattr(space, rest[2], None) if isinstance(space, torch._ops._OpNamespace) else None
        if isinstance(space, torch._ops._OpNamespace) and packet is None:
            raise InputError(f"op {text!r} isn't registered; import the library that defines it first")
        if isinstance(packet, torch._ops.HigherOrderOperator) and len(rest) == 3:
            return
        op = getattr(packet, rest[3], None) if isinstance(packet, torch._ops.OpOverloadPacket) and rest[3:] else None
        if isinstance(op, torch._ops.OpOverload) and not any(a.name in _FILES for a in op._schema.arguments):
            return
    raise InputError(f"it calls {text[:80]!r}, which is not an op of a model")


def _check_call_structure(spec: Any, depth: int) -> None:
    """The containers of arguments and results: PyTorch imports what their contexts name."""
    if depth == 0:
        protocol, spec = spec
        if protocol != 1:
            raise InputError("its call structure has a form that isn't known")
    if depth > _DEPTH:
        raise InputError("its call structure is nested without end")
    context = spec["context"]
    if isinstance(context, dict) and "default_factory_module" in context:
        known = (context["default_factory_module"], context.get("default_factory_name"))
        if known[0] != "builtins" or known[1] not in _FACTORIES:
            raise InputError(f"its call structure names a function, {'.'.join(map(str, known))[:80]!r}")
    with contextlib.suppress(json.JSONDecodeError):  # a named tuple's context is its type's name
        context = json.loads(context) if isinstance(context, str) else context
    if any("__enum__" in part for part in _objects(context)):
        raise InputError("its call structure names a class to import")
    for part in spec["children_spec"]:
        _check_call_structure(part, depth + 1)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _objects(part)
