"""What llama.cpp calls the parts of a language model, and what it has to be told of it (ggml's docs/gguf.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import ToCompile
from bitwright.errors import ModelError
from bitwright.graph import ParamId
from bitwright_formats.checkpoint import Checkpoint
from bitwright_formats.codes import float_params, quantized_params

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""`model_type` → what llama.cpp calls it."""
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


@dataclass(frozen=True)
class Family:
    """A kind of language model, and the numbers that the order of its rows depends on.

    Attributes:
        architecture: llama.cpp's name.
        heads, key_heads: of queries, and of keys and values.
    """

    architecture: str
    heads: int
    key_heads: int

    def name(self, param: ParamId) -> str:
        """What llama.cpp calls a parameter; itself where it has no name."""
        module, _, kind = param.rpartition(".")
        layer = _LAYER.fullmatch(module)
        known = _NAMES.get(layer[2] if layer else module)
        if known is None or kind not in ("weight", "bias"):
            return param
        return f"blk.{layer[1]}.{known}.{kind}" if layer else f"{known}.{kind}"

    def check(self, model: ToCompile) -> None:
        """Refuse parameters that llama.cpp doesn't know.

        Raises:
            ModelError: there is one.
        """
        for param in (*quantized_params(model), *float_params(model)):
            if param.startswith(("model.", "lm_head.")) and self.name(param) == param:
                raise ModelError(f"gguf: llama.cpp's {self.architecture} has no place for {param!r}")

    def rows(self, param: ParamId, count: int) -> NDArray[np.intp] | None:
        """The order in which llama.cpp has a parameter's rows; None for the model's own.

        Queries and keys of Llama's kind are rotated by halves in transformers, and by neighbours in ggml.
        """
        module = param.rpartition(".")[0]
        if self.architecture != "llama" or not module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            return None
        heads = self.heads if module.endswith("q_proj") else self.key_heads
        return np.arange(count).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def family_of(checkpoint: Checkpoint | None) -> Family | None:
    """The family of a checkpoint; None where there is none, or llama.cpp's names for it aren't known here."""
    if checkpoint is None:
        return None
    architecture = _ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
    if architecture is None:
        return None
    heads = int(checkpoint.config["num_attention_heads"])
    return Family(architecture, heads, int(checkpoint.config.get("num_key_value_heads") or heads))


def model_keys(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Any], str]:
    """The keys of a file, and a remark where it lacks some.

    Raises:
        ModelError: positions are scaled in a way that isn't written.
    """
    config, a = checkpoint.config, family.architecture
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope and str(rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ModelError(f"gguf: positions that are scaled ({rope}) aren't written; export another format")
    width = int(config.get("head_dim") or config["hidden_size"] // family.heads)
    keys: dict[str, Any] = {
        "general.architecture": a,
        "general.type": "model",
        "general.name": checkpoint.folder.resolve().name,
        f"{a}.block_count": int(config["num_hidden_layers"]),
        f"{a}.context_length": int(config["max_position_embeddings"]),
        f"{a}.embedding_length": int(config["hidden_size"]),
        f"{a}.feed_forward_length": int(config["intermediate_size"]),
        f"{a}.attention.head_count": family.heads,
        f"{a}.attention.head_count_kv": family.key_heads,
        f"{a}.attention.key_length": width,
        f"{a}.attention.value_length": width,
        f"{a}.rope.dimension_count": width,
        f"{a}.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        f"{a}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{a}.vocab_size": int(config["vocab_size"]),
    }
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        return keys, (
            "it holds no tokenizer (there is no tokenizer.json, or it isn't one of the byte-level kinds that are known "
            "here), which llama.cpp needs to read and write text; add it with llama.cpp's own scripts"
        )
    return {**keys, **tokenizer}, ""


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The keys of a byte-level tokenizer; None where it isn't one that is known."""
    file = checkpoint.folder / "tokenizer.json"
    try:
        found = json.loads(file.read_text("utf-8"))
        kind = _splitting(found["pre_tokenizer"])
        if kind is None or found["model"]["type"] != "BPE":
            return None
        size = int(checkpoint.config["vocab_size"])
        tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
        for token, index in found["model"]["vocab"].items():
            tokens[index], kinds[index] = token, NORMAL
        for added in found["added_tokens"]:
            tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER
        merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _adds_beginning(found),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = checkpoint.config.get(f"{name}_token_id")
        if isinstance(index, int):
            keys[f"tokenizer.ggml.{key}_token_id"] = index
    template = checkpoint.folder / "chat_template.jinja"
    if template.is_file():
        keys["tokenizer.chat_template"] = template.read_text("utf-8")
    return keys


def _splitting(given: Mapping[str, Any]) -> str | None:
    """What llama.cpp calls a way of splitting text before merges; None where it isn't known here."""
    parts = given.get("pretokenizers", [given])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(parts[0]["pattern"].get("Regex"))
        if r"\\p{N}{1,3}" in pattern or r"\p{N}{1,3}" in pattern:
            return "llama-bpe"
        if r"|\p{N}|" in pattern:
            return "qwen2"
    return None


def _adds_beginning(found: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a token before a text by itself."""
    after = found.get("post_processor") or {}
    parts = after.get("processors", [after])
    return any(
        part.get("type") == "TemplateProcessing" and part["single"] and "SpecialToken" in part["single"][0]
        for part in parts
    )
