"""A user's module → a captured model, by `torch.export` and a few exact rewrites of what it gives.

The exported graph keeps whole ops (convolutions, linear ops, norms, attention). Regions are put in line, in-place ops
made functional, batch norms and dropouts bound to their modules' flags. None changes a number: the captured model's
output equals the user's bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import io
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from bitwright.backend import Fault, Finding, user_state_kept
from bitwright.errors import ModelError, first_line
from bitwright_torch.capture.comparing import compare
from bitwright_torch.capture.free_dimensions import DynamicShapes, asked_for, fewest_of, with_batch
from bitwright_torch.capture.functionalize import functionalize
from bitwright_torch.capture.inline import inline_regions
from bitwright_torch.graph.calling import Arguments, CallingConvention, arguments_of, convention_of
from bitwright_torch.graph.matrix_reads import split_layouts
from bitwright_torch.graph.model import NAMES, CapturedModel, NodeInfo, Program, aliases, program_of, tensor_of
from bitwright_torch.graph.modes import bind_modes
from bitwright_torch.graph.naming import Namer, last_user_line, owner_of, source_of
from bitwright_torch.graph.visibility import data_nodes

aten = torch.ops.aten
_LARGEST = 2**63 - 1
WITHOUT_DATA = (
    "an earlier torch.export or torch.compile has left a tensor without data in a cache of the model's code; empty "
    "that cache, or open the model in a new process"
)
"""What to tell where the user's code meets what a trace other than ours has left."""


class CaptureNotice(UserWarning):
    """Capturing had to restrict something: a fixed batch size, parts left in Python."""


def capture(module: nn.Module, sample: Any, *, dynamic_shapes: DynamicShapes = None) -> CapturedModel:
    """Capture a whole module.

    Args:
        module: the user's; it isn't changed.
        sample: see `calling.arguments_of`.
        dynamic_shapes: free dimensions, as `torch.export` takes them, or by argument name a tuple of axes
            (``{"input_ids": (0, 1)}``). Default: the batch, axis 0 of every tensor that has the first one's length
            there. If the model can't be captured so, it is with the sample's own shapes, and a notice says why.

    Raises:
        InputError: the sample doesn't fit `forward`.
        ModelError: the module can't be captured; the message holds the source line and a remedy.
    """
    arguments = arguments_of(sample, inspect.signature(module.forward))
    model, finding = _compared(module, arguments, dynamic_shapes, why_fixed="")
    if finding is not None and finding.fault is Fault.SIZE and finding.fails:
        finding = None  # a number of samples that it doesn't run on makes nothing wrong, and others are free
    if finding is not None and finding.fault is Fault.SIZE and dynamic_shapes is None:
        model, finding = _compared(module, arguments, None, why_fixed=str(finding))
    notices = program_of(model).notices
    if finding is not None:
        if finding.fault not in (Fault.DRAWS, Fault.UNCHECKED):
            fewer = (
                "; dynamic_shapes may say which it takes: Dim('batch', min=2)" if finding.fault is Fault.SIZE else ""
            )
            raise ModelError(f"{type(module).__name__} can't be captured: {finding}{fewer}")
        notices = (*notices, str(finding))
    for notice in notices:
        warnings.warn(notice, CaptureNotice, stacklevel=3)
    return model


def _compared(
    module: nn.Module, arguments: Arguments, dynamic_shapes: DynamicShapes, *, why_fixed: str
) -> tuple[CapturedModel, Finding | None]:
    """The capture of a module, and in what it differs from it.

    Args:
        module, arguments: the user's.
        dynamic_shapes: as for `capture`.
        why_fixed: take the sample's own shapes, for this reason.
    """
    signature = inspect.signature(module.forward)
    # What is captured reads its parameters from a copy, since batch norms, dropouts and state are bound to its modules
    # below. Export runs in evaluation mode: there a batch norm is one op, which `bind_modes` gives its flag back.
    holder = private_copy(module)
    flags = {name: m.training for name, m in holder.named_modules()}
    holder.eval()
    notices: list[str] = []
    with _quiet():
        exported = export_program(holder, arguments, dynamic_shapes, notices, why_fixed)
        convention = convention_of(signature, arguments, _out_spec(exported))
        model = from_exported(holder, exported, convention, notices)
        finding = compare(holder, arguments, model, fewest_of(dynamic_shapes))
    for name, submodule in holder.named_modules():
        submodule.training = flags[name]
    model.training = flags[""]
    return model, finding


def private_copy(module: nn.Module) -> nn.Module:
    """A deep copy, tensors that carry gradients (`weight_norm` keeps one) as plain values.

    Raises:
        ModelError: the module can't be copied, or has lazy parameters that no forward pass has given a shape yet.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name!r} has no shape yet; run the model once before quantizing it")
    carrying = [t for m in module.modules() for t in m.__dict__.values() if isinstance(t, torch.Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in carrying if t.grad_fn is not None}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(
            f"the model can't be copied ({type(error).__name__}: {error}); give it a __deepcopy__, or take out what "
            "can't be copied (open files, locks, tensors that carry gradients)"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what export tells of its own workings; a failure prints the whole graph to standard error."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def export_program(
    holder: nn.Module, arguments: Arguments, dynamic_shapes: DynamicShapes, notices: list[str], why_fixed: str = ""
) -> ExportedProgram:
    """Export with free dimensions if that works, and nothing speaks against it, else with the sample's shapes."""
    wanted: Any
    given, signature = arguments, inspect.signature(holder.forward)
    if dynamic_shapes is None:
        arguments, wanted = with_batch(arguments, signature)
    else:
        wanted = asked_for(arguments, dynamic_shapes, signature)
    reason = why_fixed
    if wanted is not None and not reason:
        try:
            exported = _export(holder, arguments, wanted)
        except Exception as error:
            if dynamic_shapes is not None:
                raise capture_error(holder, error, given) from error
            reason = first_line(error, 200)
        else:
            if dynamic_shapes is not None or not (fixed := _fixed(exported) or _bounded(exported)):
                return exported
            # What a module keeps from a run of the same size (anchors, masks) would be taken for good.
            with suppress(Exception):
                doubled, wanted = with_batch(arguments, signature, doubled=True)
                exported = _export(holder, doubled, wanted)
                if not (_fixed(exported) & fixed or _bounded(exported)) and _takes(exported, doubled):
                    return exported
            reason = "the model's code fixes it"
    try:
        exported = _export(holder, given, None)
    except Exception as error:
        raise capture_error(holder, error, given) from error
    if wanted is not None:
        notices.append(f"the model is captured with fixed input shapes; a free batch size isn't possible: {reason}")
    return exported


def _export(holder: nn.Module, arguments: Arguments, dynamic_shapes: Any) -> ExportedProgram:
    with torch.no_grad(), kept(holder):
        return torch.export.export(
            holder, arguments.args, arguments.kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )


def kept(module: nn.Module) -> AbstractContextManager[None]:
    """Give all that the module's code reaches back what it was: traced code keeps tensors without data, and sizes that
    are symbols, on modules, in dictionaries and behind caches."""
    return user_state_kept(module, holders=(nn.Module,))


def capture_error(holder: nn.Module, error: Exception, arguments: Arguments) -> ModelError:
    """What to tell the user about a failed export; of a model that can't run on the sample either, just that.

    Args:
        holder: what was to be captured.
        error: what export raised.
        arguments: the sample.
    """
    try:
        with torch.no_grad(), kept(holder):
            holder(*arguments.args, **arguments.kwargs)
    except Exception as failure:
        line = _user_frame("".join(traceback.format_tb(failure.__traceback__)))
        return ModelError(
            f"{type(holder).__name__} doesn't run on the sample, {_shapes(arguments)}: {first_line(failure)}"
            + (f" (at {line})" if line else "")
            + "; give a batch of what the model takes, with its axes in their order"
        )
    trace = "".join(traceback.format_tb(error.__traceback__))
    line = last_user_line(str(error)) or _user_frame(trace)
    reason = first_line(error)
    name = type(holder).__name__
    return ModelError(
        f"{name} can't be captured: {reason}" + (f" (at {line})" if line else "") + f"; {_remedy(str(error))}"
    )


def _shapes(arguments: Arguments) -> str:
    told = [
        f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in pytree.tree_leaves((arguments.args, arguments.kwargs))
    ]
    return ", ".join(told[:4]) + (", …" if len(told) > 4 else "")


def _user_frame(trace: str) -> str | None:
    found = last_user_line(trace)
    return None if found is None or "bitwright_torch" in found.partition(":")[0] else found


def _remedy(text: str) -> str:
    parts = "or name the parts to capture: modules=['backbone', …], the Python around them stays"
    if "fake tensor" in text or "FakeTensor" in text:
        return WITHOUT_DATA
    if "data-dependent" in text or "Could not guard" in text or "unbacked" in text:
        return f"its control flow or shapes depend on the data: use torch.where or masks there, {parts}"
    if "Constraints violated" in text or "dynamic" in text.lower():
        return f"give dynamic_shapes that the model allows, {parts}"
    return f"rewrite that line with tensor ops, {parts}"


def _out_spec(exported: ExportedProgram) -> pytree.TreeSpec:
    spec = exported.call_spec.out_spec
    assert isinstance(spec, pytree.TreeSpec)
    return spec


def _fixed(exported: ExportedProgram) -> frozenset[int]:
    """Results whose batch size the model's code fixes, or that have the batch's length by chance; −1 for the inputs.

    One result that is free says nothing of the others: a head may take the batch from what it keeps.
    """
    signature = exported.graph_signature
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes}
    inputs, results = ([values.get(n) if isinstance(n, str) else None for n in names]
                       for names in (signature.user_inputs, signature.user_outputs))  # fmt: skip
    shaped = [v for v in inputs if isinstance(v, torch.Tensor) and v.ndim]
    free = [v for v in shaped if _free(v.shape[0])]
    if not free:
        return frozenset({-1} if shaped else ())
    batch = (_hint(free[0]) or (0,))[0]
    return frozenset(
        i for i, v in enumerate(results)
        if isinstance(v, torch.Tensor) and v.ndim and not _free(v.shape[0]) and int(v.shape[0]) == batch
    )  # fmt: skip


def _bounded(exported: ExportedProgram) -> frozenset[int]:
    """−1 if the code takes another way for batches that are larger than the sample."""
    given = set(exported.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in exported.graph.nodes if n.name in given]
    sizes: list[Any] = [v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.ndim]
    symbols = {n.node.expr for n in sizes if isinstance(n, torch.SymInt)}
    # Larger limits come from kernels' indices, and not from the model's code.
    small = any(s in symbols and known.upper < 2**20 for s, known in exported.range_constraints.items())
    return frozenset({-1} if small else ())


def _free(size: Any) -> bool:
    """Whether a traced size is a symbol still: the code may have fixed one that began as such."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _takes(exported: ExportedProgram, doubled: Arguments) -> bool:
    """Whether what was captured from a doubled sample takes half of it too: `split` makes more parts of twice as much,
    and a list of so many results is none of the sample's."""
    leaves = pytree.tree_leaves((doubled.args, doubled.kwargs))
    size = next(t.shape[0] for t in leaves if isinstance(t, torch.Tensor) and t.ndim)
    return all(known.lower <= max(size // 2, 2) for known in exported.range_constraints.values())


def from_exported(
    holder: nn.Module, exported: ExportedProgram, convention: CallingConvention, notices: Sequence[str] = ()
) -> CapturedModel:
    """Build the captured model on a module tree that holds the exported program's parameters.

    Raises:
        ModelError: an op that has no functional form, or control flow that depends on data.
    """
    # The order counts. Regions first, since an in-place op within one writes to a tensor outside; in-place ops before
    # inputs are adopted, as a write to a buffer ends as a copy to its `get_attr`; modes after
    # that, when batch norms read the module's own buffers; names at the very end, from the nodes that are left.
    module = fx.GraphModule(exported.graph_module, copy.deepcopy(exported.graph))
    inline_regions(module)
    graph = copy.deepcopy(module.graph)  # without an owning module, whose attributes fx would ask for
    written = functionalize(graph, lambda node: str(source_of(node)))
    _adopt_inputs(graph, holder, exported, convention, written)
    _drop_copies(graph)
    bind_modes(graph, holder, owner_of)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target is aten.copy_.default)
    split_layouts(graph, holder)
    _show_results(graph)
    example = tuple(_hint(n.meta.get("val")) for n in graph.nodes if n.op == "placeholder")
    annotate(graph, holder)
    graph.lint()
    return CapturedModel(holder, Program(graph, convention, example, tuple(notices)))


def _hint(value: Any) -> tuple[int, ...] | None:
    """The sizes that a traced tensor had in the sample."""
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(n if isinstance(n, int) else int(n.node.hint) for n in value.shape)


def _adopt_inputs(
    graph: fx.Graph,
    holder: nn.Module,
    exported: ExportedProgram,
    convention: CallingConvention,
    written: Mapping[fx.Node, fx.Node],
) -> None:
    """Parameters become `get_attr` nodes, user inputs get the user's names, state is written back at the end."""
    names = aliases(holder)
    leaves = iter(convention.names)
    output = graph.output_node()
    first = next(n for n in graph.nodes if n.op != "placeholder")
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            node.meta["input"] = next(leaves)
            continue
        if spec.kind is InputKind.CONSTANT_TENSOR:
            target = _hold_constant(holder, str(spec.target), exported.constants[str(spec.target)])
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            target = names[str(spec.target)]
        else:
            raise ModelError(f"the model holds a {spec.kind.name.lower()} ({spec.target}), which can't be captured")
        with graph.inserting_before(first):
            read = graph.get_attr(target)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        if node in written:
            with graph.inserting_before(output):
                graph.call_function(aten.copy_.default, (read, written[node]))
        graph.erase_node(node)
    _merge_reads(graph)


def _hold_constant(holder: nn.Module, name: str, value: torch.Tensor) -> str:
    """Keep a constant as a buffer outside the state_dict, so that it moves with the model."""
    path, _, last = name.rpartition(".")
    try:
        owner = holder.get_submodule(path)
    except AttributeError:
        owner, last = holder, name.replace(".", "_")
        path = ""
    held = owner.__dict__.get(last)
    if held is not None:
        del owner.__dict__[last]
    while hasattr(owner, last) or last in owner._buffers:
        last += "_"
    owner.register_buffer(last, value.detach().clone(), persistent=False)
    return f"{path}.{last}" if path else last


def _merge_reads(graph: fx.Graph) -> None:
    """One `get_attr` for each tensor."""
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            kept = seen.setdefault(str(node.target), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _drop_copies(graph: fx.Graph) -> None:
    """Remove what has no effect in a functional graph: copies that guarded constants, slices that take everything.

    A `view` becomes a `reshape`, which gives the same numbers whatever the strides of its operand are.
    """
    for node in list(graph.nodes):
        if node.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default) or _takes_all(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default
    picked: dict[tuple[Any, Any], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            kept = picked.setdefault((node.args[0], node.args[1]), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _show_results(graph: fx.Graph) -> None:
    """Give results that are parameters, parts or views of one an op: else the core would have one result less."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    output = graph.output_node()
    results: list[fx.Node] = []
    fx.node.map_arg(output.args, results.append)
    for node in dict.fromkeys(results):
        target = node.target
        view = isinstance(target, torch._ops.OpOverload) and target.is_view
        if node not in fed and (node.op == "get_attr" or target is operator.getitem or view):
            with graph.inserting_before(output):
                shown = graph.call_function(aten.clone.default, (node,))
            shown.meta = dict(node.meta)
            output.replace_input_with(node, shown)


def _takes_all(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (
        node.args[i] if i < len(node.args) else default for i, default in ((2, None), (3, None), (4, 1))
    )
    return start in (0, None) and end in (None, _LARGEST) and bool(step == 1)


def annotate(graph: fx.Graph, holder: nn.Module) -> None:
    """Give every node its `NodeInfo`, in place of what export left in `meta`."""
    visible = data_nodes(graph, holder)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    namer = Namer(holder, (n for n in calls if n in visible and n.target is not operator.getitem))
    ids: dict[fx.Node, str] = {}
    for chosen in (True, False):
        for node in calls:
            if (node in visible) is chosen and node.target is not operator.getitem:
                ids[node] = namer.op_id(node)
    for node in graph.nodes:
        if node.op == "placeholder":
            found = NodeInfo("", str(node.meta.pop("input")))
        elif node.op == "get_attr":
            found = NodeInfo("", str(node.target))
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in ids:
            source = ids[node.args[0]]
            found = NodeInfo(source, f"{source}.output.{node.args[1]}", source=source_of(node), owner=owner_of(node))
        elif node.op == "call_function":
            id = ids.get(node, node.name)
            found = NodeInfo(id, f"{id}.output", source=source_of(node), owner=owner_of(node))
        else:
            found = NodeInfo("", "")
        value = node.meta.get("val")
        if node.op == "get_attr" and not str(node.target).endswith("training"):
            value = tensor_of(holder, str(node.target))
        node.meta = {NAMES: replace(found, **describe(value))}


def describe(value: Any) -> dict[str, Any]:
    """Shape, sizes and dtype of a traced value, as fields of `NodeInfo`."""
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return {"sizes": (str(value),)}
    if not isinstance(value, torch.Tensor):
        return {}
    shape = tuple(None if _free(n) else int(n) for n in value.shape)
    return {"shape": shape, "sizes": tuple(map(str, value.shape)), "dtype": str(value.dtype).removeprefix("torch.")}
