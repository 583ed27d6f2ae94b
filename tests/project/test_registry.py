"""Discovery, look-up, and every way in which a plugin can go wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bitwright import registry
from bitwright.backend import Capability
from bitwright.errors import InputError, MissingExtraError, PluginError
from bitwright.hookspecs import BackendInfo, TechniqueInfo
from bitwright.plugins import Registry
from bitwright.plugins.registry import PluginWarning
from bitwright.technique import Context, Outcome, Settings

GOOD = """
from bitwright.hookspecs import BackendInfo, TechniqueInfo, hookimpl

@hookimpl
def register_techniques():
    return [TechniqueInfo("acme_round", "Rounds.", factory="acme_plugin.impl:AcmeRound", aliases=("acme",))]

@hookimpl
def register_backends():
    return [BackendInfo("acme", "Acme nets.", factory="acme_plugin.impl:AcmeBackend", modules=("acme_framework",),
                        suffixes=(".acme",), extra="net")]
"""
IMPL = """
from bitwright.technique import Outcome, Settings as Base

class Settings(Base):
    strength: float = 1.0

class AcmeRound:
    name = "acme_round"
    Settings = Settings
    requires = frozenset()
    def statistics(self, graph, plan, settings): return ()
    def apply(self, ctx): return Outcome()
"""


def acme(install: Any, plugin: str = GOOD, name: str = "bitwright-acme") -> None:
    install(name, {"acme_plugin.plugin": plugin, "acme_plugin.impl": IMPL}, "acme = acme_plugin.plugin")


def status(registry: Registry, name: str) -> registry.PluginStatus:
    return next(p for p in registry.plugins() if p.name == name)


class Doubling:
    """Doubles nothing."""

    name: ClassVar[str] = "doubling"
    Settings: ClassVar[type[Settings]] = Settings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Any, plan: Any, settings: Any) -> tuple[()]:
        return ()

    def apply(self, ctx: Context) -> Outcome:
        return Outcome()


def test_builtin_plugins_come_through_the_hooks():
    found = Registry(entry_points=False)
    assert {"fold_batch_norm", "cross_layer_equalization", "adaround", "seq_mse", "bias_correction"} <= set(
        found.techniques()
    )
    assert "onnx" in found.backends()
    assert {"bitwright_onnx.plugin", "bitwright_techniques.plugin"} <= {p.name for p in found.plugins()}
    assert found.technique_info("cle").name == "cross_layer_equalization"


def test_third_party_distribution_is_found_and_lazy(install):
    acme(install)
    found = Registry()
    assert "acme_round" in found.techniques()
    assert "acme_plugin.impl" not in sys.modules, "listing must not import implementations"
    assert found.technique("acme").name == "acme_round"
    assert found.settings("acme")().model_dump() == {"strength": 1.0}
    state = status(found, "acme")
    assert (state.distribution, state.version) == ("bitwright-acme", "1.0")
    assert state.techniques == ("acme_round",)


def test_missing_framework_gives_the_pip_line(install):
    acme(install)
    found = Registry()
    state = status(found, "acme")
    assert state.state == "missing framework"
    with pytest.raises(MissingExtraError, match=r'needs acme_framework: pip install "bitwright-acme\[net\]"'):
        found.backend("acme")


def test_missing_framework_of_a_builtin(tmp_path):
    found = Registry((), entry_points=False)
    found.add(
        BackendInfo("onnx", "", factory="nowhere:X", modules=("no_such_framework",), extra="onnx", suffixes=(".onnx",))
    )
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r'pip install "bitwright\[onnx\]"'):
        found.backend_for_path(file)


def test_other_import_errors_are_not_disguised(tmp_path, monkeypatch):
    (tmp_path / "buggy_backend.py").write_text("import a_typo_in_the_backend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Registry((), entry_points=False)
    found.add(BackendInfo("buggy", "", factory="buggy_backend:X", modules=("json",)))
    with pytest.raises(PluginError, match=r"backend 'buggy' of .*a_typo_in_the_backend") as caught:
        found.backend("buggy")
    assert not isinstance(caught.value, MissingExtraError)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise RuntimeError('boom')", "boom"),
        ("import not_installed_anywhere", "not_installed_anywhere"),
        (
            "from bitwright.hookspecs import hookimpl\n@hookimpl\ndef register_techniques(): return ['x']",
            "TechniqueInfo",
        ),
        (
            "from bitwright.hookspecs import hookimpl\n@hookimpl\ndef register_backends(): return 1/0",
            "division",
        ),
        (
            "from bitwright.hookspecs import hookimpl\n@hookimpl\ndef register_tecniques(): return []",
            "register_tecniques",
        ),
    ],
)
def test_broken_plugin_is_named_and_skipped(install, monkeypatch, text, reason):
    acme(install, text)
    found = Registry()
    with pytest.warns(PluginWarning, match=r"plugin 'acme' \(bitwright-acme 1.0\)( skipped|: hook register)"):
        assert "adaround" in found.techniques()
    state = status(found, "acme")
    assert state.state == "failed"
    assert reason in state.reason
    assert ("Traceback" in state.traceback) is (reason != "TechniqueInfo")
    with pytest.raises(PluginError, match=r"failed to load: acme; see `bitwright plugins`"):
        found.technique("acme_round")
    monkeypatch.setenv("BITWRIGHT_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="plugin 'acme'"):
        Registry().techniques()


@pytest.mark.parametrize(
    ("value", "state"), [("none", "blocked"), ("other", "blocked"), ("other, acme", "missing framework")]
)
def test_environment_chooses_plugins(install, monkeypatch, value, state):
    acme(install)
    monkeypatch.setenv("BITWRIGHT_PLUGINS", value)
    found = Registry()
    assert status(found, "acme").state == state
    assert ("acme_round" in found.techniques()) is (state != "blocked")
    assert "adaround" in found.techniques()


def test_duplicate_names_name_both_distributions(install):
    acme(install)
    twin = """
        from bitwright.hookspecs import TechniqueInfo, hookimpl
        @hookimpl
        def register_techniques():
            return [TechniqueInfo("acme_round", "", factory="x:y")]
    """
    install("zeta-acme", {"zeta_plugin.plugin": twin}, "zeta = zeta_plugin.plugin", "2.0")
    with pytest.warns(PluginWarning):
        found = Registry()
        with pytest.raises(PluginError, match=r"bitwright-acme 1\.0.*zeta-acme 2\.0"):
            found.technique("acme_round")
    assert "acme_round" not in found.techniques()
    assert "adaround" in found.techniques()
    assert status(found, "zeta").state == "failed"
    assert status(found, "acme").state == "partial"


@pytest.mark.parametrize(("api", "command"), [(2, "--upgrade bitwright$"), (0, "--upgrade bitwright-acme$")])
def test_api_out_of_range_says_what_to_upgrade(install, api, command):
    acme(install, GOOD.replace('aliases=("acme",)', f"api={api}"))
    found = Registry()
    with pytest.warns(PluginWarning, match=f"api {api}"), pytest.raises(PluginError, match=command):
        found.technique("acme_round")
    assert status(found, "acme").state == "partial"
    assert status(found, "acme").backends == ("acme",)


def test_unknown_name_suggests():
    with pytest.raises(PluginError, match="did you mean 'adaround'"):
        Registry(entry_points=False).technique("adaruond")


def test_add_is_a_decorator_and_can_be_rerun():
    found = Registry((), entry_points=False)
    assert found.add(Doubling) is Doubling
    found.add(Doubling)
    assert list(found.techniques()) == ["doubling"]
    assert found.techniques()["doubling"].summary == "Doubles nothing."
    assert isinstance(found.technique("doubling"), Doubling)


def test_add_refuses_what_it_cannot_use():
    found = Registry(entry_points=False)
    with pytest.raises(PluginError, match=r"belongs to plugin 'bitwright_techniques\.plugin'"):
        found.add(TechniqueInfo("cle", "", factory="x:y"))
    with pytest.raises(PluginError, match="can't be registered"):
        found.add(3)
    with pytest.raises(PluginError, match="neither a technique"):
        found.add(type("Thing", (), {"name": "thing"}))


def test_factory_that_makes_something_else():
    found = Registry((), entry_points=False)
    found.add(
        TechniqueInfo("odd", "", factory=lambda: SimpleNamespace(name="odd", Settings=Settings, requires=frozenset()))
    )
    with pytest.raises(PluginError, match="lacks apply, statistics"):
        found.technique("odd")
    found.add(TechniqueInfo("nowhere", "", factory="json:NoSuch"))
    with pytest.raises(PluginError, match="module 'json' has no 'NoSuch'"):
        found.technique("nowhere")
    found.add(TechniqueInfo("formless", "", factory="json"))
    with pytest.raises(PluginError, match=r"package\.module:Name"):
        found.technique("formless")


def test_models_no_one_owns_and_paths_no_one_opens(tmp_path):
    found = Registry(entry_points=False)
    with pytest.raises(PluginError, match=r"no backend takes a builtins.dict; there are onnx \(\.onnx"):
        found.backend_for_model({})
    with pytest.raises(InputError, match="there is no file"):
        found.backend_for_path(tmp_path / "absent.onnx")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(InputError, match="no backend opens"):
        found.backend_for_path(text)


def test_onnx_is_recognized_by_content(tmp_path):
    from bitwright_onnx.plugin import looks_like_onnx

    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    file = tmp_path / "renamed.bin"
    file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert looks_like_onnx(file)
    file.write_bytes(b"PK\x03\x04 a zip")
    assert not looks_like_onnx(file)
    assert not looks_like_onnx(tmp_path)


FRAMEWORKS = (
    "{'torch', 'tensorflow', 'keras', 'jax', 'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'PIL', 'typer', 'rich'}"
)


@pytest.mark.parametrize(
    "code",
    [
        "import bitwright",
        "from bitwright import *; QuantSim, RunDirectory, registry",
        "from bitwright import registry as r; r.techniques(), r.backends(), r.plugins()",
        "from bitwright import registry as r; [r.technique(name) for name in r.techniques()]",
    ],
)
def test_no_framework_is_imported(code):
    check = f"{code}\nimport sys; found = {FRAMEWORKS} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True)


def test_import_is_light():
    code = "import time; t = time.process_time(); import bitwright; print(time.process_time() - t)"
    best = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert best < 0.3


def test_module_functions_use_the_default_registry(monkeypatch):
    mine = Registry(entry_points=False)
    monkeypatch.setattr(registry, "default_registry", lambda: mine)
    assert registry.techniques() == mine.techniques()
    assert registry.backends() == mine.backends()
    assert registry.plugins() == mine.plugins()


def test_a_backend_that_opens_no_files_saves_under_its_name():
    info = BackendInfo("acme", "", factory="nowhere:X")
    assert (info.suffix, replace(info, suffixes=(".a", ".b")).suffix) == (".acme", ".a")
