"""Building simulated graphs: variables for the numbers, and chains at every site, for inference and for training.

For inference a site's ops stand behind a switch, and a parameter's ops read a variable of its quantized values,
`NAME/quantized`, which numpy computes once. For training, parameters are quantized in the graph, in each step, and
those of a frozen source become variables under the names of their constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tensorflow as tf

from bitwright.backend import Sites, Training
from bitwright.graph import ParamId, ParamRole, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Derived, Plan, SiteId
from bitwright_tensorflow.graph.canonical import Canonical, recognize
from bitwright_tensorflow.graph.model import Kind, MetaGraphDef, TfModel, node_of
from bitwright_tensorflow.simulate.fake_quant import OPERANDS, SiteForm, switched
from bitwright_tensorflow.simulate.instrument import Instrument, drop_unread, variable_records
from bitwright_tensorflow.simulate.trained_sites import Operand, TrainedSite

GLOBAL = tf.compat.v1.GraphKeys.GLOBAL_VARIABLES
STATISTICS = frozenset({ParamRole.MEAN, ParamRole.VAR, ParamRole.CONSTANT})
"""Roles of parameters that aren't trained."""


@dataclass
class SimulatedNetwork:
    """A simulated graph, not yet imported.

    Attributes:
        meta: the graph with its collections.
        aliases: tensor → its quantized tensor, where there is one.
        outputs: output of the model → its tensor here.
        switches: root → prefix of its variables, and what its ops compute (inference).
        quantized: parameter → variable of its quantized values (inference).
        sites: root → its grid (training).
        constants: those that have become variables (training).
    """

    meta: MetaGraphDef
    aliases: dict[TensorId, TensorId] = field(default_factory=dict)
    outputs: Mapping[TensorId, TensorId] = field(default_factory=dict)
    switches: dict[SiteId, tuple[str, SiteForm]] = field(default_factory=dict)
    quantized: dict[ParamId, str] = field(default_factory=dict)
    sites: dict[SiteId, TrainedSite] = field(default_factory=dict)
    constants: tuple[str, ...] = ()


class Builder:
    """Builds one network.

    Args:
        model: the float model.
        found: its canonical graph.
        sites: what is quantized.
    """

    def __init__(self, model: TfModel, found: Canonical, sites: Sites) -> None:
        self._model, self._found, self._sites, self._plan = model, found, sites, sites.plan
        self._ins = Instrument(model.copy_meta(), found.network.inference.order)
        self._made = SimulatedNetwork(self._ins.meta)
        self._reads: dict[ParamId, TensorId] = {}

    def for_inference(self, chains: Mapping[SiteId, SiteForm]) -> SimulatedNetwork:
        """Every planned site has its ops.

        Args:
            chains: root → its ops.
        """
        collect_variables(self._ins, self._model)
        ins, made = self._ins, self._made
        for root in dict.fromkeys(self._plan.root(s) for s in self._sites.rounded):
            chain = chains[root]
            shape = chain.shape(self._rank(root))
            prefix = ins.free(f"{_scope(root)}/quantizer")
            made.switches[root] = (prefix, chain)
            on = ins.variable(f"{prefix}/on", tf.bool, ())
            operands = {n: ins.variable(f"{prefix}/{n}", t, shape) for n, t in OPERANDS[chain.kind].items()}
            for site in (s for s in self._sites.rounded if self._plan.root(s) == root):
                x, scope = self._activation(site), prefix if site == root else ins.free(f"{_scope(site)}/quantizer")
                with ins.scratch.as_default(), tf.name_scope(f"{scope}/"):
                    y = switched(x, on, chain.kind, operands, "value", chain.run_time)
                self._place(site, y)
        for param in self._parameters():
            read = self._found.params[param]
            name = made.quantized[param] = ins.free(f"{param}/quantized")
            value = ins.variable(name, getattr(tf, read.dtype), read.form.native)
            for edge in self._found.operands[param]:
                ins.redirect(edge, value)
        return self._finish()

    def for_training(self, encodings: Mapping[SiteId, Encoding], training: Training) -> SimulatedNetwork:
        """Sites with an encoding have their ops."""
        ins, made = self._ins, self._made
        self._open_constants()
        collect_variables(self._ins, self._model)
        for param in self._parameters():
            root = self._plan.root(param)
            if root in encodings and root not in made.sites:
                owner = root if root in self._found.params else param
                self._site(root, encodings[root], training, self._operand(owner))
        for site in self._sites.rounded:
            root = self._plan.root(site)
            if root in encodings:
                if root not in made.sites:
                    self._site(root, encodings[root], training, None)
                scope = made.sites[root].prefix
                scope = scope if site == root else ins.free(f"{_scope(site)}/quantizer")
                self._place(site, made.sites[root].apply(ins, self._activation(site), scope))
        for param in self._parameters():
            if (root := self._plan.root(param)) in made.sites:
                scope = made.sites[root].prefix
                scope = scope if param == root else ins.free(f"{param}/quantizer")
                value = made.sites[root].apply(ins, self._operand(param), scope)
                for edge in self._found.operands[param]:
                    ins.redirect(edge, value)
        return self._finish()

    # -- parts

    def _parameters(self) -> list[ParamId]:
        return [p for p in self._sites.parameters if p in self._found.params]

    def _rank(self, site: SiteId) -> int | None:
        graph = self._found.graph
        shape = graph.params[site].shape if site in graph.params else graph.tensors[site].shape
        return None if shape is None else len(shape)

    def _site(self, root: SiteId, encoding: Encoding, training: Training, operand: Operand | None) -> None:
        derived = isinstance(self._plan[root].decision, Derived)
        site = TrainedSite(self._ins.free(f"{_scope(root)}/quantizer"), encoding, training, operand, derived)
        site.build(self._ins)
        self._made.sites[root] = site

    def _activation(self, tensor: TensorId) -> object:
        inference = self._found.network.inference
        return self._ins.stand_in(tensor, getattr(tf, inference.dtype(tensor)), inference.shape(tensor))

    def _operand(self, param: ParamId) -> Operand:
        read = self._found.params[param]
        tensor = read.tensor
        if param in self._made.constants and node_of(tensor) == param:
            tensor = self._reads[param]
        symbol = self._ins.stand_in(tensor, getattr(tf, read.dtype), read.form.native)
        return Operand(symbol, self._found.graph.params[param], read.form)

    def _place(self, site: SiteId, end: object) -> None:
        producer, collapsed = node_of(site), self._found.network.collapsed
        takes_over = site in self._model.outputs and producer not in collapsed
        name = self._ins.free(f"{producer}/float") if takes_over else None
        self._made.aliases[site] = self._ins.replace(site, end, name=name)

    def _open_constants(self) -> None:
        """In a graph without variables, constants that are trained become some."""
        if self._model.variables:
            return
        roles: dict[ParamId, set[ParamRole]] = {}
        for op in self._found.graph.ops:
            for role, param in op.params.items():
                roles.setdefault(param, set()).add(role)
        nodes = self._found.network.inference.wiring.nodes
        for param, uses in roles.items():
            if nodes[param].op == "Const" and not uses & STATISTICS:
                native = self._found.params[param].form.native
                self._reads[param] = self._ins.variable_for(param, native, trainable=True)
        self._made.constants = tuple(self._reads)

    def _finish(self) -> SimulatedNetwork:
        made = self._made
        made.meta = self._ins.finish()
        made.outputs = {t: made.aliases.get(t, t) for t in self._model.outputs}
        drop_unread(made.meta, set(made.quantized), list(made.outputs.values()))
        return made


def collect_variables(ins: Instrument, model: TfModel) -> None:
    """Enter variables that no collection has, so that savers, optimizers and functions find them."""
    found = recognize(model)
    statistics = {p for op in found.graph.ops for r, p in op.params.items() if r in STATISTICS}
    order = set(found.network.inference.order)
    known = variable_records(ins.meta, GLOBAL)
    for node in model.graph_def.node:
        if node.op != "VarHandleOp" or node.name in known:
            continue
        shape = tf.TensorShape(node.attr["shape"].shape)
        trained = model.kind is not Kind.SESSION and node.name in order and node.name not in statistics
        ins.collect(
            node.name,
            None if shape.rank is None else shape.as_list(),
            trainable=trained and tf.as_dtype(node.attr["dtype"].type).is_floating,
        )


def declare_variables(model: TfModel) -> MetaGraphDef:
    """The model's graph, all its resource variables in the collections."""
    ins = Instrument(model.copy_meta(), ())
    collect_variables(ins, model)
    return ins.finish()


def chains_of(plan: Plan, roots: tuple[SiteId, ...]) -> dict[SiteId, SiteForm]:
    """The ops that each root's specification asks for."""
    return {root: SiteForm.of(plan.spec(root)) for root in roots}


def _scope(site: SiteId) -> str:
    """A name scope for a site: "conv/Relu" for "conv/Relu:0", "split_1" for "split:1"."""
    name, _, output = site.partition(":")
    return name if output in ("", "0") else f"{name}_{output}"
