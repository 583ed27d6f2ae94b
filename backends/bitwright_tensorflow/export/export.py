"""Export: a frozen .pb, .meta with a checkpoint, a SavedModel, and QDQ ONNX, all under the graph's own names.

None of these files needs bitwright: plain TensorFlow (or an ONNX runtime) loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.backend import Bundle, LazyValues, Session, Tap, session_in_parts
from bitwright.errors import InputError, ModelError
from bitwright.files import Array
from bitwright.graph import ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_onnx.qdq_bundles import onnx_backend
from bitwright_tensorflow.export.checkpoints import save_checkpoint
from bitwright_tensorflow.export.freezing import LARGEST, save_frozen, save_saved_model
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.model import Kind, TfModel
from bitwright_tensorflow.graph.params import to_canonical
from bitwright_tensorflow.graph.shapes import computed
from bitwright_tensorflow.simulate.building import declare_variables
from bitwright_tensorflow.simulate.session import open_taps

if TYPE_CHECKING:
    from bitwright_onnx.adapters import Written

FORMATS: Mapping[str, str] = {
    "pb": "the float model with its updated weights as a frozen graph; encodings files go with it",
    "meta": "the source's whole graph with its variables: .meta and a checkpoint (.index, .data) of the same name",
    "saved_model": "the float model as a SavedModel folder, with the source's signature",
    "qdq": "the quantized model as ONNX with QuantizeLinear/DequantizeLinear pairs, for integer runtimes",
}


def export(model: TfModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
    """`Backend.export`.

    Raises:
        InputError: unknown format, the files can't be written, or there are no variables for a checkpoint.
        MissingExtraError: QDQ ONNX without the packages that it needs.
        ModelError: the model can't be expressed in the format.
    """
    if format == "pb":
        if sum(value.nbytes for value in model.values.values()) > LARGEST:
            raise ModelError("the frozen graph exceeds 2 GiB, which a .pb can't hold; export as meta or saved_model")
        return Bundle({"model": save_frozen(model, path)})
    if format == "meta":
        return Bundle(_write_meta(model, path))
    if format == "saved_model":
        return Bundle({"saved_model": save_saved_model(model, path)})
    if format == "qdq":
        return _write_qdq(model, plan, encodings, path)
    raise InputError(f"the TensorFlow backend has no format {format!r}; there are {', '.join(FORMATS)}")


def bundled(model: TfModel) -> Mapping[str, str]:
    """What a bundle has beside the frozen graph, the source's own form first: format → ending of the name."""
    own = {
        Kind.SESSION: {"meta": ".meta"},
        Kind.SAVED_MODEL: {"saved_model": "_saved_model"},
        Kind.FUNCTION: {"saved_model": "_saved_model"},
        Kind.FROZEN: {},
    }
    return {**own[model.kind], "qdq": ".qdq.onnx"}


def _write_meta(model: TfModel, path: Path) -> dict[str, Path]:
    if not model.variables:
        raise InputError("the model has no variables for a checkpoint to hold; export it as pb or saved_model")
    path = path if path.suffix == ".meta" else path.with_name(f"{path.name}.meta")
    if model.kind is not Kind.SESSION:
        model = replace(model, meta=declare_variables(model), kind=Kind.SESSION)
    save_checkpoint(model, path)
    parts = {"checkpoint": ".index", "checkpoint_data": ".data-00000-of-00001"}
    return {"meta": path, **{purpose: path.with_suffix(ending) for purpose, ending in parts.items()}}


def _write_qdq(model: TfModel, plan: Plan, encodings: EncodingTable, path: Path) -> Bundle:
    onnx_backend("tensorflow")
    from bitwright_onnx.adapters import export_written

    return export_written(as_onnx(model), recognize(model).graph, plan, encodings, path)


def as_onnx(model: TfModel) -> Written:
    """The model as an ONNX model that was seen to compute the same.

    Raises:
        NotEmittable, ModelError: see `bitwright_onnx.adapters.written`.
    """
    from bitwright_onnx.adapters import written_graph

    found = recognize(model, complete=True)
    made = {p: read for p, read in found.params.items() if ":" in read.source}
    reads: dict[ParamId, Callable[[], Array]] = {
        p: partial(to_canonical, model, read) for p, read in found.params.items() if p not in made
    }
    if made:
        arrays = computed(model, [read.source for read in made.values()])
        held = {p: read.form.canonical(array) for (p, read), array in zip(made.items(), arrays, strict=True)}
        reads |= {p: partial(held.__getitem__, p) for p in held}

    def session(taps: Sequence[Tap]) -> Session:
        return session_in_parts(found.graph, _Float(model), taps)

    return written_graph(found.graph, LazyValues(reads), session)


@dataclass(frozen=True)
class _Float:
    """The float model, to be run in parts where it is large."""

    model: TfModel

    def session(self, taps: Sequence[Tap]) -> Session:
        """See `Divisible`."""
        return open_taps(self.model, taps)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `Divisible`."""
        return open_taps(self.model, taps, feeds)
