"""Folders for vLLM, SGLang, transformers: their readers' formulas give back the simulation's weights, bit for bit."""

import json

import numpy as np
import pytest
from networks import expected, simulated
from safetensors.numpy import load_file

from bitwright.errors import EncodingError, InputError, ModelError

SYMMETRIC, ZEROS = "w4a16", "w4a16_asymmetric"
LINEAR = ("up", "down", "head")


def exported(sim, folder, format, **options):
    path = sim.export(folder, formats=[format], **options).files[format]
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())["quantization_config"]


def unpack(words, bits):
    """(…, n) int32 → (…, n·32/bits): the formula of AutoGPTQ's and AutoAWQ's readers."""
    shifts = np.arange(0, 32, bits)
    codes = (words[..., None].astype(np.int64) >> shifts) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)


def equal_plain_parameters(tensors, wanted):
    for name in ("embed.weight", "up.bias"):
        assert np.array_equal(tensors[name], wanted[name])


@pytest.mark.parametrize(
    ("target", "weights", "size"),
    [(SYMMETRIC, "int4:block32", 32), (SYMMETRIC, "int8", -1), (ZEROS, "uint4:block64", 64), (SYMMETRIC, None, -1)],
)
def test_gptq(tmp_path, target, weights, size):
    sim = simulated(target, weights)
    tensors, config = exported(sim, tmp_path, "gptq")
    bits = config["bits"]
    assert (config["group_size"], config["sym"], config["lm_head"]) == (size, target == SYMMETRIC, True)
    assert config["quant_method"] == "gptq" and not config["desc_act"]
    wanted = expected(sim)
    for layer in LINEAR:
        codes = unpack(tensors[f"{layer}.qweight"].T, bits).T  # (K, N)
        zeros = unpack(tensors[f"{layer}.qzeros"], bits) + 1
        groups = tensors[f"{layer}.g_idx"]
        scales = tensors[f"{layer}.scales"]
        assert scales.dtype == np.float16
        weight = scales.astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)
        assert np.array_equal(weight.T, wanted[f"{layer}.weight"])
    equal_plain_parameters(tensors, wanted)


@pytest.mark.parametrize(("target", "weights"), [(ZEROS, "uint4:block32"), (SYMMETRIC, "int4:block32"), (ZEROS, None)])
def test_awq(tmp_path, target, weights):
    sim = simulated(target, weights)
    tensors, config = exported(sim, tmp_path, "awq")
    size = config["group_size"]
    assert size == (32 if weights else 64)  # None: blocks of 128, which fit one layer; rows of 64 have a scale each
    assert config["quant_method"] == "awq" and config["version"] == "gemm"
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # AWQ_REVERSE_ORDER of AutoAWQ's reader
    wanted = expected(sim)
    for layer in LINEAR:
        codes, zeros = (unpack(tensors[f"{layer}.{n}"], 4) for n in ("qweight", "qzeros"))
        codes, zeros = (a.reshape(len(a), -1, 8)[..., place].reshape(a.shape) for a in (codes, zeros))
        scales = np.repeat(tensors[f"{layer}.scales"].astype(np.float32), size, axis=0)
        weight = (codes - np.repeat(zeros, size, axis=0)).astype(np.float32) * scales
        assert np.array_equal(weight.T, wanted[f"{layer}.weight"])
    equal_plain_parameters(tensors, wanted)


@pytest.mark.parametrize(
    ("target", "weights"),
    [(SYMMETRIC, "int4:block32"), (SYMMETRIC, "int8"), (SYMMETRIC, None), (ZEROS, "uint4:block32"), (ZEROS, "uint8")],
)
def test_compressed_tensors_by_its_own_package(tmp_path, target, weights):
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    sim = simulated(target, weights, overrides={"down": {"weights": "float"}})
    tensors, config = exported(sim, tmp_path, "compressed_tensors")
    assert config["ignore"] == ["down"]
    read = QuantizationConfig.model_validate(config)
    wanted = expected(sim)
    for layer in ("up", "head"):
        own = [g for g in read.config_groups.values() if layer in g.targets or g.targets == ["Linear"]]
        state = {
            n.removeprefix(f"{layer}."): torch.from_numpy(v)
            for n, v in tensors.items()
            if n.startswith(f"{layer}.weight_")
        }
        made = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, own[0])
        assert np.array_equal(made["weight"].numpy(), wanted[f"{layer}.weight"])
    equal_plain_parameters(tensors, wanted)
    assert np.array_equal(tensors["down.weight"], wanted["down.weight"])


def test_mxfp4_by_the_package_of_compressed_tensors(tmp_path):
    """One layer in MXFP4 beside integers: a format of its own, whose readers compute in bfloat16, exactly."""
    sim = simulated(SYMMETRIC, "mxfp4", overrides={"up": {"weights": "int4:block32"}, "head": {"weights": "nvfp4"}})
    tensors, config = exported(sim, tmp_path, "compressed_tensors", encodings_version="2.1.0")
    assert (config["format"], config["ignore"]) == ("mixed-precision", ["head"])
    wanted = expected(sim)
    assert np.array_equal(tensors["head.weight"], wanted["head.weight"])  # no reader gives NVFP4 back to the bit
    assert tensors["down.weight_packed"].dtype == tensors["down.weight_scale"].dtype == np.uint8
    codes = np.stack([tensors["down.weight_packed"] & 15, tensors["down.weight_packed"] >> 4], axis=-1).reshape(64, 128)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    scales = 2.0 ** (tensors["down.weight_scale"].astype(int) - 127)
    assert np.array_equal(values * np.repeat(scales, 32, axis=1), wanted["down.weight"])
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    (own,) = [g for g in QuantizationConfig.model_validate(config).config_groups.values() if "down" in g.targets]
    state = {n.removeprefix("down."): torch.from_numpy(v) for n, v in tensors.items() if n.startswith("down.weight_")}
    made = BaseCompressor.get_value_from_registry(own.format).decompress(state, own)
    assert np.array_equal(made["weight"].float().numpy(), wanted["down.weight"])


def test_layers_of_several_widths(tmp_path):
    sim = simulated(SYMMETRIC, "int4:block32", overrides={"up": {"weights": "int8"}})
    _, config = exported(sim, tmp_path, "compressed_tensors")
    found = {tuple(g["targets"]): g["weights"] for g in config["config_groups"].values()}
    assert found[("up",)]["num_bits"] == 8 and found[("up",)]["strategy"] == "channel"
    assert found["down", "head"]["num_bits"] == 4 and found["down", "head"]["group_size"] == 32
    with pytest.raises(EncodingError, match=r"gptq has one width for all layers, not \[4, 8\]"):
        sim.export(tmp_path, formats=["gptq"])
    with pytest.raises(EncodingError, match=r"'up.weight' has codes of 8 bits, the format 4"):
        sim.export(tmp_path, formats=["awq"])


def test_grids_that_a_layout_cant_hold(tmp_path):
    free = simulated("generic-int8", "int4:block32", activations="float", overrides={"embed": "float"})
    with pytest.raises(EncodingError, match=r"float16, and \d+ of .* Simulate what the file holds: target='w4a16'"):
        free.export(tmp_path, formats=["gptq"])
    exported(free, tmp_path, "compressed_tensors")  # which stores float32
    rounded = simulated("generic-int8", "int8")
    with pytest.raises(EncodingError, match=r"the simulation rounds .* Open the model with activations='float'"):
        rounded.export(tmp_path, formats=["compressed_tensors"])
    tables = simulated("generic-int8", "int8", activations="float")
    with pytest.raises(ModelError, match=r"'embed.weight' is read by 'embed' \(Gather\)"):
        tables.export(tmp_path, formats=["compressed_tensors"])
    with pytest.raises(ModelError, match="take every linear layer but the head for packed, and 'down' is in float"):
        simulated(SYMMETRIC, "int4:block32", overrides={"down": "float"}).export(tmp_path, formats=["gptq"])
    lowest = simulated(ZEROS, "uint4:block32")
    encoding = lowest.table["up.weight"]
    lowest.set({"up.weight": encoding.with_(zero_point=np.zeros_like(encoding.zero_point))})
    with pytest.raises(EncodingError, match="lowest code, which the layout can't store"):
        lowest.export(tmp_path, formats=["gptq"])
    exported(lowest, tmp_path, "awq")


def test_a_tied_matrix_is_stored_once_and_in_float(tmp_path):
    sim = simulated(SYMMETRIC, "int4:block32", tied=True)
    assert any("float for both" in note for note in sim.plan.notes)
    tensors, config = exported(sim, tmp_path, "gptq")
    assert "embed.weight" in tensors and not any(n.startswith("head") for n in tensors)
    assert config["lm_head"] is False


def test_nothing_is_handed_out_that_reads_back_otherwise(tmp_path, monkeypatch):
    import bitwright_formats.gptq

    right = bitwright_formats.gptq.packed
    monkeypatch.setattr(bitwright_formats.gptq, "packed", lambda codes, bits: right(codes ^ 1, bits))
    with pytest.raises(ModelError, match=r"model.gptq departs from the simulation in \d+ values of 'up.weight'"):
        simulated(SYMMETRIC, "int4:block32").export(tmp_path, formats=["gptq"])
    assert not list(tmp_path.iterdir())


def test_what_can_be_asked_for(tmp_path):
    sim = simulated(SYMMETRIC, "int4:block32")
    for formats, message in (
        (["gptk"], r"there is no export format 'gptk' \(did you mean 'gptq'\?\).* the torch backend has onnx, qdq"),
        ([], "names no format"),
        ("gptq", "give a list of names"),
        ({"gptq": {"level": 4}}, "format gptq: there is no setting 'level'; settings are none"),
        ({"qdq": {"level": 4}}, "'qdq' has no settings"),
    ):
        with pytest.raises(InputError, match=message):
            sim.export(tmp_path, formats=formats)


def test_formats_of_the_backend_by_name(tmp_path):
    sim = simulated(SYMMETRIC, "int4:block32")
    bundle = sim.export(tmp_path, formats=["safetensors", "autogptq"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.encodings", "model.gptq", "model.record.npz", "model.safetensors", "report.html",
        "report.json",
    ]  # fmt: skip
    assert set(bundle.files) == {"weights", "gptq", "encodings"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert "asked for" in report["record"]["missing"]["onnx"]
