"""Command lines of runtimes that take an export as it is: ONNX Runtime, TensorFlow Lite and TensorRT."""

from __future__ import annotations

from bitwright_deploy.target_job import Command, Job, shell_line

_ONNXRUNTIME = (
    "import onnxruntime as ort; o = ort.SessionOptions(); "
    "o.add_session_config_entry('session.x64quantprecision', '1'); "
    "o.add_session_config_entry('session.qdq_matmulnbits_accuracy_level', '1'); "
    "s = ort.InferenceSession({path!r}, o); print([(i.name, i.shape, i.type) for i in s.get_inputs()])"
)


def onnxruntime(job: Job) -> list[Command]:
    """ONNX Runtime on the quantized model."""
    qdq = job.needed(".qdq.onnx", "this backend exports no QDQ model; export the model to ONNX and quantize that")
    return [
        Command(
            "run it once with random inputs", shell_line("python", "-m", "onnxruntime.tools.onnxruntime_test", qdq, "1")
        ),
        Command(
            "run it with the options that change its result: x64quantprecision keeps uint8 × int8 kernels from "
            "saturating on CPUs without VNNI (not needed for exports with --plain-session or for onnxruntime-cpu), "
            "accuracy level 1 keeps MatMulNBits from rounding inputs to 8 bits",
            shell_line("python", "-c", _ONNXRUNTIME.format(path=str(qdq))),
        ),
        Command(
            "compare float, simulation and integer runtime, tensor by tensor",
            shell_line("bitwright", "verify", job.directory, "--data", job.data, "--name", job.stem),
        ),
    ]


_TFLITE = (
    "import tensorflow as tf; i = tf.lite.Interpreter({path!r}); i.allocate_tensors(); i.invoke(); "
    "print([(d['name'], i.get_tensor(d['index']).shape) for d in i.get_output_details()])"
)


def tflite(job: Job) -> list[Command]:
    """TensorFlow Lite, on the host and on Android."""
    path = job.needed(".tflite", "it is written of Keras models alone, with --target tflite-int8; others have none")
    return [
        Command("run it once on zeros", shell_line("python", "-c", _TFLITE.format(path=str(path)))),
        Command(
            "compare float, simulation and interpreter, tensor by tensor",
            shell_line(
                "bitwright", "verify", job.directory, "--data", job.data, "--name", job.stem, "--runtime", "tflite"
            ),
        ),
        Command(
            "time it on an Android device (benchmark_model is TensorFlow's)",
            shell_line("adb", "push", path, "/data/local/tmp/")
            + " && "
            + shell_line(
                "adb",
                "shell",
                "/data/local/tmp/benchmark_model",
                f"--graph=/data/local/tmp/{path.name}",
                "--num_threads=4",
            ),
        ),
    ]


def tensorrt(job: Job) -> list[Command]:
    """NVIDIA's TensorRT on the quantized model."""
    qdq = job.needed(".qdq.onnx", "this backend exports no QDQ model; export the model to ONNX and quantize that")
    # Files of schema 2.x don't tell activations from weights, whose grids are symmetric on integer targets.
    off = [n for n, e in job.file.entries.items() if e.float_format is None and (e.zero_point != e.middle).any()]
    if off:
        job.warnings.append(
            f"TensorRT's grids are symmetric, and {len(off)} tensors here have a zero point of their own "
            f"({off[0]} first): it will refuse the model; quantize for a target with symmetric "
            "activations, and with --activations int8"
        )
    shapes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in job.shapes.items())
    return [
        Command(
            "build an engine in the precisions of the file (TensorRT 8 and 9: --int8, not --stronglyTyped)",
            shell_line(
                "trtexec",
                f"--onnx={qdq}",
                "--stronglyTyped",
                f"--optShapes={shapes}",
                f"--minShapes={shapes}",
                f"--maxShapes={shapes}",
                f"--saveEngine={job.stem}.engine",
            ),
        ),
        Command("time it", shell_line("trtexec", f"--loadEngine={job.stem}.engine", f"--shapes={shapes}")),
    ]
