"""What `bitwright new backend` writes: an adapter of a framework that is a few lines itself, to be replaced."""

from __future__ import annotations

BACKEND = {
    "README.md": """\
# bitwright-@DASHED@

A backend for bitwright, of a framework whose models are lists of dense layers (`framework.py`, which stands for yours).

    pip install -e ".[test]"
    pytest

`backend.py` shows a model to bitwright as a graph of pure functions; sessions, edits, simulation, files and quantized
ONNX are those of bitwright's dataflow base. Put your framework's layers in the place of `Dense` and `Relu`, one by one,
and a model with each into `cases` of the test; what your framework doesn't have stays in `declines`. bitwright's page
"Write a backend" says the rest.
""",
    "bitwright_@NAME@/__init__.py": '"""A backend for bitwright."""\n',
    "bitwright_@NAME@/plugin.py": '''\
"""What this distribution registers; it must import no framework."""

from __future__ import annotations

from bitwright.hookspecs import BackendInfo, hookimpl


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The backend."""
    return [
        BackendInfo(
            "@NAME@",
            "Stacks of dense layers.",
            factory="bitwright_@NAME@.backend:@TITLE@Backend",
            modules=("bitwright_@NAME@.framework",),
            suffixes=(".@NAME@",),
        )
    ]
''',
    "bitwright_@NAME@/framework.py": '''\
"""Stands for your framework: a model is a list of layers, kernels are (in, out). Put your own in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def dense(x: Array, kernel: Array, bias: Array) -> Array:
    """A matrix product with a bias."""
    return x @ kernel + bias


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


@dataclass(frozen=True, eq=False)
class Dense:
    """A fully connected layer."""

    name: str
    kernel: Array
    bias: Array


@dataclass(frozen=True)
class Relu:
    """A rectifier."""

    name: str


class Stack(list[Dense | Relu]):
    """A model."""

    def __call__(self, x: Array) -> Array:
        """All layers, one after the other."""
        for layer in self:
            x = dense(x, layer.kernel, layer.bias) if isinstance(layer, Dense) else relu(x)
        return x
''',
    "bitwright_@NAME@/backend.py": '''\
"""The backend: it captures a model as a graph of pure functions; bitwright's dataflow base does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from bitwright.backend import Batch, Tap
from bitwright.dataflow import FlowBackend, FlowModel, GraphBuilder, Layout
from bitwright.errors import ModelError
from bitwright_onnx.adapters import QdqExport

from bitwright_@NAME@ import framework
from bitwright_@NAME@.framework import Dense, Relu, Stack

TRANSPOSED = Layout().permuted(1, 0)
"""Kernels are (in, out) here, and (out, in) in bitwright."""


def _outputs(*operands: Any, function: str) -> list[Any]:
    """A function of the framework, with its one output in a list."""
    return [getattr(framework, function)(*operands)]


@dataclass(frozen=True, eq=False)
class @TITLE@Model(FlowModel):
    """A captured stack, which is called as the stack is."""

    def __call__(self, x: Any) -> Any:
        """The output."""
        tap = Tap(self.graph.outputs[0])
        return @TITLE@Backend().session(self, [tap]).run({self.graph.inputs[0]: x})[tap]


class @TITLE@Backend(QdqExport, FlowBackend[@TITLE@Model]):
    """Backend for `Stack`."""

    name = "@NAME@"
    model_type = @TITLE@Model
    calls: ClassVar[Mapping[str, Any]] = {"@NAME@": _outputs}
    file_format = ("@NAME@", "the float model")

    def owns(self, model: object) -> bool:
        """Stacks and what has been made of them."""
        return isinstance(model, Stack | @TITLE@Model)

    def adopt(self, model: object, sample: Batch | None = None) -> @TITLE@Model:
        """Capture a stack; the sample gives the input's name and shape."""
        if isinstance(model, @TITLE@Model):
            return model
        if not isinstance(model, Stack) or sample is None:
            raise ModelError("the @NAME@ backend takes a Stack, and a sample batch by input name")
        ((name, x),) = sample.items()
        builder = GraphBuilder()
        value = builder.input(name, (None, *np.shape(x)[1:]))
        width = np.shape(x)[-1]
        for layer in model:
            match layer:
                case Dense(name, kernel, bias):
                    width = kernel.shape[1]
                    weights = [builder.param(f"{name}.kernel", kernel), builder.param(f"{name}.bias", bias)]
                    (value,) = builder.op("Gemm", [value, *weights], [(None, width)],
                                          partial(_outputs, function="dense"), name=name, layouts={1: TRANSPOSED})
                case Relu(name):
                    call = partial(_outputs, function="relu")
                    (value,) = builder.op("Relu", [value], [(None, width)], call, name=name)
                case _:
                    raise ModelError(f"a {type(layer).__name__} is no layer that the @NAME@ backend knows")
        return builder.build(@TITLE@Model, [value])
''',
    "tests/test_@NAME@.py": '''\
"""The backend by bitwright's kit; then the whole way, to the integers of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from bitwright import QuantSim
from bitwright.graph import OpKind
from bitwright.testing.backend_contract import BackendContract, Case
from bitwright.verify import verify
from bitwright_@NAME@.backend import @TITLE@Backend
from bitwright_@NAME@.framework import Dense, Relu, Stack

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 10)).astype(np.float32)


def dense(name: str, inputs: int, outputs: int) -> Dense:
    kernel = RNG.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return Dense(name, kernel.astype(np.float32), RNG.normal(size=outputs).astype(np.float32))


STACK = Stack([dense("one", 10, 16), Relu("act1"), dense("two", 16, 12), Relu("act2"), dense("three", 12, 4)])


class Test@TITLE@Backend(BackendContract):
    suffix = ".@NAME@"
    kinds = frozenset({OpKind.LINEAR, OpKind.RELU})
    declines: ClassVar[dict[str, str]] = dict.fromkeys(
        ("depthwise", "forward fold", "shared parameter", "two inputs", "two outputs", "integer input", "mask",
         "embedding", "matmul", "softmax", "layer_norm", "prelu", "mul", "transpose", "recurrent", "average_pool"),
        "stacks have no such thing",
    )

    def backend(self) -> @TITLE@Backend:
        return @TITLE@Backend()

    def native_value(self, model: Any, param: str) -> Any:
        (layer,) = (layer for layer in STACK if layer.name == param.split(".")[0])
        return getattr(layer, param.split(".")[1])

    def cases(self) -> dict[str, Case]:
        return {"stack": Case(lambda: @TITLE@Backend().adopt(STACK, {"x": X}), {"x": X})}


def test_the_captured_model_is_the_model() -> None:
    model = @TITLE@Backend().adopt(STACK, {"x": X})
    assert [op.id for op in model.graph] == ["one", "act1", "two", "act2", "three"]
    assert np.allclose(model(X), STACK(X), atol=1e-6)


def test_the_whole_way(tmp_path: Path) -> None:
    data = [{"x": RNG.normal(size=(8, 10)).astype(np.float32)} for _ in range(4)]
    sim = QuantSim(STACK, {"x": X}, target="onnxruntime-cpu")
    sim.apply("adaround", data).calibrate(data)
    bundle = sim.export(tmp_path / "out")
    assert bundle.files["qdq"].exists()
    seen = verify(tmp_path / "out", data)
    assert seen.recorded and not seen.problems
    assert seen.exact["output_differs"] == 0
''',
}
