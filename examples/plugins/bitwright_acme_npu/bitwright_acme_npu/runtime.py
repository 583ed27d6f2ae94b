"""The runtime as `bitwright verify` and `QuantSim.export` use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitwright.backend import Bundle, ToCompile
from bitwright.errors import InputError
from bitwright_acme_npu.compiler import compile_model
from bitwright_acme_npu.program import read_program, write_program
from bitwright_acme_npu.simulator import NpuSession


class AcmeNpu:
    """`bitwright.backend.IntegerRuntime`, and `ArtefactWriter`, as it executes an artefact of its own."""

    def write(self, model: ToCompile, path: Path) -> Path:
        """Compile a model and write the program."""
        return write_program(compile_model(model), path)

    def compile(self, bundle: Bundle, taps: Sequence[str] = ()) -> NpuSession:
        """Load the program of an exported bundle."""
        if (path := bundle.files.get("acme")) is None:
            raise InputError(f"the bundle holds no program of the Acme NPU, only {', '.join(bundle.files)}")
        return NpuSession(read_program(path), taps)
