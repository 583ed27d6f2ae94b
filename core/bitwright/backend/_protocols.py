"""What a framework adapter must offer, and what it may: the whole surface between the core and a framework.

A backend shows a model as a `Graph`, reads and edits it, runs it and simulates it. It decides nothing:
placement, encodings, the order of steps and every search live in the core.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from bitwright.backend._taps import Tap
from bitwright.errors import CapabilityError
from bitwright.files import Array
from bitwright.graph import Edit, Graph, OpId, ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId
from bitwright.tables import Table, size

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)
Batch = Mapping[TensorId, Array]
"""Model inputs by name; the first axis of each is samples, unless they are one whole feed (`data._batches.one_run`)."""


@dataclass(frozen=True)
class Training:
    """How the grids of a trainable simulation are trained.

    Attributes:
        range_learning: scales and zero points are parameters; otherwise activations keep their grids and those of
            the weights follow the weights, step by step.
        gradient_scale: learned scales' gradients are evened out as LSQ does (`gradients.lsq_factor`).
    """

    range_learning: bool = False
    gradient_scale: bool = False


@runtime_checkable
class Session(Protocol):
    """A model compiled once for fixed taps, to be run many times."""

    def run(self, batch: Batch) -> Mapping[Tap, Array]:
        """Feed model inputs (or a segment's feeds) and get the taps, keyed by the `Tap` asked for.

        What is handed out is the caller's: no later run writes into it.
        """


@runtime_checkable
class PickingSession(Session, Protocol):
    """A session that may be asked for some positions of each sample, others in successive ones (`Tap.places`)."""

    def run_at(self, batch: Batch, first: Mapping[Tap, int]) -> Mapping[Tap, Array]:
        """As `run`; taps with places hand out what `picked` would take of the whole tensor.

        Args:
            batch: as for `run`.
            first: for each tap with places, the number of the first sample along axis 0 of its tensor.
        """


@runtime_checkable
class Simulation(Protocol[M_co]):
    """The native model with fake quantization at the planned sites."""

    @property
    def model(self) -> M_co:
        """The native simulated model, for the user's own evaluation."""

    def set(self, encodings: Mapping[SiteId, Encoding | None]) -> None:
        """Install encodings; None bypasses a site. Sites that share an encoding follow their root."""

    def get(self) -> EncodingTable:
        """The encodings in force; a later `set` doesn't change what was handed out."""

    def session(self, taps: Sequence[Tap]) -> Session:
        """Run the simulated network and hand out tensors (after their own fake quantization)."""

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """As `PartialExecution.segment`, in the simulated network. A fed tensor is taken as it is given."""


@runtime_checkable
class ParamUpdates(Protocol):
    """What a simulation may offer: new parameter values without being built again, for layer-by-layer techniques."""

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """Replace float values (canonical layout); sessions opened from then on see them. The model isn't changed.

        Raises:
            ModelError: an id names no parameter, a shape differs, or a value isn't finite. Nothing is set then.
        """


@runtime_checkable
class TrainableSimulation(Simulation[Any], Protocol):
    """What `Trainable.simulate_trainable` returns.

    Its model is trained by the user's own loop, optimizer and data; nothing of these is the backend's.
    """

    def float_model(self) -> Any:
        """A new float model with the simulation's present weights; `get` has the encodings."""


@dataclass(frozen=True)
class Bundle:
    """What an export wrote.

    Attributes:
        files: by purpose: "model" (float artefact), "encodings", "qdq", ….
        names: site id → tensor name in the artefact, where they differ.
        layouts: parameter → the artefact's axis for each canonical axis, where it isn't the model's (`Param.layout`).
        stored_anew: weights whose codes the quantized artefact stores in another type, values unchanged, for the sake
            of plain sessions (`bitwright.bundle._plain`).
        constants: activations that the artefact holds as parameters, as they are computed from parameters alone.
        absent: sites that it has no tensor for: folded into such constants, or into nothing at all (a factor of 1).
    """

    files: Mapping[str, Path]
    names: Mapping[SiteId, str] = field(default_factory=dict)
    layouts: Mapping[ParamId, tuple[int, ...]] = field(default_factory=dict)
    stored_anew: tuple[ParamId, ...] = ()
    constants: frozenset[SiteId] = frozenset()
    absent: frozenset[SiteId] = frozenset()

    def __str__(self) -> str:
        return "\n".join((self._title(), *self._told(), "", str(self._table()), "", *self._next())).rstrip()

    def _repr_html_(self) -> str:
        told = "<br>".join(map(escape, (*self._told(), *self._next())))
        return f"<div><strong>{escape(self._title())}</strong><br>{told}{self._table().html()}</div>"

    def _title(self) -> str:
        folders = dict.fromkeys(path.parent for path in self.files.values())
        count = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        return f"export of {count}" + (f" in {next(iter(folders))}" if len(folders) == 1 else "")

    def _told(self) -> list[str]:
        """What of the model has another form in the files, where there is any."""
        found = (
            (len(self.names), "sites with other names in the files", "names"),
            (len(self.constants), "activations that are constants in the files", "constants"),
            (len(self.absent), "sites without a tensor in the files", "absent"),
            (len(self.stored_anew), "weights stored in another type, values unchanged", "stored_anew"),
        )
        return [f"{what}: {count} ({where})" for count, what, where in found if count]

    def _table(self) -> Table:
        rows = tuple((purpose, path.name, _space(path)) for purpose, path in self.files.items())
        return Table(("purpose", "file", "size"), rows)

    def _next(self) -> list[str]:
        """What to run on what `QuantSim.export` wrote: a report lies beside the files."""
        folders = {path.parent for path in self.files.values() if (path.parent / "report.json").is_file()}
        return [f"next: bitwright verify {folder} --data test.npz" for folder in sorted(folders)[:1]]


def _space(path: Path) -> str:
    """How large a file is; of a folder, all files in it."""
    if not path.exists():
        return "gone"
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return size(sum(p.stat().st_size for p in files))


@dataclass(frozen=True)
class Pair:
    """One quantize/dequantize pair of a quantized artefact, in the canonical layout of its tensor.

    Attributes:
        scale: float32: () for one scale; of a parameter otherwise of its rank, with length 1 along axes that the scales
            don't vary over and the number of blocks along `block_axis`; of an activation (n,) along `axis`.
        zero_point: int64, of the same shape: the code of 0.0 as it is stored.
        bits, signed: of the stored type.
        float_format: of codes that are floats (fp8, and parameters kept in float16 or bfloat16).
        axis: along which an activation's scales vary.
        block_axis, block_size: of blocks.
        codes: hands out a parameter's stored codes (float values of float formats); None for activations.
    """

    scale: Array
    zero_point: Array
    bits: int
    signed: bool = True
    float_format: str | None = None
    axis: int | None = None
    block_axis: int | None = None
    block_size: int = 0
    codes: Callable[[], Array] | None = None


@runtime_checkable
class Backend(Protocol[M]):
    """One framework. `M` is its native model type; models given in are never changed."""

    name: str

    def owns(self, model: object) -> bool:
        """Whether an object is a model of this framework."""

    def load(self, path: Path, **options: object) -> M:
        """Open a model file; among the options may always be `sample`, one batch, for models that are traced."""

    def save(self, model: M, path: Path) -> Path:
        """Write the native format, atomically.

        Raises:
            InputError: the file can't be written.
        """

    def adopt(self, model: object, sample: Batch | None = None) -> M:
        """Turn what the user holds (a ModelProto, an nn.Module, …) into the backend's own model form.

        Args:
            model: an object that the backend owns.
            sample: one batch by input name, as the user gave it, for frameworks that have to run a model to see it.
        """

    def graph(self, model: M) -> Graph:
        """The canonical graph.

        Raises:
            ModelError: the model is quantized already.
        """

    def read(self, model: M, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """Parameter values in canonical layout.

        Raises:
            ModelError: an id names no float parameter.
        """

    def edit(self, model: M, edits: Sequence[Edit]) -> M:
        """A new model with the edits applied, in order; what doesn't change is shared.

        Raises:
            ModelError: an edit can't be carried out; the model given is as it was.
        """

    def session(self, model: M, taps: Sequence[Tap]) -> Session:
        """Compile the float model to hand out these tensors.

        Raises:
            ModelError: a tap is unknown, or the framework can't run the model.
        """

    def simulate(self, model: M, plan: Plan, encodings: EncodingTable) -> Simulation[M]:
        """Put fake quantization at the plan's sites."""

    def export(self, model: M, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """Write one of `formats()` at `path` (a file; parents exist). Written beside and renamed.

        Raises:
            InputError: the format is unknown, or the file can't be written.
            ModelError: the format can't express the model.
        """

    def formats(self) -> Mapping[str, str]:
        """Export formats: name → description; none writes no files. The first is the float artefact of encodings."""

    def input_specs(self, model: M) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """Shape (None: free) and dtype of each model input, to check data before any work."""


@runtime_checkable
class BundledFormats(Protocol[M_contra]):
    """Saying what an exported bundle holds beside the float artefact, where it depends on the model."""

    def bundled(self, model: M_contra) -> Mapping[str, str]:
        """Export formats that a bundle of this model has too → the ending of the name of each one's file or folder."""


@runtime_checkable
class Trainable(Protocol[M_contra]):
    """Training in the framework, by the user's own loop: `QuantSim.trainable`, `take`."""

    def simulate_trainable(
        self, model: M_contra, plan: Plan, encodings: EncodingTable, training: Training
    ) -> TrainableSimulation:
        """As `Backend.simulate`, with tensors of its own that are trained."""


@runtime_checkable
class Pullback(Protocol):
    """A part of a simulated network as a function of some of its parameters, at values that the caller gives."""

    def run(self, batch: Batch, values: Mapping[ParamId, NDArray[np.floating]]) -> Mapping[TensorId, Array]:
        """The outputs.

        Args:
            batch: the feeds; fed tensors are taken as they are given.
            values: of the parameters, in canonical layout; what is simulated of them is these very values.
        """

    def gradients(
        self,
        batch: Batch,
        values: Mapping[ParamId, NDArray[np.floating]],
        cotangents: Callable[[Mapping[TensorId, Array]], Mapping[TensorId, Array]],
    ) -> Mapping[ParamId, Array]:
        """The gradient to each parameter of Σ cotangent · output, float32 in canonical layout.

        Rounding of activations passes it straight through where it doesn't clip (`grids.fake_quantize_vjp`). Batch
        norms and dropout are as in inference.

        Args:
            batch, values: as for `run`.
            cotangents: makes them of the outputs, by name; of outputs that aren't there they are zero.
        """


class DifferentiableSimulation(Simulation[Any], ParamUpdates, Protocol):
    """What `Differentiable.simulate_differentiable` returns."""

    def pullback(self, params: Sequence[ParamId], feeds: Sequence[TensorId], taps: Sequence[TensorId]) -> Pullback:
        """What lies between `feeds` and `taps`, as a function of quantized parameters that it reads.

        Raises:
            ModelError: a tap can't be computed from the feeds alone; a parameter isn't one that the plan quantizes.
        """


@runtime_checkable
class Differentiable(Protocol[M_contra]):
    """Gradients of parts of a simulated network, for techniques that learn block by block (`technique.BlockWalk`)."""

    def simulate_differentiable(
        self, model: M_contra, plan: Plan, encodings: EncodingTable
    ) -> DifferentiableSimulation:
        """As `Backend.simulate`.

        Raises:
            CapabilityError: models of this form aren't differentiated.
        """


@runtime_checkable
class Branching(Protocol[M_contra]):
    """Putting branches of low rank beside linear ops (`graph.AddBranch`), which graphs get new ops by."""

    def branch_obstacle(self, model: M_contra, op: OpId) -> str:
        """Why `edit` would refuse a branch beside an op, in words; "" if it would put one in.

        Raises:
            ModelError: the model has no such op.
        """


@runtime_checkable
class Observable(Protocol[M_contra]):
    """Handing a model out as the framework's users run one, for data by their own forward pass (`observed`)."""

    def observed(self, model: M_contra, seen: Callable[[Batch], None]) -> Any:
        """A copy of the float model as users of the framework run it: a module, a session, a function.

        Args:
            model: not changed, whatever is done to what is returned.
            seen: to be called with the inputs of each run that computes values, by name.
        """


@runtime_checkable
class SharedConversion(Protocol):
    """Exports in several formats that have a costly step in common, such as a conversion to ONNX."""

    def converting_once(self) -> AbstractContextManager[None]:
        """While it is open, `export` takes that step once for a model, which must not be changed meanwhile."""


@runtime_checkable
class PartialExecution(Protocol[M_contra]):
    """Running a part of the float model, for layer-by-layer techniques in O(layers) and not O(layers²)."""

    def segment(self, model: M_contra, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """Compile only what lies between `feeds` and `taps`; feeds that no tap depends on need no value at run time.

        Raises:
            ModelError: a tap can't be computed from the feeds alone.
        """


@runtime_checkable
class Picking(Protocol[M_contra]):
    """Taking some positions out of large tensors inside of the graph, so that the rest never leaves it."""

    def picking_session(self, model: M_contra, taps: Sequence[Tap]) -> PickingSession:
        """As `Backend.session`, of taps that may have places.

        Raises:
            ModelError: a tap is unknown, or the framework can't run the model.
        """


@runtime_checkable
class Fingerprinting(Protocol[M_contra]):
    """Telling models apart by what their graphs and parameters don't show."""

    def fingerprint(self, model: M_contra) -> str:
        """Hash of what a model computes beyond its parameters' values: attributes and literal operands of its ops, its
        constants, and the code and weights of ops that the graph shows as opaque.

        Models that were opened alike have equal ones, in another process too.
        """


@runtime_checkable
class IntegerRuntime(Protocol):
    """A runtime that executes an exported bundle with integer kernels, for `verify`; see `RuntimeInfo`."""

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
        """Load the bundle's quantized artefact; with taps, also hand out these tensors (dequantized).

        A tap that the artefact has no tensor for, such as one that is fused into a kernel, is left out.

        Raises:
            InputError: the bundle has nothing that this runtime executes, or it is damaged.
            ModelError: the runtime refuses the model.
            MissingExtraError: what it needs isn't installed.
        """


@dataclass(frozen=True)
class ToCompile:
    """What a runtime makes its own artefact of.

    Attributes:
        graph, params: the float model; values in canonical layout.
        plan, encodings: what is quantized; one encoding for each quantized site, shared and derived ones included.
        bundle: what the export has written so far: "model", and "qdq" where there is a quantized ONNX model.
        source: the file or folder that the model was opened from.
    """

    graph: Graph
    params: Mapping[ParamId, NDArray[np.float32]]
    plan: Plan
    encodings: EncodingTable
    bundle: Bundle
    source: Path | None = None


@runtime_checkable
class FormatWriter(Protocol):
    """Writing a file format of other runtimes, and reading it back, for the proof; see `FormatInfo`.

    Attributes:
        Settings: what users may choose, with defaults.
    """

    Settings: type[BaseModel]

    def check(self, model: ToCompile, settings: Any) -> None:
        """Refuse, before anything is written, what the format can't hold; the bundle is empty yet.

        Args:
            model: to be written.
            settings: an instance of `Settings`.

        Raises:
            EncodingError: a grid that the format has no place for; names the weight, the reason and the way out.
            ModelError: a network that it has no place for.
        """

    def write(self, model: ToCompile, path: Path, settings: Any) -> Path:
        """Write a file, or a folder, at `path`, which ends in `FormatInfo.suffix`.

        Raises:
            EncodingError, ModelError: as `check`.
        """

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, Array]]:
        """The weights that what was written holds, dequantized to float32 as its readers do, in canonical layout.

        Args:
            model: whose names and axes they are given in; its values and encodings aren't looked at.
            path: as written.

        Raises:
            InputError: it can't be read.
        """


@runtime_checkable
class ArtefactWriter(Protocol):
    """What an integer runtime may offer that executes an artefact of its own: compiling it, as a model is exported."""

    def write(self, model: ToCompile, path: Path) -> Path:
        """Write the artefact at `path`, whose ending is `RuntimeInfo.suffix`.

        Raises:
            ModelError: the model has what the runtime can't execute; names it.
        """


class QuantizedNetwork(Protocol):
    """A written quantized artefact, run op by op in float as its format says: what the file means.

    Attributes:
        tensors: what can be tapped and fed: sites under their own names (as quantized), the artefact's own names too.
        inputs: what the artefact itself is fed.
    """

    tensors: frozenset[TensorId]
    inputs: tuple[TensorId, ...]

    def session(self, taps: Sequence[Tap]) -> Session:
        """Compile it for its own inputs; taps are handed out dequantized."""

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """As `PartialExecution.segment`; a fed site stands for its dequantized tensor."""


@runtime_checkable
class QuantizedReader(Protocol):
    """Opening a quantized artefact to run it without a runtime's liberties, for the proof of an export."""

    def open_quantized(self, path: Path) -> QuantizedNetwork:
        """Read the artefact.

        Raises:
            InputError: it can't be read.
        """


@runtime_checkable
class SourceFiles(Protocol[M_contra]):
    """Naming the files that a model still reads from, so that no export is written over them."""

    def source_files(self, model: M_contra) -> Collection[Path]:
        """Existing files beside the model file itself, such as external weights."""


@runtime_checkable
class OpTimer(Protocol):
    """Timing the ops of an exported bundle on the integer runtime, for latency tables."""

    def op_seconds(
        self, bundle: Bundle, ops: Collection[OpId], batches: Sequence[Batch], *, repeats: int = 5, threads: int = 1
    ) -> Mapping[OpId, float]:
        """Seconds of each op for one sample; ops that the runtime has fused into others are left out."""


@runtime_checkable
class QuantizedArtefact(Protocol):
    """Reading back what an exported bundle's quantized artefact quantizes, for `bitwright encodings check`."""

    def pairs(self, bundle: Bundle) -> Mapping[TensorId, Sequence[Pair]]:
        """Tensor → each quantize/dequantize pair that it passes through.

        A parameter that ops read on several grids (a bias that they share) has one for each grid.
        """

    def floats(self, bundle: Bundle) -> Mapping[ParamId, Callable[[], Array]]:
        """Parameters that the artefact keeps in float under their own names → their values, canonical layout."""


@runtime_checkable
class ReproducedArtefact(Protocol[M_contra]):
    """Checking a quantized artefact without pairs (.tflite) by making it again, for `bitwright encodings check`."""

    def departures(
        self, model: M_contra, plan: Plan, encodings: EncodingTable, bundle: Bundle
    ) -> Sequence[tuple[str, str]]:
        """Numbers of the artefact that aren't those of the model and the encodings: (tensor, what is wrong in words).

        Nothing where the bundle has no such artefact.

        Raises:
            BitwrightError: it can't be made again.
        """


class Capability(StrEnum):
    """What a backend may offer beyond the required protocol: each is one of the protocols above (`protocol`).

    Nothing is declared: a backend offers what it implements (`capabilities`).
    """

    PARTIAL_EXECUTION = "partial_execution"
    TRAINABLE = "trainable"
    DIFFERENTIABLE = "differentiable"
    INTEGER_RUNTIME = "integer_runtime"
    OP_TIMER = "op_timer"
    QUANTIZED_ARTEFACT = "quantized_artefact"
    QUANTIZED_READER = "quantized_reader"
    BUNDLED_FORMATS = "bundled_formats"
    SHARED_CONVERSION = "shared_conversion"
    BRANCHING = "branching"
    OBSERVABLE = "observable"
    PICKING = "picking"
    FINGERPRINTING = "fingerprinting"
    SOURCE_FILES = "source_files"
    REPRODUCED_ARTEFACT = "reproduced_artefact"

    @property
    def protocol(self) -> type:
        """What a backend with it implements."""
        return _PROTOCOLS[self]


_PROTOCOLS: Mapping[Capability, type] = {
    Capability.PARTIAL_EXECUTION: PartialExecution,
    Capability.TRAINABLE: Trainable,
    Capability.DIFFERENTIABLE: Differentiable,
    Capability.INTEGER_RUNTIME: IntegerRuntime,
    Capability.OP_TIMER: OpTimer,
    Capability.QUANTIZED_ARTEFACT: QuantizedArtefact,
    Capability.QUANTIZED_READER: QuantizedReader,
    Capability.BUNDLED_FORMATS: BundledFormats,
    Capability.SHARED_CONVERSION: SharedConversion,
    Capability.BRANCHING: Branching,
    Capability.OBSERVABLE: Observable,
    Capability.PICKING: Picking,
    Capability.FINGERPRINTING: Fingerprinting,
    Capability.SOURCE_FILES: SourceFiles,
    Capability.REPRODUCED_ARTEFACT: ReproducedArtefact,
}
_INSTEAD: Mapping[Capability, str] = {
    Capability.TRAINABLE: "open the model in PyTorch, Keras or TensorFlow, or use adaround or seq_mse, which need no "
    "training",
    Capability.DIFFERENTIABLE: "open the model in PyTorch or Keras, or use gptq or adaround, which need no gradients",
    Capability.BRANCHING: "use gptq or adaround, which add nothing to the network, or wider types for these layers",
    Capability.INTEGER_RUNTIME: "verify the exported file with the backend that opens it",
    Capability.OP_TIMER: "measure an exported .onnx file, or write the table by hand",
    Capability.QUANTIZED_ARTEFACT: "read the exported .qdq.onnx file with the ONNX backend",
}
"""What to do where a backend lacks it."""


def capabilities(backend: object) -> frozenset[Capability]:
    """What a backend offers beyond the required protocol."""
    return frozenset(c for c in Capability if isinstance(backend, c.protocol))


def require(backend: Backend[Any], needed: Collection[Capability], what: str) -> None:
    """Refuse, before any work, what a backend can't do.

    Args:
        backend: the model's.
        needed: capabilities.
        what: needs them, for the message.

    Raises:
        CapabilityError: it lacks one; says what to do instead.
    """
    if unknown := sorted(set(needed) - set(Capability)):
        raise CapabilityError(
            f"{what} needs {unknown[0]!r}, which is not a capability; there are {', '.join(Capability)}"
        )
    offered = capabilities(backend)
    if lacking := [c for c in Capability if c in needed and c not in offered]:
        told = ", ".join(f"{c} (`bitwright.backend.{c.protocol.__name__}`)" for c in lacking)
        instead = _INSTEAD.get(lacking[0], "open it in a framework whose backend does, or choose another technique")
        raise CapabilityError(f"{what} needs {told}, which the {backend.name} backend doesn't offer; {instead}")
