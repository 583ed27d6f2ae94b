"""``bitwright quantize``: model and data in; quantized artefacts and a report out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.bundle import is_stem
from bitwright.cli import console, options
from bitwright.data import SAMPLES, ImplausibleDataWarning, doubt_of_accuracy, image_options_of
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.data import Dataset, ImageOptions, TextOptions
    from bitwright.metrics import Figure
    from bitwright.report import Accuracy
    from bitwright.simulation import QuantSim
    from bitwright.technique import Step


def quantize(
    *,
    model: options.Model,
    out: options.OutputFolder,
    data: options.CalibrationSource = None,
    bank: options.Bank = None,
    labels: options.Labels = None,
    metric: options.Metric = None,
    evaluation_data: options.EvaluationData = None,
    target: options.Target = "default",
    weights: options.WeightType = None,
    activations: options.ActivationType = None,
    kv_cache: options.KvCache = None,
    scheme: options.Scheme = "sqnr",
    weight_scheme: options.WeightScheme = "minmax",
    recipe: Annotated[
        str | None,
        typer.Option(help="Techniques in order, as a,b,c or a .yaml or .json file with settings.", show_default=False),
    ] = None,
    override: options.Overrides = None,
    load: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What the framework needs to open the model, such as outputs=logits. Repeatable.",
            show_default=False,
        ),
    ] = None,
    calibration_samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    tokenizer: options.Tokenizer = None,
    sequence_length: options.SequenceLength = 256,
    seed: options.Seed = 0,
    name: options.Stem = None,
    encodings_version: options.EncodingsVersion = "1.0.0",
    plain_session: options.PlainSession = None,
    reference_samples: options.ReferenceSamples = SAMPLES,
    format: options.Formats = None,
    workers: options.Workers = 1,
    cluster: options.Cluster = None,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a model: apply a recipe, calibrate, export.

    Writes NAME.onnx (float graph, updated weights), NAME.encodings, NAME.qdq.onnx, NAME.record.npz, report.json and
    report.html.
    Interrupted, the same command goes on from the last finished layer.
    """
    from bitwright.bundle import refuse_planned, refuse_unnamed_types
    from bitwright.runs import run_in
    from bitwright.simulation import QuantSim, read_recipe
    from bitwright.targets import load_target

    text = options.text_options(model, tokenizer, sequence_length)
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data, evaluation_data)
    asked = Asked.of(metric, evaluation_data or data, labels, batch_size, text, images)
    stem = name if name is not None else model.name if model.is_dir() else model.stem
    source = options.open_bank(data, bank)
    batches = batch_size if source is None else 0
    job = Job(
        model, data or bank or Path(), out, stem, encodings_version, batches, plain_session, reference_samples,
        options.read_formats(format),
    )  # fmt: skip
    job.check()
    before, steps = options.steps_before(source, read_recipe(recipe))
    chosen = load_target(target)
    with options.shown_progress(quiet=quiet) as progress, options.opened_workers(workers, cluster) as crew:
        clock = Clock()
        with clock("open"):
            sim = QuantSim(
                opened(model, load, data), options.sample_of(model, data), target=chosen, weights=weights,
                activations=activations, scheme=scheme, weight_scheme=weight_scheme,
                overrides=options.read_overrides(override), kv_cache=kv_cache, seed=seed, progress=progress,
            )  # fmt: skip
            sim.attach(source=model, executor=crew)
            refuse_planned(sim.state, out, job.name, job.formats)
            refuse_unnamed_types(sim.plan, encodings_version)
            calibration = source or sim.open(
                job.data, batch_size=batch_size, limit=calibration_samples, text=text, images=images
            )
            scored = Scored.open(asked.open(sim), labels) if labels is not None else None
            if asked.metrics:
                asked.open(sim)  # what doesn't fit fails before work
            # Held through the run, and with it the float weights: only where it is compared with.
            original = sim.fork() if asked.metrics else sim
        with run_in(out) as run:
            run.record("quantize", model=str(model), target=chosen.name, data=str(job.data), recipe=recipe)
            sim.attach(run=run)
            for step in before:
                sim.apply(step.technique, **step.settings)
            accuracy = _work(sim, steps, calibration, scored, clock)
            figures = asked.figures(sim, original, clock)
            files = _export(sim, job, calibration, accuracy, figures, clock)
            run.finish()
    _print_floats(sim)
    if asked.metrics and evaluation_data is None:
        console.say("note: metrics were measured on the calibration data; --evaluation-data takes others")
    _print_summary(out, files, accuracy, figures)


SHOWN = 10
"""Operations that one line names at most."""


@dataclass(frozen=True)
class Job:
    """What is read and written; `data` are samples, or a bank, which has no batches."""

    model: Path
    data: Path
    out: Path
    name: str
    encodings_version: str
    batch_size: int
    plain_session: bool | None = None
    reference_samples: int = SAMPLES
    formats: dict[str, dict[str, Any]] | None = None

    def check(self) -> None:
        """Refuse names that can't work, before anything is opened.

        Raises:
            InputError: the name is not a file name, or the schema doesn't exist.
        """
        if not is_stem(self.name):
            raise InputError(f"--name {self.name!r} can't be a file name; use a plain stem such as 'mobilenet'")
        options.check_encodings_version(self.encodings_version)


@dataclass
class Clock:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


@dataclass
class Scored:
    """All the labelled data, whatever part of them is used to calibrate."""

    data: Dataset
    labels: object

    @classmethod
    def open(cls, dataset: Dataset, labels: Path) -> Scored:
        """Read labels, and check that they go with the data."""
        from bitwright.cli.labels import read_labels

        return cls(dataset, read_labels(labels, dataset.samples))


@dataclass(frozen=True)
class Asked:
    """Metrics that were asked for, and on what."""

    metrics: tuple[str, ...]
    data: Path | None
    labels: Path | None
    batch_size: int
    text: TextOptions | None = None
    images: ImageOptions | None = None

    @classmethod
    def of(
        cls,
        named: str | None,
        data: Path | None,
        labels: Path | None,
        batch_size: int,
        text: TextOptions | None = None,
        images: ImageOptions | None = None,
    ) -> Asked:
        """Read ``a,b,c``.

        Raises:
            InputError: there is no such metric, top1 has no labels, or there are no samples to evaluate.
        """
        if labels is not None and data is None:
            raise InputError("--labels are those of --data; a bank has no samples to evaluate")
        if named and data is None:
            raise InputError("--metric needs --evaluation-data; a bank has no samples to evaluate")
        from bitwright.metrics import metric_factory

        names = tuple(part.strip() for part in named.split(",")) if named else ()
        for name in names:
            metric_factory(name, None if labels is None else ())
        return cls(names, data, labels, batch_size, text, images)

    @property
    def samples(self) -> Path:
        """What is evaluated on."""
        assert self.data is not None  # checked by `of`
        return self.data

    def open(self, sim: QuantSim) -> Dataset:
        """The samples, checked against the model's inputs."""
        return sim.open(self.samples, batch_size=self.batch_size, text=self.text, images=self.images)

    def figures(self, sim: QuantSim, original: QuantSim, clock: Clock) -> tuple[Figure, ...]:
        """Of the calibrated simulation, against the model as it was opened."""
        from bitwright.cli.labels import read_labels

        if not self.metrics:
            return ()
        with clock("evaluate"):
            data = self.open(sim)
            labels = None if self.labels is None else read_labels(self.labels, data.samples)
            return tuple(sim.measure(data, *self.metrics, reference=original, labels=labels).values())


def opened(path: Path, load: Sequence[str] | None, data: Path | None = None) -> object:
    """What `QuantSim` is given: the path, or the model opened with the ``KEY=VALUE`` options of its backend.

    Raises:
        InputError: an option has no "=", or the backend doesn't know it.
    """
    if not load:
        return path
    from bitwright.simulation import open_model

    return open_model(path, options.sample_of(path, data), options=options.read_load_options(load))[1]


def _work(
    sim: QuantSim, steps: Sequence[Step], calibration: Dataset, scored: Scored | None, clock: Clock
) -> Accuracy | None:
    """Techniques, then ranges, then accuracy where there are labels."""
    from bitwright.cli.labels import classes, top1
    from bitwright.report import Accuracy

    before = None
    if scored is not None:
        # Before any technique: the reference is the user's own model.
        with clock("evaluate"):
            scores = sim.predict(scored.data, simulated=False)[0]
            before = classes(scores)
            right = top1(before, scored.labels)  # type: ignore[arg-type]
            if doubt := doubt_of_accuracy(right, scores[0].size, len(before)):
                warnings.warn(doubt, ImplausibleDataWarning, stacklevel=2)
    for step in steps:
        with clock(step.technique):
            sim.apply(step.technique, calibration, **step.settings)
    with clock("calibrate"):
        sim.calibrate(calibration)
    if scored is None or before is None:
        return None
    with clock("evaluate"):
        after = classes(sim.predict(scored.data)[0])
    return Accuracy(
        samples=len(before),
        float_model=top1(before, scored.labels),  # type: ignore[arg-type]
        simulated=top1(after, scored.labels),  # type: ignore[arg-type]
        agreement=float((before == after).mean()),
    )


def _export(
    sim: QuantSim, job: Job, calibration: Dataset, accuracy: Accuracy | None, figures: Sequence[Figure], clock: Clock
) -> dict[str, str]:
    from bitwright.bundle import ARRAYS_SUFFIX
    from bitwright.report import Calibration, MetricRecord, complete_report

    with clock("export"):
        bundle = sim.export(
            job.out, name=job.name, encodings_version=job.encodings_version, plain_session=job.plain_session,
            reference_samples=job.reference_samples, formats=job.formats,
        )  # fmt: skip
    if bundle.stored_anew:
        console.say(
            f"{len(bundle.stored_anew)} weights are stored as uint8, which plain ONNX Runtime sessions need on CPUs "
            f"without VNNI, and which is slower: {', '.join(bundle.stored_anew)}"
        )
    files = {purpose: path.name for purpose, path in bundle.files.items()}
    if (arrays := job.out / f"{job.name}{ARRAYS_SUFFIX}").is_file():
        files["record"] = arrays.name
    json_file, page = complete_report(
        job.out,
        job.name,
        source=job.model.name,
        calibration=Calibration(
            source=str(job.data), samples=calibration.samples, batch_size=job.batch_size,
            scheme=sim.scheme, fingerprint=calibration.fingerprint(), images=image_options_of(calibration),
        ),
        accuracy=accuracy,
        metrics=[MetricRecord(**asdict(f)) for f in figures],
        seconds=clock.seconds,
    )  # fmt: skip
    return {**files, "report": json_file.name, "page": page.name}


def _print_floats(sim: QuantSim) -> None:
    """What stays in float because no target could name it, and what else the plan has to say."""
    if unknown := sim.graph.unknown_ops:
        shown = ", ".join(f"{op.id} ({op.native or op.type})" for op in unknown[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more (report.html)" if len(unknown) > SHOWN else ""
        console.say(f"note: in float, weights included, as no target can name their kind: {shown}{more}")
    for note in sim.plan.notes:
        console.say(f"note: {note}")


def _print_summary(out: Path, files: dict[str, str], accuracy: Accuracy | None, figures: Sequence[Figure] = ()) -> None:
    if figures:
        console.table(
            ("metric", "float", "simulated", "positions", "standard error"),
            [
                (
                    f.metric,
                    "" if f.float_model is None else f"{f.float_model:.4f}",
                    f"{f.simulated:.4f}",
                    str(f.count),
                    "" if f.error is None else f"{f.error:.4f}",
                )
                for f in figures
            ],
            numbers=("float", "simulated", "positions", "standard error"),
        )
    if accuracy is not None:
        console.table(
            ("", "top-1", "points", "same class"),
            (
                ("float", console.percent(accuracy.float_model), "", ""),
                (
                    "simulated",
                    console.percent(accuracy.simulated),
                    console.points(accuracy.simulated, accuracy.float_model),
                    "" if accuracy.agreement is None else console.percent(accuracy.agreement),
                ),
            ),
            numbers=("top-1", "points", "same class"),
        )
    for file in files.values():
        console.say(str(out / file))
