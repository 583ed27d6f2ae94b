"""The backend on Keras with PyTorch: the contract and training, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("keras")
pytest.importorskip("torch")

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("KERAS_BACKEND") == "torch", reason="this is that process")
def test_contract_and_training_on_pytorch() -> None:
    files = [str(HERE / f"test_keras_{name}.py") for name in ("contract", "qat", "capture")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", "not export"],
        env={**os.environ, "KERAS_BACKEND": "torch"}, capture_output=True, text=True, cwd=HERE.parents[1],
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
