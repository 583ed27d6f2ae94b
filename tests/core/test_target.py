"""Target configurations: AIMET's schema loads unchanged, everything else is refused with a path and a way out."""

import copy
import json

import pytest

from bitwright.errors import TargetError
from bitwright.graph import Op, OpKind, ParamRole
from bitwright.targets import Target, load_target, target_names, target_summary

AIMET = {
    "defaults": {
        "ops": {"is_output_quantized": "True", "is_symmetric": "False"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "unsigned_symmetric": "False",
        "per_channel_quantization": "True",
        "hw_version": "V73",
        "supported_kernels": [
            {"activation": {"bitwidth": 16, "dtype": "int"}, "param": {"bitwidth": 8, "dtype": "int"}},
            {"activation": {"bitwidth": 8, "dtype": "int"}, "param": {"bitwidth": 8, "dtype": "int"}},
        ],
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {
        "Relu": {"is_output_quantized": "True", "encoding_constraints": {"min": 0.0}},
        "Gemm": {
            "per_channel_quantization": "False",
            "supported_kernels": [{"activation": {"bitwidth": 16, "dtype": "float"}}],
            "params": {"weight": {"is_symmetric": "False"}},
        },
        "MaxPool": {"is_output_quantized": "False"},
        "Add": {"is_input_quantized": "True"},
    },
    "supergroups": [{"op_list": ["Conv", "Relu"]}],
    "supergroup_pass_list": ["LayerNormalization"],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


def changed(path, value):
    """The file above with one place set (or removed, for `...`)."""
    config = copy.deepcopy(AIMET)
    here = config
    for key in path[:-1]:
        here = here.setdefault(key, {}) if isinstance(here, dict) else here[key]
    if value is ...:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return config


def write(tmp_path, config, name="chip.json"):
    path = tmp_path / name
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_aimet_file_loads_unchanged(tmp_path):
    target = load_target(write(tmp_path, AIMET))
    assert target.name == "chip"
    assert target.hw_version == 73
    assert target.per_channel("Conv") and not target.per_channel("Gemm")
    assert target.param("Conv", ParamRole.WEIGHT) == (True, True)
    assert target.param("Gemm", ParamRole.WEIGHT) == (True, False)
    assert target.param("Conv", ParamRole.BIAS) == (False, True)
    assert target.op("Relu").encoding_constraints.min == 0.0
    assert target.kernels("Gemm")[0].activation.dtype == "float"
    assert len(target.kernels("Conv")) == 2
    assert (target.weights, target.activations) == ("int8", "uint16")  # the first kernel is the default


def test_booleans_may_be_real(tmp_path):
    text = json.dumps(AIMET).replace('"True"', "true").replace('"False"', "false")
    assert load_target(write(tmp_path, text)).config == load_target(write(tmp_path, AIMET, "chip2.json")).config


def test_older_aimet_spellings_load():
    config = changed(("defaults", "ops"), {})
    config["params"] |= {n: {"is_quantized": "False"} for n in ("C", "scale", "mean", "var", "prelu")}
    config["op_type"]["LayerNorm"] = {"per_channel_quantization": "False"}
    config["op_type"]["BatchNormalization"] = {"params": {"running_mean": {"is_quantized": "False"}}}
    config["op_type"]["BatchPermutation"] = {"is_output_quantized": "False"}
    target = load_target(config)
    assert target.config.defaults.ops.is_output_quantized is None
    assert target.param("BatchNormalization", ParamRole.GAMMA) == (False, True)
    assert target.param("PRelu", ParamRole.SLOPE) == (False, True)


def test_a_dump_loads_to_the_same():
    for name in target_names():
        target = load_target(name)
        assert load_target(json.loads(target.to_json())).config == target.config


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (("defaults", "ops", "is_output_quantized"), "False", ["defaults.ops.is_output_quantized", 'only "True"']),
        (
            ("defaults", "ops", "is_input_quantized"),
            "True",
            ["defaults.ops.is_input_quantized", "unknown key", "is_symmetric"],
        ),
        (("defaults", "ops", "is_symmetric"), "yes", ["defaults.ops.is_symmetric", "'yes'", '"True" or "False"']),
        (("defaults", "params", "is_quantised"), "True", ["is_quantised", "did you mean 'is_quantized'"]),
        (("defaults", "params"), ..., ["defaults.params", "missing"]),
        (("defaults", "hw_version"), "73", ["defaults.hw_version", '"V66"']),
        (("defaults", "strict_symmetric"), 1, ["defaults.strict_symmetric", "1"]),
        (("defaults", "supported_kernels"), [], ["defaults.supported_kernels"]),
        (
            ("defaults", "supported_kernels", 0, "activation", "bitwidth"),
            7,
            ["supported_kernels[0].activation.bitwidth", "4, 8, 16 or 32"],
        ),
        (
            ("defaults", "supported_kernels", 1, "param", "dtype"),
            "int8",
            ["supported_kernels[1].param.dtype", "'int' or 'float'"],
        ),
        (("defaults", "supported_kernels", 0, "param"), ..., ["defaults.supported_kernels", "`param`"]),
        (
            ("defaults", "supported_kernels", 0, "weight"),
            {},
            ["supported_kernels[0].weight", "unknown key", "activation, param"],
        ),
        (("op_type", "Add", "is_input_quantized"), "False", ["op_type.Add.is_input_quantized", 'only "True"']),
        (
            ("op_type", "Add", "is_output_quantised"),
            "False",
            ["op_type.Add.is_output_quantised", "is_output_quantized"],
        ),
        (("op_type", "Foo2d"), {}, ["op_type", "unknown op type 'Foo2d'", "extra_op_types"]),
        (("op_type", "Convv"), {}, ["did you mean 'Conv'"]),
        (("op_type", "Relu", "encoding_constraints"), {"max": 1.0}, ["encoding_constraints.min", "missing"]),
        (
            ("op_type", "Relu", "encoding_constraints"),
            {"min": 1, "max": 0},
            ["encoding_constraints", "`max` must exceed"],
        ),
        (("op_type", "Relu", "encoding_constraints", "min"), "0", ["encoding_constraints.min", "'0'"]),
        (("op_type", "Relu", "encoding_constraints", "mx"), 2, ["encoding_constraints.mx", "min, max"]),
        (("op_type", "Gemm", "params", "weigth"), {}, ["op_type.Gemm.params", "'weigth'", "weight"]),
        (("params", "foo"), {}, ["params", "unknown parameter 'foo'"]),
        (
            ("params", "bias", "is_output_quantized"),
            "True",
            ["params.bias.is_output_quantized", "is_quantized, is_symmetric"],
        ),
        (("supergroups", 0, "op_list"), ["Conv"], ["supergroups[0].op_list"]),
        (("supergroups", 0, "op_list"), ["Conv", "Rellu"], ["supergroups[0].op_list[1]", "'Rellu'", "'Relu'"]),
        (("supergroups", 0, "ops"), [], ["supergroups[0].ops", "allowed here: op_list"]),
        (("supergroup_pass_list",), ["LayerNorm"], ["supergroup_pass_list", "'LayerNorm'", "LayerNormalization"]),
        (("model_input", "is_output_quantized"), "True", ["model_input.is_output_quantized", "is_input_quantized"]),
        (("model_output", "is_output_quantized"), "maybe", ["model_output.is_output_quantized", "'maybe'"]),
        (("model_output",), ..., ["model_output", "missing"]),
        (("supergroup",), [], ["supergroup: unknown key", "did you mean 'supergroups'"]),
        (("bitwright",), {"weights": "int1"}, ["bitwright.weights", "2 to 16 bits"]),
        (("bitwright",), {"activations": "int4:block32"}, ["bitwright.activations", "blocks are for weights"]),
        (("bitwright",), {"accumulator_bits": 24}, ["bitwright.accumulator_bits", "32"]),
        (("bitwright",), {"pair_sum_bits": 8}, ["bitwright.pair_sum_bits", "16"]),
        (("bitwright",), {"ties": ["Konkat"]}, ["bitwright.ties", "'Konkat'"]),
        (("bitwright",), {"extends": "htp_v99"}, ["bitwright.extends", "'htp_v99'", "htp_v"]),
    ],
)
def test_faults_are_named(tmp_path, path, value, parts):
    file = write(tmp_path, changed(path, value))
    with pytest.raises(TargetError) as error:
        load_target(file)
    message = str(error.value)
    assert message.startswith(str(file)) and "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("section", ["defaults", "params", "op_type", "supergroups", "model_input", "model_output"])
def test_six_sections_are_mandatory(section):
    with pytest.raises(TargetError, match=f"{section}: this key is mandatory"):
        load_target(changed((section,), ...))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON.*line 1"),
        ("[]", "is a JSON object, not list"),
        ('{"defaults": {}, "defaults": {}}', "'defaults' stands twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, reason):
    with pytest.raises(TargetError, match=reason):
        load_target(write(tmp_path, text))


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(TargetError, match=r"htp_v37.*did you mean 'htp_v7.*onnxruntime-cpu"):
        load_target("htp_v37")
    with pytest.raises(TargetError, match="doesn't exist"):
        load_target(tmp_path / "none.json")
    with pytest.raises(TargetError, match=r"can't be read"):
        path = tmp_path / "binary.json"
        path.write_bytes(b"\xff\xfe\x00")
        load_target(path)


def test_custom_op_types_must_be_declared():
    config = changed(("op_type", "MyOp"), {"is_output_quantized": "False"})
    with pytest.raises(TargetError, match="MyOp"):
        load_target(config)
    assert load_target(config | {"bitwright": {"extra_op_types": ["MyOp"]}}).op("MyOp").is_output_quantized is False


def test_extends_merges(tmp_path):
    write(
        tmp_path,
        {"bitwright": {"extends": "htp_v73"}, "op_type": {"Softmax": None, "Add": {"is_input_quantized": "True"}}},
        "base.json",
    )
    target = load_target(write(tmp_path, {"bitwright": {"extends": "base.json", "weights": "int4"}, "supergroups": []}))
    assert target.weights == "int4" and target.hw_version == 73
    assert target.op("Softmax").encoding_constraints is None
    assert target.op("Sigmoid").encoding_constraints.max == 1.0
    assert target.op("Add").is_input_quantized and target.config.supergroups == ()


def test_extending_in_a_circle(tmp_path):
    write(tmp_path, {"bitwright": {"extends": "b.json"}}, "a.json")
    write(tmp_path, {"bitwright": {"extends": "a.json"}}, "b.json")
    with pytest.raises(TargetError, match="circle"):
        load_target(tmp_path / "a.json")


@pytest.mark.parametrize("name", target_names())
def test_presets_load_and_summarize(name):
    target = load_target(name)
    assert isinstance(target, Target) and load_target(target) is target
    summary = target_summary(name)
    assert summary.name == name == target.name and summary.description
    quantized, _ = target.param("Conv", ParamRole.BIAS)
    assert not quantized
    if target.config.bitwright.activations == "float":  # weights alone, those of linear ops
        assert target.param("MatMul", ParamRole.WEIGHT)[0] and not target.param("Conv", ParamRole.WEIGHT)[0]
        assert not target.config.model_input.is_input_quantized
    else:
        assert target.param("Conv", ParamRole.WEIGHT) == (True, True)
        assert target.config.model_input.is_input_quantized


def test_preset_names():
    assert {"default", "default_per_channel", "per_tensor", "onnxruntime-cpu", "generic-int8"} <= set(target_names())
    assert {f"htp_v{v}" for v in (66, 68, 69, 73, 75, 79, 81, 85)} <= set(target_names())
    assert load_target("htp-V73").config == load_target("htp_v73").config
    assert load_target("onnxruntime_cpu").name == "onnxruntime-cpu"
    assert load_target("default").config == load_target("default_per_channel").config


def test_preset_facts():
    per_channel = {
        n: {t for t in ("Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu") if load_target(n).per_channel(t)}
        for n in target_names()
    }
    assert per_channel["per_tensor"] == per_channel["htp_v66"] == set()
    assert per_channel["htp_v68"] == {"Conv", "ConvTranspose", "PRelu"}
    assert per_channel["htp_v69"] == per_channel["default"] == {"Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"}
    v73 = load_target("htp_v73").config
    for version in (75, 79, 81, 85):
        other = load_target(f"htp_v{version}").config
        assert other.defaults.hw_version == f"V{version}"
        same = {"defaults": v73.defaults, "bitwright": v73.bitwright}
        assert other.model_copy(update=same) == v73
        assert other.defaults.model_copy(update={"hw_version": "V73"}) == v73.defaults
    assert load_target("onnxruntime-cpu").config.bitwright.runtime == "onnxruntime"
    assert not load_target("onnxruntime-cpu").runs("HardSwish")


def test_targets_are_frozen():
    target = load_target("default")
    with pytest.raises(AttributeError):
        target.name = "x"
    with pytest.raises(ValueError, match="frozen"):
        target.config.defaults.per_channel_quantization = True
    assert len({target, load_target("default")}) == 1


NAMES = [("GELU", "Gelu"), ("GroupNorm", "GroupNormalization"), ("MaxPooling2D", "MaxPool"), ("Conv2d", "Conv"),
         ("LayerNorm", "LayerNormalization"), ("SiLU", "Swish"), ("AddV2", "Add"), ("MaxPool2D", "MaxPool"),
         ("ReflectionPad2d", "Pad"), ("GLU", "Glu"), ("LogSigmoid", "LogSigmoid"), ("Softmin", "Softmax")]  # fmt: skip


@pytest.mark.parametrize(("name", "type"), NAMES)
def test_names_that_other_tools_give_op_types(tmp_path, name, type):
    """The rule takes effect under the ONNX name, in every place that names types."""
    config = changed(("op_type",), {name: {"is_output_quantized": "False"}})
    config["supergroups"] = [{"op_list": [name, "ReLU"]}]
    config["bitwright"] = {"ties": [name], "quantized_ops": [name, "Conv"]}
    target = load_target(write(tmp_path, config))
    assert target.op(type).is_output_quantized is False
    assert target.config.supergroups[0].op_list == (type, "Relu")
    assert target.config.bitwright.ties == (type,) and target.runs(type)
    assert load_target(json.loads(target.to_json())).config == target.config


@pytest.mark.parametrize("name", ["Linear", "Dense"])
def test_a_linear_layer_is_one_whatever_the_rank_of_its_input(tmp_path, name):
    """Gemm, and MatMul with a weight, but no product of activations."""
    flat, deep, product = (
        Op("a", kind, type, ("x",), ("y",))
        for kind, type in ((OpKind.LINEAR, "Gemm"), (OpKind.LINEAR, "MatMul"), (OpKind.MATMUL, "MatMul"))
    )
    config = changed(("op_type",), {name: {"is_output_quantized": "False", "per_channel_quantization": "True"}})
    config["supergroups"] = [{"op_list": [name, "ReLU"]}]
    config["bitwright"] = {"quantized_ops": [name, "Conv"]}
    target = load_target(write(tmp_path, config))
    for op, said in ((flat, True), (deep, True), (product, False)):
        type = target.type_of(op)
        assert (target.op(type).is_output_quantized is False) == said, op.type
        assert target.per_channel(type) == said or target.config.defaults.per_channel_quantization
        assert target.runs(type) == said
    assert load_target(json.loads(target.to_json())).config == target.config
    # Where the file doesn't name the layer, it is what ONNX calls it.
    onnx = load_target(write(tmp_path, changed(("op_type",), {"MatMul": {"is_output_quantized": "False"}})))
    assert [onnx.op(onnx.type_of(op)).is_output_quantized for op in (flat, deep, product)] == [None, False, False]
    only = {"bitwright": {"quantized_ops": ["MatMul"]}}
    assert [load_target({**changed(("op_type",), {}), **only}).runs(t) for t in ("Gemm", "Linear", "MatMul")] == [
        False, True, True]  # fmt: skip


def test_what_is_said_of_linear_layers_stands_over_matmul_and_beside_gemm(tmp_path):
    """A rule for outputs leaves the weights' scales, which a preset says of MatMul and Gemm, as they are."""
    flat, deep = (Op("a", OpKind.LINEAR, type, ("x",), ("y",)) for type in ("Gemm", "MatMul"))
    outputs = {"is_output_quantized": "False"}

    def of(op_type, base="default"):
        target = load_target(write(tmp_path, {"bitwright": {"extends": base}, "op_type": op_type}))
        again = load_target(json.loads(target.to_json()))
        assert again.config == target.config
        return [(again.op(again.type_of(op)).is_output_quantized, again.per_channel(again.type_of(op)))
                for op in (flat, deep)]  # fmt: skip

    assert of({"Linear": outputs}) == of({"Dense": outputs}) == [(False, True), (False, True)]
    assert of({"Linear": {"per_channel_quantization": "False"}}) == [(None, False), (None, False)]
    layers = write(tmp_path, {"bitwright": {"extends": "default"}, "op_type": {"Linear": outputs}}, "layers.json").name
    assert of({"Gemm": {"is_output_quantized": "True"}}, layers) == [(True, True), (False, True)]
    assert of({"Gemm": None}, layers) == [(None, False), (False, True)]
    both = {"Linear": outputs, "Gemm": {"per_channel_quantization": "False"}}
    assert of(both) == of(dict(reversed(both.items()))) == [(None, False), (False, True)]
    with pytest.raises(TargetError, match="'Linear' and 'Dense' are both"):
        of({"Linear": outputs, "Dense": {}})


@pytest.mark.parametrize(
    "place",
    [("supergroups", 0, "op_list"), ("bitwright", "ties"), ("bitwright", "quantized_ops"),
     ("bitwright", "extra_op_types")],
)  # fmt: skip
@pytest.mark.parametrize("name", [["Conv"], {"Conv": 1}, 1, None])
def test_names_that_are_none(tmp_path, place, name):
    with pytest.raises(TargetError, match=f"{place[0]}.*{place[-1]}.*string"):
        load_target(write(tmp_path, changed(place, [name, "Relu"])))


def test_two_names_of_one_type(tmp_path):
    same = {"is_symmetric": "True"}
    target = load_target(write(tmp_path, changed(("op_type",), {"Conv2D": same, "DepthwiseConv2D": same})))
    assert target.op("Conv").is_symmetric is True
    with pytest.raises(TargetError, match="'Conv2D' and 'DepthwiseConv2D' are both Conv"):
        load_target(write(tmp_path, changed(("op_type",), {"Conv2D": same, "DepthwiseConv2D": {}})))


def test_another_name_changes_what_the_extended_file_says(tmp_path):
    base = write(tmp_path, changed(("op_type",), {"Gelu": {"is_output_quantized": "True"}}), "base.json")
    own = {"bitwright": {"extends": base.name}, "op_type": {"GELU": {"is_output_quantized": "False"}}}
    assert load_target(write(tmp_path, own, "own.json")).op("Gelu").is_output_quantized is False


def test_a_custom_op_keeps_its_name(tmp_path):
    config = changed(("op_type",), {"GELU": {"is_output_quantized": "False"}})
    config["bitwright"] = {"extra_op_types": ["GELU"]}
    target = load_target(write(tmp_path, config))
    assert target.op("GELU").is_output_quantized is False and target.op("Gelu").is_output_quantized is None
