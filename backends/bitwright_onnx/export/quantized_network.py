"""A QDQ file run op by op in float, as ONNX says: what the file means, rather than what integer kernels make of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from bitwright.backend import Batch, Tap, given
from bitwright.errors import CapabilityError, ModelError, first_line
from bitwright.files import Array
from bitwright.graph import TensorId
from bitwright_onnx.export.qdq import NAMES
from bitwright_onnx.export.runtime import load_quantized
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.simulate.session import SIMULATION_CONFIG, compile_session, inputs_of

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "com.microsoft"})
"""Of ops that ONNX Runtime has without a library."""


class QuantizedFile:
    """`bitwright.backend.QuantizedNetwork` of a QDQ file.

    Raises:
        InputError: there is no such file, or it isn't an ONNX model.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._model = load_quantized(self._path)
        self._names: dict[str, str] = json.loads(self._model.metadata_props.get(NAMES, "{}"))
        self._known = frozenset(values_of(self._model.graph))
        own = {f.domain for f in self._model.functions.values()}
        self._foreign = sorted({n.domain for n in self._model.graph} - own - KNOWN_DOMAINS)
        self.tensors: frozenset[TensorId] = self._known | {s for s, n in self._names.items() if n in self._known}
        self.inputs: tuple[TensorId, ...] = tuple(str(v.name) for v in self._model.graph.inputs)

    def session(self, taps: Sequence[Tap]) -> _Run:
        """Compiled for the file's own inputs.

        Raises:
            ModelError: a tap is unknown, or ONNX Runtime refuses the model.
            CapabilityError: it has custom ops, whose library isn't known.
        """
        return self._compiled({t: self._of(t.tensor) for t in taps}, None)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> _Run:
        """Compiled for what lies between; a site is fed in the place of its dequantized tensor.

        Raises:
            ModelError: a name is unknown, a tap can't be computed from the feeds alone, or ONNX Runtime refuses it.
            CapabilityError: it has custom ops, whose library isn't known.
        """
        return self._compiled({t: self._of(t.tensor) for t in taps}, {t: self._of(t) for t in feeds})

    def _compiled(self, taps: dict[Tap, str], feeds: dict[TensorId, str] | None) -> _Run:
        try:
            return _Run(self._model, taps, feeds)
        except ModelError as error:
            if not self._foreign:
                raise
            raise CapabilityError(
                f"{self._path.name} has ops of the domain {self._foreign[0]!r}, and a file doesn't say which library "
                f"they are in: {error}"
            ) from error

    def _of(self, tensor: TensorId) -> str:
        name = self._names.get(tensor, tensor)
        if name not in self._known:
            raise ModelError(f"the quantized model {self._path.name!r} has no tensor {tensor!r}")
        return name


class _Run:
    def __init__(self, model: ir.Model, taps: dict[Tap, str], feeds: dict[TensorId, str] | None) -> None:
        self._taps, self._feeds = taps, feeds
        given = {str(v.name) for v in model.graph.inputs} if feeds is None else set(feeds.values())
        self._computed = [n for n in dict.fromkeys(taps.values()) if n not in given]
        self._passed = {n: n for n in taps.values() if n in given}
        if feeds is not None:
            self._passed = {name: site for site, name in feeds.items() if name in self._passed}
        self._session = None
        if self._computed:
            fed = None if feeds is None else list(dict.fromkeys(feeds.values()))
            self._session = compile_session(model, self._computed, feeds=fed, config=SIMULATION_CONFIG, optimize=False)
            self._inputs = inputs_of(self._session)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed a batch by the names that were asked for."""
        values = dict(batch) if self._feeds is None else {n: batch[s] for s, n in self._feeds.items() if s in batch}
        found: dict[str, Array] = {name: given(batch, source) for name, source in self._passed.items()}
        if self._session is not None:
            feeds = {n: i.of(values) for n, i in self._inputs.items()}
            try:
                fetched = self._session.run(self._computed, feeds)
            except Exception as error:
                raise ModelError(f"the quantized model can't be run: {first_line(error)}") from error
            found |= dict(zip(self._computed, fetched, strict=True))
        return {tap: found[name] for tap, name in self._taps.items()}
