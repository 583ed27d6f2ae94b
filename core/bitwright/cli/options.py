"""Options that several commands have, tools of plugins included, and what their texts mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.bank import Bank as Bank_
    from bitwright.data import Dataset, ImageOptions, Images, TextOptions
    from bitwright.progress import Progress
    from bitwright.technique import Recipe, Step
    from bitwright.workers import Workers as Crew

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model file.", show_default=False)]
ExportDirectory = Annotated[
    Path, typer.Argument(metavar="DIR", help="What `bitwright quantize --out` wrote.", show_default=False)
]
ExportName = Annotated[str | None, typer.Option(help="Which export, if the folder holds several.", show_default=False)]

Samples = Annotated[
    Path,
    typer.Option(help="Samples: .npz (input name → array), .npy, .txt, or a folder of images.", show_default=False),
]
VerifiedData = Annotated[
    Path | None,
    typer.Option(
        help="Samples: .npz (input name → array), .npy, or a folder of images (default: the export's own).",
        show_default=False,
    ),
]
CalibrationSource = Annotated[
    Path | None,
    typer.Option(
        help="Calibration samples: .npz (input name → array), .npy, .txt, or a folder of images.", show_default=False
    ),
]
Bank = Annotated[
    Path | None,
    typer.Option(help="A bank of `bitwright collect`, in place of --data: nothing runs.", show_default=False),
]
Labels = Annotated[
    Path | None, typer.Option(help="Class indices of the samples (.npy), to report accuracy.", show_default=False)
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Metrics of the outputs, as a,b,c: perplexity, kl, agreement, or top1 with --labels.", show_default=False
    ),
]
EvaluationData = Annotated[
    Path | None,
    typer.Option(help="Samples that metrics and labels are about (default: --data).", show_default=False),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="For data that are text: a tokenizer.json (default: the one in the model's folder).", show_default=False
    ),
]
SequenceLength = Annotated[int, typer.Option(min=1, help="For data that are text: tokens a sample.")]
ImageScaling = Annotated[
    str | None,
    typer.Option(
        metavar="SCALING",
        help="Pixel values of folders of images: 0..1, -1..1, 0..255, imagenet, or MEAN/DEVIATION of 0 to 255, as "
        "127.5/127.5 or 124,116,104/58,57,57 (default: 0..1).",
        show_default=False,
    ),
]
ImageFit = Annotated[
    str | None,
    typer.Option(
        metavar="FIT", help="How images get the model's size: crop or stretch (default: crop).", show_default=False
    ),
]
ImageBgr = Annotated[bool, typer.Option("--image-bgr", help="Channels of images as blue, green, red.")]
ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH", help="Size of images, where the model leaves it free, as 224x224.", show_default=False
    ),
]
SampleLimit = Annotated[
    int | None, typer.Option(min=1, help="Use only the first samples (default: all).", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples a batch.")]

Target = Annotated[str, typer.Option(help="A preset of `bitwright targets`, or a configuration file.")]
WeightType = Annotated[
    str | None,
    typer.Option(help="Type of weights, such as int8, int4, int4:block32 (default: the target's).", show_default=False),
]
ActivationType = Annotated[
    str | None,
    typer.Option(
        help="Type of activations: uint8, float16, int8:per_token, …; float: weights only (default: the target's).",
        show_default=False,
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="Type of attention's keys and values: int8, int8:per_head, int4:per_token (default: as all activations).",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TYPE",
        help="Another type, or float, for an op or tensor; OP:weights=TYPE for its weights. Repeatable.",
        show_default=False,
    ),
]
Scheme = Annotated[str, typer.Option(help="Range setting of activations: minmax, percentile, sqnr, mse, entropy.")]
WeightScheme = Annotated[str, typer.Option(help="Range setting of weights.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]

OutputFolder = Annotated[Path, typer.Option(help="Folder to write to; made if it isn't there.", show_default=False)]
Stem = Annotated[str | None, typer.Option(help="Stem of the files written (default: the model's).", show_default=False)]
EncodingsVersion = Annotated[str, typer.Option(help="Schema of the encodings file: 0.6.1, 1.0.0, 2.0.0 or 2.1.0.")]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="NAME[:KEY=VALUE]",
        help="Write this format only, such as gguf, compressed_tensors or qdq (default: the backend's). Repeatable.",
        show_default=False,
    ),
]
PlainSession = Annotated[
    bool | None,
    typer.Option(
        help="Make NAME.qdq.onnx exact in ONNX Runtime's default sessions on every CPU (default: the target's).",
        show_default=False,
    ),
]
ReferenceSamples = Annotated[
    int,
    typer.Option(
        min=0, help="Calibration samples that go into NAME.record.npz, for verify to prove the export on; 0 for none."
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that solve and evaluate side by side.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="A Dask cluster in place of them: its scheduler's address (tcp://host:8786), or local:N.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

ROLES = ("weights", "activations", "bias")


def read_overrides(given: Sequence[str] | None) -> dict[str, Any]:
    """``NAME=TYPE`` and ``OP:weights=TYPE`` options as `QuantSim` takes them; names may hold "=", types don't.

    Raises:
        InputError: one has no "=".
    """
    found: dict[str, Any] = {}
    for text in given or ():
        name, _, kind = text.rpartition("=")
        if not name or not kind:
            raise InputError(f"--override {text!r} isn't of the form NAME=TYPE, such as conv1=float")
        op, _, role = name.rpartition(":")
        if op and role in ROLES:
            found.setdefault(op, {})[role] = kind
        else:
            found[name] = kind
    return found


def read_load_options(given: Sequence[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` options of a backend's opening; a value is JSON where it can be, a list where it holds commas.

    Raises:
        InputError: one has no "=".
    """
    options: dict[str, Any] = {}
    for text in given or ():
        key, _, value = text.partition("=")
        if not key or not value:
            raise InputError(f"--load {text!r} isn't of the form KEY=VALUE, such as outputs=logits")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value.split(",") if "," in value else value
    return options


def read_formats(given: Sequence[str] | None) -> dict[str, dict[str, Any]] | None:
    """``NAME`` and ``NAME:KEY=VALUE,…`` options as `QuantSim.export` takes them; None where there are none.

    Raises:
        InputError: a setting has no "=", there is no such setting, or what a format needs isn't installed.
    """
    from bitwright.bundle import chosen_formats

    if not given:
        return None
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, _, settings = text.partition(":")
        pairs = [part.partition("=") for part in settings.split(",") if part]
        if bad := next((key for key, equals, _ in pairs if not equals), None):
            raise InputError(f"--format {text!r}: {bad!r} isn't of the form KEY=VALUE")
        found[name] = {key: value for key, _, value in pairs}
    chosen_formats(found)
    return found


def text_options(model: Path, tokenizer: Path | None, length: int) -> TextOptions:
    """How text becomes tokens, by ``--tokenizer`` and ``--sequence-length``."""
    from bitwright.data import TextOptions

    return TextOptions(tokenizer or TextOptions.beside(model).tokenizer, length)


def image_options(
    scaling: str | None, fit: str | None, bgr: bool, size: str | None, *data: Path | None
) -> ImageOptions | None:
    """How folders of images are read, by ``--image-…``; None where none of these options is given.

    Args:
        scaling, fit, bgr, size: the options.
        data: all that the command reads.

    Raises:
        InputError: an option can't be read, or none of the data is a folder of images.
    """
    from bitwright.data import ImageOptions, is_image_folder

    if scaling is None and fit is None and size is None and not bgr:
        return None
    if fit not in (None, "crop", "stretch"):
        raise InputError(f"--image-fit {fit!r}: give crop or stretch")
    found = ImageOptions(_scaling(scaling), "stretch" if fit == "stretch" else "crop", bgr, _size(size))
    found.moments()
    there = [path for path in data if path is not None and path.exists()]
    if there and not any(is_image_folder(path) for path in there):
        raise InputError(f"--image-… say how a folder of images is read, and {str(there[0])!r} is none: leave them out")
    return found


def _scaling(text: str | None) -> str | tuple[Any, Any]:
    if text is None:
        return "0..1"
    if "/" not in text:
        return text
    try:
        mean, deviation = (tuple(float(n) for n in part.split(",")) for part in text.split("/"))
    except ValueError:
        raise InputError(
            f"--image-scaling {text!r} isn't of the form MEAN/DEVIATION, such as 127.5/127.5 or 124,116,104/58,57,57"
        ) from None
    return mean, deviation


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise InputError(f"--image-size {text!r} isn't of the form HEIGHTxWIDTH, such as 224x224")
    return int(numbers[0]), int(numbers[1])


def as_images(data: Path, images: ImageOptions | None) -> Path | Images:
    """Data as every tool takes them: a folder of images with how it is to be read, where that was asked for."""
    from bitwright.data import Images, is_image_folder

    return Images(data, images) if images is not None and is_image_folder(data) else data


def check_encodings_version(version: str) -> None:
    """Refuse a schema that can't be written.

    Raises:
        InputError: it doesn't exist.
    """
    from bitwright.formats import versions

    if version not in versions():
        raise InputError(f"there is no encodings version {version!r}; there are {', '.join(versions())}")


def open_samples(
    model: Path, data: Path, *, batch_size: int, limit: int | None, images: ImageOptions | None = None
) -> Dataset:
    """Samples for a model that isn't simulated yet.

    Args:
        model: the model file.
        data: as `bitwright.data.open_data` takes it.
        batch_size: samples a batch.
        limit: use only so many; None for all.
        images: how a folder of images is read.

    Raises:
        InputError: either can't be read, or the samples don't fit the model's inputs.
    """
    from bitwright.data import TextOptions, open_data, require_ranks
    from bitwright.simulation import open_model

    backend, native = open_model(model, sample_of(model, data))
    specs = backend.input_specs(native)
    require_ranks(backend.graph(native), specs)
    return open_data(data, specs, batch_size=batch_size, limit=limit, images=images, text=TextOptions.beside(model))


def sample_of(model: Path, data: Path | None) -> Any:
    """The first samples of data that lie in arrays, for a factory (`model.py:build`) to be traced with; else None.

    Raises:
        InputError: the data can't be read.
    """
    from bitwright.data import first_arrays
    from bitwright.plugins import registry

    return None if data is None or registry.model_file(model) == model else first_arrays(data)


def open_calibration(
    model: Path,
    data: Path | None,
    bank: Path | None,
    *,
    batch_size: int,
    limit: int | None,
    images: ImageOptions | None = None,
) -> Dataset:
    """`open_samples`, or the bank in their place.

    Raises:
        InputError: as `open_samples` and `open_bank`.
    """
    opened = open_bank(data, bank)
    if opened is not None:
        return opened
    assert data is not None
    return open_samples(model, data, batch_size=batch_size, limit=limit, images=images)


def open_bank(data: Path | None, bank: Path | None) -> Bank_ | None:
    """The bank that takes the place of data; None where there are data.

    Raises:
        InputError: neither is given, or both; or the bank can't be opened.
    """
    if (data is None) == (bank is None):
        raise InputError("give either --data or --bank" + ("" if bank is None else ", not both"))
    if bank is None:
        return None
    from bitwright.bank import Bank

    return Bank.open(bank)


def steps_before(bank: Bank_ | None, recipe: Recipe) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """What has to be applied without data before a bank is valid, and what is left of the recipe.

    A recipe that begins with those steps isn't made to take them twice.
    """
    before = () if bank is None else bank.steps
    first = recipe.steps[: len(before)]
    told = [(s.technique, json.dumps(s.settings)) for s in first] == [
        (s.technique, json.dumps(s.settings)) for s in before
    ]
    return before, recipe.steps[len(before) :] if told else recipe.steps


def opened_workers(workers: int, cluster: str | None) -> AbstractContextManager[Crew | None]:
    """What ``--workers`` and ``--cluster`` ask for; None where all is done in this process.

    Raises:
        InputError: both are given, or no scheduler answers at the address.
        MissingExtraError: Dask isn't installed.
    """
    from bitwright.workers import lent

    if cluster is not None and workers > 1:
        raise InputError("give either --workers or --cluster")
    return lent(cluster if cluster is not None else workers)


def shown_progress(*, quiet: bool) -> AbstractContextManager[Progress]:
    """Progress on the error stream, unless it isn't wanted."""
    from bitwright.progress import progress_for, silent

    return silent() if quiet else progress_for(sys.stderr)
