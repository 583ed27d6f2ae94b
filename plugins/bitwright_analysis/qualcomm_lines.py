"""Command lines of Qualcomm's tools: QNN, SNPE and QAIRT.

Options are those of the vendor's documentation for releases 2.29 and 2.39; the tools need a licence, so that no test
here runs them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import InputError
from bitwright_analysis.target_job import Command, Job, shell_line

SCHEMAS = {"snpe": ("1.0.0", "0.6.1"), "qnn": ("1.0.0", "0.6.1"), "qairt": ("1.0.0", "0.6.1", "2.0.0")}
"""Schemas of encodings files that a tool's `--quantization_overrides` takes, the preferred one first."""
V2 = "2.0.0"
"""Needs QAIRT 2.37 and its second quantizer."""


def _overrides(job: Job, tool: str) -> tuple[list[Command], Path, str]:
    """The encodings file that the tool takes: the bundle's own, or one to be converted first."""
    known = SCHEMAS[tool]
    if job.file.version in known:
        return [], job.encodings, job.file.version
    # Not *.encodings: a bundle has one file of that kind.
    converted = job.beside(f".{known[0]}.json")
    job.warnings.append(
        f"{job.encodings.name} has schema {job.file.version}; {tool} takes {', '.join(sorted(known))}: convert it first"
    )
    line = shell_line(
        "bitwright", "encodings", "convert", job.encodings, converted, "--to", known[0], "--model", job.model
    )
    return [Command(f"encodings in schema {known[0]}", line)], converted, known[0]


def _dump(job: Job, layout: str) -> tuple[Command, Path]:
    dump = job.beside(".layer_outputs")
    words = [
        "bitwright",
        "layer-outputs",
        str(job.directory),
        "--data",
        job.data,
        "--out",
        str(dump),
        "--name",
        job.stem,
    ]
    if layout != "NHWC":
        words += ["--layout", layout]
    return Command("inputs for the target, and what each layer should give", shell_line(*words)), dump


def _compare(dump: Path, found: Path) -> Command:
    return Command("where the target departs from the simulation", shell_line("bitwright", "compare", dump, found))


def _converter(job: Job, tools: Mapping[str, str]) -> str:
    """The converter for the model's format.

    Raises:
        InputError: there is none.
    """
    suffix = job.model.suffix
    if suffix not in tools:
        raise InputError(
            f"{job.model.name}: the converters take {', '.join(tools)}; export the model to ONNX and quantize that"
        )
    return tools[suffix]


def _network(job: Job, flag: str) -> list[str]:
    words = []
    for name, shape in job.shapes.items():
        words += [flag, name, ",".join(map(str, shape))]
    return words


def _missing(job: Job) -> None:
    """Tensors without an entry are calibrated by the tools, unless they are told to leave them in float."""
    floats = [n for n, e in job.file.entries.items() if e.float_format is not None]
    if floats:
        job.warnings.append(
            f"{len(floats)} tensors stay in a float format ({floats[0]} first): the target must have it, and the "
            "quantizer needs --float_fallback for tensors without an entry"
        )


def qnn(job: Job) -> list[Command]:
    """From the bundle to a model library of QNN, and back to a comparison."""
    steps, overrides, _ = _overrides(job, "qnn")
    _missing(job)
    dump_step, dump = _dump(job, "NHWC")
    tool = _converter(
        job, {".onnx": "qnn-onnx-converter", ".pb": "qnn-tensorflow-converter", ".tflite": "qnn-tflite-converter"}
    )
    words = [
        tool,
        "--input_network",
        str(job.model),
        *_network(job, "-d"),
        "--quantization_overrides",
        str(overrides),
        "--input_list",
        "input_list.txt",
        "--bias_bw",
        "32",
        "--output_path",
        f"{job.stem}.cpp",
    ]
    if tool == "qnn-tensorflow-converter":
        words += [w for o in job.outputs for w in ("--out_node", o)]
    absolute = [str(Path(w).resolve()) if w in (str(job.model), str(overrides)) else w for w in words]
    inside = f"cd {shlex.quote(str(dump))} && "
    libraries = "$QNN_SDK_ROOT/lib/x86_64-linux-clang"
    return [
        *steps,
        dump_step,
        Command("convert; paths of input_list.txt are those of its folder", inside + shell_line(*absolute)),
        Command(
            "compile",
            inside
            + shell_line("qnn-model-lib-generator", "-c", f"{job.stem}.cpp", "-b", f"{job.stem}.bin", "-o", "libs"),
        ),
        Command(
            "run, and write every tensor",
            inside
            + shell_line(
                "qnn-net-run",
                "--model",
                f"libs/x86_64-linux-clang/lib{job.stem}.so",
                "--backend",
                f"{libraries}/libQnnHtp.so",
                "--input_list",
                "input_list.txt",
                "--debug",
                "--output_dir",
                "target",
            ),
        ),
        _compare(dump, dump / "target"),
    ]


def snpe(job: Job) -> list[Command]:
    """From the bundle to a DLC of SNPE, and back to a comparison."""
    steps, overrides, _ = _overrides(job, "snpe")
    _missing(job)
    dump_step, dump = _dump(job, "NHWC")
    tool = _converter(
        job, {".onnx": "snpe-onnx-to-dlc", ".pb": "snpe-tensorflow-to-dlc", ".tflite": "snpe-tflite-to-dlc"}
    )
    inside = f"cd {shlex.quote(str(dump))} && "
    convert = [
        tool,
        "--input_network",
        str(job.model.resolve()),
        *_network(job, "-d"),
        "--quantization_overrides",
        str(overrides.resolve()),
        "--output_path",
        f"{job.stem}.dlc",
    ]
    if tool == "snpe-tensorflow-to-dlc":
        convert += [w for o in job.outputs for w in ("--out_node", o)]
    quantize = [
        "snpe-dlc-quant",
        f"--input_dlc={job.stem}.dlc",
        "--input_list=input_list.txt",
        "--override_params",
        "--bias_bitwidth=32",
        f"--output_dlc={job.stem}_quantized.dlc",
    ]
    prepare = [
        "snpe-dlc-graph-prepare",
        f"--input_dlc={job.stem}_quantized.dlc",
        *([f"--htp_socs={job.soc}"] if job.soc else []),
        f"--output_dlc={job.stem}_cached.dlc",
    ]
    run = [
        "snpe-net-run",
        "--container",
        f"{job.stem}_cached.dlc",
        "--input_list",
        "input_list.txt",
        "--debug",
        "--use_dsp",
        "--output_dir",
        "target",
    ]
    return [
        *steps,
        dump_step,
        Command("convert", inside + shell_line(*convert)),
        Command("quantize by the encodings (snpe-dlc-quantize in releases before 2.x)", inside + shell_line(*quantize)),
        Command("prepare for the Hexagon processor", inside + shell_line(*prepare)),
        Command("run on the device, and write every tensor", inside + shell_line(*run)),
        _compare(dump, dump / "target"),
    ]


def qairt(job: Job) -> list[Command]:
    """From the bundle to a DLC of QAIRT, and back to a comparison."""
    steps, overrides, schema = _overrides(job, "qairt")
    _missing(job)
    # Unlike the older converters this one keeps the model's own layout.
    dump_step, dump = _dump(job, "native")
    _converter(job, {".onnx": "qairt-converter", ".pb": "qairt-converter", ".tflite": "qairt-converter"})
    inside = f"cd {shlex.quote(str(dump))} && "
    convert = [
        "qairt-converter",
        "--input_network",
        str(job.model.resolve()),
        *_network(job, "--source_model_input_shape"),
        "--quantization_overrides",
        str(overrides.resolve()),
        "--output_path",
        f"{job.stem}.dlc",
    ]
    if job.model.suffix == ".pb":
        convert += [w for o in job.outputs for w in ("--out_tensor_node", o)]
    quantize = [
        "qairt-quantizer",
        "--input_dlc",
        f"{job.stem}.dlc",
        "--input_list",
        "input_list.txt",
        "--bias_bitwidth",
        "32",
        "--output_dlc",
        f"{job.stem}_quantized.dlc",
    ]
    if schema == V2:
        quantize.append("--use_quantize_v2")
        job.warnings.append("schema 2.0.0 needs QAIRT 2.37 or newer")
    libraries = "$QAIRT_SDK_ROOT/lib/x86_64-linux-clang"
    binary = [
        "qnn-context-binary-generator",
        "--dlc_path",
        f"{job.stem}_quantized.dlc",
        "--backend",
        f"{libraries}/libQnnHtp.so",
        "--binary_file",
        job.stem,
    ]
    run = [
        "qnn-net-run",
        "--dlc_path",
        f"{job.stem}_quantized.dlc",
        "--backend",
        f"{libraries}/libQnnHtp.so",
        "--input_list",
        "input_list.txt",
        "--debug",
        "--output_dir",
        "target",
    ]
    return [
        *steps,
        dump_step,
        Command("convert (before 2.30 the option is --desired_input_shape)", inside + shell_line(*convert)),
        Command("quantize by the encodings", inside + shell_line(*quantize)),
        Command("run on the host, and write every tensor", inside + shell_line(*run)),
        _compare(dump, dump / "target"),
        Command("a context binary for the device", inside + shell_line(*binary)),
    ]
