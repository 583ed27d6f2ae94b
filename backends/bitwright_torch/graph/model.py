"""`CapturedModel`: the user's parameters under their own names, and the captured graph that runs on them."""

from __future__ import annotations

import copy
import linecache
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import count
from types import FunctionType
from typing import Any, NoReturn, Self, SupportsIndex, cast

import torch
from torch import fx, nn

from bitwright.errors import CapabilityError, ModelError
from bitwright_torch.graph.calling import CallingConvention

NAMES = "bitwright"
"""Key of `fx.Node.meta` that holds the node's `NodeInfo`."""

_files = count()


@dataclass(frozen=True)
class NodeInfo:
    """What bitwright remembers of a node of the captured graph.

    Attributes:
        op: id of the op that the node is part of (the user's name for it).
        tensor: id of the activation that the node computes.
        shape: None for free dimensions; None where the node computes no tensor.
        dtype: as the core writes it.
        sizes: each dimension as an expression ("s20", "2*s20", "64"): equal texts are equal sizes. For a node that
            computes a size, that one.
        source: where the user wrote it, "file.py:12 in forward: y = self.conv(x)".
        owner: dotted name of the user's module that it was called in.
    """

    op: str
    tensor: str
    shape: tuple[int | None, ...] | None = None
    dtype: str = ""
    sizes: tuple[str, ...] = ()
    source: str | None = None
    owner: str = ""


def info(node: fx.Node) -> NodeInfo:
    """The node's information."""
    found: NodeInfo = node.meta[NAMES]
    return found


@dataclass(frozen=True, eq=False)
class Program:
    """A captured graph. Immutable by convention: edits work on a copy, so models may share one.

    Attributes:
        graph: functional aten ops; parameters and buffers are `get_attr` nodes, `placeholder`s the flat inputs.
        convention: how the user calls the model.
        example: shape of each flat input in the sample; None where it is not a tensor.
        notices: what capturing had to restrict (a fixed batch size, …), for the user.
        prefix: "backbone." for the part of that name in a bigger model: all ids of ops, tensors and parameters start
            with it.
    """

    graph: fx.Graph
    convention: CallingConvention
    example: tuple[tuple[int, ...] | None, ...] = ()
    notices: tuple[str, ...] = ()
    prefix: str = ""
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def function(self) -> FunctionType:
        """`function(model, *leaves)` runs the graph and returns the flat outputs."""
        return compile_graph(self.graph)

    def with_graph(self, graph: fx.Graph) -> Program:
        """The same program with another graph."""
        return replace(self, graph=graph, memo={})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CapabilityError(
            "a captured model can't be pickled: keep its simulation (sim.save(folder), before trainable()) and its "
            "state_dict(), and open them where they are needed: QuantSim.load(folder).trainable().load_state_dict(…)"
        )


def compile_graph(graph: fx.Graph) -> FunctionType:
    """Python function of a graph: `function(root, *placeholders)`; `get_attr` nodes read from `root`.

    Tensors that the graph makes itself (`arange`, masks of ones) are made where the model's tensors are, so that a
    model that was captured on one device runs on another.
    """
    code = _follow_device(graph).python_code("self")
    name = f"<bitwright captured graph {next(_files)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)  # source that fx generated from the graph
    function = scope["forward"]
    assert isinstance(function, FunctionType)
    return function


def _follow_device(graph: fx.Graph) -> fx.Graph:
    """The graph with the device that export wrote into it taken from one of the graph's tensors instead.

    Graphs that name several devices are left as they are: they belong to a model that is spread over these.
    """
    named = {n: d for n in graph.nodes if (d := _device(n)) is not None}
    if len(set(named.values())) != 1:
        return graph
    copied: dict[fx.Node, fx.Node] = {}
    followed = fx.Graph()
    result = followed.graph_copy(graph, copied)
    followed.output(result)
    held = next((n for op in ("get_attr", "placeholder") for n in followed.nodes if n.op == op and _is_tensor(n)), None)
    if held is None:
        return graph
    behind = next(n for n in followed.nodes if n.op != "placeholder")
    with followed.inserting_before(behind):
        source = followed.get_attr(str(held.target)) if held.op == "get_attr" else held
        device = followed.call_function(getattr, (source, "device"))
    for node in (copied[n] for n in named):
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {k: device if isinstance(a, torch.device) else a for k, a in node.kwargs.items()}
    return followed


def _device(node: fx.Node) -> torch.device | None:
    """The device that a call names."""
    return next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)), None)


def _is_tensor(node: fx.Node) -> bool:
    return NAMES in node.meta and info(node).shape is not None


class CapturedModel(nn.Module):
    """A model that bitwright works on: the user's module tree holds the parameters, the captured graph computes.

    It is called as the user's model is, has its `state_dict` keys, and can be deep-copied, moved, compiled, trained
    and put into `DistributedDataParallel`. `train()` and `eval()` act on batch norms and dropouts, each by its own
    module's flag, so that single batch norms can be frozen as usual.

    Args:
        holder: a private copy of the user's module; its children, parameters and buffers are taken over.
        program: the captured graph.
    """

    _program: Program

    def __init__(self, holder: nn.Module, program: Program) -> None:
        super().__init__()
        for name, child in holder._modules.items():
            self._modules[name] = child
        for name, parameter in holder._parameters.items():
            self._parameters[name] = parameter
        for name, buffer in holder._buffers.items():
            self._buffers[name] = buffer
        self._non_persistent_buffers_set |= holder._non_persistent_buffers_set
        self.training = holder.training
        self._program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the user's `forward`, same arguments and result.

        Raises:
            InputError: arguments of another structure than were captured.
        """
        program = self._program
        leaves = program.convention.flatten(args, kwargs)
        return program.convention.unflatten(program.function(self, *leaves))

    def extra_repr(self) -> str:
        """Size of the graph."""
        calls = sum(node.op == "call_function" for node in self._program.graph.nodes)
        return f"captured graph of {calls} calls"


def program_of(model: CapturedModel) -> Program:
    """The program of a captured model."""
    return model._program


def with_program(model: CapturedModel, program: Program) -> CapturedModel:
    """A new model with another program, sharing every tensor (but no Parameter object) with the old one."""
    return type(model)(share(model), program)


def share(module: nn.Module) -> nn.Module:
    """A copy of a module tree whose parameters and buffers share memory with the original's.

    Parameter objects are new, so that moving, freezing or replacing them in one tree leaves the other alone.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach()
    return _copied(module, memo)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COPYING = ("__deepcopy__", "__copy__", "__reduce_ex__", "__reduce__", "__getstate__", "__new__")


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a module, which spends most of its time on the dozen empty dictionaries that each one has."""
    if id(module) in memo:
        return cast(nn.Module, memo[id(module)])
    if _says_how(type(module)):  # type: ignore[arg-type]  # as a key of the cache, a class is hashed as a class
        return copy.deepcopy(module, memo)
    made = memo[id(module)] = type(module).__new__(type(module))
    state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
    for key, value in state.items():  # without what `nn.Module.compile` bound to this one
        made.__dict__[key] = _attribute(key, value, memo)
    return made


@cache
def _says_how(kind: type[nn.Module]) -> bool:
    """Whether a class of modules says itself how it is copied."""
    # PyTorch's own read states that older releases have saved, which differ from today's.
    names = _COPYING if kind.__module__.startswith("torch.nn.") else (*_COPYING, "__setstate__")
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _attribute(key: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN or (kind is tuple and all(type(v) in _PLAIN for v in value)):
        return value
    if kind in (dict, OrderedDict, set) and not value:
        return memo.setdefault(id(value), kind())  # two modules may hold the same one
    if key == "_modules":
        return kind((n, None if m is None else _copied(m, memo)) for n, m in value.items())
    return copy.deepcopy(value, memo)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the last part of the name.

    Raises:
        ModelError: there is no such module.
    """
    path, _, last = name.rpartition(".")
    try:
        return model.get_submodule(path), last
    except AttributeError:
        raise ModelError(f"the model has no module {path!r}") from None


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its dotted name.

    Raises:
        ModelError: there is none.
    """
    owner, last = owner_of(model, name)
    found = getattr(owner, last, None)
    if not isinstance(found, torch.Tensor):
        raise ModelError(f"the model has no parameter {name!r}")
    return found


def replace_tensors(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put other tensors in the places of parameters or buffers, under every name that these are tied to.

    All in one walk over the modules: a walk for each would take longer than copying the tensors.

    Raises:
        ModelError: a name is of no parameter or buffer; nothing is replaced then.
    """
    new: dict[int, tuple[torch.Tensor, Any]] = {}
    for name, value in values.items():
        old = tensor_of(model, name)
        fresh: Any = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        new[id(old)] = old, fresh
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, held in table.items():
                if id(held) in new:
                    table[key] = new[id(held)][1]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are; the CPU for a model without any."""
    tensors: Iterator[torch.Tensor] = (t for group in (model.parameters(), model.buffers()) for t in group)
    first = next(tensors, None)
    return first.device if first is not None else torch.device("cpu")


def aliases(model: nn.Module) -> Mapping[str, str]:
    """Every name of a parameter or buffer → the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for group in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in group:
            names[name] = first.setdefault(id(tensor), name)
    return names
