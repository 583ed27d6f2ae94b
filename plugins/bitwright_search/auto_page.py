"""The diagnosis of `auto_quantize` as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from bitwright.report import Cell, parts
from bitwright_search.auto_result import AutoQuantResult, Status, Trial
from bitwright_search.figures import STYLE, Dot, Rule, dots, legend, steps_to_do

_WORDS = {
    Status.REFERENCE: "reference",
    Status.PREPARED: "done",
    Status.KEPT: "kept",
    Status.WORSE: "not better",
    Status.UNCHANGED: "nothing to do",
    Status.FAILED: "failed",
    Status.SKIPPED: "left out",
}


def render(result: AutoQuantResult, title: str) -> str:
    """The whole page."""
    sections = [
        _overview(result),
        parts.section("What to do next", steps_to_do(result.advice)),
        _stages(result),
        _tried(result),
        _chosen(result),
        _findings(result),
    ]
    subtitle = f"automatic quantization for {result.target}: {' → '.join(result.steps)}"
    return parts.page(title, subtitle, [s for s in sections if s], head=STYLE)


def _overview(result: AutoQuantResult) -> str:
    verdict = "target met" if result.met else "target missed"
    tiles = [
        parts.tile("Float", number(result.float_score), "score of the model given"),
        parts.tile("Quantized", number(result.score), verdict),
        parts.tile("Drop", number(result.drop), f"allowed {number(result.allowed_drop)}"),
    ]
    for label, score in (("Weights only", result.weights_only), ("Activations only", result.activations_only)):
        if score is not None:
            tiles.append(parts.tile(label, number(score), f"drop {number(result.float_score - score)}"))
    tiles += [
        parts.tile("Evaluations", str(result.evaluations), "earlier processes included"),
        parts.tile("Time", duration(result.seconds), "earlier processes included"),
    ]
    return f'<section><div class="tiles">{"".join(tiles)}</div></section>'


def _stages(result: AutoQuantResult) -> str:
    shown = [t for t in result.trials if t.score is not None]
    rows = [Dot(_label(t), t.score, number(t.score), _kind(t, result)) for t in shown if t.score is not None]
    goal = result.float_score - result.allowed_drop
    rules = [Rule("float", result.float_score, solid=True), Rule("allowed", goal)]
    key = legend(
        [("mark", "chosen"), ("first", "kept, or a step towards it"), ("second", "reference, or not better"),
         ("line solid", f"float {number(result.float_score)}"), ("line", f"allowed {number(goal)}")]
    )  # fmt: skip
    return parts.section("Score at each stage, in order", parts.figure(dots(rows, rules), key))


def _label(trial: Trial) -> str:
    return f"+ {trial.name.replace('_', ' ')}" if trial.kind == "technique" else trial.name


def _kind(trial: Trial, result: AutoQuantResult) -> str:
    if trial.steps == result.steps and trial.status is not Status.REFERENCE:
        return "mark"
    on_the_way = trial.steps == result.steps[: len(trial.steps)] and bool(trial.steps)
    return "first" if trial.status is Status.KEPT or (on_the_way and trial.kind == "technique") else "second"


def _tried(result: AutoQuantResult) -> str:
    columns = ("#", "What", "On top of", "Outcome", "Score", "Drop", "Seconds", "Remark")
    rows: list[tuple[Cell, ...]] = []
    for index, trial in enumerate(result.trials, 1):
        drop = None if trial.score is None else result.float_score - trial.score
        chosen = trial.steps == result.steps and trial.status in (Status.KEPT, Status.WORSE)
        outcome = "chosen" if chosen else _WORDS[trial.status]
        settings = ", ".join(f"{k} {v}" for k, v in trial.settings.items())
        remark = "; ".join(text for text in (settings, trial.reason) if text)
        base = " → ".join(trial.steps[:-1]) if trial.kind != "reference" else " → ".join(trial.steps)
        rows.append((index, trial.name, base, outcome, trial.score, drop, round(trial.seconds, 2), remark))
    return parts.section("What was tried", parts.table(columns, rows))


def _chosen(result: AutoQuantResult) -> str:
    steps = "".join(f"<p><b>{escape(name)}</b>: {escape(report.summary)}</p>" for name, report in result.sim.reports)
    facts = {
        "Steps": " → ".join(result.steps),
        "Target": result.target,
        "Weights": result.sim.weights or result.sim.target.weights,
        "Activations": result.sim.activations or result.sim.target.activations,
        "Range setting of activations": result.sim.scheme,
        "Range setting of weights": result.sim.weight_scheme,
        "Seed": str(result.sim.seed),
    }
    if result.wider:
        facts["More bits at"] = ", ".join(f"{site}: {text}" for site, text in result.wider.items())
    facts |= {f"File: {purpose}": path.name for purpose, path in result.files.items()}
    return parts.section("The chosen network", parts.facts(facts) + steps)


def _findings(result: AutoQuantResult) -> str:
    if not result.findings:
        return ""
    return parts.section("What validation found", "".join(f"<p>{escape(line)}</p>" for line in result.findings))


def number(value: float) -> str:
    """Four digits, without a minus before a zero."""
    return f"{value + 0.0:.4g}"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
