"""Several runs beside each other: the difference of two, and an index of all reports in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from bitwright.errors import InputError, first_line
from bitwright.report import charts
from bitwright.report._model import Cell, RunReport, SiteRow
from bitwright.report._page import LAYERS, run_widths, verdict
from bitwright.report._seal import REPORT
from bitwright.report.parts import Link, figure, fold, page, section, table, text, tile
from bitwright.tables import size

SUFFIX = f".{REPORT}"


def read_run(path: Path) -> RunReport:
    """The report of a run: its folder, or the report's own file.

    Raises:
        InputError: there is none, there are several, or it can't be read.
    """
    if path.is_dir():
        own = path / REPORT
        found = [own] if own.is_file() else sorted(path.glob(f"*{SUFFIX}"))
        if len(found) != 1:
            several = f"several: {', '.join(p.name for p in found)}; name one" if found else "none"
            raise InputError(f"{path} should hold the report of a run ({REPORT}), and holds {several}")
        path = found[0]
    try:
        return RunReport.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no report of a run ({first_line(error)})") from None


@dataclass(frozen=True)
class Difference:
    """What two runs did differently.

    Attributes:
        verdict: in a sentence or two.
        settings: what was asked for: name, in the first, in the second.
        sites: site, what differs, in the first, in the second; sites that only one has included.
        layers: each that both have, with its weight's signal to rounding noise in dB in both (None: on its grid).
    """

    verdict: str
    settings: tuple[tuple[str, str, str], ...]
    sites: tuple[tuple[str, str, str, str], ...]
    layers: tuple[tuple[str, float | None, float | None], ...]


def difference(a: RunReport, b: RunReport) -> Difference:
    """What the second run did differently from the first."""
    ours, theirs = _settings(a, b), _settings(b, a)
    settings = tuple(
        (name, ours.get(name, "–"), theirs.get(name, "–"))
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    )
    first, second = ({s.site: s for s in r.sites} for r in (a, b))
    sites = tuple(
        row for site in dict.fromkeys((*first, *second)) for row in _site(site, first.get(site), second.get(site))
    )
    both = {row.weight: row for row in b.layers}
    layers = tuple((r.layer or r.op, r.sqnr_db, both[r.weight].sqnr_db) for r in a.layers if r.weight in both)
    return Difference(_verdict(a, b, len(settings), len({s for s, *_ in sites})), settings, sites, layers)


def _verdict(a: RunReport, b: RunReport, settings: int, sites: int) -> str:
    told = []
    if a.accuracy and b.accuracy:
        points = 100 * (b.accuracy.simulated - a.accuracy.simulated)
        told.append(
            f"Both reach a top-1 of {b.accuracy.simulated:.2%}."
            if abs(points) < 0.005
            else f"B's top-1 is {abs(points):.2f} points {'above' if points > 0 else 'below'} A's: "
            f"{b.accuracy.simulated:.2%} and {a.accuracy.simulated:.2%}."
        )
        if a.accuracy.samples != b.accuracy.samples or a.accuracy.float_model != b.accuracy.float_model:
            told.append("They were measured on other data or another float model, so that this says little.")
    else:
        told.append("Accuracy wasn't measured in both (--labels).")
    if b.model.quantized_bytes != a.model.quantized_bytes:
        told.append(f"Parameters take {size(b.model.quantized_bytes)} instead of {size(a.model.quantized_bytes)}.")
    told.append(
        f"Different: {_counted(settings, 'setting')}, {_counted(sites, 'site')}."
        if settings or sites
        else "Settings and sites are the same."
    )
    return " ".join(told)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _settings(report: RunReport, other: RunReport) -> dict[str, str]:
    """All that was asked for, as text; of techniques that the other run doesn't have, their names alone."""
    data = report.calibration
    known = {
        "model": report.model.source,
        "model file": report.model.sha256 or "",
        "target": report.target,
        "weights": report.weights or "the target's",
        "activations": report.activations or "the target's",
        "seed": str(report.seed),
        "techniques": " → ".join(step.technique for step in report.steps) or "none",
    }
    if data is not None:
        known |= {"calibration scheme": data.scheme, "calibration samples": text(data.samples), "data": data.source}
        known["images"] = "" if data.images is None else str(data.images)
        known["data fingerprint"] = data.fingerprint
    known |= {f"override of {name}": json.dumps(value) for name, value in report.overrides.items()}
    for step in report.steps:
        if step.technique in {s.technique for s in other.steps}:
            known |= {f"{step.technique}: {name}": text(value) for name, value in step.settings.items()}
    return known | {f"version of {name}": version for name, version in report.versions.items()}


def _site(site: str, a: SiteRow | None, b: SiteRow | None) -> list[tuple[str, str, str, str]]:
    if a is None or b is None:
        return [(site, "is there", "no" if a is None else "yes", "no" if b is None else "yes")]
    if _decided(a) != _decided(b):
        return [(site, "decision", f"{a.decision}, {a.detail}", f"{b.decision}, {b.detail}")]
    if a.digest != b.digest:
        return [(site, "grid", *_grids(a, b))]
    return []


def _grids(a: SiteRow, b: SiteRow) -> tuple[str, str]:
    """Two grids that differ, told so that it is seen: channels inside the same ends may."""
    first, second = _range(a), _range(b)
    if first != second:
        return first, second
    if a.scale_smallest is not None and a.scale_largest is not None:
        scales = [f"scales {s.scale_smallest:.6g} to {s.scale_largest:.6g}" for s in (a, b)]
        if scales[0] != scales[1]:
            return scales[0], scales[1]
    return first, f"{second}, not the same inside"


def _decided(site: SiteRow) -> tuple[str, str]:
    """The decision and its detail; reports of before fused sites were told apart call them float, for the same reason.

    Where that is a difference of two newer ones, the site that they are fused into differs too.
    """
    return "float" if site.decision == "fused" else site.decision, site.detail


def _range(site: SiteRow) -> str:
    if site.low is None or site.high is None:
        return "no range" if site.scale_smallest is None else f"scale {site.scale_smallest:.6g}"
    return f"{site.low:.6g} to {site.high:.6g}"


def render_difference(a: RunReport, b: RunReport, names: tuple[str, str]) -> str:
    """The page of two runs.

    Args:
        a, b: the runs.
        names: what they go by, such as their folders.
    """
    found = difference(a, b)
    sections = [f"<section><p class=verdict>{escape(found.verdict)}</p><div class=tiles>{_tiles(a, b)}</div></section>"]
    if found.settings:
        sections.append(section("Settings that differ", table(("Setting", "A", "B"), found.settings)))
    compared = [(op, x, y) for op, x, y in found.layers if x is not None and y is not None]
    if compared and any(x != y for _, x, y in compared):
        labels = [op for op, *_ in compared]
        before, after = [max(x, 0.0) for _, x, _ in compared], [max(y, 0.0) for *_, y in compared]
        axis = charts.linear_axis(0.0, max(*before, *after, 1.0), " dB", label="signal to rounding noise, dB")
        plot = charts.pairs(labels, before, after, axis, ("A", "B"), across=LAYERS)
        caption = "Rounding of each weight, higher is better: A (grey) and B (blue)."
        rows = [(op, x, y, y - x) for op, x, y in compared]
        whole = fold(f"{len(rows)} layers", table(("Layer", "A dB", "B dB", "B − A"), rows))
        sections.append(section("Weights", figure(plot, caption) + whole))
    columns = ("Site", "What differs", "A", "B")
    sections.append(section("Sites that differ", table(columns, found.sites) if found.sites else "<p>None.</p>"))
    told = "".join(
        f"<p class=note>{mark}: {escape(name)}, {escape(r.name)}: {escape(verdict(r))}</p>"
        for mark, name, r in zip("AB", names, (a, b), strict=True)
    )
    sections.append(section("The runs", told))
    return page("Two runs compared", f"A: {names[0]} · B: {names[1]}", sections)


def _tiles(a: RunReport, b: RunReport) -> str:
    tiles = [
        tile(f"{mark}: simulated top-1", f"{r.accuracy.simulated:.2%}", f"float {r.accuracy.float_model:.2%}")
        for mark, r in zip("AB", (a, b), strict=True)
        if r.accuracy
    ]
    tiles += [
        tile(f"{mark}: parameters", size(r.model.quantized_bytes), run_widths(r))
        for mark, r in zip("AB", (a, b), strict=True)
    ]
    return "".join(tiles)


@dataclass(frozen=True)
class Listed:
    """A run of an index.

    Attributes:
        path: the report's file.
        report: its content.
    """

    path: Path
    report: RunReport

    def label(self, folder: Path) -> str:
        """Its name behind the folders that lead to it: stems of files are often the same."""
        return (self.path.parent.relative_to(folder) / self.report.name).as_posix()

    def row(self) -> tuple[Cell, ...]:
        """What the index says of it; accuracies in percent."""
        r, found = self.report, self.report.accuracy
        simulated = None if found is None else round(100 * found.simulated, 2)
        points = None if found is None else round(100 * (found.simulated - found.float_model), 2)
        steps = ", ".join(s.technique for s in r.steps)
        when = r.created.replace("T", " ").replace("+00:00", "")
        weight = size(r.model.quantized_bytes)
        return (r.name, r.model.source, r.target, run_widths(r), steps, simulated, points, weight, when)


COLUMNS = ("Run", "Model", "Target", "Types", "Techniques", "Top-1 %", "Points to float", "Parameters", "When (UTC)")


def runs_in(folder: Path) -> tuple[list[Listed], list[str]]:
    """All runs below a folder, the best accuracy first and then by path; and what couldn't be read.

    Raises:
        InputError: no such folder, or there is no report in it.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}")
    found: list[Listed] = []
    damaged: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        for name in sorted(files):
            if name == REPORT or name.endswith(SUFFIX):
                try:
                    found.append(Listed(Path(place) / name, read_run(Path(place) / name)))
                except InputError as error:
                    damaged.append(str(error))
    if not found:
        raise InputError(f"{folder} holds no {REPORT} of a run" + (f"; {damaged[0]}" if damaged else ""))
    found.sort(key=lambda run: -(run.report.accuracy.simulated if run.report.accuracy else -1.0))
    return found, damaged


def render_index(folder: Path, runs: list[Listed]) -> str:
    """The page of a folder of runs, each linked with its own page."""
    rows: list[tuple[Cell | Link, ...]] = []
    for run in runs:
        own = run.path.with_name(run.path.name.removesuffix("json") + "html")
        name = run.label(folder)
        link = Link(name, quote(own.relative_to(folder).as_posix())) if own.is_file() else name
        rows.append((link, *run.row()[1:]))
    scored = [run for run in runs if run.report.accuracy is not None]
    told = _counted(len(runs), "run")
    if scored:
        best = scored[0].report
        assert best.accuracy is not None
        told += (
            f"; the best of {len(scored)} with labels is {scored[0].label(folder)} on {best.target} with a top-1 of "
            f"{best.accuracy.simulated:.2%} (float {best.accuracy.float_model:.2%})"
        )
    parts = [f"<section><p class=verdict>{escape(told)}.</p>{table(COLUMNS, rows)}</section>"]
    if len(scored) > 1:
        labels = [run.label(folder) for run in scored]
        values = [100 * run.report.accuracy.simulated for run in scored if run.report.accuracy is not None]
        axis = charts.linear_axis(0.0, 100.0, " %", label="simulated top-1, %")
        plot = charts.bars(labels, values, axis, " %", across="runs, in the order of the table")
        parts.append(figure(plot, "Top-1 of each run with labels."))
    return page(f"Runs in {folder.resolve().name}", "bitwright report", parts)
