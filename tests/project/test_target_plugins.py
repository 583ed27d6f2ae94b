"""Targets, integer runtimes and encodings schemas that distributions bring."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bitwright import catalogue
from bitwright.catalogue import _discovery as discovery
from bitwright.errors import EncodingError, InputError, PluginError, TargetError
from bitwright.formats import EncodingsFile, Entry, convert, dumps, loads, read, writes_biases
from bitwright.hookspecs import RuntimeInfo, SchemaInfo
from bitwright.plugins import Registry
from bitwright.plugins.registry import PluginWarning, default_registry
from bitwright.simulation import QuantSim
from bitwright.targets import load_target, target_names, target_summary

HEAD = "from bitwright.hookspecs import RuntimeInfo, SchemaInfo, TargetInfo, hookimpl\n"
ACME = {"bitwright": {"extends": "generic-int8", "weights": "int4"}}


def targets(*infos: str) -> str:
    return f"{HEAD}@hookimpl\ndef register_targets(): return [{', '.join(infos)}]\n"


MINE = 'TargetInfo("acme-npu", "Acme.", file="acme_plugin:acme.json", aliases=("acme",))'


@pytest.fixture
def acme(install, tmp_path):
    """A distribution with a plugin and data files, and the catalogue that has it."""

    def make(plugin: str, name: str = "acme", **files: Any) -> None:
        install(f"bitwright-{name}", {f"{name}_plugin.plugin": plugin}, f"{name} = {name}_plugin.plugin")
        for file, content in files.items():
            path = tmp_path / f"bitwright-{name}" / f"{name}_plugin" / f"{file}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        discovery.current.cache_clear()

    yield make
    discovery.current.cache_clear()


def gemm() -> Any:
    """A model of one layer."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "fc")], "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def status(name: str) -> Any:
    found = Registry(catalogue=catalogue.current)
    return next(p for p in found.plugins(examined=True) if p.name == name)


# -- targets


def test_a_target_is_there_under_its_names(acme):
    acme(targets(MINE), acme=ACME)
    for name in ("acme-npu", "ACME_NPU", "acme"):
        target = load_target(name)
        assert (target.weights, target.per_channel("Conv")) == ("int4", True)
    assert load_target("acme_npu").name == "acme-npu"
    assert {"acme-npu", "acme", "htp_v73"} <= set(target_names())
    assert target_summary("acme-npu").description == "Acme."
    assert status("acme").targets == ("acme-npu",)


def test_other_targets_extend_it_wherever_they_are(acme, tmp_path):
    acme(targets(MINE, 'TargetInfo("acme-2", "", file="acme_plugin:second.json")'), acme=ACME,
         second={"bitwright": {"extends": "acme.json", "activations": "uint16"}})  # fmt: skip
    second = load_target("acme-2")
    assert (second.weights, second.activations) == ("int4", "uint16")
    (tmp_path / "own.json").write_text(json.dumps({"bitwright": {"extends": "acme-2", "weights": "int8"}}))
    own = load_target(tmp_path / "own.json")
    assert (own.weights, own.activations) == ("int8", "uint16")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "can't be read as JSON"),
        ('{"bitwright": {"extends": "generic-int8", "wieghts": "int4"}}', "did you mean 'weights'"),
        ('{"bitwright": {"extends": "acme.json"}}', "in a circle"),
        ('{"bitwright": {"extends": "acme-npu"}}', "in a circle"),
        ('{"bitwright": {"extends": "generic-int8", "runtime": "nowhere"}}', "no integer runtime 'nowhere'"),
        (None, "can't be read"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_plugin(acme, content, reason):
    acme(targets(MINE), **({} if content is None else {"acme": content}))
    with pytest.raises(TargetError, match=reason) as caught:
        load_target("acme-npu")
    assert "plugin 'acme' (bitwright-acme 1.0)" in str(caught.value)
    assert load_target("htp_v73").name == "htp_v73"
    state = status("acme")
    assert state.state == "failed" and "target 'acme-npu'" in state.reason


def test_a_package_that_exits_is_named_too(acme, tmp_path):
    acme(targets('TargetInfo("acme-npu", "", file="acme_gone:acme.json")'))
    with pytest.raises(TargetError, match=r"target 'acme-npu' of plugin 'acme' .* can't be used: ModuleNotFound"):
        load_target("acme-npu")


def test_presets_keep_their_names_and_two_newcomers_lose_theirs(acme):
    acme(targets(MINE, 'TargetInfo("HTP-V73", "", file="acme_plugin:acme.json")'), acme=ACME)
    acme(targets('TargetInfo("ACME_NPU", "", file="zeta_plugin:acme.json")'), name="zeta", acme=ACME)
    with pytest.warns(PluginWarning) as warned:
        assert load_target("htp_v73").source == "preset htp_v73"
    assert "target 'HTP-V73': the name belongs to plugin 'bitwright.targets.plugin'" in str(warned[-1].message)
    with pytest.raises(TargetError, match=r"plugin 'acme' .* and plugin 'zeta' .* both bring a target"):
        load_target("acme-npu")
    assert "acme-npu" not in target_names()


def test_a_saved_simulation_holds_its_target(acme, tmp_path):
    """What a plugin brought may be gone when it is opened again."""
    pytest.importorskip("onnx")
    from bitwright.simulation._saved_state import load

    acme(targets(MINE), acme=ACME)
    sim = QuantSim(gemm(), target="acme-npu").calibrate({"x": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)})
    sim.save(tmp_path / "saved")
    catalogue.current().descriptors[:] = [d for d in catalogue.current().descriptors if d.info.name != "acme-npu"]
    with pytest.raises(TargetError):
        load_target("acme-npu")
    again = load(tmp_path / "saved", None, {})
    assert (again.target.name, again.target.weights) == ("acme-npu", "int4")


# -- runtimes


def test_built_in_runtimes_come_through_the_hook():
    found = Registry(entry_points=False).runtimes()
    assert (found["onnxruntime"].artefact, found["onnxruntime"].arithmetic) == ("qdq", "")
    assert (found["tflite"].artefact, found["tflite"].suffix) == ("tflite", ".tflite")
    assert "fixed point" in found["tflite"].arithmetic


def test_what_a_runtime_must_have():
    found = Registry((), entry_points=False)
    with pytest.raises(PluginError, match="suffix: '' is no ending"):
        found.add(RuntimeInfo("npu", "", factory="x:y", artefact="npu"))
    found.add(RuntimeInfo("npu", "", factory=dict))
    with pytest.raises(PluginError, match="isn't an IntegerRuntime: it lacks compile"):
        found.runtime("npu")
    with pytest.raises(PluginError, match="there is no runtime 'nup'"):
        found.runtime("nup")


def test_verify_refuses_runtimes_that_are_not_there(tmp_path):
    pytest.importorskip("onnxruntime")
    from bitwright.verify import verify

    x = {"x": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)}
    QuantSim(gemm(), target="generic-int8").calibrate(x).export(tmp_path)
    with pytest.raises(InputError, match="there is no runtime 'onnxruntme'"):
        verify(tmp_path, x, runtime="onnxruntme")
    with pytest.raises(InputError, match="nothing for tflite"):
        verify(tmp_path, x, runtime="tflite")
    found = verify(tmp_path, x)
    assert (found.runtime, found.problems) == ("onnxruntime", [])


def test_verify_takes_the_runtime_that_the_target_names(tmp_path):
    """Of two that execute the same file it is not the first; where it is gone, the other one is told of."""
    pytest.importorskip("onnxruntime")
    from bitwright.verify import verify

    discovery.current.cache_clear()
    default_registry.cache_clear()
    try:
        catalogue.current().admit(RuntimeInfo("other", "", factory="bitwright_onnx.onnx_runtime:OnnxRuntime"))
        x = {"x": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)}
        target = {"bitwright": {"extends": "generic-int8", "runtime": "other"}}
        QuantSim(gemm(), target=target).calibrate(x).export(tmp_path)
        registry = Registry(catalogue=catalogue.current)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bitwright.plugins.registry.default_registry", lambda: registry)
            found = verify(tmp_path, x)
            assert (found.runtime, found.notes) == ("other", [])
            assert verify(tmp_path, x, runtime="onnxruntime").runtime == "onnxruntime"
        discovery.current.cache_clear()  # the process's own, which may be made by now, has it no longer
        default_registry.cache_clear()
        found = verify(tmp_path, x)
        assert found.runtime == "onnxruntime"
        assert "the integer runtime 'other', which isn't installed here" in found.notes[0]
    finally:
        discovery.current.cache_clear()
        default_registry.cache_clear()


# -- schemas

SCHEMA = '''
import numpy as np
from bitwright.formats import EncodingsFile, Entry, ScaleLayout


class Acme:
    """Scales and offsets by name, one grid a tensor."""

    VERSION = "acme-1"

    def parse(self, document, source):
        def entries(section):
            return {n: Entry(8, np.array(s), np.array(z)) for n, (s, z) in document[section].items()}

        return EncodingsFile(entries("tensors"), entries("weights"), version="acme-1")

    def render(self, file):
        def section(entries):
            return {n: self.render_entry(n, e) for n, e in entries.items()}

        return {"version": "acme-1", "tensors": section(file.activations), "weights": section(file.parameters)}

    def render_entry(self, name, entry):
        return [float(entry.scale), int(entry.zero_point)]

    def losses(self, entry):
        return []
'''


def schemas(info: str) -> str:
    return f"{HEAD}{SCHEMA}\n@hookimpl\ndef register_schemas(): return [{info}]\n"


def test_built_in_schemas_come_through_the_hook():
    assert [d.info.name for d in catalogue.current().of(SchemaInfo)][:4] == ["0.6.1", "1.0.0", "2.0.0", "2.1.0"]
    assert [writes_biases(v) for v in ("0.6.1", "1.0.0", "2.0.0", "2.1.0")] == [False, False, True, True]


def test_a_schema_is_read_written_and_converted_to(acme, tmp_path):
    acme(schemas('SchemaInfo("acme-1", "Acme.", factory=Acme)'))
    file = EncodingsFile({"x": Entry(8, np.array(0.5), np.array(3))}, {"w": Entry(8, np.array(0.25), np.array(128))})
    text = dumps(convert(file, "acme-1").file)
    assert json.loads(text) == {"version": "acme-1", "tensors": {"x": [0.5, 3]}, "weights": {"w": [0.25, 128]}}
    again = loads(text)
    assert again.version == "acme-1" and again.parameters["w"].scale == 0.25
    assert convert(again, "1.0.0").file.activations["x"].zero_point == 3
    (tmp_path / "e.json").write_text(text)
    assert read(tmp_path / "e.json").entries.keys() == {"x", "w"}
    assert status("acme").schemas == ("acme-1",)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"version": "acme-1"}, r"encodings schema 'acme-1' of plugin 'acme' .* can't be used: KeyError: 'tensors'"),
        ({"version": "acme-2", "tensors": {}, "weights": {}}, "is none of .*acme-1"),
    ],
)
def test_what_a_schema_does_wrong_is_put_down_to_it(acme, document, reason):
    acme(schemas('SchemaInfo("acme-1", "Acme.", factory=Acme)'))
    with pytest.raises(EncodingError, match=reason):
        loads(json.dumps(document))


def test_a_schema_that_is_none(acme):
    acme(schemas('SchemaInfo("acme-1", "Acme.", factory=dict), SchemaInfo("1.0.0", "", factory=Acme)'))
    file = EncodingsFile({}, {})
    with pytest.warns(PluginWarning, match="schema '1.0.0': the name belongs to plugin 'bitwright.formats.plugin'"):
        assert json.loads(dumps(file, "1.0.0"))["version"] == "1.0.0"
    with pytest.raises(EncodingError, match=r"encodings schema 'acme-1' of plugin 'acme' .*isn't a Schema"):
        dumps(file, "acme-1")
