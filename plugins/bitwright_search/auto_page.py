"""The diagnosis of `auto_quantize` as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from bitwright.report import Cell, parts
from bitwright_search.auto_result import AutoQuantResult, Status, Trial
from bitwright_search.figures import STYLE, Dot, Rule, dots, legend
from bitwright_search.scores import Scale

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
        parts.section("What to do next", parts.numbered(result.advice)),
        _stages(result),
        _tried(result),
        _chosen(result),
        _findings(result),
    ]
    subtitle = f"automatic quantization for {result.target}: {' → '.join(result.steps)}"
    return parts.page(title, subtitle, [s for s in sections if s], head=STYLE)


def verdict(result: AutoQuantResult) -> str:
    """The whole search in a sentence or two."""
    scale = Scale(result.metric)
    told = (
        f"The best network, {result.best}, has {_article(result.metric)} of {scale.text(result.score)} where float has "
        f"{scale.text(result.float_score)}: "
    )
    if result.drop <= 0:
        return told + "nothing is lost."
    whether = "no more than" if result.met else "more than"
    lost = scale.drop(result.drop, result.margin)
    return told + f"a loss of {lost}, {whether} the {scale.drop(result.allowed_drop)} allowed{_sure(result)}."


def _sure(result: AutoQuantResult) -> str:
    return "" if result.confidence is None else f" (with a confidence of {result.confidence:.4g}, the margin included)"


def _article(metric: str) -> str:
    return f"{'an' if metric[0] in 'aeiou' else 'a'} {metric}"


def _overview(result: AutoQuantResult) -> str:
    scale = Scale(result.metric)
    tiles = [
        parts.tile("Float", scale.text(result.float_score), f"{result.metric} of the model given"),
        parts.tile("Quantized", scale.text(result.score), "target met" if result.met else "target missed"),
        parts.tile(_drop(scale), scale.figure(result.drop), f"allowed {scale.figure(result.allowed_drop)}"),
    ]
    for label, score in (("Weights only", result.weights_only), ("Activations only", result.activations_only)):
        if score is not None:
            tiles.append(parts.tile(label, scale.text(score), f"drop {scale.drop(result.float_score - score)}"))
    tiles += [
        parts.tile("Evaluations", str(result.evaluations), "earlier processes included"),
        parts.tile("Time", duration(result.seconds), "earlier processes included"),
    ]
    told = f"<p class=verdict>{escape(verdict(result))}</p>"
    return f'<section>{told}<div class="tiles">{"".join(tiles)}</div></section>'


def _stages(result: AutoQuantResult) -> str:
    scale = Scale(result.metric)
    shown = [(t, t.score) for t in result.trials if t.score is not None]
    rows = [Dot(_label(t), scale.place(score), scale.text(score), _kind(t, result)) for t, score in shown]
    goal = result.float_score - result.allowed_drop
    rules = [Rule("float", scale.place(result.float_score), solid=True), Rule("allowed", scale.place(goal))]
    key = legend(
        [("mark", "chosen"), ("first", "kept, or a step towards it"), ("second", "reference, or not better"),
         ("line solid", f"float {scale.text(result.float_score)}"), ("line", f"allowed {scale.text(goal)}")]
    )  # fmt: skip
    plot = parts.figure(dots(rows, rules, label=scale.label), key)
    return parts.section(f"{_capital(result.metric)} at each stage, in order", plot)


def _drop(scale: Scale) -> str:
    return f"Drop{scale.unit_of_drops}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _label(trial: Trial) -> str:
    return f"+ {trial.name.replace('_', ' ')}" if trial.kind == "technique" else trial.name


def _kind(trial: Trial, result: AutoQuantResult) -> str:
    if trial.steps == result.steps and trial.status is not Status.REFERENCE:
        return "mark"
    on_the_way = trial.steps == result.steps[: len(trial.steps)] and bool(trial.steps)
    return "first" if trial.status is Status.KEPT or (on_the_way and trial.kind == "technique") else "second"


def _tried(result: AutoQuantResult) -> str:
    scale = Scale(result.metric)
    columns = (
        "#",
        "What",
        "On top of",
        "Outcome",
        _capital(scale.label),
        _drop(scale),
        "±",
        "Seconds",
        "Remark",
    )
    rows: list[tuple[Cell, ...]] = []
    for index, trial in enumerate(result.trials, 1):
        score = None if trial.score is None else round(scale.place(trial.score), 6)
        drop = None if trial.score is None else round(scale.place(result.float_score - trial.score), 6)
        chosen = trial.steps == result.steps and trial.status in (Status.KEPT, Status.WORSE)
        outcome = "chosen" if chosen else _WORDS[trial.status]
        settings = ", ".join(f"{k} {v}" for k, v in trial.settings.items())
        remark = "; ".join(text for text in (settings, trial.reason) if text)
        base = " → ".join(trial.steps[:-1]) if trial.kind != "reference" else " → ".join(trial.steps)
        margin = None if trial.margin is None else round(scale.place(trial.margin), 6)
        rows.append((index, trial.name, base, outcome, score, drop, margin, round(trial.seconds, 2), remark))
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
    settings = parts.fold(f"{len(facts)} settings and files", parts.facts(facts))
    return parts.section("The chosen network", steps + settings)


def _findings(result: AutoQuantResult) -> str:
    if not result.findings:
        return ""
    return parts.section("What validation found", "".join(f"<p>{escape(line)}</p>" for line in result.findings))


def duration(seconds: float) -> str:
    """Seconds as a reader wants them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
