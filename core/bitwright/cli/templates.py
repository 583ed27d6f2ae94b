"""What `bitwright new` writes: a distribution that works as it stands, to be changed into one's own."""

from __future__ import annotations

from bitwright.cli.backend_template import BACKEND


def public_name(kind: str, name: str) -> str:
    """What the registered thing is called: targets by "-", as their files are."""
    return name.replace("_", "-") if kind == "target" else name


def filled(kind: str, name: str) -> dict[str, str]:
    """Every file of a distribution of that kind: path within its folder → text."""
    title = "".join(part.title() for part in name.split("_"))
    values = {"NAME": name, "PUBLIC": public_name(kind, name), "DASHED": name.replace("_", "-"), "TITLE": title}
    own = {"technique": TECHNIQUE, "target": TARGET, "backend": {**BACKEND, "pyproject.toml": _BACKEND_PROJECT}}[kind]
    return {_put(path, values): _put(text, values) for path, text in {**COMMON, **own}.items()}


def _put(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


COMMON = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "bitwright-@DASHED@"
version = "0.1.0"
description = "@SUMMARY@"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["bitwright", "numpy>=1.26"]

[project.optional-dependencies]
test = ["bitwright[onnx]", "pytest>=8.2"]

[project.entry-points.bitwright]
@NAME@ = "bitwright_@NAME@.plugin"

[tool.hatch.build.targets.wheel]
packages = ["bitwright_@NAME@"]
""",
    "bitwright_@NAME@/__init__.py": '"""@SUMMARY@"""\n',
    "bitwright_@NAME@/py.typed": "",
}

_BACKEND_PROJECT = (
    COMMON["pyproject.toml"]
    .replace("@SUMMARY@", "A backend for bitwright: @NAME@")
    .replace('["bitwright", "numpy>=1.26"]', '["bitwright[onnx]", "numpy>=1.26"]')
)

TECHNIQUE = {
    "pyproject.toml": COMMON["pyproject.toml"].replace("@SUMMARY@", "A technique for bitwright: @NAME@"),
    "bitwright_@NAME@/__init__.py": '"""A technique for bitwright."""\n',
    "README.md": """\
# bitwright-@DASHED@

A technique for bitwright: it searches the scale of every weight for the least squared error of its values.

    pip install -e ".[test]"
    pytest
    bitwright quantize model.onnx --data calibration.npz --weights int4 --recipe @NAME@ --out out/

Change `bitwright_@NAME@/technique.py` into your own. bitwright's page "Write a technique" says what it may use.
""",
    "bitwright_@NAME@/plugin.py": '''\
"""What this distribution registers; it must import no framework."""

from __future__ import annotations

from bitwright.hookspecs import TechniqueInfo, hookimpl


@hookimpl
def register_techniques() -> list[TechniqueInfo]:
    """The technique."""
    return [
        TechniqueInfo(
            "@NAME@",
            "Search the scale of every weight for the least squared error.",
            factory="bitwright_@NAME@.technique:@TITLE@",
            settings="bitwright_@NAME@.technique:@TITLE@Settings",
        )
    ]
''',
    "bitwright_@NAME@/technique.py": '''\
"""Weight scales by the squared error of the weights: fractions of the range are tried, for each scale by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.grids import Encoding, fit_pairs, to_groups
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report, Settings, frozen_note
from pydantic import Field


class @TITLE@Settings(Settings):
    """How finely to search.

    Attributes:
        candidates: fractions i/N of the range that are tried.
    """

    candidates: int = Field(40, ge=1)


class @TITLE@:
    """Searches the scale of every weight; calibration keeps it, and other techniques may search again."""

    name: ClassVar[str] = "@NAME@"
    Settings: ClassVar[type[Settings]] = @TITLE@Settings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: @TITLE@Settings) -> Iterable[Request]:
        """None: the weights alone decide."""
        return ()

    def apply(self, ctx: Context[@TITLE@Settings]) -> Outcome:
        """Search every weight that has an integer grid of its own and isn't frozen."""
        found: dict[str, Encoding] = {}
        rows: list[tuple[str, float, float]] = []
        weights = dict.fromkeys(op.weight for op in ctx.graph.linear_ops if op.weight is not None)
        ctx.progress.start("Searching weight scales", len(weights))
        for id in weights:
            encoding = ctx.encodings.get(id)  # None where the target leaves the weight in float
            if encoding is not None and searchable(encoding):
                weight = np.asarray(ctx.params[id])
                found[id] = search(weight, encoding, ctx.settings.candidates)
                rows.append((id, error(weight, encoding), error(weight, found[id])))
            ctx.progress.advance(1, id)
        ctx.progress.finish()
        summary = f"{len(found)} weight scales searched" if found else "no weight scale to search"
        if note := frozen_note(ctx):
            summary += f"; {note}"
        report = Report(summary, {"weights": float(len(found))}, ("weight", "before", "after"), tuple(rows))
        return Outcome(encodings=found, report=report)


def searchable(encoding: Encoding) -> bool:
    """Whether its scales are numbers of their own: not of float formats, nor integer multiples (LPBQ), nor frozen."""
    return encoding.float_format is None and encoding.block_scale is None and encoding.bits <= 8 and not encoding.frozen


def search(weight: np.ndarray[Any, Any], encoding: Encoding, candidates: int) -> Encoding:
    """The encoding with the best fraction of each scale; the zero points stay."""
    groups = to_groups(np.asarray(weight, np.float64), encoding.granularity)  # what shares a scale comes last
    zero = encoding.zero_point[..., None].astype(np.float64)
    low, high = encoding.grid.qmin - zero, encoding.grid.qmax - zero
    full = encoding.scale.astype(np.float64)
    best, least = full, np.full(full.shape, np.inf)
    for fraction in np.arange(candidates, 0, -1) / candidates:
        scale = (full * fraction)[..., None]
        rounded = np.clip(np.rint(groups / scale), low, high) * scale
        found = np.square(groups - rounded).sum(axis=-1)
        best, least = np.where(found < least, full * fraction, best), np.minimum(found, least)
    kept = encoding.with_(scale=best.astype(np.float32), kept=True, source="@NAME@")
    return fit_pairs(kept, weight)


def error(weight: np.ndarray[Any, Any], encoding: Encoding) -> float:
    """The mean squared error of the rounded weight."""
    return float(np.square(np.asarray(weight, np.float64) - encoding.fake_quantize(weight)).mean())
''',
    "tests/test_@NAME@.py": '''\
"""The technique by bitwright's kit, and what is its own."""

from __future__ import annotations

import numpy as np
from bitwright import registry
from bitwright.grids import PerChannel, QuantSpec, encoding_of_weights
from bitwright.testing.technique_contract import TechniqueContract
from bitwright_@NAME@.technique import @TITLE@, error, search


class TestByTheKit(TechniqueContract):
    needs_data = False

    def technique(self) -> @TITLE@:
        return @TITLE@()


def test_it_is_registered() -> None:
    assert isinstance(registry.technique("@NAME@"), @TITLE@)


def test_outliers_no_longer_set_the_step() -> None:
    weight = np.random.default_rng(0).standard_t(3, (16, 64)).astype(np.float32)
    start = encoding_of_weights(weight, QuantSpec(3, granularity=PerChannel(0)))
    found = search(weight, start, 40)
    assert error(weight, found) < 0.8 * error(weight, start)
    assert (found.scale <= start.scale).all()
''',
}

TARGET = {
    "pyproject.toml": COMMON["pyproject.toml"].replace("@SUMMARY@", "A target for bitwright: @PUBLIC@"),
    "bitwright_@NAME@/__init__.py": '"""A target for bitwright."""\n',
    "README.md": """\
# bitwright-@DASHED@

A target for bitwright: 8-bit integers, int32 biases, one scale for each output channel of a weight.

    pip install -e ".[test]"
    pytest
    bitwright quantize model.onnx --data calibration.npz --target @PUBLIC@ --out out/

Change `bitwright_@NAME@/@NAME@.json` to what your hardware does. bitwright's page "Write a target" says how.
""",
    "bitwright_@NAME@/plugin.py": '''\
"""What this distribution registers."""

from __future__ import annotations

from bitwright.hookspecs import TargetInfo, hookimpl


@hookimpl
def register_targets() -> list[TargetInfo]:
    """The target."""
    return [TargetInfo("@PUBLIC@", "@TITLE@: 8-bit integers, int32 biases", file="bitwright_@NAME@:@NAME@.json")]
''',
    "bitwright_@NAME@/@NAME@.json": """\
{
  "bitwright": {
    "extends": "generic-int8",
    "weights": "int8",
    "activations": "uint8",
    "quantized_ops": [
      "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Concat", "Relu", "Clip", "MaxPool", "AveragePool",
      "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "Identity"
    ]
  },
  "defaults": {"strict_symmetric": "True"}
}
""",
    "tests/test_@NAME@.py": '''\
"""The target as it is installed, and what it does to a model."""

from __future__ import annotations

from bitwright.placement import build_plan
from bitwright.targets import load_target, target_summary
from bitwright.testing import models


def test_it_is_registered() -> None:
    target = load_target("@PUBLIC@")
    assert (target.weights, target.activations) == ("int8", "uint8")
    assert target.per_channel("Conv") and target.runs("Conv") and not target.runs("Softmax")
    assert target_summary("@PUBLIC@").description.startswith("@TITLE@")


def test_what_it_quantizes() -> None:
    graph = models.conv_bn_relu().graph
    plan = build_plan(graph, load_target("@PUBLIC@"))
    weights = {op.weight: plan.spec(op.weight) for op in graph.linear_ops if op.weight is not None}
    assert all(spec is not None and (spec.bits, spec.strict) == (8, True) for spec in weights.values())
    assert all(plan.spec(tensor) is not None for tensor in (*graph.inputs, *graph.outputs))
''',
}
