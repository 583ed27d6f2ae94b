"""An export opened again: by its record where it has one, so that what is checked is what was simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bitwright import formats
from bitwright.backend import Backend, Bundle, ParamReader
from bitwright.bundle._artefact import (
    bound_entries,
    find_bundle,
    passed_on,
    plan_of,
    read_encodings,
    spec_of,
)
from bitwright.bundle._pair_check import check_pairs
from bitwright.bundle._parts import belongs, of_part, parts_in
from bitwright.bundle._placing import ENCODINGS_SUFFIX
from bitwright.bundle._record import ARRAYS_SUFFIX, hashes
from bitwright.errors import EncodingError
from bitwright.graph import Graph
from bitwright.grids import EncodingTable
from bitwright.placement import Decision, Derived, Float, Fused, OwnForms, Plan, SharedWith, Site, SiteId, SiteKind
from bitwright.plugins import registry
from bitwright.report import REPORT, BundleRecord, RunReport, SiteRow, digest, read_report
from bitwright.runs import of_arrays

SHOWN = 5
"""Names that one kind of problem is told with at most."""


@dataclass
class Reopened:
    """An export in memory.

    Attributes:
        folder, stem, bundle: where it lies.
        backend, model, graph: the float model.
        plan, table: what is simulated; the table has one encoding for every site of the plan that has an entry.
        report: of the export; None where there is none.
        sites: site of the record → id in the reopened graph.
        changed: files that aren't what the export wrote.
        problems: what is wrong, in words.
        notes: what the user should know.
        part: which part of the model this is, where it was captured in parts; otherwise empty.
    """

    folder: Path
    stem: str
    bundle: Bundle
    backend: Backend[Any]
    model: object
    graph: Graph
    plan: Plan
    table: EncodingTable
    report: RunReport | None = None
    sites: dict[SiteId, SiteId] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    part: str = ""

    @property
    def record(self) -> BundleRecord | None:
        """The report's record; None without one."""
        return None if self.report is None else self.report.record


def reopen(folder: Path, name: str | None = None) -> Reopened:
    """Open an export.

    Raises:
        InputError: the folder holds no bundle, or its model can't be read.
        EncodingError: the encodings don't fit the model, and there is no record to say which one is wrong.
    """
    bundle = find_bundle(folder, name)
    stem = bundle.files["encodings"].name.removesuffix(ENCODINGS_SUFFIX)
    part = "" if name is None else name.removeprefix(stem).removeprefix(".")
    path = bundle.files["model"]
    backend = registry.backend_for_path(path)
    model = backend.load(path)
    graph = backend.graph(model)
    found = read_report(folder, stem)
    problems = [found.damage] if found.damage else []
    if found.report is None and not problems and (folder / f"{stem}{ARRAYS_SUFFIX}").is_file():
        problems = [f"{REPORT}: the export wrote this file, but it is gone"]
    record = None if found.report is None else found.report.record
    if found.report is None or record is None:
        table = read_encodings(bundle.files["encodings"], graph)
        notes = [] if problems else [
            "the export has no record of what was simulated (made by an older version, or it is gone): it is compared "
            "with itself only; export it again"
        ]  # fmt: skip
        return Reopened(folder, stem, bundle, backend, model, graph, plan_of(graph, table), table, found.report,
                        problems=problems, notes=notes)  # fmt: skip
    opened = Reopened(folder, stem, bundle, backend, model, graph, Plan({}, found.report.target), EncodingTable(),
                      found.report, problems=problems, part=part)  # fmt: skip
    opened.sites = {row.site: here for row in found.report.sites if (here := _here(graph, row)) is not None}
    _check_files(opened, record.contents)
    _check_parameters(opened, record.parameters)
    _read_encodings(opened)
    opened.plan = _plan(opened)
    if opened.changed:
        # At export the quantized file was compared whole; what has changed since is looked for number by number.
        wrong = check_pairs(backend, model, bundle, opened.plan, opened.table, optional=passed_on(graph, opened.plan))
        opened.problems += _shown([f"{p.name!r} {p.message}" for p in wrong])
    return opened


def _here(graph: Graph, row: SiteRow) -> SiteId | None:
    """What the reopened graph calls a site: its own name, or the one that it has in the files."""
    candidates = (row.site, row.name, row.name.removesuffix(":0"))
    return next((c for c in candidates if c and (c in graph.tensors or c in graph.params)), None)


def _check_files(opened: Reopened, contents: Mapping[str, str]) -> None:
    there = [p for f in contents if (p := opened.folder / f).is_file()]
    now = hashes(there, opened.folder)
    others = _of_other_parts(opened)
    contents = {f: known for f, known in contents.items() if not f.startswith(others)}
    opened.problems += [f"{f}: the export wrote this file, but it is gone" for f in contents if f not in now]
    opened.changed = [f for f, known in contents.items() if f in now and now[f] != known]


def _check_parameters(opened: Reopened, parameters: Mapping[str, str]) -> None:
    """Name the float parameters that hold other values, where the model's file isn't the one that was written."""
    model = opened.bundle.files["model"]
    if not any(f == model.name or f.startswith(f"{model.name}.") for f in opened.changed):
        return
    if opened.part:
        parts = parts_in(opened.report.files if opened.report is not None else ())
        parameters = {p: known for p, known in parameters.items() if belongs(p, opened.part, parts)}
    values = ParamReader(opened.backend, opened.model, opened.graph)
    other = [p for p, known in parameters.items() if p in opened.graph.params and _digest(values, p) != known]
    gone = [p for p in parameters if p not in opened.graph.params and p.removesuffix(":0") not in opened.graph.params]
    opened.problems += _listed(other, "holds other values in the float model than the export wrote")
    if other == [] and len(gone) < len(parameters):
        opened.problems += _listed(gone, "isn't in the float model, where the export wrote it")


def _of_other_parts(opened: Reopened) -> tuple[str, ...]:
    """How the names of files begin that belong to other parts of the model."""
    if not opened.part or opened.report is None:
        return ()
    files = opened.report.files
    return tuple(f for part in parts_in(files) if part != opened.part for f in of_part(files, part).values())


def _digest(values: Mapping[str, NDArray[Any]], param: str) -> str:
    return of_arrays([("", values[param])])[:16]


def _listed(names: list[str], what: str) -> list[str]:
    shown = [f"{name!r} {what}" for name in names[:SHOWN]]
    return shown if len(names) <= SHOWN else [*shown, f"{len(names) - SHOWN} more: each {what}"]


def _shown(problems: list[str]) -> list[str]:
    """The first problems of a kind, and how many more there are."""
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"{len(problems) - SHOWN} more such problems: see `bitwright encodings check`"]


def _read_encodings(opened: Reopened) -> None:
    """Bind what the file has to the reopened graph, and compare it with the record."""
    assert opened.report is not None
    path, graph = opened.bundle.files["encodings"], opened.graph
    try:
        file = formats.read(path)
        opened.table, unbound = bound_entries(path, graph)
    except EncodingError as error:
        opened.problems.append(str(error))
        return
    entries = (*file.entries, *file.run_time)
    opened.problems += [str(problem) for problem in unbound]
    rows = {(row.name or row.site): row for row in opened.report.sites if row.digest}
    # What the exported model has no tensor for (folded constants) needs no entry.
    there = {n: row for n, row in rows.items() if row.site in opened.sites}
    missing = [n for n, row in there.items() if n not in entries and row.decision != "derived" and not _optional(row)]
    opened.problems += _listed(missing, f"was quantized, but has no entry in {path.name}")
    opened.problems += _listed([n for n in entries if n not in rows], f"has an entry in {path.name}, but no grid")
    other = []
    for name, row in rows.items():
        here = opened.sites.get(row.site)
        if name in entries and here is not None and here in opened.table and digest(opened.table[here]) != row.digest:
            other.append(name)
    opened.problems += _listed(other, f"has another grid in {path.name} than was simulated")


def _optional(row: SiteRow) -> bool:
    return row.decision == "shared" and row.kind != SiteKind.ACTIVATION


def as_recorded(plan: Plan, graph: Graph, table: EncodingTable, report: RunReport, *, decisions: bool = True) -> Plan:
    """A plan that was made for a reopened graph, with the decisions that the export records.

    An exporter may spell one op as several (SiLU as a sigmoid and a product): the tensors between are sites of the
    reopened graph, but nothing was simulated there. Or it spells an op in a way that the target treats otherwise.

    Args:
        plan: of the target, for `graph`; in force where an entry isn't what was simulated.
        graph: the exported model's.
        table: encodings, bound to it.
        report: of the export; without a record the plan is taken as it is.
        decisions: False for another target or other types than the export's: only where sites are is taken over.
    """
    if report.record is None:
        return plan
    sites: dict[SiteId, Site] = {}
    here_of = {row.site: here for row in report.sites if (here := _here(graph, row)) is not None}
    rows = {here_of[row.site]: row for row in report.sites if row.site in here_of}
    for name, site in plan.items():
        if name not in rows:
            sites[name] = Site(site.id, site.kind, Float("no site of the simulation"), site.op, site.role)
    for name, row in rows.items():
        if not decisions:
            if name in plan:
                sites[name] = plan[name]
            continue
        as_simulated = name not in table or not row.digest or digest(table[name]) == row.digest
        if name in plan and not as_simulated:
            sites[name] = plan[name]
        else:
            sites[name] = _site(graph, name, _decision(here_of, table, row, name))
            if name in plan and name not in table and row.decision not in ("float", "fused"):
                sites[name] = plan[name]  # what it should have been
    return _without_loose_ends(Plan({n: sites[n] for n in dict.fromkeys([*plan, *sites])}, plan.target, plan.scheme,
                                    weight_scheme=plan.weight_scheme, notes=plan.notes))  # fmt: skip


def _plan(opened: Reopened) -> Plan:
    """The recorded decisions, on the reopened graph."""
    assert opened.report is not None
    sites: dict[SiteId, Site] = {}
    for row in opened.report.sites:
        here = opened.sites.get(row.site)
        if here is None or here in sites:
            continue
        sites[here] = _site(opened.graph, here, _decision(opened.sites, opened.table, row, here))
    return _without_loose_ends(Plan(sites, opened.report.target))


def _site(graph: Graph, here: SiteId, decision: Decision) -> Site:
    kind = SiteKind.PARAMETER if here in graph.params else SiteKind.ACTIVATION
    users = graph.users(here)
    op = users[0] if kind is SiteKind.PARAMETER and users else graph.producer(here)
    role = None if op is None else next((r for r, p in op.params.items() if p == here), None)
    return Site(here, kind, decision, None if op is None else op.id, role)


def _decision(sites: Mapping[SiteId, SiteId], table: EncodingTable, row: SiteRow, here: SiteId) -> Decision:
    followed = tuple(sites[s] for s in row.follows if s in sites)
    if row.decision == "float" and followed and len(followed) == len(row.follows):
        return OwnForms(row.detail, tuple(zip(followed[::2], followed[1::2], strict=True)))
    if row.decision == "fused" and len(followed) == len(row.follows) == 1:
        return Fused(row.detail, followed[0])
    if row.decision in ("float", "fused"):
        return Float(row.detail)
    if row.decision == "derived" and len(followed) == len(row.follows):
        return Derived(followed)
    if row.decision == "shared" and followed and followed[0] != here:
        return SharedWith(followed[0])
    if here in table:
        return spec_of(table[here])
    return Float("it has no entry in the encodings file")


def _without_loose_ends(plan: Plan) -> Plan:
    """Sites that follow one which stays in float stay in float too."""
    sites = dict(plan.items())
    for name, site in plan.items():
        follows: tuple[SiteId, ...] = ()
        if isinstance(site.decision, SharedWith):
            follows = (site.decision.site,)
        elif isinstance(site.decision, Derived):
            follows = site.decision.sites
        if any(s not in plan or isinstance(plan[plan.root(s)].decision, Float) for s in follows):
            reason = "what its grid follows from has none"
            sites[name] = Site(site.id, site.kind, Float(reason), site.op, site.role)
    return Plan(sites, plan.target)
