"""Export: ONNX with the user's names, QDQ ONNX, the weights, and the simulation as a torch.export program.

The ONNX file is made by torch's dynamo exporter from the captured graph, with every site as an extra output. So each
site is exactly one ONNX value however the exporter spells its op; the value takes the site's name, and the extra
outputs go again.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from bitwright.backend import Bundle, silenced
from bitwright.errors import InputError, ModelError, first_line, needs_extra
from bitwright.files import atomic_write
from bitwright.grids import EncodingTable
from bitwright.placement import Plan, SiteKind
from bitwright_torch.export.decomposition import piecewise
from bitwright_torch.export.pattern_matching import first_by_type
from bitwright_torch.export.recurrent_export import name_recurrent_weights
from bitwright_torch.export.spelling import refuse_invalid, spell
from bitwright_torch.graph.canonical import Canonical, canonical
from bitwright_torch.graph.model import CapturedModel, aliases, compile_graph, info, program_of, with_program
from bitwright_torch.graph.operands import operands
from bitwright_torch.simulate.session import extract

FORMATS: Mapping[str, str] = {
    "onnx": "the float model with its updated weights as ONNX; encodings files go with it",
    "qdq": "the quantized model as ONNX with QuantizeLinear/DequantizeLinear pairs, for integer runtimes",
    "safetensors": "the updated float weights, under the user's names",
    "pt2": "the simulation as a torch.export program, grids and rounded weights baked in",
}
OPSET = 20
"""Of exported ONNX files; QDQ files raise it where their types need more."""


def export(model: CapturedModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
    """`Backend.export`.

    Raises:
        InputError: unknown format, or the file can't be written.
        MissingExtraError: ONNX formats without the packages that they need.
        ModelError: torch's exporter refuses the model.
    """
    if format == "onnx":
        backend, made, names = _onnx_model(model, plan)
        shown = backend.graph(made)
        known, mine = shown.params, canonical(model).graph.params
        # A scale and shift that ONNX has in other ranks (group norm: one value, 1, 1) keep their own axes.
        alike = [p for p in mine if p in known and len(known[p].shape) == len(mine[p].shape)]
        layouts = {p: known[p].layout for p in alike if known[p].layout != mine[p].layout}
        # What is computed from parameters alone is folded: into a constant of the site's name, or into the next one.
        called = {s: names.get(s, s) for s in plan}
        constants = frozenset(s for s, n in called.items() if plan[s].kind is SiteKind.ACTIVATION and n in known)
        absent = frozenset(s for s, n in called.items() if n not in known and n not in shown.tensors)
        return Bundle({"model": backend.save(made, path)}, names, layouts, constants=constants, absent=absent)
    if format == "qdq":
        from bitwright_onnx.export.qdq import write_qdq

        backend, made, names = _onnx_model(model, plan)
        return write_qdq(made, backend.graph(made), plan, encodings, path).bundle(names)
    if format == "safetensors":
        return Bundle({"weights": save_weights(model, path)})
    if format == "pt2":
        return Bundle({"program": save_simulation(model, plan, encodings, path)})
    raise InputError(f"the PyTorch backend has no format {format!r}; there are {', '.join(FORMATS)}")


def save_weights(model: nn.Module, path: Path) -> Path:
    """Write a model's state dict as safetensors, atomically.

    Tied tensors are stored once, under the first of their names; the file's metadata have the others, and
    `safetensors.torch.load_model` gives each its tensor back.

    Raises:
        MissingExtraError: safetensors isn't installed.
        InputError: the file can't be written.
    """
    with needs_extra("safetensors files need", "torch"):
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    tensors: dict[str, torch.Tensor] = {}
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        known = first.setdefault(place, name) if tensor.numel() else name
        if known != name:
            tied[name] = known
            continue
        held = tensor.detach().cpu().contiguous()
        whole = held.untyped_storage().nbytes() == held.nbytes
        tensors[name] = held if whole else held.clone()  # the format has no place for parts of a larger array
    with atomic_write(path) as file:
        try:
            save_file(tensors, file.name, {"format": "pt", **tied})  # from where they lie, none copied
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error
    return path


def save_simulation(model: CapturedModel, plan: Plan, encodings: EncodingTable, path: Path) -> Path:
    """Write the simulated model as a `torch.export` program of standard ops, atomically.

    Raises:
        InputError: the file can't be written.
        ModelError: torch.export refuses it.
    """
    from bitwright_torch.capture.files import reexport, save_program
    from bitwright_torch.simulate.simulation import TorchSimulation

    fixed = {s: e.with_(frozen=True) if plan[s].kind is SiteKind.PARAMETER else e for s, e in encodings.items()}
    simulation = TorchSimulation(model, plan, fixed)
    buffer = io.BytesIO()
    save_program(reexport(simulation.model), buffer)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return path


_Conversion = tuple[CapturedModel, list[str], Any, dict[str, str]]
_conversions: ContextVar[list[_Conversion] | None] = ContextVar("conversions", default=None)
"""What was converted while `converting_once` is open: model, sites, ONNX model (or why there is none), names."""


@contextmanager
def converting_once() -> Iterator[None]:
    """See `bitwright.backend.SharedConversion`: torch's exporter takes most of an export's time."""
    token = _conversions.set([])
    try:
        yield
    finally:
        _conversions.reset(token)


def _onnx_model(model: CapturedModel, plan: Plan) -> tuple[Any, Any, dict[str, str]]:
    """The ONNX backend, the model in its form (which isn't to be changed), and site → value name where they differ."""
    with needs_extra("ONNX export needs", "torch,onnx"):
        import onnxscript  # noqa: F401

        from bitwright_onnx.backend import OnnxBackend
    found = canonical(model)
    watched = _watched(found, plan)
    backend, shared = OnnxBackend(), _conversions.get()
    for known, sites, made, names in shared or ():
        if known is model and sites == list(watched):
            if isinstance(made, ModelError):
                raise made
            return backend, made, names
    try:
        exported = _exported(model, found, list(watched.values()))
    except ModelError as error:
        if shared is not None:
            shared.append((model, list(watched), error, {}))
        raise
    names = _rename(exported, found, list(watched))
    made = backend.adopt(exported)
    if shared is not None:
        shared.append((model, list(watched), made, names))
    return backend, made, names


def _watched(found: Canonical, plan: Plan) -> dict[str, fx.Node]:
    """Model outputs and sites inside the model → their nodes."""
    watched = {t: found.tensors[t] for t in found.graph.outputs}
    inputs = set(found.graph.inputs)
    for site in plan:
        if plan[site].kind is SiteKind.ACTIVATION and site in found.tensors and site not in inputs:
            watched.setdefault(site, found.tensors[site])
    return watched


class _Watched(nn.Module):
    """A model whose call hands out chosen nodes."""

    def __init__(
        self, model: CapturedModel, part: fx.Graph, constants: Mapping[int, Any], held: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        for table in ("_modules", "_parameters", "_buffers"):
            getattr(self, table).update(getattr(model, table))
        for name, value in held.items():
            self.register_buffer(name, value)
        self.__dict__["_function"] = compile_graph(part)
        self.__dict__["_constants"] = constants
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The chosen values, from the tensor inputs."""
        constants, given = self.__dict__["_constants"], iter(tensors)
        leaves = [constants[i] if i in constants else next(given) for i in range(len(tensors) + len(constants))]
        return self.__dict__["_function"](self, *leaves)


def _exported(model: CapturedModel, found: Canonical, nodes: Sequence[fx.Node]) -> Any:
    program = program_of(model)
    placeholders = [n for n in found.lowered.nodes if n.op == "placeholder"]
    graph, copies, held = _with_own_tensors(found.lowered, model)
    part, needed = extract(graph, [copies[n] for n in nodes], {copies[n] for n in placeholders})
    spell(part)
    examples = {info(n).tensor: shape for n, shape in zip(placeholders, program.example, strict=True)}
    convention = program.convention
    fixed = {convention.names[i]: value for i, value in convention.constants.items()}
    abouts = {info(n).tensor: info(n) for n in placeholders}
    constants: dict[int, Any] = {}
    samples: list[torch.Tensor] = []
    shapes: list[Any] = []
    for position, name in enumerate(needed):
        shape = examples[name]
        if shape is None:
            constants[position] = fixed.get(name)
            continue
        about = abouts[name]
        samples.append(torch.zeros(shape, dtype=getattr(torch, about.dtype)))
        shapes.append({i: Dim.AUTO for i, n in enumerate(about.shape or ()) if n is None})
    inputs = [n for i, n in enumerate(needed) if i not in constants]
    own = dict(held.values())
    watched = _Watched(with_program(model, program).to("cpu").eval(), part, constants, own)
    try:
        with silenced("torch.onnx"), torch.no_grad():
            made = torch.onnx.export(
                piecewise(watched, tuple(samples), (tuple(shapes),)) or watched,
                tuple(samples),
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                dynamic_shapes=(tuple(shapes),),
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(f"torch.onnx can't export the model: {_reason(error)}") from error
    assert made is not None
    ids = {o.base: o.id for n, o in operands(found.lowered, model).items() if n.op == "get_attr"}
    names = {name: ids.get(first, program.prefix + first) for name, first in aliases(model).items()}
    names |= {name: id for id, (name, _) in held.items()}
    _tidy(made.model, names, set(found.params))
    refuse_invalid(made.model)
    return made.model


def _with_own_tensors(
    graph: fx.Graph, model: nn.Module
) -> tuple[fx.Graph, dict[fx.Node, Any], dict[str, tuple[str, torch.Tensor]]]:
    """A copy in which views of parameters, and parameters that are computed, are read as tensors of their own.

    ONNX has one name for one array: a part of a matrix that has its own grid is an array of its own, and what the
    model computes from parameters is computed here.

    Returns:
        The copy; its nodes by the original's; parameter → attribute and value.
    """
    copied, copies = fx.Graph(), dict[fx.Node, Any]()
    copied.output(copied.graph_copy(graph, copies))
    copied.output_node().meta = dict(graph.output_node().meta)
    known = operands(copied, model)
    prefix = "own"
    while any(name.startswith(prefix) for name in (*model._modules, *model._parameters, *model._buffers)):
        prefix += "_"
    held: dict[str, tuple[str, torch.Tensor]] = {}
    for node, operand in known.items():
        if operand.transposed or (not operand.steps and operand.evaluator is None):
            continue  # a transpose reads the tensor itself
        if operand.id not in held:
            value = operand.view(model).detach().cpu().clone(memory_format=torch.contiguous_format)
            held[operand.id] = f"{prefix}{len(held)}", value
        with copied.inserting_before(node):
            read = copied.create_node("get_attr", held[operand.id][0])
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
    return copied, copies, held


def _tidy(exported: Any, names: Mapping[str, str], params: set[str]) -> None:
    """Fold constants, and let parameters be; call parameters by the names that sites have."""
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    graph = exported.graph
    for name, value in list(graph.initializers.items()):
        first = names.get(name, name)
        if first != name and first not in graph.initializers:
            del graph.initializers[name]
            value.name = first
            graph.register_initializer(value)
    # Inputs while the graph is optimized: rules drop biases that are zero and merge parameters that are equal, which
    # they need not stay.
    hidden = [v for n, v in graph.initializers.items() if n in params]
    inputs = list(graph.inputs)
    for value in hidden:
        del graph.initializers[value.name]
    graph.inputs.extend(hidden)
    tensors = [value.const_value for value in hidden]
    for value in hidden:
        value.const_value = None
    given = [value.name for value in inputs]
    try:
        with first_by_type():
            optimize_ir(exported)
    except Exception as error:
        told = error
        while isinstance(told.__cause__, RuntimeError):
            told = told.__cause__
        raise ModelError(
            f"torch.onnx can't export the model: the optimizer of onnxscript fails: {told}. Write the op that it names "
            "otherwise (sizes that don't depend on the batch, most often)"
        ) from error
    for value, name in zip(inputs, given, strict=True):
        if value.name != name:  # an output that is an input has taken its name
            for node in graph:
                for output in node.outputs:
                    output.name = f"{name}_value" if output.name == name else output.name
            value.name = name
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    for value, tensor in zip(hidden, tensors, strict=True):
        value.const_value = tensor
        graph.register_initializer(value)
    for name, value in list(graph.initializers.items()):
        users = [user for user, _ in value.uses()]
        if name not in params or not users or any(u.op_type != "Transpose" or len(value.shape) != 2 for u in users):
            continue
        # The exporter multiplies by Transpose(weight): keep the name, turn the values (a view: it is written as such).
        turned = value.const_value.numpy().T
        value.const_value, value.shape = ir.tensor(turned, name=name), ir.Shape(turned.shape)
        for user in users:
            user.outputs[0].replace_all_uses_with(value)
            graph.remove(user, safe=True)
    name_recurrent_weights(exported, params)


def _rename(exported: Any, found: Canonical, sites: Sequence[str]) -> dict[str, str]:
    """Give values their sites' names, and the model its own outputs; returns what couldn't be named so."""
    import onnx_ir as ir

    graph = exported.graph
    values = list(graph.outputs)
    taken = set(found.graph.inputs) | set(graph.initializers)
    wanted = set(sites)
    for node in graph:
        for value in node.outputs:
            if value.name in wanted or value.name in taken:
                value.name = f"{value.name}_value"
    names: dict[str, str] = {}
    named: dict[int, str] = {}
    outputs: list[Any] = []
    fed = {value.name: value for value in graph.inputs}
    for site, value in zip(sites, values, strict=True):
        is_output = site in found.graph.outputs
        if is_output and site in fed:  # handed out as it came, under its own name
            outputs.append(fed[site])
            continue
        if id(value) not in named and not value.is_graph_input() and not value.is_initializer():
            named[id(value)] = value.name = site
        elif is_output:
            node = ir.node("Identity", [value])
            graph.append(node)
            alias = node.outputs[0]
            alias.name, alias.type, alias.shape, value = site, value.type, value.shape, alias
        elif value.is_initializer() and id(value) not in named and value.name not in found.params:
            del graph.initializers[value.name]
            named[id(value)] = value.name = site
            graph.register_initializer(value)
        else:
            names[site] = value.name
        if is_output:
            outputs.append(value)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    _drop_zero_biases(graph, found)
    for node in graph:
        source, target = (*node.inputs[:1], None)[0], node.outputs[0]
        if node.op_type == "Identity" and not target.is_graph_output() and target.name in wanted and source is not None:
            names[target.name] = names.get(source.name, source.name)  # runtimes and backends drop it
    return names


def _drop_zero_biases(graph: Any, found: Canonical) -> None:
    """The exporter gives every convolution a bias; those that the model hasn't got go."""
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias = node.inputs[2]
        tensor = bias.const_value
        if tensor is None and bias.producer() is not None and bias.producer().op_type == "Constant":
            tensor = bias.producer().attributes["value"].as_tensor()
        if bias.name not in found.params and tensor is not None and not tensor.numpy().any():
            node.resize_inputs(2)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
