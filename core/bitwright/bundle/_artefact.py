"""Exported bundles: the float model with updated weights, its encodings file and the quantized artefact."""

from __future__ import annotations

import glob
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitwright import formats
from bitwright._version import __version__
from bitwright.backend import (
    ArtefactWriter,
    Backend,
    Bundle,
    BundledFormats,
    SharedConversion,
    Simulation,
    ToCompile,
    giving_back,
    let_go,
    settled,
)
from bitwright.backend import (
    parts_of as network_parts,
)
from bitwright.bundle._formats import Formats, check_formats, chosen_formats, write_formats
from bitwright.bundle._parts import of_part, parts_in
from bitwright.bundle._placing import ENCODINGS_SUFFIX, move_in, refuse_strangers
from bitwright.bundle._plain import keep_exact
from bitwright.bundle._source_guard import refuse_overwriting
from bitwright.errors import (
    CapabilityError,
    EncodingError,
    InputError,
    MissingExtraError,
    ModelError,
    PluginError,
    WriteError,
)
from bitwright.files import make_directory
from bitwright.formats import EncodingsFile, Entry, ExpectedEntry, Problem, TensorGeometry
from bitwright.graph import LINEAR_KINDS, Graph, Op, OpKind, Param, ParamId, ParamRole, moved_from
from bitwright.grids import Blockwise, Encoding, EncodingTable, PerChannel, PerTensor, QuantSpec, dynamic_encoding
from bitwright.hookspecs import RuntimeInfo
from bitwright.placement import Decision, Derived, Float, OwnForms, Plan, SharedWith, Site, SiteId, SiteKind
from bitwright.plugins import registry
from bitwright.report import PAGE, REPORT, RunReport, read_report
from bitwright.state import SimState

QDQ, WEIGHTS = "qdq", "safetensors"
"""Export formats that a bundle has too, where the backend offers them."""


def export(
    state: SimState,
    simulate: Callable[[], Simulation[Any]],
    directory: Path,
    name: str,
    version: str,
    include_bias: bool | None,
    plain_session: bool | None,
    reference_samples: int,
    formats_asked: Formats | None = None,
) -> Bundle:
    """See `QuantSim.export`. Files are written in a folder beside and moved in when all are whole and proven.

    Args:
        state: of a calibrated simulation.
        simulate: hands out its open simulation, once the arguments have been checked.
        directory, name, version, include_bias, plain_session, reference_samples: as `QuantSim.export` takes them.
        formats_asked: as `formats` there.
    """
    from bitwright.bundle import _export_gate as export_gate
    from bitwright.bundle import _recording as recording

    if not is_stem(name):
        raise InputError(f"{name!r} can't be a file name; use a plain stem such as 'mobilenet'")
    if reference_samples < 0:
        raise InputError(f"reference_samples={reference_samples}: give a number of samples, 0 for none")
    table, backend = state.table, state.backend
    if not backend.formats():
        raise CapabilityError(f"the {backend.name} backend writes no files: it has no export formats")
    chosen = None if formats_asked is None else chosen_formats(formats_asked, backend)
    whole = ToCompile(state.graph, state.params, state.plan, table, Bundle({}), state.source)
    if chosen is not None:
        check_formats(chosen, whole)
    plain = state.target.config.bitwright.pair_sum_bits is not None if plain_session is None else plain_session
    stored_anew: tuple[ParamId, ...] = ()
    refuse_planned(state, directory, name, formats_asked)
    make_directory(directory)
    staging = directory / f".{name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    make_directory(staging)
    conversions = ExitStack()
    try:
        large = len(network_parts(state.graph, few=True)) > 1
        if large:
            let_go()  # what calibration has left behind
            conversions.enter_context(giving_back())
            conversions.enter_context(settled())
        run = export_gate.simulated(state, simulate, max(reference_samples, 1))
        if large:
            let_go()
        files: dict[str, Path] = {}
        artefact, *_ = backend.formats()
        if isinstance(backend, SharedConversion):
            conversions.enter_context(backend.converting_once())
        missing: dict[str, str] = {}
        try:
            if chosen is None or artefact in chosen.own:
                bundle = backend.export(state.native, state.plan, table, staging / f"{name}.{artefact}", artefact)
            else:
                bundle, missing[artefact] = Bundle({}), "it wasn't asked for (formats)"
        except ModelError as error:
            missing[artefact] = str(error)
            bundle = _in_own_form(state, staging, name, artefact, error)
        files |= bundle.files
        others = dict(_others(backend, state.native))
        if chosen is not None:
            others = {f: others.get(f, f".{f}") for f in chosen.own if f != artefact}
        meant = state.target.config.bitwright.runtime or ""
        runtime = registry.runtimes().get(meant)
        if meant and runtime is None:
            missing[f"file for {meant} alone"] = "the distribution that brings this runtime isn't installed"
        if chosen is not None and runtime is not None and runtime.artefact not in chosen.own:
            runtime = None
        if runtime is not None and runtime.artefact in backend.formats():
            others.setdefault(runtime.artefact, runtime.suffix)
        quantized: list[export_gate.Quantized] = []
        for other, suffix in others.items():
            if large:
                let_go()  # what the form before has left behind
            try:
                made = backend.export(state.native, state.plan, table, staging / f"{name}{suffix}", other)
                if other == QDQ and plain:
                    made = keep_exact(made)
                stored_anew += made.stored_anew
            except (MissingExtraError, ModelError) as error:
                if other != QDQ:
                    raise
                # What ONNX can't express, or isn't installed for, must not cost the user the native artefact.
                missing[other] = str(error)
                warnings.warn(f"{name}{suffix} isn't written: {error}", stacklevel=3)
                continue
            files |= made.files
            quantized += [export_gate.Quantized(p, made.names) for k, p in made.files.items() if k.split("/")[0] == QDQ]
        conversions.close()
        if chosen is None and QDQ not in backend.formats():
            missing[QDQ] = f"the {backend.name} backend writes none"
        if runtime is not None and runtime.artefact not in (QDQ, *others):
            try:
                files[runtime.artefact] = compiled(state, runtime, replace(bundle, files=files), staging / name)
            except (PluginError, ModelError) as error:
                missing[runtime.artefact] = str(error)
                warnings.warn(f"{name}{runtime.suffix} isn't written: {error}", stacklevel=3)
        if chosen is not None:
            files |= write_formats(chosen, replace(whole, bundle=replace(bundle, files=files)), staging / name)
        compared, unreached = (0, {}) if isinstance(run, str) else export_gate.gate(state, run, quantized)
        bias = formats.writes_biases(version) if include_bias is None else include_bias
        entries = encodings_file(state.graph, state.plan, table, version, bundle, include_bias=bias)
        files["encodings"] = formats.write(entries, staging / f"{name}{ENCODINGS_SUFFIX}", version)
        recording.write_with(
            state, staging, name, files, bundle.names, run if reference_samples else "none were asked for",
            missing=missing, compared=compared, not_compared=unreached, stored_anew=stored_anew,
        )  # fmt: skip
        written = list(staging.iterdir())
        refuse_overwriting(state, [directory / path.name for path in written])
        move_in(written, directory, name)
        paths = {k: directory / p.name for k, p in files.items()}
        return replace(bundle, files=paths, stored_anew=stored_anew)
    finally:
        conversions.close()
        shutil.rmtree(staging, ignore_errors=True)


def _in_own_form(state: SimState, folder: Path, name: str, artefact: str, error: ModelError) -> Bundle:
    """The float model as its backend saves it, where the format of bundles can't express an operator.

    Nothing is in the bundle where it can't be saved either (a model in parts has no form of its own).

    Raises:
        ModelError: the one given, where the artefact is the backend's own form.
    """
    suffix = registry.backends()[state.backend.name].suffix
    if suffix == f".{artefact}":
        raise error
    try:
        bundle = Bundle({"model": state.backend.save(state.native, folder / f"{name}{suffix}")})
        instead = f"the float model is {name}{suffix}"
    except WriteError:
        raise
    except (InputError, ModelError) as other:
        bundle, instead = Bundle({}), f"no file holds the float model ({other})"
    warnings.warn(f"{name}.{artefact} isn't written, {instead}: {error}", stacklevel=4)
    return bundle


def planned_files(state: SimState, directory: Path, name: str) -> list[Path]:
    """Every file that an export of this name may write into a folder."""
    artefact, *_ = state.backend.formats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = _others(state.backend, state.native).values()
        endings = [f".{artefact}", *others, *own_artefacts().values(), *_foreign_endings(), ENCODINGS_SUFFIX]
    found = [directory / f"{name}{ending}" for ending in endings]
    return [*found, *(p.with_name(f"{p.name}.data") for p in found), *(p.with_suffix(".index") for p in found)]


def refuse_planned(state: SimState, folder: Path, name: str, formats_asked: Formats | None = None) -> None:
    """Refuse, before any work, an export that would write over the file that the model was opened from, or over
    anything else that no export has written.

    Raises:
        InputError: one of the files that an export of this name may write is that file, or belongs to it; or one that
            it surely writes isn't an older export's.
    """
    refuse_overwriting(state, planned_files(state, folder, name))
    artefact, *_ = state.backend.formats()
    endings = [ENCODINGS_SUFFIX, *([f".{artefact}"] if formats_asked is None else [])]
    refuse_strangers(folder, name, [folder / REPORT, folder / PAGE, *(folder / f"{name}{e}" for e in endings)])


def refuse_unnamed_types(plan: Plan, version: str) -> None:
    """Refuse, before any work, an encodings file that has no word for a float type of the plan.

    Args:
        plan: of the simulation.
        version: schema of the file.

    Raises:
        EncodingError: the schema is unknown, or lacks a type; the message names a schema that has it.
    """
    schema, seen = formats.schema(version), set[str]()
    for site in plan:
        spec = plan.spec(site)
        kind = None if spec is None or spec.run_time is not None else spec.float_format
        left_out = kind in formats.CAST_FORMATS and version[0] == "2"
        if spec is None or kind is None or kind in seen or left_out:
            continue
        seen.add(kind)
        one = Encoding(spec.bits, True, True, np.ones((), np.float32), np.zeros((), np.int32), float_format=kind)
        schema.render_entry(site, formats.unbind(one))


def _others(backend: Backend[Any], model: object) -> Mapping[str, str]:
    """Formats that a bundle has beside the float artefact → the endings of their names."""
    if isinstance(backend, BundledFormats):
        return backend.bundled(model)
    return {f: suffix for f, suffix in ((QDQ, ".qdq.onnx"), (WEIGHTS, ".safetensors")) if f in backend.formats()}


def own_artefacts() -> dict[str, str]:
    """What integer runtimes execute that isn't the quantized ONNX model, by purpose → the ending of its name."""
    return {info.artefact: info.suffix for info in registry.runtimes().values() if info.artefact != QDQ}


def _foreign_endings() -> list[str]:
    """Endings of the files of other runtimes' formats."""
    return [info.suffix for info in registry.formats().values()]


def compiled(state: SimState, info: RuntimeInfo, bundle: Bundle, stem: Path) -> Path:
    """The artefact that the target's runtime makes itself, written.

    Raises:
        ModelError: it can't execute the model, or neither it nor the backend writes its artefact.
        PluginError: the runtime is broken, or what it needs isn't installed.
    """
    path = stem.with_name(f"{stem.name}{info.suffix}")
    if path.exists():
        raise ModelError(f"runtime {info.name!r} would write over {path.name}, which is there already")
    runtime = registry.runtime(info.name)
    if not isinstance(runtime, ArtefactWriter):
        raise ModelError(
            f"the {state.backend.name} backend has no format {info.artefact!r}, and runtime {info.name!r} doesn't "
            "write it itself" + (f"; {info.otherwise}" if info.otherwise else "")
        )
    with registry.default_registry().blaming(info):
        written = runtime.write(ToCompile(state.graph, state.params, state.plan, state.table, bundle), path)
    if written != path or not path.exists():
        raise ModelError(f"runtime {info.name!r} has written {written}, where {path.name} was asked for")
    return path


def is_stem(name: str) -> bool:
    """Whether a bundle's files can be called so."""
    return bool(name.strip(".")) and Path(name).name == name and "\0" not in name


def encodings_file(
    graph: Graph,
    plan: Plan,
    table: EncodingTable,
    version: str,
    bundle: Bundle | None = None,
    *,
    include_bias: bool = False,
) -> EncodingsFile:
    """The encodings of a table in the names and native axes of the artefact (the model's own without a bundle)."""
    names = {} if bundle is None else bundle.names
    layouts = {} if bundle is None else bundle.layouts
    activations, parameters = {}, {}
    run_time: dict[str, str] = {}
    for site, encoding in table.items():
        name = names.get(site, site)
        if bundle is not None and site in bundle.absent:
            continue
        if encoding.run_time is not None:
            run_time[name] = str(encoding.run_time)
            continue
        if bundle is not None and site in bundle.constants:
            parameters[name] = formats.unbind(encoding)
        elif plan[site].kind is SiteKind.ACTIVATION:
            activations[name] = formats.unbind(encoding)
        elif include_bias or not isinstance(plan[site].decision, Derived):
            param = replace(graph.params[site], layout=layouts.get(site, graph.params[site].layout))
            parameters[name] = formats.unbind(formats.permute(encoding, param.layout), native_shape(param))
    return EncodingsFile(
        activations=activations,
        parameters=parameters,
        version=version,
        producer={"package": "bitwright", "version": __version__},
        quantizer_args=quantizer_args(plan),
        provenance=table.provenance,
        run_time=run_time,
    )


def quantizer_args(plan: Plan) -> dict[str, object]:
    """The run's defaults, as schemas have a place for them."""
    weights = next(
        (s for p in plan.parameters if (s := plan.spec(p)) and plan[p].role is ParamRole.WEIGHT), QuantSpec()
    )
    acts = next((s for a in plan.activations if (s := plan.spec(a))), QuantSpec())
    return {
        "activation_bitwidth": acts.bits,
        "param_bitwidth": weights.bits,
        "dtype": "float" if weights.float_format else "int",
        "is_symmetric": weights.symmetric,
        "per_channel_quantization": isinstance(weights.granularity, PerChannel),
        "quant_scheme": plan.scheme,
    }


def native_shape(param: Param) -> tuple[int, ...]:
    """A parameter's shape in the artefact."""
    if param.layout is None:
        return param.shape
    shape = [0] * len(param.shape)
    for canonical, native in enumerate(param.layout):
        shape[native] = param.shape[canonical]
    return tuple(shape)


def geometry(graph: Graph, param: ParamId) -> TensorGeometry:
    """Native shape and axes of a parameter: output channels, and input channels for blocks."""
    record, users = graph.params[param], graph.users(param)
    transposed = any(op.kind is OpKind.CONV_TRANSPOSE for op in users)
    if len(record.shape) < 2:
        return TensorGeometry(native_shape(record), 0 if record.shape else None, None)
    channel, block = (1, 0) if transposed else (0, 1)
    if record.layout is not None:
        channel, block = record.layout[channel], record.layout[block]
    return TensorGeometry(native_shape(record), channel, block)


def read_encodings(path: Path, graph: Graph, plan: Plan | None = None, *, strict: bool = True) -> EncodingTable:
    """A file's encodings, bound to a graph's sites in canonical layout.

    A tensor that holds what another computes has that one's grid, whichever of the two the file names.

    Args:
        path: an encodings file of any schema.
        graph: of the model that it goes with.
        plan: keep only the sites that it specifies, in its conventions; None keeps all.
        strict: an entry for what the graph (or the plan) doesn't have is an error.

    Raises:
        EncodingError: the file is invalid or doesn't fit.
    """
    file = _in_names_of(graph, formats.read(path)).split(graph.params)
    found: dict[SiteId, Encoding] = {}
    followers: dict[SiteId, list[tuple[SiteId, Entry | str]]] = {}
    for name, entry in _listed(file):
        if name not in graph.params and name not in graph.tensors:
            if strict:
                raise EncodingError(f"{path.name}: the model has no tensor {name!r}; pass strict=False to ignore it")
            continue
        if plan is not None and not isinstance(_decision(plan, name), QuantSpec):
            # Shared and derived sites follow others; where these have entries, theirs carry nothing new.
            if isinstance(_decision(plan, name), SharedWith) and _moved(graph, plan.root(name), name):
                followers.setdefault(plan.root(name), []).append((name, entry))
            if strict and isinstance(decision := _decision(plan, name), Float):
                raise EncodingError(
                    f"{path.name}: {name!r} isn't quantized by this target ({decision.reason}); pass strict=False"
                )
            continue
        spec = plan.spec(name) if plan is not None else None
        found[name] = _bound(graph, name, entry, spec, f"{path.name}: {name}")
    for root, listed in followers.items():
        if plan is None or root in found or not isinstance(spec := plan.spec(root), QuantSpec):
            continue
        first, *others = (_bound(graph, name, entry, spec, f"{path.name}: {name}") for name, entry in listed)
        # An axis may lie elsewhere behind a transpose; and of two grids neither is the root's.
        if isinstance(first.granularity, PerTensor) and all(first.equals(other) for other in others):
            found[root] = first
    return EncodingTable(found, file.provenance)


def _moved(graph: Graph, root: SiteId, tensor: SiteId) -> bool:
    """Whether a tensor holds values of `root` alone, through ops that only move them."""
    while tensor != root:
        op = graph.producer(tensor) if tensor in graph.tensors else None
        sources = () if op is None else moved_from(op)
        if len(sources) != 1:
            return False
        tensor = sources[0]
    return root in graph.tensors


def _listed(file: EncodingsFile) -> Iterator[tuple[str, Entry | str]]:
    """What a file says of each tensor: its entry, or the type of its range at run time."""
    yield from file.entries.items()
    yield from file.run_time.items()


def _bound(graph: Graph, name: SiteId, entry: Entry | str, spec: QuantSpec | None, where: str) -> Encoding:
    """An entry's encoding in the canonical layout of its tensor; of a type, that of a range at run time."""
    if isinstance(entry, str):
        return dynamic_encoding(entry).with_(source="loaded")
    if name not in graph.params:
        return formats.bind(entry, None, spec, name=where)
    encoding = formats.bind(entry, geometry(graph, name), spec, name=where)
    return formats.permute(encoding, formats.inverse(graph.params[name].layout))


def bound_entries(path: Path, graph: Graph, plan: Plan | None = None) -> tuple[EncodingTable, list[Problem]]:
    """Every entry of a file that a tensor of the graph has, shared and derived sites included, in canonical layout.

    Returns:
        The encodings, and what keeps an entry from being one of its tensor.

    Raises:
        EncodingError: the file is invalid.
    """
    file = _in_names_of(graph, formats.read(path)).split(graph.params)
    found: dict[SiteId, Encoding] = {}
    problems: list[Problem] = []
    for name, entry in _listed(file):
        if name in graph.params or name in graph.tensors:
            try:
                found[name] = _bound(graph, name, entry, None if plan is None else plan.spec(name), name)
            except (EncodingError, InputError) as error:
                problems.append(Problem(name, str(error)))
    return EncodingTable(found, file.provenance), problems


def _in_names_of(graph: Graph, file: EncodingsFile) -> EncodingsFile:
    """The file with tensors called as in the graph: TensorFlow's "conv:0" is the first output of "conv"."""

    def known(name: str) -> str:
        plain = name.removesuffix(":0")
        if name == plain or name in graph.tensors or name in graph.params:
            return name
        return plain if plain in graph.tensors or plain in graph.params else name

    run_time = {known(name): type for name, type in file.run_time.items()}
    tables = (file.activations, file.parameters, file.unsplit)
    activations, parameters, unsplit = ({known(name): entry for name, entry in table.items()} for table in tables)
    return replace(file, activations=activations, parameters=parameters, unsplit=unsplit, run_time=run_time)


def _decision(plan: Plan, site: SiteId) -> Decision:
    return plan[site].decision if site in plan else Float("not a site of this plan")


def plan_of(graph: Graph, table: EncodingTable) -> Plan:
    """The plan that a table of encodings amounts to: what has an entry is quantized so, biases follow."""
    sites: dict[SiteId, Site] = {}
    for site, encoding in table.items():
        kind = SiteKind.PARAMETER if site in graph.params else SiteKind.ACTIVATION
        producer = graph.users(site)[0] if kind is SiteKind.PARAMETER and graph.users(site) else graph.producer(site)
        role = next((r for r, p in producer.params.items() if p == site), None) if producer is not None else None
        if role is ParamRole.BIAS and encoding.bits == 32:
            continue
        sites[site] = Site(site, kind, spec_of(encoding), producer.id if producer else None, role)
    for bias in graph.params:
        users = graph.users(bias)
        uses = dict.fromkeys(use for op in users if (use := _accumulator(op, bias, table)) is not None)
        if bias in sites or not uses:
            continue
        first = next(op for op in users if _accumulator(op, bias, table) is not None)
        decision: Decision = Derived(next(iter(uses)))
        if len(uses) > 1:
            decision = OwnForms("ops with different scales share it: int32 on the grid of each", tuple(uses))
        sites[bias] = Site(bias, SiteKind.PARAMETER, decision, first.id, ParamRole.BIAS)
    return Plan(sites, "encodings file")


def _accumulator(op: Op, bias: ParamId, table: EncodingTable) -> tuple[SiteId, SiteId] | None:
    """(input, weight) of a linear op with that bias where both are integers."""
    if op.kind not in LINEAR_KINDS or op.params.get(ParamRole.BIAS) != bias or op.weight not in table:
        return None
    source, weight = op.data_inputs[0], op.weight
    assert weight is not None
    if source not in table or not (table[source].is_fixed and table[weight].is_fixed):
        return None
    return source, weight


def spec_of(encoding: Encoding) -> QuantSpec:
    """The specification that an encoding fulfils."""
    return QuantSpec(
        bits=encoding.bits,
        signed=encoding.signed,
        symmetric=encoding.symmetric,
        strict=encoding.strict,
        granularity=encoding.granularity,
        float_format=encoding.float_format,
        scale_type=None if encoding.float_format is None else encoding.scale_type,
    )


def find_bundle(directory: Path, name: str | None = None) -> Bundle:
    """The bundle in a directory.

    Raises:
        InputError: there is none, several, or a file of it is missing.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give what `bitwright quantize --out` wrote")
    if name is not None and (part := _part(directory, name)) is not None:
        return part
    stems = "*" if name is None else glob.escape(name)
    found = sorted(directory.glob(f"{stems}{ENCODINGS_SUFFIX}"))
    if len(found) != 1:
        names = ", ".join(p.stem for p in found)
        more = f" ({names}); choose one by --name" if found else ""
        if not found and any(directory.glob(f"{stems}.qdq.onnx")):
            more = ": the export is incomplete, it was interrupted or files are gone; export it again"
        elif not found and name is None and (directory / "quantsim.json").is_file():
            more = ": it is a saved simulation; export it, QuantSim.load(folder).export(other_folder)"
        raise InputError(f"{directory} holds {len(found)} encodings files{more}")
    stem = found[0].stem
    suffixes = [s for info in registry.backends().values() for s in info.suffixes]
    recorded = _recorded(directory, stem)
    known = None if recorded is None else recorded.files
    own = [directory / Path(known["model"]).name] if known and "model" in known else []
    model = next((p for p in (*own, *(directory / f"{stem}{s}" for s in suffixes)) if p.exists()), None)
    if model is None:
        endings = tuple(s for s in suffixes if not s.startswith(".qdq"))
        parts = sorted(p.name for p in directory.glob(f"{glob.escape(stem)}.*")
                       if p.name.endswith(endings) and not p.name.endswith(".qdq.onnx"))  # fmt: skip
        if parts:
            raise InputError(
                f"{directory} has {found[0].name} of a model that was captured in parts ({', '.join(parts)}); no file "
                "holds the Python between them, so it can't be run as one. Choose a part, by the name of its file "
                f"without ending ({stem}.NAME)"
            )
        missing = recorded.record.missing if recorded is not None and recorded.record is not None else {}
        told = "".join(f"; the export has no {format}: {reason}" for format, reason in missing.items())
        raise InputError(f"{directory} has {found[0].name} but no model {stem}{{{','.join(suffixes)}}} beside it{told}")
    # A former export of the same name may have left a quantized file where this one hasn't got any.
    quantized = {k: directory / f"{stem}{suffix}" for k, suffix in {QDQ: ".qdq.onnx", **own_artefacts()}.items()}
    there = {k: path for k, path in quantized.items() if path.exists() and (known is None or k in known)}
    return Bundle({"model": model, "encodings": found[0], **there})


def parts_of(directory: Path, name: str | None = None) -> list[str]:
    """Names of the parts of an export ("net.backbone", "net.head"); none where its model was captured whole."""
    found = sorted(directory.glob(f"{'*' if name is None else glob.escape(name)}{ENCODINGS_SUFFIX}"))
    if len(found) != 1:
        return []
    stem = found[0].name.removesuffix(ENCODINGS_SUFFIX)
    recorded = _recorded(directory, stem)
    return [] if recorded is None else [f"{stem}.{part}" for part in parts_in(recorded.files)]


def _part(directory: Path, name: str) -> Bundle | None:
    """The files of one part of an export; None where there is no part of that name."""
    for encodings in sorted(directory.glob(f"*{ENCODINGS_SUFFIX}")):
        stem = encodings.name.removesuffix(ENCODINGS_SUFFIX)
        if name not in parts_of(directory, stem):
            continue
        recorded = _recorded(directory, stem)
        assert recorded is not None
        files = {k: directory / Path(f).name for k, f in of_part(recorded.files, name.removeprefix(f"{stem}.")).items()}
        if not files["model"].exists():
            raise InputError(f"{directory} has {encodings.name} but no {files['model'].name} beside it")
        return Bundle({"encodings": encodings, **{k: path for k, path in files.items() if path.exists()}})
    return None


def _recorded(directory: Path, stem: str) -> RunReport | None:
    """The report of an export that has a record; None without one."""
    report = read_report(directory, stem).report
    return report if report is not None and report.record is not None else None


def passed_on(graph: Graph, plan: Plan) -> frozenset[SiteId]:
    """Sites that are another's tensor under a second name (dropout): an artefact may have no tensor for them."""
    found = []
    for site in plan.quantized:
        producer = graph.producer(site)
        if producer is None or producer.kind is not OpKind.IDENTITY:
            continue
        if plan.root(site) != site or plan.spec(site) == plan.spec(producer.data_inputs[0]):
            found.append(site)
    return frozenset(found)


def check_bundle(graph: Graph, plan: Plan, path: Path) -> list[Problem]:
    """Whether an encodings file has exactly one right entry for each tensor that the plan quantizes.

    Args:
        graph, plan: of the exported model.
        path: the encodings file.
    """
    expected: dict[str, ExpectedEntry] = {}
    for site in plan.quantized:
        record = plan[site]
        if isinstance(record.decision, Derived):
            expected[site] = ExpectedEntry("parameter", 32, optional=True)
            continue
        spec = plan.spec(site)
        assert spec is not None
        if record.kind is SiteKind.PARAMETER:
            expected[site] = ExpectedEntry.of(spec, "parameter", graph.params[site].shape)
        else:
            layout = spec.granularity
            shape = () if isinstance(layout, (PerTensor, Blockwise)) else None
            expected[site] = ExpectedEntry.of(spec, "activation", shape)
    for site in passed_on(graph, plan):
        expected[site] = replace(expected[site], optional=True)
    file = _in_names_of(graph, formats.read(path)).split(graph.params)
    return formats.check(file, expected, {*graph.tensors, *graph.params})
