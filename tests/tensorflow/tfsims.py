"""Models with their plans and encodings, for the tests of simulation, training and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tfnets

from bitwright.backend import Training
from bitwright.grids import Blockwise, Encoding, PerChannel, QuantSpec
from bitwright.simulation import QuantSim
from bitwright_tensorflow import TfModel
from bitwright_tensorflow.backend import TensorFlowBackend
from bitwright_tensorflow.export.freezing import frozen_graph

SHAPE = (8, 8, 3)
SPECS = {
    "uint8": QuantSpec(8, signed=False, symmetric=False),
    "int8 strict": QuantSpec(8, strict=True),
    "uint16": QuantSpec(16, signed=False, symmetric=False),
    "int32": QuantSpec(32),
    "int4 channels": QuantSpec(4, granularity=PerChannel(0)),
    "uint4 input channels": QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(1)),
    "int4 blocks": QuantSpec(4, granularity=Blockwise(0, 1, 4)),
    "int4 blocks along outputs": QuantSpec(4, granularity=Blockwise(1, 0, 2)),
    "lpbq": QuantSpec(4, granularity=Blockwise(0, 1, 4, 8)),
    "float16": QuantSpec(16, float_format="float16"),
    "bfloat16": QuantSpec(16, float_format="bfloat16"),
    "e4m3": QuantSpec(8, float_format="float8e4m3fn"),
    "e4m3 channels": QuantSpec(8, float_format="float8e4m3fn", granularity=PerChannel(0)),
    "e5m2": QuantSpec(8, float_format="float8e5m2"),
}


@dataclass
class Setup:
    """A calibrated QuantSim and what it was calibrated on."""

    sim: QuantSim
    sample: np.ndarray

    @property
    def model(self) -> TfModel:
        return self.sim.native

    @property
    def table(self) -> dict[str, Encoding]:
        return dict(self.sim.encodings)

    def simulation(self, training: Training | None = None) -> Any:
        backend, given = TensorFlowBackend(), (self.model, self.sim.plan, self.sim.encodings)
        return backend.simulate(*given) if training is None else backend.simulate_trainable(*given, training)

    def simulated(self, x: np.ndarray | None = None) -> np.ndarray:
        return self.simulation().model(self.sample if x is None else x)


def setup(kind: str = "session", build: Any = tfnets.residual, shape: tuple[int, ...] = SHAPE, **options: Any) -> Setup:
    """A model of a kind: session, references (TF 1 variables), trained (with an optimizer), function, frozen."""
    backend = TensorFlowBackend()
    if kind == "function":
        model = backend.adopt(tfnets.Module(build, *shape).call.get_concrete_function())
    else:
        resource, train = kind != "references", kind in ("trained", "references")
        model = backend.adopt(tfnets.session_model(build, *shape, resource=resource, train=train))
        model = backend.adopt(frozen_graph(model)) if kind == "frozen" else model
    sample = tfnets.image(8, *shape)
    options = {"scheme": "minmax", "weights": "int8", "activations": "uint8", **options}
    return Setup(QuantSim(model, **options).calibrate(sample), sample)


def points(encoding: Encoding, shape: tuple[int, ...]) -> np.ndarray:
    """Codes, midpoints between them, and values beyond the ends, for each scale of an encoding."""
    size = int(np.prod(shape))
    scale, zero = encoding.spread(shape)
    if encoding.float_format is not None:
        rng = np.random.default_rng(0)
        exact = encoding.fake_quantize((rng.normal(size=shape) * scale * 3).astype(np.float32))
        return np.where(rng.random(shape) < 0.5, exact, exact * np.float32(1 + 2**-4)).astype(np.float32)
    span = min(encoding.grid.steps, 60)
    codes = np.resize(np.arange(-2 - span, span + 2) / 2, size).reshape(shape)
    return (codes * scale - (zero - np.clip(zero, -100, 100)) * scale).astype(np.float32)
