"""Mixed precision by hand: which ops, modules or tensors get which type, and what stands against it."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpKind, ParamRole, TensorId
from bitwright.grids import FLOAT, Blockwise, Dynamic, EncodingTable, parse_type
from bitwright.placement import ARROW, Derived, Float, Plan, Site, SiteId, SiteKind, ops_between, sized
from bitwright.simulation._fork import fork
from bitwright.simulation._state import rebuilt
from bitwright.state import SimState


@dataclass(frozen=True)
class Conflict:
    """Something that stands against a request, or that it brings along.

    Attributes:
        site: the tensor or parameter.
        what: in words.
        serious: a request that can't be carried out as it stands; otherwise a remark.
    """

    site: SiteId
    what: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{self.site!r}: {self.what}"


def set_precision(
    state: SimState,
    what: str | OpKind | Iterable[str | OpKind],
    *,
    weights: str | int | None = None,
    activations: str | int | None = None,
    inputs: str | int | None = None,
    strict: bool = True,
) -> tuple[SimState, tuple[Conflict, ...]]:
    """Give ops, modules, op types or tensors another type; the last call on a site wins.

    Args:
        state: stays as it is.
        what: an op's name, a module's (the start of its ops' names, up to a dot or slash), a pattern with ``*``, a
            subgraph ("conv1 -> add": all ops on the ways from one to the other), an op type ("Conv", or the framework's
            own name), an `OpKind`, a tensor's or parameter's name; or several.
        weights: type of the weights, such as "int4", "int4:block32", "float", or a width.
        activations: type of the outputs; where an op is fused with those behind it, of what leaves the fused group.
            For a tensor: its type.
        inputs: type of the tensors that the ops read.
        strict: raise if something stands against it; otherwise do what can be done, and say what couldn't.

    Returns:
        The state with the types, in which sites that have another one need `calibrate` again; remarks, and with
        ``strict=False`` the conflicts.

    Raises:
        InputError: nothing is called so, a type isn't understood, or with `strict` a conflict.
    """
    target = state.target
    asked = {
        role: given if given is None else sized(given, default)
        for role, given, default in (
            ("weights", weights, target.weights),
            ("activations", activations, target.activations),
            ("inputs", inputs, target.activations),
        )
    }
    if all(v is None for v in asked.values()):
        raise InputError("set_precision: give weights=, activations= or inputs=, such as weights='int4'")
    for role, text in asked.items():
        layout = None if text is None or text == FLOAT else parse_type(text)[3]
        if isinstance(layout, Blockwise) and role != "weights":
            raise InputError(f"{role}={text!r}: blocks are for weights; activations have one scale, for example uint8")
        if isinstance(layout, Dynamic) and role == "weights":
            raise InputError(f"{role}={text!r}: a range at run time is for activations; weights take int8 or int4")
    request = _Request(state)
    for item in [what] if isinstance(what, str) else what:
        request.add(item, **asked)
    return request.carry_out(strict)


def set_type(state: SimState, site: SiteId, text: str | int) -> SimState:
    """The state with another type at one site, and at those that share its grid; see `Site.set`.

    Args:
        state: stays as it is.
        site: a tensor or parameter of the plan.
        text: the type, a width, or "float".

    Raises:
        InputError: not a type, or something stands against it.
    """
    kind = state.plan[site].kind
    # Asked for by its name alone, it needn't be thawed first.
    group = set(state.plan.tied(state.plan.root(site)))
    state = replace(state, encodings=state.encodings.restricted(set(state.encodings) - group))
    request = _Request(state)
    request.put(site, sized(text, state.target.weights if kind is SiteKind.PARAMETER else state.target.activations))
    return request.carry_out(strict=True)[0]


def retyped(state: SimState, types: Mapping[SiteId, str]) -> SimState:
    """A fork with other types at some sites; encodings of another type are dropped, frozen ones too.

    Args:
        state: stays as it is.
        types: by tensor or parameter; of tensors that share a grid, all.

    Raises:
        InputError: no such site, or not a type.
    """
    found: dict[SiteId, Any] = {}
    for site, text in types.items():
        entry = state.plan[site]
        if site in state.graph and entry.op is not None:
            # A name that is an op's too goes by way of the op, so that neither hides the other.
            said = found.get(entry.op) or state.overrides.get(entry.op)
            found[entry.op] = {**(said if isinstance(said, Mapping) else {}), _role(entry): text}
        else:
            found[site] = text
    twin = fork(state, overrides=found)
    kept = {s: e for s, e in state.encodings.items() if s in twin.plan and twin.plan.spec(s) == state.plan.spec(s)}
    return replace(twin, encodings=EncodingTable(kept, state.encodings.provenance))


def bypassed_but(state: SimState, kept: Collection[SiteId]) -> SimState:
    """The state with every site left in float that isn't named, nor on the grid of one that is."""
    left = {
        s: "float"
        for s in state.plan.quantized
        if state.plan.root(s) not in kept and not isinstance(state.plan[s].decision, Derived)
    }
    return rebuilt(state, overrides=retyped(state, left).overrides)


class _Request:
    def __init__(self, state: SimState) -> None:
        self.state, self.graph, self.plan = state, state.graph, state.plan
        self.types: dict[SiteId, str] = {}
        self.conflicts: list[Conflict] = []

    def add(self, item: str | OpKind, weights: str | None, activations: str | None, inputs: str | None) -> None:
        """Note the sites that an item stands for."""
        ops, named = _ops(self.graph, item)
        if not ops:
            if item not in self.plan:
                raise InputError(f"the model has no op, module, type or tensor {str(item)!r}")
            site = self.plan[item]
            text = weights if site.kind is SiteKind.PARAMETER else activations
            if text is None:
                role = "weights" if site.kind is SiteKind.PARAMETER else "activations"
                raise InputError(f"{item!r} is not an op; pass {role}=")
            self.put(item, text)
            return
        if weights is not None:
            bearing = [op for op in ops if op.weight is not None]
            if not bearing and named:
                raise InputError(f"{str(item)!r} has no weights")
            for op in bearing:
                self.put(op.params[ParamRole.WEIGHT], weights)
        for op in ops:
            for t in op.outputs if activations is not None else ():
                self._activation(end_of_fusion(self.graph, self.plan, t), str(activations), single=named)
            for t in op.data_inputs if inputs is not None else ():
                self._activation(t, str(inputs), single=named)

    def _activation(self, tensor: TensorId, text: str, *, single: bool) -> None:
        # What a whole type or module is asked for holds where there is something to quantize.
        if single or not isinstance(self.plan[self.plan.root(tensor)].decision, Float):
            self.put(tensor, text)

    def put(self, site: SiteId, text: str) -> None:
        """Note one site, and those that share its grid."""
        decision = self.plan[self.plan.root(site)].decision
        if isinstance(decision, Float) and text != FLOAT and (self._before(site) or self._default(site)) != FLOAT:
            self.conflicts.append(Conflict(site, f"it {decision.told}; {text} isn't set"))
            return
        # One grid serves the whole group, whoever of it was named.
        group = self.plan.tied(self.plan.root(site))
        for member in group:
            before = self.types.get(member) or self._before(member)
            if member != site and before not in (None, text):
                self.conflicts.append(
                    Conflict(site, f"it shares one grid with {member!r}, which was asked to be {before}, not {text}")
                )
            elif before not in (None, text):
                self.conflicts.append(Conflict(site, f"{text} takes the place of {before}", serious=False))
        if others := [m for m in group if m != site and m not in self.types]:
            shown = ", ".join(map(repr, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            self.conflicts.append(Conflict(site, f"{shown} share its grid and become {text} too", serious=False))
        self.types.update(dict.fromkeys(group, text))

    def _before(self, site: SiteId) -> str | None:
        """What an earlier override says of a site."""
        said = self.state.overrides.get(site)
        if isinstance(said, str) and not (said == FLOAT and site in self.graph):
            return said
        entry = self.plan[site]
        said = self.state.overrides.get(entry.op) if entry.op is not None else None
        return said.get(_role(entry)) if isinstance(said, Mapping) else None

    def _default(self, site: SiteId) -> str:
        """The type that sites of this kind have where nothing is said of one."""
        state, parameter = self.state, self.plan[site].kind is SiteKind.PARAMETER
        asked, usual = (
            (state.weights, state.target.weights) if parameter else (state.activations, state.target.activations)
        )
        return asked or usual

    def carry_out(self, strict: bool) -> tuple[SimState, tuple[Conflict, ...]]:
        """The state with the new plan, and what stands against it."""
        twin = retyped(self.state, self.types)
        for note in twin.plan.notes:
            if note not in self.plan.notes:
                self.conflicts.append(Conflict(note.partition(":")[0], note.partition(": ")[2]))
        changed = {s for s in twin.plan if twin.plan.spec(s) != self.plan.spec(s)}
        for site in sorted(changed & set(self.state.encodings.frozen)):
            self.conflicts.append(Conflict(site, "its frozen encoding has another type and is dropped"))
        for site, text in self.types.items():
            spec = twin.plan.spec(site)
            if text != FLOAT and (spec is None or spec.bits != parse_type(text)[0]):
                row = next(r for r in twin.plan.table() if r.site == site)
                self.conflicts.append(Conflict(site, f"the target makes it {row.bits} ({row.reason}), not {text}"))
        found = tuple(dict.fromkeys(self.conflicts))
        if strict and (serious := [c for c in found if c.serious]):
            told = "; ".join(map(str, serious[:5])) + (f"; and {len(serious) - 5} more" if len(serious) > 5 else "")
            raise InputError(f"set_precision: {told}. Nothing was changed; strict=False does what can be done")
        return replace(twin, training=self.state.training), found


def _role(site: Site) -> str:
    if site.kind is SiteKind.ACTIVATION:
        return "activations"
    return "bias" if site.role is ParamRole.BIAS else "weights"


def _ops(graph: Graph, item: str | OpKind) -> tuple[list[Op], bool]:
    """The ops that an item stands for, and whether it names one of them alone."""
    if isinstance(item, OpKind):
        return [op for op in graph if op.kind is item], False
    if item in graph:
        return [graph.op(item)], True
    if item in graph.tensors or item in graph.params:
        return [], True
    if ARROW in item:
        return [graph.op(op) for op in ops_between(graph, item)], False
    if any(c in item for c in "*?["):
        found = [op for op in graph if fnmatch.fnmatchcase(op.id, item)]
    else:
        within = (f"{item}.", f"{item}/")
        found = [op for op in graph if op.id.startswith(within)] or [op for op in graph if item in (op.type, op.native)]
    return found, False


def end_of_fusion(graph: Graph, plan: Plan, tensor: TensorId) -> TensorId:
    """Where the values of a tensor are quantized first: itself, or the output of what is fused behind it."""
    seen = tensor
    while isinstance(plan[plan.root(seen)].decision, Float):
        user = graph.sole_consumer(seen)
        if user is None or len(user.outputs) != 1 or len(user.data_inputs) != 1:
            return tensor
        seen = user.output
    return seen
