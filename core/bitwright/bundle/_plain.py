"""The session that users run: an exported quantized model under a runtime's default options, on any host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bitwright.backend import Batch, Bundle, Session, Tap
from bitwright.bundle._outputs import PLAIN, PLAIN_INTEGER, OutputPair, OutputSums, classes_of
from bitwright.graph import TensorId
from bitwright.plugins import registry

QDQ = "qdq"
"""Purpose, in a bundle, of the files that plain sessions open."""
TOLERATED_DB = 1.0
"""By how much a plain session's outputs may be worse than promised before it is a problem."""


@dataclass(frozen=True)
class PairRisk:
    """A weight whose kernel can saturate on some hosts.

    Attributes:
        weight: the site.
        op: the op that multiplies with it.
        channels, of: how many output channels can, of how many.
    """

    weight: str
    op: str
    channels: int
    of: int


@dataclass(frozen=True)
class PlainRisks:
    """What a default session may compute otherwise than the file says.

    Attributes:
        pairs: weights whose products can saturate on x64 without VNNI (or wrap around on ARM without dot products).
        rounded: weights whose inputs the runtime rounds to 8 bits.
        exact_option, float_option: what its users set against the one and the other, in words.
    """

    pairs: tuple[PairRisk, ...] = ()
    rounded: tuple[str, ...] = ()
    exact_option: str = ""
    float_option: str = ""


@runtime_checkable
class PlainRuntime(Protocol):
    """What a backend may offer whose exports run in a runtime with options that change the result."""

    def plain_session(self, bundle: Bundle) -> Session:
        """The bundle's quantized artefact under the runtime's default options; its outputs only."""

    def plain_risks(self, bundle: Bundle) -> PlainRisks:
        """What can differ there, on any host, from the artefact alone."""

    def keep_exact(self, bundle: Bundle) -> tuple[str, ...]:
        """Rewrite the artefact, its values unchanged, so that no host saturates; the weights that were stored anew."""


@runtime_checkable
class HostNotes(Protocol):
    """What a backend has to say of the host that it runs on, for `bitwright doctor`."""

    def host_notes(self) -> tuple[str, ...]:
        """One line each."""


class PlainView(BaseModel):
    """A default session's figures, for `verify`; those of each output are in `OutputFigures` ("plain_float").

    Attributes:
        accuracy: top-1 as a fraction, of the first output; None without labels.
        agreement, sqnr_db: of the first output with numbers, against float: share of equal argmax (None where a sample
            has one value), and signal to noise.
        differs: share of all outputs' values that aren't those of the session with options.
        layers, channels: how many weights, and output channels of them, can saturate on hosts without VNNI.
        weights: their names.
        rounded: weights whose inputs are rounded to 8 bits.
        proof: in a sentence, whether sums can saturate, whatever this host does.
        rounding: in a sentence, what happens to inputs that are wider than 8 bits; empty where nothing does.
        problem: what is wrong on this host; empty if all is well.
    """

    model_config = ConfigDict(frozen=True)

    accuracy: float | None = None
    agreement: float | None
    sqnr_db: float
    differs: float
    layers: int = 0
    channels: int = 0
    weights: list[str] = []
    rounded: list[str] = []
    proof: str = ""
    rounding: str = ""
    problem: str = ""


def keep_exact(bundle: Bundle) -> Bundle:
    """The bundle with its quantized artefacts rewritten so that plain sessions are exact on any host.

    Values and grids stay; a weight that could saturate is stored in another type (`Bundle.stored_anew` names it).
    """
    moved: list[str] = []
    for purpose, path in bundle.files.items():
        if purpose.split("/")[0] == QDQ and (runtime := _runtime(path)) is not None:
            moved += runtime.keep_exact(Bundle({QDQ: path}))
    return replace(bundle, stored_anew=(*bundle.stored_anew, *moved))


def plain_session(bundle: Bundle, outputs: Sequence[TensorId]) -> Session | None:
    """A default session that hands out the model's outputs; None where no runtime has other options.

    Args:
        bundle: what `verify` runs.
        outputs: of the model.

    Raises:
        InputError, ModelError: the runtime refuses the artefact.
    """
    if QDQ not in bundle.files or (runtime := _runtime(bundle.files[QDQ])) is None:
        return None
    return _Outputs(runtime.plain_session(bundle), bundle, tuple(dict.fromkeys(outputs)))


@dataclass(frozen=True)
class _Outputs:
    """A session under the names of the model's outputs: a file may list them in another order and under others."""

    session: Session
    bundle: Bundle
    outputs: tuple[TensorId, ...]

    def run(self, batch: Batch) -> Mapping[Tap, NDArray[Any]]:
        """The outputs that the file has; a single one whatever it is called."""
        found = {tap.tensor: v for tap, v in self.session.run(batch).items()}
        if len(found) == len(self.outputs) == 1:
            return {Tap(self.outputs[0]): next(iter(found.values()))}
        handed: dict[Tap, NDArray[Any]] = {}
        for output in self.outputs:
            names = (output, self.bundle.names.get(output, output), output.removesuffix(":0"))
            if (name := next((n for n in names if n in found), None)) is not None:
                handed[Tap(output)] = found[name]
        return handed


def _runtime(path: Path) -> PlainRuntime | None:
    """The backend that opens a quantized artefact, if its runtime has options that change the result."""
    backend = registry.backend_for_path(path)
    return backend if isinstance(backend, PlainRuntime) else None


def plain_view(
    bundle: Bundle, graph_outputs: Sequence[TensorId], seen: OutputSums, labels: NDArray[np.integer] | None
) -> PlainView | None:
    """The figures of a default session; None where there was none, or no output has numbers.

    Args:
        bundle: what was run.
        graph_outputs: of the model.
        seen: of "float", "integer" (the session with options) and "plain", over the same samples.
        labels: class of each sample.
    """
    compared = [t for t in dict.fromkeys(graph_outputs) if PLAIN_INTEGER in seen.pairs[t]]
    compared = [t for t in compared if (pair := seen.pairs[t][PLAIN_INTEGER]).compared and pair.numeric]
    if not compared or QDQ not in bundle.files or (runtime := _runtime(bundle.files[QDQ])) is None:
        return None
    risks = runtime.plain_risks(bundle)
    own = seen.pairs[compared[0]]["plain_float"]
    beside = [seen.pairs[t][PLAIN_INTEGER] for t in compared]
    values = sum(p.values for p in beside)
    plain = None if labels is None or PLAIN not in seen.first else classes_of(seen.first[PLAIN])
    return PlainView(
        accuracy=None if labels is None or plain is None else float((plain == labels[: len(plain)]).mean()),
        agreement=own.alike / own.count if own.count else None,
        sqnr_db=_figure(own),
        differs=sum(p.different for p in beside) / values if values else 0.0,
        layers=len(risks.pairs),
        channels=sum(r.channels for r in risks.pairs),
        weights=[r.weight for r in risks.pairs],
        rounded=list(risks.rounded),
        proof=_proof(risks),
        rounding=_rounding(risks),
        problem=_problem(risks, {t: seen.pairs[t] for t in compared}),
    )


def _figure(pair: OutputPair) -> float:
    """Decibels; far below zero where there is noise and the signal is nothing but zeros."""
    known = pair.decibels
    if known is not None:
        return known
    return float("-inf") if np.isinf(pair.noise) else 10 * float(np.log10(1e-300 / pair.noise))


def _proof(risks: PlainRisks) -> str:
    if not risks.pairs:
        return "no sum of products can saturate in a plain session, on any host"
    channels = sum(r.channels for r in risks.pairs)
    return (
        f"{channels} output channels of {len(risks.pairs)} layers can saturate in plain sessions on CPUs without VNNI "
        f"({risks.pairs[0].weight!r} first): export with --plain-session or for a target with pair_sum_bits, or "
        f"set {risks.exact_option}"
    )


def _rounding(risks: PlainRisks) -> str:
    if not risks.rounded:
        return ""
    return (
        f"plain sessions round the inputs of {len(risks.rounded)} weights to 8 bits "
        f"({risks.rounded[0]!r} first): set {risks.float_option} for float32"
    )


def _problem(risks: PlainRisks, outputs: Mapping[TensorId, Mapping[str, OutputPair]]) -> str:
    """Of the outputs that a plain session gets worse than promised, the one that loses most."""
    if risks.rounded and not risks.pairs:
        return ""
    worse: dict[TensorId, tuple[float, float]] = {}
    for tensor, pairs in outputs.items():
        plain, promised = _figure(pairs["plain_float"]), _figure(pairs["integer_float"])
        if pairs[PLAIN_INTEGER].different and plain < promised - TOLERATED_DB:
            worse[tensor] = plain, promised
    if not worse:
        return ""
    tensor = min(worse, key=lambda t: worse[t][0] - min(worse[t][1], 1e3))
    plain, promised = worse[tensor]
    named = f" in output {tensor!r}" if len(outputs) > 1 else ""
    return (
        f"a session with default options gives {plain:.1f} dB on this host{named}, {promised:.1f} are promised: export "
        f"with --plain-session, or set {risks.exact_option}"
    )
