"""Running a captured model, or a part of it, to hand out tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from bitwright.backend import Batch, Reduction, Tap, check_shape, fed, given, not_computable, require_tensors
from bitwright.backend import handed_out as handed_out_of
from bitwright.errors import ModelError, first_line
from bitwright.files import Array
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import NAMES, CapturedModel, compile_graph, device_of, info, program_of
from bitwright_torch.graph.modes import is_flag
from bitwright_torch.simulate.spent import SPENT, mark

aten = torch.ops.aten


class TorchSession:
    """A model, or a segment of it, prepared for fixed taps (`bitwright.backend.Session`).

    Runs in inference mode, with batch norms and dropouts as in evaluation, on the device of the model's parameters.
    Taps with reduction "minmax" are reduced there, so that only two scalars (or two rows) come back.

    Args:
        root: what the graph's `get_attr` nodes are read from, at each run: changed parameters show.
        graph: the graph that the tensors are nodes of.
        tensors: activation → node.
        taps: what to hand out.
        feeds: tensors to feed in place of the model's inputs.

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        tensors: Mapping[str, fx.Node],
        taps: Sequence[Tap],
        feeds: Sequence[str] | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        require_tensors((*(t.tensor for t in self.taps), *(feeds or ())), tensors)
        self._root = root
        sources = {n for n in graph.nodes if n.op == "placeholder"} if feeds is None else {tensors[f] for f in feeds}
        wanted = list(dict.fromkeys(t.tensor for t in self.taps))
        part, self._needed = extract(graph, [tensors[t] for t in wanted], sources)
        self._constants = {n: v for n, v in (constants or {}).items() if n in self._needed}
        self._shapes = {info(n).tensor: (info(n).shape, info(n).dtype) for n in sources}
        _reduce(part, wanted, self.taps)
        self._function = compile_graph(part)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tensors that `run` must be given."""
        return tuple(n for n in self._needed if n not in self._constants)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch; arrays that the taps don't depend on are ignored.

        Raises:
            InputError: a needed array is missing, or has the wrong dtype or shape.
            ModelError: an op failed while running.
        """
        device = device_of(self._root)
        leaves = [
            self._constants[n] if n in self._constants else leaf(batch, n, *self._shapes[n], device)
            for n in self._needed
        ]  # fmt: skip
        try:
            with torch.inference_mode():
                values = self._function(self._root, *leaves)
                return {tap: value.cpu().numpy() for tap, value in zip(self.taps, values, strict=True)}
        except Exception as error:
            given = ", ".join(f"{n} {np.shape(v)}" for n, v in zip(self._needed, leaves, strict=True))
            raise ModelError(f"running the model on {given} failed: {first_line(error)}") from error


def leaf(
    batch: Batch, name: str, shape: Sequence[int | None] | None, wanted: str, device: torch.device
) -> torch.Tensor:
    """What a batch holds for a tensor that is fed, of the type and on the device that it is wanted in.

    Raises:
        InputError: it is missing, or has the wrong dtype or shape.
    """
    value: Any = given(batch, name)
    dtype = getattr(torch, wanted)
    known = isinstance(value, torch.Tensor) and (
        value.dtype == dtype or value.is_floating_point() == dtype.is_floating_point
    )
    tensor = as_tensor(value if known else fed(value, wanted, name)).to(dtype)
    check_shape(name, tensor.shape, shape)
    return tensor.to(device)


def as_tensor(given: Any) -> torch.Tensor:
    """A tensor as it is, or of an array, whose memory it shares where the array may be written to.

    The order of its values in memory is kept: by it PyTorch chooses between kernels that differ in last bits.
    """
    if isinstance(given, torch.Tensor):
        return given
    array = np.asarray(given)
    shared = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if shared else array.copy(order="K"))


def _reduce(graph: fx.Graph, wanted: Sequence[str], taps: Sequence[Tap]) -> None:
    """Reduce tensors right after they are computed, while caches hold them, so that none outlives its last reader.

    Args:
        graph: its output is the list of the wanted tensors; afterwards, of what the taps hand out.
        wanted: their names.
        taps: what is asked of them.
    """
    nodes: dict[str, fx.Node] = dict(zip(wanted, graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    results = []
    for tap in taps:
        node = nodes[tap.tensor]
        after = last if node.op == "placeholder" else node
        assert after is not None
        with graph.inserting_after(after):
            results.append(graph.call_function(handed_out, (node, tap.reduce, tap.axis, tap.step)))
    graph.output_node().args = (results,)


class _Taps:
    """`bitwright.backend._sessions.TapNamespace` of torch."""

    zeros_like = staticmethod(torch.zeros_like)
    shape = staticmethod(lambda x: tuple(x.shape))
    second = staticmethod(lambda x, axis: x.movedim(axis, 1))
    highest = staticmethod(lambda x, axes: x.amax(axes or ()))
    extremes = staticmethod(lambda x, axes: torch.aminmax(x) if axes is None else (x.amin(axes), x.amax(axes)))
    pair = staticmethod(lambda low, high: torch.stack([low, high]).float())
    by_sample = staticmethod(lambda x: x.reshape(len(x), -1))
    every = staticmethod(lambda x, step: x[:, ::step].contiguous())
    take = staticmethod(lambda x, places: x.index_select(1, torch.from_numpy(places).to(x.device)))


def handed_out(value: torch.Tensor, reduction: Reduction, axis: int | None, step: int) -> torch.Tensor:
    """What a tap makes of its tensor, on the tensor's device (see `Tap`); a graph holds no `Tap`, but its fields."""
    value = handed_out_of(_Taps, value, Tap("", reduction, axis, step))
    return value.float() if value.dtype == torch.bfloat16 else value


def extract(graph: fx.Graph, wanted: Sequence[fx.Node], sources: set[fx.Node]) -> tuple[fx.Graph, tuple[str, ...]]:
    """The part of a graph between some nodes and others, with its modes fixed to evaluation.

    Sizes that the part needs are taken from any source that has them.

    Returns:
        A graph whose placeholders are the sources that it needs, and whose output is the list of wanted values; and
        the sources' tensor names.

    Raises:
        ModelError: a wanted node depends on a model input that is not a source.
    """
    sizes = {s: (n, i) for n in sources for i, s in enumerate(info(n).sizes) if info(n).shape is not None}
    cut: dict[fx.Node, tuple[fx.Node, int]] = {}
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node in sources:
            continue
        about = info(node)
        if node.op == "call_function" and about.shape is None and len(about.sizes) == 1 and about.sizes[0] in sizes:
            cut[node] = sizes[about.sizes[0]]
            needed.add(cut[node][0])
            continue
        if node.op == "placeholder" and about.shape is not None:
            ends, starts = ((info(n).tensor for n in nodes) for nodes in (wanted, sources))
            raise not_computable(ends, starts, [about.tensor])
        stack.extend(node.all_input_nodes)
    part = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names: list[str] = []
    ordered = [n for n in graph.nodes if n in needed]
    for node in sorted(ordered, key=lambda n: not (n in sources or n.op == "placeholder")):
        if node in sources or node.op == "placeholder":
            values[node] = part.placeholder(node.name)
            values[node].meta[NAMES] = info(node)
            names.append(info(node).tensor)
        elif node in cut:
            source, axis = cut[node]
            values[node] = part.call_function(aten.sym_size.int, (values[source], axis))
        elif is_flag(node):
            values[node] = False
        else:
            values[node] = part.node_copy(node, lambda n: values[n])
    part.output([values[n] for n in wanted])
    mark(n for n in part.nodes if SPENT in n.kwargs)  # what is handed out, or fed, has another reader
    return part, tuple(names)


def open_session(model: CapturedModel, taps: Sequence[Tap], feeds: Sequence[str] | None = None) -> TorchSession:
    """Prepare a float model for its taps; fused attention is spelled out only if something inside is asked for.

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds.
    """
    found = canonical(model)
    graph, tensors = found.lowered, found.tensors
    own = {info(n).tensor: n for n in program_of(model).graph.nodes if n.op in ("placeholder", "call_function")}
    if all(name in own for name in (*(t.tensor for t in taps), *(feeds or ()))):
        graph, tensors = program_of(model).graph, {t: own[t] for t in found.tensors if t in own}
    convention, prefix = program_of(model).convention, program_of(model).prefix
    constants = {prefix + convention.names[i]: v for i, v in convention.constants.items()}
    return TorchSession(model, graph, tensors, taps, feeds, constants)
