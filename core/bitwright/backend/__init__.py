"""What a framework adapter must offer, what it may, and what all adapters share."""

from __future__ import annotations

from bitwright.backend._editing import Editor
from bitwright.backend._finiteness import NonFiniteWarning, warn_where_it_began
from bitwright.backend._grid_checks import check_encodings, check_site, on_grid
from bitwright.backend._params import ParamReader, Params
from bitwright.backend._protocols import (
    Backend,
    Batch,
    Bundle,
    BundledFormats,
    Capability,
    IntegerRuntime,
    OpTimer,
    Pair,
    ParamUpdates,
    PartialExecution,
    QuantizedArtefact,
    QuantizedNetwork,
    QuantizedReader,
    Session,
    SharedConversion,
    Simulation,
    SourceFiles,
    Trainable,
    TrainableSimulation,
    Training,
    capabilities,
    require,
)
from bitwright.backend._quiet import silenced
from bitwright.backend._taps import Reduction, Tap, reduced, thinned_places

__all__ = [
    "Backend",
    "Batch",
    "Bundle",
    "BundledFormats",
    "Capability",
    "Editor",
    "IntegerRuntime",
    "NonFiniteWarning",
    "OpTimer",
    "Pair",
    "ParamReader",
    "ParamUpdates",
    "Params",
    "PartialExecution",
    "QuantizedArtefact",
    "QuantizedNetwork",
    "QuantizedReader",
    "Reduction",
    "Session",
    "SharedConversion",
    "Simulation",
    "SourceFiles",
    "Tap",
    "Trainable",
    "TrainableSimulation",
    "Training",
    "capabilities",
    "check_encodings",
    "check_site",
    "on_grid",
    "reduced",
    "require",
    "silenced",
    "thinned_places",
    "warn_where_it_began",
]
