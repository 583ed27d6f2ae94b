"""Settings of the whole test suite, and the command line as a fixture."""

import copy
import gc
import os
import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core: threads of ONNX Runtime, PyTorch and TensorFlow beside it would wait, spinning, for the
    # other worker's.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(variable, "1")

# The same examples every time, and no deadline: a busy machine must not decide whether the suite passes.
settings.register_profile("bitwright", derandomize=True, deadline=None)
settings.load_profile("bitwright")


def pytest_collection_finish():
    """What was imported stays. A full collection of garbage looks at all of it again otherwise: two million objects of
    four frameworks, for half a second.

    And garbage is looked for less often than Python does by default, which is made for smaller programs: it took six
    (Keras) to eleven percent (PyTorch) of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def disks_take_their_time():
    """Nothing here is read after a power cut, and on a slow disk some ten thousand waits for it are minutes; that files
    are flushed before they are renamed is seen in tests/faults, and where tests let it fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_table_of_translations():
    """PyTorch's ONNX exporter collects its translations in each export, for half a second; here once a process."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    export, held = torch.onnx.export, {}

    def with_one_table(*args, **options):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        if not held:
            held["make"] = make = ONNXRegistry.from_torchlib.__func__

            def from_torchlib(cls, opset_version):
                if opset_version not in held:
                    held[opset_version] = make(cls, opset_version)
                table = copy.copy(held[opset_version])
                table.functions = {op: list(found) for op, found in table.functions.items()}
                return table

            ONNXRegistry.from_torchlib = classmethod(from_torchlib)
        return export(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", with_one_table)
        yield


@pytest.fixture
def run(capsys):
    """Run a command; gives status, output and error text."""
    from bitwright.cli import main

    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
