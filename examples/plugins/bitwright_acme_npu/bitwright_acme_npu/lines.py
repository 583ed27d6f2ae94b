"""What is typed to bring an export onto the NPU."""

from __future__ import annotations

from bitwright_deploy.target_job import Command, Job, shell_line


def lines(job: Job) -> list[Command]:
    """From the program to what the NPU computes, and back to a comparison."""
    program = job.needed(".acme.npz", "export the model for the target acme-npu")
    return [
        Command("run the samples on the NPU", shell_line("acme-run", program, "--samples", job.data, "--dump", "npu")),
        Command("what each layer should give", shell_line("bitwright", "layer-outputs", job.directory, "--data",
                                                          job.data, "--out", "expected")),
        Command("where the NPU departs from it", shell_line("bitwright", "compare", "expected", "npu")),
    ]  # fmt: skip
