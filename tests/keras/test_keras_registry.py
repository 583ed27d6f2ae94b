"""A Keras model that runs on PyTorch is an nn.Module too; the backend of the nearer class gets it."""

import importlib.machinery
import os
import subprocess
import sys
import types

from bitwright.hookspecs import BackendInfo, hookimpl
from bitwright.plugins import Registry
from bitwright.testing.reference import ReferenceBackend


class Owning(ReferenceBackend):
    def __init__(self, name, base):
        self.name, self._base = name, base

    def owns(self, model):
        return isinstance(model, self._base)


def test_the_nearest_class_decides(monkeypatch) -> None:
    for name in ("farframework", "nearframework", "two_backends"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    far = type("Far", (), {"__module__": "farframework.nn"})
    near = type("Near", (far,), {"__module__": "nearframework.src"})
    own = type("Own", (near,), {"__module__": "user"})

    @hookimpl
    def register_backends():
        return [
            BackendInfo("far", "Far.", factory=lambda: Owning("far", far), modules=("farframework",)),
            BackendInfo("near", "Near.", factory=lambda: Owning("near", near), modules=("nearframework",)),
        ]

    sys.modules["two_backends"].register_backends = register_backends
    registry = Registry(default_plugins=["two_backends"], entry_points=False)
    assert registry.backend_for_model(own()).name == "near"
    assert registry.backend_for_model(far()).name == "far"


def test_keras_without_what_it_computes_with_names_the_way_out() -> None:
    script = """
import sys
sys.modules["tensorflow"] = None  # as where only keras was installed
from bitwright.errors import MissingExtraError
from bitwright_keras.plugin import backend
try:
    backend()
except MissingExtraError as error:
    print(error)
"""
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert 'not what it computes with, tensorflow: pip install "bitwright[keras,tensorflow]"' in done.stdout, (
        done.stderr
    )
