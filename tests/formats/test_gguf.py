"""GGUF: the package `gguf`, and its formulas, give back the simulation's weights, bit for bit."""

import json

import numpy as np
import pytest
from networks import expected, simulated

from bitwright.errors import EncodingError, ModelError
from bitwright_formats.checkpoint import Checkpoint
from bitwright_formats.gguf_file import GgufFile
from bitwright_formats.gguf_models import Family, model_keys

KINDS = {"gguf_q4_0": "Q4_0", "gguf_q4_1": "Q4_1", "gguf_q8_0": "Q8_0"}


def dequantized(kind, data, columns):
    """ggml-quants.c, dequantize_row_q4_0, _q4_1, _q8_0, on the bytes of rows."""
    rows = []
    for row in data:
        values = []
        size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
        for block in row.reshape(-1, size):
            d = np.float32(block[:2].view("<f2")[0])
            if kind == "Q8_0":
                values += [np.float32(q) * d for q in block[2:].view(np.int8)]
                continue
            m = np.float32(block[2:4].view("<f2")[0]) if kind == "Q4_1" else None
            nibbles = block[2 if m is None else 4 :]
            codes = [int(q) & 15 for q in nibbles] + [int(q) >> 4 for q in nibbles]
            values += [np.float32(q - 8) * d if m is None else np.float32(q) * d + m for q in codes]
        rows.append(values[:columns])
    return np.array(rows, np.float32)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back(tmp_path, target, tied):
    sim = simulated(target, tied=tied)
    path = sim.export(tmp_path, formats=["gguf"]).files["gguf"]
    file = GgufFile.open(path)
    assert ("head.weight" in file.tensors) is not tied  # one matrix, stored once
    wanted = expected(sim)
    for name, (kind, shape, _) in file.tensors.items():
        if name == "up.bias":
            assert kind == "F32" and np.array_equal(file.rows(name).view("<f4").reshape(-1), wanted[name])
            continue
        assert kind == ("Q8_0" if name == "embed.weight" else KINDS[target])
        assert np.array_equal(dequantized(kind, file.rows(name), shape[-1]), wanted[name])
    assert set(file.tensors) == set(wanted)


@pytest.mark.parametrize("target", KINDS)
def test_by_the_package(tmp_path, target):
    gguf = pytest.importorskip("gguf")
    sim = simulated(target)
    wanted = expected(sim)
    reader = gguf.GGUFReader(sim.export(tmp_path, formats=["gguf"]).files["gguf"])
    assert reader.get_field("general.architecture").contents() == "plain"
    for tensor in reader.tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found, wanted[tensor.name])
    assert {t.name for t in reader.tensors} == set(wanted)


def test_mxfp4(tmp_path):
    """ggml-common.h's block_mxfp4, ggml-quants.c's dequantize_row_mxfp4; the other block floats are written as F32."""
    sim = simulated("w4a16", "mxfp4", overrides={"up": {"weights": "nvfp4"}, "head": {"weights": "nf4"}})
    path = sim.export(tmp_path, formats=["gguf"], encodings_version="2.1.0").files["gguf"]
    file, wanted = GgufFile.open(path), expected(sim)
    kinds = {name: kind for name, (kind, _, _) in file.tensors.items()}
    assert kinds == {**dict.fromkeys(wanted, "F32"), "down.weight": "MXFP4"}
    blocks = file.rows("down.weight").reshape(64, 4, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=2)
    doubled = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])[codes]
    halves = 2.0 ** (blocks[..., :1].astype(int) - 128)
    assert np.array_equal((doubled * halves).reshape(64, 128), wanted["down.weight"])
    for name in ("up.weight", "head.weight"):
        assert np.array_equal(file.rows(name).view("<f4"), wanted[name])
    gguf = pytest.importorskip("gguf")
    for tensor in gguf.GGUFReader(path).tensors:
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), wanted[tensor.name])


def test_grids_that_blocks_cant_hold(tmp_path):
    for options, message in (
        ({"target": "w4a16", "weights": "int4:block16"}, "gguf has blocks of 32 columns, and 16 share a scale"),
        ({"target": "w4a16", "weights": "int6"}, "has codes of 6 bits, the format 4 or 8"),
        ({"target": "w4a16_asymmetric", "weights": "uint8:block32"}, "has zero points, and blocks of 8 bits"),
        ({"target": "w4a16_asymmetric", "weights": "uint4:block32"}, r"minima .* target='gguf_q4_1'"),
        (
            {"target": "generic-int8", "weights": "int4:block32", "activations": "float"},
            r"scales of .* Simulate what the file holds: target='gguf_q",
        ),
    ):
        with pytest.raises(EncodingError, match=message):
            simulated(**options).export(tmp_path, formats=["gguf"])


def test_longer_runs_are_repeated(tmp_path):
    sim = simulated("w4a16", "int4:block64")
    file = GgufFile.open(sim.export(tmp_path, formats=["gguf"]).files["gguf"])
    assert np.array_equal(dequantized("Q4_0", file.rows("up.weight"), 64), expected(sim)["up.weight"])


def test_rows_of_queries_and_keys():
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py has them."""
    family = Family("llama", 4, 2)
    weight = np.arange(32 * 3).reshape(32, 3)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        order = family.rows(f"model.layers.0.self_attn.{name}.weight", 32)
        permuted = weight.reshape(heads, 2, 32 // heads // 2, 3).swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(weight[order], permuted)
    assert family.rows("model.layers.0.self_attn.v_proj.weight", 32) is None
    assert Family("qwen2", 4, 2).rows("model.layers.0.self_attn.q_proj.weight", 32) is None
    assert family.name("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert family.name("lm_head.weight") == "output.weight"


CONFIG = {
    "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 4,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "intermediate_size": 96, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "eos_token_id": 2,
}  # fmt: skip


def test_keys_of_a_language_model(tmp_path):
    family = Family("qwen2", 4, 2)
    keys, remark = model_keys(Checkpoint(tmp_path, CONFIG, {}), family)
    assert keys["qwen2.attention.head_count_kv"] == 2 and keys["qwen2.rope.freq_base"] == 1e6
    assert keys["qwen2.rope.dimension_count"] == 16 and "no tokenizer" in remark
    tokenizer = {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]},
        "model": {"type": "BPE", "vocab": {"a": 1, "b": 0}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 2, "content": "<end>", "special": True}],
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    keys, remark = model_keys(Checkpoint(tmp_path, CONFIG, {}), family)
    assert not remark and keys["tokenizer.ggml.pre"] == "smollm"
    assert keys["tokenizer.ggml.tokens"] == ["b", "a", "<end>", "[PAD3]"]
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 3, 5] and keys["tokenizer.ggml.merges"] == ["a b"]
    scaled = {**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ModelError, match="positions that are scaled"):
        model_keys(Checkpoint(tmp_path, scaled, {}), family)
