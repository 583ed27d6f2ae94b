"""The one place that makes ONNX Runtime sessions."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitwright.backend import Batch, Tap, feed, given, picked, reduced, require_tensors
from bitwright.errors import BitwrightError, InputError, ModelError
from bitwright.files import Array
from bitwright_onnx.graph.collector import without_collection
from bitwright_onnx.graph.subgraph import extract, values_of
from bitwright_onnx.graph.tensors import INLINE_BYTES, LIBRARIES, byte_size, reason, tensor_array
from bitwright_onnx.simulate.blocked import blocked_session, unblocked
from bitwright_onnx.simulate.taps import TapOps

SIMULATION_CONFIG: Mapping[str, str] = {"session.disable_quant_qdq": "1"}
"""Keeps ONNX Runtime from fusing Q/DQ pairs into integer kernels: a simulation must compute in float."""

BLOCKED_BYTES = 2**28
"""Weights of a model whose sites may be blocked; beyond it, reading it back takes more time than it saves."""
BLOCKED_AFTER = 2.0
"""A session is made anew with blocked sites and taps once its runs have taken so many times as long as making it.

Making it anew takes two to three times as long as the first time, and a third of the time of each run is saved. Whoever
knows that many runs come asks for it at once, and the plain session isn't made."""
BRIEF_AFTER = 8.0
"""The same, of a session that may be dropped after a few runs: the one before it was."""
LEFT_OUT = ["MatMulScaleFusion"]
"""Optimizations that let a product read what a scaling of its operand reads, even where the scaled tensor is handed
out: another product than that of the tensor, which a segment is fed."""
_SHARED_TYPES = frozenset({"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
                           "uint32", "uint64", "bool"})  # fmt: skip


def session_options(config: Mapping[str, str] | None = None) -> ort.SessionOptions:
    """Quiet options; threads from BITWRIGHT_THREADS or OMP_NUM_THREADS, else ONNX Runtime's default (all cores).

    Raises:
        InputError: the variable isn't a whole number ≥ 0.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Between runs its threads wait busily by default, for a core that products of matrices are computed on then. Within
    # a run they go on doing so.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for variable in ("BITWRIGHT_THREADS", "OMP_NUM_THREADS"):
        if text := os.environ.get(variable):
            if not text.isdigit():
                raise InputError(f"{variable}={text!r} is not a number of threads; set it to 1, 2, … or unset it")
            options.intra_op_num_threads = int(text)
            break
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def compile_session(
    model: ir.Model,
    outputs: Sequence[str] = (),
    *,
    feeds: Sequence[str] | None = None,
    config: Mapping[str, str] | None = None,
    optimize: bool = True,
) -> ort.InferenceSession:
    """Compile the part of a model that computes `outputs`; the model isn't changed.

    Weights are passed by reference, so models of any size work and nothing is written to disk.

    Args:
        outputs: tensors of the main graph; default the model's own outputs.
        feeds: tensors to feed in place of the model's inputs (see `extract`).
        config: ONNX Runtime session configuration entries ("session.disable_quant_qdq": "1", …).
        optimize: whether ONNX Runtime may rewrite the graph.

    Raises:
        ModelError: unknown tensors, or ONNX Runtime refuses the model (the message names the op).
    """
    names = list(outputs) or [v.name for v in model.graph.outputs if v.name is not None]
    return _compile(extract(model, names, feeds), config=config, optimize=optimize)


def _compile(
    part: ir.Model,
    *,
    config: Mapping[str, str] | None,
    optimize: bool = True,
    blocked: bool = False,
    patterns: bool = True,
    arena: bool = True,
) -> ort.InferenceSession:
    options = _options(part, config)
    # By a pattern of the first run, the second takes all memory at once and anew, page by page: of a calibration, whose
    # runs are few, it takes twice the time.
    options.enable_mem_pattern = patterns
    # Arenas of several sessions that are open at a time, one for each stage of a network, add up. Without one, runs
    # take as long: the C library has kept what was freed.
    options.enable_cpu_mem_arena = arena
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Such sessions run once or twice, and an arena grows by powers of two for weights dequantized one by one.
        options.enable_cpu_mem_arena = False
    # What ONNX Runtime optimized is read back with its weights inside: where sites may stay blocked, none are shared.
    shared = {} if blocked else _big_weights(part)
    if shared:
        # The options hold no reference to the arrays, so the session below must.
        options.add_external_initializers(list(shared), list(shared.values()))
    handled = sys.exception()
    try:
        with _detached(part, shared), without_collection():
            proto = ir.to_proto(part).SerializeToString()
    except Exception as error:
        for inner in _chain(error, handled):
            if isinstance(inner, BitwrightError):  # of a weight that is read as it is written
                raise ModelError(str(inner)) from error
        raise ModelError(
            f"the model can't be serialized ({reason(error)}); more than 2 GB in subgraphs or in packed types "
            "is not supported"
        ) from error
    try:
        if blocked:
            again = _options(part, config)
            again.enable_mem_pattern = patterns
            return blocked_session(proto, options, again, LEFT_OUT)
        session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"], disabled_optimizers=LEFT_OUT)
    except Exception as error:
        raise ModelError(f"ONNX Runtime can't run the model: {reason(error)}{_hint(error)}") from error
    session.bitwright_weights = shared
    return session


def _chain(error: BaseException | None, handled: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: onnx-ir's own say only which of its functions was at work.

    Args:
        handled: what was being handled before; it and what is behind it have nothing to do with the error.
    """
    while error is not None and error is not handled:
        yield error
        error = error.__cause__ or error.__context__


def _options(part: ir.Model, config: Mapping[str, str] | None) -> ort.SessionOptions:
    """`session_options` with the model's libraries of custom ops.

    Raises:
        ModelError: one can't be loaded.
    """
    options = session_options(config)
    for library in part.graph.meta.get(LIBRARIES, ()):
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:
            raise ModelError(f"the custom-op library {library} can't be loaded: {reason(error)}") from error
    return options


@cache
def has_quantize_linear(opset: int) -> bool:
    """Whether the installed ONNX Runtime has QuantizeLinear of an opset: of the newest it may have other ops only."""
    x, scale = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([])) for n in ("x", "scale"))
    zero = ir.Value(name="zero", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([]))
    node = ir.node("QuantizeLinear", [x, scale, zero])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.UINT8)
    graph = ir.Graph([x, scale, zero], node.outputs, nodes=[node], opset_imports={"": opset}, name="probe")
    try:
        _compile(ir.Model(graph, ir_version=10), config=None)
    except ModelError:
        return False
    return True


def _big_weights(part: ir.Model) -> dict[str, ort.OrtValue]:
    """The values of big initializers, by name.

    Raises:
        ModelError: an initializer has no data.
    """
    shared: dict[str, ort.OrtValue] = {}
    for graph in part.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise ModelError(f"initializer {name!r} has no data")
            if graph is part.graph and byte_size(tensor) > INLINE_BYTES:
                array = tensor_array(tensor)
                if array.dtype.name in _SHARED_TYPES:
                    shared[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    return shared


@contextlib.contextmanager
def _detached(part: ir.Model, names: Container[str]) -> Iterator[None]:
    """Placeholders in the place of initializers of a part, for as long as it is written."""
    held = {value: value.const_value for name, value in part.graph.initializers.items() if name in names}
    try:
        for value, tensor in held.items():
            assert tensor is not None
            value.const_value = ir.ExternalTensor(
                "in-memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name)
            )
        yield
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def _hint(error: BaseException) -> str:
    text = str(error)
    if "is not a registered function/op" in text or "custom" in text.lower():
        return "; give the library that holds it: custom_ops=['/path/to/library.so']"
    if "Unsupported model IR version" in text or "opset" in text.lower():
        return "; a newer onnxruntime may run it"
    return ""


class OrtSession:
    """A model, or a segment of it, compiled for fixed taps (`bitwright.backend.Session`).

    Taps with reduction "minmax" are reduced inside the graph, so that two scalars (or two rows, with an axis)
    leave it in place of the tensor. ONNX Runtime's reductions skip NaN (infinities they keep), so the model's own
    outputs leave it whole: nearly every NaN gets there.

    Args:
        model: the model; it isn't changed.
        taps: model inputs, intermediate tensors or outputs.
        feeds: tensors to feed in place of the model's inputs.
        bound: further model inputs whose values don't come with the batch; read anew at each run, so that
            changing the mapping changes the next run.
        config: ONNX Runtime session configuration.
        sites: whether quantizers are among the model's ops.
        blocked: whether the session may be made anew, when it has run for a while (`BLOCKED_AFTER`), with sites and
            taps that take tensors in the layout of ONNX Runtime's convolutions (`blocked_session`): the same results
            sooner, from a session that takes three times as long to make. "at once": it is made so in the first place.
        brief: whether it may be dropped after a few runs (`BRIEF_AFTER`).

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds, or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        taps: Sequence[Tap],
        *,
        feeds: Sequence[str] | None = None,
        bound: Mapping[str, Array] | None = None,
        config: Mapping[str, str] | None = None,
        sites: bool = False,
        blocked: bool | Literal["at once"] = False,
        brief: bool = False,
    ) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        self._bound = bound if bound is not None else {}
        known = values_of(model.graph)
        require_tensors((*(t.tensor for t in self.taps), *(feeds or ())), known)
        results = {v.name for v in model.graph.outputs}
        sources = set(feeds) if feeds is not None else {v.name for v in model.graph.inputs}
        self._passed = {t: t.tensor for t in self.taps if t.tensor in sources}
        computed = [t for t in self.taps if t not in self._passed]
        self._fetch: dict[Tap, tuple[str, ...]] = {}
        self._first: dict[Tap, str] = {}
        """Inputs that say which the first sample of a tap's tensor is."""
        self._channels: dict[Tap, int] = {}
        """Of what is picked in the graph."""
        self._session: ort.InferenceSession | None = None
        self._blocked: Callable[[], ort.InferenceSession] | None = None
        self._left = 0.0
        self._inputs: dict[str, Input] = {}
        if computed:
            # A feed that no tap depends on is dropped, so that run() needs only what is used.
            part = extract(model, list(dict.fromkeys(t.tensor for t in computed)), feeds)
            values = values_of(part.graph)
            part.graph.outputs.clear()
            ops = TapOps(part)
            reduces = any(map(_in_graph, computed))
            # ONNX Runtime begins with what the last of the nodes without readers needs. When that is the tap of the
            # first tensor, and so on, each runs soon behind its tensor, which is let go then: for extremes in
            # MobileNetV2 a third of the memory, and half of the time of a session's first run.
            for tap in reversed(computed):
                if tap.places is not None and (counter := ops.picked(values[tap.tensor], tap)) is not None:
                    outputs, first = counter
                    self._first[tap] = str(first.name)
                    self._channels[tap] = ops.channels(values[tap.tensor], tap)
                else:
                    plain = tap.step == 1 and not reduces if tap.reduce == "none" else tap.tensor in results
                    outputs = [values[tap.tensor]] if plain else ops.made(values[tap.tensor], tap)
                self._fetch[tap] = tuple(str(v.name) for v in outputs)
                part.graph.outputs.extend(v for v in outputs if v not in part.graph.outputs)
            for value in [v for v in part.graph.inputs if not v.uses() and not v.is_graph_output()]:
                part.graph.inputs.remove(value)
            if blocked and _may_be_blocked(part) and (sites or reduces):
                self._blocked = partial(_compile, part, config=config, blocked=True, patterns=not reduces)
                if blocked == "at once":
                    self._make_blocked(self._blocked)
            if self._session is None:
                begin = time.perf_counter()
                self._session = _compile(part, config=config, patterns=not reduces, arena=feeds is None)
                self._left = (BRIEF_AFTER if brief else BLOCKED_AFTER) * (time.perf_counter() - begin)
            self._inputs = inputs_of(self._session)
        for name in self._first.values():
            del self._inputs[name]
        self._fed = tuple(self._inputs)
        for name in self._passed.values():
            dtype = known[name].dtype
            self._inputs.setdefault(name, Input(name, None if dtype is None else _dtype(dtype.name.lower())))
        self._outputs = list(dict.fromkeys(n for names in self._fetch.values() for n in names))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tensors that `run` must be given (bound ones left out)."""
        return tuple(n for n in self._inputs if n not in self._bound)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch; arrays that the taps don't depend on are ignored.

        Raises:
            InputError: a needed array is missing, or has the wrong dtype, rank or shape.
            ModelError: an op failed while running.
        """
        return self.run_at(batch, {})

    def run_at(self, batch: Batch, first: Mapping[Tap, int]) -> dict[Tap, Array]:
        """See `bitwright.backend.PickingSession`.

        Raises:
            InputError: a needed array is missing, or has the wrong dtype, rank or shape.
            ModelError: an op failed while running.
        """
        if self._blocked is not None and self._left <= 0:
            self._make_blocked(self._blocked)
        bound = self._bound
        feeds = {n: np.asarray(bound[n]) if n in bound else i.of(batch) for n, i in self._inputs.items()}
        fetched: dict[str, Array] = {}
        if self._session is not None:
            given = {n: feeds[n] for n in self._fed}
            given |= {name: np.array(first[tap], np.int64) for tap, name in self._first.items()}
            begin = time.perf_counter()
            try:
                fetched = dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))
            except Exception as error:
                shapes = ", ".join(
                    f"{n} {v.dtype}{list(v.shape)}" for n, v in given.items() if isinstance(v, np.ndarray)
                )
                kind = InputError if "INVALID_ARGUMENT" in str(error) else ModelError
                raise kind(f"running the model on {shapes} failed: {reason(error)}") from error
            self._left -= time.perf_counter() - begin
        results: dict[Tap, Array] = {}
        for tap in self.taps:
            if tap in self._passed:
                value = feeds[tap.tensor]
                results[tap] = reduced(value, tap) if tap.places is None else picked(value, tap, first[tap])
            elif tap in self._first:
                results[tap] = unblocked(fetched[self._fetch[tap][0]], self._channels[tap])
            elif len(names := self._fetch[tap]) == 1:
                value = fetched[names[0]]
                if not isinstance(value, np.ndarray):  # a sequence inside of the model, on its way to another segment
                    results[tap] = value
                    continue
                if tap.reduce == "minmax" and tap.axis is None and names[0] != tap.tensor:
                    results[tap] = np.array([0, value.max(initial=-np.inf)], np.float32)
                    continue
                # A thinned tensor arrives thinned, unless its rank or its size isn't known to the graph.
                done = tap.step > 1 and names[0] != tap.tensor
                if tap.places is not None:
                    results[tap] = picked(value, tap, first[tap])
                else:
                    results[tap] = value if done else reduced(value, tap)
                if tap.reduce == "minmax" and names[0] != tap.tensor:
                    results[tap][0] = 0.0
            else:
                low, high = (fetched[n] for n in names[:2])
                results[tap] = np.stack([low, high]).astype(np.float32, copy=False)
        return results

    def _make_blocked(self, made: Callable[[], ort.InferenceSession]) -> None:
        # It only saves time: whatever stands against it, such as no space for a file, leaves the session that runs.
        with contextlib.suppress(ModelError):
            self._session = made()
        self._blocked = None


def _in_graph(tap: Tap) -> bool:
    """Whether ops are made of a tap that read blocks as well."""
    return tap.step > 1 or tap.places is not None or (tap.reduce == "minmax" and tap.axis is None)


def _may_be_blocked(part: ir.Model) -> bool:
    """Whether ONNX Runtime may block convolutions, of a model whose weights may be written and read once."""
    weights = sum(byte_size(v.const_value) for v in part.graph.initializers.values() if v.const_value is not None)
    return weights <= BLOCKED_BYTES and any(node.op_type == "Conv" for node in part.graph)


@dataclass(frozen=True)
class Input:
    """What ONNX Runtime is fed under one name.

    Attributes:
        name: of the tensor.
        dtype: numpy's; None for sequences and for types that numpy doesn't know: they are fed as they are given.
        shape: None for free dimensions, or as a whole where the rank isn't known.
    """

    name: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int | None, ...] | None = None

    def of(self, batch: Batch) -> Any:
        """The batch's array, as the model takes it.

        Raises:
            InputError: it is missing or doesn't fit.
        """
        if self.dtype is None:
            return given(batch, self.name)
        if self.dtype.kind in "OUS":
            return np.asarray(given(batch, self.name))
        return feed(batch, self.name, self.dtype.name, self.shape)


def inputs_of(session: ort.InferenceSession) -> dict[str, Input]:
    """What a compiled session is fed."""
    found = {}
    for i in session.get_inputs():
        shape = tuple(n if isinstance(n, int) else None for n in i.shape)
        found[i.name] = Input(i.name, _dtype(i.type), shape or None)  # () stands for unknown ranks too
    return found


def _dtype(kind: str) -> np.dtype[Any] | None:
    name = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64", "string": "object"}.get(name, name))
    except TypeError:
        return None


def segment(model: ir.Model, feeds: Sequence[str], taps: Sequence[Tap]) -> OrtSession:
    """Compile only what lies between `feeds` and `taps` (`bitwright.backend.PartialExecution`).

    Raises:
        ModelError: a tap can't be computed from the feeds alone.
    """
    return OrtSession(model, taps, feeds=feeds)
