"""Whatever a plugin does wrong stays its own: names that are taken, broken modules, exits, and who is told of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bitwright import registry
from bitwright.errors import PluginError
from bitwright.hookspecs import TechniqueInfo, ToolInfo
from bitwright.plugins import Registry
from bitwright.plugins.registry import PluginWarning

HEAD = "from bitwright.hookspecs import AutoStage, BackendInfo, TechniqueInfo, ToolInfo, hookimpl\n"
WORKS = """
from bitwright.technique import Outcome, Settings as Base
class Rounds:
    name, Settings, requires = "acme_rounds", Base, frozenset()
    def statistics(self, graph, plan, settings): return ()
    def apply(self, ctx): return Outcome()
"""


def techniques(*infos: str) -> str:
    return f"{HEAD}@hookimpl\ndef register_techniques(): return [{', '.join(infos)}]\n"


def tools(*infos: str) -> str:
    return f"{HEAD}@hookimpl\ndef register_tools(): return [{', '.join(infos)}]\n"


@pytest.fixture
def acme(install):
    """A distribution of one module, with what it registers."""

    def make(plugin: str, name: str = "acme", **modules: str) -> None:
        package = f"{name}_plugin"
        install(f"bitwright-{name}", {f"{package}.plugin": plugin, f"{package}.impl": WORKS,
                                      **{f"{package}.{k}": v for k, v in modules.items()}},
                f"{name} = {package}.plugin")  # fmt: skip

    return make


def status(found: Registry, name: str, *, examined: bool = False) -> registry.PluginStatus:
    return next(p for p in found.plugins(examined=examined) if p.name == name)


def bitwright(*words: str) -> SimpleNamespace:
    """The command line in a process of its own, with the distributions that were laid on the path."""
    path = os.pathsep.join(p for p in sys.path if p)
    ran = subprocess.run([sys.executable, "-m", "bitwright", *words], check=False, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": path, "BITWRIGHT_PLUGINS": ""})  # fmt: skip
    return SimpleNamespace(rc=ran.returncode, out=ran.stdout, err=ran.stderr)


# -- names


MINE = 'TechniqueInfo("acme_rounds", "mine", factory="acme_plugin.impl:Rounds")'


@pytest.mark.parametrize("taken", ["adaround", "cle"])
def test_a_built_in_keeps_its_name_and_the_newcomers_other_items_stay(acme, taken):
    acme(techniques(f'TechniqueInfo("{taken}", "another", factory="x:y")', MINE))
    found = Registry()
    with pytest.warns(PluginWarning) as warned:
        assert found.technique_info(taken).factory.startswith("bitwright_techniques.")
    (warning,) = warned
    assert f"technique '{taken}'" in str(warning.message)
    assert "plugin 'acme' (bitwright-acme 1.0)" in str(warning.message)
    assert "belongs to plugin 'bitwright_techniques.plugin' (bitwright " in str(warning.message)
    assert found.technique("acme_rounds").name == "acme_rounds"
    state = status(found, "acme")
    assert (state.state, state.techniques) == ("partial", ("acme_rounds",))
    assert state.reason in str(warning.message)
    assert {"adaround", "acme_rounds"} <= set(found.techniques())


def test_an_alias_that_is_taken_goes_and_the_technique_stays(acme):
    acme(techniques(MINE.replace(")", ', aliases=("cle", "acme_r"))')))
    found = Registry()
    with pytest.warns(
        PluginWarning, match="alias 'cle': the name belongs to .*technique 'acme_rounds' goes on without"
    ):
        assert found.technique_info("cle").name == "cross_layer_equalization"
    assert found.technique_info("acme_r").name == "acme_rounds"
    assert found.technique_info("acme_rounds").aliases == ("acme_r",)


def test_two_newcomers_with_one_name_lose_it_both(acme):
    acme(techniques(MINE, 'TechniqueInfo("left", "", factory="acme_plugin.impl:Rounds")'))
    acme(techniques('TechniqueInfo("acme_rounds", "theirs", factory="x:y")'), name="zeta")
    found = Registry()
    with pytest.warns(PluginWarning) as warned:
        assert "left" in found.techniques()
    assert len(warned) == 2, "each is told once"
    assert "acme_rounds" not in found.techniques()
    both = r"plugin 'acme' \(bitwright-acme 1.0\) and plugin 'zeta' \(bitwright-zeta 1.0\) both bring a technique"
    for ask in (found.technique, found.technique_info, found.settings):
        with pytest.raises(PluginError, match=both):
            ask("acme_rounds")
    assert found.technique("left") is not None
    assert [status(found, p).state for p in ("acme", "zeta")] == ["partial", "failed"]


def test_a_name_goes_before_an_alias(acme):
    acme(techniques(MINE))
    acme(techniques('TechniqueInfo("zeta", "", factory="x:y", aliases=("acme_rounds", "z"))'), name="zeta")
    found = Registry()
    with pytest.warns(PluginWarning, match=r"alias 'acme_rounds': the name belongs to plugin 'acme'"):
        assert found.technique_info("acme_rounds").summary == "mine"
    assert found.technique_info("z").name == "zeta"
    assert status(found, "acme").state == "ok"


def test_one_plugin_may_not_bring_a_name_twice(acme):
    acme(techniques(MINE, MINE.replace("mine", "again")))
    found = Registry()
    with (
        pytest.warns(PluginWarning),
        pytest.raises(PluginError, match=r"bitwright-acme 1.0\) brings twice a technique"),
    ):
        found.technique("acme_rounds")


def test_backends_keep_their_names_too(acme):
    acme(f'{HEAD}@hookimpl\ndef register_backends(): return [BackendInfo("onnx", "", factory="x:y")]\n')
    found = Registry()
    with pytest.warns(PluginWarning, match="backend 'onnx': the name belongs to plugin 'bitwright_onnx.plugin'"):
        assert found.backend_info("onnx").factory == "bitwright_onnx.backend:OnnxBackend"


@pytest.mark.parametrize("name", ["auto_quantize", "QuantSim", "registry"])
def test_tools_take_no_name_of_bitwrights(acme, name):
    acme(tools(f'ToolInfo("{name}", "", factory="x:y")'))
    found = Registry()
    with pytest.warns(
        PluginWarning, match=f"tool '{name}': the name belongs to (plugin 'bitwright_search|bitwright it)"
    ):
        assert "auto_quantize" in found.tools()
    assert found.tools().get(name, ToolInfo("", "", "")).factory != "x:y"


def test_what_is_added_by_hand_takes_no_name_either():
    found = Registry(entry_points=False)
    with pytest.raises(PluginError, match="belongs to bitwright itself"):
        found.add(ToolInfo("QuantSim", "", factory="x:y"))
    with pytest.raises(PluginError, match="aliases: 'abc' isn't a tuple"):
        found.add(TechniqueInfo("mine", "", factory="x:y", aliases="abc"))


def test_two_commands_of_one_name_are_lost_and_the_tools_stay(acme):
    one = 'ToolInfo("{0}", "", factory="{0}_plugin.impl:Rounds", command="{0}_plugin.impl:Rounds", command_name="go")'
    acme(tools(one.format("acme")))
    acme(tools(one.format("zeta")), name="zeta")
    found = Registry()
    with pytest.warns(PluginWarning, match="command 'go': the name is wanted by"):
        assert {"acme", "zeta"} <= set(found.tools())
    assert "go" not in found.commands()
    with pytest.raises(PluginError, match=r"both bring a command 'go'"):
        found.command("go")
    ran = bitwright("go")
    assert ran.rc == 2 and "both bring a command 'go'" in ran.err
    assert bitwright("targets").rc == 0


def test_no_plugin_replaces_a_command_of_bitwrights(acme):
    acme(tools('ToolInfo("acme", "mine", factory="acme_plugin.impl:Rounds", command="acme_plugin.impl:Rounds", '
               'command_name="quantize")'))  # fmt: skip
    ran = bitwright("quantize", "--help")
    assert ran.rc == 0 and "--recipe" in ran.out
    ran = bitwright("plugins", "--json")
    (told,) = [p for p in json.loads(ran.out) if p["name"] == "acme"]
    assert told["state"] == "partial" and "command 'quantize': the name belongs to bitwright itself" in told["reason"]
    assert told["tools"] == ["acme"], "the tool itself stays"
    assert ran.err.count("command 'quantize': ") == 1


def test_the_reserved_commands_are_those_of_the_command_line():
    code = "from bitwright.cli.app import app; print(*(c.name for c in app.registered_commands), " \
           "*(g.name for g in app.registered_groups))"  # fmt: skip
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    from bitwright.catalogue._catalogue import CORE_COMMANDS

    assert set(there) == set(CORE_COMMANDS)


# -- what raises


@pytest.mark.parametrize(
    "text", ["import sys; sys.exit('bye')", "raise KeyboardInterrupt", "raise GeneratorExit", "raise SystemExit(3)"]
)
def test_exits_in_an_import_are_the_plugins_alone(acme, text):
    acme(text)
    found = Registry()
    with pytest.warns(PluginWarning, match=r"plugin 'acme' \(bitwright-acme 1.0\) skipped: (System|Keyb|Gener)"):
        assert "adaround" in found.techniques()
    assert status(found, "acme").state == "failed"


def test_every_command_goes_on_beside_a_plugin_that_exits(acme):
    acme("import sys; sys.exit('bye')")
    for words in (("plugins",), ("targets",), ("techniques", "adaround"), ("--help",)):
        ran = bitwright(*words)
        assert ran.rc == 0, ran.err
        assert ran.err.count("plugin 'acme' (bitwright-acme 1.0) skipped: SystemExit: bye") <= 1
    assert "SystemExit: bye" in bitwright("plugins").out


def test_ctrl_c_while_a_plugin_is_imported_stops(acme, monkeypatch):
    acme(f"import os, signal; os.kill(os.getpid(), signal.{signal.SIGINT.name}); import time; time.sleep(5)")
    # What a shell starts in the background ignores Ctrl-C, and so do these tests there.
    given = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Registry().techniques()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, given)


def test_hooks_fail_one_by_one(acme):
    acme(techniques(MINE) + "@hookimpl\ndef register_tools(): return 1/0\n")
    found = Registry()
    with pytest.warns(PluginWarning, match="hook register_tools: ZeroDivisionError"):
        assert found.technique("acme_rounds").name == "acme_rounds"
    state = status(found, "acme")
    assert state.state == "partial" and state.faults == ("hook register_tools: ZeroDivisionError: division by zero",)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ('name=""', "name: '' is no name"),
        ('aliases="abc"', "aliases: 'abc' isn't a tuple"),
        ("api='1'", "api: '1' isn't a number"),
        ("factory=3", "factory: 3 is neither"),
        ("summary=None", "summary: None isn't text"),
        ("settings=3", "settings: 3 is neither"),
        ("auto=35", "auto: 35 is no AutoStage"),
        ("auto=AutoStage('late')", "auto: its order 'late' isn't a number"),
        ("auto=AutoStage(50, replaces='cle')", "auto: what it replaces, 'cle', isn't a tuple"),
    ],
)
def test_a_descriptor_that_makes_no_sense_is_left_out_alone(acme, field, reason):
    fields = {"name": "name='odd'", "summary": "summary=''", "factory": "factory='x:y'"}
    fields[field.partition("=")[0]] = field
    acme(techniques(MINE, f"TechniqueInfo({', '.join(fields.values())})"))
    found = Registry()
    with pytest.warns(PluginWarning, match="its descriptor can't be used"):
        assert "acme_rounds" in found.techniques()
    assert reason in status(found, "acme").reason


def test_a_broken_factory_is_named_and_is_no_bug_of_bitwrights(acme):
    acme(techniques(MINE, 'TechniqueInfo("gone", "", factory="acme_nowhere:Rounds")',
                    'TechniqueInfo("exits", "", factory="acme_plugin.exits:Rounds")'),
         exits="import sys; sys.exit(4)")  # fmt: skip
    found = Registry()
    with pytest.raises(
        PluginError, match=r"technique 'gone' of plugin 'acme' \(bitwright-acme 1.0\) can't be used: Mod"
    ):
        found.technique("gone")
    with pytest.raises(PluginError, match=r"technique 'exits' of plugin 'acme' .* can't be used: SystemExit: 4"):
        found.technique("exits")
    state = status(found, "acme")
    assert (state.state, state.techniques) == ("partial", ("acme_rounds",))
    assert "technique 'gone': ModuleNotFoundError" in state.reason
    ran = bitwright("techniques", "gone")
    assert ran.rc == 2 and "a bug" not in ran.err and "plugin 'acme' (bitwright-acme 1.0)" in ran.err
    ran = bitwright("plugins")
    assert ran.rc == 0 and "technique 'gone': ModuleNotFoundError" in ran.out and "partial" in ran.out
    assert bitwright("techniques").rc == 0


def test_a_broken_command_module_is_told_where_it_is_asked_for(acme):
    acme(tools('ToolInfo("acme_go", "Goes.", factory="acme_plugin.impl:Rounds", command="acme_plugin.broken:go")'),
         broken="import acme_nowhere")  # fmt: skip
    for words in (("targets",), ("techniques",)):
        ran = bitwright(*words)
        assert ran.rc == 0 and not ran.err
    ran = bitwright("acme-go")
    assert (
        ran.rc == 2 and "command 'acme-go' of plugin 'acme' (bitwright-acme 1.0)" in ran.err and "a bug" not in ran.err
    )
    ran = bitwright("--help")
    assert ran.rc == 0 and "acme-go" in ran.out and "auto" in ran.out
    assert "command 'acme-go': ModuleNotFoundError" in bitwright("plugins").out


def test_what_breaks_within_a_plugins_code_is_for_its_authors(acme):
    acme(tools('ToolInfo("acme_go", "Goes.", factory="acme_plugin.impl:Rounds", command="acme_plugin.go:go")'),
         go='def go():\n    "Goes."\n    raise KeyError("lost")\n')  # fmt: skip
    ran = bitwright("acme-go")
    assert ran.rc == 2
    assert "unexpected KeyError: 'lost'. It arose in plugin 'acme' (bitwright-acme 1.0)" in ran.err
    assert "This is a bug" not in ran.err


def test_a_tool_may_be_given_as_callables():
    found = Registry((), entry_points=False)

    def search(model: object) -> str:
        return f"searched {model}"

    found.add(ToolInfo("search", "", factory=search, command=search))
    assert found.tool("search")("net") == "searched net"
    assert found.command("search") is search


def test_backends_that_break_while_they_are_asked_are_passed_over(acme, tmp_path):
    acme(f"""{HEAD}
def sniff(path): raise RuntimeError("sniffed")
@hookimpl
def register_backends():
    return [BackendInfo("acme", "", factory="acme_plugin.nowhere:X", suffixes=(".acme",), sniff=sniff)]
""")
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    found = Registry()
    assert found.backend_for_model(model).name == "onnx"
    (tmp_path / "renamed.bin").write_bytes(model.SerializeToString())
    with pytest.warns(PluginWarning, match="sniff of backend 'acme' of plugin 'acme' .*RuntimeError: sniffed"):
        assert found.backend_for_path(tmp_path / "renamed.bin").name == "onnx"
    with pytest.raises(PluginError, match=r"no backend takes a builtins.dict.*backend 'acme' of plugin 'acme'"):
        found.backend_for_model({})
