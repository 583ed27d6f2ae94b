"""``bitwright quantize``: model and data in; quantized artefacts and a report out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import console
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.data import Dataset
    from bitwright.quantsim import QuantSim
    from bitwright.report import Accuracy
    from bitwright.runs import RunDirectory
    from bitwright.technique import Recipe

RUN_FOLDER = ".run"


def quantize(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model file.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(help="Calibration samples: .npz (input name → array), .npy, or a folder.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it isn't there.", show_default=False)],
    labels: Annotated[
        Path | None, typer.Option(help="Class indices of the samples (.npy), to report accuracy.", show_default=False)
    ] = None,
    target: Annotated[str, typer.Option(help="A preset of `bitwright targets`, or a configuration file.")] = "default",
    weights: Annotated[
        str | None,
        typer.Option(
            help="Type of weights, such as int8, int4, int4:block32 (default: the target's).", show_default=False
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="Type of activations, such as uint8, uint16 (default: the target's).", show_default=False),
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="Range setting of activations: minmax, percentile, sqnr, mse, entropy.")
    ] = "sqnr",
    weight_scheme: Annotated[str, typer.Option(help="Range setting of weights.")] = "minmax",
    recipe: Annotated[
        str | None,
        typer.Option(help="Techniques in order, as a,b,c or a .yaml or .json file with settings.", show_default=False),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TYPE",
            help="Another type, or float, for an op or tensor; OP:weights=TYPE for its weights. Repeatable.",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What the framework needs to open the model, such as outputs=logits. Repeatable.",
            show_default=False,
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Use only the first samples (default: all).", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Stem of the files written (default: the model's).", show_default=False)
    ] = None,
    encodings_version: Annotated[
        str, typer.Option(help="Schema of the encodings file: 0.6.1, 1.0.0, 2.0.0 or 2.1.0.")
    ] = "1.0.0",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Quantize a model: apply a recipe, calibrate, export.

    Writes NAME.onnx (float graph, updated weights), NAME.encodings, NAME.qdq.onnx, report.json and report.html.
    Interrupted, the same command goes on from the last finished layer.
    """
    from bitwright.progress import progress_for, silent
    from bitwright.quantsim import QuantSim
    from bitwright.recipe import read_recipe
    from bitwright.target import load_target

    job = Job(model, data, out, name if name is not None else model.stem, encodings_version, batch_size)
    job.check()
    steps = read_recipe(recipe)
    chosen = load_target(target)
    with silent() if quiet else progress_for(sys.stderr) as progress:
        clock = Clock()
        with clock("open"):
            sim = QuantSim(
                opened(model, load or []), target=chosen, weights=weights, activations=activations, scheme=scheme,
                weight_scheme=weight_scheme, overrides=read_overrides(override or []), seed=seed, progress=progress,
            )  # fmt: skip
            sim.source = model
            calibration = sim.open(data, batch_size=batch_size, limit=calibration_samples)
            scored = Scored.open(sim, data, labels, batch_size) if labels is not None else None
        with run_in(out) as run:
            run.record("quantize", model=str(model), target=chosen.name, data=str(data), recipe=recipe)
            sim.run = run
            accuracy = _work(sim, steps, calibration, scored, clock)
            files = _export(sim, job, calibration, accuracy, clock)
            run.finish()
    _tell(out, files, accuracy)


@dataclass(frozen=True)
class Job:
    """What is read and written."""

    model: Path
    data: Path
    out: Path
    name: str
    encodings_version: str
    batch_size: int

    def check(self) -> None:
        """Refuse names that can't work, before anything is opened.

        Raises:
            InputError: the name is no file name, or the schema doesn't exist.
        """
        from bitwright.formats import VERSIONS

        if not self.name or Path(self.name).name != self.name:
            raise InputError(f"--name {self.name!r} can't be a file name; use a plain stem such as 'mobilenet'")
        if self.encodings_version not in VERSIONS:
            known = ", ".join(VERSIONS)
            raise InputError(f"there is no encodings version {self.encodings_version!r}; there are {known}")


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
    def open(cls, sim: QuantSim, data: Path, labels: Path, batch_size: int) -> Scored:
        """Open data and labels together, and check that they go together."""
        from bitwright.cli.labels import read_labels

        dataset = sim.open(data, batch_size=batch_size)
        return cls(dataset, read_labels(labels, dataset.samples))


def opened(path: Path, given: list[str]) -> Any:
    """What `QuantSim` is given: the path, or the model opened with ``KEY=VALUE`` options of its backend.

    A value is JSON where it can be, a list where it holds commas, and otherwise text.

    Raises:
        InputError: an option has no "=", or the backend doesn't know it.
    """
    if not given:
        return path
    from bitwright.opening import open_model

    options: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        if not key or not value:
            raise InputError(f"--load {text!r} isn't of the form KEY=VALUE, such as outputs=logits")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value.split(",") if "," in value else value
    return open_model(path, options=options)[1]


ROLES = ("weights", "activations", "bias")


def read_overrides(given: list[str]) -> dict[str, Any]:
    """``NAME=TYPE`` and ``OP:weights=TYPE`` options as `QuantSim` takes them; names may hold "=", types don't.

    Raises:
        InputError: one has no "=".
    """
    found: dict[str, Any] = {}
    for text in given:
        name, _, kind = text.rpartition("=")
        if not name or not kind:
            raise InputError(f"--override {text!r} isn't of the form NAME=TYPE, such as conv1=float")
        op, _, role = name.rpartition(":")
        if op and role in ROLES:
            found.setdefault(op, {})[role] = kind
        else:
            found[name] = kind
    return found


@contextmanager
def run_in(out: Path) -> Iterator[RunDirectory]:
    """The run directory inside the output folder; a failure that leaves nothing to resume leaves no folders either."""
    from bitwright.durable import make_directory
    from bitwright.runs import RunDirectory

    fresh = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_directory(out)
    run = None
    try:
        with RunDirectory(out / RUN_FOLDER) as run:
            try:
                yield run
            except BaseException:
                run.discard_if_empty()
                raise
    except BaseException:
        for folder in fresh:
            try:
                folder.rmdir()
            except OSError:
                break
        raise


def _work(sim: QuantSim, steps: Recipe, calibration: Dataset, scored: Scored | None, clock: Clock) -> Accuracy | None:
    """Techniques, then ranges, then accuracy where there are labels."""
    from bitwright.cli.labels import classes, top1
    from bitwright.report import Accuracy

    before = None
    if scored is not None:
        # Before any technique: the reference is the user's own model.
        with clock("evaluate"):
            before = classes(sim.predict(scored.data, simulated=False)[0])
            top1(before, scored.labels)  # type: ignore[arg-type]
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


def _export(sim: QuantSim, job: Job, calibration: Dataset, accuracy: Accuracy | None, clock: Clock) -> dict[str, str]:
    from bitwright.report import Calibration, build_report, write_report

    with clock("export"):
        bundle = sim.export(job.out, name=job.name, encodings_version=job.encodings_version)
    files = {purpose: path.name for purpose, path in bundle.files.items()}
    report = build_report(
        sim,
        name=job.name,
        source=job.model.name,
        calibration=Calibration(
            source=str(job.data), samples=calibration.samples, batch_size=job.batch_size,
            scheme=sim.scheme, fingerprint=calibration.fingerprint(),
        ),
        accuracy=accuracy,
        seconds=clock.seconds,
        files=files,
    )  # fmt: skip
    json_file, page = write_report(report, job.out)
    return {**files, "report": json_file.name, "page": page.name}


def _tell(out: Path, files: dict[str, str], accuracy: Accuracy | None) -> None:
    if accuracy is not None:
        console.table(
            ("", "top-1", "points", "same class"),
            (
                ("float", console.percent(accuracy.float_model), "", ""),
                (
                    "simulated",
                    console.percent(accuracy.simulated),
                    console.points(accuracy.simulated, accuracy.float_model),
                    console.percent(accuracy.agreement),
                ),
            ),
            numbers=("top-1", "points", "same class"),
        )
    for file in files.values():
        console.say(str(out / file))
