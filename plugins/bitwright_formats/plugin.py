"""What bitwright's export formats register; their modules are imported on first use."""

from __future__ import annotations

from bitwright.hookspecs import FormatInfo, TargetInfo, hookimpl

_TARGETS = ("gguf_q4_0", "gguf_q4_1", "gguf_q8_0", "w4a16", "w4a16_asymmetric")


@hookimpl
def register_formats() -> list[FormatInfo]:
    """The formats that ship with bitwright, beside those of backends."""
    return [
        FormatInfo(
            "gguf",
            "GGUF with Q4_0, Q4_1 and Q8_0 blocks: llama.cpp and others on ggml.",
            factory="bitwright_formats.gguf:Gguf",
            suffix=".gguf",
        ),
        FormatInfo(
            "compressed_tensors",
            "A folder of safetensors, pack-quantized int4 or int8: vLLM, SGLang, transformers.",
            factory="bitwright_formats.compressed_tensors:CompressedTensors",
            suffix=".compressed-tensors",
        ),
        FormatInfo(
            "gptq",
            "A folder of safetensors in AutoGPTQ's layout: vLLM, SGLang, transformers, ExLlama.",
            factory="bitwright_formats.gptq:Gptq",
            suffix=".gptq",
            aliases=("autogptq",),
        ),
        FormatInfo(
            "awq",
            "A folder of safetensors in AutoAWQ's layout (gemm): vLLM, SGLang, transformers.",
            factory="bitwright_formats.awq:Awq",
            suffix=".awq",
            aliases=("autoawq",),
        ),
    ]


@hookimpl
def register_targets() -> list[TargetInfo]:
    """Weights alone, on grids that these formats can hold."""
    return [TargetInfo(name, "", f"bitwright_formats:targets/{name}.json") for name in _TARGETS]
