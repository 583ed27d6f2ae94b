"""Opening a .pt2 file runs nothing of it: each way in which one could run code, crafted."""

import collections
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from bitwright.errors import InputError  # noqa: E402
from bitwright_torch.backend import TorchBackend  # noqa: E402
from bitwright_torch.capture.size_expressions import check_expression  # noqa: E402

# The net keeps a view of a smaller array, which `torch.export.save` doesn't like and keeps.
pytestmark = pytest.mark.filterwarnings("ignore:No complete tensor found in the group:UserWarning")
BACKEND = TorchBackend()
DYNAMIC = torch.export.Dim.AUTO


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(4, 4)
        self.register_buffer("wide", torch.ones(1, 4).expand(3, 4))
        self.drop = torch.nn.Dropout()

    def forward(self, x, y):
        a = torch.relu(self.drop(self.l(x))).reshape(x.shape[0] * 2, 2)
        n = (x.shape[0] + 1) // 2 + max(x.shape[0], y.shape[0])
        up = torch.nn.functional.interpolate(y[None, None], scale_factor=1.5)
        steps = torch.arange(n, dtype=torch.float32) + self.wide.sum() + torch.tensor([2.0])
        return {"a": a, "b": (steps * y.sum(), up)}


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    net, path = Net().eval(), tmp_path_factory.mktemp("saved") / "good.pt2"
    inputs = (torch.randn(3, 4), torch.randn(5, 6))
    program = torch.export.export(net, inputs, dynamic_shapes=({0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}))
    torch.export.save(program, path)
    return path, net


@pytest.fixture
def good(saved, tmp_path):
    """A copy that the test may change, and what it holds."""
    path, net = saved
    return Path(shutil.copy(path, tmp_path)), net


def rewritten(path, change):
    """A copy beside with the entries that `change(name, data)` gives: data, or None to drop one."""
    evil = path.with_name(f"changed {path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as made:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                made.writestr(name, data)
    return evil


def edited(path, entry, edit):
    def change(name, data):
        if not name.endswith(entry):
            return data
        value = json.loads(data)
        edit(value)
        return json.dumps(value).encode()

    return rewritten(path, change)


def tried(path, mark):
    """Opens and runs it; True where the file was refused in bitwright's own words."""
    x, y = torch.randn(2, 4), torch.randn(3, 6)
    try:
        BACKEND.load(path)(x, y)
    except InputError:
        return True
    finally:
        assert not mark.exists(), "the file's code was run"
    return False


def everywhere(value, key, new):
    if isinstance(value, dict):
        for k in value:
            if k == key:
                value[k] = new
            else:
                everywhere(value[k], key, new)
    elif isinstance(value, list):
        for part in value:
            everywhere(part, key, new)


def test_a_good_file_opens_with_every_kind_of_size(good):
    path, net = good
    opened = BACKEND.load(path)
    x, y = torch.randn(6, 4), torch.randn(2, 6)
    expected, got = net(x, y), opened(x, y)
    assert torch.equal(expected["a"], got["a"])
    assert all(torch.equal(e, g) for e, g in zip(expected["b"], got["b"], strict=True))


def test_an_expression_of_sizes_is_not_evaluated(good, tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    assert tried(edited(good[0], "models/model.json", lambda v: everywhere(v, "expr_str", code)), mark)
    meta = {"as_expr": {"expr_str": code, "hint": None}}

    def edit(config):
        next(iter(config["config"].values()))["tensor_meta"]["sizes"][0] = meta

    assert tried(edited(good[0], "model_weights_config.json", edit), mark)


def test_sample_inputs_are_not_unpickled(good, tmp_path):
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save(((Marker(mark),), {}), buffer)
    evil = rewritten(good[0], lambda n, d: buffer.getvalue() if "sample_inputs" in n else d)
    assert not tried(evil, mark)


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_weights_and_constants_are_not_unpickled(good, tmp_path, kind):
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save(Marker(mark), buffer)

    def pickled(config):
        for about in config["config"].values():
            about["use_pickle"] = True

    def payload(name, data):
        return buffer.getvalue() if f"/{kind}/" in name and not name.endswith(".json") else data

    with zipfile.ZipFile(good[0]) as source:  # each kind has a tensor here
        assert any(f"/{kind}/" in n and not n.endswith(".json") for n in source.namelist())
    assert tried(rewritten(edited(good[0], f"model_{kind}_config.json", pickled), payload), mark)

    legacy = {f"good/data/{kind}/model.pt": buffer.getvalue()}
    evil = tmp_path / "legacy.pt2"
    with zipfile.ZipFile(good[0]) as source, zipfile.ZipFile(evil, "w") as made:
        for name in source.namelist():
            made.writestr(name, source.read(name))
        for name, data in legacy.items():
            made.writestr(name, data)
    assert tried(evil, mark)


@pytest.mark.parametrize("prefix", ["custom_obj_0", "opaque_obj_0"])
def test_objects_are_not_unpickled(good, tmp_path, prefix):
    mark = tmp_path / "mark"

    def edit(config):
        config["config"]["thing"] = {
            "path_name": prefix, "is_param": False, "use_pickle": True, "tensor_meta": None,
        }  # fmt: skip

    evil = edited(good[0], "model_constants_config.json", edit)
    with zipfile.ZipFile(evil, "a") as made:
        made.writestr(f"good/data/constants/{prefix}", pickle.dumps(Marker(mark)))
    assert tried(evil, mark)


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.load", "torch.hub.load", "torch.ops.load_library", "math.__loader__.load_module",
     "_operator.methodcaller", "_operator.attrgetter", "torch.ops.aten.from_file.default", "#evil:op",
     "torch.ops.aten.relu.default.__class__", "torch.sys.modules.__getitem__", "torch.ops.prim.Print.default"],
)  # fmt: skip
def test_only_ops_are_called(good, tmp_path, target):
    mark = tmp_path / "mark"

    def edit(program):
        node = program["graph_module"]["graph"]["nodes"][-1]
        node["target"] = target
        node["inputs"] = [{"name": "command", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]

    assert tried(edited(good[0], "models/model.json", edit), mark)


def test_names_are_not_written_into_source(good, tmp_path):
    mark = tmp_path / "mark"
    text = (good[0].parent / "x").name
    with zipfile.ZipFile(good[0]) as source:
        program = json.loads(source.read("good/models/model.json"))
    node = next(n["name"] for n in program["graph_module"]["graph"]["nodes"] if "relu" in n["target"])
    code = f"{text} = open({str(mark)!r}, 'w')\n    y"

    def renamed(name, data):
        if name.endswith("models/model.json"):
            return data.decode().replace(f'"{node}"', json.dumps(code)).encode()
        return data

    assert tried(rewritten(good[0], renamed), mark)
    quoted = f'a"), open({str(mark)!r}, "w'
    everything = rewritten(good[0], lambda n, d: d.replace(b'"l.weight"', json.dumps(quoted).encode()))
    assert tried(everything, mark)


def test_names_that_bitwright_kept_are_not_written_into_source(tmp_path):
    mark = tmp_path / "mark"
    model = BACKEND.adopt(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval(), torch.randn(2, 4))
    BACKEND.save(model, tmp_path / "good.pt2")

    def edit(record):
        for op in record["ops"]:
            op[2] = f'a"), open({str(mark)!r}, "w'

    with pytest.raises(InputError, match="names"):
        BACKEND.load(edited(tmp_path / "good.pt2", "bitwright.json", edit))
    with pytest.raises(InputError, match="names"):
        BACKEND.load(edited(tmp_path / "good.pt2", "bitwright.json", lambda r: r.update(ops=[[1]])))


def test_call_structures_import_nothing(good, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "evil_module.py").write_text(f"open({str(mark)!r}, 'w')\nfactory = list\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = {"default_factory_module": "evil_module", "default_factory_name": "factory", "dict_context": []}
    escaped = '{"\\u005f_enum__": true, "fqn": "evil_module:A", "name": "B"}'
    for kind, context in (("collections.defaultdict", factory), ("builtins.dict", escaped)):

        def edit(program, kind=kind, context=context):
            signature = program["graph_module"]["module_call_graph"][0]["signature"]
            protocol, spec = json.loads(signature["in_spec"])
            spec["children_spec"][1] = {"type": kind, "context": context, "children_spec": []}
            signature["in_spec"] = json.dumps([protocol, spec])

        assert tried(edited(good[0], "models/model.json", edit), mark)


def test_compiled_code_is_not_loaded(good, tmp_path):
    with zipfile.ZipFile(good[0], "a") as made:
        made.writestr("good/data/aotinductor/model/model.so", b"\x7fELF")
    assert not tried(good[0], tmp_path / "mark")
    evil = rewritten(good[0], lambda n, d: None if "models/" in n else d)
    with pytest.raises(InputError, match="compiled packages"):
        BACKEND.load(evil)


def test_old_archives_open_without_their_pickles(good, tmp_path):
    from torch._export.serde.serialize import serialize

    _, net = good
    x, y = torch.randn(3, 4), torch.randn(5, 6)
    program = torch.export.export(net, (x, y), dynamic_shapes=({0: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}))
    made = serialize(program)
    buffer = io.BytesIO()
    torch.save(((Marker(tmp_path / "mark"),), {}), buffer)
    state, evil = io.BytesIO(), io.BytesIO()
    torch.save(collections.OrderedDict(program.state_dict), state)
    torch.save(Marker(tmp_path / "mark"), evil)
    constants = io.BytesIO()
    torch.save(dict(program.constants), constants)
    for name, weights in (("old.pt2", state), ("evil.pt2", evil)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("serialized_exported_program.json", made.exported_program)
            archive.writestr("serialized_state_dict.pt", weights.getvalue())
            archive.writestr("serialized_constants.pt", constants.getvalue())
            archive.writestr("serialized_example_inputs.pt", buffer.getvalue())
            archive.writestr("version", "8.5")
    assert torch.equal(BACKEND.load(tmp_path / "old.pt2")(x, y)["a"], net(x, y)["a"])
    assert tried(tmp_path / "evil.pt2", tmp_path / "mark") and not (tmp_path / "mark").exists()


def test_archives_that_readers_could_take_in_two_ways_are_refused(good, tmp_path):
    path = tmp_path / "twice.pt2"
    with zipfile.ZipFile(good[0]) as source, zipfile.ZipFile(path, "w") as made:
        for name in source.namelist():
            made.writestr(name, source.read(name))
        made.writestr("good/MODELS/model.json", b"{}")
    with pytest.raises(InputError, match="one name"):
        BACKEND.load(path)
    bomb = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("good/models/model.json", bytes(2**28))
    with pytest.raises(InputError, match="unpacks"):
        BACKEND.load(bomb)


def test_a_tensor_is_not_larger_than_its_data(good):
    def edit(config):
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 2**40}], [{"as_int": 0}]

    with pytest.raises(InputError, match="larger than its data"):
        BACKEND.load(edited(good[0], "model_weights_config.json", edit))
    for broken in ({}, {"config": 3}, {"config": {"l.weight": None}}, []):
        evil = rewritten(
            good[0], lambda n, d, b=broken: json.dumps(b).encode() if n.endswith("weights_config.json") else d
        )
        with pytest.raises(InputError):
            BACKEND.load(evil)


@pytest.mark.parametrize(
    "text",
    ["s0", "2*s0 + 1", "-s0", "(s0 + 3)//2", "s0**2", "Max(1, s0)", "Eq(s0, 3)", "s0 >= 4", "u0 & (s0 < 3)",
     "Pow(Symbol('s0', integer=True), Integer(2))", "Float('1.5', precision=53)", "Float('-1e-05', precision=53)",
     "Mul(Rational(1, 2), ToFloat(Symbol('batch', positive=True, integer=True)))", "Integer(-1)",
     "Piecewise((s0, s0 > 3), (1, True))", "FloorDiv(Add(Symbol('s77', positive=True, integer=True), Integer(1)), 2)"],
)  # fmt: skip
def test_expressions_of_sizes_pass(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "().__class__", "s0.__class__", "Symbol.__init__", "lambda: 1", "[s0 for s0 in x]", "eval",
     "9**9", "2**(2**8)", "Pow(Pow(s0, 8), 8)", "s0 << s1", "PowByNatural(Integer(9), Integer(999999))", "'text'",
     "Symbol('a\\x00b')", "Symbol(\"__import__('os')\")", "Symbol('s0', commutative=__import__('os'))", "1" * 60,
     "Integer('__import__(1)')", "Float('1e99999')", "Function('f')(s0)", "sympify('s0')", "s0 if s0 else s1", "",
     "(" * 300 + "s0" + ")" * 300, "s0 + " * 900 + "s0", "f'{s0}'", "s0; s1", "ſ0", "Max(*s0)", "Max(1, x=s0)", None],
)  # fmt: skip
def test_other_expressions_do_not(text):
    with pytest.raises(InputError, match="not an expression"):
        check_expression(text)
