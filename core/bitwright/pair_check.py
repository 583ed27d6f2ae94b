"""Does the quantized artefact quantize just what the plan says, on the scales of the encodings file?"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.artefact import QDQ
from bitwright.backend import Backend, Bundle, QuantizedArtefact
from bitwright.formats import EncodingsFile, Problem
from bitwright.formats.entries import CAST_FORMATS
from bitwright.plan import Plan, SiteId


def check_pairs(
    backend: Backend[Any], bundle: Bundle, plan: Plan, file: EncodingsFile, *, optional: Collection[SiteId] = ()
) -> list[Problem]:
    """Whether the artefact has exactly one pair for each tensor that the plan quantizes, on the file's scales.

    Nothing to say where the bundle holds no such artefact, or the backend can't read it back. Derived biases of integer
    layers may stay in float; plain casts (float16, bfloat16) are no pairs.

    Args:
        backend: the model's.
        bundle: files by purpose.
        plan: of the exported model.
        file: the bundle's encodings.
        optional: sites that the artefact may have no tensor for (`artefact.passed_on`).
    """
    if QDQ not in bundle.files or not isinstance(backend, QuantizedArtefact):
        return []
    pairs = dict(backend.pairs(bundle))
    problems: list[Problem] = []
    for site in plan.quantized:
        scales, spec = pairs.pop(site, ()), plan.spec(site)
        if spec is None:
            if len(scales) > 1:
                problems.append(Problem(site, f"passes through {len(scales)} Q/DQ pairs"))
            continue
        if spec.float_format in CAST_FORMATS:
            continue
        if not scales and site in optional:
            continue
        if len(scales) != 1:
            problems.append(Problem(site, f"passes through {len(scales)} Q/DQ pairs, must be one"))
            continue
        entry = file.entries.get(site) or file.entries.get(f"{site}:0")  # as TensorFlow calls it
        if entry is not None and not _same_scales(scales[0], entry.scales):
            problems.append(Problem(site, "has another scale in the Q/DQ pair than in the encodings file"))
    return problems + [Problem(site, "passes through a Q/DQ pair, but isn't to be quantized") for site in pairs]


def _same_scales(pair: NDArray[Any], entry: NDArray[Any]) -> bool:
    """Equal in float32; blocks are compared as a set, as files and artefacts lay them out differently."""
    a, b = (np.asarray(v, np.float32).reshape(-1) for v in (pair, entry))
    if pair.ndim > 1:
        a, b = np.sort(a), np.sort(b)
    return bool(np.array_equal(a, b))
