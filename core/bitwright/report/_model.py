"""What a report holds. `RunReport.model_dump_json()` is `report.json`; fields are only ever added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bitwright.data import DataLike, ImageOptions, Images, is_image_folder

Cell = str | int | float | bool | None
"""A table cell; NaN and infinities are stored as null."""


class Record(BaseModel):
    """Base: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelInfo(Record):
    """The model that was quantized.

    Attributes:
        source: file name or type.
        path, sha256: where the original lies and what it holds, so that `verify` can compare with it; null for a model
            object.
        ops, opaque_ops: all operations, and those that run in float because their type isn't known.
        unknown: those of them that compute floats, weights of their own included, each with its type in parentheses.
        parameters: number of parameter values.
        float_bytes, quantized_bytes: size of all parameters before, and with the planned widths (scales included).
        inputs, outputs: name → shape as text.
    """

    source: str
    path: str | None = None
    sha256: str | None = None
    backend: str
    ops: int
    opaque_ops: int
    unknown: tuple[str, ...] = ()
    parameters: int
    float_bytes: int
    quantized_bytes: int
    inputs: dict[str, str]
    outputs: dict[str, str]


class Calibration(Record):
    """The data that ranges and techniques were computed on.

    Attributes:
        source: the path, or the data's type.
        samples: how many; null where that isn't known.
        batch_size: samples a batch; 0 of a bank.
        scheme: range setting of activations.
        fingerprint: hash of the data.
        images: how files of images became input; null of other data.
    """

    source: str
    samples: int | None
    batch_size: int
    scheme: str
    fingerprint: str
    images: ImageOptions | None = None


class StepRecord(Record):
    """One technique: settings, summary, figures, and a table."""

    technique: str
    settings: dict[str, object] = Field(default_factory=dict)
    summary: str
    figures: dict[str, float | None] = Field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()


class LayerRow(Record):
    """One quantized weight.

    Attributes:
        layer: what the model's author calls it (`Graph.layer_name`); empty in reports of earlier versions.
        range_smallest, range_median, range_largest: over output channels, of the largest magnitude in a channel.
        sqnr_db: of rounding the exported weight to its grid; null where it lies on its grid already.
    """

    op: str
    type: str
    weight: str
    shape: tuple[int, ...]
    quantizer: str
    range_smallest: float
    range_median: float
    range_largest: float
    sqnr_db: float | None
    layer: str = ""


class SiteRow(Record):
    """One place where the target may quantize.

    Attributes:
        decision: "quantized", "shared", "derived", "fused" or "float".
        detail: the grid, whom it is shared with or derived from, or why it has none.
        low, high: ends of the grid's range, over all its groups.
        scale_smallest, scale_largest: over groups; equal for one scale.
        name: the tensor's name in the exported files, where it isn't the site's own.
        follows: whose encoding the site has, which ones it is derived from, or what it is fused into; of a bias in
            float that has an int32 form for each of its ops, their inputs and weights in turn.
        digest: of the encoding's numbers (`report.digest`).
    """

    site: str
    kind: str
    op: str
    decision: str
    detail: str
    low: float | None = None
    high: float | None = None
    scale_smallest: float | None = None
    scale_largest: float | None = None
    zero_point: int | None = None
    source: str = ""
    name: str = ""
    follows: tuple[str, ...] = ()
    digest: str = ""


class StoredTensor(Record):
    """One tensor of the reference samples, in the export's arrays.

    Attributes:
        tensor: the site.
        scale, offset: of codes c: the value is (c + offset) · scale in float32; null where values are stored.
    """

    tensor: str
    scale: float | None = None
    offset: int | None = Field(default=None, ge=-(2**30), le=2**30)


class ReferenceRecord(Record):
    """Samples that travel with an export, and what the simulation made of them.

    Arrays "input/0", "output/0", "tap/0", "handed/0", … of `file` are the tensors in the order given here.

    Attributes:
        file: an .npz beside the report.
        synthetic: the inputs were made up, for lack of calibration data.
        inputs: names of the model's inputs.
        outputs, taps: the model's outputs; outputs of quantized ops.
        handed: of a model that was captured in parts, what they were fed.
        left_out: tensors that the size budget left no room for.
    """

    file: str
    synthetic: bool
    inputs: tuple[str, ...]
    outputs: tuple[StoredTensor, ...]
    taps: tuple[StoredTensor, ...]
    handed: tuple[StoredTensor, ...] = ()
    left_out: int = 0


class BundleRecord(Record):
    """What an export holds, and what was simulated when it was written.

    Attributes:
        contents: file, relative to the folder → its SHA-256; all that the export wrote but the reports.
        parameters: parameter, by its name in the files → digest of its float values.
        missing: export format → why it couldn't be written.
        reference: samples; null where there are none, `without_reference` says why.
        compared: tensors in which the simulation and the written quantized model were compared at export.
        not_compared: tensors that couldn't be, with the reason.
        stored_anew: weights that the quantized model keeps in another type, values unchanged (`Bundle.stored_anew`).
    """

    contents: dict[str, str]
    parameters: dict[str, str] = Field(default_factory=dict)
    missing: dict[str, str] = Field(default_factory=dict)
    reference: ReferenceRecord | None = None
    without_reference: str = ""
    compared: int = 0
    not_compared: dict[str, str] = Field(default_factory=dict)
    stored_anew: tuple[str, ...] = ()


class Accuracy(Record):
    """Top-1 of the float model and of the simulation, as fractions, on the data that were given with labels.

    Attributes:
        agreement: the share of samples that both give the same class; None where only scores were taken (searches).
    """

    samples: int
    float_model: float
    simulated: float
    agreement: float | None = None


class MetricRecord(Record):
    """A metric of the simulation, and of the float model where it doesn't compare the two; see `bitwright.metrics`."""

    metric: str
    simulated: float
    float_model: float | None
    count: int
    error: float | None = None


class RunReport(Record):
    """Everything about one export.

    Attributes:
        created: UTC, ISO 8601.
        target_config: the target's whole configuration.
        weights, activations: the types asked for; null takes the target's.
        overrides: exceptions by op or tensor.
        notes: what the plan says of fallbacks and exceptions (`Plan.notes`).
        seconds: duration of each stage.
        versions: of Python, bitwright, numpy and the framework.
        files: what the run wrote, by purpose.
        record: what was simulated and what the files hold; null in reports of exports that were made without.
        seal: hash of all the rest, so that a changed report is noticed.
    """

    schema_version: int = 1
    created: str
    name: str
    model: ModelInfo
    target: str
    target_config: dict[str, Any]
    weights: str | None
    activations: str | None
    overrides: dict[str, Any]
    notes: tuple[str, ...] = ()
    seed: int
    calibration: Calibration | None
    steps: tuple[StepRecord, ...]
    sites: tuple[SiteRow, ...]
    layers: tuple[LayerRow, ...]
    accuracy: Accuracy | None
    metrics: tuple[MetricRecord, ...] = ()
    seconds: dict[str, float]
    versions: dict[str, str]
    files: dict[str, str]
    record: BundleRecord | None = None
    seal: str = ""

    def read_alike(self, data: DataLike) -> DataLike:
        """Data for this export: the path of a folder of images is read as its calibration's images were."""
        known = None if self.calibration is None else self.calibration.images
        if known is None or not isinstance(data, str | Path) or not is_image_folder(Path(data)):
            return data
        return Images(data, known)

    def count(self, decision: str) -> int:
        """How many sites were decided so."""
        return sum(site.decision == decision for site in self.sites)
