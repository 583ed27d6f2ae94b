"""The session that users run: an exported quantized model under a runtime's default options, on any host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bitwright.backend import Batch, Bundle, Session
from bitwright.bundle._outputs import classes_of
from bitwright.data import Dataset, joined
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
    """A default session's figures, for `verify`.

    Attributes:
        accuracy: top-1 as a fraction; None without labels.
        agreement, sqnr_db: share of equal argmax (None where a sample has one value), and of the output, against float.
        differs: share of output values that aren't those of the session with options.
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


def seen_plain(
    bundle: Bundle,
    dataset: Dataset,
    output: TensorId,
    outputs: Mapping[str, NDArray[Any]],
    labels: NDArray[np.integer] | None,
    sqnr_db: Callable[[NDArray[Any], NDArray[Any]], float],
) -> PlainView | None:
    """A default session on data that other views have been run on; None where no runtime has other options.

    Args:
        bundle: what `verify` runs.
        dataset: the samples.
        output: the model's output that is compared.
        outputs: its values in "float" and "integer" (the session with options) over them.
        labels: class of each sample.
        sqnr_db: how signal and noisy are compared.
    """
    if QDQ not in bundle.files or (runtime := _runtime(bundle.files[QDQ])) is None:
        return None
    session = runtime.plain_session(bundle)
    # A file may list its outputs in another order than the model, and TensorFlow's names end in ":0".
    names = {output, bundle.names.get(output, output), output.removesuffix(":0")}

    def values(batch: Batch) -> NDArray[Any]:
        found = {tap.tensor: v for tap, v in session.run(batch).items()}
        return np.asarray(found[next((t for t in found if t in names), next(iter(found)))])

    parts = [values(batch) for batch in dataset]
    views = {**outputs, "plain": joined(parts)}
    figures = {view: sqnr_db(views["float"], views[view]) for view in ("integer", "plain")}
    return plain_view(runtime.plain_risks(bundle), views, figures, labels)


def _runtime(path: Path) -> PlainRuntime | None:
    """The backend that opens a quantized artefact, if its runtime has options that change the result."""
    backend = registry.backend_for_path(path)
    return backend if isinstance(backend, PlainRuntime) else None


def plain_view(
    risks: PlainRisks,
    outputs: Mapping[str, NDArray[Any]],
    sqnr_db: Mapping[str, float],
    labels: NDArray[np.integer] | None,
) -> PlainView:
    """The figures of a default session.

    Args:
        risks: what the artefact's codes allow.
        outputs: of "float", "integer" (with options) and "plain", over the same samples.
        sqnr_db: of "integer" and "plain" against float.
        labels: class of each sample.
    """
    plain, reference = (classes_of(outputs[v]) for v in ("plain", "float"))
    one, other = outputs["plain"], outputs["integer"]
    both = np.isnan(one) & np.isnan(other) if one.dtype.kind == "f" else False  # NaN in both is not a difference
    differs = float(((one != other) & ~np.asarray(both)).mean()) if one.size else 0.0
    return PlainView(
        accuracy=None if labels is None or plain is None else float((plain == labels[: len(plain)]).mean()),
        agreement=None if plain is None or reference is None else float((plain == reference).mean()),
        sqnr_db=sqnr_db["plain"],
        differs=differs,
        layers=len(risks.pairs),
        channels=sum(r.channels for r in risks.pairs),
        weights=[r.weight for r in risks.pairs],
        rounded=list(risks.rounded),
        proof=_proof(risks),
        rounding=_rounding(risks),
        problem=_problem(risks, differs, sqnr_db),
    )


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


def _problem(risks: PlainRisks, differs: float, sqnr_db: Mapping[str, float]) -> str:
    plain, promised = sqnr_db["plain"], sqnr_db["integer"]
    if differs == 0 or plain >= promised - TOLERATED_DB or (risks.rounded and not risks.pairs):
        return ""
    return (
        f"a session with default options gives {plain:.1f} dB on this host, {promised:.1f} are promised: export with "
        f"--plain-session, or set {risks.exact_option}"
    )
