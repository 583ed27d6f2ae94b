"""How long each op of a quantized model takes in ONNX Runtime, from its own profiler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import onnxruntime as ort

from bitwright.backend import Batch
from bitwright.errors import InputError, ModelError, first_line
from bitwright.files import Scratch
from bitwright.graph import OpId
from bitwright_onnx.export.runtime import INTEGER_CONFIG
from bitwright_onnx.simulate.session import inputs_of, session_options

_REWRITTEN = re.compile(r"(_token_\d+|_quant|_nchwc)+$")
"""What ONNX Runtime's rewrites put behind the name of an op that they give another kernel or layout."""


def op_times(
    path: Path, ops: Sequence[OpId], batches: Sequence[Batch], *, repeats: int, threads: int
) -> dict[OpId, float]:
    """Seconds for one sample of each op that the runtime still runs under its name.

    Args:
        path: a QDQ model.
        ops: names to look for; an op that was fused into another has no time of its own and isn't returned.
        batches: what is fed.
        repeats: passes over the batches after one that warms up; the median of an op's times counts.
        threads: of one op.

    Raises:
        InputError: the runtime refuses a batch.
        ModelError: it refuses the model.
    """
    options = session_options(INTEGER_CONFIG)
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    wanted = set(ops)
    with Scratch() as folder:
        options.profile_file_prefix = str(folder / "profile")
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"ONNX Runtime can't run {str(path)!r}: {first_line(error)}") from error
        inputs = inputs_of(session)
        sizes = [len(next(iter(b.values()))) for b in batches]
        try:
            for _ in range(repeats + 1):
                for batch in batches:
                    session.run(None, {n: i.of(batch) for n, i in inputs.items()})
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the integer runtime refuses the batch: {first_line(error)}") from error
        finally:
            profile = Path(session.end_profiling())
        events = json.loads(profile.read_text(encoding="utf-8"))
    return _by_op(events, wanted, sizes, repeats)


def _by_op(
    events: Sequence[Mapping[str, object]], wanted: set[OpId], sizes: Sequence[int], repeats: int
) -> dict[OpId, float]:
    runs: dict[OpId, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        op = name.removesuffix("_kernel_time")
        op = op if op in wanted else _REWRITTEN.sub("", op)
        if op in wanted:
            runs.setdefault(op, []).append(float(str(event["dur"])) * 1e-6)
    found = {}
    for op, seconds in runs.items():
        warm = seconds[len(sizes) :] if len(seconds) == len(sizes) * (repeats + 1) else seconds
        found[op] = median(s / sizes[i % len(sizes)] for i, s in enumerate(warm))
    return found
