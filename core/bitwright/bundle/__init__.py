"""What an export says of itself, so that it can be proven later: record, reference samples, comparison, gates.

`record` is what was simulated (decisions, digests, hashes, samples), `agreement` decides whether two networks compute
the same but for rounding, `export_gate` and `checks` ask it of a fresh and of a reopened export, `crushed` finds
outputs that the quantization has silenced, `source_guard` and `placing` keep what is the user's from being
overwritten.
"""

from __future__ import annotations

from bitwright.bundle._artefact import (
    QDQ,
    bound_entries,
    check_bundle,
    encodings_file,
    export,
    find_bundle,
    geometry,
    is_stem,
    parts_of,
    passed_on,
    plan_of,
    read_encodings,
    refuse_planned,
    refuse_unnamed_types,
)
from bitwright.bundle._checks import against_record, against_simulation, recorded_inputs
from bitwright.bundle._crushed import OutputQuality, risky
from bitwright.bundle._export_gate import Quantized, gate, run_simulated
from bitwright.bundle._formats import Formats, chosen_formats
from bitwright.bundle._outputs import PAIRS, PLAIN, OutputFigures, classes_of, in_shape, over_outputs, whole_of
from bitwright.bundle._pair_check import check_pairs
from bitwright.bundle._parts import belongs, parts_in
from bitwright.bundle._placing import ENCODINGS_SUFFIX
from bitwright.bundle._plain import HostNotes, PairRisk, PlainRisks, PlainRuntime, PlainView, plain_session, plain_view
from bitwright.bundle._record import ARRAYS_SUFFIX, hashes
from bitwright.bundle._reopened import as_recorded, reopen
from bitwright.bundle._saturation import bound

__all__ = [
    "ARRAYS_SUFFIX",
    "ENCODINGS_SUFFIX",
    "PAIRS",
    "PLAIN",
    "QDQ",
    "Formats",
    "HostNotes",
    "OutputFigures",
    "OutputQuality",
    "PairRisk",
    "PlainRisks",
    "PlainRuntime",
    "PlainView",
    "Quantized",
    "against_record",
    "against_simulation",
    "as_recorded",
    "belongs",
    "bound",
    "bound_entries",
    "check_bundle",
    "check_pairs",
    "chosen_formats",
    "classes_of",
    "encodings_file",
    "export",
    "find_bundle",
    "gate",
    "geometry",
    "hashes",
    "in_shape",
    "is_stem",
    "over_outputs",
    "parts_in",
    "parts_of",
    "passed_on",
    "plain_session",
    "plain_view",
    "plan_of",
    "read_encodings",
    "recorded_inputs",
    "refuse_planned",
    "refuse_unnamed_types",
    "reopen",
    "risky",
    "run_simulated",
    "whole_of",
]
