"""AIMET's names import no framework: only a model of one does."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import bitwright_aimet
names = [m.name for m in pkgutil.walk_packages(bitwright_aimet.__path__, "bitwright_aimet.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 30, names
print(sorted({"torch", "tensorflow", "keras", "onnx", "onnx_ir", "onnxruntime", "jax"} & sys.modules.keys()))
"""


def test_no_framework_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
