"""The backend on Keras with PyTorch and with JAX: the contract and training, in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("keras")

HERE = Path(__file__).parent


@pytest.mark.skipif("KERAS_BACKEND" in os.environ, reason="this may be that process")
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_contract_and_training_on_other_backends(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} isn't installed")
    files = [str(HERE / f"test_keras_{part}.py") for part in ("contract", "qat", "capture")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", "not export"],
        env={**os.environ, "KERAS_BACKEND": name}, capture_output=True, text=True, cwd=HERE.parents[1],
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
