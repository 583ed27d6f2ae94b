"""Command lines of Qualcomm's tools: QNN, SNPE and QAIRT.

Options are those of the vendor's documentation for releases 2.29 and 2.39; the tools need a licence, so that no test
here runs them. All work in the folder ``NAME.TOOL`` of the export: ``expected`` holds the dump of the simulation, from
whose folder the tools are started, because paths in its ``input_list.txt`` are relative to it; ``target`` is what they
compute.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import InputError
from bitwright_deploy.layer_outputs import INPUT_LIST
from bitwright_deploy.target_job import Command, Job, shell_line

V2 = "2.0.0"
"""Needs QAIRT 2.37 and its second quantizer."""
BIAS_BITS = "32"
"""Files leave biases out; integer targets hold them in 32 bits."""


class _Workplace:
    """Where one tool's files go, and its lines."""

    def __init__(self, job: Job, tool: str, layout: str) -> None:
        self.job, self.tool, self.layout = job, tool, layout
        folder = job.beside(f".{tool}")
        self.expected, self.target = folder / "expected", folder / "target"
        self.overrides, self.schema, self.before = _overrides(job, tool)
        floats = [n for n, e in job.file.entries.items() if e.float_format is not None]
        if floats:
            job.warnings.append(
                f"{len(floats)} tensors stay in a float format ({floats[0]} first): the target must have it, and the "
                "quantizer needs --float_fallback for tensors without an entry"
            )

    def line(self, purpose: str, tool: str, *options: str | Path, shapes: str = "", outputs: str = "") -> Command:
        """A tool, started in the folder of the dump.

        Args:
            shapes, outputs: option that takes a name and shape of an input, or the name of an output; once for each.
        """
        more: list[str] = []
        if shapes:
            for name, shape in self.job.shapes.items():
                more += [shapes, name, ",".join(map(str, shape))]
        if outputs:
            for name in self.job.outputs:
                more += [outputs, name]
        # In a shell of its own: the next line begins where this one did, and the folder may be a relative path.
        return Command(purpose, f"(cd {shlex.quote(str(self.expected))} && {shell_line(tool, *options, *more)})")

    def around(self, *lines: Command) -> list[Command]:
        """The lines between the dump that they start from and the comparison at the end."""
        job = self.job
        words: list[str | Path] = [
            "bitwright",
            "layer-outputs",
            job.directory,
            "--data",
            job.data,
            "--out",
            self.expected,
        ]
        words += ["--name", job.stem, *(["--layout", self.layout] if self.layout != "NHWC" else [])]
        compare = shell_line("bitwright", "compare", self.expected, self.target)
        return [
            *self.before,
            Command("inputs for the target, and what each layer should give", shell_line(*words)),
            *lines,
            Command("where the target departs from the simulation", compare),
        ]


def _overrides(job: Job, tool: str) -> tuple[Path, str, list[Command]]:
    """The encodings file that the tool takes, its schema, and the conversion that it needs first."""
    known = job.schemas
    if job.file.version in known:
        return job.encodings.resolve(), job.file.version, []
    # Not *.encodings: a bundle has one file of that kind.
    converted = job.beside(f".{known[0]}.json")
    job.warnings.append(
        f"{job.encodings.name} has schema {job.file.version}; {tool} takes {', '.join(sorted(known))}: convert it first"
    )
    line = shell_line(
        "bitwright", "encodings", "convert", job.encodings, converted, "--to", known[0], "--model", job.model
    )
    return converted.resolve(), known[0], [Command(f"encodings in schema {known[0]}", line)]


def _converter(job: Job, tools: Mapping[str, str]) -> str:
    """The converter for the model's format.

    Raises:
        InputError: there is none.
    """
    if job.model.suffix not in tools:
        raise InputError(
            f"{job.model.name}: the converters take {', '.join(tools)}; export the model to ONNX and quantize that"
        )
    return tools[job.model.suffix]


def qnn(job: Job) -> list[Command]:
    """From the bundle to a model library of QNN, and back to a comparison."""
    # The older converters put channels last, so that inputs and dumps have them there too.
    at, name = _Workplace(job, "qnn", "NHWC"), job.stem
    tool = _converter(
        job, {".onnx": "qnn-onnx-converter", ".pb": "qnn-tensorflow-converter", ".tflite": "qnn-tflite-converter"}
    )
    return at.around(
        at.line(
            "convert and quantize by the encodings",
            tool,
            *("--input_network", job.model.resolve(), "--quantization_overrides", at.overrides),
            *("--input_list", INPUT_LIST, "--bias_bw", BIAS_BITS, "--output_path", f"../{name}.cpp"),
            shapes="-d",
            outputs="--out_node" if job.model.suffix == ".pb" else "",
        ),
        at.line(
            "compile", "qnn-model-lib-generator", "-c", f"../{name}.cpp", "-b", f"../{name}.bin", "-o", "../libraries"
        ),
        at.line(
            "run on the host, and write every tensor",
            "qnn-net-run",
            *("--model", f"../libraries/x86_64-linux-clang/lib{name}.so"),
            *("--backend", "$QNN_SDK_ROOT/lib/x86_64-linux-clang/libQnnHtp.so"),
            *("--input_list", INPUT_LIST, "--debug", "--output_dir", "../target"),
        ),
    )


def snpe(job: Job) -> list[Command]:
    """From the bundle to a DLC of SNPE, and back to a comparison."""
    at, name = _Workplace(job, "snpe", "NHWC"), job.stem
    tool = _converter(
        job, {".onnx": "snpe-onnx-to-dlc", ".pb": "snpe-tensorflow-to-dlc", ".tflite": "snpe-tflite-to-dlc"}
    )
    return at.around(
        at.line(
            "convert",
            tool,
            *("--input_network", job.model.resolve(), "--quantization_overrides", at.overrides),
            *("--output_path", f"../{name}.dlc"),
            shapes="-d",
            outputs="--out_node" if job.model.suffix == ".pb" else "",
        ),
        at.line(
            "quantize by the encodings (snpe-dlc-quantize in older releases)",
            "snpe-dlc-quant",
            *(f"--input_dlc=../{name}.dlc", f"--input_list={INPUT_LIST}", "--override_params"),
            *(f"--bias_bitwidth={BIAS_BITS}", f"--output_dlc=../{name}_quantized.dlc"),
        ),
        at.line(
            "prepare for the Hexagon processor",
            "snpe-dlc-graph-prepare",
            *(f"--input_dlc=../{name}_quantized.dlc", f"--output_dlc=../{name}_cached.dlc"),
            *([f"--htp_socs={job.soc}"] if job.soc else []),
        ),
        at.line(
            "run on the device, and write every tensor",
            "snpe-net-run",
            *("--container", f"../{name}_cached.dlc", "--input_list", INPUT_LIST, "--debug", "--use_dsp"),
            *("--output_dir", "../target"),
        ),
    )


def qairt(job: Job) -> list[Command]:
    """From the bundle to a DLC of QAIRT, and back to a comparison."""
    # Unlike the older converters this one keeps the model's own layout.
    at, name = _Workplace(job, "qairt", "native"), job.stem
    tool = _converter(job, dict.fromkeys((".onnx", ".pb", ".tflite"), "qairt-converter"))
    if at.schema == V2:
        job.warnings.append("schema 2.0.0 needs QAIRT 2.37 or newer")
    backend = ("--backend", "$QAIRT_SDK_ROOT/lib/x86_64-linux-clang/libQnnHtp.so")
    return [
        *at.around(
            at.line(
                "convert (--desired_input_shape in releases before 2.30)",
                tool,
                *("--input_network", job.model.resolve(), "--quantization_overrides", at.overrides),
                *("--output_path", f"../{name}.dlc"),
                shapes="--source_model_input_shape",
                outputs="--out_tensor_node" if job.model.suffix == ".pb" else "",
            ),
            at.line(
                "quantize by the encodings",
                "qairt-quantizer",
                *("--input_dlc", f"../{name}.dlc", "--input_list", INPUT_LIST, "--bias_bitwidth", BIAS_BITS),
                *("--output_dlc", f"../{name}_quantized.dlc"),
                *(["--use_quantize_v2"] if at.schema == V2 else []),
            ),
            at.line(
                "run on the host, and write every tensor",
                "qnn-net-run",
                *("--dlc_path", f"../{name}_quantized.dlc", *backend, "--input_list", INPUT_LIST),
                *("--debug", "--output_dir", "../target"),
            ),
        ),
        at.line(
            "a context binary for the device",
            "qnn-context-binary-generator",
            *("--dlc_path", f"../{name}_quantized.dlc", *backend, "--binary_file", name, "--output_dir", ".."),
        ),
    ]
