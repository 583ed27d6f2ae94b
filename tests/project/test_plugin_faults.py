"""What plugins get wrong beyond names and imports: it is put down to them, and what is the user's goes on."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from bitwright import catalogue
from bitwright.catalogue import _discovery as discovery
from bitwright.cli import main
from bitwright.errors import PluginError, TargetError
from bitwright.plugins import Registry, registry
from bitwright.plugins.registry import PluginWarning
from bitwright.progress import Silent
from bitwright.report import read_report
from bitwright.runs import RunDirectory
from bitwright.simulation import QuantSim
from bitwright.targets import load_target, target_names
from bitwright.technique import Outcome
from bitwright.technique import Settings as BaseSettings
from bitwright.verify import verify
from bitwright_analysis.exported import exported as exported_sim

HEAD = (
    "from bitwright.hookspecs import BackendInfo, FormatInfo, RuntimeInfo, TargetInfo, TechniqueInfo, ToolchainInfo, "
    "hookimpl\n"
)
RUNTIME = 'RuntimeInfo("acme", "", factory="acme_plugin.impl:Runtime", artefact="acme", suffix=".acme")'
TARGET = {"bitwright": {"extends": "generic-int8", "runtime": "acme"}}
DATA = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.fixture
def acme(install, monkeypatch):
    """A distribution of one module, with what it registers, in the process's own registry."""

    def make(hooks: dict[str, str], impl: str = "", name: str = "acme") -> Registry:
        plugin = HEAD + "".join(f"@hookimpl\ndef register_{h}(): return [{i}]\n" for h, i in hooks.items())
        install(f"bitwright-{name}", {f"{name}_plugin.plugin": plugin, f"{name}_plugin.impl": impl},
                f"{name} = {name}_plugin.plugin")  # fmt: skip
        discovery.current.cache_clear()
        registry.default_registry.cache_clear()
        return registry.default_registry()

    yield make
    discovery.current.cache_clear()
    registry.default_registry.cache_clear()


def status(found: Registry, name: str = "acme") -> Any:
    return next(p for p in found.plugins() if p.name == name)


def gemm() -> Any:
    """A model of one layer."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "fc")], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    assert onnx is not None
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


# -- descriptors


@pytest.mark.parametrize(
    ("hook", "info", "reason"),
    [
        (
            "runtimes",
            'RuntimeInfo("acme", "", factory="x:y", artefact="model", suffix=".m")',
            "artefact: 'model' can't",
        ),
        ("runtimes", 'RuntimeInfo("acme", "", factory="x:y", artefact="a/b", suffix=".m")', "artefact: 'a/b' can't"),
        ("runtimes", 'RuntimeInfo("acme", "", factory="x:y", artefact="own")', "suffix: '' is no ending"),
        ("runtimes", 'RuntimeInfo("acme", "", factory="x:y", artefact="own", suffix=".encodings")', "another file of"),
        ("formats", 'FormatInfo("acme", "", factory="x:y", suffix="./../up")', "suffix: './../up' is no ending"),
        ("formats", 'FormatInfo("acme", "", factory="x:y", suffix=".qdq.onnx")', "another file of an export"),
        ("formats", 'FormatInfo("model", "", factory="x:y", suffix=".m")', "the name belongs to bitwright itself"),
        ("backends", 'BackendInfo("acme", "", factory="x:y", sniff=3)', "sniff: 3 is neither"),
        ("backends", 'BackendInfo("acme", "", factory="x:y", port=3)', "port: 3 is neither"),
        ("toolchains", 'ToolchainInfo("acme", "", factory="x:y", schemas="1.0.0")', "schemas: '1.0.0' isn't a tuple"),
    ],
)
def test_what_would_take_an_exports_own_files_is_left_out(acme, hook, info, reason):
    found = acme({hook: info})
    with pytest.warns(PluginWarning, match="plugin 'acme'"):
        assert "adaround" in found.techniques()
    assert reason in status(found).reason
    assert not (found.runtimes().keys() | found.formats().keys() | found.backends().keys()) & {"acme", "model"}


@pytest.mark.parametrize("module", ["acme_nowhere.deep.down", "json.nowhere", "acme_plugin.nowhere", ".relative"])
def test_modules_may_be_dotted_and_absent(acme, module):
    """A framework's part is asked for, and isn't there: what is missing is told, and nothing is imported for it."""
    found = acme({"backends": f'BackendInfo("acme", "", factory="x:y", modules=({module!r},), extra="net")'})
    assert 'pip install "bitwright-acme[net]"' in found.missing("acme")
    assert status(found).state == "missing framework"
    with pytest.raises(PluginError, match="no backend takes a"):
        found.backend_for_model(object())


def test_modules_may_be_dotted_and_there(acme):
    found = acme({"backends": 'BackendInfo("acme", "", factory="x:y", modules=("acme_plugin.impl", "json.decoder"))'})
    assert not found.missing("acme")


def test_a_distribution_with_damaged_metadata(acme, tmp_path):
    acme({"techniques": 'TechniqueInfo("acme", "", factory="x:y")'})
    (tmp_path / "bitwright-acme" / "bitwright_acme-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff")
    found = Registry()
    assert {"acme", "adaround"} <= set(found.techniques())
    assert (status(found).distribution, status(found).version) == ("", "")


# -- kits


def test_a_broken_port_takes_no_other_backend_from_the_kits(acme):
    from bitwright.testing import ports

    acme({"backends": 'BackendInfo("acme", "", factory="x:y", port="acme_plugin.impl:nowhere")'})
    ports.installed.cache_clear()
    try:
        with pytest.warns(PluginWarning, match="port of backend 'acme' of plugin 'acme' .*; nothing is tested on it"):
            there = [port.name for port in ports.installed()]
        assert there[0] == "reference" and "acme" not in there
    finally:
        ports.installed.cache_clear()


def test_the_backend_kit_takes_no_third_partys_targets(acme):
    acme({"targets": 'TargetInfo("acme-npu", "", file="acme_plugin:nowhere.json")'})
    assert "acme-npu" in target_names()
    assert "acme-npu" not in target_names(shipped=True)
    assert {"htp_v73", "default", "generic-int8", "w4a16"} <= set(target_names(shipped=True))


# -- what they are called for


def exported(acme: Any, folder: Any, impl: str) -> Any:
    acme({"runtimes": RUNTIME}, impl)
    sim = QuantSim(gemm(), target=load_target(TARGET)).calibrate({"x": DATA})
    return sim.export(folder, name="net")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('lost')", "runtime 'acme' of plugin 'acme' .* can't be used: KeyError: 'lost'"),
        ("raise SystemExit(3)", "runtime 'acme' of plugin 'acme' .* can't be used: SystemExit: 3"),
        ("return path", "runtime 'acme' has written .*net.acme, where net.acme was asked for"),
        ("return None", "runtime 'acme' has written None, where"),
    ],
)
def test_a_broken_compiler_costs_its_own_artefact_alone(acme, tmp_path, body, reason):
    impl = f"class Runtime:\n    def compile(self, bundle, taps=()): pass\n    def write(self, model, path): {body}\n"
    with pytest.warns(UserWarning, match=f"net.acme isn't written: {reason}"):
        bundle = exported(acme, tmp_path, impl)
    assert {"model", "qdq", "encodings"} <= set(bundle.files) and "acme" not in bundle.files
    found = verify(tmp_path, {"x": DATA})
    assert (found.runtime, found.problems) == ("onnxruntime", [])


@pytest.mark.parametrize(
    ("compile", "run", "reason"),
    [
        ("raise KeyError('lost')", "", r"runtime 'acme' of plugin 'acme' .* can't be used: KeyError: 'lost'"),
        ("return 3", "", "runtime 'acme': compile makes a int, which has no run"),
        ("return self", "raise ZeroDivisionError", r"runtime 'acme' of plugin 'acme' .* can't be used: ZeroDivision"),
        ("return self", "return {'y': batch['x']}", "runtime 'acme': run gives 'y', where a Tap belongs"),
        ("return self", "return [batch['x']]", "runtime 'acme': run gives a list, not a mapping"),
    ],
)
def test_a_broken_runtime_is_named_by_verify(acme, tmp_path, compile, run, reason):
    impl = (
        "class Runtime:\n"
        f"    def compile(self, bundle, taps=()): {compile}\n"
        f"    def run(self, batch): {run or 'pass'}\n"
        "    def write(self, model, path):\n        path.write_text('')\n        return path\n"
    )
    exported(acme, tmp_path, impl)
    with pytest.raises(PluginError, match=reason):
        verify(tmp_path, {"x": DATA})


def test_outputs_that_a_runtime_leaves_out_are_a_problem(acme, tmp_path):
    impl = (
        "class Runtime:\n"
        "    def compile(self, bundle, taps=()): return self\n"
        "    def run(self, batch): return {}\n"
        "    def write(self, model, path):\n        path.write_text('')\n        return path\n"
    )
    exported(acme, tmp_path, impl)
    found = verify(tmp_path, {"x": DATA})
    assert "the integer output 'y' isn't compared: there is no such tensor in it" in found.problems


def test_what_was_made_opens_where_the_plugin_is_gone(acme, tmp_path, monkeypatch):
    acme({"runtimes": RUNTIME}, "class Runtime:\n    def compile(self, bundle, taps=()): pass\n")
    sim = QuantSim(gemm(), target=load_target(TARGET)).calibrate({"x": DATA})
    sim.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="doesn't write it itself"):
        sim.export(tmp_path / "out", name="net")
    monkeypatch.setenv("BITWRIGHT_PLUGINS", "none")
    discovery.current.cache_clear()
    registry.default_registry.cache_clear()
    with pytest.raises(TargetError, match="there is no integer runtime 'acme'"):
        load_target(TARGET)
    again = QuantSim.load(tmp_path / "saved")
    assert again.target.config.bitwright.runtime == "acme"
    again.export(tmp_path / "again", name="net")
    assert "acme" in read_report(tmp_path / "again", "net").report.record.missing.popitem()[0]
    for folder in ("out", "again"):
        found = verify(tmp_path / folder, {"x": DATA})
        assert (found.runtime, found.problems) == ("onnxruntime", [])
        assert "the integer runtime 'acme', which isn't installed here" in "".join(found.notes)
        assert main(["encodings", "check", str(tmp_path / folder)]) == 0
        assert exported_sim(tmp_path / folder).target.config.bitwright.runtime == "acme"


FORMAT = (
    "from pydantic import BaseModel\n"
    "class Format:\n    class Settings(BaseModel): pass\n"
    "    def check(self, model, settings): {check}\n"
    "    def write(self, model, path, settings):\n        path.write_text(''); return path\n"
    "    def read(self, model, path): {read}\n"
)


@pytest.mark.parametrize(
    ("check", "read", "reason"),
    [
        ("raise KeyError('lost')", "pass", "export format 'acme' of plugin 'acme' .* can't be used: KeyError"),
        ("pass", "raise KeyError('lost')", "export format 'acme' of plugin 'acme' .* can't be used: KeyError"),
        ("pass", "return [('nowhere', 0.0)]", "has a weight 'nowhere', which the network hasn't"),
        ("pass", "return [('w', [[0.0]])]", "departs from the simulation in another shape of 'w'"),
        ("pass", "return []", "lacks 1 quantized weights"),
    ],
)
def test_a_broken_format_is_named_and_nothing_is_exported(acme, tmp_path, check, read, reason):
    acme({"formats": 'FormatInfo("acme", "", factory="acme_plugin.impl:Format", suffix=".acme")'},
         FORMAT.format(check=check, read=read))  # fmt: skip
    sim = QuantSim(gemm(), target="generic-int8").calibrate({"x": DATA})
    with pytest.raises(Exception, match=reason) as raised:
        sim.export(tmp_path / "out", formats=["acme"])
    assert type(raised.value).__module__ == "bitwright.errors"
    assert not list((tmp_path / "out").glob("*"))


def test_statistics_that_are_none_are_told(acme):
    class Asks:
        name, Settings, requires, asks = "asks", BaseSettings, frozenset(), None

        def statistics(self, graph, plan, settings):
            return self.asks

        def apply(self, ctx):
            return Outcome()

    sim = QuantSim(gemm(), target="generic-int8")
    for asks in (None, ["x"], 3):
        Asks.asks = asks
        with pytest.raises(PluginError, match=r"technique 'asks': `statistics` gives .* where Requests belong"):
            sim.apply(Asks())


@pytest.mark.parametrize("where", ["apply", "statistics", "stages"])
def test_a_technique_that_ends_the_process_is_named(acme, where, capsys, tmp_path):
    impl = (
        "import sys\nfrom bitwright.technique import Outcome, Settings as Base\n"
        "class Leaves:\n    name, Settings, requires = 'leaves', Base, frozenset()\n"
        "    def statistics(self, graph, plan, settings): return ()\n"
        "    def apply(self, ctx): return Outcome()\n"
        f"    def {where}(self, *given): sys.exit(3)\n"
    )
    acme({"techniques": 'TechniqueInfo("leaves", "", factory="acme_plugin.impl:Leaves")'}, impl)
    sim = QuantSim(gemm(), target="generic-int8")
    reason = r"technique 'leaves' of plugin 'acme' \(bitwright-acme 1.0\) can't be used: it ends the process by itself"
    with pytest.raises(PluginError, match=reason + r" \(SystemExit: 3\)"):
        sim.apply("leaves")
    (tmp_path / "m.onnx").write_bytes(gemm().SerializeToString())
    np.savez(tmp_path / "d.npz", x=DATA)
    words = ["quantize", tmp_path / "m.onnx", "--data", tmp_path / "d.npz", "--recipe", "leaves", "--quiet",
             "--out", tmp_path / "o"]  # fmt: skip
    assert main([str(w) for w in words]) == 2
    assert "technique 'leaves' of plugin 'acme'" in capsys.readouterr().err


def test_a_backend_that_ends_the_process_is_named(acme, capsys, tmp_path):
    impl = (
        "import sys\nfrom bitwright.testing.reference import ReferenceBackend\n"
        "class Leaves(ReferenceBackend):\n    name = 'leaves'\n"
        "    def load(self, path, **given): sys.exit()\n"
    )
    info = 'BackendInfo("leaves", "", factory="acme_plugin.impl:Leaves", suffixes=(".leaves",))'
    acme({"backends": info}, impl)
    (tmp_path / "m.leaves").touch()
    assert main(["validate", str(tmp_path / "m.leaves")]) == 2
    assert "plugin 'acme' (bitwright-acme 1.0) ends the process by itself" in capsys.readouterr().err


@pytest.fixture
def few(monkeypatch):
    """Frameworks that take seconds to import are left out."""
    there = Registry.backends
    monkeypatch.setattr(
        Registry, "backends", lambda self: {n: i for n, i in there(self).items() if n in ("aa", "onnx")}
    )


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ("raise KeyError('lost')", "KeyError: 'lost'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return None", "TypeError: host_notes gives None, where a tuple of lines belongs"),
    ],
)
def test_the_doctor_names_a_broken_backend_and_goes_on(acme, few, capsys, notes, reason):
    impl = (
        "from bitwright.testing.reference import ReferenceBackend\n"
        f"class Broken(ReferenceBackend):\n    name = 'aa'\n    def host_notes(self): {notes}\n"
    )
    acme({"backends": 'BackendInfo("aa", "", factory="acme_plugin.impl:Broken")'}, impl)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert f"backend aa: backend 'aa' of plugin 'acme' (bitwright-acme 1.0) can't be used: {reason}" in told
    assert "backend onnx: ready" in told and "techniques" in told and "backend aa: ready" not in told


def test_the_doctor_goes_on_past_a_broken_backend_of_bitwrights_own(acme, few, capsys, monkeypatch):
    onnx = type(acme({}).backend("onnx"))
    monkeypatch.setattr(onnx, "host_notes", lambda self: 1 / 0)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "backend onnx: ZeroDivisionError: division by zero" in told and "techniques" in told


# -- results that are kept


COUNTING = """
import numpy as np
from bitwright.technique import Outcome, Report, Settings as Base
class Counting:
    name, Settings, requires, calls = "counting", Base, frozenset(), []
    def statistics(self, graph, plan, settings): return ()
    def apply(self, ctx):
        if ctx.store.get("layer") is None:
            self.calls.append(1)
            ctx.store.put("layer", {"done": np.zeros(1)})
        return Outcome(report=Report("counted"))
"""


def test_another_release_of_a_technique_begins_anew(acme, tmp_path, monkeypatch):
    """What a run directory holds of a technique is its release's: an upgrade may compute something else."""
    acme({"techniques": 'TechniqueInfo("counting", "", factory="acme_plugin.impl:Counting")'}, COUNTING)
    info = tmp_path / "bitwright-acme" / "bitwright_acme-1.0.dist-info" / "METADATA"
    calls = []
    for version in ("1.0", "1.0", "1.1", "1.1", "1.0"):
        info.write_text(f"Metadata-Version: 2.1\nName: bitwright-acme\nVersion: {version}\n")
        discovery.current.cache_clear()
        registry.default_registry.cache_clear()
        assert registry.default_registry().release("counting") == f"bitwright-acme {version}"
        with RunDirectory(tmp_path / "run") as run:
            QuantSim(gemm(), target="generic-int8", run=run).apply("counting")
        calls.append(len(registry.technique("counting").calls))
    assert calls == [1, 1, 2, 2, 2]


def test_what_ships_with_bitwright_has_no_release_of_its_own():
    found = registry.default_registry()
    assert not found.release("adaround") and not found.release("no_such_technique")
    assert not found.release(found.technique("adaround")) and not found.release(3)


# -- command lines


LINES = "from bitwright_deploy.target_job import Command\ndef lines(job): return {lines}\n"


def test_toolchains_are_plugins_too(acme, tmp_path):
    import bitwright

    sim = QuantSim(gemm(), target="generic-int8").calibrate({"x": DATA})
    sim.export(tmp_path, name="net")
    info = 'ToolchainInfo("acme", "", factory="acme_plugin.impl:lines", schemas=("1.0.0",), shapes=True)'
    found = acme({"toolchains": info}, LINES.format(lines="[Command('go', f'acme {job.stem} {dict(job.shapes)}')]"))
    told = bitwright.target_commands(tmp_path, "ACME")
    assert [c.line for c in told.commands] == ["acme net {'x': (1, 8)}"]
    assert (told.tool, told.schemas) == ("acme", ("1.0.0",))
    assert status(found).toolchains == ("acme",)
    assert {"qnn", "acme"} <= set(registry.toolchains())


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("['acme']", "tool 'acme': it gives 'acme', where Commands belong"),
        ("1 / 0", "toolchain 'acme' of plugin 'acme' .* can't be used: ZeroDivisionError"),
    ],
)
def test_a_broken_toolchain_is_named(acme, tmp_path, lines, reason):
    import bitwright

    QuantSim(gemm(), target="generic-int8").calibrate({"x": DATA}).export(tmp_path, name="net")
    acme({"toolchains": 'ToolchainInfo("acme", "", factory="acme_plugin.impl:lines")'}, LINES.format(lines=lines))
    with pytest.raises(PluginError, match=reason):
        bitwright.target_commands(tmp_path, "acme")


def test_a_toolchain_takes_no_built_in_name(acme):
    found = acme({"toolchains": 'ToolchainInfo("QNN", "", factory="x:y")'})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert found.toolchain_info("qnn").factory == "bitwright_deploy.qualcomm_lines:qnn"
    assert any("belongs to plugin 'bitwright_deploy.plugin'" in str(w.message) for w in told)


def test_the_catalogue_is_the_processes_own_again():
    assert "acme" not in catalogue.current().names(type(registry.toolchain_info("qnn")))


def test_a_technique_that_fails_leaves_no_stage_of_a_progress_open():
    class Fails:
        name, Settings, requires = "fails", BaseSettings, frozenset()

        def statistics(self, graph, plan, settings):
            return ()

        def apply(self, ctx):
            ctx.progress.start("Outer", 2)
            ctx.progress.start("Inner", 2)
            ctx.progress.finish()
            ctx.progress.start("Another", 2)
            raise KeyboardInterrupt

    class Open(Silent):
        depth = 0

        def start(self, description, total):
            self.depth += 1

        def finish(self):
            self.depth -= 1

    shown = Open()
    sim = QuantSim(gemm(), target="generic-int8", progress=shown)
    with pytest.raises(KeyboardInterrupt):
        sim.apply(Fails())
    assert shown.depth == 0
