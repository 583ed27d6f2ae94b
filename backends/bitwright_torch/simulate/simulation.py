"""A simulation for PyTorch: the captured model with `FakeQuantize` modules at its sites, an `nn.Module` to train.

Setting an encoding copies a few numbers; nothing is built or compiled again. Sites that share an encoding share one
module. Where values lie on the grid already (reshape, max pooling, concat, embedding … of tensors on the same grid)
no module is called. Derived biases stay in float unless an encoding is set for them.

Sessions run on the float model's own memory. The first time that `model` is asked for, its tensors become copies of
its own, so that training it leaves the float model alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from bitwright.backend import Session, SimulationBase, Tap, Training
from bitwright.errors import ModelError
from bitwright.graph import ParamId, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Derived, Plan, SiteId
from bitwright_torch.graph.attributes import arguments
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.constants import constant_nodes
from bitwright_torch.graph.model import NAMES, CapturedModel, device_of, info, program_of, share
from bitwright_torch.graph.operands import Operand, operands
from bitwright_torch.graph.params import native_values, write_params
from bitwright_torch.simulate.ends import Bounds
from bitwright_torch.simulate.fake_quant import FakeQuantize
from bitwright_torch.simulate.pullback import TorchPullback
from bitwright_torch.simulate.session import TorchSession
from bitwright_torch.simulate.spent import mark

aten = torch.ops.aten


class SimulatedModel(CapturedModel):
    """A captured model with fake quantization: called, trained, saved and moved as the user's own model is.

    Its state dict has the user's keys, and those of the quantizers under one name of their own; a state dict without
    the latter loads too. See `FakeQuantize` for how grids behave in training.
    """

    def extra_repr(self) -> str:
        """Number of quantizers."""
        count = sum(isinstance(m, FakeQuantize) for m in self.modules())
        return f"{super().extra_repr()}, {count} quantizers"


class TorchSimulation(SimulationBase):
    """`bitwright.backend.Simulation` of a captured model.

    Args:
        model: the float model; never changed.
        plan, encodings: see `SimulationBase`.
        trainable: how grids are trained. By default those of weights follow the weights where these change.

    Raises:
        EncodingError: an encoding is for an unknown or float site, or doesn't fit its tensor.
    """

    def __init__(
        self,
        model: CapturedModel,
        plan: Plan,
        encodings: Mapping[SiteId, Encoding | None],
        *,
        trainable: bool | Training = False,
    ) -> None:
        super().__init__(canonical(model).graph, plan, encodings)
        self._float = model
        self._owned = False
        self._replaced: set[str] = set()
        self._quantizers: dict[SiteId, FakeQuantize] = {}
        self._parameters: dict[SiteId, Operand] = {}
        self._computed: dict[ParamId, _Computed] = {}
        self._rounded_in: dict[ParamId, fx.Node] = {}
        """The calls that round parameters."""
        self._module = self._build()
        self.set(encodings)
        if trainable:
            self._own()
        if isinstance(trainable, Training) and trainable.range_learning:
            for quantizer in self._quantizers.values():
                if quantizer.enabled and not quantizer.derived:
                    quantizer.learn(evened=trainable.gradient_scale)

    # -- building

    def _build(self) -> SimulatedModel:
        found = canonical(self._float)
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        graph.output(graph.graph_copy(found.lowered, copies))
        graph.output_node().meta = dict(found.lowered.output_node().meta)
        holder = share(self._float)
        name = "quantizers"
        while hasattr(holder, name):
            name += "_"
        quantizers = nn.Module()
        nodes = {t: copies[n] for t, n in found.tensors.items()}
        known = operands(graph, holder)
        roots = {
            operand.id: node
            for node, operand in reversed(list(known.items()))
            if not any(n in known and known[n].id == operand.id for n in node.all_input_nodes)
        }
        # Parameters that are computed from others, or views of them, are read as they are in float.
        constants = constant_nodes(graph)
        floats = {n: {u for u in n.users if u in constants and not _same(known, n, u)} for n in known}
        for id, computed in list(roots.items()):
            if known[computed].evaluator is not None and id in self._graph.params:
                self._computed[id] = _Computed()
                key = _key(quantizers, f"{id}/computed", self._computed[id])
                quantizers._modules[key] = self._computed[id]
                self._parameters[id] = known[computed]
                roots[id] = _insert(graph, computed, f"{name}.{key}", id, floats[computed])
                floats[roots[id]] = set()
        rounded = frozenset(self._sites.rounded)
        roundings: list[fx.Node] = []
        for site in self._plan.quantized:
            is_parameter = self._sites.is_parameter(site)
            node = roots.get(site) if is_parameter else nodes.get(site)
            if node is None or not (is_parameter or site in rounded):
                continue
            root = self._plan.root(site)
            module: nn.Module = self._quantizer(root, roots)
            if site != root and self._sites.is_parameter(root):
                module = _Tied(self._quantizers[root])
            key = _key(quantizers, root if isinstance(module, FakeQuantize) else f"{site}/tied", module)
            quantizers._modules.setdefault(key, module)
            call = _insert(graph, node, f"{name}.{key}", site, floats.get(node, ()))
            if is_parameter:
                self._rounded_in[site] = call
            else:
                _merge_activation(graph, call)
                if isinstance(module, FakeQuantize):
                    roundings.append(call)
        mark(roundings)
        holder.add_module(name, quantizers.to(device_of(self._float)))
        graph.lint()
        quantizers.train(holder.training)
        model = SimulatedModel(holder, program_of(self._float).with_graph(graph))
        # A quantized model input has its placeholder's name too; the quantizer comes later and wins.
        self._tensors = {info(n).tensor: n for n in graph.nodes if n.op not in ("get_attr", "output")}
        for site, node in roots.items():
            if node in known:
                self._parameters[site] = known[node]
        return model

    def _value(self, site: SiteId) -> torch.Tensor:
        """A parameter's float value in the simulation."""
        computed = self._computed.get(site)
        if computed is not None and computed.value is not None:
            return computed.value
        return self._parameters[site].view(self._module)

    def _quantizer(self, root: SiteId, roots: Mapping[SiteId, fx.Node]) -> FakeQuantize:
        if root not in self._quantizers:
            derived = isinstance(self._plan[root].decision, Derived)
            made = FakeQuantize(derived=derived)
            if self._sites.is_parameter(root) and root in roots:
                param, native = self._graph.params[root], tuple(n or 0 for n in info(roots[root]).shape or ())
                made = FakeQuantize(param.layout or tuple(range(len(param.shape))), native, derived=derived)
            self._quantizers[root] = made
        return self._quantizers[root]

    def _own(self) -> None:
        if not self._owned:
            self._owned = True
            for tensor in (*self._module.parameters(), *self._module.buffers()):
                tensor.data = tensor.data.clone()

    # -- the protocol

    @property
    def model(self) -> SimulatedModel:
        """The simulated model, in memory of its own."""
        self._own()
        return self._module

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`."""
        for root, encoding in changes.items():
            if root in self._quantizers:
                known = self._sites.is_parameter(root) and root in self._parameters
                with torch.no_grad():
                    self._quantizers[root].set(encoding, self._value(root) if known else None)

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `bitwright.backend.ParamUpdates`: tensors that are written become the simulation's own, grids stay."""
        roots = {self._plan.root(p) for p in values if p in self._plan} & set(self._quantizers)
        kept = {root: self._quantizers[root].get() for root in roots}  # of these alone: each is read off the device
        params = canonical(self._float).params
        computed = native_values(params, {p: v for p, v in values.items() if p in self._computed})
        write_params(self._module, params, {p: v for p, v in values.items() if p not in self._computed}, self._replaced)
        for id, value in computed.items():
            place = self._parameters[id].view(self._module)
            self._computed[id].value = torch.from_numpy(value).to(place.device, place.dtype)
        self.install(kept)

    def in_force(self) -> Mapping[SiteId, Encoding | None]:
        """See `SimulationBase`."""
        by_root = {}
        for root, quantizer in self._quantizers.items():
            if quantizer.follows:
                quantizer.follow(self._value(root))
            by_root[root] = quantizer.get()
        return by_root

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> Session:
        """See `SimulationBase`."""
        program = program_of(self._module)
        convention = program.convention
        constants = {program.prefix + convention.names[i]: v for i, v in convention.constants.items()}
        return TorchSession(self._module, program.graph, self._tensors, taps, feeds, constants)

    def pullback(self, params: Sequence[ParamId], feeds: Sequence[TensorId], taps: Sequence[TensorId]) -> TorchPullback:
        """See `bitwright.backend.DifferentiableSimulation`."""
        if missing := [p for p in params if p not in self._rounded_in]:
            raise ModelError(f"{missing[0]!r} is no parameter that the plan quantizes")
        places = {p: (self._rounded_in[p], self._graph.params[p]) for p in params}
        return TorchPullback(self._module, program_of(self._module), self._tensors, places, feeds, taps)

    # -- after training

    def float_model(self) -> CapturedModel:
        """The float model with the simulation's present weights and running statistics, in memory of its own."""
        holder = share(self._module)
        for name, child in list(holder.named_children()):
            if name not in self._float._modules:
                delattr(holder, name)
                assert child is not None
        model = type(self._float)(holder, program_of(self._float))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        for name, module in self._float.named_modules():
            model.get_submodule(name).training = module.training
        return model


class _Computed(nn.Module):
    """A parameter that is computed from others: as it is computed, or a value that was set in its place."""

    value: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The value that was set, else x."""
        return x if self.value is None else self.value


class _Tied(nn.Module):
    """Rounds another tensor to the grid of a parameter, in training too; the grid follows the parameter alone."""

    def __init__(self, source: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["source"] = source  # not a child: the state is the parameter's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x on the grid."""
        source: FakeQuantize = self.__dict__["source"]
        return source.round(x) if source.enabled else x


def _key(holder: nn.Module, site: SiteId, module: nn.Module) -> str:
    """A child's name for a site: one path element, which isn't an attribute of every module.

    fx writes it into source between double quotes.
    """
    key = "".join(c if c.isprintable() and c not in '"\\' else "_" for c in site.replace(".", "/"))
    while (held := holder._modules.get(key)) is not module and (held is not None or hasattr(holder, key)):
        key += "_"
    return key


def _same(known: Mapping[fx.Node, Operand], node: fx.Node, user: fx.Node) -> bool:
    return user in known and known[user].id == known[node].id


def _insert(graph: fx.Graph, node: fx.Node, target: str, site: SiteId, but: Collection[fx.Node] = ()) -> fx.Node:
    """Call a module on a node's value; the call, which takes over the node's readers (but some) and its name."""
    after = node
    if node.op == "placeholder":
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(after):
        call = graph.call_module(target, (node,))
    known = info(node)
    call.meta = {NAMES: known}
    if node.op in ("call_function", "call_module"):
        node.meta = {**node.meta, NAMES: replace(known, tensor=f"{site}/float")}
    # An output that is an input is handed out as it came.
    kept = {*but, call, *([graph.output_node()] if node.op == "placeholder" else [])}
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user not in kept)
    return call


def _merge_activation(graph: fx.Graph, call: fx.Node) -> None:
    """Let a quantizer compute the ReLU or ReLU6 that it rounds, if nothing else reads it: one pass over memory."""
    (source,) = call.args
    if not isinstance(source, fx.Node) or len(source.users) > 1 or (bounds := _bounds(source)) is None:
        return
    call.args = (source.args[0], bounds)
    graph.erase_node(source)


def _bounds(node: fx.Node) -> Bounds | None:
    """What an activation function clips to, if that is all it does and its gradient is 0 at its bounds."""
    if node.op != "call_function":
        return None
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        given = arguments(node)
        return float(given["min_val"]), float(given["max_val"])
    return None
