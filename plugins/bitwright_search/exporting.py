"""Writes what a search found: the bundle, the run's report, and the search's own document and page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bitwright.backend import Bundle
from bitwright.bank import Bank
from bitwright.bundle import ARRAYS_SUFFIX, Formats, chosen_formats, refuse_planned
from bitwright.data import Dataset, image_options_of
from bitwright.files import make_directory, write_text
from bitwright.report import Accuracy, Calibration, complete_report
from bitwright.simulation import QuantSim
from bitwright_search.evaluation import Evaluate, Labelled


class Found(Protocol):
    """What a search hands out."""

    sim: QuantSim

    @property
    def score(self) -> float | None:
        """Of the network, where it was evaluated."""

    @property
    def float_score(self) -> float | None:
        """Of the float model."""

    seconds: float
    target: str
    bundle: Bundle | None
    files: dict[str, Path]

    def to_json(self) -> str:
        """All of it."""


F = TypeVar("F", bound=Found)


def write(
    result: F,
    render: Callable[[F, str], str],
    out: Path,
    name: str | None,
    model: Any,
    data: Dataset,
    evaluate: Evaluate | None,
    version: str,
    plain_session: bool | None = None,
    formats: Formats | None = None,
    *,
    tool: str,
    document: str,
) -> None:
    """Export the best network to a folder, with what was found as JSON and as a page; note the files in the result.

    Args:
        result: of the search.
        render: makes the page, from the result and a title.
        out: the folder.
        name: of the files; None for the model's own.
        model: as it was given.
        data: that it was calibrated on.
        evaluate: that gave the scores; top-1 goes into the run's report, where `bitwright report` and `diff` find it.
        version: of the encodings file.
        plain_session, formats: see `QuantSim.export`.
        tool: its name in the report's seconds.
        document: the stem of the JSON file and the page.

    Raises:
        InputError: the folder can't be written.
    """
    make_directory(out)
    stem, result.bundle, files = export_network(
        result.sim, out, name, model, data, version, {tool: result.seconds}, plain_session=plain_session,
        formats=formats, accuracy=_accuracy(result, evaluate),
    )  # fmt: skip
    json_file, page = (out / f"{document}{suffix}" for suffix in (".json", ".html"))
    write_text(json_file, result.to_json())
    write_text(page, render(result, f"{stem} on {result.target}"))
    purpose = document.replace("_", " ")
    result.files = {**files, purpose: json_file, f"{purpose} page": page}


def _accuracy(result: Found, evaluate: Evaluate | None) -> Accuracy | None:
    if not isinstance(evaluate, Labelled) or result.score is None or result.float_score is None:
        return None
    return Accuracy(samples=len(evaluate.labels), float_model=result.float_score, simulated=result.score)


def export_network(
    sim: QuantSim,
    out: Path,
    name: str | None,
    model: Any,
    data: Dataset,
    version: str,
    seconds: Mapping[str, float],
    *,
    plain_session: bool | None = None,
    formats: Formats | None = None,
    accuracy: Accuracy | None = None,
) -> tuple[str, Bundle, dict[str, Path]]:
    """The bundle and ``report.json``, which `bitwright verify` reads.

    Returns:
        The files' stem, the bundle, and every file by purpose.
    """
    model, stem = named_model(model, name)
    named = isinstance(model, str | Path)
    if sim.reference is None and not isinstance(data, Bank):
        sim.attach(reference=sim.remembering(data).taken())
    bundle = sim.export(out, name=stem, encodings_version=version, plain_session=plain_session, formats=formats)
    json_file, page = complete_report(
        out,
        stem,
        source=Path(model).name if named else type(model).__name__,
        calibration=Calibration(
            source=type(data).__name__, samples=data.samples, batch_size=getattr(data, "batch_size", 0),
            scheme=sim.scheme, fingerprint=data.fingerprint(), images=image_options_of(data),
        ),
        seconds=seconds, accuracy=accuracy,
    )  # fmt: skip
    arrays = out / f"{stem}{ARRAYS_SUFFIX}"
    record = {"record": arrays} if arrays.is_file() else {}
    return stem, bundle, {**bundle.files, **record, "report": json_file, "page": page}


def named_model(model: Any, name: str | None) -> tuple[Any, str]:
    """The model itself, where a simulation was given, and the stem of the files to write."""
    if isinstance(model, QuantSim):
        model = model.source or model.native
    named = isinstance(model, str | Path)
    return model, name or (Path(str(model).rpartition(":")[0] or str(model)).stem if named else "model")


def refuse_unwritable(
    sim: QuantSim, out: str | Path | None, model: Any, name: str | None, formats: Formats | None
) -> None:
    """Refuse to search for a network that would be written over its own source, or in a form that there isn't.

    Raises:
        InputError: it would be, or no such format.
    """
    if formats is not None:
        chosen_formats(formats, sim.backend)
    if out is not None:
        refuse_planned(sim.state, Path(out), named_model(model, name)[1], formats)
