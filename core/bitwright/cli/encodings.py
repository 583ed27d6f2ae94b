"""``bitwright encodings convert | check | diff``: tools for encodings files of every schema."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import console, options
from bitwright.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitwright.backend import Backend, Bundle
    from bitwright.graph import Graph
    from bitwright.placement import Plan
    from bitwright.report import RunReport
    from bitwright.targets import Target

app = typer.Typer(help="Convert, check and compare encodings files.")


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Convert, check and compare encodings files."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An encodings file of any schema.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="Schema wanted: 0.6.1, 1.0.0, 2.0.0 or 2.1.0.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            help="The model that it goes with, for axes and shapes that a schema leaves out.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the same encodings in another schema; scales and zero points never change."""
    from bitwright import formats
    from bitwright.bundle import geometry

    file = formats.read(source)
    graph = None
    if model is not None:
        backend, native = _open(model)
        graph = backend.graph(native)
    geometries = None if graph is None else {p: geometry(graph, p) for p in graph.params}
    result = formats.convert(file, to, geometries, None if graph is None else set(graph.params))
    for warning in result.warnings:
        console.complain(f"warning: {warning}")
    formats.write(result.file, destination, to)
    console.say(f"{len(result.file.entries)} encodings, {file.version} → {to}: {destination}")


@app.command("check")
def check(
    *,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="What `bitwright quantize --out` wrote, or an encodings file.", show_default=False
        ),
    ],
    model: Annotated[
        Path | None, typer.Option(help="The model that a single file goes with.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What must have an entry (default for a folder: the target of its report).", show_default=False
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Type of weights.", show_default=False)] = None,
    activations: Annotated[str | None, typer.Option(help="Type of activations.", show_default=False)] = None,
    name: options.ExportName = None,
    as_json: options.Json = False,
) -> None:
    """Check that every tensor that the target quantizes has exactly one right entry, and no other tensor has one.

    A file alone is checked against its schema; with --model, names and shapes too; with --target, completeness. In a
    folder, the quantized model's grids and codes are compared with the file and the float model too.
    """
    from bitwright.bundle import (
        as_recorded,
        bound_entries,
        check_bundle,
        check_pairs,
        passed_on,
        plan_of,
        read_encodings,
    )
    from bitwright.formats import Problem, read

    asked = Asked.of(path, model=model, target=target, weights=weights, activations=activations, name=name)
    problems: list[Problem] = []
    file = read(asked.encodings)
    if asked.model is not None:
        backend, native = _open(asked.model)
        graph = backend.graph(native)
        if asked.target is not None:
            plan = asked.plan(graph)
            if asked.report is not None:
                table, _ = bound_entries(asked.encodings, graph)
                plan = as_recorded(plan, graph, table, asked.report, decisions=asked.is_own(plan, graph))
            problems += check_bundle(graph, plan, asked.encodings)
        elif asked.bundle is not None:
            # Without a target, the file itself says what is quantized.
            table, _ = bound_entries(asked.encodings, graph)
            plan = plan_of(graph, table)
            unknown = [n for n in file.entries if n.removesuffix(":0") not in table and n not in table]
            problems += [Problem(n, "has an entry, but the model has no tensor of that name") for n in unknown]
        else:
            plan = plan_of(graph, read_encodings(asked.encodings, graph))
        if asked.bundle is not None:
            encodings, found = bound_entries(asked.encodings, graph, plan)
            optional = passed_on(graph, plan)
            found += check_pairs(backend, native, asked.bundle, plan, encodings, optional=optional)
            said = {p.name for p in problems}
            problems += [p for p in found if p.name not in said]
            problems = [p for p in problems if not asked.of_other_parts(p.name)]
            problems += [Problem(file, "the export wrote this file, but it is gone") for file in asked.gone]
    scope = asked.scope
    if as_json:
        told = [{"name": p.name, "message": p.message} for p in problems]
        sys.stdout.write(
            json.dumps({"entries": len(file.entries), "against": scope, "problems": told}, indent=1) + "\n"
        )
    else:
        for problem in problems:
            console.say(str(problem))
        console.say(f"{len(file.entries)} entries of schema {file.version}, checked against {scope}")
    if problems:
        raise CheckFailed(f"{asked.encodings}: {len(problems)} problems, the first: {problems[0]}")


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="An encodings file.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Another, of any schema.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0, help="Relative difference of scales that is let pass.")] = 0.0,
    as_json: options.Json = False,
) -> None:
    """Say what differs between two encodings files. Exits with 1 if anything does."""
    from bitwright import formats

    found = formats.diff(formats.read(first), formats.read(second), tolerance)
    if as_json:
        rows = [{**asdict(d), "first": _plain(d.first), "second": _plain(d.second)} for d in found]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        for difference in found:
            console.say(str(difference))
    if found:
        raise CheckFailed(f"{len(found)} differences between {first} and {second}")
    if not as_json:
        console.say("equal")


@dataclass(frozen=True)
class Asked:
    """What to check, against what."""

    encodings: Path
    model: Path | None
    target: Any
    weights: str | None
    activations: str | None
    overrides: dict[str, Any]
    bundle: Bundle | None = None
    report: RunReport | None = None
    part: str = ""

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        model: Path | None,
        target: str | None,
        weights: str | None,
        activations: str | None,
        name: str | None,
    ) -> Asked:
        """Complete what the user said by what a folder's report knows."""
        if not path.is_dir():
            if target is not None and model is None:
                raise InputError("--target needs --model: what it quantizes depends on the model")
            return cls(path, model, target, weights, activations, {})
        from bitwright.bundle import ENCODINGS_SUFFIX, find_bundle
        from bitwright.report import read_report

        bundle = find_bundle(path, name)
        known: dict[str, Any] = {"target": target, "weights": weights, "activations": activations, "overrides": {}}
        stem = bundle.files["encodings"].name.removesuffix(ENCODINGS_SUFFIX)
        found = read_report(path, stem)
        report = found.report
        # The target of the report by its name or file is that of the report: what else was asked for then, too.
        recorded = report is not None and target is not None and _settings(target) == report.target_config
        if recorded:
            target = None
        if target is None and found.damage and report is None:
            raise InputError(f"can't read {str(found.path)!r}, which names the target; give --target")
        if target is None and report is not None:
            known = {
                "target": report.target_config,
                "weights": weights or report.weights,
                "activations": activations or report.activations,
                "overrides": report.overrides,
            }
        part = "" if name is None else name.removeprefix(stem).removeprefix(".")
        return cls(
            bundle.files["encodings"], model or bundle.files["model"], **known, bundle=bundle, report=report, part=part
        )

    def of_other_parts(self, name: str) -> bool:
        """Whether a tensor is of another part of the model, where one is checked of a model in parts."""
        from bitwright.bundle import belongs, parts_in

        parts = parts_in(self.report.files) if self.part and self.report is not None else ()
        return any(belongs(name, part, parts) for part in parts if part != self.part)

    @property
    def gone(self) -> list[str]:
        """Files that the export's report names, and that aren't there, such as a quantized model."""
        if self.report is None or self.report.record is None or self.part:
            return []
        return [f for f in self.report.record.contents if not (self.encodings.parent / f).exists()]

    @property
    def scope(self) -> str:
        """What the encodings are checked against, in words."""
        if self.model is None:
            return "its schema"
        if self.target is not None:
            return "model and target"
        return "the model" if self.bundle is None else "the model and its quantized file"

    def plan(self, graph: Graph) -> Plan:
        """The plan that the encodings must fulfil."""
        from bitwright.placement import build_plan

        return build_plan(
            graph, _target(self.target), weights=self.weights, activations=self.activations, overrides=self.overrides
        )

    def is_own(self, plan: Plan, graph: Graph) -> bool:
        """Whether the plan is that of the export, whatever words asked for it."""
        if self.report is None:
            return False
        was = replace(
            self, target=self.report.target_config, weights=self.report.weights,
            activations=self.report.activations, overrides=self.report.overrides,
        )  # fmt: skip
        return dict(was.plan(graph).items()) == dict(plan.items())


def _target(given: str | Path | Mapping[str, Any]) -> Target:
    from bitwright.targets import load_target

    # A mapping is the configuration that an export was made for: its runtime need not be here.
    return load_target(given, runtime_needed=isinstance(given, str | Path))


def _settings(target: str) -> object:
    return json.loads(_target(target).to_json())


def _open(model: Path) -> tuple[Backend[Any], Any]:
    from bitwright.plugins import registry

    backend = registry.backend_for_path(model)
    return backend, backend.load(model)


def _plain(value: object) -> int | float | str | None:
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)
