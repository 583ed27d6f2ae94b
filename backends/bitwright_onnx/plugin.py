"""What the ONNX backend registers; imports neither onnx nor ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from bitwright.hookspecs import BackendInfo, FormatInfo, RuntimeInfo, hookimpl

# Field numbers of onnx.ModelProto (onnx.proto3): ir_version 1, producer_name 2, producer_version 3, domain 4,
# model_version 5, doc_string 6, graph 7, opset_import 8, metadata_props 14, training_info 20, functions 25.
_FIRST_TAG = 0x08
_LARGEST_IR_VERSION = 64
_NEXT_TAGS = frozenset({0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72})


def looks_like_onnx(path: Path) -> bool:
    """Whether a file starts as a serialized `ModelProto` does, whatever its suffix."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(3)
    return len(head) == 3 and head[0] == _FIRST_TAG and 0 < head[1] <= _LARGEST_IR_VERSION and head[2] in _NEXT_TAGS


@hookimpl
def register_backends() -> list[BackendInfo]:
    """The ONNX backend."""
    return [
        BackendInfo(
            name="onnx",
            summary="ONNX models: onnx-ir rewrites them, ONNX Runtime runs them.",
            factory="bitwright_onnx.backend:OnnxBackend",
            modules=("onnx", "onnx_ir", "onnxruntime"),
            suffixes=(".onnx",),
            extra="onnx",
            port="bitwright_onnx.testing:model_port",
            sniff=looks_like_onnx,
        )
    ]


@hookimpl
def register_formats() -> list[FormatInfo]:
    """Matrices of 4 or 8 bits as ONNX Runtime's own operator has them."""
    return [
        FormatInfo(
            "matmul_nbits",
            "ONNX with MatMulNBits, at the accuracy level that you choose: ONNX Runtime.",
            factory="bitwright_onnx.export.matmul_nbits:MatMulNBits",
            suffix=".nbits.onnx",
            needs=("qdq",),
            modules=("onnx", "onnx_ir"),
            extra="onnx",
        )
    ]


@hookimpl
def register_runtimes() -> list[RuntimeInfo]:
    """ONNX Runtime."""
    return [
        RuntimeInfo(
            name="onnxruntime",
            summary="ONNX Runtime's integer kernels, on the quantized ONNX model.",
            factory="bitwright_onnx.onnx_runtime:OnnxRuntime",
            modules=("onnx", "onnx_ir", "onnxruntime"),
            extra="onnx",
        )
    ]
